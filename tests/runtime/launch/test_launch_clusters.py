"""Slurm, Kubernetes and SkyPilot, against programs that record what they are asked."""

import os
import subprocess

import pytest
import yaml
from launch_world import (
    HOSTILE,
    K8S,
    SECRET,
    SKY,
    SLURM,
    assert_failed,
    assert_nothing_runs,
    expanded,
    kept,
)

from experiments.launch import __main__ as cli
from jmeta.runtime.launch import kubernetes, kubernetes_plan
from jmeta.runtime.launch.steps import LaunchError


def test_hostile_arguments_reach_the_program_of_a_slurm_job_verbatim(world):
    command = ["--", "experiments.reviews", *HOSTILE]
    (world.fake / "program").write_text("exit 0")
    out = world.repo / "runs" / "hostile"
    assert world.run(SLURM, "--out", str(out), command=command)[0] == 0
    assert world.arguments() == ["experiments.reviews", *HOSTILE, "--out", "../../hostile"]


def test_a_slurm_job_from_the_queue_to_the_end(world):
    out = world.repo / "runs" / "a"
    world.program('echo saved > "$FAKE/ckpt"; echo began')
    status, shown, err = world.run(SLURM, "--out", str(out))
    assert (status, err) == (0, "")
    assert "submitted as job 7" in shown
    assert "began" in shown
    assert world.calls("scancel") == []
    assert_nothing_runs(world)


def test_a_slurm_job_is_told_before_its_limit_and_queued_again(world):
    world.program(
        'case "$*" in *--resume*) echo went on; exit 0 ;; esac\n'
        "trap 'echo saved; exit 1' TERM; echo began; touch $FAKE/began; $WAIT"
    )
    world.cue({"on": "squeue", "after": "began", "to": 1, "usr1": True})
    status, shown, err = world.run(SLURM, "--out", str(world.repo / "runs" / "b"))
    assert (status, err) == (0, "")
    assert shown.index("began") < shown.index("saved") < shown.index("went on")
    assert world.calls("scontrol") == [["scontrol", "requeue", "7"]]
    assert world.arguments()[-1] == "--resume"
    assert_nothing_runs(world)


def test_a_slurm_step_has_all_gpus_and_cores_of_its_node(world):
    world.program('echo "$JAX_LOCAL_DEVICE_IDS" > "$FAKE/devices"')
    out = str(world.repo / "runs" / "g")
    assert world.run(SLURM, "--out", out, "--gpus", "4", "--cpus", "12")[0] == 0
    # By itself JAX takes one GPU for a process under Slurm, and srun one core.
    assert (world.fake / "devices").read_text() == "0,1,2,3\n"
    assert len(world.calls("srun", "--cpus-per-task=12")) == 1


def test_a_slurm_step_that_ends_as_if_by_the_notice_has_ended(world):
    world.program("exit 138")
    result = world.run(SLURM, "--out", str(world.repo / "runs" / "h"))
    assert_failed(world, result, "exit status 138")


def test_a_job_whose_submission_is_interrupted_is_cancelled(world):
    world.program("$WAIT")
    world.cue({"on": "submitted", "signal": "SIGINT", "sleep": 0.2})
    result = world.run(SLURM, "--out", str(world.repo / "runs" / "i"))
    assert_failed(world, result, "interrupted (SIGINT): the run was ended", status=130)
    assert len(world.calls("scancel")) == 1


SLURM_FAILURES = {
    "limits": (
        {"on": "sbatch", "stderr": "sbatch: error: QOSMaxSubmitJobPerUserLimit"},
        "limits forbid",
    ),
    "rejected": (
        {"on": "sbatch", "stderr": "sbatch: error: invalid partition"},
        "invalid partition",
    ),
    "controller": (
        {"on": "squeue", "stderr": "slurm_load_jobs error: Unable to contact"},
        "Unable to",
    ),
    "interrupted": ({"on": "squeue", "signal": "SIGINT", "to": 1}, "interrupted"),
}


@pytest.mark.parametrize("cue", SLURM_FAILURES)
def test_a_failed_slurm_launch_leaves_no_job(world, cue):
    what, said = SLURM_FAILURES[cue]
    world.program("$WAIT")
    world.cue(what)
    result = world.run(SLURM, "--out", str(world.repo / "runs" / cue))
    assert_failed(world, result, said, status=130 if cue == "interrupted" else 1)
    assert bool(world.calls("scancel")) == ("sbatch" not in what["on"])


def test_a_slurm_command_that_fails_says_its_status(world):
    world.program("exit 6")
    assert_failed(world, world.run(SLURM, "--out", str(world.repo / "runs" / "c")), "exit status 6")


