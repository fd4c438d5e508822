"""N-way K-shot episodes over any labelled source, as a pure function of (seed, step).

The order of the data is never a state: task ``t`` of step ``s`` is drawn from its own generator,
seeded with ``(seed, s, t)``, so that any step can be made again, on any machine, alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jmeta.core.types import Episode

Range = int | tuple[int, int]
Sample = Callable[[int, int], Episode]


class FewShot(NamedTuple):
    """A labelled, indexed source: what episodes are drawn from.

    Attributes:
        x: an array ``[n, ...]``, or a pytree of them (tokens and segments, say).
        y: ``int [n]``, the class of each example, in ``0 .. len(names) - 1``.
        names: the name of each class, used in errors and reports.
    """

    x: Any
    y: np.ndarray
    names: tuple[str, ...]


def few_shot(x: Any, labels: Sequence[Any] | np.ndarray) -> FewShot:
    """Make a source from examples and labels of any kind (strings, integers).

    Args:
        x: an array ``[n, ...]`` or a pytree of them.
        labels: ``[n]`` labels; the classes are their sorted distinct values.

    Returns:
        The source, with ``names`` the distinct labels as strings.

    Raises:
        ValueError: there is no example, or a leaf of ``x`` has not as many rows as ``labels``.

    Example:
        >>> few_shot(np.zeros((3, 2)), ["b", "a", "b"]).y
        array([1, 0, 1])
    """
    names, y = np.unique(np.asarray(labels), return_inverse=True)
    source = FewShot(jax.tree.map(np.asarray, x), y.reshape(-1), tuple(str(name) for name in names))
    check_source(source)
    return source


def check_source(source: FewShot) -> None:
    """Raise ``ValueError`` unless rows, labels and names of a source agree."""
    rows = len(source.y)
    if rows == 0:
        raise ValueError("the source holds no example at all, so no episode can be drawn from it")
    for path, leaf in jax.tree_util.tree_leaves_with_path(source.x):
        if len(leaf) != rows:
            where = f"x{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where} has {len(leaf)} rows, but there are {rows} labels in y")
    if not np.issubdtype(np.asarray(source.y).dtype, np.integer):
        raise ValueError(
            f"y must hold integer class ids, not {np.asarray(source.y).dtype}; "
            "few_shot(x, labels) makes them from labels of any kind"
        )
    low, high = int(np.min(source.y)), int(np.max(source.y))
    if low < 0 or high >= len(source.names):
        raise ValueError(
            f"y holds class ids {low}..{high}, but there are {len(source.names)} names"
        )


def counts(source: FewShot) -> np.ndarray:
    """The number of examples of each class: ``int64 [classes]``."""
    return np.bincount(source.y, minlength=len(source.names))


def subset(source: FewShot, names: Iterable[str]) -> FewShot:
    """Keep only the classes named, in that order.

    Args:
        source: the source.
        names: names of classes.

    Returns:
        A source over those classes alone, with class ids ``0 .. len(names) - 1``.

    Raises:
        ValueError: a name is not a class of the source, or comes twice.

    Example:
        >>> subset(few_shot(np.arange(4), ["a", "b", "a", "c"]), ["c", "a"]).x
        array([0, 2, 3])
    """
    names = tuple(names)
    unknown = [name for name in names if name not in set(source.names)]
    if unknown:
        raise ValueError(f"not among the {len(source.names)} classes of the source: {unknown[:5]}")
    if len(set(names)) < len(names):
        raise ValueError("the same class is named twice")
    position = {name: i for i, name in enumerate(source.names)}
    renumber = np.full(len(source.names), -1, np.int64)
    renumber[[position[name] for name in names]] = np.arange(len(names))
    y = renumber[source.y]
    rows = np.flatnonzero(y >= 0)
    return FewShot(jax.tree.map(lambda leaf: leaf[rows], source.x), y[rows], names)


def at_least(source: FewShot, examples: int) -> FewShot:
    """Keep only the classes with at least that many examples.

    Args:
        source: the source.
        examples: shots + queries of the episodes to draw.

    Returns:
        A source over the classes that are large enough.

    Example:
        >>> at_least(few_shot(np.arange(3), ["a", "b", "a"]), 2).names
        ('a',)
    """
    enough = counts(source) >= examples
    return subset(source, [name for name, keep in zip(source.names, enough, strict=True) if keep])


def split_classes(
    source: FewShot, fractions: Sequence[float] = (0.6, 0.15, 0.25), *, seed: int = 0
) -> tuple[FewShot, ...]:
    """Split a source by class, in a random order fixed by the seed.

    Args:
        source: the source.
        fractions: the share of the classes in each part; they sum to 1.
        seed: decides which class goes where.

    Returns:
        One source per fraction; no class is in two of them.

    Raises:
        ValueError: the fractions do not sum to 1.
    """
    return tuple(
        subset(source, [source.names[i] for i in sorted(part)])
        for part in partition_classes(len(source.names), fractions, seed)
    )


def partition_classes(classes: int, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Class ids of each part of a random split by class; the parts cover all classes."""
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        raise ValueError(f"the fractions of a split must sum to 1, not {tuple(fractions)}")
    order = np.random.default_rng(seed).permutation(classes)
    cuts = np.round(np.cumsum(fractions)[:-1] * classes).astype(int)
    return np.split(order, cuts)


