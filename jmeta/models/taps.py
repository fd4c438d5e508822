"""Taps: squared gradients of linear layers, example by example, without any weight's gradient.

A tap is an extra leaf of a layer's parameters, whose "gradient" is that sum of squares.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32, matches
from jmeta.core.types import Array, PyTree

LINEAR = ("blocks.attn.*", "blocks.mlp.*")
"""The linear layers of every transformer here, as path globs."""


def row_squares(x: Array, dy: Array) -> Array:
    r"""Squares of each example's gradient of a linear layer, averaged over its inputs.

    .. math:: s_o = \frac{1}{d_{in}} \sum_b \sum_i (X_b^T D_b)_{io}^2
        = \frac{1}{d_{in}} \sum_b \left(D_b^T X_b X_b^T D_b\right)_{oo}

    By the Gram matrix of an example's positions no ``[in, out]`` array exists; where an example has
    so many positions that this costs more, one example's gradient exists at a time.

    Args:
        x: inputs ``[examples, ..., in]``; the axes between are positions.
        dy: cotangents of the outputs, ``[examples, ..., out]``.

    Returns:
        ``[out]``, at least float32: the sum over examples.

    Example:
        >>> x, dy = jnp.ones((3, 2, 4)), jnp.ones((3, 2, 5))  # each gradient is 2 everywhere
        >>> row_squares(x, dy).tolist()
        [12.0, 12.0, 12.0, 12.0, 12.0]
    """
    wide = at_least_float32(x.dtype)
    size, inputs, outputs = x.shape[0], x.shape[-1], dy.shape[-1]
    x, dy = (a.astype(wide).reshape(size, -1, a.shape[-1]) for a in (x, dy))
    positions = x.shape[1]
    if positions == 1:
        return ((x * x).mean(-1) * dy[:, 0] ** 2).sum(0)
    if positions * (inputs + outputs) <= inputs * outputs:
        gram = jnp.einsum("bti,bsi->bts", x, x)
        return (dy * jnp.einsum("bts,bso->bto", gram, dy)).sum((0, 1)) / inputs

    def add(total: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
        return total + jnp.square(each[0].T @ each[1]).mean(0), None

    return jax.lax.scan(add, jnp.zeros(outputs, wide), (x, dy))[0]


@jax.custom_vjp
def _tapped(x: Array, y: Array, squares: Array) -> Array:
    del x, squares
    return y


def _forwards(x: Array, y: Array, squares: Array) -> tuple[Array, tuple[Array, Array]]:
    return y, (x, squares)


def _backwards(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    x, squares = kept
    return jnp.zeros_like(x), dy, row_squares(x, dy).astype(squares.dtype)


_tapped.defvjp(_forwards, _backwards)


def tap(x: Array, y: Array, squares: Array) -> Array:
    """Outputs as they are; their cotangents leave ``row_squares`` as the gradient of ``squares``.

    Args:
        x: inputs of a linear layer, ``[examples, ..., in]``.
        y: its outputs ``[examples, ..., out]``.
        squares: ``[out]``; its values are never read.

    Returns:
        ``y``. It has one derivative, in reverse mode: the tap's is a sum of squares, and not the
        derivative of anything.

    Example:
        >>> x, kernel = jnp.ones((3, 2, 4)), jnp.ones((4, 5))
        >>> jax.grad(lambda s: tap(x, x @ kernel, s).sum())(jnp.zeros(5)).tolist()
        [12.0, 12.0, 12.0, 12.0, 12.0]
    """
    return _tapped(jax.lax.stop_gradient(x), y, squares)


def taps(params: PyTree, *globs: str) -> PyTree:
    """Zeros for the linear layers that are to be tapped; ``insert`` puts them where they are read.

    Args:
        params: nested dicts. A linear layer is an array ``[..., in, out]``, or a dict that has one
            as ``"kernel"``.
        *globs: path globs of layers, such as ``"blocks.mlp.*"``; default: ``LINEAR``.

    Returns:
        Nested dicts of the layers that match, each ``[..., out]``, at least float32.

    Raises:
        ValueError: a glob matches no layer.

    Example:
        >>> layer = {"kernel": jnp.ones((2, 3, 5)), "bias": jnp.ones((2, 5))}
        >>> taps({"blocks": {"attn": {"out": layer}}}, "blocks.**")["blocks"]["attn"]["out"].shape
        (2, 5)
    """
    globs = globs or LINEAR
    found: set[str] = set()

    def walk(node: Any, path: tuple[str, ...]) -> PyTree:
        kernel: Any = node.get("kernel") if isinstance(node, dict) else node
        hit = {glob for glob in globs if matches(".".join(path), glob)}
        if hit and getattr(kernel, "ndim", 0) >= 2:
            found.update(hit)
            wide = at_least_float32(kernel.dtype)
            return jnp.zeros((*kernel.shape[:-2], kernel.shape[-1]), wide)
        if not isinstance(node, dict):
            return None
        parts = {name: walk(child, (*path, name)) for name, child in node.items()}
        return {name: part for name, part in parts.items() if part is not None} or None

    made = walk(params, ())
    if missing := [glob for glob in globs if glob not in found]:
        raise ValueError(f"no linear layer matches {', '.join(map(repr, missing))}")
    return made


def insert(params: PyTree, squares: PyTree) -> PyTree:
    """Parameters with taps in their linear layers.

    Args:
        params: as given to ``taps``.
        squares: what ``taps`` returned.

    Returns:
        ``params``, in which tapped layers are dicts with ``"squares"``. A network computes what it
        did; its gradient with respect to ``squares`` are the sums of squares.

    Example:
        >>> params = {"up": jnp.ones((3, 5))}
        >>> sorted(insert(params, taps(params, "up"))["up"])
        ['kernel', 'squares']
    """
    if not isinstance(squares, dict):
        layer = params if isinstance(params, dict) else {"kernel": params}
        return {**layer, "squares": squares}
    return {**params, **{name: insert(params[name], part) for name, part in squares.items()}}
