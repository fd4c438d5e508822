"""The smallest parts of a network: linear layers, layer normalisation, GELU.

Every derivative of every order exists in all of them, unless a linear layer has a tap.
"""

from __future__ import annotations

from typing import Any

import jax

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array
from jmeta.models import taps

Params = dict[str, Any]


def linear(x: Array, layer: Array | Params) -> Array:
    r"""A linear layer as one matmul of matrices, in the dtype of ``x``.

    .. math:: y = x W + b + (x A) B

    Args:
        x: ``[..., in]``.
        layer: the kernel ``[in, out]``, or a dict of ``kernel`` and, as far as there, ``bias``
            ``[out]`` and the low-rank factors ``a`` ``[in, rank]`` and ``b`` ``[rank, out]``,
            which are never multiplied out: no gradient has the kernel's shape for their sake.
            ``squares`` ``[out]`` is a tap of ``jmeta.models.taps``: the first axis of ``x`` are
            then examples.

    Returns:
        ``[..., out]``.
    """
    parts = layer if isinstance(layer, dict) else {"kernel": layer}
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ parts["kernel"].astype(x.dtype)
    if "a" in parts:
        y = y + (flat @ parts["a"].astype(x.dtype)) @ parts["b"].astype(x.dtype)
    if "bias" in parts:
        y = y + parts["bias"].astype(x.dtype)[None]
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return taps.tap(x, y, parts["squares"]) if "squares" in parts else y


def layer_norm(x: Array, weights: Params, eps: float) -> Array:
    """Layer normalisation over the last axis, in at least float32.

    Args:
        x: ``[..., width]``.
        weights: ``{"scale", "bias"}``, both ``[width]``.
        eps: added to the variance.

    Returns:
        The shape and dtype of ``x``.
    """
    exact = x.astype(at_least_float32(x.dtype))
    centred = exact - exact.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    gain, bias = (
        weights[name].astype(exact.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        for name in ("scale", "bias")
    )
    return (centred * scale * gain + bias).astype(x.dtype)


def gelu(x: Array, kind: str) -> Array:
    """The Gaussian error linear unit, ``"exact"`` or by its ``"tanh"`` approximation."""
    return jax.nn.gelu(x, approximate=kind == "tanh")
