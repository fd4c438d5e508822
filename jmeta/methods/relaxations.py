"""How a teacher's scores become something to write: in expectation, or by drawing.

A ``Relaxation`` is applied to every head; what was drawn has a log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.inner import keys
from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array, Key

Outcomes: TypeAlias = dict[str, Array]
Relaxation: TypeAlias = Callable[[Array, Key], Array]


def expected(scores: Array, key: Key) -> Array:
    r"""The distribution itself: what is written is the mean over all the teacher might write.

    Args:
        scores: ``[..., outcomes]``.
        key: not used.

    Returns:
        :math:`\mathrm{softmax}(s)`.

    Example:
        >>> expected(jnp.zeros(4), None).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    del key
    return jax.nn.softmax(scores, axis=-1)


def unevaluated(scores: Any, key: Key) -> Any:
    """``expected`` for a teacher that returns its distribution in a form the student evaluates.

    Such as ``models.teacher_lm.write_factors``, which is never multiplied out: then no pass holds
    a distribution over the vocabulary for all tokens at once.

    Args:
        scores: anything.
        key: not used.

    Returns:
        ``scores`` as they are.

    Example:
        >>> unevaluated("a distribution in any form", None)
        'a distribution in any form'
    """
    del key
    return scores


def straight_through(scores: Array, key: Key) -> Array:
    r"""A draw, differentiated as if it were the distribution.

    .. math:: \mathrm{onehot}(z) + p - \mathrm{sg}[p], \qquad z \sim p

    Args:
        scores: ``[..., outcomes]``.
        key: a random key.

    Returns:
        One-hot vectors, ``[..., outcomes]``.

    Example:
        >>> float(straight_through(jnp.zeros(3), jax.random.key(0)).sum())
        1.0

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (2013).
    """
    soft = jax.nn.softmax(scores, axis=-1)
    drawn = jax.nn.one_hot(draw(scores, key), scores.shape[-1], dtype=soft.dtype)
    return drawn + soft - jax.lax.stop_gradient(soft)


def gumbel_softmax(temperature: float = 1.0, *, hard: bool = False) -> Relaxation:
    r"""A differentiable draw.

    .. math:: \mathrm{softmax}((s + G) / \tau), \qquad G \sim \mathrm{Gumbel}(0, 1)

    Args:
        temperature: :math:`\tau`; towards 0 the draws become one-hot.
        hard: one-hot draws, differentiated as the soft ones.

    Returns:
        A ``Relaxation``.

    Raises:
        ValueError: the temperature is not positive.

    Example:
        >>> drawn = gumbel_softmax(0.1, hard=True)(jnp.zeros(3), jax.random.key(0))
        >>> float(drawn.max())
        1.0

    Source: Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (2017).
    """
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; it must be positive")

    def relax(scores: Array, key: Key) -> Array:
        noise = jax.random.gumbel(_required(key), scores.shape, scores.dtype)
        soft = jax.nn.softmax((scores + noise) / temperature, axis=-1)
        if not hard:
            return soft
        drawn = jax.nn.one_hot(soft.argmax(-1), scores.shape[-1], dtype=soft.dtype)
        return drawn + soft - jax.lax.stop_gradient(soft)

    return relax


def draw(scores: Array, key: Key) -> Array:
    r"""One outcome for each place, by two random numbers: which row of the outcomes, which of it.

    .. math:: P(z) = P(\mathrm{row}) \, P(z \mid \mathrm{row}) = \mathrm{softmax}(s)_z

    The outcomes are laid out as a square, and each stage inverts its cumulative distribution.
    Noise on every score (``jax.random.categorical``) takes a random number and two logarithms for
    every outcome: over a vocabulary that is more than the teacher's network costs.

    Args:
        scores: ``[..., outcomes]``.
        key: a random key.

    Returns:
        int32 ``[...]``; never an outcome of probability zero.

    Example:
        >>> never = -jnp.inf
        >>> draw(jnp.array([[0.0, never, never], [never, never, 1.0]]), jax.random.key(0)).tolist()
        [0, 2]
    """
    p = jax.nn.softmax(scores.astype(at_least_float32(scores.dtype)), axis=-1)
    outcomes = p.shape[-1]
    side = math.isqrt(outcomes - 1) + 1
    empty = [(0, 0)] * (p.ndim - 1) + [(0, side * side - outcomes)]
    square = jnp.pad(p, empty).reshape(*p.shape[:-1], side, side)
    first, second = jax.random.uniform(_required(key), (2, *p.shape[:-1]), p.dtype)
    row = _inverted(square.sum(-1), first)
    within = jnp.take_along_axis(square, row[..., None, None], axis=-2).squeeze(-2)
    return row * side + _inverted(within, second)


def _inverted(weights: Array, u: Array) -> Array:
    """The entry, int32 ``[...]``, of weights ``[..., n]`` in which the share ``u`` of them ends."""
    start = jnp.zeros(u.shape, weights.dtype)
    # One after the other, so that an entry of zero adds exactly nothing.
    add = lambda total, weight: (total + weight,) * 2  # noqa: E731
    total, sums = jax.lax.scan(add, start, jnp.moveaxis(weights, -1, 0))
    return (sums <= (u * total)[None]).sum(0, dtype=jnp.int32)


def of_heads(relax: Relaxation, scores: Outcomes, key: Key) -> Outcomes:
    """Apply ``expected``, ``draw`` or another to every head, each with a key of its own."""
    each = keys(key, len(scores))
    return {name: relax(scores[name], k) for name, k in zip(sorted(scores), each, strict=True)}


def log_probability(
    scores: Outcomes, drawn: Outcomes, counts: Array, weighting: Literal["sum", "mean"] = "sum"
) -> Array:
    r"""The log-probability of what was drawn, for each example.

    .. math:: \log T(z \mid x) = \sum_h \sum_i m_i \log \mathrm{softmax}(s_{hi})_{z_{hi}}

    Args:
        scores: ``{head: [examples, ..., outcomes]}``.
        drawn: ``{head: int [examples, ...]}``.
        counts: ``[examples, ...]``: :math:`m`.
        weighting: ``"sum"``, whose gradient is the score function; ``"mean"``: the mean over
            positions and heads, which weighs examples by the inverse of their length.

    Returns:
        ``[examples]``.
    """
    axes = tuple(range(1, counts.ndim))
    total = jnp.zeros(counts.shape[0], counts.dtype)
    for name, each in scores.items():
        picked = at_outcomes(each, drawn[name]) - jax.nn.logsumexp(each, axis=-1)
        # where: what is not the teacher's to write may have probability zero.
        picked = jnp.where(counts != 0, picked * counts.astype(picked.dtype), 0)
        total = total + picked.sum(axes).astype(total.dtype)
    if weighting == "sum":
        return total
    size = counts.sum(axes) * len(scores)
    return total / jnp.where(size == 0, 1, size)


def at_outcomes(scores: Array, outcomes: Array) -> Array:
    """The entries ``[...]`` of scores ``[..., outcomes]`` at outcomes, int ``[...]``.

    A sum over a one-hot, not a gather: its transpose is no scatter.
    """
    return jnp.where(one_hot(outcomes, scores.shape[-1]), scores, 0).sum(-1)


def one_hot(outcomes: Array, size: int) -> Array:
    """One-hot vectors, bool ``[..., size]``, of outcomes, int ``[...]``."""
    each = jnp.arange(size, dtype=outcomes.dtype)
    return outcomes[..., None] == each.reshape((1,) * outcomes.ndim + (-1,))


def _required(key: Key) -> Array:
    if key is None:
        raise ValueError("a teacher that draws what it writes needs a jax.random.key")
    return key
