"""Samplers of objectives that follow a rule: uniform, a fixed mix, in turns, annealed, by loss."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.types import Array, PyTree
from jmeta.methods.objective_sampler import Sampler, SamplerState, Window, sampler


def uniform_mix(objectives: int) -> Sampler:
    """Every objective is as likely as any.

    Args:
        objectives: how many there are.

    Returns:
        A ``Sampler``.

    Example:
        >>> uniform_mix(4).probabilities(uniform_mix(4).init()).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return fixed_mix([1.0] * objectives)


def fixed_mix(weights: Sequence[float]) -> Sampler:
    """Objectives in fixed proportions.

    Args:
        weights: of each objective; they need not sum to one.

    Returns:
        A ``Sampler``.

    Raises:
        ValueError: a weight is negative or not finite, or all are zero.

    Example:
        >>> mix = fixed_mix([3, 1])
        >>> mix.probabilities(mix.init()).tolist()
        [0.75, 0.25]
    """
    shares = _shares(weights)
    return sampler(len(shares), lambda: (), lambda state: jnp.asarray(shares, float), _nothing)


def round_robin(objectives: int) -> Sampler:
    """Objectives in turns: 0, 1, ..., 0, 1, ...

    Args:
        objectives: how many there are.

    Returns:
        A ``Sampler``; each draw is certain.

    Example:
        >>> turns = round_robin(2)
        >>> turns.probabilities(turns.init()._replace(step=jnp.int32(3))).tolist()
        [0.0, 1.0]
    """

    def probabilities(state: SamplerState) -> Array:
        return jax.nn.one_hot(state.step % objectives, objectives, dtype=state.losses.dtype)

    return sampler(objectives, lambda: (), probabilities, _nothing)


def annealed_mix(start: Sequence[float], end: Sequence[float], steps: int) -> Sampler:
    r"""From one mix to another, a little at every draw.

    .. math:: p_t = (1 - \alpha_t) p_{start} + \alpha_t p_{end}, \qquad \alpha_t = \min(t / T, 1)

    Args:
        start: weights at the first draw.
        end: weights from draw ``steps`` on.
        steps: :math:`T`.

    Returns:
        A ``Sampler``.

    Raises:
        ValueError: weights that are none or not as many, or no steps.

    Example:
        >>> mix = annealed_mix([1, 0], [0, 1], steps=4)
        >>> mix.probabilities(mix.init()._replace(step=jnp.int32(1))).tolist()
        [0.75, 0.25]
    """
    first, last = _shares(start), _shares(end)
    if len(first) != len(last) or steps < 1:
        raise ValueError(
            f"{len(first)} weights at the start, {len(last)} at the end, {steps} steps between: "
            "give as many of both, and at least one step"
        )

    def probabilities(state: SamplerState) -> Array:
        share = jnp.minimum(state.step.astype(state.losses.dtype) / steps, 1)
        return (1 - share) * jnp.asarray(first, float) + share * jnp.asarray(last, float)

    return sampler(len(first), lambda: (), probabilities, _nothing)


def loss_proportional(objectives: int) -> Sampler:
    r"""Objectives in proportion to their last measured loss; uniform until one was measured.

    .. math:: p_k = l_k / \sum_j l_j

    Args:
        objectives: how many there are.

    Returns:
        A ``Sampler``; a loss below zero counts as zero.

    Example:
        >>> mix = loss_proportional(2)
        >>> mix.probabilities(mix.update(mix.init(), jnp.zeros(2), jnp.array([3.0, 1.0]))).tolist()
        [0.75, 0.25]
    """

    def probabilities(state: SamplerState) -> Array:
        losses = jnp.maximum(state.losses, 0)
        total = losses.sum()
        known = total > 0
        return jnp.where(known, losses / jnp.where(known, total, 1), 1 / objectives)

    return sampler(objectives, lambda: (), probabilities, _nothing)


def _nothing(memory: PyTree, window: Window) -> PyTree:
    """A rule learns nothing."""
    del window
    return memory


def _shares(weights: Sequence[float]) -> np.ndarray:
    found = np.asarray(weights, np.float64)
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any() or not found.sum() > 0:
        raise ValueError(f"weights={weights} are no mix: give numbers >= 0, not all of them 0")
    return found / found.sum()
