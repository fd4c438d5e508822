"""A whole experiment in several processes: its results are those of one."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cluster import ROOT, environment, free_port

from jmeta.runtime.report import read_results

SINUSOID = ["experiments.sinusoid", "--preset", "smoke", "--meta-steps", "10"]
TEACHERS = {
    "two_moons": ["experiments.two_moons", "--preset", "smoke"],
    "meta_lm": ["experiments.meta_lm", "--preset", "smoke", "--micro-batches", "2"],
}
MEASURED = ("seconds", "steps of MLM")


def run(command, out, processes, devices, *options):
    """Run an experiment in several processes; what each printed."""
    port, children = free_port(), []
    for index in range(processes):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", *command, "--out", str(out), *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(devices) | (cluster if processes > 1 else {}),
                text=True,
            )
        )
    try:
        said = [child.communicate(timeout=400)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, said[-1][-3000:]
    return said


def results(out):
    """The numbers of a run by what they are of."""
    rows = read_results(out / "results.json")["rows"]
    settings = ("method", "seed", "metric", "test_steps", "labels", "task", "measure",
                "monitor")  # fmt: skip
    return {
        tuple(str(row.get(key)) for key in settings): row["value"]
        for row in rows
        if not any(word in row["metric"] for word in MEASURED)
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    run(SINUSOID, out, 1, 1)
    return results(out)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (4, 4)])
def test_an_experiment_of_several_processes_gives_the_results_of_one(
    tmp_path, alone, processes, devices
):
    out = tmp_path / "run"
    said = run(
        SINUSOID, out, processes, devices, "--seeds", "2"
    )  # which only the writer's report reads
    found = results(out)
    assert found.keys() == alone.keys()
    for what, value in alone.items():
        np.testing.assert_allclose(found[what], value, rtol=1e-4, err_msg=str(what))
    assert (out / "report.html").stat().st_size > 1000
    assert "difference to maml" in said[0]
    assert not any("difference to maml" in each for each in said[1:])
    # Two tasks for four devices of each process: half of them repeat the others' work.
    repeated = "8 tasks cannot be split evenly over 16 devices: only 8 work"
    assert all((repeated in each) == (devices == 4) for each in said)
    assert os.listdir(out / "maml" / "checkpoints") == ["10"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_in_two_processes_are_those_of_one(tmp_path, name):
    run(TEACHERS[name], tmp_path / "one", 1, 2)
    run(TEACHERS[name], tmp_path / "two", 2, 1)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two.keys() == one.keys()
    for what, value in one.items():
        np.testing.assert_allclose(two[what], value, rtol=1e-3, atol=1e-3, err_msg=str(what))
    assert (tmp_path / "two" / "report.html").stat().st_size > 1000
