"""The code adaptation experiment: a whole run of the smoke preset, and what its methods read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _code_adaptation_methods as methods_of
from experiments import _code_adaptation_report as page
from experiments import code_adaptation as experiment
from jmeta.models import transformer
from jmeta.runtime.report import read_results
from jmeta.runtime.statistics import summarise
from jmeta.tasks import corpora, files
from jmeta.tasks.corpora import stdlib_modules

CONFIG = experiment.PRESETS["smoke"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "code"
    experiment.main(["--preset", "smoke", "--seeds", "1", "--out", str(out)])
    return out


@pytest.mark.slow
def test_a_run_leaves_everything_the_contract_names(run):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html", "differences.png",
                 "learning.svg"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    methods = {json.loads(line)["method"] for line in (run / "metrics.jsonl").open()}
    assert methods == {"base"} | {
        f"{name}, seed {seed}"
        for name in (methods_of.EXACT, methods_of.FIRST, methods_of.JOINT)
        for seed in (0,)
    }


@pytest.mark.slow
def test_every_method_is_there_for_every_seed_and_support(run):
    rows = [r for r in read_results(run)["rows"] if r["metric"] == methods_of.LOSS]
    cells = {(r["method"], r["seed"], r.get("support", "")) for r in rows}
    assert len(cells) == len(rows)
    for name in (methods_of.EXACT, methods_of.FIRST, methods_of.TUNED, "attention to the support"):
        assert {(name, s, k) for s in (0,) for k in methods_of.SUPPORTS} <= cells
    for name in (methods_of.NONE, methods_of.JOINT, "dynamic evaluation, 2 steps",
                 "dynamic evaluation, 3 steps", "attention to the 32 tokens before"):  # fmt: skip
        assert {(name, s, "") for s in (0,)} <= cells
    assert "against" in str({r["metric"] for r in read_results(run)["summary"]})


@pytest.mark.slow
def test_without_a_rate_all_that_adapts_is_the_base_and_attention_reads_what_it_says():
    source = files.files([np.arange(300) % 97, np.arange(250) % 89], CONFIG.vocab)
    episodes = methods_of.holes(CONFIG, source, "shared", 3, True)(0, 0)
    model = methods_of.model_of(CONFIG)
    params = jax.jit(lambda key: transformer.init(model, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x, params)
    logits = jax.jit(lambda tokens: transformer.logits(model, params, tokens))
    ways = methods_of.readers(CONFIG)
    found = {name: np.asarray(way(params, jnp.float32(0), episodes)) for name, way in ways.items()}

    def by_hand(tokens):
        scores = jax.nn.log_softmax(logits(jnp.asarray(tokens)))
        last = np.asarray(tokens)[-CONFIG.hole :]
        rows = np.asarray(scores)[-CONFIG.hole - 1 : -1]
        return -rows[np.arange(CONFIG.hole), last].mean()

    for i in range(3):
        query, before = episodes.query["tokens"][i], episodes.query["before"][i]
        support = episodes.support.batches["tokens"][i].reshape(-1)
        alone = by_hand(query)
        for name in (methods_of.NONE, methods_of.TUNED, "dynamic evaluation, 2 steps",
                     "dynamic evaluation, 3 steps"):  # fmt: skip
            np.testing.assert_allclose(found[name][i], alone, rtol=1e-4)
        np.testing.assert_allclose(
            found["attention to the support"][i], by_hand([*support, *query]), rtol=1e-4
        )
        np.testing.assert_allclose(
            found["attention to the 32 tokens before"][i], by_hand(before[-48:]), rtol=1e-4
        )
    moved = ways[methods_of.TUNED](params, jnp.float32(0.3), episodes)
    assert (np.abs(np.asarray(moved) - found[methods_of.TUNED]) > 1e-4).all()


def test_no_file_is_in_two_splits_and_rarity_is_of_training(tmp_path, monkeypatch):
    # Short modules, empty ones too: quick to read and to learn a vocabulary from. What is made of
    # them is kept apart from what the other tests make of the whole library.
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path))
    short = [each for each in stdlib_modules().items() if each[1].stat().st_size < 20_000]
    monkeypatch.setattr(corpora, "stdlib_modules", lambda: dict(short[::4]))
    sources = experiment.load(CONFIG)
    texts = {
        split: {
            source.tokens[a:b].tobytes()
            for a, b in zip(source.bounds, source.bounds[1:], strict=False)
        }
        for split, source in sources.items()
    }
    shared = texts["train"] & texts["test"]
    assert all(len(text) < 4 * 40 for text in shared)  # empty modules and their like
    for source in sources.values():
        np.testing.assert_array_equal(source.rarity, sources["train"].rarity)


@pytest.mark.parametrize(
    ("gap", "word"), [(-0.1, "helps"), (0.1, "hurts"), (0.0, "is not told apart")]
)
def test_the_verdict_is_the_intervals(gap, word):
    noise = (0.01, -0.01, 0.0)
    rows = [
        {"method": name, "seed": seed, "metric": methods_of.LOSS,
         "value": 2 + better + noise[seed] * bool(support), **support}
        for name, better, support in (
            (methods_of.NONE, 0.0, {}), (methods_of.EXACT, gap, {"support": methods_of.MAIN}))
        for seed in range(3)
    ]  # fmt: skip
    summary = summarise(rows, baseline=methods_of.NONE)
    [said] = page.verdicts(summary)
    assert word in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"support": 0}, "support=0: choose more than 0"),
        ({"rates": ()}, r"rates=.* choose more than 0"),
        ({"before": 1}, "before=1 windows before a hole are fewer than the support=2"),
        ({"hole": 16}, "hole=16 leaves no context in a window of window=16"),
    ],
)
def test_settings_without_a_meaning_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_resuming_gives_the_same(run):
    with pytest.raises(SystemExit, match="add --resume"):
        experiment.main(["--preset", "smoke", "--seeds", "1", "--out", str(run)])
    before = read_results(run)["rows"]
    experiment.main(["--preset", "smoke", "--seeds", "1", "--out", str(run), "--resume"])
    after = read_results(run)["rows"]
    keep = lambda rows: [r for r in rows if r["metric"] == methods_of.LOSS]  # noqa: E731
    assert keep(before) == keep(after)
