"""Tasks of the task diversity experiment: 27 from $JMETA_DATA, or 20 of the standard library."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jmeta.data.sources import from_datasets
from jmeta.tasks import glue, inputs, superglue
from jmeta.tasks.corpora import masked_text, stdlib_modules
from jmeta.tasks.tokenizer import Vocabulary

PIECE, EACH = 48, 5  # words of a passage of a module, modules of a task


class Task(NamedTuple):
    """A classification task as text.

    Attributes:
        name: of the task.
        family: where it comes from.
        texts: texts, or pairs of them.
        labels: class indices.
    """

    name: str
    family: str
    texts: list[Any]
    labels: np.ndarray


class Encoded(NamedTuple):
    """A task as tokens.

    Attributes:
        name: of the task.
        family: where it comes from.
        x: ``{"tokens", "mask"}``, ``[examples, positions]``.
        y: int32 ``[examples]``, from 0.
    """

    name: str
    family: str
    x: dict[str, np.ndarray]
    y: np.ndarray


# name, family, file, columns of text, column of the label, and what a column must be
FILES: tuple[tuple[str, str, str, tuple[str, ...], str, tuple[str, str] | None], ...] = (
    ("MR", "reviews", "amazon/fdu_mtl.parquet", ("text",), "label", ("domain", "MR")),
    ("imdb", "reviews", "amazon/fdu_mtl.parquet", ("text",), "label", ("domain", "imdb")),
    ("electronics", "reviews", "amazon/fdu_mtl.parquet", ("text",), "label",
     ("domain", "electronics")),
    ("magazines", "reviews", "amazon/fdu_mtl.parquet", ("text",), "label",
     ("domain", "magazines")),
    ("clinc150", "intent", "intent/clinc150.parquet", ("text",), "intent", ("split", "train")),
    ("banking77", "intent", "intent/banking77.parquet", ("text",), "intent", None),
    ("hwu64", "intent", "intent/hwu64.parquet", ("text",), "intent", None),
    ("huffpost", "news", "fewshot/huffpost41.parquet", ("text",), "class_name", None),
    ("news20", "news", "fewshot/news20_bydate.parquet", ("subject", "body"), "group", None),
    ("fewrel", "relations", "fewshot/fewrel80_sentences.parquet", ("text",), "relation", None),
    *(
        (name, "leopard", "fewshot/leopard.parquet", ("sentence1",), "label", ("task", name))
        for name in ("airline", "disaster", "emotion", "political_audience", "political_bias",
                     "political_message", "rating_books", "restaurant")
    ),
    ("scitail", "leopard", "fewshot/leopard.parquet", ("sentence1", "sentence2"), "label",
     ("task", "scitail")),
)  # fmt: skip
GLUE = {"SST-2": "train", "CoLA": "train", "MRPC": "train", "RTE": "train", "QNLI": "dev"}
SUPERGLUE = ("BoolQ", "WiC", "MultiRC")


def read_tasks(classes: int, most: int) -> list[Task]:
    """The tasks: those of ``$JMETA_DATA``, or of the standard library where that is not set.

    Args:
        classes: classes of a task at most: its most frequent ones.
        most: examples of a task at most, drawn once and for all.

    Returns:
        At least twenty tasks, without repeated texts.

    Raises:
        DataUnavailable: a file is missing.
    """
    if not os.environ.get("JMETA_DATA"):
        return [_cut(task, classes, most) for task in library_tasks()]
    found = [_of_file(*row) for row in FILES]
    for family, names, read in (
        ("GLUE", GLUE, glue.read),
        ("SuperGLUE", dict.fromkeys(SUPERGLUE, "train"), superglue.read),
    ):
        for name, split in names.items():
            rows = read(name, split)
            texts = [each.a if each.b is None else (each.a, each.b) for each in rows]
            found.append(Task(name, family, texts, np.asarray([int(e.label) for e in rows])))
    return [_cut(task, classes, most) for task in found]


def library_tasks(tasks: int = 20) -> list[Task]:
    """Which of five modules is a passage from? Tasks that need no download.

    Args:
        tasks: how many; the modules with the most passages serve, dealt out like cards.

    Returns:
        The tasks; a module's own name is masked in its passages.
    """
    passages: dict[str, list[str]] = {}
    for name, path in stdlib_modules().items():
        words = masked_text(name, path).split()
        pieces = [" ".join(words[i : i + PIECE]) for i in range(0, len(words) - PIECE, PIECE)]
        passages[name] = list(dict.fromkeys(pieces))[:60]
    chosen = sorted(passages, key=lambda name: (-len(passages[name]), name))[: EACH * tasks]
    found = []
    for number in range(tasks):
        modules = chosen[number::tasks]
        texts = [piece for module in modules for piece in passages[module]]
        labels = [i for i, module in enumerate(modules) for _ in passages[module]]
        found.append(Task(", ".join(modules), "standard library", texts, np.asarray(labels)))
    return found


def _of_file(
    name: str, family: str, path: str, columns: tuple[str, ...], label: str,
    only: tuple[str, str] | None,
) -> Task:  # fmt: skip
    wanted = {*columns, label, *([only[0]] if only else [])}
    found = from_datasets(path, columns=wanted)
    rows = [
        i
        for i in range(len(found[label]))
        if (only is None or found[only[0]][i] == only[1]) and str(found[label][i]) not in ("-1", "")
    ]
    texts = [
        found[columns[0]][i] if len(columns) == 1 else tuple(found[c][i] for c in columns)
        for i in rows
    ]
    names = sorted({str(found[label][i]) for i in rows})
    index = {each: i for i, each in enumerate(names)}
    return Task(name, family, texts, np.asarray([index[str(found[label][i])] for i in rows]))


def _cut(task: Task, classes: int, most: int) -> Task:
    """The most frequent classes, every text once, and a fixed sample of them, shuffled."""
    kept = [label for label, _ in Counter(task.labels.tolist()).most_common(classes)]
    index = {label: i for i, label in enumerate(sorted(kept))}
    first: dict[Any, int] = {}
    for i, text in enumerate(task.texts):
        if task.labels[i] in index:
            first.setdefault(text, i)
    rows = np.random.default_rng(0).permutation(list(first.values()))[:most]
    return task._replace(
        texts=[task.texts[i] for i in rows],
        labels=np.asarray([index[task.labels[i]] for i in rows], np.int32),
    )


def encode(tasks: Sequence[Task], words: Vocabulary, positions: int) -> list[Encoded]:
    """Tasks as tokens, cut to as many positions."""
    found = []
    for task in tasks:
        made = inputs.batch(
            inputs.encode(task.texts, words, positions=positions), np.arange(len(task.texts))
        )
        x = {name: made[name] for name in ("tokens", "mask")}
        found.append(Encoded(task.name, task.family, x, task.labels))
    return found


def shortened(task: Encoded, positions: int) -> Encoded:
    """The same task, its texts cut to as many tokens."""
    return task._replace(x={name: leaf[:, :positions] for name, leaf in task.x.items()})


def plain_texts(tasks: Sequence[Task]) -> list[str]:
    """All texts of all tasks, without their labels."""
    return [
        text if isinstance(text, str) else "\n".join(text) for task in tasks for text in task.texts
    ]


def halves(task: Encoded, size: int, seed: int) -> list[np.ndarray]:
    """Two disjoint random sets of rows, of ``size`` or of half of what there is.

    Args:
        task: its rows.
        size: examples of each.
        seed: decides which.

    Returns:
        Two arrays of row numbers.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(task.y))
    size = min(size, len(order) // 2)
    return [order[:size], order[size : 2 * size]]
