"""The text experiment: its data and masks, bad input, and whole runs of the smoke preset."""

import dataclasses
import gzip
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _meta_lm_data as data_of
from experiments import _meta_lm_methods as methods_of
from experiments import _meta_lm_report as page
from experiments import _meta_lm_training as training
from experiments import _teacher_shared as shared
from experiments import meta_lm
from jmeta.data.sources import DataUnavailable
from jmeta.methods import two_head_loss
from jmeta.models import masked_lm, teacher_lm
from jmeta.runtime import parameters
from jmeta.runtime.report import read_results
from jmeta.tasks import superglue
from jmeta.tasks.text import Example
from jmeta.testing import relative_error

SMOKE = meta_lm.PRESETS["smoke"]
ARGUMENTS = ["--preset", "smoke", "--tasks", "CB,ReCoRD", "--positions", "48"]
NAMES = ("Ann", "Bob", "Cleo", "Dora")


def commitment(i, *, hidden=False):
    label = {} if hidden else {"label": ("entailment", "contradiction", "neutral")[i % 3]}
    return {"premise": f"It is {i}.", "hypothesis": f"It was {i % 3}.", "idx": i, **label}


def reading(i):
    """A passage with two names, and a query whose answer is the first."""
    first, second = NAMES[i % 4], NAMES[(i + 1) % 4]
    text = f"{first} saw {second}. {first} left."
    places = [0, len(first) + 5, len(first) + len(second) + 7]
    lengths = [len(first), len(second), len(first)]
    entities = [{"start": a, "end": a + n - 1} for a, n in zip(places, lengths, strict=True)]
    answer = {**entities[0], "text": first}
    query = {"query": f"@placeholder {i}", "answers": [answer], "idx": i}
    return {"passage": {"text": text, "entities": entities}, "qas": [query], "idx": i}


def put(folder, name, split, rows):
    file = folder / "superglue" / name / f"{split}.jsonl.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as ``$JMETA_DATA`` is laid out, with two made-up tasks and two articles."""
    root = tmp_path_factory.mktemp("data")
    put(root, "CB", "train", [commitment(i) for i in range(12)])
    put(root, "CB", "val", [commitment(i) for i in range(20, 27)])
    put(root, "CB", "test", [commitment(i, hidden=True) for i in range(40, 43)])
    put(root, "RTE", "train", [commitment(i, hidden=True) for i in range(6)])
    put(root, "RTE", "val", [commitment(i, hidden=True) for i in range(6)])
    put(root, "ReCoRD", "train", [reading(i) for i in range(6)])
    put(root, "ReCoRD", "val", [reading(i) for i in range(7, 11)])
    (root / "lm").mkdir()
    for split in ("train", "valid"):
        with gzip.open(root / "lm" / f"wikitext2_{split}.txt.gz", "wt") as out:
            out.write(" \n = One = \n \n A text . \n \n = = Part = = \n more \n = Two = \n end \n")
    return root


