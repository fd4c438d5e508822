"""The task diversity experiment: its tasks, its halves, its grid and its rank correlations."""

import itertools
import json

import jax
import numpy as np
import pytest
import scipy.stats

from experiments import _task_diversity_data as data
from experiments import _task_diversity_grid as grid
from experiments import _task_diversity_report as page
from experiments import task_diversity
from experiments._task_diversity_probe import probe, share_closer
from jmeta.methods import DISTANCES, load_embeddings
from jmeta.models import gpt2
from jmeta.runtime import report

RNG = np.random.default_rng(0)


def test_tasks_of_the_standard_library(monkeypatch):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    tasks = data.read_tasks(classes=4, most=50)
    assert len(tasks) == 20
    for task in tasks:
        assert len(task.texts) == len(task.labels) == len(set(task.texts)) == 50
        assert set(task.labels) == set(range(4))


def test_the_most_frequent_classes_and_every_text_once():
    labels = np.array([7] * 5 + [3] * 4 + [9] * 2)
    task = data.Task("t", "f", [*"aabcdefghij"], labels)
    cut = data._cut(task, classes=2, most=100)
    assert sorted(cut.texts) == [*"abcdefgh"]
    assert {t: int(y) for t, y in zip(cut.texts, cut.labels, strict=True)} == {
        **dict.fromkeys("abcd", 1), **dict.fromkeys("efgh", 0)
    }  # fmt: skip


def tasks_of(count, rows=40):
    """Tasks where a token of their own says the class."""
    made = []
    for i in range(count):
        y = RNG.integers(0, 2, rows).astype(np.int32)
        tokens = RNG.integers(20, 30, (rows, 6))
        tokens[:, 0] = 2 * i + y + 1
        x = {"tokens": tokens.astype(np.int32), "mask": np.ones((rows, 6), np.float32)}
        made.append(data.Encoded(f"t{i}", "made up", x, y))
    return made


@pytest.mark.parametrize(("rows", "size"), [(40, 10), (15, 10)])
def test_halves_are_disjoint(rows, size):
    first, second = data.halves(tasks_of(1, rows)[0], size, seed=3)
    assert len(first) == len(second) == min(size, rows // 2)
    assert not set(first) & set(second)


def test_the_share_of_closer_halves_by_hand():
    vectors = {"a/first": [0.0], "a/second": [1.0], "b/first": [0.5], "b/second": [9.0]}
    away = lambda a, b: abs(a[0] - b[0])  # noqa: E731
    # a's halves are 1 apart and b's 8.5; the four distances between a and b are .5, 9, .5, 8
    assert share_closer(vectors, ["a", "b"], away) == (2 + 1) / 8


def small():
    config = gpt2.GPT2Config(vocab=30, width=8, layers=1, heads=2, max_len=6, ff=16)
    return probe("test", config, gpt2.init(config, jax.random.key(0)), None)


@pytest.mark.slow
def test_the_grid_holds_its_budget_equal_and_learns():
    tasks = tasks_of(4, 60)
    sizes = grid.Sizes(batches=12, batch=4, target_steps=40, target_train=40, classes=3)
    made = grid.make_grid(small(), sizes, grid.Rates(transfer=0.03, target=0.03))
    assert len(grid.subsets(range(6))) == 20
    start = made.start()
    for method in grid.METHODS:
        params = made.source(method, tasks[:3], 0)
        again = made.source(method, tasks[:3], 0)
        moved = [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (params, start)),
                                                      strict=True)]  # fmt: skip
        assert any(moved)
        jax.tree.map(np.testing.assert_array_equal, params, again)
        assert made.score(params, tasks[3], 0) == made.score(params, tasks[3], 0)
    assert made.score(start, tasks[3], 0) > 0.75  # of twenty rows, one token says the class


def test_rank_correlations_and_their_jackknife_by_hand():
    values = {s: (RNG.normal(), RNG.normal()) for s in itertools.combinations("abcdef", 3)}
    rho, half, n = page.over_sources(values)
    x, y = zip(*values.values(), strict=True)
    np.testing.assert_allclose(rho, scipy.stats.spearmanr(x, y).statistic, rtol=1e-12)
    without = []
    for name in "abcdef":
        x, y = zip(*(v for s, v in values.items() if name not in s), strict=True)
        without.append(scipy.stats.spearmanr(x, y).statistic)
    error = np.sqrt(5 / 6 * ((without - np.mean(without)) ** 2).sum())
    np.testing.assert_allclose(half, scipy.stats.t.ppf(0.975, 5) * error, rtol=1e-10)
    assert n == 6
    few = {s: v for s, v in values.items() if set(s) <= set("abcd")}
    assert page.over_sources(few)[1] is None


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="multiple of 12"):
        task_diversity.Config(out="x", grid_batches=100)


@pytest.mark.slow
def test_a_run_and_what_it_leaves(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    out = tmp_path / "run"
    command = ["--preset", "smoke", "--out", str(out)]
    task_diversity.main(command)
    found = report.read_results(out)
    shares = [row for row in found["rows"] if row["metric"] == page.SHARE]
    assert {row["method"] for row in shares} == set(DISTANCES)
    subsets = [row for row in found["rows"] if "sources" in row]
    assert len(subsets) == 20 * len(grid.METHODS)
    vectors, metadata = load_embeddings(out / "embeddings-0.npz")
    assert metadata["probe"] == "small"
    assert len(vectors) == 60
    for name in ("distances", "halves", "transfer"):
        assert (out / f"{name}.svg").exists()
    with pytest.raises(SystemExit, match="resume"):
        task_diversity.main(command)
    (out / "results.json").unlink()
    task_diversity.main([*command, "--resume"])  # from the saved embeddings and scores
    assert json.dumps(report.read_results(out)) == json.dumps(found)
