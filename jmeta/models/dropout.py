"""Dropout that draws half of the random bits: what it costs is mostly to draw them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key

_HALF = 2**16  # as many values has a half of a random word


def dropout(x: Array, rate: float, key: Key) -> Array:
    """Inverted dropout; without a key, or at rate 0, the identity.

    An entry is decided by 16 random bits, half of what ``jax.random.bernoulli`` draws for it, as
    drawing them is what dropout costs: the rate is rounded to 65,536ths, of which at most 65,535
    are dropped, and what stays is divided by just the share that stays, which keeps the mean.

    Args:
        x: ``[..., n]``.
        rate: the share of entries that become zero, in [0, 1).
        key: a random key, or None.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: the rate is not in [0, 1).

    Example:
        >>> kept = dropout(jnp.ones((1000, 3)), 0.25, jax.random.key(0))
        >>> sorted(set(kept.ravel().tolist()))
        [0.0, 1.3333333730697632]
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate of {rate} is not in [0, 1)")
    if key is None or rate == 0:
        return x
    cut = min(round(rate * _HALF), _HALF - 1)
    # Both halves of a word along the last axis, which keeps how the others are sharded.
    words = jax.random.bits(key, (*x.shape[:-1], (x.shape[-1] + 1) // 2), jnp.uint32)
    halves = jnp.concatenate([words % _HALF, words // _HALF], axis=-1)[..., : x.shape[-1]]
    return jnp.where(halves >= cut, x / (1 - cut / _HALF), 0)