@pytest.fixture(scope="module", autouse=True)
def surroundings(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMETA_DATA", str(folder))
        patch.setenv("JMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(SMOKE, tasks=("CB", "ReCoRD"), positions=48)


@pytest.fixture(scope="module")
def data(config):
    return data_of.load(config)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "meta_lm"
    meta_lm.main([*ARGUMENTS, "--methods", "mlm", "--out", str(out)])
    return out


def values(out, metric):
    rows = [row for row in read_results(out)["rows"] if row["metric"] == metric]
    return {(row["method"], row.get("task"), row.get("measure")): row["value"] for row in rows}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"methods": ("mlm,soap",)}, "methods soap: choose of mlm, denoising, random"),
        ({"methods": ()}, "methods is empty"),
        ({"tasks": ("CB", "SQuAD")}, "tasks SQuAD: choose of BoolQ, CB"),
        ({"tasks": ("",)}, "tasks is empty"),
        ({"mlm_task": ("mlm",)}, "mlm_task mlm: choose of soft"),
        ({"batch": 0}, "batch=0: choose more than 0"),
        ({"steps": 5, "inner_steps": 2}, "steps=5 is no multiple of the 2 steps"),
        ({"steps": 4, "evaluations": 5}, "evaluations=5 is more than there are steps"),
        ({"mask_bug": True, "methods": ("mlm", "mask-only")}, "none of these methods has"),
        ({"rate": 0.0}, "rate=0.0: choose more than 0"),
        ({"inner_steps": 2, "methods": ("mlm",)}, "inner_steps=2: none of the methods mlm reads"),
        ({"support_steps": 2, "methods": ("denoising",)}, "support_steps=2: none of the methods"),
        ({"hard_weight": 1.0}, "one that does .hard, input-only hard. beside them"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        meta_lm.Config(**fields)


def test_tasks_and_methods_are_named_together_or_one_by_one():
    assert meta_lm.Config(tasks=("superglue",)).tasks == tuple(superglue.TASKS)
    assert meta_lm.Config(tasks=("embedded",)).tasks == ("Package", "Same_module")
    assert meta_lm.Config(tasks=("WSC, BoolQ",)).tasks == ("BoolQ", "WSC")
    assert meta_lm.Config(methods=("hard,mlm",)).methods == ("mlm", "hard")


def test_a_teacher_is_scored_on_distinct_examples_of_one_task_with_the_mask_of_its_labels(
    config, data
):
    make = data_of.teacher_sample(config, data, keep=("masked",), mlm_task=True, mask_bug=False)
    wrong = data_of.teacher_sample(config, data, keep=("masked",), mlm_task=True, mask_bug=True)
    kinds = set()
    for step in range(12):
        episode, bug = make(0, step), wrong(0, step)
        support, query = episode.query
        assert support["tokens"].shape == (1, 2, 2, 48)
        for task in range(2):
            first = {part["tokens"][0, task, :, 0].tolist()[0] for part in (support, query)}
            assert len(first) == 1
            kinds |= first
            both = [tuple(row) for part in (support, query) for row in part["tokens"][0, task]]
            assert len(set(both)) == len(both)
        for right, part in zip(episode.query, bug.query, strict=True):
            counted = right["weights"] != 0
            assert (right["labels"][counted] != data.words.pad).all()
            masked = right["tokens"][..., 0] == data.words.cls[1]
            assert (right["weights"][~masked] == right["mask"][~masked]).all()
            assert (right["weights"][masked] <= right["mask"][masked]).all()
            # The bug: what has no label is [PAD] by its label, and counts.
            assert (part["weights"] == part["mask"]).all()
            hidden = (part["weights"] != 0) & ~counted
            assert (part["labels"][hidden] == data.words.pad).all()
            assert hidden[masked].any() == masked.any()
    assert kinds == {data.words.cls[k] for k in (1, 3, 6)}


def test_all_methods_read_as_many_texts_in_a_student_step(config, data):
    several = dataclasses.replace(config, micro_batches=3, inner_steps=2, steps=4)
    plain = data_of.corrupted_sample(several, data, shared.CORRUPTIONS["mlm"])(0, 0).query
    made = data_of.teacher_sample(several, data, keep=(), mlm_task=False, mask_bug=False)(0, 0)
    assert plain["tokens"].shape == (3 * 2, 48)
    assert made.support.batches["tokens"].shape == (3, 2, 2, 48)
    assert set(made.support.batches) == {"tokens", "mask"}
    again = data_of.corrupted_sample(several, data, shared.CORRUPTIONS["mlm"])(0, 0).query
    np.testing.assert_array_equal(plain["tokens"], again["tokens"])


def test_corpora(config, monkeypatch):
    wiki = dataclasses.replace(config, corpus="wikitext2", corpus_texts=0)
    train, held_out = data_of.texts(wiki)
    assert train == held_out
    assert [text.split()[0] for text in train] == ["One", "Two"]
    assert "= = Part = =" in train[0]
    own, kept = data_of.texts(dataclasses.replace(config, corpus_texts=0))
    assert len(own) > 3 * len(kept) > 0
    assert not set(own) & set(kept)
    monkeypatch.delenv("JMETA_DATA")
    with pytest.raises(DataUnavailable, match=r"JMETA_DATA is not set; --corpus embedded needs"):
        data_of.texts(wiki)


def test_a_corpus_of_ones_own_lies_as_on_the_hub_or_in_a_file(config, tmp_path):
    import datasets

    articles = datasets.Dataset.from_dict(
        {"id": list(range(9)), "text": [f"Article {i}." for i in range(9)]}
    )
    file, hub = tmp_path / "articles.parquet", tmp_path / "hub"
    hub.mkdir()
    for path in (file, hub / "train-00000-of-00001.parquet"):
        articles.to_parquet(path)
    for corpus in (file, hub):
        own = dataclasses.replace(config, corpus=str(corpus), corpus_texts=0, held_out_texts=2)
        assert data_of.texts(own) == (articles["text"][:7], articles["text"][7:])
        part = dataclasses.replace(own, corpus_texts=5)
        assert data_of.texts(part) == (articles["text"][:3], articles["text"][3:5])
        with pytest.raises(ValueError, match="has 2 texts, and 2 are held out: lower held_out"):
            data_of.texts(dataclasses.replace(own, corpus_texts=2))
    assert data_of.load(dataclasses.replace(part, held_out_texts=1)).corpus


def test_embedded_tasks_need_no_data(config, monkeypatch):
    monkeypatch.delenv("JMETA_DATA")
    for name in data_of.EMBEDDED:
        train, val = (data_of.read_examples(name, split) for split in ("train", "val"))
        counts = np.bincount([int(each.label) for each in train])
        assert max(counts) - min(counts) <= 1
        assert len(counts) == len(data_of.TASKS[name].classes)
        assert not {(each.a, each.b) for each in train} & {(each.a, each.b) for each in val}
    package = data_of.read_examples("Package", "train")
    assert not any(data_of._PACKAGES[int(each.label)] in each.a for each in package)
    with pytest.raises(ValueError, match="Package has no test split"):
        data_of.read_examples("Package", "test")


def test_questions_are_not_cut_and_what_is_trivial(data):
    answers = [Example("q", "p", 0, idx=(0, i // 3, i)) for i in range(9)]
    assert [len(data_of._first(answers, most)) for most in (0, 1, 3, 4, 20)] == [9, 3, 3, 6, 9]
    assert len(data_of._first([Example("a", label=0, idx=i) for i in range(5)], 2)) == 2
    assert data_of.trivial(data.tasks["ReCoRD"]) == [NAMES[i % 4] for i in range(7, 11)]
    assert data_of.trivial(data.tasks["CB"]) == [0] * 7


def test_the_chunked_auxiliary_loss_is_the_plain_one(config):
    shape = masked_lm.config(37, 8, 1, 2, 6)
    params = teacher_lm.init_teacher(shape, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, 37, (3, 3, 6)), jnp.int32)
    mask = jnp.ones((3, 6)).at[2, 4:].set(0)
    weights = mask * jnp.asarray(rng.integers(0, 2, (3, 6)), float)
    # What does not count may be [PAD].
    inputs = jnp.where(mask != 0, tokens[1], 0)
    labels = jnp.where(weights != 0, tokens[2], 0)
    batch = {"tokens": tokens[0], "inputs": inputs, "mask": mask, "labels": labels}
    batch["weights"] = weights
    lazy, plain = (
        methods_of._supervised(dataclasses.replace(config, vocab_chunk=n), shape) for n in (16, 0)
    )
    # [PAD] has a score in ``write``, and a probability in neither.
    by_hand = two_head_loss(
        lambda meta, batch, key: jax.tree.map(
            lambda s: s.at[..., 0].set(-1e30), teacher_lm.write(shape, meta, batch, key)
        )
    )

    @jax.jit
    def each(params):
        return [loss(params, batch, None) for loss in (lazy, plain, by_hand)]

    close = lambda *values: np.testing.assert_allclose(values[:2], values[2:] * 2, rtol=1e-5)  # noqa: E731
    jax.tree.map(close, *each(params))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tasks": ("RTE",)}, "RTE has no labels in its train split"),
        ({"tasks": ("WSC",)}, "super_glue"),
        ({"samples_per_task": 4}, "ReCoRD has 6, needs 8 distinct examples"),
        ({"corpus": "no/such_corpus"}, "could not be had from the Hugging Face hub"),
        ({"positions": 4, "tasks": ("CB",)}, "needs at least 5 positions"),
        ({"batch": 31}, "the corpus has 30 texts, fewer than a batch of 31"),
    ],
)
def test_bad_input_ends_with_a_sentence_before_the_first_step(config, tmp_path, fields, said):
    asked = dataclasses.replace(config, **fields, out=tmp_path, methods=("mask-only",))
    with pytest.raises(SystemExit, match=said):
        meta_lm.prepare(asked)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda q: q["labels"].fill(5000), r"mask-only: the label at .* is 5000: the vocabulary"),
        (lambda q: q["weights"].fill(0), r"mask-only: .* has no label that counts"),
        (lambda q: q.update(tokens=np.full((1, 2, 2, 49), 7)), r"texts of 49 tokens, and the mod"),
    ],
)
def test_a_bad_batch_is_named_before_the_first_step(config, data, monkeypatch, wrong, said):
    built = methods_of.build(config, data, "mask-only")
    first = built.sample(0, 0)
    wrong(first.query.query)
    monkeypatch.setattr(
        methods_of, "build", lambda *_: built._replace(sample=lambda seed, step: first)
    )
    with pytest.raises(ValueError, match=said):
        training.check(config, data, ["mask-only"])


