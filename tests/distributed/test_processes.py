"""Real processes on this machine: the same numbers on any number of them, and what they survive."""

import itertools
import shutil
import signal
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from cluster import ROOT, ended, environment, free_port, launch, log, started
from worker import TASKS, bits, draw, train

from jmeta.data.loader import episode_loader
from jmeta.runtime import checkpoint, distributed
from jmeta.runtime.fit import from_function
from jmeta.runtime.parallel import MeshConfig, make_mesh
from jmeta.testing import relative_error

WHOLE = {step: list(range(step * TASKS, (step + 1) * TASKS)) for step in range(20)}
FSDP = {"fsdp": 2}


def numbers(text, x64=False):
    """The parameters in a report."""
    return np.frombuffer(bytes.fromhex(text), np.float64 if x64 else np.float32)


def losses(result):
    return [row["loss"] for row in result.history]


def mesh(devices, **config):
    return make_mesh(MeshConfig(**config), jax.devices()[:devices])


def tasks_of_all(reports):
    """The tasks of each step: those of the processes, one after the other."""
    return {
        int(step): list(itertools.chain(*(report["given"][step] for report in reports)))
        for step in reports[0]["given"]
    }


@pytest.fixture(scope="module")
def single():
    """One device, no mesh: what all others are compared with."""
    return train(20)[0]


