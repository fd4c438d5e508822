"""What is subtracted from a score function's coefficients, so that it varies less."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jmeta.core.types import Array, PyTree


class Baseline(NamedTuple):
    """What is subtracted from coefficients: it must not depend on the draw it is subtracted for.

    Attributes:
        init: ``() -> state``.
        value: ``(state, coefficients [microbatches, ...]) -> (baseline, state)``, the baseline of
            a shape that broadcasts with the coefficients.
    """

    init: Callable[[], PyTree]
    value: Callable[[PyTree, Array], tuple[Array, PyTree]]


def no_baseline() -> Baseline:
    """Nothing is subtracted.

    Example:
        >>> float(no_baseline().value((), jnp.ones((2, 3)))[0].sum())
        0.0
    """
    return Baseline(lambda: (), lambda state, h: (jnp.zeros((1,) * h.ndim, h.dtype), state))


def moving_average(rate: float = 0.01) -> Baseline:
    r"""The exponential moving average of the coefficients of earlier outer steps.

    .. math:: b_s = \frac{\sum_{r<s} (1-\gamma)^{s-1-r} \bar h_r}{\sum_{r<s} (1-\gamma)^{s-1-r}}

    Args:
        rate: :math:`\gamma`, how much a new mean counts.

    Returns:
        A ``Baseline``; zero at the first step.

    Raises:
        ValueError: the rate is not in (0, 1].

    Example:
        >>> average = moving_average(0.5)
        >>> _, state = average.value(average.init(), jnp.array([3.0]))
        >>> float(average.value(state, jnp.array([9.0]))[0][0])  # of what came before
        3.0

    Source: Pham et al., "Meta Pseudo Labels" (2021), the released code, with the bias of the first
    steps divided out.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a moving average with the rate {rate} is none; it must be in (0, 1]")

    def value(state: tuple[Array, Array], h: Array) -> tuple[Array, tuple[Array, Array]]:
        total, weight = state
        mean = total / jnp.where(weight == 0, 1, weight)
        new = (
            (1 - rate) * total + rate * jnp.mean(h).astype(total.dtype),
            (1 - rate) * weight + rate,
        )
        return mean.astype(h.dtype).reshape((1,) * h.ndim), new

    return Baseline(lambda: (jnp.zeros(()), jnp.zeros(())), value)


def leave_one_out() -> Baseline:
    r"""The mean coefficient of the other micro-batches, which unroll from the same student.

    .. math:: b_i = \frac{1}{N - 1} \sum_{j \ne i} \bar h_j

    Returns:
        A ``Baseline``; it needs at least two micro-batches.

    Example:
        >>> leave_one_out().value((), jnp.array([[1.0], [2.0], [6.0]]))[0].ravel().tolist()
        [4.0, 3.5, 1.5]

    Source: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019).
    """

    def value(state: PyTree, h: Array) -> tuple[Array, PyTree]:
        if h.shape[0] < 2:
            raise ValueError("leave_one_out compares micro-batches: it needs at least two of them")
        means = h.reshape(h.shape[0], -1).mean(1)
        others = (means.sum() - means) / (h.shape[0] - 1)
        return others.reshape((-1,) + (1,) * (h.ndim - 1)), state

    return Baseline(lambda: (), value)