def test_a_slurm_job_that_is_cancelled_from_outside(world):
    world.program("kill -9 -- -$(cat $FAKE/job.pid)")
    result = world.run(SLURM, "--out", str(world.repo / "runs" / "d"))
    assert_failed(world, result, "ended without an exit status")


def test_a_detached_slurm_job_is_followed_and_cancelled_later(world):
    out = str(world.repo / "runs" / "e")
    world.program("echo began; $WAIT")
    assert world.run(SLURM, "--out", out, "--detach")[0] == 0
    world.cue({"on": "squeue", "signal": "SIGINT", "from": 3, "to": 3})
    assert world.run(["follow", "slurm", "--name", "n"], "--out", out)[0] == 130
    assert world.calls("scancel") == []
    assert world.run(["delete", "slurm", "--name", "n"], "--out", out)[0] == 0
    assert_nothing_runs(world)


def test_a_detached_slurm_job_removes_its_variables_itself(world, secrets):
    out = world.repo / "runs" / "j"
    world.program("exit 0")
    assert world.run(SLURM, "--out", str(out), "--detach", *secrets)[0] == 0
    assert_nothing_runs(world)
    assert out.with_name("j.launch").joinpath("exit").read_text() == "0\n"
    assert not out.with_name("j.launch").joinpath("env.sh").exists()


def test_secrets_of_a_slurm_job_stay_private(world, secrets):
    out = world.repo / "runs" / "f"
    world.program('stat -c %a ../env.sh > "$FAKE/mode"; echo "$HF_TOKEN" > "$FAKE/seen"')
    status, shown, _ = world.run(SLURM, "--out", str(out), *secrets)
    assert status == 0
    assert (world.fake / "mode").read_text() == "600\n"
    assert (world.fake / "seen").read_text() == f"{SECRET}\n"
    assert not out.with_name("f.launch").joinpath("env.sh").exists()
    assert SECRET not in shown + (world.fake / "calls").read_text()
    assert SECRET not in out.with_name("f.launch").joinpath("job.sh").read_text()


def test_a_jobset_from_nothing_to_nothing(world, secrets):
    restarted = {"restarts": 1, "conditions": []}
    done = {"restarts": 1, "conditions": [{"type": "Completed", "status": "True"}]}
    world.state(statuses=[{}, {}, restarted, done])
    status, out, err = world.run(K8S, *secrets)
    assert (status, err) == (0, "")
    assert out.count("step 1\n") == out.count("step 2\n") == 1
    assert "restarted it: 1/10" in out
    assert (world.out / "ckpt").read_text() == "from the claim"
    assert (world.fake / "cluster").read_text() == "{}"
    assert not (world.fake / "secret").exists()
    for text in [out, err, *kept(world)]:
        assert SECRET not in text


def test_the_secret_holds_the_values_as_they_are(world, secrets):
    world.cue({"on": "create jobset.yaml", "stderr": "Error from server: exceeded quota: tpus"})
    result = world.run(K8S, *secrets, "--delete", "never")
    assert_failed(world, result, "quota forbids this JobSet")
    assert len(world.calls("kubectl", "secret", "create")) == 1
    assert world.calls("delete", "jobset")


def terminated(status, reason):
    state = {"state": {"terminated": {"exitCode": status, "reason": reason}}}
    return [{"metadata": {"name": "n-workers-0-1-x"},
             "status": {"phase": "Failed", "containerStatuses": [state]}}]  # fmt: skip


def unscheduled(message):
    condition = {"type": "PodScheduled", "status": "False", "message": message}
    return [
        {"metadata": {"name": "n-x"}, "status": {"phase": "Pending", "conditions": [condition]}}
    ]


