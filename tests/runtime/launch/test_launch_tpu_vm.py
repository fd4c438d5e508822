"""A TPU VM end to end, against a gcloud that records what it is asked and fails on cue."""

import shlex
import subprocess

import pytest
from launch_world import (
    PLACE,
    POD,
    SAVES_AND_WAITS,
    TPU,
    assert_failed,
    assert_nothing_runs,
    processes,
)

from jmeta.runtime.launch import steps

# At the fourth look after the run began: by then it was copied.
TAKEN = {"on": "ssh status", "after": "began", "from": 4, "to": 4, "state": "PREEMPTED"}


def test_a_run_on_a_tpu_vm_from_nothing_to_nothing(world):
    status, out, err = world.run(POD)
    assert (status, err) == (0, "")
    assert (world.out / "ckpt").read_text() == "saved\n"
    assert (world.stored() / "ckpt").read_text() == "saved\n"
    assert [path.name for path in world.stored().iterdir()] == ["ckpt"]
    assert "token none\nbegan\n" in out
    logs = world.out.with_name("n.launch") / "logs"
    assert [(logs / f"{worker}.log").read_text() for worker in (0, 1)] == [
        "token none\nbegan\n"
    ] * 2
    assert world.arguments() == ["experiments.reviews", "--preset", "full", "--out", "../run"]
    assert len(world.calls("create")) == len(world.calls("delete")) == 1
    assert not (world.fake / "vm").exists()
    assert_nothing_runs(world)


def test_everything_that_is_run_was_printed_by_the_dry_run(world):
    world.program(SAVES_AND_WAITS)
    world.cue(TAKEN)
    options = ["--sync", "0", "--restarts", "1", "--spot", "--queued", "--project", "p"]
    _, shown, _ = world.run(TPU, *options, "--dry-run")
    assert world.calls() == []
    assert not world.out.exists()
    assert world.run(TPU, *options)[0] == 0
    printed = {tuple(shlex.split(line)) for line in shown.splitlines() if line.startswith("gcloud")}
    for call in world.calls("gcloud"):
        # The log is read from where it was left.
        start = [
            word if "worker.sh log" not in word else word.rsplit(" ", 1)[0] + " 0" for word in call
        ]
        assert tuple(start) in printed
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True)


def test_a_preempted_run_goes_on_where_it_was(world):  # a queued one above
    world.program(SAVES_AND_WAITS)
    world.cue(TAKEN)
    status, out, err = world.run(TPU, "--sync", "0", "--restarts", "1")
    assert (status, err) == (0, "")
    assert "restart 1/1" in out
    assert "went on" in out
    assert world.arguments()[-1] == "--resume"
    assert len(world.calls("create")) == len(world.calls("delete")) == 2
    assert_nothing_runs(world)


def test_a_run_that_is_preempted_too_often_ends(world):
    world.program("$WAIT")
    world.cue({"on": "ssh status", "from": 2, "state": "PREEMPTED"})
    result = world.run(TPU, "--restarts", "1")
    assert_failed(world, result, "preempted")
    assert len(world.calls("create")) == len(world.calls("delete")) == 2


def test_a_worker_that_ends_because_its_vm_is_taken_away_has_not_failed(world):
    world.program('case "$*" in *--resume*) exit 0 ;; esac; exit 1')
    world.cue({"on": "tpu-vm describe", "from": 4, "to": 4, "state": "PREEMPTED"})
    status, out, _ = world.run(TPU)
    assert status == 0
    assert "restart 1/10" in out


def test_a_connection_that_hangs_because_the_vm_is_gone_is_a_preemption(world):
    world.program('case "$*" in *--resume*) exit 0 ;; esac; $WAIT')
    hangs = {"stderr": "", "status": steps.TIMED_OUT, "from": 1, "to": 1}
    world.cue({"on": "ssh status", "state": "PREEMPTED", **hangs})
    status, out, _ = world.run(TPU)
    assert status == 0
    assert "restart 1/10" in out