def test_a_panel_for_each_evaluation_and_none_twice_after_an_interruption(config, data, tmp_path):
    """The teacher replaces every token by its meta-parameter: a panel tells which it was."""

    def write(meta, batch, key):
        tokens = jnp.full_like(batch["tokens"], meta["token"].astype(int))
        return {"tokens": tokens, "labels": batch["tokens"], "weights": batch["mask"]}

    method = methods_of.build(config, data, "mask-only")._replace(
        student=lambda meta, state: meta["token"], student_steps=2,
        monitor=lambda meta, batch: {"rate": meta["token"]}, write=write,
    )  # fmt: skip
    of = lambda token: {"token": jnp.float32(token)}  # noqa: E731

    def begin(method=method):
        score = lambda student, held_out: {"loss": student}  # noqa: E731
        return training.Looking(data, method, score, tmp_path, 5)

    def train(looking, first, last, meta):
        for step in range(first, last + 1):
            looking(step, types.SimpleNamespace(meta=of(meta), estimator_state=()), None)

    def rows(name):
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    interrupted = begin()
    train(interrupted, 1, 13, 40.0)
    assert [row["step"] for row in rows("panels.jsonl")] == [10, 20]
    assert rows("panels.jsonl")[0]["panel"] == interrupted.panel(of(40))
    assert len(rows("panels.jsonl")[0]["panel"].splitlines()) == 9  # three lines for each window
    resumed = begin()  # from the checkpoint of step 5
    train(resumed, 6, 15, 50.0)
    for name in ("panels.jsonl", "looks.jsonl"):
        assert [row["step"] for row in rows(name)] == [10, 20, 30]
    wrote = [row["panel"] for row in rows("panels.jsonl")]
    first, later = (resumed.panel(of(meta)) for meta in (40, 50))
    assert wrote == [first, later, later]
    assert first != later
    assert [row["loss"] for row in resumed.looks.rows] == [40, 50, 50]
    # Kept is the teacher whose student has the least loss so far.
    kept, told = parameters.load_params(tmp_path / "teacher-best.safetensors")
    assert (float(kept["token"]), told["step"]) == (40, 10)
    train(resumed, 16, 20, 30.0)
    train(resumed, 21, 25, 45.0)
    kept, told = parameters.load_params(tmp_path / "teacher-best.safetensors")
    assert (float(kept["token"]), told["step"], told["loss"]) == (30, 40, 30)
    # MLM has none.
    (tmp_path / "panels.jsonl").unlink()
    train(begin(method._replace(write=None)), 1, 5, 40.0)
    assert not (tmp_path / "panels.jsonl").exists()


