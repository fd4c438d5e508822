"""The block behind fast weight layers, and its backward pass written by hand.

By hand, so that training differentiates it once instead of a derivative of a derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.types import Array

Params = dict[str, Any]


class Slow(NamedTuple):
    """The slow pass of a block.

    Attributes:
        states: its input ``[batch, time, width]``.
        up: ``[batch, time, 4 size]``, before the activation.
        hidden: ``[batch, time, 4 size]``, after it.
        unit: ``[batch, time, size]``, centred and divided by the deviation.
        deviation: ``[batch, time, 1]``.
        features: ``[batch, time, size]``, its output.
    """

    states: Array
    up: Array
    hidden: Array
    unit: Array
    deviation: Array
    features: Array


def init(width: int, size: int, key: Array, step_size: float = 0.01) -> Params:
    r"""Draws a block: Dense to 4 size, squared ReLU, Dense to size, LayerNorm; and step sizes.

    Kernels are drawn with variance one over their inputs, biases are zero.

    Args:
        width: of the body's final states.
        size: of the output; the unembedding's width.
        key: a PRNG key.
        step_size: where the learned step sizes begin.

    Returns:
        ``{"up", "down"}``, each ``{"kernel" [in, out], "bias"}``, ``"norm"`` ``{"scale", "bias"}``
        and ``"steps"`` ``{"up", "down", "norm"}``, scalars. All are slow weights.

    Example:
        >>> block = init(6, 4, jax.random.key(0))
        >>> block["up"]["kernel"].shape, float(block["steps"]["up"])
        ((6, 16), 0.009999999776482582)
    """
    first, second = jax.random.split(key)

    def dense(key: Array, rows: int, columns: int) -> Params:
        kernel = jax.random.normal(key, (rows, columns)) * rows**-0.5
        return {"kernel": kernel, "bias": jnp.zeros(columns)}

    return {
        "up": dense(first, width, 4 * size),
        "down": dense(second, 4 * size, size),
        "norm": {"scale": jnp.ones(size), "bias": jnp.zeros(size)},
        "steps": {name: jnp.full((), step_size) for name in ("up", "down", "norm")},
    }


def init_near_identity(width: int, key: Array, step_size: float = 0.01) -> Params:
    r"""Draws a block that begins as LayerNorm alone: for a body that is trained already.

    .. math:: (1 + h/4)_+^2 - (1 - h/4)_+^2 = h \quad\text{where } |h| \le 4

    Half of the hidden units are these pairs; the others are random and not yet read, so that fast
    weights have features to match positions by.

    Args:
        width: of the body's final states and of the output.
        key: a PRNG key.
        step_size: where the learned step sizes begin.

    Returns:
        As ``init``.

    Example:
        >>> block = init_near_identity(3, jax.random.key(0))
        >>> hidden = jnp.array([[1.0, -2.0, 0.5]]) @ block["up"]["kernel"] + block["up"]["bias"]
        >>> (jnp.maximum(hidden, 0) ** 2 @ block["down"]["kernel"]).tolist()
        [[1.0, -2.0, 0.5]]
    """
    params = init(width, width, key, step_size)
    pair = jnp.concatenate([jnp.eye(width), -jnp.eye(width)], 1)
    up, down = params["up"], params["down"]
    up["kernel"] = up["kernel"].at[:, : 2 * width].set(pair / 4)
    up["bias"] = up["bias"].at[: 2 * width].set(1)
    down["kernel"] = jnp.zeros_like(down["kernel"]).at[: 2 * width].set(pair.T)
    return params


class Learned(NamedTuple):
    """What each position teaches the block: gradients of its weights, one rank for each token.

    Attributes:
        states: ``[batch, time, width]``, keys of the first layer.
        up: ``[batch, time, 4 size]``, their values: the gradient before the activation.
        hidden: ``[batch, time, 4 size]``, keys of the second layer.
        down: ``[batch, time, size]``, their values: the gradient before the normalisation.
        scale: ``[batch, time, size]``, gradients of the normalisation's scale.
        bias: ``[batch, time, size]``, gradients of its bias, and so of the output.
    """

    states: Array
    up: Array
    hidden: Array
    down: Array
    scale: Array
    bias: Array


def dense(x: Array, layer: Params) -> Array:
    """``x W + b`` over the last axis, in the dtype of ``x``."""
    flat = x.reshape(-1, x.shape[-1]) @ layer["kernel"].astype(x.dtype)
    return (flat + layer["bias"].astype(x.dtype)[None]).reshape(*x.shape[:-1], -1)


def squared_relu(x: Array) -> Array:
    """The square of what is positive, and zero."""
    return jnp.square(jax.nn.relu(x))


def standardised(x: Array, eps: float) -> tuple[Array, Array]:
    """``x`` centred and divided by its deviation over the last axis; and the deviation."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred / deviation, deviation


