"""A multilayer perceptron, as pure functions over a nested dict of arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.types import Array

Params = dict[str, dict[str, Any]]


def init(key: Array, sizes: Sequence[int]) -> Params:
    """Draws He-normal weights (He et al. 2015, arXiv 1502.01852, equation 10) and zero biases.

    Args:
        key: a PRNG key.
        sizes: widths of the input, of the hidden layers and of the output.

    Returns:
        ``{"layer0": {"kernel" [sizes[0], sizes[1]], "bias" [sizes[1]]}, "layer1": ...}``.

    Raises:
        ValueError: fewer than two sizes.

    Example:
        >>> params = init(jax.random.key(0), [2, 40, 1])
        >>> apply(params, jnp.ones((7, 2))).shape
        (7, 1)
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes={list(sizes)}: an MLP needs an input width and an output width")
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(keys[i], (fan_in, fan_out)) * (2 / fan_in) ** 0.5,
            "bias": jnp.zeros(fan_out),
        }
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes))
    }


def apply(params: Params, x: Array, activation: Callable[[Array], Array] = jax.nn.relu) -> Array:
    """The network's output; ``activation`` follows every layer but the last.

    Args:
        params: what ``init`` returned.
        x: ``[..., sizes[0]]``.
        activation: an elementwise function.

    Returns:
        ``[..., sizes[-1]]``.
    """
    flat = x.reshape(-1, x.shape[-1])
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        flat = flat @ layer["kernel"] + layer["bias"][None]
        if i < len(params) - 1:
            flat = activation(flat)
    return flat.reshape(*x.shape[:-1], flat.shape[-1])