def test_both_heads_of_a_teacher_are_watched_whatever_it_writes(config, data):
    read = data_of.unlabelled(data.validation, data.words)
    for name in methods_of.METHODS:
        method = methods_of.build(config, data, name)
        if name in shared.CORRUPTIONS:
            assert method.write is None
            continue
        meta = jax.eval_shape(method.start, jax.random.key(0))
        watched = jax.eval_shape(method.monitor, meta, read)
        heads = ("inputs",) if name == shared.REPLACEMENTS else ("inputs", "labels")
        of_heads = ("entropy", "confidence", "variety", "copied", "masked", "label_tokens")
        expected = {f"{head}_{what}" for head in heads for what in of_heads}
        assert watched.keys() == (
            {"mask_rate", "masked_entropy"} if name in shared.MASKS else expected
        )


def test_without_a_teacher_the_same_texts_are_corrupted_as_each_name_says(config, data):
    mlm, denoising, random, masks = (
        methods_of.build(config, data, name).sample(3, 1).query for name in shared.CORRUPTIONS
    )
    hidden = mlm["weights"] == 1
    original = np.where(hidden, mlm["labels"], mlm["tokens"])
    np.testing.assert_array_equal(denoising["tokens"], mlm["tokens"])
    np.testing.assert_array_equal(denoising["labels"], original)
    np.testing.assert_array_equal(denoising["weights"], denoising["mask"])
    np.testing.assert_array_equal(random["weights"], mlm["weights"])
    assert hidden.any()
    assert not (random["tokens"] == data.words.mask).any()
    np.testing.assert_array_equal(random["tokens"][~hidden], original[~hidden])
    np.testing.assert_array_equal(random["labels"][hidden], original[hidden])
    np.testing.assert_array_equal(masks["tokens"] == data.words.mask, hidden)
    np.testing.assert_array_equal(masks["tokens"][~hidden], original[~hidden])
    np.testing.assert_array_equal(masks["labels"][hidden], original[hidden])


