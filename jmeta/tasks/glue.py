"""GLUE in the unified format: SST-2, CoLA and the pairs, each with its official metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jmeta.tasks.rows import Row, label, read_columns, rows_of, text
from jmeta.tasks.scores import (
    Score,
    accuracy,
    binary_f1,
    check_classes,
    matthews,
    pearson,
    spearman,
)
from jmeta.tasks.text import HIDDEN, Example, LabelToken, TextTask

HUB = "nyu-mll/glue"
_BINARY: tuple[LabelToken, ...] = ("sep", "cls")
_THREE: tuple[LabelToken, ...] = ("cls", "mask", "sep")
_ENTAILED = ("not_entailment", "entailment")


class Known(NamedTuple):
    """How a task is stored.

    Attributes:
        task: the task in the unified format; its number follows SuperGLUE's.
        first: the column of the first text.
        second: the column of the second text, or None.
        local: split -> file under ``$JMETA_DATA``.
        config: the configuration on the hub.
        order: the classes by the integers that stand for them, if another order than the task's.
    """

    task: TextTask
    first: str
    second: str | None
    local: Mapping[str, str]
    config: str
    order: tuple[str, ...] = ()


def _both(file: str) -> dict[str, str]:
    """A file that holds the train and the dev split, and tells them apart by a column."""
    return {"train": file, "dev": file}


KNOWN = {
    known.task.name: known
    for known in (
        Known(
            TextTask("SST-2", 10, ("negative", "positive"), _BINARY),
            "sentence", None, {"train": "glue/sst2_train.parquet"}, "sst2",
        ),
        Known(
            TextTask("CoLA", 11, ("unacceptable", "acceptable"), _BINARY),
            "sentence", None, _both("glue/cola.parquet"), "cola",
        ),
        Known(
            TextTask("MRPC", 12, ("not_equivalent", "equivalent"), _BINARY),
            "sentence1", "sentence2", _both("glue/mrpc.parquet"), "mrpc",
        ),
        Known(
            TextTask("QQP", 13, ("not_duplicate", "duplicate"), _BINARY),
            "question1", "question2", {}, "qqp",
        ),
        Known(
            TextTask("MNLI", 14, ("entailment", "neutral", "contradiction"), _THREE),
            "premise", "hypothesis", {}, "mnli",
        ),
        Known(
            TextTask("QNLI", 15, _ENTAILED, _BINARY),
            "question", "sentence", {"dev": "glue/qnli_dev.parquet"}, "qnli", _ENTAILED[::-1],
        ),
        Known(
            TextTask("RTE", 16, _ENTAILED, _BINARY),
            "sentence1", "sentence2", _both("glue/rte.parquet"), "rte", _ENTAILED[::-1],
        ),
        Known(
            TextTask("WNLI", 17, _ENTAILED, _BINARY),
            "sentence1", "sentence2", _both("glue/wnli.parquet"), "wnli",
        ),
        Known(
            TextTask("STS-B", 18, kind="score"),
            "sentence1", "sentence2", _both("glue/stsb.parquet"), "stsb",
        ),
    )
}  # fmt: skip
TASKS = {name: known.task for name, known in KNOWN.items()}


def read(
    name: str, split: str = "train", path: str | os.PathLike[str] | None = None
) -> list[Example]:
    """Read a task of GLUE.

    Args:
        name: ``"SST-2"``, ``"CoLA"``, ``"MRPC"``, ``"QQP"``, ``"MNLI"``, ``"QNLI"``, ``"RTE"``,
            ``"WNLI"`` or ``"STS-B"``.
        split: ``"train"``, ``"dev"`` or ``"test"``; of MNLI on the hub ``"validation_matched"``
            and so on.
        path: a file or folder, or a name on the hub; by default the copy under
            ``$JMETA_DATA/glue``, and the hub where that is not.

    Returns:
        The examples; hidden labels are ``text.HIDDEN``.

    Raises:
        DataUnavailable: the data are not to be had here; the message says what to do.
        ValueError: there is no such task or split, or a row is not as it should be; the row and
            the field are named.
    """
    task, first, second, local, config, order = _known(name)
    split = "dev" if split in ("val", "validation") else split
    columns = read_columns(path, split, local.get(split), (HUB, config))
    examples = []
    for i, row in enumerate(rows_of(columns, name)):
        if task.kind == "score":
            found = _score(row)
        else:
            found = label(row, task.classes, order or task.classes)
        b = text(row, second) if second else None
        examples.append(Example(text(row, first), b, found, idx=row.values.get("idx", i)))
    return examples


def _known(name: str) -> Known:
    if name not in KNOWN:
        raise ValueError(f"GLUE has no task {name!r}; its tasks are {sorted(KNOWN)}")
    return KNOWN[name]


def _score(row: Row) -> float:
    """STS-B's degree of likeness, 0 to 5."""
    name = "score" if "score" in row.values else "label"
    value = row.values.get(name)
    if value is None:
        return HIDDEN
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == HIDDEN or 0 <= value <= 5):
        raise ValueError(f"{row.where}, field {name!r}: {value!r} is no number from 0 to 5")
    return float(value)


def score(name: str, predicted: Sequence[Any], examples: Sequence[Example]) -> Score:
    """The official metrics of a task.

    Args:
        name: the task.
        predicted: a class index for each example, for STS-B a number.
        examples: the examples, with their labels.

    Returns:
        CoLA: Matthews' correlation; MRPC and QQP: F1 and accuracy; STS-B: Pearson's and Spearman's
        correlations; others: accuracy.

    Raises:
        ValueError: there is no such task, a label is hidden, a prediction is no class of the task,
            or there are not as many predictions as examples.
    """
    task = _known(name).task
    if len(predicted) != len(examples):
        raise ValueError(f"{name}: {len(predicted)} predictions for {len(examples)} examples")
    if task.classes:
        check_classes(predicted, len(task.classes), name)
    for i, example in enumerate(examples):
        if example.label == HIDDEN:
            raise ValueError(f"the label of row {i} of {name} is hidden: there is no score")
    gold = [example.label for example in examples]
    if name == "CoLA":
        metrics = {"Matthews": matthews(predicted, gold)}
    elif name in ("MRPC", "QQP"):
        metrics = {"F1": binary_f1(predicted, gold), "accuracy": accuracy(predicted, gold)}
    elif name == "STS-B":
        metrics = {"Pearson": pearson(predicted, gold), "Spearman": spearman(predicted, gold)}
    else:
        metrics = {"accuracy": accuracy(predicted, gold)}
    return Score(metrics, len(examples))
