import gc
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmeta.tasks.episodes import (
    FewShot,
    at_least,
    counts,
    draws,
    episodes,
    few_shot,
    sample_episode,
    split_classes,
    subset,
    task_generator,
)


def numbered(sizes):
    """A source whose examples are their own row numbers (from 1, since padding is 0)."""
    y = np.repeat(np.arange(len(sizes)), sizes)
    y = np.random.default_rng(0).permutation(y)
    rows = np.arange(1, len(y) + 1)
    x = {"row": rows.astype(np.int32), "pixels": np.stack([rows, -rows], 1).astype(np.float32)}
    return FewShot(x, y, tuple(f"class{i}" for i in range(len(sizes))))


@st.composite
def settings_of_episodes(draw):
    ways = draw(st.integers(1, 5))
    low_ways = draw(st.integers(1, ways))
    shots = draw(st.integers(1, 4))
    low_shots = draw(st.integers(0, shots))
    queries = draw(st.integers(0, 4))
    extra = draw(st.lists(st.integers(0, 5), min_size=ways, max_size=8))
    return {
        "sizes": [shots + queries + e for e in extra],
        "ways": (low_ways, ways),
        "shots": (low_shots, shots),
        "queries": queries,
        "tasks": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**31)),
        "step": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=150, deadline=None)
@given(settings_of_episodes())
def test_every_episode_is_balanced_disjoint_and_masked(case):
    source = numbered(case["sizes"])
    kwargs = {key: case[key] for key in ("ways", "shots", "queries", "tasks")}
    batch = episodes(source, **kwargs)(case["seed"], case["step"])
    (low_ways, ways), (low_shots, shots) = case["ways"], case["shots"]
    for task in range(case["tasks"]):
        one = jax.tree.map(lambda leaf, task=task: leaf[task], batch)
        class_of_label = {}
        rows_used = []
        shots_used = set()
        for part, most in ((one.support, shots), (one.query, case["queries"])):
            assert part["y"].dtype == np.int32
            assert part["mask"].dtype == np.float32
            assert part["y"].shape == part["mask"].shape == (most * ways,)
            real = part["mask"] == 1
            assert (part["mask"][~real] == 0).all()
            assert (part["x"]["row"][~real] == 0).all()  # padding shows nothing
            assert (part["x"]["pixels"][~real] == 0).all()
            assert (part["y"][~real] == 0).all()
            rows = part["x"]["row"][real]
            np.testing.assert_array_equal(part["x"]["pixels"][real], np.stack([rows, -rows], 1))
            rows_used += rows.tolist()
            for label, row in zip(part["y"][real], rows, strict=True):
                # one class behind each label, in support and query alike
                assert class_of_label.setdefault(label, source.y[row - 1]) == source.y[row - 1]
            if real.any():
                per_label = np.bincount(part["y"][real])
                assert len(set(per_label)) == 1  # balanced
                if part is one.support:
                    shots_used.add(per_label[0])
                else:
                    assert per_label[0] == case["queries"]
        assert len(set(rows_used)) == len(rows_used)  # support and query disjoint, no repeats
        assert len(set(class_of_label.values())) == len(class_of_label)
        if rows_used:
            assert sorted(class_of_label) == list(range(len(class_of_label)))
            assert low_ways <= len(class_of_label) <= ways
        assert all(low_shots <= s <= shots for s in shots_used)


@settings(max_examples=30, deadline=None)
@given(settings_of_episodes())
def test_a_function_of_seed_and_step_alone(case):
    source = numbered(case["sizes"])
    kwargs = {key: case[key] for key in ("ways", "shots", "queries")}
    sample = episodes(source, tasks=case["tasks"], **kwargs)
    sample(case["seed"] + 1, case["step"])  # what was drawn before does not matter
    batch = sample(case["seed"], case["step"])
    again = episodes(source, tasks=case["tasks"] + 2, **kwargs)(case["seed"], case["step"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[: len(a)]), batch, again)
    for task in range(case["tasks"]):
        rng = task_generator(case["seed"], case["step"], task)
        one = sample_episode(source, rng, **kwargs)
        jax.tree.map(lambda a, b, t=task: np.testing.assert_array_equal(a[t], b), batch, one)


def test_steps_seeds_and_tasks_differ():
    sample = episodes(numbered([50] * 20), ways=5, shots=5, queries=5, tasks=3)
    rows = [sample(*at).support["x"]["row"] for at in ((0, 0), (0, 1), (1, 0))]
    flat = np.concatenate(rows)
    assert len(np.unique(flat, axis=0)) == 9


def test_runs_of_ways_rows_hold_every_class_once():
    batch = episodes(numbered([9] * 6), ways=4, shots=3, queries=2, tasks=2)(0, 0)
    for part in batch:
        chunks = part["y"].reshape(2, -1, 4)
        np.testing.assert_array_equal(
            np.sort(chunks, axis=-1), np.broadcast_to(range(4), chunks.shape)
        )


