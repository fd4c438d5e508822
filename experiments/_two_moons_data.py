"""Two Moons as the methods read it: sequences to pre-train on, labelled points, and their batches.

Every batch is a function of (seed, chunk), where a chunk is the outer steps of one dispatch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jmeta.core.types import Episode, Steps
from jmeta.tasks.corruption import Objective, masked_lm, unlabelled
from jmeta.tasks.episodes import task_generator
from jmeta.tasks.feeding import shuffled
from jmeta.tasks.tokenizer import Unified
from jmeta.tasks.two_moons import (
    GRID,
    WHICH_MOON,
    moon_vocabulary,
    moons,
    to_grid,
    two_moons,
    which_moon,
)

Batch = dict[str, Any]
POSITIONS = 34  # [CLSk], sixteen points, [SEP]
SHORT = 4  # [CLS2] x y [SEP]
# Streams of the generator; the order of the sequences has one of its own.
_CORRUPTION, _LABELLED, _MLM_TASK, _FINE_TUNING = range(10, 14)
_FRESH = 10_000  # apart from scikit-learn's seeds of the published sets


class Labelled(NamedTuple):
    """A labelled set: cells int ``[n, 2]`` and labels int ``[n]``."""

    cells: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """Everything that is learned from and tested on.

    Attributes:
        words: the vocabulary.
        train: int32 ``[sequences, 34]``, with [CLS1] in front.
        held_out: a corrupted batch of validation sequences, ``[sequences, 34]``.
        test: the test points.
        cells: int ``[4096, 2]``, every cell (x, y) of the plane, in the order of ``64 x + y``.
        numbers: int32 ``[64]``, the token of each number.
    """

    words: Unified
    train: np.ndarray
    held_out: Batch
    test: Labelled
    cells: np.ndarray
    numbers: np.ndarray


def load(validation: int, test: int) -> Data:
    """The published data, with as many validation sequences and test points as asked for."""
    toy, words = two_moons(), moon_vocabulary()
    numbers = np.asarray([words.tokenizer.encode(str(i)).ids[0] for i in range(GRID)], np.int32)
    held_out = masked_lm(
        _sequences(toy.validation[:validation], words, numbers),
        task_generator(0, 0, 0, _CORRUPTION),
        words,
    )
    cells, labels = toy.test
    return Data(
        words,
        _sequences(toy.train, words, numbers),
        held_out,
        Labelled(cells[:test], labels[:test]),
        toy.vis,
        numbers,
    )


def _sequences(rows: np.ndarray, words: Unified, numbers: np.ndarray) -> np.ndarray:
    def ends(token: int) -> np.ndarray:
        return np.full((len(rows), 1), token, np.int32)

    return np.concatenate([ends(words.cls[1]), numbers[rows], ends(words.sep)], axis=1)


def labelled(n: int, seed: int, *, fresh: bool, validation: bool = False) -> Labelled:
    """The labelled set of a seed: the published one for all, or points of the seed's own."""
    if not fresh:
        return Labelled(*which_moon(n, validation=validation))
    points, labels = moons(n, seed=_FRESH + 2 * seed + validation)
    return Labelled(to_grid(points), labels)


def moon_batch(data: Data, cells: np.ndarray, labels: np.ndarray, positions: int = SHORT) -> Batch:
    """Points in the unified format, ``[CLS2] x y [SEP]``, with a label at each of the four.

    Args:
        data: the vocabulary.
        cells: int ``[..., 2]``.
        labels: int ``[...]``, 0 or 1.
        positions: the length, at least 4.

    Returns:
        ``tokens``, ``labels`` int32 and ``mask``, ``weights`` float32, ``[..., positions]``.
    """
    shape = (*labels.shape, positions)
    tokens, named = np.full((2, *shape), data.words.pad, np.int32)
    tokens[..., 0], tokens[..., 3] = data.words.cls[WHICH_MOON.number], data.words.sep
    tokens[..., 1:3] = data.numbers[cells]
    mask = np.broadcast_to(np.arange(positions) < SHORT, shape).astype(np.float32)
    named[..., :SHORT] = np.asarray(label_tokens(data))[labels][..., None]
    return {"tokens": tokens, "mask": mask, "labels": named, "weights": mask}


def label_tokens(data: Data) -> tuple[int, int]:
    """The tokens that stand for the two moons: [SEP] and [CLS2]."""
    return data.words.sep, data.words.cls[WHICH_MOON.number]


def corrupted(
    data: Data, seed: int, chunk: int, shape: tuple[int, ...], corrupt: Objective = masked_lm
) -> Batch:
    """A chunk of sequences, in shuffled epochs, under an objective of ``_teacher_shared``.

    Leaves are ``[*shape, 34]``.
    """
    size = int(np.prod(shape))
    rows = shuffled(len(data.train), size)(seed, chunk)
    tokens = data.train[rows].reshape(*shape, POSITIONS)
    return corrupt(tokens, task_generator(seed, chunk, 0, _CORRUPTION), data.words)