def slow_pass(params: Params, states: Array, eps: float) -> Slow:
    """The block with its slow weights, as an ordinary layer.

    Args:
        params: of ``fast_weights.init``.
        states: ``[batch, time, width]``, at least float32.
        eps: added to the variance in the normalisation.

    Returns:
        Its output and what the backward pass reads.
    """
    up = dense(states, params["up"])
    hidden = squared_relu(up)
    unit, deviation = standardised(dense(hidden, params["down"]), eps)
    scale, bias = (
        params["norm"][each].astype(unit.dtype)[None, None] for each in ("scale", "bias")
    )
    return Slow(states, up, hidden, unit, deviation, unit * scale + bias)


def gradients(
    params: Params, slow: Slow, table: Array, labels: Array, weights: Array, scored: int | None
) -> Learned:
    r"""The gradient of each token's weighted loss in the block's weights, as keys and values.

    With :math:`u` the gradient in the features, :math:`n` the normalised output, :math:`D = u
    \gamma` and :math:`s` the deviation: :math:`g_2 = (D - \overline{D} - n \overline{D n}) / s` and
    :math:`g_1 = (g_2 W_2^\top) \, 2 \max(z_1, 0)`.

    Args:
        params: of ``fast_weights.init``.
        slow: of ``slow_pass``.
        table: the unembedding ``[vocab, size]``.
        labels: ``[batch, time]`` int.
        weights: ``[batch, time]``; a position of weight zero teaches nothing, whatever it holds.
        scored: tokens that are scored at a time; None: all at once.

    Returns:
        A ``Learned``.

    Source: Clark et al. (2022), section 3; the derivative of LayerNorm is standard.
    """
    counts = (weights != 0)[..., None]
    bias = unembedding_gradient(slow.features, table, labels, scored)
    bias = jnp.where(counts, bias * weights[..., None], 0)
    scaled = bias * params["norm"]["scale"].astype(bias.dtype)[None, None]
    along = (scaled * slow.unit).mean(-1, keepdims=True)
    down = (scaled - scaled.mean(-1, keepdims=True) - slow.unit * along) / slow.deviation
    kernel = params["down"]["kernel"].astype(down.dtype)
    up = jnp.einsum("bts,hs->bth", down, kernel) * (2 * jax.nn.relu(slow.up))
    learned = Learned(slow.states, up, slow.hidden, down, bias * slow.unit, bias)
    # Positions that teach nothing are no keys either: what stands at a pad may be NaN.
    return Learned(*(jnp.where(counts, each, 0) for each in learned))


def unembedding_gradient(features: Array, table: Array, labels: Array, scored: int | None) -> Array:
    r"""The gradient of each token's loss in its own features, :math:`p E - E_y`.

    Args:
        features: ``[..., size]``.
        table: the unembedding ``E``, ``[vocab, size]``.
        labels: ``[...]`` int.
        scored: tokens that are scored at a time; None: all at once.

    Returns:
        ``[..., size]``.

    Example:
        >>> table = jnp.array([[2.0], [4.0]])  # both are as likely at zero: the mean row is 3
        >>> unembedding_gradient(jnp.zeros((1, 1)), table, jnp.array([0]), None).tolist()
        [[1.0]]
    """
    size = features.shape[-1]
    table = table.astype(features.dtype)

    # Its scores are made again for a derivative: they are the largest arrays there are.
    @jax.checkpoint
    def part(table: Array, flat: Array, labels: Array) -> Array:
        masses = flat @ table.T
        masses = jnp.exp(masses - jax.lax.stop_gradient(masses).max(-1, keepdims=True))
        # Divided after the product, so that [tokens, vocab] is written once.
        mean = (masses @ table) / masses.sum(-1, keepdims=True)
        return mean - jnp.take(table, labels, axis=0, mode="clip")

    flat, labels = features.reshape(-1, size), labels.reshape(-1)
    count = flat.shape[0]
    if scored is None or scored >= count:
        return part(table, flat, labels).reshape(features.shape)
    flat = jnp.pad(flat, ((0, -count % scored), (0, 0))).reshape(-1, scored, size)
    labels = jnp.pad(labels, (0, -count % scored)).reshape(-1, scored)
    out = jax.lax.map(lambda each: part(table, *each), (flat, labels))
    return out.reshape(-1, size)[:count].reshape(features.shape)