def test_draws_are_uniform():
    """Over many episodes every class, label, example and support place comes equally often."""
    sizes = [4, 5, 6, 7]
    source = numbered(sizes)
    draw = draws(source, ways=2, shots=1, queries=2, tasks=6000)(3, 0)
    class_counts = np.stack([np.bincount(draw.classes[:, w], minlength=4) for w in range(2)])
    assert np.abs(class_counts / 6000 - 1 / 4).max() < 4 * np.sqrt(3 / 16 / 6000)
    for c, size in enumerate(sizes):
        members = np.flatnonzero(source.y == c)
        for place in range(3):  # the support place and each query place
            rows = draw.rows[:, place][draw.classes == c]
            freq = np.array([(rows == m).mean() for m in members])
            bound = 4.5 * np.sqrt((1 / size) * (1 - 1 / size) / len(rows))
            assert np.abs(freq - 1 / size).max() < bound
    # pairs of places are uniform over ordered pairs of distinct members
    rows = draw.rows[:, :2][np.broadcast_to((draw.classes == 0)[:, None], draw.rows[:, :2].shape)]
    support = draw.rows[:, 0][draw.classes == 0]
    query = draw.rows[:, 1][draw.classes == 0]
    pairs = np.unique(np.stack([support, query], 1), axis=0, return_counts=True)[1]
    assert len(pairs) == 12
    assert np.abs(pairs / len(support) - 1 / 12).max() < 4.5 * np.sqrt(11 / 144 / len(support))
    assert rows.size == 2 * len(support)


def test_ragged_bounds_are_all_reached():
    sample = episodes(numbered([9] * 6), ways=(2, 4), shots=(1, 3), queries=1, tasks=300)
    mask = sample(0, 0).support["mask"].reshape(300, 3, 4)
    np.testing.assert_array_equal(np.unique(mask.sum(1).max(1)), [1, 2, 3])
    np.testing.assert_array_equal(np.unique(mask.sum(2).max(1)), [2, 3, 4])


def test_the_class_with_too_few_examples_is_named():
    source = numbered([9, 3, 9, 4])
    with pytest.raises(ValueError, match="2 shots") as error:
        episodes(source, ways=2, shots=2, queries=5, tasks=1)
    message = str(error.value)
    assert "2 shots + 5 queries need 7 examples" in message
    assert "'class1' has 3, 'class3' has 4" in message
    assert "at_least(source, 7)" in message
    kept = at_least(source, 7)
    assert kept.names == ("class0", "class2")
    np.testing.assert_array_equal(counts(kept), [9, 9])
    episodes(kept, ways=2, shots=2, queries=5, tasks=1)(0, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ways": 5}, "5 ways need as many classes, but the source has 4"),
        ({"ways": 0}, "ways must be at least 1"),
        ({"shots": (3, 1)}, "a range"),
        ({"shots": 0, "queries": 0}, "holds no example"),
        ({"queries": -1}, "holds no example"),
        ({"tasks": 0}, "at least one task"),
    ],
)
def test_bad_settings(bad, message):
    good = {"ways": 2, "shots": 1, "queries": 1, "tasks": 1}
    with pytest.raises(ValueError, match=message):
        episodes(numbered([9] * 4), **{**good, **bad})


def test_bad_sources():
    with pytest.raises(ValueError, match="no example at all"):
        few_shot(np.zeros((0, 2)), [])
    with pytest.raises(ValueError, match=r"x\['b'\] has 3 rows, but there are 2 labels"):
        few_shot({"a": np.zeros(2), "b": np.zeros(3)}, ["u", "v"])
    bad = FewShot(np.zeros(2), np.array([0, 3]), ("a", "b"))
    with pytest.raises(ValueError, match=r"class ids 0\.\.3, but there are 2 names"):
        episodes(bad, ways=1, shots=1, queries=0, tasks=1)
    with pytest.raises(ValueError, match="integer class ids"):
        episodes(bad._replace(y=np.zeros(2)), ways=1, shots=1, queries=0, tasks=1)
    with pytest.raises(ValueError, match="not among"):
        subset(numbered([2, 2]), ["class7"])


@given(st.integers(3, 60), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_splits_by_class_are_disjoint_and_cover(classes, seed):
    source = numbered([2] * classes)
    parts = split_classes(source, (0.6, 0.15, 0.25), seed=seed) if classes > 12 else ()
    names = [name for part in parts for name in part.names]
    if parts:
        assert sorted(names) == sorted(source.names)
        assert sum(len(part.y) for part in parts) == len(source.y)
    for part in parts:
        for row, y in zip(part.x["row"], part.y, strict=True):
            assert source.names[source.y[row - 1]] == part.names[y]


def cost_of_a_batch(classes, examples):
    """Calls of functions and bytes at once, where a source has so many classes of so many."""
    y = np.repeat(np.arange(classes), examples)
    source = FewShot(np.zeros((len(y), 64), np.int32), y, tuple(map(str, range(classes))))
    sample = episodes(source, ways=5, shots=1, queries=15, tasks=32)
    sample(0, 0)
    calls = []
    gc.collect()
    gc.disable()  # whose callbacks are calls too
    try:
        sys.setprofile(lambda frame, event, arg: calls.append(event) if "call" in event else None)
        sample(0, 1)
        sys.setprofile(None)
        tracemalloc.start()
        batch = sample(0, 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        sys.setprofile(None)
        tracemalloc.stop()
        gc.enable()
    return len(calls), peak, sum(leaf.nbytes for leaf in jax.tree.leaves(batch))


def test_a_batch_of_a_large_source_costs_what_one_of_a_small_source_does():
    calls, peak, size = cost_of_a_batch(20, 20)
    more, higher, _ = cost_of_a_batch(1000, 400)
    assert more == calls < 25 * 32  # 32 generators, and nothing for each class, shot or row
    assert higher < 1.01 * peak < 1.5 * size  # the batch itself, and the numbers it is drawn by
