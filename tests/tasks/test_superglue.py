import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from jmeta.data.sources import DataUnavailable
from jmeta.tasks import scores, superglue, text
from jmeta.tasks.feeding import over_windows
from jmeta.tasks.superglue import TASKS, read, starred
from jmeta.tasks.text import HIDDEN, Example, batch, encode

pytestmark = pytest.mark.usefixtures("text_cache")

ROWS = {
    "BoolQ": {"question": "is it true", "passage": "It is.", "idx": 5, "label": True},
    "CB": {"premise": "A man said so.", "hypothesis": "so", "label": "entailment", "idx": 6},
    "COPA": {
        "premise": "It fell.", "choice1": "I dropped it.", "choice2": "I kept it.",
        "question": "cause", "label": 0, "idx": 7,
    },
    "MultiRC": {
        "idx": 8, "version": 1.1,
        "passage": {"text": "Ann ran.", "questions": [
            {"question": "Who?", "idx": 3, "answers": [
                {"text": "Ann", "idx": 11, "label": 1}, {"text": "Bo", "idx": 12, "label": 0}]},
            {"question": "How?", "idx": 4, "answers": [{"text": "fast", "idx": 13, "label": 0}]},
        ]},
    },
    "ReCoRD": {
        "source": "x", "idx": 9,
        "passage": {
            "text": "Ann met Bo. Bo left.",
            "entities": [{"start": 12, "end": 13}, {"start": 0, "end": 2}, {"start": 8, "end": 9}],
        },
        "qas": [{"query": "@placeholder left Ann", "idx": 21, "answers": [
            {"start": 8, "end": 9, "text": "Bo"}, {"start": 12, "end": 13, "text": "Bo"}]}],
    },
    "RTE": {
        "premise": "It rains.", "hypothesis": "It is dry.", "label": "not_entailment", "idx": 1,
    },
    "WiC": {
        "word": "bank", "sentence1": "The bank is steep.", "sentence2": "I bank here.", "idx": 2,
        "label": False, "start1": 4, "start2": 2, "end1": 8, "end2": 6, "version": 1.1,
    },
    "WSC": {
        "text": "Mark told Pete lies. He knew.", "idx": 3, "label": True,
        "target": {"span1_index": 0, "span1_text": "Mark", "span2_index": 4, "span2_text": "He"},
    },
}  # fmt: skip

# (A, B, class name), of the format's definition.
GOLDEN = {
    "BoolQ": [("is it true", "It is.", "True")],
    "CB": [("so", "A man said so.", "entailment")],
    "COPA": [("It fell. cause", "0: I dropped it. 1: I kept it.", "0")],
    "MultiRC": [
        ("Question: Who? Answer: Ann", "Ann ran.", "1"),
        ("Question: Who? Answer: Bo", "Ann ran.", "0"),
        ("Question: How? Answer: fast", "Ann ran.", "0"),
    ],
    "ReCoRD": [("@placeholder left Ann", "*Ann* met *Bo*. *Bo* left.", None)],
    "RTE": [("It is dry.", "It rains.", "not_entailment")],
    "WiC": [("The *bank* is steep.", "I *bank* here.", "False")],
    "WSC": [("Mark = He", "*Mark* told Pete lies. *He* knew.", "True")],
}
NUMBERS = {
    "BoolQ": 2, "CB": 3, "COPA": 4, "MultiRC": 5, "ReCoRD": 6, "RTE": 7, "WiC": 8, "WSC": 9,
}  # fmt: skip
CLASS_TOKENS = {
    "BoolQ": {"False": "[SEP]", "True": "[CLS2]"},
    "CB": {"contradiction": "[SEP]", "entailment": "[CLS3]", "neutral": "[MASK]"},
    "COPA": {"0": "[SEP]", "1": "[CLS4]"},
    "MultiRC": {"0": "[SEP]", "1": "[CLS5]"},
    "ReCoRD": {},
    "RTE": {"not_entailment": "[SEP]", "entailment": "[CLS7]"},
    "WiC": {"False": "[SEP]", "True": "[CLS8]"},
    "WSC": {"False": "[SEP]", "True": "[CLS9]"},
}
# What the benchmark's server is sent for the golden rows.
OFFICIAL = {
    "BoolQ": [{"idx": 5, "label": "true"}],
    "CB": [{"idx": 6, "label": "entailment"}],
    "COPA": [{"idx": 7, "label": 0}],
    "MultiRC": [
        {
            "idx": 8,
            "passage": {
                "questions": [
                    {"idx": 3, "answers": [{"idx": 11, "label": 1}, {"idx": 12, "label": 0}]},
                    {"idx": 4, "answers": [{"idx": 13, "label": 0}]},
                ]
            },
        }
    ],
    "ReCoRD": [{"idx": 21, "label": "Bo"}],
    "RTE": [{"idx": 1, "label": "not_entailment"}],
    "WiC": [{"idx": 2, "label": "false"}],
    "WSC": [{"idx": 3, "label": "True"}],
}
# The same rows as the hub has them: flat, with integers for classes.
HUB = {
    "CB": {**ROWS["CB"], "label": 0},
    "RTE": {**ROWS["RTE"], "label": 1},
    "BoolQ": {**ROWS["BoolQ"], "label": 1},
    "WSC": {
        "text": ROWS["WSC"]["text"], "span1_index": 0, "span1_text": "Mark", "span2_index": 4,
        "span2_text": "He", "idx": 3, "label": 1,
    },
    "MultiRC": {
        "paragraph": "Ann ran.", "question": "Who?", "answer": "Ann", "label": 1,
        "idx": {"paragraph": 8, "question": 3, "answer": 11},
    },
    "ReCoRD": {
        "passage": "Ann met Bo. Bo left.", "query": "@placeholder left Ann",
        "entities": ["Ann", "Bo"], "answers": ["Bo"], "idx": {"passage": 9, "query": 21},
        "entity_spans": {"text": ["Ann", "Bo", "Bo"], "start": [0, 8, 12], "end": [3, 10, 14]},
    },
}  # fmt: skip