@pytest.mark.slow
def test_replacements_are_the_same_with_losses_in_chunks(config, data):
    def grads(chunk):
        asked = dataclasses.replace(config, vocab_chunk=chunk)
        method = methods_of.build(asked, data, shared.REPLACEMENTS)
        episodes, key = method.sample(0, 0), jax.random.key(0)
        assert set(episodes.support) == {"tokens", "mask", "ordinary", "masked"}
        meta = method.start(key)
        estimate = lambda meta: method.mg.estimate(meta, method.mg.init(meta, key), episodes, key)  # noqa: E731
        return jax.jit(estimate)(meta)[0]

    whole, chunked = grads(0), grads(64)
    assert relative_error(chunked, whole) < 1e-4
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(whole["inputs"]))


def test_the_preset_paper_has_the_published_sizes():
    paper = meta_lm.PRESETS["paper"]
    shape = methods_of.network(paper, paper.vocab)
    assert (shape.vocab, shape.max_len) == (30_000, 128)
    for init, published in (
        (masked_lm.init, 12_548_144), (teacher_lm.init_teacher, 28_004_448)
    ):  # fmt: skip
        sizes = jax.eval_shape(lambda key, init=init: init(shape, key), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(sizes)) == published


def test_predictions_of_a_hidden_split_are_written_as_the_server_takes_them(config, tmp_path):
    asked = dataclasses.replace(config, tasks=("CB",), submit=True)
    data = data_of.load(asked)
    said = {len(range(20, 27)): [0, 1, 2, 0, 1, 2, 0], 3: [2, 0, 1]}  # by the rows of the split
    tuner = training.Tuner(
        lambda params, seed, task: params,
        lambda params, task, windows: said[1 + int(windows.example.max())],
    )
    training.fine_tune(asked, data, tuner, {}, "mlm", 0, tmp_path)

    def rows(folder):
        return [json.loads(line) for line in (tmp_path / folder / "CB.jsonl").open()]

    classes = superglue.TASKS["CB"].classes
    assert rows("submission") == [
        {"idx": idx, "label": classes[c]} for idx, c in zip((40, 41, 42), (2, 0, 1), strict=True)
    ]
    assert [row["idx"] for row in rows("predictions")] == list(range(20, 27))
    # Nobody asked: none is read, and none is written.
    plain = data_of.load(dataclasses.replace(asked, submit=False))
    assert plain.tasks["CB"].hidden is None
    training.fine_tune(asked, plain, tuner, {}, "mlm", 0, tmp_path / "plain")
    assert not (tmp_path / "plain" / "submission").exists()


