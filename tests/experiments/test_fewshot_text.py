"""The few-shot text experiment: its run directory, fair comparison, resuming, and baselines."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import _fewshot_baselines as baselines
from experiments import _fewshot_model as model
from experiments import _fewshot_scoring as scoring
from experiments import fewshot_text
from jmeta.runtime import report
from jmeta.tasks import corpora
from jmeta.tasks.corpora import stdlib_modules
from jmeta.tasks.episodes import draws, episodes, few_shot

METHODS = {
    "maml", "fomaml", "reptile", "anil", "transfer", "joint start", "no meta-training", "majority",
    "linear probe, joint features", "prototypes, joint features", "prototypes, tf-idf",
    "nearest neighbour, joint features", "nearest neighbour, tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("fewshot") / "run"
    # Short modules are classes enough for a few episodes, and their passages quick to cut.
    short = [each for each in stdlib_modules().items() if 3_000 < each[1].stat().st_size < 20_000]
    with pytest.MonkeyPatch.context() as patch:
        # Until the file's last test: a resumed run must read the same library.
        patch.setattr(corpora, "stdlib_modules", lambda: dict(short[::6]))
        with pytest.MonkeyPatch.context() as here:
            here.setattr(scoring, "CHUNK", 6)  # there are no more episodes
            fewshot_text.main(["--preset", "smoke", "--out", str(out)])
        yield out


def accuracies(out):
    rows = report.read_results(out)["rows"]
    return {row["method"]: row for row in rows if row["metric"] == "accuracy"}


def test_smoke_scores_every_method_with_paired_differences(smoke):
    results = report.read_results(smoke)
    scored = accuracies(smoke)
    assert set(scored) == METHODS
    for row in scored.values():
        assert len(row["values"]) == 6
        assert row["value"] == pytest.approx(np.mean(row["values"]), abs=1e-4)
        assert 0 <= min(row["values"]) <= max(row["values"]) <= 1
    headline = [row for row in results["summary"] if row["metric"] == "accuracy"]
    assert {row["baseline"] for row in headline} == {"transfer"}
    [maml] = [
        row
        for row in results["summary"]
        if row["metric"] == "accuracy of exact MAML against first order" and row["method"] == "maml"
    ]
    gaps = np.subtract(scored["maml"]["values"], scored["fomaml"]["values"])
    assert maml["baseline"] == "fomaml"
    assert maml["paired_difference"] == pytest.approx(gaps.mean(), abs=1e-4)
    for name in ("report.html", "adaptation.png", "cost.svg", "differences.png", "learning.png",
                 "config.yaml", "run.json", "metrics.jsonl"):  # fmt: skip
        assert (smoke / name).stat().st_size > 0, name


def test_transfer_takes_exactly_mamls_gradient_evaluations(smoke):
    counts = {
        row["method"]: row["value"]
        for row in report.read_results(smoke)["rows"]
        if row["metric"] == "gradient evaluations"
    }
    # 2 inner steps on 3 * 2 passages, each thrice; 3 * 3 queries; 2 episodes, 4 meta-steps.
    assert counts["maml"] == (2 * 6 * 3 + 9) * 2 * 4
    assert counts["fomaml"] == (2 * 6 + 9) * 2 * 4
    assert counts["transfer"] == counts["maml"]
    steps = [
        json.loads(line)["step"]
        for line in (smoke / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["method"] == "transfer, seed 0"
    ]
    batch = fewshot_text.PRESETS["smoke"].joint_batch
    assert max(steps) * batch == counts["transfer"]


def test_a_batch_that_cannot_equal_them_is_refused():
    with pytest.raises(ValueError, match=r"transfer cannot take exactly 360 gradient"):
        dataclasses.replace(fewshot_text.PRESETS["smoke"], joint_batch=7)


def test_a_complete_run_shows_its_result_again_and_computes_nothing(smoke, capsys, monkeypatch):
    def work(*_):
        raise AssertionError("the run began anew")

    monkeypatch.setattr(fewshot_text, "load", work)
    results = (smoke / "results.json").read_bytes()
    made = (smoke / "run.json").read_bytes()
    (smoke / "run.json").write_bytes(b'{"command": "made by another version"}')
    again = ["--preset", "smoke", "--out", str(smoke), "--resume"]
    fewshot_text.main(again)
    shown = capsys.readouterr().out
    assert (smoke / "results.json").read_bytes() == results
    assert b"another version" in (smoke / "run.json").read_bytes()  # nor is how they were made
    (smoke / "run.json").write_bytes(made)
    # Longer names are wrapped.
    for said in (*(name for name in METHODS if "," not in name), "prototypes, tf-idf",
                 "mixed_mode", "the whole run", str(smoke / "report.html")):  # fmt: skip
        assert said in shown.replace("\n", ""), said
    # More seeds than it has are work to do, and so is a page that was not written.
    with pytest.raises(AssertionError, match="began anew"):
        fewshot_text.main([*again, "--seeds", "2"])
    (smoke / "report.html").rename(smoke / "away.html")
    with pytest.raises(AssertionError, match="began anew"):
        fewshot_text.main(again)
    (smoke / "away.html").rename(smoke / "report.html")


@pytest.mark.slow
def test_resuming_reads_what_is_complete_and_gives_the_same_numbers(smoke):
    before = accuracies(smoke)
    with pytest.raises(SystemExit, match="add --resume"):
        fewshot_text.main(["--preset", "smoke", "--out", str(smoke)])
    (smoke / "report.html").unlink()  # as if it had ended before its page
    fewshot_text.main(["--preset", "smoke", "--out", str(smoke), "--resume"])
    assert (smoke / "report.html").exists()
    assert accuracies(smoke) == before


def test_a_file_of_other_columns_is_read_and_named_sources_have_theirs(tmp_path):
    words = ["red", "green", "blue", "white"]
    rows = [f"{words[c % 4]} {i} text,c{c}" for c in range(30) for i in range(8)]
    file = tmp_path / "own.csv"
    file.write_text("\n".join(("sentence,topic", *rows)) + "\n")
    asked = {"text_column": "sentence", "label_column": "topic"}
    config = dataclasses.replace(
        fewshot_text.PRESETS["smoke"], source=str(file), test_queries=3, **asked
    )
    found = fewshot_text.load(config)
    assert sorted(name for each in found.values() for name in each.names) == sorted(
        f"c{c}" for c in range(30)
    )
    with pytest.raises(ValueError, match=r"has no column 'text'; its columns are .*sentence"):
        fewshot_text.load(dataclasses.replace(config, text_column="text"))
    for source in ("stdlib", "clinc150"):
        with pytest.raises(ValueError, match=f"those of {source} are known: leave them out"):
            dataclasses.replace(config, source=source)
    with pytest.raises(ValueError, match="those of stdlib are known"):
        fewshot_text.Config(source_config="plus")


def test_unknown_flags_and_sources_end_with_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as flag:
        fewshot_text.main(["--preset", "smoke", "--inner-stpes", "3"])
    assert flag.value.code not in (0, None)
    assert "inner-steps" in capsys.readouterr().err
    with pytest.raises(SystemExit) as source:
        fewshot_text.main(
            ["--preset", "smoke", "--source", "no/such.csv", "--out", str(tmp_path / "run")]
        )
    assert source.value.code not in (0, None)


def test_baselines_use_the_episodes_that_the_network_adapts_to():
    """A feature that is the class itself: whoever reads other rows than the episode's fails."""
    y = np.repeat(np.arange(6), 9)
    source = few_shot(np.eye(6, dtype=np.float32)[y], y)
    size = {"ways": 4, "shots": 2, "queries": 3, "tasks": 5}
    episode, draw = episodes(source, **size)(3, 0), draws(source, **size)(3, 0)
    support, query = baselines.parts(draw)
    np.testing.assert_array_equal(source.x[support.reshape(5, -1)], episode.support["x"])
    np.testing.assert_array_equal(source.x[query.reshape(5, -1)], episode.query["x"])
    for found in (
        baselines.nearest_neighbour(source.x, draw),
        baselines.prototypes(source.x, draw),
        baselines.linear_probe(source.x, draw, 10.0),
    ):
        np.testing.assert_array_equal(found, np.ones(5))
    np.testing.assert_array_equal(baselines.majority(draw), np.full(5, 0.25))