def written(folder, rows, name="rows.jsonl", newline="\n"):
    path = folder / name
    path.write_bytes("".join(json.dumps(row) + newline for row in rows).encode())
    return path


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize("name", TASKS)
def test_golden_cases(name, kind, tmp_path, request):
    task, words = TASKS[name], request.getfixturevalue(kind)
    examples = read(name, path=written(tmp_path, [ROWS[name]]))
    classes = [task.classes[e.label] if task.classes else None for e in examples]
    found = [(e.a, e.b, said) for e, said in zip(examples, classes, strict=True)]
    assert found == GOLDEN[name]
    assert (
        superglue.official(
            name, ["Bo"] if name == "ReCoRD" else [e.label for e in examples], examples
        )
        == OFFICIAL[name]
    )

    assert task.number == NUMBERS[name]
    ids = {"[SEP]": words.sep, "[MASK]": words.mask}
    ids |= {f"[CLS{k}]": words.cls[k] for k in range(30)}
    assert dict(zip(task.classes, text.class_tokens(task, words), strict=True)) == {
        said: ids[token] for said, token in CLASS_TOKENS[name].items()
    }
    encoded = encode(task, examples, words, positions=80)
    got = batch(encoded, np.arange(len(examples)))
    for i, (a, b, said) in enumerate(GOLDEN[name]):
        a_ids, b_ids = (
            words.tokenizer.encode(side, add_special_tokens=False).ids for side in (a, b)
        )
        row = [words.cls[NUMBERS[name]], *a_ids, words.sep, *b_ids, words.sep]
        assert got["tokens"][i, : len(row)].tolist() == row
        if name == "ReCoRD":
            labels = got["labels"][i, : len(row)]
            marked = labels != words.sep
            assert (labels[marked] == np.array(row)[marked]).all()  # its own token, or [SEP]
            said = words.tokenizer.decode(labels[marked].tolist()).replace(" ", "").casefold()
            assert said == "bobo"
            assert not marked[: len(a_ids) + 2].any()
        else:
            label = ids[CLASS_TOKENS[name][said]]
            assert got["labels"][i].tolist() == [label] * len(row) + [words.pad] * (80 - len(row))


@pytest.mark.parametrize("name", HUB)
def test_rows_of_the_hub_say_the_same(name, tmp_path):
    ours = read(name, path=written(tmp_path, [ROWS[name]]))
    theirs = read(name, path=written(tmp_path, [HUB[name]], "hub.jsonl"))
    assert theirs == ours[: len(theirs)]
    # with names of classes beside the integers, as the hub's own reader gives
    if "label" in HUB[name] and TASKS[name].classes:
        named = {**HUB[name], "label_name": TASKS[name].classes[ours[0].label], "label": 0}
        assert read(name, path=written(tmp_path, [named], "named.jsonl")) == theirs