def _bounds(what: str, value: Range, least: int) -> tuple[int, int]:
    low, high = value if isinstance(value, tuple) else (value, value)
    if low > high or low < least:
        raise ValueError(f"{what} must be at least {least} and a range (low, high), not {value!r}")
    return low, high


class _Plan(NamedTuple):
    """What one sampler needs: the rows of each class side by side, and the bounds."""

    rows: np.ndarray  # every example's row, class after class
    first: np.ndarray  # [classes], where each class begins in rows
    sizes: np.ndarray  # [classes]
    ways: tuple[int, int]
    shots: tuple[int, int]
    queries: int


def _plan(source: FewShot, ways: Range, shots: Range, queries: int) -> _Plan:
    check_source(source)
    ways, shots = _bounds("ways", ways, 1), _bounds("shots", shots, 0)
    if queries < 0 or shots[1] + queries < 1:
        raise ValueError(f"an episode of {shots[1]} shots and {queries} queries holds no example")
    if ways[1] > len(source.names):
        raise ValueError(
            f"{ways[1]} ways need as many classes, but the source has {len(source.names)}"
        )
    sizes, needed = counts(source), shots[1] + queries
    short = np.flatnonzero(sizes < needed)
    if len(short):
        worst = ", ".join(f"{source.names[c]!r} has {sizes[c]}" for c in short[:5])
        more = f" (and {len(short) - 5} more classes)" if len(short) > 5 else ""
        raise ValueError(
            f"{shots[1]} shots + {queries} queries need {needed} examples of every class, but "
            f"class {worst}{more}; ask for fewer, or drop the small classes with "
            f"at_least(source, {needed})"
        )
    rows = np.argsort(source.y, kind="stable")
    return _Plan(rows, np.cumsum(sizes) - sizes, sizes, ways, shots, queries)


def _without_replacement(
    sizes: np.ndarray, uniform: np.ndarray, order: np.ndarray | None = None
) -> np.ndarray:
    """Draw k distinct integers below ``sizes[i]`` for each row i, in random order.

    Floyd's algorithm, one column at a time for all rows; then a shuffle, because Floyd's set is
    uniform but the order in which it comes is not.

    Args:
        sizes: ``int [rows]``, each at least k.
        uniform: ``float64 [rows, k]`` in [0, 1).
        order: ``float64 [rows, k]`` in [0, 1), the keys of the shuffle.

    Returns:
        ``int64 [rows, k]``.
    """
    wanted = uniform.shape[1]
    chosen = np.empty(uniform.shape, np.int64)
    for i in range(wanted):
        last = sizes - wanted + i
        drawn = np.minimum((uniform[:, i] * (last + 1)).astype(np.int64), last)
        taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, last, drawn)
    if order is None:
        return chosen
    return np.take_along_axis(chosen, np.argsort(order, axis=1), axis=1)


class Draw(NamedTuple):
    """The rows and masks of a batch of episodes, before any example is read.

    Attributes:
        rows: ``int64 [tasks, shots + queries, ways]``: rows of the source (largest shots, ways).
        mask: ``bool``, the same shape: false where the episode is padding.
        classes: ``int64 [tasks, ways]``: the class behind each label.
        shots: the largest number of shots: the first ``shots`` of axis 1 are the support.
    """

    rows: np.ndarray
    mask: np.ndarray
    classes: np.ndarray
    shots: int


def _uniforms(plan: _Plan) -> int:
    """How many uniform numbers one episode takes."""
    return 2 + 2 * plan.ways[1] * (1 + plan.shots[1] + plan.queries)


def _draw(plan: _Plan, uniform: np.ndarray) -> Draw:
    """Turn ``[tasks, _uniforms(plan)]`` uniform numbers into episodes, all tasks at once."""
    tasks, ways, each = len(uniform), plan.ways[1], plan.shots[1] + plan.queries
    sizes, per_class = uniform[:, :2], uniform[:, 2:].reshape(tasks, 2, ways, 1 + each)
    (fewest_ways, _), (fewest_shots, most_shots) = plan.ways, plan.shots
    some_ways = fewest_ways + (sizes[:, 0] * (ways - fewest_ways + 1)).astype(np.int64)
    some_shots = fewest_shots + (sizes[:, 1] * (most_shots - fewest_shots + 1)).astype(np.int64)

    total = np.full(tasks, len(plan.sizes))
    classes = _without_replacement(total, per_class[:, 0, :, 0], per_class[:, 1, :, 0])
    flat = classes.reshape(-1)
    picks = _without_replacement(
        plan.sizes[flat],
        per_class[:, 0, :, 1:].reshape(tasks * ways, each),
        per_class[:, 1, :, 1:].reshape(tasks * ways, each),
    )
    rows = plan.rows[plan.first[flat][:, None] + picks].reshape(tasks, ways, each)
    number = np.arange(each)
    counts_shot = (number >= most_shots) | (number < some_shots[:, None])
    counts_way = np.arange(ways) < some_ways[:, None]
    mask = counts_shot[:, :, None] & counts_way[:, None, :]
    return Draw(rows.transpose(0, 2, 1), mask, classes, most_shots)