def test_a_copy_that_a_preemption_cuts_off_is_not_shipped_back(world):
    world.program(SAVES_AND_WAITS)
    bring = {"on": "scp n:jmeta-n/run.tar.gz", "cut": True, "stderr": "lost", "status": 255}
    world.cue({**bring, "after": "began", "from": 2, "to": 2, "state": "PREEMPTED"})
    status, out, err = world.run(TPU, "--sync", "0", "--restarts", "1")
    assert (status, err) == (0, "")
    assert "went on" in out


def test_a_start_whose_answer_is_lost_is_not_a_second_start(world, secrets):
    world.program('echo "$GREETING" >> "$FAKE/seen"')
    lost = {"stderr": "Connection reset by peer", "status": 255, "late": True, "to": 1}
    world.cue({"on": "--command=bash start", **lost})
    assert world.run(POD, *secrets)[0] == 0
    assert len([call for call in world.calls("ssh") if "worker.sh start" in str(call)]) == 2
    assert (world.fake / "seen").read_text() == "hello world\n" * 2  # once on each worker


def test_a_network_that_stutters_does_not_end_a_run(world):
    world.cue(
        {
            "on": "tpu-vm describe",
            "from": 3,
            "to": 4,
            "stderr": "ERROR: Unable to reach the server",
        },
        {"on": "ssh status", "from": 1, "to": 1, "stderr": "ERROR: 503 backend error"},
        {"on": "ssh log", "from": 1, "to": 2, "stderr": "kex_exchange", "status": 255},
    )
    status, out, err = world.run(TPU)
    assert (status, err) == (0, "")
    assert "began" in out


FAILURES = {
    "quota": ("create", "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUS' has been exceeded.",
              "the quota for v5litepod-8 in us-west4-a is used up"),
    "stockout": ("create", 'ERROR: There is no more capacity in the zone "us-west4-a"',
                 "there is no capacity for v5litepod-8"),
    "login": ("describe", "You do not currently have an active account selected.",
              "gcloud auth login"),
    "permission": ("create", "ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
                   "may not create"),
    "install": ("ssh install", "ERROR: no matching distribution", "no matching distribution"),
    "ssh": ("ssh", "ERROR: [/usr/bin/ssh] exited with return code [255].", "refuses connections"),
    "scp": ("scp", "ssh: connect to host port 22: Connection refused", "refuses connections"),
}  # fmt: skip


@pytest.mark.parametrize("cue", FAILURES)
def test_a_failure_is_one_sentence_and_leaves_nothing(world, cue):
    on, stderr, said = FAILURES[cue]
    world.cue({"on": on, "stderr": stderr})
    assert_failed(world, world.run(TPU, "--attempts", "2"), said)
    if cue != "login":  # before anything was created
        assert world.calls("delete")
    assert not (world.fake / "vm").exists()
    assert not (world.out.with_name("n.launch") / "env.sh").exists()


def test_a_vm_that_is_never_ready(world):
    world.state(first_state="CREATING")
    result = world.run(TPU, "--wait", "0.05")
    assert_failed(world, result, "was not READY after 0.05 s, but CREATING")
    assert len(world.calls("delete")) == 1


def test_a_launch_that_fails_before_the_start_leaves_no_variables_on_a_vm_that_stays(
    world, secrets
):
    (world.fake / "w0").mkdir()
    world.state(vm={"state": "READY"})
    world.cue({"on": "install", "stderr": "ERROR: no matching distribution"})
    assert_failed(world, world.run(TPU, *secrets), "no matching distribution")
    assert not list(world.fake.rglob("env.*"))


def test_a_worker_that_fails_ends_the_others(world):
    world.program('[ "${HOME##*/}" = w1 ] && exit 3; $WAIT')
    result = world.run(POD)
    assert_failed(world, result, "host-w1", "exit status 3")
    assert len(world.calls("delete")) == 1