@pytest.mark.parametrize("name", TASKS)
def test_hidden_labels(name, tmp_path):
    row = {key: value for key, value in ROWS[name].items() if key != "label"}
    if name == "MultiRC":
        row = {"idx": 8, "passage": {"text": "t", "questions": [
            {"question": "q", "idx": 0, "answers": [{"text": "a", "idx": 0}]}]}}  # fmt: skip
    if name == "ReCoRD":
        row = {**row, "qas": [{"query": "q", "idx": 0}]}
    (example,) = read(name, "test", path=written(tmp_path, [row]))
    assert example.label == HIDDEN
    if name not in ("MultiRC", "ReCoRD"):
        (same,) = read(name, path=written(tmp_path, [{**row, "label": -1}]))
        assert same == example
    with pytest.raises(ValueError, match=f"the label of row 0 of {name} is hidden"):
        superglue.score(name, [0], [example])
    assert superglue.official(name, ["x" if name == "ReCoRD" else 0], [example])


@given(st.data())
def test_stars_and_where_spans_are_then(data):
    passage = data.draw(st.text("ab c", min_size=1, max_size=20))
    ends = st.integers(0, len(passage))
    pairs = st.tuples(ends, ends).filter(lambda p: p[0] < p[1])
    mentions = data.draw(st.lists(pairs, max_size=4))
    starry, moved = starred(passage, mentions, mentions)
    assert starry.replace("*", "") == passage
    assert starry.count("*") == 2 * len(set(mentions))
    for (a, b), (start, stop) in zip(mentions, moved, strict=True):
        assert starry[start:stop].replace("*", "") == passage[a:b]
        # the tightest place: from its first character to its last, stars only around
        assert (starry[start], starry[stop - 1]) == (passage[a], passage[b - 1])
        assert starry[start - 1] == "*" == starry[stop]


