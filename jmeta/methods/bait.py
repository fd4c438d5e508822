"""BAIT: which examples to label, so that the Fisher information of all is best covered by theirs.

Greedily forward to more than are wanted, then backward; by rank-K updates of one inverse.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.types import Array


class Selection(NamedTuple):
    """What was chosen.

    Attributes:
        chosen: int ``[budget]``, in the order in which they were taken.
        objective: ``[1 + forward + backward]``, the trace at the start and after every step.
    """

    chosen: Array
    objective: Array


def point_factors(features: Array, probabilities: Array) -> Array:
    r"""Factors of the Fisher information of a linear classifier's weights, one for each point.

    .. math:: V_x^T V_x = \mathbb{E}_{y \sim p(y|x)} [g_y g_y^T], \qquad
        g_c = (p - e_c) \otimes h

    Args:
        features: ``[points, width]``.
        probabilities: ``[points, classes]``, the model's.

    Returns:
        ``[points, classes, classes * width]``: row c is :math:`\sqrt{p_c} g_c`.

    Example:
        >>> point_factors(jnp.ones((3, 2)), jnp.full((3, 4), 0.25)).shape
        (3, 4, 8)
    """
    points, classes = probabilities.shape
    slopes = probabilities[:, None] - jnp.eye(classes, dtype=probabilities.dtype)[None]
    rows = jnp.sqrt(probabilities)[..., None] * slopes
    return jnp.einsum("nkc,nd->nkcd", rows, features).reshape(points, classes, -1)


@functools.partial(jax.jit, static_argnames=("budget", "forward"))
def bait(
    factors: Array,
    budget: int,
    *,
    labelled: Array | None = None,
    penalty: float = 1.0,
    forward: int | None = None,
) -> Selection:
    r"""Choose points whose Fisher information covers that of all.

    .. math:: \min_S \mathrm{tr}\left(M_S^{-1} F\right), \qquad
        M_S = \lambda I + \frac{m}{m + B} M_0 + \frac{B}{m + B} \sum_{x \in S} V_x^T V_x

    F is the mean information of all points, labelled ones included, and :math:`M_0` that of the m
    labelled ones. A point takes

    .. math:: \mathrm{tr}\left(V M^{-1} F M^{-1} V^T (I + V M^{-1} V^T)^{-1}\right)

    off the trace, and its place in the inverse is an update of rank K (Woodbury); what is taken
    back has the signs of V's products turned. Where a factor is longer than there are rows in all,
    both live in the space of the rows, which is exact.

    Args:
        factors: ``[points, K, n]``. Anything whose square is a Fisher information will do: points
            (``point_factors``), or whole tasks.
        budget: B, how many to choose.
        labelled: ``[m, K, n]`` of what is labelled already.
        penalty: :math:`\lambda`.
        forward: how many are taken before some are taken back; default 2 B, or all there are.

    Returns:
        A ``Selection``.

    Raises:
        ValueError: the budget is no number of points, or fewer are taken than are wanted.

    Example:
        >>> points = jnp.eye(4)[:, None] * jnp.array([3.0, 1.0, 2.0, 0.1])[:, None, None]
        >>> sorted(bait(points, 2).chosen.tolist())
        [0, 2]

    Source: Ash et al., "Gone Fishing: Neural Active Learning with Fisher Embeddings" (2021), and
    its code, whose weights of the sums are the ones above.
    """
    count = factors.shape[0]
    taken = min(2 * budget, count) if forward is None else forward
    if not 0 < budget <= taken <= count:
        raise ValueError(
            f"a budget of {budget} of {count} points, {taken} taken before some are given back: "
            "choose 0 < budget <= forward <= points"
        )
    known = factors[:0] if labelled is None else labelled
    factors, known = _in_their_span(factors, known)
    size, dtype = factors.shape[-1], factors.dtype
    everything = jnp.concatenate([factors, known])
    information = _gram(everything) / everything.shape[0]
    share = budget / (known.shape[0] + budget)
    start = penalty * jnp.eye(size, dtype=dtype)
    if known.shape[0]:
        start = start + (1 - share) * _gram(known) / known.shape[0]
    inverse = jnp.linalg.inv(start)
    scaled = share**0.5 * factors
    eye = jnp.eye(factors.shape[1], dtype=dtype)

    def products(inverse: Array) -> tuple[Array, Array]:
        """``V M^-1 V^T`` and ``V M^-1 F M^-1 V^T`` of every point."""
        half = scaled @ inverse
        inside = jnp.einsum("nkd,nld->nkl", half, scaled)
        return inside, jnp.einsum("nkd,de,nle->nkl", half, information, half)

    def step(sign: float, inverse: Array, allowed: Array) -> tuple[Array, Array]:
        """Take (1) or give back (-1) the best point that is allowed."""
        inside, outside = products(inverse)
        change = jnp.trace(jnp.linalg.solve(eye[None] + sign * inside, outside), axis1=1, axis2=2)
        best = jnp.argmax(jnp.where(allowed, sign * change, -jnp.inf))
        v = scaled[best]
        rows = v @ inverse
        update = rows.T @ jnp.linalg.solve(eye + sign * inside[best], rows)
        inverse = inverse - sign * (update + update.T) / 2
        return best, inverse

    def trace(inverse: Array) -> Array:
        return (inverse * information).sum()

    def take(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        inverse, order = carry
        best, inverse = step(1.0, inverse, order < 0)
        order = order.at[best].set(jnp.max(order) + 1)
        return (inverse, order), (trace(inverse),)

    def give(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        inverse, order = carry
        best, inverse = step(-1.0, inverse, order >= 0)
        return (inverse, order.at[best].set(-1)), (trace(inverse),)

    begin = trace(inverse)
    carry = (inverse, jnp.full(count, -1))
    carry, (down,) = jax.lax.scan(take, carry, length=taken)
    (_, order), (up,) = jax.lax.scan(give, carry, length=taken - budget)
    chosen = jnp.argsort(jnp.where(order < 0, count, order))[:budget]
    return Selection(chosen, jnp.concatenate([begin[None], down, up]))


def _gram(factors: Array) -> Array:
    return jnp.einsum("nkd,nke->de", factors, factors)


def _in_their_span(factors: Array, known: Array) -> tuple[Array, Array]:
    """The factors in an orthonormal basis of all their rows, where that is shorter."""
    rows = jnp.concatenate([factors, known]).reshape(-1, factors.shape[-1])
    if rows.shape[0] >= rows.shape[1]:
        return factors, known
    coordinates = jnp.linalg.qr(rows.T, mode="r").T
    split = factors.shape[0] * factors.shape[1]
    shape = (-1, factors.shape[1], rows.shape[0])
    return coordinates[:split].reshape(shape), coordinates[split:].reshape(shape)
