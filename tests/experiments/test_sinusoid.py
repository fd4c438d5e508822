"""The sinusoid experiment: its parts against numpy, and one whole run of the smoke preset."""

import json

import jax
import numpy as np
import optax
import pytest

import jmeta
from experiments import sinusoid
from jmeta.core.types import Episode
from jmeta.runtime.report import read_results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sinusoid"
    sinusoid.main(["--preset", "smoke", "--out", str(out)])
    return out


def _numpy_mse(params, x, y):
    for i in range(3):
        layer = {kind: np.asarray(leaf, np.float64) for kind, leaf in params[f"layer{i}"].items()}
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    return float(np.mean((x - y) ** 2))


@pytest.mark.slow
def test_a_run_leaves_everything_the_contract_names(run):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html", "examples.png",
                 "adaptation-k10.svg", "learning.png", "differences.png"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    methods = {json.loads(line)["method"] for line in (run / "metrics.jsonl").open()}
    assert methods == {"maml", "fomaml", "reptile", "joint training"}


@pytest.mark.slow
def test_results_hold_each_method_seed_and_step_and_pair_with_maml(run):
    results = read_results(run)
    rows = [row for row in results["rows"] if row["metric"] == "mse" and "test_steps" in row]
    cells = {(row["method"], row["seed"], row["test_steps"]) for row in rows}
    assert len(cells) == len(rows) == 5 * 2 * 11
    by = {(row["method"], row["seed"], row["test_steps"]): row["value"] for row in rows}
    for row in results["summary"]:
        if row["metric"] != "mse" or row.get("test_steps") != 5:
            continue
        mine = [by[row["method"], seed, 5] for seed in (0, 1)]
        assert row["mean"] == pytest.approx(np.mean(mine))
        if row["method"] != "maml":
            difference = np.mean(mine) - np.mean([by["maml", seed, 5] for seed in (0, 1)])
            assert row["paired_difference"] == pytest.approx(difference)


@pytest.mark.slow
def test_the_error_before_adaptation_is_that_of_the_initial_network(run):
    config = sinusoid.PRESETS["smoke"]
    params = jax.tree.map(lambda leaf: np.asarray(leaf[1]), sinusoid.initial(config))
    test = sinusoid.tasks(config.test_tasks, 10, sinusoid.TEST)
    expected = _numpy_mse(params, np.asarray(test.query["x"]), np.asarray(test.query["y"]))
    [found] = [
        row["value"] for row in read_results(run)["rows"]
        if row["method"] == sinusoid.NONE and row["seed"] == 1 and row.get("test_steps") == 0
    ]  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_second_run_is_refused_and_resume_reads_the_finished_one(run):
    before = (run / "results.json").read_bytes()
    with pytest.raises(SystemExit, match="add --resume"):
        sinusoid.main(["--preset", "smoke", "--out", str(run)])
    sinusoid.main(["--preset", "smoke", "--out", str(run), "--resume"])
    assert (run / "results.json").read_bytes() == before


def test_seeds_trained_side_by_side_are_what_each_is_alone():
    config = sinusoid.PRESETS["smoke"]
    mg = jmeta.over_tasks(sinusoid.estimators(config)["maml"])
    meta = jax.tree.map(np.asarray, sinusoid.initial(config))
    episodes = jax.tree.map(np.asarray, next(sinusoid.training_batches(config)))
    tx = optax.adam(1e-3)
    stacked = sinusoid.over_seeds(mg)
    together, _, info = jax.jit(lambda m, e: stacked.estimate(m, (), e, None))(meta, episodes)
    alone_estimate = jax.jit(lambda m, e: mg.estimate(m, (), e, None))

    @jax.jit
    def stepped(params, grads):
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam does not bear the strict one.
            return optax.apply_updates(params, tx.update(grads, tx.init(params))[0])

    moved = jax.tree.map(np.asarray, stepped(meta, together))
    losses = []
    for seed in range(2):
        start = jax.tree.map(lambda leaf, seed=seed: leaf[seed], meta)
        its_own = jax.tree.map(lambda leaf, seed=seed: leaf[:, seed], episodes)
        grads, _, each = alone_estimate(start, Episode(*its_own))
        losses.append(float(each.loss))
        expected = stepped(start, grads)
        for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got[seed], want, rtol=1e-5, atol=2e-6)
    assert float(info.loss) == pytest.approx(np.mean(losses), rel=1e-6)


def test_reptile_gets_support_and_query_and_joint_training_the_plain_gradient():
    config = sinusoid.PRESETS["smoke"]
    first = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[0], tree)  # noqa: E731
    meta, episode = first(sinusoid.initial(config)), first(sinusoid.tasks(1, 10, 3, queries=10))
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), *episode)

    def gradient(name):
        estimate = sinusoid.estimators(config)[name].estimate
        return jax.jit(lambda m, e: estimate(m, (), e, None)[0])(meta, episode)

    problem = sinusoid.problem_at(config.inner_lr)
    end = jax.jit(lambda m, b: jmeta.adapt(problem, m, b, config.inner_steps))(meta, both)
    for got, start, last in zip(
        *map(jax.tree.leaves, (gradient("reptile"), meta, end)), strict=True
    ):
        np.testing.assert_allclose(got, start - np.asarray(last), atol=1e-6)
    grads = gradient("joint training")
    plain = jax.jit(jax.grad(lambda p: sinusoid.loss(p, episode.query, None)[0]))(meta)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_predictors_without_a_network_on_a_task_worked_by_hand():
    def batch(x, y):
        return {"x": np.float32(x).reshape(1, -1, 1), "y": np.float32(y).reshape(1, -1, 1)}

    found = sinusoid.without_training(Episode(batch([0, 4], [1, 3]), batch([1, 3], [2, 3])))
    np.testing.assert_allclose(found["nearest support point"], [0.5])  # (1 - 2)^2 / 2
    np.testing.assert_allclose(found["mean of the support"], [0.5])  # (0 + 1) / 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner_steps": 12}, "inner_steps=12: a network is looked at after up to 10 steps"),
        ({"evaluate_every": 0}, "evaluate_every=0: choose more than 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        sinusoid.Config(**change)
