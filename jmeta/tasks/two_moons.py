"""Two Moons: a toy small enough to see what a meta-learner does.

As points in the plane, as rotated few-shot tasks, and as the token sequences on a 64 x 64 grid
that stand in for text when an objective of language modelling is meta-learned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jmeta.core.types import Episode
from jmeta.tasks.episodes import Range, Sample, episodes, few_shot, task_generator
from jmeta.tasks.text import HIDDEN, Example, TextTask
from jmeta.tasks.tokenizer import Unified, train_unified, unified

GRID = 64
GROUP = 16
TEST = slice(513_000, 514_000)
TRAIN_SEQUENCES = slice(0, 512_000)
VALIDATION_SEQUENCES = slice(600_000, 616_000)
WHICH_MOON = TextTask("Which_MOON", 2, ("0", "1"), ("sep", "cls"))


def moons(n: int, *, seed: int, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Points of scikit-learn's two interleaved half circles, in random order.

    Args:
        n: number of points; the two labels are balanced.
        seed: scikit-learn's ``random_state``.
        noise: standard deviation of the Gaussian noise.

    Returns:
        Points float64 ``[n, 2]`` and labels int64 ``[n]``.

    Example:
        >>> int(moons(10, seed=0)[1].sum())
        5
    """
    from sklearn.datasets import make_moons

    points, labels = make_moons(n, noise=noise, random_state=seed)
    return np.asarray(points), np.asarray(labels)


def to_grid(points: np.ndarray) -> np.ndarray:
    """Map x in [-1.5, 2.5] and y in [-1, 1.5] to cells 0..63; what lies outside goes to the edge.

    Args:
        points: float ``[..., 2]``.

    Returns:
        int64 ``[..., 2]``, the column and row of the cell.

    Example:
        >>> to_grid(np.array([[-1.5, -1.0], [2.5, 1.5]]))
        array([[ 0,  0],
               [63, 63]])
    """
    low, high = np.array([-1.5, -1.0]), np.array([2.5, 1.5])
    scaled = (points - low) / (high - low) * (GRID - 0.01)
    return np.clip(np.floor(scaled), 0, GRID - 1).astype(np.int64)