def test_weights_and_support_steps_reach_the_estimator(config, data, monkeypatch):
    made = []
    for name in ("soft_teacher", "hard_teacher"):
        keep = lambda student, _, name=name, **given: made.append((name, student, given))  # noqa: E731
        monkeypatch.setattr(methods_of.methods, name, keep)
    asked = dataclasses.replace(
        config, soft_weight=3.0, input_weight=5.0, hard_weight=7.0, inner_rate=0.25,
        support_steps=4, inner_steps=2, steps=4, methods=meta_lm.METHODS,
    )  # fmt: skip
    weights = {"soft": 3.0, "input-only soft": 5.0, "mask-only": 3.0, "mask-budget": 3.0,
               "hard": 7.0, "input-only hard": 7.0}  # fmt: skip
    for name, weight in weights.items():
        methods_of.build(asked, data, name)
        estimator, student, given = made.pop()
        assert estimator == ("hard_teacher" if name.endswith("hard") else "soft_teacher")
        assert (given["meta_weight"], given["steps"]) == (weight, 2)
        assert student.support_steps == 4
        slope = jnp.asarray([0.5, -2.0])
        moves, _ = student.support_optimizer.update(slope, student.support_optimizer.init(slope))
        np.testing.assert_array_equal(moves, -0.25 * slope)
        assert ("auxiliary" in given) == (not name.startswith("mask"))


def rescored(out, name, examples):
    """The score of what is in a file of predictions."""
    lines = (out / f"{name}.jsonl").read_text().splitlines()
    rows = {row["idx"]: row["label"] for row in map(json.loads, lines)}
    said = [rows[example.idx] for example in examples]
    task = superglue.TASKS[name]
    if task.kind == "classes":
        said = [task.classes.index(label) for label in said]
    return superglue.score(name, said, examples).metrics


@pytest.mark.slow
def test_a_run_leaves_scores_that_its_predictions_have(smoke):
    scores = values(smoke, "metrics by task")
    for method in ("mlm", "no pre-training"):
        for name in ("CB", "ReCoRD"):
            examples = superglue.read(name, "val")
            found = rescored(
                smoke / f"{method.replace(' ', '-')}-0" / "predictions", name, examples
            )
            assert found == {
                measure: pytest.approx(scores[method, name, measure]) for measure in found
            }
            mean = values(smoke, "score by task")[method, name, None]
            assert mean == pytest.approx(np.mean(list(found.values())))
    totals = values(smoke, "score")
    assert set(totals) == {(name, None, None) for name in ("mlm", "no pre-training", page.TRIVIAL)}
    each = values(smoke, "score by task")
    for method, _, _ in totals:
        both = [each[method, name, None] for name in ("CB", "ReCoRD")]
        assert totals[method, None, None] == pytest.approx(np.mean(both))
    # The one mentioned most is the answer; of seven, two contradict.
    assert each[page.TRIVIAL, "ReCoRD", None] == 100.0
    results = read_results(smoke)
    headline = [row for row in results["summary"] if row["metric"] == "score"]
    assert {row["baseline"] for row in headline} == {"mlm"}
    looks = [json.loads(line) for line in (smoke / "mlm-0/pretraining/looks.jsonl").open()]
    assert [row["step"] for row in looks] == [2, 4]
    assert values(smoke, "MLM loss")["mlm", None, None] == pytest.approx(looks[-1]["loss"], 1e-5)
    for name in ("report.html", "scores.png", "mlm.svg", "config.yaml", "run.json",
                 "metrics.jsonl", "methods/mlm.json"):  # fmt: skip
        assert (smoke / name).stat().st_size > 0, name


