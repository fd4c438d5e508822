"""What a dry run prints, how arguments are quoted, and the pieces that run a step."""

import os
import pathlib
import shlex
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_world import (
    COMMAND,
    GOLDEN,
    K8S,
    PLACE,
    POD,
    SKY,
    SLURM,
    TPU,
    expanded,
)

from experiments.launch import __main__ as cli
from jmeta.runtime.launch import kubernetes, kubernetes_plan, skypilot, steps, tpu_vm
from jmeta.runtime.launch.steps import CommandError, LaunchError, Section, Step, Write


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4)
)
def test_arguments_survive_every_format(arguments):
    command = ["experiments.reviews", *["x" + argument for argument in arguments]]
    config = kubernetes.Kubernetes(name="n", claim="c", image="i", env=("A=$(B)",))
    made = kubernetes_plan.commands(config, command, cli.template("jobset.yaml"))[0].stage[1]
    manifest = yaml.safe_load(made.text)
    (job,) = manifest["spec"]["replicatedJobs"]
    (box,) = job["template"]["spec"]["template"]["spec"]["containers"]
    words = [expanded(word) for word in box["command"]]
    assert words[4:] == ["python", "-u", "-m", *command, "--out", "/runs/n"]
    assert expanded(box["env"][1]["value"]) == "$(B)"
    task = skypilot.SkyPilot(name="n", accelerators="H100:8", bucket="gs://b")
    text = skypilot.plan(task, command, cli.template("skypilot.yaml"))[0].steps[1].text
    lines = yaml.safe_load(text)["run"].partition("\nset -- ")[2].rpartition("\nexec ")[0]
    assert shlex.split(lines) == ["-u", "-m", *command, "--out", "/runs/n", "--resume"]
    line = tpu_vm.commands(tpu_vm.TpuVm(name="n", zone="z", type="v5p-8"), command, "")[
        0
    ].start.argv
    (remote,) = [word for word in line if word.startswith("--command=")]
    assert shlex.split(remote)[3:] == [*command, "--out", "../run"]


DRY = {
    "tpu_vm": TPU,
    "tpu_vm_queued": [*TPU, "--spot", "--queued", "--project", "p", "--internal-ip",
                      "--resume", "--delete", "success"],
    "tpu_vm_bucket": POD,
    "tpu_vm_share": [*POD[:-1], "nfs://10.0.0.2/vol1/runs", "--resume", "--restarts", "0"],
    "tpu_vm_detached": [*TPU, "--detach", "--env", "A=b c", "--env", "B=1"],
    "slurm": [*SLURM, "--nodes", "2", "--gpus", "8", "--partition", "gpu", "--before",
              "module load cuda"],
    "kubernetes": [*K8S, "--tpu", "tpu-v5-lite-podslice", "--topology", "4x4", "--spot"],
    "kubernetes_gpu": [*K8S, "--nodes", "2", "--gpus", "8", "--namespace", "ml",
                       "--selector", "cloud.google.com/gke-accelerator=nvidia-h100-80gb"],
    "skypilot": SKY,
    "follow_tpu_vm": ["follow", *PLACE],
    "delete_kubernetes": ["delete", *K8S],
    "delete_slurm": ["delete", *SLURM[:3]],
}  # fmt: skip


@pytest.mark.parametrize("name", DRY)
def test_dry_run(world, name):
    argv = DRY[name]
    status = cli.main([*argv, "--dry-run", *([] if argv[0] in cli.VERBS else COMMAND)])
    shown = world.capsys.readouterr().out
    assert status == 0
    assert world.calls() == []
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True)
    shown = shown.replace(cli.template("worker.sh"), "# all of experiments/launch/worker.sh\n")
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(shown)
    assert shown == file.read_text()


def test_the_files_of_a_dry_run_are_those_of_a_run(world, tmp_path):
    hostile = "END_OF_FILE\necho pwned"
    text = steps.render([Section("x", (Write(tmp_path / "a b", f"{hostile}\n"),))])
    assert subprocess.run(["bash", "-c", text], capture_output=True, check=True).stdout == b""
    assert (tmp_path / "a b").read_text() == f"{hostile}\n"


def test_a_checkout_with_changes_is_not_shipped_silently(world, repo):
    file = repo / "experiments" / "reviews.py"
    file.write_text("changed")
    try:
        assert cli.main([*TPU, "--poll", "0.01", "--out", str(world.out), *COMMAND]) == 1
        assert "1 tracked files differ from HEAD" in world.capsys.readouterr().err
        assert world.calls() == []
    finally:
        file.write_text("")


def test_a_program_that_is_missing_hangs_or_leaves_children(tmp_path):
    with pytest.raises(LaunchError, match="no-such-tool is not installed"):
        steps.run(Step(("no-such-tool",)))
    with pytest.raises(CommandError, match="took longer than"):
        steps.run(Step(("sh", "-c", f"sleep 71.25 & echo $! > {tmp_path}/pid; wait"), 0.1))
    child = (tmp_path / "pid").read_text().strip()
    for _ in range(100):
        status = pathlib.Path(f"/proc/{child}/status")
        if not status.exists() or "\nState:\tZ" in status.read_text():
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the child outlived its launcher")


def test_the_list_of_experiments_and_the_launcher_as_a_module():
    root = pathlib.Path(cli.__file__).parents[2]
    listed = subprocess.run([sys.executable, "-m", "experiments"], cwd=root, capture_output=True,
                            text=True, check=True).stdout  # fmt: skip
    assert "sinusoid" in listed
    help_ = subprocess.run([sys.executable, "-m", "experiments.launch", "--help"], cwd=root,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert all(backend in help_ for backend in cli.LAUNCHES)
    assert cli.main(["fly"]) == 2
