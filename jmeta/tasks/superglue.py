"""The eight tasks of SuperGLUE in the unified format: read, write as text, decode, score, submit.

Reads the benchmark's own JSON lines and the columns of its copy on the hub alike.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jmeta.files import write_atomically
from jmeta.tasks.rows import Row, field, inner, label, read_columns, rows_of, several, text, whole
from jmeta.tasks.scores import (
    Score,
    accuracy,
    check_answers,
    check_classes,
    macro_f1,
    multirc,
    squad,
)
from jmeta.tasks.text import HIDDEN, Example, LabelToken, TextTask

HUB = "aps/super_glue"
_YES_NO = ("False", "True")
_BINARY: tuple[LabelToken, ...] = ("sep", "cls")

TASKS = {
    task.name: task
    for task in (
        TextTask("BoolQ", 2, _YES_NO, _BINARY),
        TextTask("CB", 3, ("contradiction", "entailment", "neutral"), ("sep", "cls", "mask")),
        TextTask("COPA", 4, ("0", "1"), _BINARY),
        TextTask("MultiRC", 5, ("0", "1"), _BINARY),
        TextTask("ReCoRD", 6, kind="spans"),
        TextTask("RTE", 7, ("not_entailment", "entailment"), _BINARY),
        TextTask("WiC", 8, _YES_NO, _BINARY),
        TextTask("WSC", 9, _YES_NO, _BINARY),
    )
}
# The integers that stand for classes on the hub, where they differ from the order above.
_ORDER = {
    "CB": ("entailment", "contradiction", "neutral"),
    "RTE": ("entailment", "not_entailment"),
}


def read(
    name: str, split: str = "train", path: str | os.PathLike[str] | None = None
) -> list[Example]:
    """Read a task of SuperGLUE as pairs of texts.

    Args:
        name: ``"BoolQ"``, ``"CB"``, ``"COPA"``, ``"MultiRC"``, ``"ReCoRD"``, ``"RTE"``, ``"WiC"``
            or ``"WSC"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        path: a file or folder, or a name on the hub; by default
            ``$JMETA_DATA/superglue/NAME/SPLIT.jsonl.gz``, and the hub where that is not.

    Returns:
        The examples; a MultiRC passage gives one for every answer, a ReCoRD passage one for every
        query. Hidden labels are ``text.HIDDEN``.

    Raises:
        DataUnavailable: the data are not to be had here; the message says what to do.
        ValueError: there is no such task, or a row is not as it should be; the row and the field
            are named.
    """
    task = _task(name)
    stem = "val" if split in ("validation", "dev") else split
    columns = read_columns(
        path, split, f"superglue/{task.name}/{stem}.jsonl.gz", (HUB, task.name.lower())
    )
    make = _READERS[task.name]
    return [example for row in rows_of(columns, task.name) for example in make(task, row)]


def _task(name: str) -> TextTask:
    if name not in TASKS:
        raise ValueError(f"SuperGLUE has no task {name!r}; its tasks are {sorted(TASKS)}")
    return TASKS[name]


def starred(
    passage: str, mentions: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """Put a ``*`` before and after every mention, and say where other spans are then.

    Args:
        passage: the text.
        mentions: ``(first character, character after the last)`` of each; the same one twice is
            starred once.
        spans: places in the text whose new places are asked for.

    Returns:
        The starred text, and the place of each span in it, without the stars around it.

    Example:
        >>> starred("Ann saw Bo", [(0, 3), (8, 10)], spans=[(8, 10)])
        ('*Ann* saw *Bo*', [(11, 13)])
    """
    marks = sorted(mark for mention in dict.fromkeys(mentions) for mark in mention)
    cuts = [0, *marks, len(passage)]
    text = "*".join(passage[a:b] for a, b in itertools.pairwise(cuts))
    # Before a character stand the marks at its own place, before an end those inside alone.
    return text, [(a + bisect_right(marks, a), b + bisect_left(marks, b)) for a, b in spans]


def _labelled(task: TextTask, row: Row) -> int:
    return label(row, task.classes, _ORDER.get(task.name, task.classes))


def _pair(a: str, b: str) -> Callable[[TextTask, Row], list[Example]]:
    def make(task: TextTask, row: Row) -> list[Example]:
        return [
            Example(text(row, a), text(row, b), _labelled(task, row), idx=row.values.get("idx"))
        ]

    return make


def _copa(task: TextTask, row: Row) -> list[Example]:
    question = text(row, "question")
    if question not in ("cause", "effect"):
        raise ValueError(f"{row.where}, field 'question': {question!r} is not 'cause' or 'effect'")
    first = f"{text(row, 'premise')} {question}"
    second = f"0: {text(row, 'choice1')} 1: {text(row, 'choice2')}"
    return [Example(first, second, _labelled(task, row), idx=row.values.get("idx"))]


def _multirc(task: TextTask, row: Row) -> list[Example]:
    if "paragraph" in row.values:  # the hub: a row for every answer
        idx = inner(row, field(row, "idx"), "idx")
        triple = tuple(field(idx, name) for name in ("paragraph", "question", "answer"))
        question, answer = text(row, "question"), text(row, "answer")
        return [_answer(task, row, question, answer, text(row, "paragraph"), triple)]
    passage = inner(row, field(row, "passage"), "passage")
    body, examples = text(passage, "text"), []
    for q, each in enumerate(several(passage, "questions")):
        question = inner(row, each, f"question {q}")
        for a, one in enumerate(several(question, "answers")):
            answer = inner(question, one, f"answer {a}")
            triple = (field(row, "idx"), field(question, "idx"), field(answer, "idx"))
            asked, said = text(question, "question"), text(answer, "text")
            examples.append(_answer(task, answer, asked, said, body, triple))
    return examples


def _answer(
    task: TextTask, row: Row, question: str, answer: str, passage: str, idx: tuple[Any, ...]
) -> Example:
    return Example(f"Question: {question} Answer: {answer}", passage, _labelled(task, row), idx=idx)


def _record(task: TextTask, row: Row) -> list[Example]:
    if isinstance(row.values.get("passage"), str):  # the hub: a row for every query
        passage, queries = text(row, "passage"), [row]
        columns = inner(row, field(row, "entity_spans"), "entity_spans")
        ends = [several(columns, name) for name in ("start", "end")]
        mentions = list(zip(*ends, strict=True))
    else:
        inside = inner(row, field(row, "passage"), "passage")
        passage = text(inside, "text")
        entities = [
            inner(row, each, f"entity {e}") for e, each in enumerate(several(inside, "entities"))
        ]
        mentions = [_place(each) for each in entities]
        queries = [inner(row, each, f"query {q}") for q, each in enumerate(several(row, "qas"))]
    for start, stop in mentions:
        if not 0 <= start < stop <= len(passage):
            raise ValueError(
                f"{row.where}, field 'entities': characters {start} to {stop} are outside of a "
                f"passage of {len(passage)}"
            )
    examples = []
    for query in queries:
        answers, spans = _gold(query, passage, mentions)
        body, moved = starred(passage, mentions, spans)
        idx = query.values.get("idx")
        idx = idx.get("query") if isinstance(idx, Mapping) else idx
        known = 0 if answers else HIDDEN
        asked = text(query, "query")
        examples.append(Example(asked, body, known, tuple(moved), answers, idx))
    return examples


def _place(row: Row) -> tuple[int, int]:
    return whole(row, "start"), whole(row, "end") + 1  # the data give the last character


def _gold(
    query: Row, passage: str, mentions: Sequence[tuple[int, int]]
) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
    """The gold answers of a query, and where they are: none of either in a test set."""
    given = query.values.get("answers") or []
    if all(isinstance(each, str) for each in given):  # the hub: texts alone
        spans = [(a, b) for a, b in mentions if passage[a:b] in given]
        return tuple(dict.fromkeys(given)), sorted(set(spans))
    answers = [inner(query, each, f"answer {a}") for a, each in enumerate(given)]
    spans = [_place(answer) for answer in answers]
    for answer, (start, stop) in zip(answers, spans, strict=True):
        if passage[start:stop] != text(answer, "text"):
            raise ValueError(
                f"{answer.where}: characters {start} to {stop} of the passage are "
                f"{passage[start:stop]!r}, not its text {text(answer, 'text')!r}"
            )
    return tuple(dict.fromkeys(text(answer, "text") for answer in answers)), sorted(set(spans))


def _wic(task: TextTask, row: Row) -> list[Example]:
    sides = []
    for side in "12":
        sentence = text(row, f"sentence{side}")
        span = (whole(row, f"start{side}"), whole(row, f"end{side}"))
        if not 0 <= span[0] < span[1] <= len(sentence):
            raise ValueError(
                f"{row.where}, fields 'start{side}' and 'end{side}': characters {span[0]} to "
                f"{span[1]} are outside of a sentence of {len(sentence)}"
            )
        sides.append(starred(sentence, [span])[0])
    return [Example(sides[0], sides[1], _labelled(task, row), idx=row.values.get("idx"))]


def _wsc(task: TextTask, row: Row) -> list[Example]:
    target = inner(row, field(row, "target"), "target") if "target" in row.values else row
    body = text(row, "text")
    texts = [text(target, f"span{side}_text") for side in "12"]
    spans = [
        _word_span(target, body, whole(target, f"span{side}_index"), said)
        for side, said in zip("12", texts, strict=True)
    ]
    both = starred(body, spans)[0]
    return [
        Example(f"{texts[0]} = {texts[1]}", both, _labelled(task, row), idx=row.values.get("idx"))
    ]


def _word_span(row: Row, body: str, index: int, said: str) -> tuple[int, int]:
    """Where the span that begins at a word is; its text may be spelled a little differently."""
    words = [(word.start(), word.end()) for word in re.finditer(r"\S+", body)]
    if not 0 <= index < len(words):
        raise ValueError(
            f"{row.where}: {said!r} is said to begin at word {index} of a text of {len(words)}"
        )
    start = words[index][0]
    stop = start + len(said)
    if body[start:stop].casefold() == said.casefold() and said:
        return start, stop
    wanted, found = {_bare(word) for word in said.split()}, []
    for place in words[index:]:
        word = _bare(body[slice(*place)])
        if word in wanted:
            wanted.remove(word)  # each once: the same word may come again, far behind
            found.append(place)
    return (found[0][0], found[-1][1]) if found else words[index]


def _bare(word: str) -> str:
    return re.sub(r"\W+", "", word).casefold()


_READERS: dict[str, Callable[[TextTask, Row], list[Example]]] = {
    "BoolQ": _pair("question", "passage"),
    "CB": _pair("hypothesis", "premise"),
    "COPA": _copa,
    "MultiRC": _multirc,
    "ReCoRD": _record,
    "RTE": _pair("hypothesis", "premise"),
    "WiC": _wic,
    "WSC": _wsc,
}


def score(name: str, predicted: Sequence[Any], examples: Sequence[Example]) -> Score:
    """The official metrics of a task.

    Args:
        name: the task.
        predicted: a class index for each example (``text.decode_classes``), for ReCoRD a text
            (``text.decode_spans``).
        examples: the examples, with their labels.

    Returns:
        CB: macro-F1 and accuracy; MultiRC: F1a and EM; ReCoRD: F1 and EM; others: accuracy.

    Raises:
        ValueError: a label is hidden, a prediction is no class of the task (for ReCoRD no text),
            or there are not as many predictions as examples.
    """
    task = _task(name)
    for i, example in enumerate(examples):
        if example.label == HIDDEN:
            raise ValueError(f"the label of row {i} of {name} is hidden: there is no score")
    _check_predicted(task, predicted, examples)
    if task.kind == "spans":
        found = squad(predicted, [example.answers for example in examples])
        return Score({"F1": found["F1"], "EM": found["EM"]}, len(examples))
    gold = [example.label for example in examples]
    if name == "MultiRC":
        metrics = multirc(predicted, gold, [tuple(example.idx[:2]) for example in examples])
    elif name == "CB":
        metrics = {"F1": macro_f1(predicted, gold), "accuracy": accuracy(predicted, gold)}
    else:
        metrics = {"accuracy": accuracy(predicted, gold)}
    return Score(metrics, len(examples))


def _check_predicted(task: TextTask, predicted: Sequence[Any], examples: Sequence[Example]) -> None:
    if len(predicted) != len(examples):
        raise ValueError(f"{task.name}: {len(predicted)} predictions for {len(examples)} examples")
    if task.kind == "spans":
        check_answers(predicted, task.name)
    else:
        check_classes(predicted, len(task.classes), task.name)


def official(
    name: str, predicted: Sequence[Any], examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Predictions as the rows that the benchmark's server takes.

    Args:
        name: the task.
        predicted: as for ``score``.
        examples: the examples, whose ``idx`` names the rows.

    Returns:
        One object per line of the file.

    Raises:
        ValueError: as for ``score``, except that labels may be hidden.

    Example:
        >>> official("RTE", [1], [Example("h", "p", idx=7)])
        [{'idx': 7, 'label': 'entailment'}]
    """
    task = _task(name)
    _check_predicted(task, predicted, examples)
    pairs = list(zip(predicted, examples, strict=True))
    if name == "MultiRC":
        return _official_multirc(pairs)
    if task.kind == "spans":
        return [{"idx": example.idx, "label": answer} for answer, example in pairs]
    rows = []
    for index, example in pairs:
        said: Any = task.classes[int(index)]
        if name == "COPA":
            said = int(said)
        elif name in ("BoolQ", "WiC"):
            said = said.lower()
        rows.append({"idx": example.idx, "label": said})
    return rows


def _official_multirc(pairs: Sequence[tuple[Any, Example]]) -> list[dict[str, Any]]:
    passages: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
    for index, example in pairs:
        passage, question, answer = example.idx
        answers = passages.setdefault(passage, {}).setdefault(question, [])
        answers.append({"idx": answer, "label": int(index)})
    return [
        {
            "idx": passage,
            "passage": {
                "questions": [
                    {"idx": question, "answers": answers} for question, answers in asked.items()
                ]
            },
        }
        for passage, asked in passages.items()
    ]


def write_official(
    folder: str | os.PathLike[str], name: str, predicted: Sequence[Any], examples: Sequence[Example]
) -> Path:
    """Write predictions as ``NAME.jsonl``, the file that the benchmark's server takes.

    Args:
        folder: where to write.
        name: the task.
        predicted: as for ``score``.
        examples: the examples.

    Returns:
        The file written.
    """
    rows = official(name, predicted, examples)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return write_atomically(Path(folder) / f"{name}.jsonl", lines)