FAILED = [{}, {"restarts": 2, "conditions": [{"type": "Failed", "status": "True"}]}]
K8S_FAILURES = {
    "command": (
        {"statuses": FAILED, "pods": terminated(3, "Error")}, [], "status 3 (Error) after 2",
    ),
    "memory": ({"statuses": FAILED, "pods": terminated(137, "OOMKilled")}, [], "OOMKilled"),
    "preempted": ({"statuses": FAILED, "pods": []}, [], "taken away"),
    "never ready": (
        {"statuses": [{}], "pods": unscheduled("0/3 nodes are available: google.com/tpu.")}, [],
        "0/3 nodes are available",
    ),
    "no JobSets": (
        {}, [{"on": "get jobset", "stderr": "error: the server doesn't have a resource type"}],
        "has no JobSets",
    ),
    "helper": (
        {}, [{"on": "wait", "stderr": "error: timed out waiting for the condition"}], "timed out",
    ),
    "silent": (
        {}, [{"on": "get jobset", "from": 2, "stderr": "Unable to connect to the server"}],
        "Unable to connect",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cue", K8S_FAILURES)
def test_a_failed_jobset_is_one_sentence_and_leaves_nothing(world, cue):
    state, cues, said = K8S_FAILURES[cue]
    world.state(**state)
    world.cue(*cues)
    assert_failed(world, world.run(K8S, "--wait", "0.02"), said)
    cluster = world.fake / "cluster"
    assert not cluster.exists() or cluster.read_text() == "{}"


def test_an_interrupted_jobset_is_deleted(world):
    world.state(statuses=[{}])
    world.cue({"on": "get pods", "signal": "SIGTERM", "to": 1})
    assert_failed(world, world.run(K8S), "interrupted", status=130)
    assert (world.fake / "cluster").read_text() == "{}"


def test_an_interrupted_fetch_leaves_no_helper(world):
    world.cue({"on": "cp n-files:/runs/n", "signal": "SIGINT"})
    status, _, err = world.run(["fetch", *K8S])
    assert status == 130
    assert "the run goes on" in err
    assert (world.fake / "cluster").read_text() == "{}"


def test_a_jobset_that_is_kept_is_not_said_to_have_ended(world):
    world.state(statuses=[{}])
    world.cue({"on": "get pods", "signal": "SIGTERM", "to": 1})
    status, out, err = world.run(K8S, "--delete", "never")
    assert status == 130
    assert "the JobSet is kept" in err
    assert "to delete it: kubectl delete jobset n" in out


def test_a_claim_that_holds_another_run_is_not_gone_on_with(world):
    # Its first process would refuse, and the second, with --resume, go on with the other run.
    world.state(claim=True)
    assert_failed(world, world.run(K8S), "/runs/n on the claim runs holds a run already")
    assert world.calls("create", "--filename=" + str(world.out) + ".launch/jobset.yaml") == []
    assert world.run(K8S, "--resume")[0] == 0
    (world.fake / "claim").unlink()
    assert_failed(world, world.run(K8S, "--resume"), "there is no run in /runs/n")


def test_a_cluster_that_answers_nonsense_is_one_sentence(world):
    (world.fake.parent / "bin" / "kubectl").write_text("#!/bin/sh\necho '<html>'\n")
    assert_failed(world, world.run(K8S), "kubectl get jobset n gave something other than JSON")


def test_a_jobset_of_this_name_that_is_there_is_left_alone(world):
    world.state(cluster={"JobSet": 0}, statuses=[{}])
    assert_failed(world, world.run(K8S), "is there already")
    assert world.calls("delete") == []


def test_the_containers_command_runs_the_shipped_code(world, tmp_path):
    config = kubernetes.Kubernetes(name="n", claim="c", image="i")
    made = kubernetes_plan.commands(
        config, ["experiments.reviews", *HOSTILE], cli.template("jobset.yaml")
    )
    (job,) = yaml.safe_load(made[0].stage[1].text)["spec"]["replicatedJobs"]
    (box,) = job["template"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "runs").mkdir()
    packed = tmp_path / "runs" / "n.code.tar.gz"
    subprocess.run(["git", "archive", "-o", packed, "HEAD"], cwd=world.repo, check=True)
    words = [expanded(word) for word in box["command"]]
    words[2] = words[2].replace("/runs/", f"{tmp_path}/runs/")
    world.program("test -f experiments/reviews.py || exit 8")
    for attempt, last in (("0", "/runs/n"), ("2", "--resume")):
        environment = {**os.environ, "JMETA_RESTART_ATTEMPT": attempt, "TMPDIR": str(tmp_path)}
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
        assert world.arguments()[1 : 1 + len(HOSTILE)] == HOSTILE
        assert world.arguments()[-1] == last


def test_the_jobset_has_the_fields_that_the_cluster_reads():
    config = kubernetes.Kubernetes(
        name="n", claim="c", image="i", tpu="tpu-v5-lite-podslice", topology="4x4", spot=True,
        restarts=3, selector=("a/b=c",),
    )  # fmt: skip
    template = yaml.safe_load(cli.template("jobset.yaml"))
    made = kubernetes.jobset(config, ["experiments.reviews"], True, template)
    assert made["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert made["spec"]["failurePolicy"] == {"maxRestarts": 3}
    assert made["spec"]["network"] == {"enableDNSHostnames": True}
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        1,
        4,
        4,
        0,
    )
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
        "a/b": "c",
    }
    (box,) = pod["containers"]
    assert box["resources"] == {"limits": {"google.com/tpu": 4}}
    assert box["envFrom"] == [{"secretRef": {"name": "n-env"}}]
    (mount,), (volume,) = box["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    gpus = kubernetes.Kubernetes(name="n", claim="c", image="i", nodes=2, gpus=8)
    (job,) = kubernetes.jobset(gpus, ["m"], False, template)["spec"]["replicatedJobs"]
    (box,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert box["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert job["template"]["spec"]["completions"] == 2


def test_what_the_template_says_of_pods_stays_beside_what_a_run_adds():
    template = yaml.safe_load(cli.template("jobset.yaml"))
    (job,) = template["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]
    pod["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    mine = {"key": "mine", "operator": "Exists"}
    more = {"serviceAccountName": "trainer", "volumes": [{"name": "data"}], "tolerations": [mine]}
    pod["spec"] |= more | {"nodeSelector": {"disk": "ssd"}}
    pod["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    config = kubernetes.Kubernetes(name="n", claim="c", image="i", selector=("a=b",), spot=True)
    made = kubernetes.jobset(config, ["m"], False, template)
    found = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert found["metadata"] == pod["metadata"]
    spec = found["spec"]
    assert [volume["name"] for volume in spec["volumes"]] == ["data", "runs"]
    assert [mount["name"] for mount in spec["containers"][0]["volumeMounts"]] == ["data", "runs"]
    assert spec["nodeSelector"] == {"disk": "ssd", "cloud.google.com/gke-spot": "true", "a": "b"}
    assert [each["key"] for each in spec["tolerations"]] == ["mine", "cloud.google.com/gke-spot"]
    # A claim may need them of every pod that mounts it: the one that copies files too.
    helper = kubernetes.helper(config, template)
    assert helper["metadata"] == pod["metadata"] | {"name": "n-files"}
    assert helper["spec"]["serviceAccountName"] == "trainer"


@pytest.mark.parametrize("wrong", [
    {"tpu": "t"}, {"topology": "4x4"}, {"tpu": "t", "topology": "4x4", "nodes": 3},
    {"tpu": "t", "topology": "four"}, {"tpu": "t", "topology": "3x3"}, {"nodes": 0},
    {"tpu": "t", "topology": "2x2", "gpus": 1}, {"selector": ("a",)}, {"restarts": -1},
])  # fmt: skip
def test_nodes_that_do_not_fit_are_refused(wrong):
    config = kubernetes.Kubernetes(name="n", claim="c", image="i", **wrong)
    with pytest.raises(LaunchError):
        kubernetes.jobset(config, ["m"], False, yaml.safe_load(cli.template("jobset.yaml")))


def test_a_skypilot_task_is_written_and_resumes_in_the_same_job(world, tmp_path, secrets):
    file = tmp_path / "task.yaml"
    argv = [*SKY, "--out", str(file), *secrets, "--", "experiments.reviews", *HOSTILE]
    assert cli.main(argv) == 0
    assert "--secret HF_TOKEN" in world.capsys.readouterr().out
    task = yaml.safe_load(file.read_text())
    assert task["secrets"] == {"HF_TOKEN": None, "QUOTED_SECRET": None}
    assert task["envs"] == {"GREETING": "hello world"}
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"] == {"/runs": {"source": "gs://mine", "mode": "MOUNT"}}
    assert SECRET not in file.read_text()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(tmp_path / "bin" / "python")
    world.program("exit 0")
    (tmp_path / "runs").mkdir()
    run = (
        task["run"]
        .replace(" /runs/", f" {tmp_path}/runs/")
        .replace("=/runs/", f"={tmp_path}/runs/")
    )
    start = lambda job: subprocess.run(  # noqa: E731
        ["bash", "-c", run],
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_TASK_ID": job},
        stdout=subprocess.PIPE,
        text=True,
    )
    # Two machines of a slice, and one of them again after a preemption: all with one command.
    for _ in range(3):
        assert start("a").returncode == 0
        assert world.arguments()[1 : 1 + len(HOSTILE)] == HOSTILE
        assert world.arguments()[-1] == "--resume"
        (tmp_path / "runs" / "n").mkdir(exist_ok=True)
    (world.fake / "arguments").unlink()
    for _ in range(2):  # another task of the same name, and its next attempt
        refused = start("b")
        assert refused.returncode == 1
        assert "holds a run already" in refused.stdout
    assert not (world.fake / "arguments").exists()
