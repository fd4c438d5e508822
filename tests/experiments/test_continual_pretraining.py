"""Continual pre-training: its loop against the public one, fair comparisons, its refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jmeta
from experiments import _continual_data as data
from experiments import _continual_model as model
from experiments import _continual_report as page
from experiments import _continual_samplers as samplers
from experiments import _continual_training as training
from experiments import continual_pretraining as experiment
from jmeta import methods
from jmeta.runtime import report
from jmeta.tasks import guides
from jmeta.tasks.tokenizer import token_pieces

pytestmark = pytest.mark.usefixtures("cache")
SMOKE = experiment.PRESETS["smoke"]


@pytest.fixture(scope="module")
def smoke(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("continual") / "run"
    experiment.main(["--preset", "smoke", "--out", str(out)])
    return out


@pytest.mark.slow
def test_smoke_compares_all_with_uniform_and_draws_what_it_says(smoke):
    results = report.read_results(smoke)
    means = {row["method"]: row for row in results["summary"] if row["metric"] == page.MEAN}
    assert set(means) == {
        page.NONE, page.MAJORITY, *SMOKE.samplers, "uniform, fine-tuned by DPS-dense",
    }  # fmt: skip
    assert {row["baseline"] for row in means.values()} == {"uniform"}
    for name in SMOKE.samplers:
        shares = [
            row["value"]
            for row in results["rows"]
            if row["method"] == name and row["metric"].startswith("share of steps")
        ]
        assert len(shares) == 5
        assert sum(shares) == pytest.approx(1)
    kept = json.loads((smoke / "runs" / "uniform-0" / "scored.json").read_text())
    assert sum(kept["drawn"]) == SMOKE.steps
    assert [row[0] for row in kept["probabilities"]] == [1, 3, 5]
    np.testing.assert_allclose([row[1:] for row in kept["probabilities"]], 0.2, atol=1e-5)
    for name in ("report.html", "differences.png", "probabilities.svg", "metrics.jsonl"):
        assert (smoke / name).stat().st_size > 0, name


@pytest.mark.slow
def test_what_is_done_is_read_and_not_done_again(smoke, capsys):
    before = (smoke / "results.json").read_text()
    with pytest.raises(SystemExit, match="add --resume"):
        experiment.main(["--preset", "smoke", "--out", str(smoke)])
    capsys.readouterr()
    experiment.main(["--preset", "smoke", "--out", str(smoke), "--resume"])
    assert "6 steps" not in capsys.readouterr().err
    assert (smoke / "results.json").read_text() == before


def test_the_loop_of_all_samplers_trains_as_the_public_one_does():
    """``sampled_training`` under ``meta_trainer``, step by step, with the same seed."""

    def corrupt(rows, key):
        return rows["x"] + 0.1 * jax.random.normal(key, rows["x"].shape)

    def loss(to):
        return lambda params, batch, key: (((params["w"][None] - batch - to) ** 2).mean(), {})

    pair = [methods.Objective(str(to), corrupt, loss(to)) for to in (0.0, 2.0, -1.0)]
    sampler = methods.mometas(3, rate=1.0, entropy=0.1)
    rows = {"x": np.ones((4, 2), np.float32)}
    measure = methods.paired_losses(pair, rows, jax.random.key(3))
    params, optimizer = {"w": np.full(2, 4.0, np.float32)}, model.adamw(0.1, 20)

    def batch(step):
        drawn = np.random.default_rng(step).normal(size=(4, 2)).astype(np.float32)
        return jmeta.Episode(None, {"x": drawn})

    found = training.train(
        training.loop(pair, optimizer), samplers.Entry(sampler, measure), params, batch, 5,
        steps=11, window=4,
    )  # fmt: skip
    mg = methods.sampled_training(pair, sampler, measure, window=4)
    init, step = jmeta.meta_trainer(mg, optimizer)
    state, step = init(params, jax.random.key(5)), jax.jit(step)
    drawn, said = np.zeros(3), []
    for at in range(11):
        state, info = step(state, batch(at))
        drawn += [info.diagnostics[f"drawn {each.name}"] for each in pair]
        said.append([info.diagnostics[f"probability of {each.name}"] for each in pair])
    np.testing.assert_allclose(found.params["w"], state.meta["w"], rtol=1e-5)
    np.testing.assert_array_equal(found.drawn, drawn)
    np.testing.assert_allclose(found.probabilities[:, 1:], np.asarray(said)[[0, 4, 8]], rtol=1e-5)
    assert len({tuple(row) for row in np.round(said, 6).tolist()}) == 3  # it learned, twice


def test_rows_are_the_text_and_the_guide_points_at_its_names():
    config = dataclasses.replace(SMOKE, positions=12)
    texts = ["def f ( ) :\n the Decimal class and the Fraction", "import Path from pathlib"]
    words = data.own_vocabulary(texts * 3, 300)
    rows = data._rows(config, texts, words)
    assert (rows.tokens[:, 0] == words.cls).all()
    assert (rows.tokens[:, -1] == words.sep).all()
    lines = [line for text in texts for line in text.split("\n")]
    pieces = token_pieces(words.tokenizer, lines)
    flat = np.concatenate([each.ids for each in pieces])
    body = rows.tokens[:, 1:-1].ravel()
    np.testing.assert_array_equal(body, flat[: len(body)])
    named = np.concatenate([guides.capitalised(*each) for each in zip(lines, pieces, strict=True)])
    np.testing.assert_array_equal(rows.guide[:, 1:-1].ravel(), named[: len(body)])
    assert not rows.guide[:, [0, -1]].any()
    assert 0 < rows.guide.mean() < 0.8


def test_batches_of_a_seed_are_the_same_under_every_sampler():
    rows = data.Rows(np.arange(40)[:, None], np.zeros((40, 1), bool))
    config = dataclasses.replace(SMOKE, batch=8)
    found = data.Data(None, rows, rows, {})  # type: ignore[arg-type]
    one, other = (data.continual_batches(config, found, seed) for seed in (1, 2))
    a, again, b = one(3).query["tokens"], one(3).query["tokens"], other(3).query["tokens"]
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()
    assert len(set(a.ravel().tolist())) == 8
    tests, learned = data.held_out(rows, 0, 10), data.held_out(rows, 10, 40)
    assert not set(tests["tokens"].ravel()) & set(learned["tokens"].ravel())


def test_fine_tuning_goes_through_every_example_before_any_twice():
    train = {"tokens": np.arange(10)[:, None], "y": np.arange(10)}
    task = data.Downstream(None, train, {}, [], [])  # type: ignore[arg-type]
    batches = data.tuning_batches(task, 5, 4, 0)
    assert batches["tokens"].shape == (5, 4, 1)
    order = batches["y"].ravel()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    np.testing.assert_array_equal(batches["tokens"].ravel(), order)


def summary(**means):
    rows = []
    for name, (difference, half) in means.items():
        rows.append({
            "method": name.replace("_", " "), "metric": page.MEAN, "mean": 50.0 + (difference or 0),
            "paired_difference": difference, "paired_ci95": half,
        })  # fmt: skip
    return rows


def test_the_verdict_says_what_the_intervals_say():
    same = {"uniform": (None, None), "no_continual_pre-training": (-3.0, 1.0)}
    said = page.verdict(summary(exp3=(0.5, 0.9), ucb=(-2.0, 0.5), **same))
    assert "No learned sampler beats uniform" in said[0]
    assert "exp3, differs by +0.50 ± 0.90" in said[0]
    assert any("Below uniform" in line and "ucb" in line for line in said)
    assert any("is below uniform (-3.0 ± 1.0 points)" in line for line in said)
    said = page.verdict(summary(exp3=(1.5, 0.9), **same))
    assert said[0].startswith("Learned samplers that beat uniform")
    assert "exp3" in said[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guide": "colour"}, "choose one of"),
        ({"tasks": ()}, "tasks is empty"),
        ({"samplers": ("exp3",)}, "with uniform"),
        ({"samplers": ("uniform", "exp4")}, "choose of"),
        ({"window_rows": 2}, "at least 4"),
        ({"fresh_rows": 2}, "holds window_rows"),
    ],
)
def test_settings_without_a_meaning_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMOKE, **change)


def test_a_corpus_that_is_too_short_is_named(tmp_path):
    with pytest.raises(SystemExit, match="at least 100000 of each are needed"):
        experiment.run(dataclasses.replace(SMOKE, batch=100_000, out=tmp_path / "run"))
