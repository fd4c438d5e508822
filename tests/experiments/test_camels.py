"""The CaMeLS experiment: a whole run of the smoke preset, its data and its choices."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import _camels_data as reading
from experiments import _camels_model as networks
from experiments import _camels_report as page
from experiments import _camels_scoring as scoring
from experiments import camels
from jmeta.data.sources import DataUnavailable
from jmeta.runtime.report import read_results
from jmeta.runtime.statistics import summarise
from jmeta.tasks.bpe import SEP

CONFIG = camels.PRESETS["smoke"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "camels"
    camels.main(["--preset", "smoke", "--seeds", "1", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def data():
    return reading.load(CONFIG)


@pytest.mark.slow
def test_a_run_leaves_everything_the_contract_names(run):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html", "differences.png",
                 "learning.svg"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    methods = {json.loads(line)["method"] for line in (run / "metrics.jsonl").open()}
    assert methods == {"base", "camels, seed 0"}


@pytest.mark.slow
def test_every_method_is_paired_with_uniform(run):
    results = read_results(run)
    every = {networks.LEARNED, networks.UNIFORM, networks.NONE, *reading.RULES}
    for metric in (scoring.LOSS, scoring.MOVED, scoring.EXACT, scoring.F1):
        found = {r["method"]: r for r in results["summary"] if r["metric"] == metric}
        assert set(found) == every
        by = {
            (r["method"], r["seed"]): np.mean(r.get("values", r["value"]))
            for r in results["rows"]
            if r["metric"] == metric
        }
        for name in every - {networks.UNIFORM}:
            gap = by[name, 0] - by[networks.UNIFORM, 0]
            assert found[name]["paired_difference"] == pytest.approx(gap)
    moved = {r["method"]: r["mean"] for r in results["summary"] if r["metric"] == scoring.MOVED}
    assert moved.pop(networks.NONE) == 0
    assert min(moved.values()) > 0


def test_documents_hold_the_answers_and_parts_share_none(data):
    decode = lambda ids: data.words.tokenizer.decode(ids.tolist())  # noqa: E731
    for part in data.parts.values():
        for i, golds in enumerate(part.golds):
            row, answer = part.questions[i], part.answers[i] > 0
            said = row[answer]
            assert answer[part.prompts[i]]
            assert not answer[: part.prompts[i]].any()
            assert decode(row[: part.prompts[i]]).rstrip().endswith("A:")
            assert said[-1] == SEP or len(said) == CONFIG.longest_answer
            whole = decode(part.documents[i][part.documents[i] > 0])
            assert golds[0] in whole or CONFIG.length < len(part.documents[i])
            held = part.documents[i][part.rules["the answer alone"][i] > 0]
            assert golds[0] in decode(held)
            assert (part.kinds[i] > 0).sum() == (part.documents[i] > 0).sum()
    texts = [{row.tobytes() for row in part.documents} for part in data.parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_a_threshold_takes_the_weight_of_the_smallest_and_nothing_else(data):
    for part in data.parts.values():
        whole, above = part.rules["tf-idf"], part.rules["tf-idf with a threshold"]
        assert ((above == whole) | (above == 0)).all()
        # Half of a document's weights, of which a window shows a part.
        assert 0.25 < (above > 0).sum() / (whole > 0).sum() < 0.75


def test_an_answer_is_anywhere_in_its_window():
    rng = np.random.default_rng(0)
    answer = np.zeros(50, bool)
    answer[20:23] = True
    found = {reading.window(answer, 10, rng) for _ in range(500)}
    assert found == set(range(13, 21))  # from the answer at its end to the answer at its beginning
    for at, first in ((slice(0, 2), 0), (slice(48, 50), 40)):  # at the ends of a document
        edge = np.zeros(50, bool)
        edge[at] = True
        starts = {reading.window(edge, 10, rng) for _ in range(300)}
        assert first in starts
        assert min(starts) >= 0
        assert max(starts) <= 40
    assert reading.window(answer[18:26], 10, rng) == 0  # the whole document
    long = np.zeros(50, bool)
    long[5:35] = True
    assert reading.window(long, 10, rng) == 5  # what fits of an answer is its beginning


def test_streams_are_the_same_for_all_and_of_different_documents(data):
    rows, kept = reading.streams(CONFIG, data, "test", 4, 0)
    again, _ = reading.streams(CONFIG, data, "test", 4, 0)
    np.testing.assert_array_equal(rows, again)
    assert rows.shape == (4, CONFIG.stream)
    assert kept.shape == (4, CONFIG.locality_documents)
    assert all(len(set(row)) == CONFIG.stream for row in rows.tolist())
    assert len(set(rows.ravel())) == rows.size  # no document twice while there are others


@pytest.mark.parametrize(
    ("gap", "word"), [(-0.1, "beat"), (0.1, "are worse"), (0.0, "are not told apart")]
)
def test_the_verdict_is_the_intervals(gap, word):
    noise = (0.01, -0.01, 0.0)
    rows = [
        {"method": name, "seed": seed, "metric": scoring.LOSS,
         "value": 2 + better + noise[seed] * (name == networks.LEARNED)}
        for name, better in ((networks.UNIFORM, 0.0), (networks.LEARNED, gap))
        for seed in range(3)
    ]  # fmt: skip
    assert word in page.verdict(summarise(rows, baseline=networks.UNIFORM))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": (9, 9, 9)}, "four numbers"),
        ({"stream": 17}, "at least stream=17"),
        ({"longest_answer": 40}, "leaves no room"),
        ({"rates": ()}, r"rates=.* choose more than 0"),
        ({"rates": (0.1, 0.0)}, r"rates=.* choose more than 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_what_is_missing_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    asked = dataclasses.replace(CONFIG, source="squad", out=tmp_path)
    with pytest.raises(DataUnavailable, match="JMETA_DATA"):
        reading.read(asked)
    with pytest.raises(SystemExit, match="JMETA_DATA"):
        camels.run(asked)


def test_squad_is_split_by_document(jmeta_data):
    config = dataclasses.replace(CONFIG, source="squad", documents=(30, 20, 10, 10))
    found = reading.read(config)
    contexts = [q.context for part in found.values() for q in part]
    assert len(set(contexts)) == len(contexts) == 70
    with pytest.raises(ValueError, match="asks for 90020"):
        reading.read(dataclasses.replace(config, documents=(90000, 10, 10, 10)))


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(run):
    with pytest.raises(SystemExit, match="add --resume"):
        camels.main(["--preset", "smoke", "--seeds", "1", "--out", str(run)])
