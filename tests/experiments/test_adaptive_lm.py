"""The adaptive language models: data by hand, methods that do nothing, causality, a whole run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from quick_numbers import drawn

from experiments import _adaptive_lm_data as data_of
from experiments import _adaptive_lm_methods as methods_of
from experiments import _adaptive_lm_report as page
from experiments import _adaptive_lm_scoring as scoring
from experiments import adaptive_lm
from experiments._adaptive_lm_data import Data, Rows
from experiments._adaptive_lm_methods import (
    EXACT,
    HSO,
    KNN,
    METHODS,
    NGRAM,
    RMS,
    SGD,
    STATIC,
    UNIGRAM,
)
from jmeta.methods import datastore
from jmeta.methods.fast_weights import FastWeights, init
from jmeta.models import transformer
from jmeta.runtime.report import read_results
from jmeta.tasks.corpora import stdlib_modules

SMOKE = adaptive_lm.PRESETS["smoke"]
FEW = (STATIC, SGD, EXACT)
VOCAB = 23


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "adaptive_lm"
    adaptive_lm.main(["--preset", "smoke", "--methods", ",".join(FEW), "--out", str(out)])
    return out


def params_of(init):
    """Of the shapes that ``init`` gives."""
    return drawn(jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope="module")
def body():
    made = methods_of.make_body(SMOKE, VOCAB)
    return made, params_of(made.init)


@pytest.fixture(scope="module")
def static(body):
    return jax.jit(methods_of.static(body[0]))


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, SMOKE.length + 1)).astype(np.int32)
    mask = np.ones(tokens.shape, np.float32)
    mask[1, 20:] = 0
    return Rows(tokens, mask)


@pytest.fixture(scope="module")
def readers(body):
    """Every way to read, with settings under which it does something; and its static one."""
    made, params = body
    base = {"start": params, "rate": np.float32(0.5), "decay": np.float32(0.1)}
    sizes = jax.tree.map(lambda x: np.abs(x) + np.float32(0.1), params)
    block = jax.jit(lambda key: init(SMOKE.width, SMOKE.width, key, 0.5))(jax.random.key(1))
    keys = np.random.default_rng(2).normal(size=(30, SMOKE.width)).astype(np.float32)
    near = {"params": params, "store": datastore(keys, np.arange(30, dtype=np.int32) % VOCAB),
            "weight": np.float32(0.3), "temperature": np.float32(5)}  # fmt: skip
    config = FastWeights(reference=8.0, chunk=8)
    return {
        SGD: (methods_of.dynamic(made, methods_of.sgd, SMOKE.segment), base,
              {"rate": np.float32(0)}),
        RMS: (methods_of.dynamic(made, methods_of.rms, SMOKE.segment),
              {**base, "statistics": sizes}, {"rate": np.float32(0)}),
        EXACT: (methods_of.with_block(made, config), {"body": params, "block": block}, None),
        HSO: (methods_of.hso(made, SMOKE.segment), {"params": params, "rate": np.float32(0.1)},
              {"rate": np.float32(0)}),
        KNN: (methods_of.neighbours(made, 4), near, {"weight": np.float32(1e-9)}),
    }  # fmt: skip


def test_the_static_losses_are_cross_entropies(body, static, rows):
    made, params = body
    read = jax.jit(lambda params, tokens: transformer.logits(made.config, params, tokens))
    scores = np.asarray(read(params, rows.tokens[:, :-1]), np.float64)
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logs, rows.tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(static(params, rows), expected, atol=1e-5)


@pytest.mark.parametrize("name", [SGD, RMS, HSO, KNN, EXACT])
def test_a_method_reads_no_future_and_without_its_effect_it_is_static(
    body, readers, static, rows, name
):
    losses, params, still = readers[name]
    losses, weights = jax.jit(losses), rows.mask[:, 1:] > 0
    found = np.asarray(losses(params, rows))
    plain = np.asarray(static(body[1], rows))
    assert np.abs(found - plain)[weights].max() > 1e-3
    if still is not None:
        same = np.asarray(losses({**params, **still}, rows))
        np.testing.assert_allclose(same[weights], plain[weights], atol=2e-5)
    later = rows.tokens.copy()
    later[:, 18:] = (later[:, 18:] + 1) % VOCAB  # the token at place 18 is the label at 17
    moved = np.asarray(losses(params, Rows(later, rows.mask)))
    np.testing.assert_array_equal(moved[:, :17], found[:, :17])
    assert np.abs(moved[:, 18:] - found[:, 18:]).max() > 1e-3


def test_no_package_is_in_two_parts_and_all_text_is_in_one():
    parts = data_of.by_package()
    assert [len(part) > 10 for part in parts] == [True] * 3
    files: dict[str, set[int]] = {}
    where = {text: i for i, part in enumerate(parts) for text in part}
    for module, path in stdlib_modules().items():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip() and sum(text in part for part in map(set, parts)) == 1:
            files.setdefault(module.split(".")[0], set()).add(where[text])
    assert all(len(found) == 1 for found in files.values())


def test_documents_are_their_beginnings_and_pieces_are_theirs():
    documents = [np.arange(1, n + 1, dtype=np.int32) for n in (5, 40, 90)]
    rows = data_of.beginnings(documents, length=39, most=9)
    np.testing.assert_array_equal(rows.tokens, [np.arange(1, 41)] * 2)
    assert rows.mask.min() == 1
    data = Data(99, documents, rows, rows, np.ones(99))
    sample = data_of.sampler(data, 39, 6)
    drawn, again, other = sample(0, 3), sample(0, 3), sample(0, 4)
    np.testing.assert_array_equal(drawn.tokens, again.tokens)
    assert (drawn.tokens != other.tokens).any()
    for tokens, mask in zip(*drawn, strict=True):
        kept = tokens[mask > 0]
        assert (np.diff(kept) == 1).all()
        assert (tokens[mask == 0] == 0).all()
    with pytest.raises(ValueError, match="no document has more than 64"):
        data_of.beginnings(documents[:1], length=100, most=9)


def test_repetitions_and_unigrams_of_a_document_worked_by_hand():
    rows = Rows(np.array([[1, 2, 1, 1, 3]], np.int32), np.ones((1, 5), np.float32))
    np.testing.assert_array_equal(data_of.seen_before(rows), [[0, 1, 2, 0]])
    data = Data(4, [], rows, rows, np.array([0, 5, 2, 1]))
    np.testing.assert_allclose(
        np.exp(-data_of.unigram(data, rows))[0], np.array([3, 6, 6, 2]) / 12, rtol=1e-6
    )


def test_documents_scored_a_few_at_a_time_come_back_in_order():
    rows = Rows(np.arange(15, dtype=np.int32).reshape(5, 3), np.ones((5, 3), np.float32))
    found = scoring.in_batches(lambda scale, part: scale * part.tokens[:, 1:], 2, rows, 2)
    np.testing.assert_array_equal(found, 2 * rows.tokens[:, 1:])


def test_knn_is_tuned_by_one_search_on_what_it_reads_with(body, rows):
    """What is chosen of all options is what ``neighbours`` has the least loss with."""
    made, params = body
    rng = np.random.default_rng(1)
    train = [rng.integers(0, VOCAB, 40).astype(np.int32) for _ in range(6)]
    data = Data(VOCAB, train, rows, rows, np.ones(VOCAB))
    best, settings = scoring.tune_knn(made, params, data, SMOKE, 0)
    assert best["store"].keys.shape == (SMOKE.datastore, SMOKE.width)
    read = jax.jit(methods_of.neighbours(made, SMOKE.neighbours))
    inputs = rows.tokens[:, :-1]
    states, keys = jax.jit(made.keys)(params, inputs)
    np.testing.assert_allclose(states, jax.jit(made.states)(params, inputs), atol=1e-5)
    assert keys.shape == (2, SMOKE.length, SMOKE.width)

    def loss(**changes):
        each = np.asarray(read({**best, **changes}, rows))
        return scoring.mean_loss(each, rows)

    assert loss() == pytest.approx(settings["validation"], rel=1e-6)
    for weight in scoring.KNN_WEIGHTS:
        assert loss(weight=np.float32(weight)) >= settings["validation"] - 1e-6


def test_short_keys_are_trained_by_their_squared_length(body, static, rows):
    made, params = body
    coefficient = 0.3
    value, aux = jax.jit(methods_of.with_short_keys(made, coefficient))(params, rows, None)
    weights = rows.mask[:, 1:]
    plain = (np.asarray(static(params, rows)) * weights).sum() / weights.sum()
    keys = np.asarray(jax.jit(made.keys)(params, rows.tokens[:, :-1])[1])
    expected = coefficient * (np.square(keys).sum(-1) * weights).sum() / weights.sum()
    assert float(aux["penalty"]) == pytest.approx(expected, rel=1e-5)
    assert float(value) == pytest.approx(float(plain) + expected, rel=1e-5)


def test_perplexity_over_documents_and_curves_are_means_of_documents():
    rows = [{"metric": page.BY_DOCUMENT, "method": "m", "mean": 2.0, "ci95": 0.1, "n": 5,
             "over": "episodes"}, {"metric": page.PERPLEXITY, "method": "m"}]  # fmt: skip
    [found] = page.of_documents(rows)
    assert found["metric"] == page.OF_DOCUMENTS
    assert found["mean"] == pytest.approx(np.exp(2.0))
    assert found["ci95"] == pytest.approx(0.1 * np.exp(2.0))
    values = np.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    taken = np.array([[True, True, False], [True, False, False], [False, False, False]])
    assert page.by_document(values, taken) == [1.5, 4.0]


@pytest.mark.slow
def test_a_run_leaves_everything_the_contract_names(run):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html", "settings.json",
                 "costs.json", "position.png", "frequency.svg", "repetition.png",
                 "differences.png"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    trained = {json.loads(line)["method"] for line in (run / "metrics.jsonl").open()}
    assert trained == {f"{name}-{seed}" for name in ("decoder", "static", "fwl-exact")
                       for seed in (0, 1)}  # fmt: skip


@pytest.mark.slow
def test_results_are_of_the_kept_losses_and_paired_with_static(run):
    results = read_results(run)
    weights = data_of.load(SMOKE).test.mask[:, 1:]
    value = {}
    for name in FEW:
        for seed in (0, 1):
            each, _ = scoring.kept(run / "scores" / f"{page.slug(name)}-{seed}.npz")
            value[name, seed] = np.exp((each * weights).sum() / weights.sum())
    rows = [row for row in results["rows"] if row["metric"] == page.PERPLEXITY]
    assert {(row["method"], row["seed"]) for row in rows if row["method"] != UNIGRAM} == set(value)
    for row in rows:
        if row["method"] != UNIGRAM:
            assert row["value"] == pytest.approx(value[row["method"], row["seed"]], rel=1e-5)
    [summary] = [row for row in results["summary"]
                 if row["metric"] == page.PERPLEXITY and row["method"] == EXACT]  # fmt: skip
    gap = np.mean([value[EXACT, seed] - value[STATIC, seed] for seed in (0, 1)])
    assert summary["paired_difference"] == pytest.approx(gap, rel=1e-4)
    [document] = [row for row in results["summary"]
                  if row["metric"] == page.BY_DOCUMENT and row["method"] == EXACT]  # fmt: skip
    assert (document["n"], document["over"]) == (5, "episodes")


@pytest.mark.slow
def test_a_second_run_is_refused_and_resume_reads_the_finished_one(run):
    before = (run / "results.json").read_bytes()
    command = ["--preset", "smoke", "--methods", ",".join(FEW), "--out", str(run)]
    with pytest.raises(SystemExit, match="other settings"):
        adaptive_lm.main([*command, "--resume", "--rate", "0.1"])
    adaptive_lm.main([*command, "--resume"])
    assert (run / "results.json").read_bytes() == before


def test_what_makes_no_sense_is_refused_at_once(monkeypatch, tmp_path):
    for changes, message in (
        ({"methods": (SGD, EXACT)}, "all are compared with"),
        ({"methods": (STATIC,)}, "compared with nothing"),
        ({"methods": (STATIC, "magic")}, "magic"),
        ({"segment": 7}, "does not divide"),
        ({"corpus": "wikitext103"}, "choose embedded"),
        ({"layers": 1}, "above its first"),
        ({"inner_rate": 0.0}, "inner_rate=0.0: choose more than 0"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"extra_steps": 0}, "extra_steps=0"),
        ({"datastore": 63}, "datastore=63: .* choose at least 64"),
        ({"reference": float("nan")}, "reference=nan"),
        (
            {"model": "gpt2"},
            "Transformer-N is no way to read gpt2: leave it out, --methods 'static",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            adaptive_lm.Config(**changes)
    monkeypatch.delenv("JMETA_DATA", raising=False)
    with pytest.raises(SystemExit, match="JMETA_DATA"):
        adaptive_lm.main(["--preset", "smoke", "--corpus", "wikitext2", "--out", str(tmp_path)])


def test_a_checkpoint_is_read_in_place_of_the_decoder(tmp_path):
    from jmeta.models import gpt2
    from jmeta.models.pretrained import to_pretrained

    shape = gpt2.GPT2Config(vocab=VOCAB, width=8, layers=2, heads=2, max_len=40, head="causal_lm")
    params = params_of(lambda key: gpt2.init(shape, key))
    to_pretrained(tmp_path / "tiny", shape, params)
    config = adaptive_lm.Config(
        model=str(tmp_path / "tiny"), length=32, segment=8, methods=(STATIC, EXACT)
    )
    made = methods_of.make_body(config, VOCAB)
    tokens = np.arange(20, dtype=np.int32)[None] % VOCAB
    expected = jax.jit(lambda p: gpt2.hidden(shape, p, {"tokens": tokens}))(params)
    found = jax.jit(made.states)(made.init(jax.random.key(1)), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="64 positions"):
        methods_of.make_body(dataclasses.replace(config, length=64), VOCAB)
    with pytest.raises(ValueError, match="24 tokens and its embedding 23"):
        methods_of.make_body(config, VOCAB + 1)


@pytest.mark.slow
def test_a_run_from_a_checkpoint_and_its_tokeniser(tmp_path):
    from jmeta.models import gpt2
    from jmeta.models.pretrained import to_pretrained
    from jmeta.tasks.bpe import train_bpe

    words = train_bpe(["def f(x): return x\n" * 20], 300)
    vocab = words.get_vocab_size()
    shape = gpt2.GPT2Config(vocab=vocab, width=8, layers=2, heads=2, max_len=40, head="causal_lm")
    to_pretrained(tmp_path / "tiny", shape, gpt2.init(shape, jax.random.key(0)))
    words.save(str(tmp_path / "tiny" / "tokenizer.json"))
    methods = ",".join(name for name in METHODS if name != NGRAM)
    out = tmp_path / "run"
    adaptive_lm.main(["--preset", "smoke", "--seeds", "1", "--model", str(tmp_path / "tiny"),
                      "--base-steps", "0", "--methods", methods, "--out", str(out)])  # fmt: skip
    perplexity = {row["method"]: row["mean"] for row in read_results(out)["summary"]
                  if row["metric"] == page.PERPLEXITY}  # fmt: skip
    assert set(perplexity) == {*methods.split(","), UNIGRAM}
    assert not (out / "trained" / "decoder-0").exists()  # the checkpoint is where all begin
    assert perplexity[STATIC] == pytest.approx(vocab, rel=0.5)  # it was drawn at random


@pytest.mark.slow
def test_every_method_in_one_run(tmp_path):
    out = tmp_path / "all"
    adaptive_lm.main(["--preset", "smoke", "--seeds", "1", "--out", str(out)])
    results = read_results(out)
    for metric in (page.PERPLEXITY, scoring.COST, scoring.MEMORY):
        found = {row["method"] for row in results["summary"] if row["metric"] == metric}
        assert found - {UNIGRAM} == set(METHODS), metric


@pytest.mark.parametrize(
    ("sgd", "exact", "cost", "said"),
    [
        (9.0, 8.0, 2.0, "212 % of the gain in nats of SGD dynamic evaluation at 0.50 of its cost"),
        (9.0, 9.9, 2.0, "does not reach the aim"),
        (9.0, 8.0, 3.0, "does not reach the aim"),
        (10.2, 10.2, 2.0, "gains nothing over static here (-0.020 nats)"),
    ],
)
def test_a_share_of_a_gain_is_said_only_of_a_gain(sgd, exact, cost, said):
    perplexity = {STATIC: 10.0, SGD: sgd, EXACT: exact}
    summary = [
        {"method": name, "metric": page.PERPLEXITY, "mean": value}
        for name, value in perplexity.items()
    ]
    summary += [
        {"method": name, "metric": scoring.COST, "mean": value}
        for name, value in ((SGD, 4.0), (EXACT, cost))
    ]
    assert said in page.notes(adaptive_lm.PRESETS["smoke"], summary)[-1]