def _gather(source: FewShot, draw: Draw) -> Episode:
    tasks, each, ways = draw.rows.shape
    label = np.broadcast_to(np.arange(ways, dtype=np.int32), (tasks, each, ways))

    def batch(part: slice) -> dict[str, Any]:
        rows, mask = draw.rows[:, part], draw.mask[:, part]
        shape = (tasks, rows.shape[1] * ways)
        rows, mask = rows.reshape(shape), mask.reshape(shape)

        def read(leaf: np.ndarray) -> np.ndarray:
            examples = np.take(leaf, rows, axis=0)  # several times faster than leaf[rows]
            if not mask.all():  # padding is blank, so that nothing can be learned from it
                examples[~mask] = 0
            return examples

        y = np.where(mask, label[:, part].reshape(shape), 0).astype(np.int32)
        return {"x": jax.tree.map(read, source.x), "y": y, "mask": mask.astype(np.float32)}

    return Episode(support=batch(slice(0, draw.shots)), query=batch(slice(draw.shots, None)))


def task_generator(seed: int, step: int, task: int, stream: int = 0) -> np.random.Generator:
    """The generator of one task of one step; ``stream`` gives more, independent of the first."""
    words = [seed, step, task, stream]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def sample_episode(
    source: FewShot, rng: np.random.Generator, *, ways: Range, shots: Range, queries: int
) -> Episode:
    """Draw one episode.

    Args:
        source: the labelled source.
        rng: the generator to draw from; ``task_generator(seed, step, task)`` gives the very
            episode that ``episodes`` puts at that place.
        ways: classes per episode, or ``(low, high)``.
        shots: support examples per class, or ``(low, high)``.
        queries: query examples per class.

    Returns:
        An ``Episode`` of numpy batches ``{"x", "y", "mask"}``: support ``[shots * ways, ...]``,
        query ``[queries * ways, ...]``; see ``episodes``.

    Raises:
        ValueError: too few classes, or a class with too few examples, which is named.
    """
    plan = _plan(source, ways, shots, queries)
    batched = _gather(source, _draw(plan, rng.random((1, _uniforms(plan)))))
    return jax.tree.map(lambda leaf: leaf[0], batched)


def draws(
    source: FewShot, *, ways: Range, shots: Range, queries: int, tasks: int
) -> Callable[[int, int], Draw]:
    """Like ``episodes``, but the rows of the source in place of the examples.

    For features computed once for the whole source, and for tests of what was drawn.

    Args:
        source: the labelled source.
        ways: classes per episode, or ``(low, high)``.
        shots: support examples per class, or ``(low, high)``.
        queries: query examples per class.
        tasks: episodes per batch.

    Returns:
        ``(seed, step) -> Draw``.
    """
    if tasks < 1:
        raise ValueError(f"a batch needs at least one task, not {tasks}")
    plan = _plan(source, ways, shots, queries)

    def draw(seed: int, step: int) -> Draw:
        width = _uniforms(plan)
        return _draw(
            plan,
            np.stack([task_generator(seed, step, task).random(width) for task in range(tasks)]),
        )

    return draw


def episodes(source: FewShot, *, ways: Range, shots: Range, queries: int, tasks: int) -> Sample:
    """N-way K-shot episodes, a batch of tasks at a time, as a function of (seed, step).

    Classes are drawn without replacement and relabelled ``0 .. ways - 1`` in random order;
    examples are drawn without replacement, so that support and query are disjoint. Rows run
    through the classes first (one shot of every class, then the next shot), so that any run of
    ``ways`` rows is class balanced. With a range for ``ways`` or ``shots``, each episode draws its
    own number and is padded to the largest: ``mask`` is 0 there, ``x`` and ``y`` are zero.

    Args:
        source: the labelled source.
        ways: classes per episode, or ``(low, high)``, both included.
        shots: support examples per class, or ``(low, high)``, both included.
        queries: query examples per class.
        tasks: episodes per batch.

    Returns:
        ``(seed, step) -> Episode`` of numpy batches ``{"x", "y", "mask"}``: ``x``
        ``[tasks, shots * ways, ...]`` in the source's dtype, ``y`` int32 and ``mask`` float32
        ``[tasks, shots * ways]``; for the query, ``queries * ways``.

    Raises:
        ValueError: too few classes, or a class with too few examples, which is named.

    Example:
        >>> source = few_shot(np.arange(12.0), list("abc") * 4)
        >>> sample = episodes(source, ways=2, shots=1, queries=2, tasks=8)
        >>> sample(0, 0).query["y"].shape
        (8, 4)

    Reference:
        Vinyals et al. 2016, "Matching Networks for One Shot Learning", section 4.1.
    """
    draw = draws(source, ways=ways, shots=shots, queries=queries, tasks=tasks)
    return lambda seed, step: _gather(source, draw(seed, step))
