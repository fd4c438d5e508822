"""The transfer experiment: its run directory, equal budgets, clean cuts, Reptile, and errors."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import optax
import pytest

from experiments import _qa_data as data
from experiments import _qa_model as model
from experiments import _qa_report as page
from experiments import qa_transfer
from jmeta.core import optim
from jmeta.models import gpt2
from jmeta.models.pretrained import to_pretrained
from jmeta.runtime import report
from jmeta.tasks.text import Example

SMOKE = qa_transfer.PRESETS["smoke"]


def questions(topic, count, unanswerable=0):
    """SQuAD's JSON: colours, with the answer where it is said to be."""
    paragraphs = []
    for i in range(count):
        context = f"{topic} {i}. Its colour is {topic}{i % 3}, they say."
        said = f"{topic}{i % 3}"
        answer = {"text": said, "answer_start": context.index(f"{said},")}
        asked = {"id": f"{topic}{i}", "question": "Which colour?"}
        asked |= {"answers": [] if i < unanswerable else [answer]}
        asked |= {"is_impossible": True} if i < unanswerable else {}
        paragraphs.append({"context": context, "qas": [asked]})
    return {"version": "1", "data": [{"title": topic, "paragraphs": paragraphs}]}


def sentences(rng, count, words):
    vocabulary = [f"w{i}" for i in range(400)]
    for _ in range(count):
        yield " ".join(rng.choice(vocabulary, words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as ``$JMETA_DATA`` is laid out, with made-up questions and sentences."""
    import pyarrow as pa
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("data")
    shared = questions("attic", 6)
    made = {
        "squad_v1.1_train_sample": questions("barn", 9),
        "squad_v1.1_dev_part": {
            "version": "1",
            "data": questions("shed", 6)["data"] + shared["data"],
        },
        "squad_v2.0_devpart_a": {
            "version": "2",
            "data": shared["data"] + questions("loft", 8, unanswerable=4)["data"],
        },
        "squad_v2.0_devpart_b": questions("cellar", 6, unanswerable=3),
        "duorc_train": questions("film", 5),
        "duorc_val": questions("play", 5),
    }
    (root / "qa").mkdir()
    (root / "glue").mkdir()
    for name, content in made.items():
        with gzip.open(root / "qa" / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            json.dump(content, file)
    rng = np.random.default_rng(0)
    rows = [*sentences(rng, 20, 14), *sentences(rng, 30, 6)]
    table = pa.table({"sentence": rows, "label": [i % 2 for i in range(len(rows))]})
    pyarrow.parquet.write_table(table, root / "glue" / "sst2_train.parquet")
    return root


@pytest.fixture(scope="module")
def set_up(folder, tmp_path_factory):
    """The data in place of the real ones, a short library, and four of the plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMETA_DATA", str(folder))
        patch.setenv("JMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(data, "library", lambda: ["def one():\n    return 1\n" * 30])
        every = qa_transfer.plans()
        last = every[1].kind, every[2].name, every[-2].name
        assert last == ("text", "sequence: squad", "Reptile: squad, squad2, duorc")
        few = [every[0], every[1], every[-4], every[-2]]
        patch.setattr(qa_transfer, "plans", lambda: few)
        yield every


@pytest.fixture(scope="module")
def smoke(set_up, tmp_path_factory):
    out = tmp_path_factory.mktemp("qa") / "run"
    qa_transfer.main(["--preset", "smoke", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def bench(set_up, tmp_path_factory):
    return qa_transfer.prepare(dataclasses.replace(SMOKE, out=tmp_path_factory.mktemp("bench")))


def accuracies(out):
    rows = report.read_results(out)["rows"]
    return {row["method"]: row for row in rows if row["metric"] == "SST-2 accuracy"}


@pytest.mark.slow
def test_smoke_scores_every_plan_and_baseline(smoke):
    results = report.read_results(smoke)
    scored = accuracies(smoke)
    names = {plan.name for plan in qa_transfer.plans()}
    bags = {"bag of words, the same rows", "bag of words, all rows"}
    assert set(scored) == names | bags | {"majority"}
    for row in scored.values():
        assert len(row["values"]) == row["sentences"] == SMOKE.test
        assert row["value"] == pytest.approx(np.mean(row["values"]))
    headline = [row for row in results["summary"] if row["metric"] == "SST-2 accuracy"]
    assert {row["baseline"] for row in headline} == {page.NONE}
    assert [row["mean"] for row in headline] == sorted((r["mean"] for r in headline), reverse=True)
    answers = [row for row in results["rows"] if row["metric"] == "exact answers"]
    assert {row["method"] for row in answers} == names | {"the most frequent answer"}
    # Of squad's twelve development questions six are about contexts that squad2 trains on.
    labels = {row["questions"] for row in answers}
    assert labels == {
        "squad, 9 to learn from, 4 scored",
        "squad2, 14 to learn from, 4 scored",
        "duorc, 5 to learn from, 4 scored",
    }
    for name in ("report.html", "diversity.png", "differences.svg", "learning.png", "answers.svg",
                 "config.yaml", "run.json", "metrics.jsonl"):  # fmt: skip
        assert (smoke / name).stat().st_size > 0, name
    assert not list(smoke.glob("plans/*/*/checkpoints"))


@pytest.mark.slow
def test_resuming_reads_what_is_done_and_refuses_other_settings(smoke, capsys):
    before = accuracies(smoke)
    with pytest.raises(SystemExit, match="add --resume"):
        qa_transfer.main(["--preset", "smoke", "--out", str(smoke)])
    again = ["--preset", "smoke", "--out", str(smoke), "--resume"]
    with pytest.raises(SystemExit, match="made with other settings"):
        qa_transfer.main([*again, "--target-lr", "0.5"])
    file = smoke.parent / "diversity.json"
    file.write_text('{"squad": 0.0, "duorc+squad2+squad": 0.25}')
    qa_transfer.main([*again, "--diversity", str(file)])
    assert {k: r["value"] for k, r in accuracies(smoke).items()} == {
        k: r["value"] for k, r in before.items()
    }
    assert accuracies(smoke)["Reptile: squad, squad2, duorc"]["diversity"] == 0.25
    assert "diversity" not in accuracies(smoke)[page.NONE]
    assert "step 1/" not in capsys.readouterr().out


def test_every_plan_has_the_same_budget_counted_batch_by_batch(bench, set_up):
    config = dataclasses.replace(SMOKE, qa_steps=24, inner_steps=4)
    found = {}
    for plan in set_up[1:]:
        _, _, sample, steps = qa_transfer.intermediate(config, bench, plan, 0)
        found[plan.name] = data.counted(sample, steps)
    assert len(found) == 17
    assert {positions for positions, _ in found.values()} == {24 * 2 * config.positions}
    assert all(0 < tokens <= positions for positions, tokens in found.values())


def test_a_mixture_and_a_sequence_take_equally_many_rows_of_each_source(bench):
    lengths = {name: len(each.train.tokens) for name, each in bench.sources.items()}
    assert lengths == {"squad": 9, "squad2": 14, "duorc": 5}
    known = {
        name: {row.tobytes() for row in each.train.tokens} for name, each in bench.sources.items()
    }

    def by_source(sample, steps):
        rows = [row.tobytes() for step in range(steps) for row in sample(step).query["tokens"]]
        return [name for row in rows for name, of in known.items() if row in of]

    sequence = by_source(data.in_sequence(bench.sources, 2, 6, 0), 6)
    assert sequence == ["squad"] * 4 + ["squad2"] * 4 + ["duorc"] * 4
    mixture = by_source(data.mixed(bench.sources, 2, 0), 6)
    assert [mixture.count(name) for name in known] == [4, 4, 4]


def test_one_reptile_step_is_the_mean_of_the_tasks_ends(bench, x64):
    """From one start: each source's Adam steps by hand, then their mean, whatever the order."""
    config, rate, inner = bench.start.config, 0.01, 2
    loss = model.text_loss(config)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), bench.start.params)
    episode = data.by_task(bench.sources, 2, inner, 0)(0)
    estimator = model.reptile(loss, inner, rate)
    grads, _, _ = jax.jit(lambda p: estimator.estimate(p, (), episode, None))(params)
    optimizer = optim.adam(rate)

    @jax.jit
    def moved(fast, state, batch):
        slope = jax.grad(lambda p: loss(p, batch, None)[0])(fast)
        updates, state = optimizer.update(slope, state, fast)
        return optax.apply_updates(fast, updates), state

    ends, start = [], jax.jit(optimizer.init)(params)
    for task in range(len(bench.sources)):
        fast, state = params, start
        for step in range(inner):
            batch = {k: leaf[task, step] for k, leaf in episode.support.batches.items()}
            fast, state = moved(fast, state, batch)
        ends.append(jax.tree.map(np.asarray, fast))
    expected = jax.tree.map(lambda begin, *end: begin - sum(end) / len(end), params, *ends)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), grads, expected
    )


def test_answer_scores_equal_a_plain_loop_over_positions(bench):
    config, params = bench.start.config, bench.start.params
    found = bench.sources["squad2"].dev
    batch = {"tokens": found.tokens, "mask": found.mask}
    logs = np.asarray(jax.jit(lambda p: jax.nn.log_softmax(gpt2.apply(config, p, batch)))(params))
    losses, right, exact = [], [], []
    for i, row in enumerate(found.tokens):
        at = np.flatnonzero(found.weights[i])
        losses += [-logs[i, t - 1, row[t]] for t in at]
        hits = [logs[i, t - 1].argmax() == row[t] for t in at]
        right, exact = right + hits, [*exact, all(hits)]
    scores = model.make_answer_scores(config)(params, found)
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert (scores["token accuracy"], scores["exact"]) == pytest.approx(
        (np.mean(right), np.mean(exact))
    )


def test_held_out_sentences_share_no_run_of_words_with_training_rows():
    rng = np.random.default_rng(1)
    whole = [each.split() for each in sentences(rng, 40, 15)]
    rows = [Example(" ".join(each), label=0) for each in whole]
    rows += [Example(" ".join(each[a : a + n]), label=1)
             for each in whole for a, n in ((0, 13), (2, 6), (5, 3), (9, 1))]  # fmt: skip
    held, left = data.held_out(rows, 10, seed=0)
    assert len(held) == 10
    assert not set(held) & set(left)

    def runs(i):
        words = rows[i].a.split()
        return {tuple(words[a : a + 5]) for a in range(len(words) - 4)}

    for place, i in enumerate(held):
        assert len(rows[i].a.split()) >= 12
        assert not any(runs(i) & runs(j) for j in held[:place])
        assert not any(runs(i) & runs(j) for j in left)
        assert not any(f" {rows[j].a} " in f" {rows[i].a} " for j in left)
    # Of the 30 sentences that are not held out, every row stays but single words that others hold.
    assert len(left) >= 30 * 4
    with pytest.raises(ValueError, match="60 sentences are to be held out"):
        data.held_out(rows, 60, seed=0)


def test_a_diversity_file_is_read_in_any_order_and_mistakes_are_named(tmp_path):
    file, sources = tmp_path / "diversity.json", ["squad", "squad2", "duorc"]
    file.write_text('{"duorc+squad": 0.2, "squad2": 0}')
    found = page.read_diversity(file, sources)
    assert found == {frozenset({"squad", "duorc"}): 0.2, frozenset({"squad2"}): 0.0}
    for text, message in (
        ('{"squad+race": 0.1}', r"'squad\+race' is no subset"),
        ('{"squad+duorc": 0.1, "duorc+squad": 0.1}', "there twice"),
        ('{"squad": "high"}', "no number"),
        ("[]", "must map subsets"),
        ("{", "cannot be read as JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            page.read_diversity(file, sources)


def test_settings_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ValueError, match="make it a multiple of 30"):
        dataclasses.replace(SMOKE, qa_steps=20, inner_steps=5)


def test_without_data_or_checkpoint_the_program_says_what_is_needed(set_up, tmp_path, monkeypatch):
    arguments = ["--preset", "smoke", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="no/such/folder"):
        qa_transfer.main([*arguments, "--model", "no/such/folder"])
    monkeypatch.delenv("JMETA_DATA")
    with pytest.raises(SystemExit, match="set JMETA_DATA"):
        qa_transfer.main(arguments)


def test_a_checkpoint_with_its_tokeniser_takes_the_place_of_the_small_model(bench, tmp_path):
    start = bench.start
    folder = to_pretrained(tmp_path / "checkpoint", start.config, start.params)
    start.words.tokenizer.save(str(folder / "tokenizer.json"))
    config = dataclasses.replace(SMOKE, model=str(folder))
    found = qa_transfer.prepare(config)
    assert found.lm is None
    assert found.start.words.fingerprint == start.words.fingerprint
    for name, each in bench.sources.items():
        assert found.answers(found.start.params, found.sources[name].dev) == pytest.approx(
            bench.answers(start.params, each.dev), rel=1e-5
        )
    with pytest.raises(ValueError, match="has 48 positions; 64 are asked for"):
        qa_transfer.prepare(dataclasses.replace(config, positions=64))


def test_a_verdict_says_plainly_whether_anything_helped():
    def row(name, difference, half):
        values = {"paired_difference": difference, "paired_ci95": half}
        return {"method": name, "metric": "SST-2 accuracy", **values}

    said = page.verdict([row("a", 0.1, 0.2), row("b", -0.3, 0.1)], ["a", "b"])
    assert said.startswith("No intermediate training on questions is better")
    assert said.endswith("Worse, likewise: b.")
    assert "excludes zero: a." in page.verdict([row("a", 0.3, 0.2)], ["a"])