def teacher_chunk(
    data: Data,
    points: Labelled,
    seed: int,
    chunk: int,
    shape: tuple[int, int, int],
    *,
    inner_steps: int,
    keep: tuple[str, ...],
    labelled: int,
    mlm_task: bool,
    mask_bug: bool,
    among_classes: bool,
) -> Episode:
    """Episodes of a teacher for the outer steps of a chunk.

    Unlabelled batches, and what ``judge_chunk`` scores their students on.

    Args:
        data: the sequences.
        points: the labelled points that the teacher may see.
        seed: the seed.
        chunk: which chunk.
        shape: (steps, micro-batches, sequences of each).
        inner_steps: unlabelled batches of an unroll.
        keep: which of the optional entries of the unlabelled batch are needed.
        labelled: examples of support and of query, each.
        mlm_task: whether masked language modelling is a labelled task as well, that of half of
            the micro-batches.
        mask_bug: count every position that is no padding, whether it has a label or not: the
            labels that are missing are then [PAD], a class like any other.
        among_classes: score a point among the labels of its task, not the whole vocabulary.

    Returns:
        Leaves ``[steps, micro-batches, ...]``, as ``methods.soft_teacher`` takes them.
    """
    steps, micro, size = shape
    inner = (inner_steps,) if inner_steps > 1 else ()
    read = unlabelled(corrupted(data, seed, chunk, (steps, micro, *inner, size)), data.words)
    read = {k: v for k, v in read.items() if k in ("tokens", "mask", *keep)}
    scored = judge_chunk(
        data, points, seed, chunk, (steps, micro, labelled),
        mlm_task=mlm_task, mask_bug=mask_bug, among_classes=among_classes,
    )  # fmt: skip
    return Episode(Steps(read) if inner else read, scored)


def judge_chunk(
    data: Data,
    points: Labelled,
    seed: int,
    chunk: int,
    shape: tuple[int, int, int],
    *,
    mlm_task: bool = False,
    mask_bug: bool = False,
    among_classes: bool = False,
) -> Episode:
    """What students learn from and are scored on in a chunk's outer steps.

    Support and query are drawn from two halves of the labelled points, halved anew each time, so
    that no point is in both.

    Args:
        data: the sequences.
        points: the labelled points that the judge may see.
        seed: the seed.
        chunk: which chunk.
        shape: (steps, micro-batches, examples of each).
        mlm_task: as of ``teacher_chunk``; so are the others.
        mask_bug: count positions without a label.
        among_classes: score among two labels.

    Returns:
        Leaves ``[steps, micro-batches, 1, examples, ...]``: a micro-batch is scored on one task.
    """
    steps, micro, size = shape
    rng = task_generator(seed, chunk, 0, _LABELLED)
    order = rng.random((steps, micro, len(points.labels))).argsort(-1)
    half, each = len(points.labels) // 2, np.arange(size)
    halves = (
        order[..., :half][..., each % half],
        order[..., half:][..., each % (order.shape[-1] - half)],
    )
    positions = POSITIONS if mlm_task else SHORT
    parts = [moon_batch(data, points.cells[i], points.labels[i], positions) for i in halves]
    if mlm_task:
        rng = task_generator(seed, chunk, 0, _MLM_TASK)
        chosen = rng.random((steps, micro, 1, 1)) < 0.5
        rows = rng.integers(len(data.train), size=(2, steps, micro, size))
        for at, of in enumerate(rows):
            masked = masked_lm(data.train[of], rng, data.words)
            parts[at] = {k: np.where(chosen, masked[k], v) for k, v in parts[at].items()}
    if mask_bug:
        parts = [{**part, "weights": part["mask"]} for part in parts]
    parts = [{k: v[:, :, None] for k, v in part.items()} for part in parts]
    if among_classes:
        classes = np.broadcast_to(np.asarray(label_tokens(data), np.int32), (steps, micro, 1, 2))
        parts = [{**part, "classes": classes} for part in parts]
    return Episode(*parts)


def fine_tuning_rows(n: int, seed: int, steps: int, size: int) -> np.ndarray:
    """The labelled points of each step of fine-tuning, in shuffled epochs, ``[steps, size]``."""
    order = shuffled(n, size)
    return np.stack([order(seed + _FINE_TUNING, step) for step in range(steps)])


def nearest_neighbour(points: Labelled, cells: np.ndarray) -> np.ndarray:
    """The label of the nearest labelled point of each cell, int ``[cells]``."""
    distance = ((cells[:, None] - points.cells[None]) ** 2).sum(-1)
    return points.labels[distance.argmin(1)]


def majority(points: Labelled) -> float:
    """The accuracy of always saying the more frequent label."""
    return float(np.bincount(points.labels, minlength=2).max() / len(points.labels))