@pytest.fixture(scope="module")
def single64():
    with jax.enable_x64(True):
        result = train(20, outer="adam")[0]
        return losses(result), bits(result.meta)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run of one process with eight devices, stopped at its checkpoint of step 8."""
    out = tmp_path_factory.mktemp("eight") / "run"
    train(8, mesh=mesh(8, **FSDP), rules=True, out=out)
    return out


def topology(tmp_path_factory, eight, processes, devices):
    """A program of several processes that makes runs, and goes on with that of one process."""
    folder = tmp_path_factory.mktemp(f"{processes}x{devices}")
    made, ours = folder / "made", folder / "eight"
    shutil.copytree(eight, ours)
    runs = [
        {"steps": 8, "mesh": FSDP, "out": str(made)},
        {"steps": 20, "mesh": FSDP, "out": str(ours), "resume": True},
        {"steps": 20, "outer": "adam", "x64": True},
    ]
    reports = launch(folder, processes, devices, runs)
    return folder, reports


def check_topology(folder, reports, single, single64):
    begun, resumed, precise = reports
    for run in reports:
        assert all(report["losses"] == run[0]["losses"] for report in run)
        assert all(report["meta"] == run[0]["meta"] for report in run)
    # The data: every step's tasks are the global batch, in order, each in one process.
    assert tasks_of_all(begun) == {step: WHOLE[step] for step in range(8)}
    assert tasks_of_all(resumed) == {step: WHOLE[step] for step in range(8, 20)}
    assert tasks_of_all(precise) == WHOLE
    # The numbers are those of one device.
    assert losses(single)[-1] < 0.9 * losses(single)[0]
    np.testing.assert_allclose(resumed[0]["losses"], losses(single), rtol=1e-5)
    whole = numbers(bits(single.meta))
    assert relative_error(numbers(resumed[0]["meta"]), whole) < 1e-5
    np.testing.assert_allclose(precise[0]["losses"], single64[0], rtol=1e-10)
    meta64 = numbers(precise[0]["meta"], True), numbers(single64[1], True)
    assert relative_error(*meta64) < 1e-10
    # What several processes saved, fewer devices of one process restore, bit for bit, and go on.
    made = folder / "made"
    for devices, steps in ((4, 14), (1, 20)):
        layout = mesh(devices, **(FSDP if devices > 1 else {}))
        with checkpoint.open_checkpoints(made / "checkpoints") as manager:
            before, _ = train(0, mesh=layout, rules=True)
            found = checkpoint.restore(manager, before.state)
        if devices == 4:
            assert bits(found.tree.meta) == begun[0]["meta"]
        assert len(found.tree.meta["layer0"]["kernel"].sharding.device_set) == devices
        result, given = train(steps, mesh=layout, rules=True, out=made, resume=True)
        assert bits(found.tree.meta) != bits(result.meta)
        assert given == {step: WHOLE[step] for step in range(found.step, steps)}
    np.testing.assert_allclose(losses(result), losses(single), rtol=1e-5)
    assert relative_error(numbers(bits(result.meta)), whole) < 1e-5


def test_two_processes_of_four_devices_are_one_device(tmp_path_factory, eight, single, single64):
    check_topology(*topology(tmp_path_factory, eight, 2, 4), single, single64)


@pytest.mark.slow
def test_four_processes_of_two_devices_are_one_device(tmp_path_factory, eight, single, single64):
    check_topology(*topology(tmp_path_factory, eight, 4, 2), single, single64)


# --- the data -------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), step=st.integers(0, 10**9), each=st.integers(1, 5))
def test_the_parts_of_all_processes_are_the_global_batch_in_order(seed, step, each):
    def sample(seed, step):
        rng = np.random.default_rng([seed, step])
        return {"x": rng.normal(size=(4 * each, 3)), "id": rng.permutation(4 * each)}

    def at(process):
        loader = episode_loader(sample, seed=seed, start=step, threads=0, process=process)
        plain = from_function(lambda step: sample(seed, step), process=process)
        plain.restore(step)
        one, other = next(loader), next(plain)
        loader.close()
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
        return one

    for count in (1, 2, 4):
        parts = [at((index, count)) for index in range(count)]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        assert jax.tree.all(jax.tree.map(np.array_equal, joined, sample(seed, step)))


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(ValueError, match="16 rows, which 3 processes cannot share equally"):
        next(from_function(draw, process=(0, 3)))


# --- joining --------------------------------------------------------------------------------------


def test_one_machine_needs_nothing(monkeypatch):
    for name in (distributed.ADDRESS, distributed.COUNT, distributed.INDEX):
        monkeypatch.delenv(name, raising=False)
    with distributed.session():
        distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert (distributed.is_writer(), distributed.name()) == (True, "process 0 of 1")
    assert not distributed.told_to_stop(1)
    assert distributed.first_says(False) is False
    with pytest.raises(ZeroDivisionError), distributed.session():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (("localhost:1",), ValueError, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be given too"),
        ((None, 2, 1), ValueError, "JAX_COORDINATOR_ADDRESS must be given too"),
        (("localhost", 2, 1), ValueError, "host:port, not 'localhost'"),
        (("localhost:1", 2, 2), ValueError, "process 2 of 2: they are numbered from 0"),
        (("localhost:1", 2, -1), ValueError, "process -1 of 2"),
        (
            ("localhost:1", 2, 1),
            ConnectionError,
            "process 1 cannot reach the coordinator, process 0, at localhost:1 .*start process 0",
        ),
        (("localhost:1", 2, 0), RuntimeError, "JAX is in use already: call .*first of all"),
    ],
)
def test_what_cannot_be_joined_is_said(given, error, words):
    jax.devices()
    with pytest.raises(error, match=words):
        distributed.initialize(*given, connect_seconds=0)


def test_a_scheduler_that_was_not_heeded_is_said(monkeypatch):
    jax.devices()
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(RuntimeError, match="JAX is in use already"):
        distributed.initialize()
    monkeypatch.setenv("JMETA_HEARTBEAT_SECONDS", "0")
    with pytest.raises(ValueError, match="heartbeat is 0 seconds; it must be positive"):
        distributed.initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 'two'"):
        distributed.initialize()


# --- deaths ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_death_of_a_process_ends_the_others_and_costs_only_time(tmp_path, single):
    out, last = str(tmp_path / "run"), 2
    plan = {"process": [1], "step": 22, "signal": int(signal.SIGKILL)}
    runs = [{"steps": 30, "out": out, "checkpoint_every": 5, "act": plan}]
    with started(tmp_path / "first", 2, last, runs) as children:
        assert children[1].wait(150) == -signal.SIGKILL
        begun = time.monotonic()
        assert children[0].wait(60) == 1
        assert time.monotonic() - begun < 30
    said = log(tmp_path / "first", 0)
    assert "jmeta: process 1 is gone; process 0 of 2 cannot go on without it" in said
    assert said.rstrip().endswith("goes on from its newest whole checkpoint")
    # Two processes again; a notice to one of them ends both after the same step, saved.
    notice = {"process": [1], "step": 33, "signal": int(signal.SIGTERM)}
    slow = {"steps": 10**6, "out": out, "checkpoint_every": 10**6, "resume": True, "log_every": 50}
    (stopped,) = launch(tmp_path / "second", 2, last, [slow | {"act": notice}])
    assert all(report["interrupted"] for report in stopped)
    step = stopped[0]["step"]
    assert step == stopped[1]["step"] > 33
    first = min(map(int, stopped[0]["given"]))
    assert first >= 5, "a checkpoint was whole when the process was killed"
    whole = {i: list(range(i * TASKS, (i + 1) * TASKS)) for i in range(first, step)}
    assert tasks_of_all(stopped) == whole
    with checkpoint.open_checkpoints(tmp_path / "run" / "checkpoints") as manager:
        assert manager.latest_step() == step
        found = checkpoint.restore(manager, train(0)[0].state)
    assert bits(found.tree.meta) == stopped[0]["meta"]


WAITS = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from jmeta.runtime import distributed
import jax
here = int(sys.argv[2])
with distributed.session("localhost:" + sys.argv[1], int(sys.argv[3]), here):
    distributed.barrier("begun")
    if here == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)  # as in a reduction that never returns
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_whoever_waits_for_ever_learns_of_a_death(processes):
    port, children = free_port(), []
    for index in range(processes):
        program = [sys.executable, "-c", WAITS, str(port), str(index), str(processes)]
        children.append(
            subprocess.Popen(program, stderr=subprocess.PIPE, env=environment(1), text=True)
        )
    try:
        assert children[1].wait(150) == -signal.SIGKILL
        begun = time.monotonic()
        for index in {*range(processes)} - {1}:
            _, said = children[index].communicate(timeout=60)
            assert children[index].returncode == 1
            assert f"jmeta: process 1 is gone; process {index} of {processes} cannot" in said
        assert time.monotonic() - begun < 30
    finally:
        for child in children:
            child.kill()


@pytest.mark.slow
def test_the_death_of_the_coordinator_ends_the_others(tmp_path):
    plan = {"process": [0], "step": 7, "signal": int(signal.SIGKILL)}
    runs = [{"steps": 1000, "out": str(tmp_path / "run"), "act": plan}]
    with started(tmp_path / "w", 4, 1, runs) as children:
        assert children[0].wait(150) == -signal.SIGKILL
        codes = [child.wait(60) for child in children[1:]]
    assert all(codes), codes
    for index in (1, 2, 3):
        said = log(tmp_path / "w", index)
        assert "process 0 is gone" in said or "another task died" in said


@pytest.mark.slow
def test_a_source_that_one_process_has_lost_ends_all(tmp_path):
    plan = {"process": [1], "step": 9}
    runs = [{"steps": 1000, "out": str(tmp_path / "run"), "vanish": plan}]
    with started(tmp_path / "w", 2, 1, runs) as children:
        codes = ended(children)
    assert all(codes), codes
    assert "process 1 of 2 failed (FileNotFoundError" in log(tmp_path / "w", 1)
    assert "train.jsonl" in log(tmp_path / "w", 1)
    assert "process 1 failed (FileNotFoundError" in log(tmp_path / "w", 0)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all_processes(tmp_path):
    out = tmp_path / "run"
    train(12, mesh=mesh(8, **FSDP), rules=True, out=out, checkpoint_every=4)
    for path in (out / "checkpoints" / "12" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    runs = [{"steps": 14, "mesh": FSDP, "out": str(out), "resume": True}]
    (reports,) = launch(tmp_path / "w", 2, 4, runs)
    assert tasks_of_all(reports) == {step: WHOLE[step] for step in range(8, 14)}
    for index in (0, 1):
        said = log(tmp_path / "w", index)
        assert f"[process {index} of 2]" in said
        assert "the checkpoint of step 12" in said
    assert (tmp_path / "run" / "checkpoints.damaged" / "12").is_dir()


@pytest.mark.slow
def test_a_process_that_begins_with_other_numbers_is_named(tmp_path):
    program = f"""
import sys, jax
sys.path.insert(0, {str(ROOT / "tests" / "distributed")!r})
import worker
from jmeta.models import mlp
from jmeta.runtime import distributed
here = int(sys.argv[1])
with distributed.session("localhost:{free_port()}", 2, here):
    init = mlp.init
    mlp.init = lambda key, sizes: init(jax.random.key(here), sizes)
    worker.train(3)
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(index)],
            stderr=subprocess.PIPE,
            env=environment(1),
            text=True,
        )
        for index in range(2)
    ]
    try:
        for child in children:
            _, said = child.communicate(timeout=150)
            assert child.returncode == 1
            assert "process 1 begins with another 'meta.layer0.kernel' than process 0" in said
    finally:
        for child in children:
            child.kill()
