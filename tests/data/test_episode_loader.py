import threading

import numpy as np
import pytest

from jmeta.data.loader import episode_loader


def sample(seed, step):
    rng = np.random.default_rng([seed, step])
    return {"x": rng.random((6, 3)), "y": rng.integers(0, 5, (6,)), "step": np.full(6, step)}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_are_the_sample_function_in_order(threads):
    loader = episode_loader(sample, seed=4, threads=threads)
    for step in range(20):
        same(next(loader), sample(4, step))
    loader.close()


def test_resumed_equals_uninterrupted():
    loader = episode_loader(sample, seed=1)
    for _ in range(7):
        next(loader)
    saved = loader.state()
    expected = [next(loader) for _ in range(5)]
    loader.close()
    fresh = episode_loader(sample, seed=1, start=saved)
    restored = episode_loader(sample, seed=1)
    next(restored)
    restored.restore(saved)
    for want in expected:
        same(next(fresh), want)
        same(next(restored), want)
    assert fresh.state() == restored.state() == saved + 5
    fresh.close()
    restored.close()


def test_state_counts_what_was_consumed_not_what_was_made_ahead():
    made, ahead = [], threading.Event()

    def counted(seed, step):
        made.append(step)
        if len(made) >= 6:
            ahead.set()
        return sample(seed, step)

    loader = episode_loader(counted, seed=0, threads=2, prefetch=8)
    assert loader.state() == 0
    next(loader)
    assert ahead.wait(10)  # five more batches were made, and none of them counts
    assert loader.state() == 1
    loader.close()


@pytest.mark.parametrize("count", [2, 3])
def test_slices_of_all_processes_make_the_global_batch(count):
    loaders = [episode_loader(sample, seed=2, process=(i, count)) for i in range(count)]
    for step in range(4):
        parts = [next(loader) for loader in loaders]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        same(joined, sample(2, step))
    for loader in loaders:
        loader.close()


def test_a_batch_that_cannot_be_shared_names_the_leaf():
    loader = episode_loader(sample, seed=0, process=(0, 4))
    with pytest.raises(ValueError, match=r"\['step'\] has 6 rows, which 4 processes cannot share"):
        next(loader)
    loader.close()


def test_an_error_in_a_thread_reaches_the_user():
    def broken(seed, step):
        if step == 2:
            raise RuntimeError("the third batch is broken")
        return sample(seed, step)

    loader = episode_loader(broken, seed=0)
    next(loader), next(loader)
    with pytest.raises(RuntimeError, match="the third batch is broken"):
        next(loader)
    assert loader.state() == 2
    loader.close()


def test_closed_and_reopened():
    loader = episode_loader(sample, seed=0)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    loader.restore(loader.state())
    same(next(loader), sample(0, 1))
    loader.close()


@pytest.mark.parametrize(
    "bad", [{"process": (2, 2)}, {"threads": -1}, {"prefetch": 0}, {"start": -1}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=r"process|threads|step"):
        episode_loader(sample, seed=0, **bad)
