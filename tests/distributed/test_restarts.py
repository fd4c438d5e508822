"""Runs of several processes that cannot begin, or begin again elsewhere: what is said and kept."""

import jax
import numpy as np
import pytest
from cluster import ended, launch, log, started
from worker import bits, train

from jmeta.runtime.parallel import MeshConfig, make_mesh
from jmeta.testing import relative_error

pytestmark = pytest.mark.slow


def numbers(text):
    return np.frombuffer(bytes.fromhex(text), np.float32)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"steps": 30}, "process 1 was started with another 'steps' than process 0"),
        ({"checkpoint_every": 3}, "process 1 was started with another 'checkpoint_every'"),
    ],
)
def test_processes_that_were_asked_for_different_things_say_so(tmp_path, other, said):
    runs = [{"steps": 20, "out": str(tmp_path / "run"), "only": {"1": other}}]
    with started(tmp_path / "w", 2, 1, runs) as children:
        assert ended(children) == [1, 1]
    for index in (0, 1):
        assert said in log(tmp_path / "w", index)


def test_a_folder_that_one_process_does_not_see_ends_all(tmp_path):
    only = {"1": {"out": str(tmp_path / "elsewhere")}}
    runs = [{"steps": 20, "out": str(tmp_path / "run"), "only": only}]
    with started(tmp_path / "w", 2, 1, runs) as children:
        assert ended(children) == [1, 1]
    for index in (0, 1):
        assert "process 1 does not see what process 0 writes" in log(tmp_path / "w", index)


def test_persistent_students_go_on_on_fewer_processes_and_devices(tmp_path):
    alone = train(14, persistent=True)[0]
    out = tmp_path / "run"
    (begun,) = launch(tmp_path / "w", 2, 2, [{"steps": 8, "persistent": True, "out": str(out)}])
    assert begun[0]["students"] == begun[1]["students"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    train(11, persistent=True, mesh=mesh, out=out, resume=True)
    after = train(14, persistent=True, out=out, resume=True)[0]
    assert after.state.estimator_state.step.tolist() == [14] * 16
    assert relative_error(numbers(bits(after.meta)), numbers(bits(alone.meta))) < 1e-5
    fast = bits(after.state.estimator_state.fast), bits(alone.state.estimator_state.fast)
    assert relative_error(*map(numbers, fast)) < 1e-5
    (again,) = launch(
        tmp_path / "v", 2, 1, [{"steps": 14, "persistent": True, "out": str(out), "resume": True}]
    )
    assert again[0]["students"] == bits(after.state.estimator_state)


def test_what_one_process_alone_cannot_read_is_passed_over_by_all(tmp_path):
    out, fsdp = tmp_path / "run", {"fsdp": 4}
    runs = [{"steps": 8, "mesh": fsdp, "out": str(out), "checkpoint_every": 4}]
    launch(tmp_path / "w", 2, 2, runs)
    blind = {"process": [1], "step": 8}
    runs = [{"steps": 10, "mesh": fsdp, "out": str(out), "resume": True, "blind": blind}]
    (reports,) = launch(tmp_path / "v", 2, 2, runs)
    assert sorted(map(int, reports[0]["given"])) == list(range(4, 10))
    for index in (0, 1):
        assert "the checkpoint of step 8" in log(tmp_path / "v", index)
    assert "another process cannot read its part" in log(tmp_path / "v", 0)
    assert (tmp_path / "run" / "checkpoints.damaged" / "8").is_dir()
