"""The learning-rate schedule that transformers of language are pre-trained with."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jmeta.core.types import Array


def inverse_sqrt(
    rate: float, warmup: int, *, power: float = -0.5, total: int | None = None
) -> optax.Schedule:
    r"""A linear warm-up, then a decay with a power of the step's number.

    .. math:: \eta(s) = \eta \, m(\max(s, w)) \min(s / w, 1), \qquad m(s) = a s^p + b

    with :math:`m(1) = 1`, and :math:`m(total) = 0` where a total is given; else :math:`a = 1`,
    :math:`b = 0`. The peak is :math:`\eta / \sqrt w`, not :math:`\eta`.

    Args:
        rate: :math:`\eta`.
        warmup: :math:`w`, steps until the peak; 0 for none.
        power: :math:`p`, below 0.
        total: the step at which the rate is zero; None: it decays for ever.

    Returns:
        An optax schedule: of a count of steps already taken, so that the first step is s = 1.

    Raises:
        ValueError: a negative warm-up, a power that does not decay, or a total within the warm-up.

    Example:
        >>> schedule = inverse_sqrt(0.08, 1000)
        >>> [round(float(schedule(s - 1)), 6) for s in (500, 1000, 4000)]
        [0.001265, 0.00253, 0.001265]

    Source: Shen (2021), the released code; Vaswani et al., "Attention Is All You Need" (2017),
    section 5.3, for the power of -1/2.
    """
    if warmup < 0 or power >= 0 or (total is not None and total <= max(warmup, 1)):
        raise ValueError(f"no such schedule: warmup={warmup}, power={power}, total={total}")
    scale = 1.0 if total is None else 1 / (1 - float(total) ** power)

    def schedule(count: Any) -> Array:
        step = jnp.asarray(count, float) + 1
        value = scale * jnp.maximum(step, max(warmup, 1)) ** power + (1 - scale)
        return rate * jnp.maximum(value, 0) * jnp.minimum(step / max(warmup, 1), 1)

    return schedule