def test_the_linear_probe_in_the_span_of_the_support_is_the_one_in_full_width():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    source = few_shot(rng.normal(size=(40, 30)), np.repeat(np.arange(4), 10))
    draw = draws(source, ways=3, shots=2, queries=5, tasks=4)(0, 0)
    support, query = baselines.parts(draw)
    expected = []
    for s, q in zip(support, query, strict=True):
        whole = LogisticRegression(C=1.0, max_iter=2000)
        whole.fit(source.x[s.reshape(-1)], np.tile(np.arange(3), 2))
        right = whole.predict(source.x[q.reshape(-1)]) == np.tile(np.arange(3), 5)
        expected.append(np.mean(right))
    np.testing.assert_allclose(baselines.linear_probe(source.x, draw, 1.0), expected)


def test_one_inner_step_on_a_zero_head_is_a_nearest_mean():
    """The gradient at a zero head is the difference of class means: one step scores by them."""
    import jax
    import jax.numpy as jnp

    import jmeta

    counts = np.random.default_rng(1).random((18, 40)).astype(np.float32)
    y = np.tile(np.arange(3, dtype=np.int32), 6)

    @jax.jit
    def adapted():
        params = model.init(jax.random.key(0), vocab=40, width=8, classes=3)
        x = model.encode(params["body"], counts)
        batch = {"x": x, "y": y, "mask": jnp.ones(18)}
        meta = {"adapter": params["adapter"], "head": params["head"]}
        fast = jmeta.adapt(model.full_problem(0.5), meta, batch, steps=1)
        return fast["head"]["kernel"], model.features(params["adapter"], x)

    kernel, found = (np.asarray(each, np.float64) for each in adapted())
    means = np.stack([found[y == c].mean(0) for c in range(3)])
    expected = 0.5 * (means - found.mean(0)) / 3
    np.testing.assert_allclose(kernel.T, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("jmeta_data")
@pytest.mark.parametrize("source", ["clinc150", "banking77", "huffpost", "hwu64"])
def test_it_runs_on_every_labelled_source(source, tmp_path):
    fewshot_text.main(["--preset", "smoke", "--source", source, "--out", str(tmp_path / "run")])
    scored = accuracies(tmp_path / "run")
    assert set(scored) == METHODS
    assert {row["source"] for row in scored.values()} == {source}
    assert scored["majority"]["value"] == pytest.approx(1 / scored["majority"]["ways"], abs=1e-4)