def sequences(cells: np.ndarray) -> np.ndarray:
    """Write groups of 16 cells as sequences ``x y x y ...``, each sorted by (x, y).

    Args:
        cells: int ``[n, 2]`` with n a multiple of 16.

    Returns:
        int64 ``[n / 16, 32]`` of numbers 0..63.

    Raises:
        ValueError: n is not a multiple of 16.
    """
    if len(cells) % GROUP:
        raise ValueError(f"{len(cells)} cells cannot be cut into groups of {GROUP}")
    key = np.sort((cells[:, 0] * GRID + cells[:, 1]).reshape(-1, GROUP), axis=1)
    return np.stack([key // GRID, key % GRID], axis=-1).reshape(-1, 2 * GROUP)


class TwoMoons(NamedTuple):
    """The whole toy: unlabelled sequences, labelled test cells, and the cells of the plane.

    Attributes:
        train: int64 ``[32000, 32]``, sequences to pre-train on.
        validation: int64 ``[1000, 32]``.
        test: ``(cells int64 [1000, 2], labels int64 [1000])``.
        vis: int64 ``[4096, 2]``, every cell, to draw a decision boundary.
    """

    train: np.ndarray
    validation: np.ndarray
    test: tuple[np.ndarray, np.ndarray]
    vis: np.ndarray


def two_moons() -> TwoMoons:
    """The Two Moons of one million points (seed 42, noise 0.1), cut as in the original experiment.

    Returns:
        The sequences, the test cells and every cell of the grid.

    Reference:
        Shen 2021, "Meta-Learned Language Modelling Objective", Stanford CS330.
    """
    points, labels = moons(1_000_000, seed=42)
    cells = to_grid(points)
    return TwoMoons(
        train=sequences(cells[TRAIN_SEQUENCES]),
        validation=sequences(cells[VALIDATION_SEQUENCES]),
        test=(cells[TEST], labels[TEST]),
        vis=np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij"), -1).reshape(
            -1, 2
        ),
    )


def which_moon(n: int, *, validation: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The labelled task: from a cell, tell the moon. Fresh points, not those of ``two_moons``.

    Args:
        n: number of examples; the experiment takes 10, 20, 40, 80 and 160.
        validation: the validation set (seed 44) in place of the training set (seed 43).

    Returns:
        Cells int64 ``[n, 2]`` and labels int64 ``[n]``.
    """
    points, labels = moons(n, seed=44 if validation else 43)
    return to_grid(points), labels


def as_text(numbers: np.ndarray) -> list[str]:
    """Write rows of numbers, cells or sequences, as text: ``"x y"`` or ``"x y x y ..."``.

    Example:
        >>> as_text(np.array([[3, 41]]))
        ['3 41']
    """
    return [" ".join(map(str, row)) for row in np.asarray(numbers).tolist()]


def moon_vocabulary() -> Unified:
    """A byte-level BPE of at most 512 entries in which each number 0..63 is one token.

    Example:
        >>> len(moon_vocabulary().tokenizer.encode("3 41").ids)
        2
    """
    numbers = " ".join(map(str, range(GRID)))
    return unified(train_unified([numbers], 512, prefix_space=True))


def moon_examples(cells: np.ndarray, labels: np.ndarray | None = None) -> list[Example]:
    """The labelled task in the unified format: ``[CLS2] x y [SEP]``.

    Args:
        cells: int ``[n, 2]``.
        labels: int ``[n]``; None where they are not known, as for every cell of the plane.

    Returns:
        The examples, for ``text.encode(WHICH_MOON, ...)``.
    """
    known = np.full(len(cells), HIDDEN) if labels is None else np.asarray(labels)
    pairs = zip(as_text(cells), known.tolist(), strict=True)
    return [Example(a, label=label, idx=i) for i, (a, label) in enumerate(pairs)]


def moon_episodes(*, tasks: int, shots: Range = 5, queries: int = 15, noise: float = 0.1) -> Sample:
    """Few-shot Two Moons: a task is a pair of moons, turned and moved, with random labels.

    Args:
        tasks: tasks per batch.
        shots: support points of each moon, or ``(low, high)``.
        queries: query points of each moon.
        noise: standard deviation of the points around their moon.

    Returns:
        ``(seed, step) -> Episode`` of numpy batches ``{"x", "y", "mask"}``: ``x`` float32
        ``[tasks, 2 * points, 2]``, ``y`` int32, ``mask`` float32.

    Example:
        >>> moon_episodes(tasks=3)(0, 0).query["x"].shape
        (3, 30, 2)
    """
    most = shots[1] if isinstance(shots, tuple) else shots
    each = most + queries
    # The sampler draws labels and masks; the points are made anew for every task.
    labels = few_shot(np.zeros((2 * each, 2), np.float32), [0] * each + [1] * each)
    skeleton = episodes(labels, ways=2, shots=shots, queries=queries, tasks=tasks)

    def points(rng: np.random.Generator) -> np.ndarray:
        angle = np.pi * rng.random((each, 2))
        upper = np.stack([np.cos(angle[:, 0]), np.sin(angle[:, 0])], -1)
        lower = np.stack([1 - np.cos(angle[:, 1]), 0.5 - np.sin(angle[:, 1])], -1)
        both = np.stack([upper, lower])[rng.permutation(2)]  # [label, point, 2]
        both = both - np.array([0.5, 0.25]) + noise * rng.standard_normal(both.shape)
        turn, shift = 2 * np.pi * rng.random(), rng.uniform(-1, 1, 2)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        return (both @ rotation.T + shift).astype(np.float32)

    def sample(seed: int, step: int) -> Episode:
        # The skeleton draws from the first stream of each task.
        made = np.stack([points(task_generator(seed, step, t, stream=1)) for t in range(tasks)])
        by_row = made.transpose(0, 2, 1, 3)  # one point of each label, then the next
        episode = skeleton(seed, step)

        def fill(batch: dict[str, np.ndarray], part: slice) -> dict[str, np.ndarray]:
            x = by_row[:, part].reshape(tasks, -1, 2)
            return {**batch, "x": x * batch["mask"][..., None]}

        return Episode(
            support=fill(episode.support, slice(0, most)),
            query=fill(episode.query, slice(most, None)),
        )

    return sample
