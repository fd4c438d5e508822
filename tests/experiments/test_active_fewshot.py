"""The active few-shot experiment: its tasks, its policies and its run directory."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import _active_policies as policies
from experiments import _active_report as page
from experiments import _fewshot_model as model
from experiments import active_fewshot
from jmeta.runtime import report
from jmeta.tasks.episodes import FewShot

RNG = np.random.default_rng(0)
SMALL = dataclasses.replace(
    active_fewshot.PRESETS["smoke"], pool=24, budget=2, rounds=2, queries=4, ways=5
)


def source(classes=6, each=30, vocab=12, width=8):
    """Encoded passages whose features lie around a centre of their class."""
    y = np.repeat(np.arange(classes), each)
    centres = RNG.normal(size=(classes, vocab))
    lexical = centres[y] + 0.3 * RNG.normal(size=(len(y), vocab))
    x = {"lexical": lexical.astype(np.float32), "deep": RNG.normal(size=(len(y), width))}
    return FewShot(
        jax.tree.map(lambda a: a.astype(np.float32), x), y, tuple(map(str, range(classes)))
    )


def adapter(vocab=12, width=8):
    return model.init(jax.random.key(0), vocab, width, 2)["adapter"]


@pytest.mark.parametrize("pool", [24, 54, 60])
def test_both_kinds_of_pool_hold_what_was_asked_for(pool):
    sizes = {kind: active_fewshot.class_sizes(pool, 5, kind) for kind in page.KINDS}
    assert all(sum(each) == pool for each in sizes.values())
    assert max(sizes["balanced"]) - min(sizes["balanced"]) <= 1
    assert active_fewshot.class_sizes(60, 5, "skewed") == [20, 20, 10, 5, 5]


@pytest.mark.parametrize("kind", page.KINDS)
def test_a_task_is_disjoint_and_keeps_its_geometry(kind):
    made = active_fewshot.make_task(SMALL, adapter(), source(), kind, 3)
    parts = [made.begin, made.pool, made.query]
    rows = np.concatenate(parts)
    assert sorted(rows) == list(range(len(made.y)))
    sizes = active_fewshot.class_sizes(24, 5, kind)
    assert np.bincount(made.y[made.pool]).tolist() == sizes
    assert np.bincount(made.y[made.begin]).tolist() == [1] * 5
    assert np.bincount(made.y[made.query]).tolist() == [4] * 5
    assert made.x.shape == (len(rows), len(rows))
    near = np.linalg.norm(made.x[:, None] - made.x[None], axis=-1)
    same = made.y[:, None] == made.y[None]
    assert near[same & (near > 0)].mean() < near[~same].mean()


def pool(budget=3):
    x = RNG.normal(size=(12, 4)).astype(np.float32)
    p = RNG.dirichlet(np.ones(3), 12).astype(np.float32)
    p[5] = 1 / 3
    labelled = np.zeros(12, bool)
    labelled[[0, 5]] = True
    return policies.Pool(x, p, labelled, budget)


@pytest.mark.parametrize("name", policies.POLICIES)
def test_a_policy_chooses_new_passages(name):
    given = pool()
    for seed in range(3):
        chosen = policies.POLICIES[name](given, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == 3
        assert not given.labelled[chosen].any()
    again = policies.POLICIES[name](given, np.random.default_rng(2))
    assert chosen.tolist() == again.tolist()


def test_entropy_takes_the_least_certain():
    given = pool(1)
    given.probabilities[7] = [0.34, 0.33, 0.33]
    assert policies.most_uncertain(given, RNG).tolist() == [7]  # 5 is labelled


def test_centres_are_those_of_clusters():
    x = np.repeat(np.eye(4, dtype=np.float32) * 9, 3, 0)
    given = policies.Pool(x, pool().probabilities, np.zeros(12, bool), 4)
    chosen = policies.nearest_to_centres(given, np.random.default_rng(0))
    assert sorted(chosen // 3) == [0, 1, 2, 3]


def test_every_round_adds_labels_and_the_end_is_the_same_for_a_whole_pool():
    task = active_fewshot.make_task(SMALL, adapter(), source(), "skewed", 1)
    found = active_fewshot.run_task(SMALL, task, 0)
    assert set(found) == {*policies.POLICIES, page.ALL}
    first = {tuple(found[name]["accuracy"][:1]) for name in policies.POLICIES}
    assert len(first) == 1  # all begin alike
    for name in policies.POLICIES:
        assert len(found[name]["accuracy"]) == SMALL.rounds + 1
    rows = page.rows_of(SMALL, {0: {"skewed": {
        name: {k: [[v] for v in values] for k, values in part.items()}
        for name, part in found.items()
    }}})  # fmt: skip
    labels = {row.get("labels") for row in rows if row["metric"] == page.ACCURACY}
    assert labels == {5, 7, 9, None}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="half of a pool"):
        active_fewshot.Config(out="x", pool=20, rounds=9)
    with pytest.raises(ValueError, match="skewed pools"):
        active_fewshot.Config(out="x", ways=4)
    for tasks in (0, 1001):
        with pytest.raises(ValueError, match=f"tasks={tasks}: 1 to 1000, or seeds would share"):
            active_fewshot.Config(out="x", tasks=tasks)
    with pytest.raises(ValueError, match="classes have the"):
        active_fewshot.make_task(SMALL, adapter(), source(each=8), "balanced", 0)


@pytest.mark.slow
def test_a_run_and_what_it_leaves(tmp_path):
    out = tmp_path / "run"
    command = ["--preset", "smoke", "--out", str(out)]
    active_fewshot.main(command)
    found = report.read_results(out)
    methods = {row["method"] for row in found["summary"]}
    assert methods == {*policies.POLICIES, page.ALL}
    assert (out / "curves.svg").exists()
    with pytest.raises(SystemExit, match="resume"):
        active_fewshot.main(command)
    active_fewshot.main([*command, "--resume"])
    assert report.read_results(out) == found
