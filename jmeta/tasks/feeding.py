"""Batches of encoded examples as functions of (seed, step), for ``data.loader.episode_loader``.

Training takes one random window of an example, evaluation takes them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jmeta.core.types import Episode
from jmeta.tasks.episodes import task_generator
from jmeta.tasks.text import HIDDEN, Encoded, batch

Batch = dict[str, np.ndarray]
# Streams of the generator: the order of an epoch, the windows, the task of a block, its examples.
_ORDER, _WINDOW, _TASK, _EXAMPLES = range(4)


def shuffled(count: int, size: int) -> Callable[[int, int], np.ndarray]:
    """Rows in random order, epoch after epoch; a batch may end one and begin the next.

    Args:
        count: rows in all.
        size: rows of a batch.

    Returns:
        ``(seed, step) -> int64 [size]``; every run of ``count`` rows that begins an epoch holds
        each row once.

    Raises:
        ValueError: there is no row, or the batch is empty.

    Example:
        >>> rows = shuffled(5, 5)
        >>> sorted(rows(0, 7).tolist()), bool((rows(0, 7) == rows(0, 7)).all())
        ([0, 1, 2, 3, 4], True)
    """
    if count < 1 or size < 1:
        raise ValueError(f"a batch of {size} cannot be drawn from {count} rows")

    @functools.lru_cache(maxsize=4)  # neighbouring steps share an epoch
    def order(seed: int, epoch: int) -> np.ndarray:
        return task_generator(seed, epoch, 0, _ORDER).permutation(count)

    def rows(seed: int, step: int) -> np.ndarray:
        places = step * size + np.arange(size)
        epochs = places // count
        taken = np.empty(size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            taken[here] = order(seed, int(epoch))[places[here] % count]
        return taken

    return rows


def array_batches(arrays: Any, size: int) -> Callable[[int, int], Any]:
    """Batches of a pytree of arrays with a common leading axis, in shuffled epochs.

    Args:
        arrays: arrays ``[n, ...]``.
        size: rows of a batch.

    Returns:
        ``(seed, step) -> batch``: the same pytree with ``[size, ...]``.

    Raises:
        ValueError: the arrays differ in length, or there is no row.

    Example:
        >>> array_batches({"x": np.arange(3)}, 3)(0, 0)["x"].sum()
        np.int64(3)
    """
    lengths = {len(leaf) for leaf in jax.tree.leaves(arrays)}
    if len(lengths) != 1:
        raise ValueError(f"the arrays of a batch must be equally long, but have {lengths} rows")
    rows = shuffled(lengths.pop(), size)
    return lambda seed, step: jax.tree.map(lambda leaf: leaf[rows(seed, step)], arrays)


def text_batches(encoded: Encoded, size: int) -> Callable[[int, int], Batch]:
    """Batches of examples in shuffled epochs, each by one of its windows, drawn at random.

    Args:
        encoded: the windows.
        size: examples of a batch.

    Returns:
        ``(seed, step) -> batch``, as ``text.batch`` makes it, ``[size, positions]``.
    """
    rows = shuffled(len(encoded.label), size)
    first, count = _windows_of(encoded)

    def sample(seed: int, step: int) -> Batch:
        examples = rows(seed, step)
        drawn = task_generator(seed, step, 0, _WINDOW).integers(count[examples])
        return batch(encoded, first[examples] + drawn)

    return sample


def over_windows(encoded: Encoded, apply: Callable[[Batch], Any], size: int = 32) -> Any:
    """Apply a function to all windows in order, a batch of fixed size at a time.

    Args:
        encoded: the windows.
        apply: a batch as ``text.batch`` makes it, to a pytree of arrays ``[size, ...]``; jitted,
            it is compiled once, because the last batch is filled up with its first window.
        size: windows of a batch.

    Returns:
        The pytree over all windows, as numpy arrays ``[windows, ...]``.
    """
    total, parts = len(encoded.tokens), []
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        outputs = apply(batch(encoded, np.where(rows < total, rows, start)))
        kept = min(size, total - start)
        parts.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], outputs))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


class ExampleSource(NamedTuple):
    """Examples of one task that can be drawn by number.

    Attributes:
        name: what errors call it.
        examples: how many distinct examples there are.
        draw: ``(generator, k) -> batch`` of k distinct examples, ``[k, positions]``.
    """

    name: str
    examples: int
    draw: Callable[[np.random.Generator, int], Batch]


def labelled(name: str, encoded: Encoded) -> ExampleSource:
    """The examples of an encoded task as a source: each by one of its windows, at random.

    Of examples with equal windows and labels one is kept, so that support and query share none.

    Raises:
        ValueError: a label is hidden, or the task has no label tokens to learn from.
    """
    if not encoded.class_tokens and not encoded.gold.shape[1]:
        raise ValueError(f"{name} has scores in place of labels: there is no token to learn")
    hidden = np.flatnonzero(encoded.label == HIDDEN)
    if len(hidden):
        raise ValueError(f"the label of row {hidden[0]} of {name} is hidden: nothing to learn from")
    first, count = _windows_of(encoded)
    seen = {
        (encoded.label[i].item(), *(part[a : a + n].tobytes() for part in encoded[:4])): i
        for i, (a, n) in reversed(list(enumerate(zip(first, count, strict=True))))
    }
    kept = np.sort(np.fromiter(seen.values(), np.int64))
    first, count = first[kept], count[kept]

    def draw(rng: np.random.Generator, k: int) -> Batch:
        examples = rng.choice(len(count), k, replace=False)
        found = batch(encoded, first[examples] + rng.integers(count[examples]))
        return {key: leaf for key, leaf in found.items() if key != "y"}  # the labels say it all

    return ExampleSource(name, len(kept), draw)


def meta_batches(
    tasks: Sequence[ExampleSource],
    *,
    size: int,
    samples_per_task: int,
    shots: int = 1,
    queries: int = 1,
    unlabelled: ExampleSource | None = None,
) -> Callable[[int, int], Episode]:
    """Episodes over many text tasks: a support and a query of distinct examples of one task.

    Every ``samples_per_task`` consecutive episodes, counted over all batches, share a task. It is
    drawn with equal probabilities; ``unlabelled``, where given, weighs as much as all the others,
    so that it comes half of the time.

    Args:
        tasks: the labelled tasks.
        size: episodes of a batch.
        samples_per_task: episodes in a row of the same task.
        shots: support examples of an episode.
        queries: query examples of an episode.
        unlabelled: masked language modelling (``mlm.masked``), as one more task.

    Returns:
        ``(seed, step) -> Episode`` of batches as ``text.batch`` makes them, without ``y``:
        ``[size, shots, positions]`` and ``[size, queries, positions]``.

    Raises:
        ValueError: a task has not enough examples for a support and a disjoint query, or the
            tasks were encoded with different numbers of positions.

    Source:
        The task sampler of systems that meta-learn pre-training; see ``docs/text_tasks.md``.
    """
    sources = [*tasks, *([unlabelled] if unlabelled else [])]
    if not sources or size < 1 or samples_per_task < 1 or shots < 1 or queries < 0:
        raise ValueError(
            f"no episodes from {len(sources)} tasks with size={size}, shots={shots}, "
            f"samples_per_task={samples_per_task}, queries={queries}"
        )
    for source in sources:
        if source.examples < shots + queries:
            raise ValueError(
                f"{source.name} has {source.examples}, needs {shots + queries} distinct examples "
                f"({shots} support + {queries} query)"
            )
    lengths = [s.draw(np.random.default_rng(0), 1)["tokens"].shape[-1] for s in sources]
    if len(set(lengths)) > 1:
        named = ", ".join(f"{s.name} with {n}" for s, n in zip(sources, lengths, strict=True))
        raise ValueError(f"all tasks must be encoded with as many positions, not {named}")
    weights = np.ones(len(sources))
    if unlabelled:
        weights[-1] = max(len(tasks), 1)
    weights /= weights.sum()

    def one(seed: int, episode: int) -> Batch:
        block = episode // samples_per_task
        task = task_generator(seed, block, 0, _TASK).choice(len(sources), p=weights)
        return sources[task].draw(task_generator(seed, episode, 0, _EXAMPLES), shots + queries)

    def sample(seed: int, step: int) -> Episode:
        drawn = [one(seed, step * size + i) for i in range(size)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
        return Episode(
            support=jax.tree.map(lambda leaf: leaf[:, :shots], stacked),
            query=jax.tree.map(lambda leaf: leaf[:, shots:], stacked),
        )

    return sample


def _windows_of(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """The first window of each example, and how many it has."""
    count = np.bincount(encoded.example, minlength=len(encoded.label))
    return np.cumsum(count) - count, count
