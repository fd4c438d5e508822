"""Evaluation: how the outer loss falls as the inner loop adapts, with intervals over episodes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.autodiff import stopped_grad
from jmeta.core.checks import differentiating, losses_at_start
from jmeta.core.inner import checked, encode_episode, fold, inner_loop, keys, start, unscored
from jmeta.core.types import Array, Episode, Key, Problem, PyTree, Steps, no_encoding
from jmeta.runtime.statistics import mean_ci


class Curve(NamedTuple):
    """An adaptation curve.

    Attributes:
        steps: ``[points]``, inner steps at each point.
        mean: ``{metric: [points]}``; ``loss`` and every scalar of the outer aux.
        ci95: ``{metric: [points]}``, half the width of the 95 % interval over episodes.
        values: ``{metric: [episodes, points]}``, for paired comparisons on the same episodes.
    """

    steps: tuple[int, ...]
    mean: dict[str, np.ndarray]
    ci95: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


def adapt(problem: Problem, meta: PyTree, support: PyTree, steps: int, key: Key = None) -> PyTree:
    r"""Adapt to one task, without differentiating: what a user of a trained model calls.

    Args:
        problem: whose inner loop is run.
        meta: the meta-parameters.
        support: one batch, or ``Steps``.
        steps: number of inner steps.
        key: a random key, or None.

    Returns:
        The fast weights :math:`\theta_T`.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> float(adapt(Problem(loss, loss, lambda meta: optax.sgd(0.5)), 4.0, 0.0, steps=2))
        1.0
    """
    init_key, run_key = keys(key, 2)
    run = inner_loop(problem, steps, objective=unscored, grad=stopped_grad)
    first, episode = start(problem, meta, init_key), Episode(support)
    with differentiating(
        lambda m: run(m, first, episode, run_key),
        losses_at_start(problem, episode, key),
        first.fast,
        meta,
    ):
        _, (state, _, _) = run(meta, first, episode, run_key)
    return state.fast


def adaptation_values(
    problem: Problem, meta: PyTree, episode: Episode, steps: Sequence[int], key: Key = None
) -> dict[str, Array]:
    """The outer loss and metrics of one episode at several points of one inner loop.

    Args:
        problem: the problem.
        meta: the meta-parameters.
        episode: one episode.
        steps: numbers of inner steps, increasing, from 0.
        key: a random key, or None.

    Returns:
        ``{metric: [points]}``, with ``loss`` and every scalar of the outer aux.

    Raises:
        ValueError: the numbers of steps do not increase; the episode has no query.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> problem = Problem(loss, loss, lambda meta: optax.sgd(0.5))
        >>> adaptation_values(problem, 4.0, Episode(0.0, 0.0), [0, 1, 3])["loss"].tolist()
        [8.0, 2.0, 0.125]
    """
    steps = list(steps)
    if not steps or steps[0] < 0 or any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(f"steps must increase from 0 or more; got {steps}")
    if episode.query is None:
        raise ValueError("evaluation scores the query; this episode has none")
    outer_loss = checked(problem.outer_loss, "outer_loss")
    init_key, encode_key, run_key, score_key = keys(key, 4)
    state = start(problem, meta, init_key)
    encoded = encode_episode(problem, meta, episode, encode_key)
    # What follows starts from encoded data, so that the encoder runs once.
    encoded_problem = problem._replace(encode=no_encoding)
    done, points = 0, []
    # One inner loop in pieces, each going on where the last one stopped, so every step is taken
    # once and the query is read once a point. A single scan would have to score after every step:
    # under vmap a cond is a select, which pays for both of its sides.
    for count in steps:
        part = encoded.support
        if isinstance(part, Steps):
            if jax.tree.leaves(part.batches)[0].shape[0] < count:
                raise ValueError(f"{count} inner steps are asked for, but Steps has fewer batches")
            part = jax.tree.map(lambda x, lo=done, hi=count: x[lo:hi], part)
        run = inner_loop(encoded_problem, count - done, objective=unscored, grad=stopped_grad)
        _, (state, _, _) = run(meta, state, Episode(part), run_key)
        loss, aux = outer_loss(state.fast, meta, encoded.query, fold(score_key, count))
        scalars = (
            {k: v for k, v in aux.items() if jnp.ndim(v) == 0} if isinstance(aux, dict) else {}
        )
        points.append({**scalars, "loss": loss})
        done = count
    return {name: jnp.stack([point[name] for point in points]) for name in points[0]}


def evaluate(
    problem: Problem,
    meta: PyTree,
    episodes: Episode,
    steps: Sequence[int] = (0, 1, 5, 10),
    *,
    key: Key = None,
    batch: int = 32,
) -> Curve:
    """The adaptation curve of a problem: mean and 95 % interval over episodes.

    The whole curve comes from one inner loop per episode.

    Args:
        problem: the problem.
        meta: the meta-parameters.
        episodes: batched episodes, a leading task axis on every leaf.
        steps: numbers of inner steps to score, increasing.
        key: a random key, or None for deterministic losses.
        batch: how many episodes are mapped together.

    Returns:
        A ``Curve``.

    Raises:
        ValueError: no episodes; see also ``adaptation_values``.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> problem = Problem(loss, loss, lambda meta: optax.sgd(0.5))
        >>> targets = jnp.asarray([0.0, 4.0])
        >>> evaluate(problem, 2.0, Episode(targets, targets), [0, 1]).mean["loss"].tolist()
        [2.0, 0.5]
    """
    leaves = jax.tree.leaves(episodes)
    count = leaves[0].shape[0] if leaves else 0
    if count == 0:
        raise ValueError("there are no episodes to evaluate on")

    several = _several(problem, tuple(steps))
    size = min(batch, count)

    def part(rows: np.ndarray) -> dict[str, Array]:
        chosen = jax.tree.map(lambda x: x[rows], episodes)
        return several(meta, chosen, jnp.asarray(rows), key)

    rows = in_chunks(part, count, size)
    values = {name: np.asarray(value, np.float64) for name, value in rows.items()}
    mean = {name: v.mean(axis=0) for name, v in values.items()}
    return Curve(tuple(steps), mean, {k: _half_widths(v) for k, v in values.items()}, values)


def in_chunks(run: Callable[[np.ndarray], PyTree], count: int, size: int) -> PyTree:
    """What a program says of many rows, so many at a time: one compilation serves them all.

    Args:
        run: ``int [size] -> leaves [size, ...]``: the rows with these numbers.
        count: how many rows there are, at least one.
        size: of a chunk; the last one is filled up from the beginning, and cut.

    Returns:
        The same leaves ``[count, ...]``, in numpy.

    Example:
        >>> in_chunks(lambda rows: {"square": rows**2}, count=5, size=2)["square"].tolist()
        [0, 1, 4, 9, 16]
    """
    parts = [
        jax.tree.map(np.asarray, run(np.arange(low, low + size) % count))
        for low in range(0, count, size)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


@functools.lru_cache(maxsize=16)
def _several(problem: Problem, steps: tuple[int, ...]) -> Callable[..., dict[str, Array]]:
    """Many episodes at once; kept, so that evaluating again while training compiles nothing."""

    @jax.jit
    def several(meta: PyTree, episodes: Episode, indices: Array, key: Key) -> dict[str, Array]:
        def one(episode: Episode, index: Array) -> dict[str, Array]:
            return adaptation_values(problem, meta, episode, steps, fold(key, index))

        return jax.vmap(one)(episodes, indices)

    return several


def _half_widths(values: np.ndarray) -> np.ndarray:
    """Half the width of each point's 95 % interval over episodes; NaN for a single episode."""
    widths = [mean_ci(column).half_width for column in values.T]
    return np.asarray([np.nan if width is None else width for width in widths])