@given(st.data())
def test_stars_move_a_mention_by_the_rank_of_its_ends(data):
    """[s + i + 1, e + j + 1): i and j are the ranks of s and of e + 1 among all the ends."""
    ends = sorted(data.draw(st.sets(st.integers(0, 20), max_size=8)))
    order = data.draw(st.permutations(ends[: len(ends) // 2 * 2]))
    mentions = [tuple(sorted(order[i : i + 2])) for i in range(0, len(order), 2)]
    marks = sorted(order)
    _, moved = starred("abcdefghijklmnopqrstuvwxyz"[:20], mentions, mentions)
    for (s, stop), found in zip(mentions, moved, strict=True):
        e = stop - 1
        assert found == (s + marks.index(s) + 1, e + marks.index(e + 1) + 1)


def test_golden_stars():
    # one-character, touching and nested mentions
    assert starred("ABC", [(0, 1), (1, 2)], [(0, 1), (1, 2)]) == ("*A**B*C", [(1, 2), (4, 5)])
    assert starred("New York", [(0, 8), (4, 8), (4, 8)], [(4, 8)]) == ("*New *York**", [(6, 10)])
    assert starred("none", []) == ("none", [])


@pytest.mark.parametrize(
    ("body", "index", "said", "expected"),
    [
        ("Mark told Pete", 2, "pete", "Mark told *Pete*"),  # case does not matter
        ("a  b\nc him", 3, "him", "a  b\nc *him*"),  # words, whatever the blanks between
        ("the big Cat's hat", 0, "the big cats", "*the big Cat's* hat"),  # first to last word
        ("the big, um, cat, the dog", 0, "big the cat", "*the big, um, cat,* the dog"),  # once
        ("Straße ist lang", 0, "STRASSE", "*Straße* ist lang"),  # as long as it stands there
        ("to use it , now", 1, "it", "to use *it* , now"),  # a little too early
        ("to use it", 1, "zebra", "to *use* it"),  # not there at all: the word that is named
        ("new  pass word", 1, "pass word", "new  *pass word*"),
    ],
)
def test_where_a_span_of_wsc_is(body, index, said, expected, tmp_path):
    target = {
        "span1_index": index + 1, "span1_text": said, "span2_index": 0, "span2_text": "Q",
    }  # fmt: skip
    row = {"text": f"Q. {body}", "target": target, "label": False, "idx": 0}
    (example,) = read("WSC", path=written(tmp_path, [row]))
    assert (example.a, example.b) == (f"{said} = Q", f"*Q*. {expected}")


def test_carriage_returns_are_line_ends_between_rows_and_text_within(tmp_path):
    row = {**ROWS["BoolQ"], "passage": "one\r\ntwo\u2028three"}
    examples = read("BoolQ", path=written(tmp_path, [row, row], newline="\r\n"))
    assert [e.b for e in examples] == ["one\r\ntwo\u2028three"] * 2


BAD = [
    ("BoolQ", {"passage": None}, r"row 1 of BoolQ has no field 'passage'; its fields are \['idx'"),
    ("BoolQ", {"passage": 3}, "row 1 of BoolQ, field 'passage': 3 is no text"),
    ("BoolQ", {"label": 2}, r"row 1 of BoolQ, field 'label': 2 is none of \('False', 'True'\)"),
    ("BoolQ", {"label": [0, 1]}, "row 1 of BoolQ, field 'label'"),
    ("CB", {"label": "maybe"}, "row 1 of CB, field 'label': 'maybe' is none of"),
    ("COPA", {"question": "why"}, "'why' is not 'cause' or 'effect'"),
    ("WiC", {"end1": 99}, "'start1' and 'end1': characters 4 to 99 are outside"),
    ("WiC", {"end1": "8"}, "row 1 of WiC, field 'end1': '8' is no whole number"),
    ("WSC", {"target": None}, "row 1 of WSC has no field 'target'"),
    ("WSC", {"target": {**ROWS["WSC"]["target"], "span2_index": 0.5}},
     "row 1 of WSC, target, field 'span2_index': 0.5 is no whole number"),
    ("WSC", {"target": {**ROWS["WSC"]["target"], "span1_index": 40}},
     "row 1 of WSC, target: 'Mark' is said to begin at word 40 of a text of 6"),
    ("MultiRC", {"passage": {"text": "t"}}, "row 1 of MultiRC, passage has no field 'questions'"),
    ("MultiRC", {"passage": {"text": "t", "questions": 3}},
     "row 1 of MultiRC, passage, field 'questions': 3 is no list"),
    ("ReCoRD", {"qas": "q"}, "row 1 of ReCoRD, field 'qas': 'q' is no list"),
    ("MultiRC", {"passage": "t"}, "field 'passage': 't' is no object"),
    ("ReCoRD", {"passage": {"text": "Ann", "entities": [{"start": 1, "end": 3}]}},
     "row 1 of ReCoRD, field 'entities': characters 1 to 4 are outside"),
    ("ReCoRD", {"qas": [{"query": "q", "answers": [{"start": 0, "end": 1, "text": "Bo"}]}]},
     r"row 1 of ReCoRD, query 0, answer 0: .* 'An', not its text 'Bo'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_mistakes_name_the_row_and_the_field(name, change, message, monkeypatch):
    # As columns: a JSON file that mixes types in one field cannot be read at all.
    rows = [ROWS[name], {**ROWS[name], **change}]
    columns = {key: [row[key] for row in rows] for key in ROWS[name]}
    monkeypatch.setattr(superglue, "read_columns", lambda *_: columns)
    with pytest.raises(ValueError, match=message):
        read(name)


def test_names_and_lengths_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"no task 'ANLI'; its tasks are \['BoolQ'"):
        read("ANLI")
    for check in (superglue.score, superglue.official):
        with pytest.raises(ValueError, match="RTE: 2 predictions for 1 examples"):
            check("RTE", [0, 1], [Example("a", "b", 1)])
        for wrong in ("entailment", -1, 2, 0.5, None):
            with pytest.raises(ValueError, match=f"RTE: prediction 0 is {wrong!r}, not the index"):
                check("RTE", [wrong], [Example("a", "b", 1)])
        with pytest.raises(ValueError, match="ReCoRD: prediction 1 is None, no text"):
            check("ReCoRD", ["Bo", None], [Example("a", "b", 0, answers=("Bo",))] * 2)


def test_without_data_or_network_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    with pytest.raises(DataUnavailable, match=r"'aps/super_glue' .* local copy .* JMETA_DATA"):
        read("RTE")


def test_scores_are_the_official_ones():
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(3, size=(2, 40))
    found = superglue.score("CB", predicted, [Example("a", "b", int(g)) for g in gold])
    assert found.n == 40
    assert found.metrics["F1"] == pytest.approx(
        100 * metrics.f1_score(gold, predicted, average="macro")
    )
    assert found.metrics["accuracy"] == pytest.approx(100 * (gold == predicted).mean())
    answers = [
        Example("q", "p", label, idx=(0, question, i))
        for i, (question, label) in enumerate([(0, 1), (0, 0), (1, 1), (2, 0)])
    ]
    # question 0 has one wrong answer of two; one true positive, one false positive, one missed
    assert superglue.score("MultiRC", [1, 1, 0, 0], answers).metrics == pytest.approx(
        {"F1a": 50.0, "EM": 100 / 3}
    )
    spans = [Example("q", "p", 0, answers=("Bo Li", "the Bo"))]
    assert superglue.score("ReCoRD", ["bo"], spans).metrics == {"F1": 100.0, "EM": 100.0}
    assert superglue.score("ReCoRD", ["Bo Lu"], spans).metrics == pytest.approx(
        {"F1": 200 / 3, "EM": 0.0}
    )


def test_predictions_are_written_line_by_line(tmp_path):
    path = superglue.write_official(tmp_path, "CB", [2, 0], [Example("é", idx=i) for i in (4, 5)])
    assert path.name == "CB.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"idx": 4, "label": "neutral"}, {"idx": 5, "label": "contradiction"},
    ]  # fmt: skip


COUNTS = {  # examples of train and val, as the files here hold them
    "BoolQ": (2000, 500), "CB": (250, 56), "COPA": (400, 100), "MultiRC": (27243, 4848),
    "ReCoRD": (32, 32), "RTE": (2490, 277), "WiC": (5428, 638), "WSC": (554, 104),
}  # fmt: skip


def test_a_model_that_says_the_labels_is_perfect_on_real_data(jmeta_data, bpe):
    """Encode, label, decode and score the validation sets: everything must come back."""
    found = {}
    for name, task in TASKS.items():
        examples = read(name, "val")
        assert len(examples) == COUNTS[name][1]
        examples = examples[:60]
        # A mention that a window cuts in two is found by its half: ReCoRD in one window each.
        positions = 4096 if name == "ReCoRD" else 256
        encoded = encode(task, examples, bpe, positions=positions, stride=128)
        if name == "ReCoRD":
            assert len(encoded.tokens) == len(examples)
            chosen = np.where(encoded.gold, encoded.tokens, encoded.sep)
            sure = np.where(encoded.gold, -0.1, -1.0)
            predicted = text.decode_spans(chosen, sure, encoded, bpe)
            # decoded tokens of a mention may carry the stars that a token shares with it
            predicted = [said.strip("*") for said in predicted]
        else:

            def say(window, task=encoded.class_tokens):
                logits = (window["labels"][..., None] == np.arange(bpe.size)).astype(np.float32)
                return text.class_scores(jnp.asarray(logits), jnp.asarray(window["mask"]), task)

            predicted = text.decode_classes(over_windows(encoded, say, 64), encoded)
        found[name] = superglue.score(name, predicted, examples)
    assert {name: s.n for name, s in found.items()} == {
        name: min(60, counts[1]) for name, counts in COUNTS.items()
    }
    for name, (values, _, _) in found.items():
        assert set(values.values()) == {100.0}, name
    assert "| ReCoRD | 32 |" in scores.table(found)


def test_stars_of_the_real_passages_enclose_the_entities(jmeta_data):
    for split in ("train", "val"):
        path = jmeta_data / "superglue" / "ReCoRD" / f"{split}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            raw = [json.loads(line) for line in file]
        for row, example in zip(raw, read("ReCoRD", split), strict=True):
            assert example.b.replace("*", "") == row["passage"]["text"].replace("*", "")
            assert {example.b[a:b] for a, b in example.spans} == set(example.answers)
            assert {example.b[a - 1] + example.b[b] for a, b in example.spans} == {"**"}
    assert all(e.b.count("*") >= 4 for e in read("WSC", "val"))