@pytest.mark.slow
def test_a_folder_belongs_to_one_set_of_settings(smoke):
    with pytest.raises(SystemExit, match="made with other settings"):
        meta_lm.main([*ARGUMENTS, "--rate", "0.5", "--out", str(smoke), "--resume"])


@pytest.mark.slow
def test_methods_join_a_run_and_an_interrupted_one_goes_on(smoke, tmp_path):
    out = shutil.copytree(smoke, tmp_path / "run")
    before = values(out, "score")
    meta_lm.main([*ARGUMENTS, "--methods", "mask-only", "--out", str(out)])
    joined = values(out, "score")
    assert before.items() <= joined.items()
    assert ("mask-only", None, None) in joined
    assert values(out, "a student's step in steps of MLM")["mlm", None, None] == 1.0
    assert "wrote" in (out / "report.html").read_text()
    # As if it had stopped after pre-training and one task.
    (out / "methods" / "mask-only.json").unlink()
    file = out / "mask-only-0" / "scores.json"
    file.write_text(json.dumps({"CB": json.loads(file.read_text())["CB"]}))
    with pytest.raises(SystemExit, match="add --resume"):
        meta_lm.main([*ARGUMENTS, "--methods", "mask-only", "--out", str(out)])
    meta_lm.main([*ARGUMENTS, "--methods", "mask-only", "--out", str(out), "--resume"])
    assert values(out, "score") == joined


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlm", "mask-only"])
def test_pre_training_that_is_killed_goes_on_bit_for_bit(config, data, tmp_path, name):
    """Killed in the second of four evaluations, which a resumed run must make."""
    config = dataclasses.replace(config, steps=8, evaluations=4)
    shape = methods_of.network(config, data.words.size)
    method, score = methods_of.build(config, data, name), methods_of.make_held_out(shape)
    counted = []

    def pretrain(folder, judge=score, **fields):
        there = dataclasses.replace(config, out=tmp_path / folder, **fields)
        return training.pretrain(there, data, name, method, 0, judge)

    whole = pretrain("whole")

    def killed(student, held_out):
        counted.append(student)
        if len(counted) == 2:
            raise KeyboardInterrupt
        return score(student, held_out)

    with pytest.raises(KeyboardInterrupt):
        pretrain("cut", killed)
    resumed = pretrain("cut", resume=True)
    for one, other in zip(*map(jax.tree.leaves, (whole.student, resumed.student)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [row["step"] for row in whole.looks] == [2, 4, 6, 8]
    assert whole.looks == resumed.looks
    assert whole.panel == resumed.panel


@pytest.mark.slow
def test_soft_and_hard_teachers_with_the_savings_of_the_paper(tmp_path):
    asked = [*ARGUMENTS, "--methods", "soft,hard", "--out", str(tmp_path / "run")]
    savings = ["--vocab-chunk", "100", "--remat", "--micro-batches", "2"]
    meta_lm.main([*asked, *savings, "--pretrain-only"])
    assert not (tmp_path / "run" / "results.json").exists()
    meta_lm.main([*asked, *savings, "--resume"])
    scored = values(tmp_path / "run", "score")
    assert {"soft", "hard"} <= {method for method, _, _ in scored}
    monitors = [
        row for row in read_results(tmp_path / "run")["rows"]
        if row["metric"] == "monitors at the end" and row["method"] == "soft"
    ]  # fmt: skip
    found = {row["monitor"]: row["value"] for row in monitors}
    assert 0 < found["inputs_entropy"] <= np.log(320) + 1e-3
