"""Where to mask, apart from how much: log-odds shifted until a given share of positions is masked.

A teacher judged one step ahead may stop masking; within a budget it can choose the places alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array

_HALVINGS = 60  # of the bracket around the shift: float64 has no closer one


def within_budget(odds: Array, counts: Array, share: float) -> Array:
    r"""Log-odds whose probabilities have a given mean over the positions of each example.

    .. math:: o_i + c(o), \qquad
        \frac{\sum_i m_i\, \sigma(o_i + c)}{\sum_i m_i} = \rho

    The shift :math:`c` exists and is unique; it is bracketed by
    :math:`\mathrm{logit}(\rho) - \max_i o_i` and :math:`\mathrm{logit}(\rho) - \min_i o_i`, and
    differentiated as what the equation defines, exactly up to the third order:
    :math:`\partial c / \partial o_j = -m_j \sigma'_j / \sum_i m_i \sigma'_i`. What is the same for
    all positions of an example changes nothing.

    Args:
        odds: ``[..., time]`` float, finite.
        counts: ``[..., time]``, 1 at the positions that may be masked and 0 elsewhere; an example
            without any is shifted by a finite constant.
        share: :math:`\rho`, between 0 and 1.

    Returns:
        ``[..., time]``.

    Raises:
        ValueError: ``share`` is not between 0 and 1.

    Example:
        >>> odds = jnp.array([[0.0, 3.0, -1.0, 9.0]])
        >>> p = jax.nn.sigmoid(within_budget(odds, jnp.array([[1, 1, 1, 0]]), 0.5))
        >>> print(p[0, :3].mean().round(4), p.argmax())
        0.5 3
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} is no share of positions between 0 and 1")
    dtype = jnp.result_type(odds)
    odds = jnp.asarray(odds, at_least_float32(dtype))
    weights = jax.lax.stop_gradient(jnp.asarray(counts, odds.dtype))
    middle = math.log(share / (1 - share))

    def excess(odds: Array, shift: Array) -> Array:
        return (weights * (jax.nn.sigmoid(odds + shift[..., None]) - share)).sum(-1)

    shift = _bisected(excess, jax.lax.stop_gradient(odds), weights > 0, middle)
    # A step of Newton's method from the root changes no value, so it is taken in the derivatives
    # alone; each doubles the order up to which they are exact.
    for _ in range(2):
        p = jax.nn.sigmoid(odds + shift[..., None])
        slope = (weights * p * (1 - p)).sum(-1)
        missed = excess(odds, shift)
        missed = missed - jax.lax.stop_gradient(missed)
        # No slope is left where every probability is 0 or 1, and nothing depends on anything.
        shift = shift - missed / jnp.where(slope > 0, slope, 1)
    return (odds + shift[..., None]).astype(dtype)


def _bisected(
    excess: Callable[[Array, Array], Array], odds: Array, among: Array, middle: float
) -> Array:
    """The shift at which nothing is in excess, between those at which surely all or none is."""
    low = middle - jnp.where(among, odds, -jnp.inf).max(-1)
    high = middle - jnp.where(among, odds, jnp.inf).min(-1)
    some = among.any(-1)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        at = (low + high) / 2
        below = excess(odds, at) < 0
        return jnp.where(below, at, low), jnp.where(below, high, at)

    bracket = jnp.where(some, low, 0), jnp.where(some, high, 0)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, bracket)
    return (low + high) / 2