def test_a_worker_that_vanishes_is_noticed(world):
    world.program('[ "${HOME##*/}" = w1 ] && kill -9 0; $WAIT')
    assert_failed(world, world.run(POD), "vanished from worker host-w1")


@pytest.mark.parametrize(
    ("moment", "name"), [("create", "SIGINT"), ("install", "SIGTERM"), ("ssh status", "SIGINT")]
)
def test_an_interrupted_launch_cleans_up(world, moment, name):
    world.program("trap 'echo late > ../run/ckpt; exit' TERM; touch $FAKE/began; $WAIT")
    after = {"after": "began"} if moment == "ssh status" else {}
    world.cue({"on": moment, "signal": name, "to": 1, **after})
    result = world.run(TPU)
    assert_failed(world, result, "interrupted", name, status=130)
    assert not (world.fake / "vm").exists()
    if moment == "ssh status":  # it was told, and what it saved then came back
        assert (world.out / "ckpt").read_text() == "late\n"


def test_a_vm_that_cannot_be_deleted_is_named(world):
    world.cue({"on": "delete", "stderr": "ERROR: internal"}, {"on": "create", "stderr": "no quota"})
    code, _, err = world.run(TPU)
    assert code == 1
    assert "the quota" in err
    assert (
        "then n could not be deleted and may cost money: run gcloud compute tpus tpu-vm delete"
        in err
    )
    assert len(world.calls("delete")) == 3


def test_a_vm_that_was_there_stays(world):
    (world.fake / "w0").mkdir()
    world.state(vm={"state": "READY"})
    assert world.run(TPU)[0] == 0
    assert world.calls("create") == world.calls("delete") == []
    world.program("exit 4")
    result = world.run(TPU, "--name", "m", "--out", str(world.out.with_name("m")))
    assert_failed(world, result, "exit status 4")
    assert world.calls("delete") == []


def test_a_vm_that_somebody_else_creates_meanwhile_is_not_deleted(world):
    world.cue({"on": "create", "stderr": "ERROR: ALREADY_EXISTS: it exists"})
    assert_failed(world, world.run(TPU), "somebody else")
    assert world.calls("delete") == []


@pytest.mark.parametrize(
    ("policy", "works", "deleted"),
    [("success", True, 1), ("success", False, 0), ("never", True, 0)],
)
def test_delete_says_when(world, policy, works, deleted):
    if not works:
        world.program("exit 5")
    status, out, _ = world.run(TPU, "--delete", policy)
    assert status == (0 if works else 1)
    assert len(world.calls("delete")) == deleted
    assert ("to delete it: gcloud compute tpus tpu-vm delete n" in out) == (not deleted)


def test_a_detached_run_is_followed_fetched_and_deleted_later(world):
    world.program(
        'echo saved > "$out/ckpt"; echo began; until [ -e $FAKE/finish ]; do sleep 0.1; done'
    )
    assert world.run(POD, "--detach")[0] == 0
    assert processes(world)
    world.cue({"on": "ssh status", "to": 1, "signal": "SIGINT"})
    status, _, err = world.run(["follow", *PLACE])
    assert status == 130
    assert "the run goes on" in err
    assert processes(world)
    (world.fake / "finish").touch()
    status, out, _ = world.run(["follow", *PLACE])
    assert status == 0
    assert "began" in out
    (world.out / "ckpt").unlink()
    assert world.run(["fetch", *PLACE])[0] == 0
    assert (world.out / "ckpt").read_text() == "saved\n"
    assert world.run(["delete", *PLACE])[0] == 0
    assert not (world.fake / "vm").exists()


def test_resume_ships_the_run_directory(world):
    world.out.mkdir(parents=True)
    (world.out / "ckpt").write_text("saved")
    world.program(SAVES_AND_WAITS)
    status, out, _ = world.run(TPU, "--resume")
    assert status == 0
    assert "went on" in out
    assert_failed(world, world.run(TPU), "holds a run already")
    empty = str(world.out.with_name("m"))
    assert_failed(world, world.run(TPU, "--resume", "--out", empty), "no run in")
