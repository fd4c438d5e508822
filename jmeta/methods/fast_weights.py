"""Fast weight layers: a block behind a causal model's body that learns from each token it reads.

Its weights at a position have taken one gradient step on all positions before, and no matrix of
fast weights is ever formed: the steps are a linear attention over the past.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array
from jmeta.methods.fast_weights_block import (
    Learned,
    Params,
    dense,
    gradients,
    init,
    init_near_identity,
    slow_pass,
    squared_relu,
    standardised,
)
from jmeta.methods.linear_attention import linear_attention

__all__ = [
    "FastWeights",
    "Memory",
    "features",
    "init",
    "init_memory",
    "init_near_identity",
    "learn",
    "loss",
    "next_tokens",
    "read",
    "segment",
    "slow_features",
    "token_losses",
]


class FastWeights(NamedTuple):
    """How a block of fast weights is computed; hashable, so it can be a static argument.

    Attributes:
        chunk: positions that attend to each other directly; those of earlier chunks are read from
            one matrix of sums. It decides the cost, never the numbers. A length that is no
            multiple is padded inside.
        reference: what the sum of the past gradients is divided by, a number of tokens: the steps
            then grow with what was read. None: the weight of the tokens read so far, so that they
            are a mean. Either way a sequence depends neither on others nor on its own future.
        first_order: take the inner gradients as constants when the block is trained.
        scored: tokens whose slow scores of the vocabulary exist at a time; None: all at once.
        eps: added to the variance in the normalisation.
    """

    chunk: int = 128
    reference: float | None = None
    first_order: bool = False
    scored: int | None = None
    eps: float = 1e-6


class Memory(NamedTuple):
    """What a block has learned from a document so far: sums of weighted gradients of its weights.

    Attributes:
        up: ``[batch, width, 4 size]``.
        down: ``[batch, 4 size, size]``.
        scale: ``[batch, size]``.
        bias: ``[batch, size]``.
        weight: ``[batch]``, the weight of the tokens read.
    """

    up: Array
    down: Array
    scale: Array
    bias: Array
    weight: Array


def init_memory(params: Params, batch: int) -> Memory:
    """The memory of a block that has read nothing.

    Args:
        params: what ``init`` returned.
        batch: number of sequences.

    Returns:
        Zeros, of the dtype of the parameters.

    Example:
        >>> init_memory(init(6, 4, jax.random.key(0)), 3).down.shape
        (3, 16, 4)
    """
    up, down, norm = params["up"]["kernel"], params["down"]["kernel"], params["norm"]
    shapes = up.shape, down.shape, norm["scale"].shape, norm["bias"].shape, ()
    dtype = at_least_float32(up.dtype)
    return Memory(*(jnp.zeros((batch, *shape), dtype) for shape in shapes))


def next_tokens(tokens: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """The label of each position, which is the token after it, and the weight of that.

    Args:
        tokens: ``[..., time]`` int.
        mask: ``[..., time]``, 1 for tokens, 0 for padding on the right; None: no padding.

    Returns:
        ``labels`` ``[..., time]`` and ``weights`` ``[..., time]``: 0 where no token follows.

    Example:
        >>> labels, weights = next_tokens(jnp.array([5, 6, 7, 0]), jnp.array([1, 1, 1, 0]))
        >>> labels.tolist(), weights.tolist()
        ([6, 7, 0, 0], [1.0, 1.0, 0.0, 0.0])
    """
    labels = jnp.concatenate([tokens[..., 1:], jnp.zeros_like(tokens[..., :1])], -1)
    kept = jnp.ones(tokens.shape, bool) if mask is None else mask != 0
    follows = jnp.concatenate([kept[..., 1:], jnp.zeros_like(kept[..., :1])], -1)
    return labels, (kept & follows).astype(jnp.float32)


def segment(
    config: FastWeights,
    params: Params,
    table: Array,
    memory: Memory,
    states: Array,
    labels: Array,
    weights: Array,
) -> tuple[Array, Memory]:
    r"""Reads a segment of each document: what the block says at each position, and what it learned.

    With the slow block's input :math:`a_i` and gradient :math:`g_i` at a Dense layer, weighted by
    :math:`w_i`, its fast weights at position :math:`t` and so its output are

    .. math::
        W^{(t)} = W - \frac{\eta}{Z_t} \sum_{i<t} a_i g_i^\top, \qquad
        \tilde a_t W^{(t)} + b = \tilde a_t W + b
            - \frac{\eta}{Z_t} \sum_{i<t} \langle \tilde a_t, a_i \rangle g_i

    with :math:`\tilde a_t` its input in the fast block. The gradients never leave the block.

    Args:
        config: how it is computed.
        params: what ``init`` returned.
        table: the unembedding ``[vocab, size]``, which is slow; the embedding, where it is tied.
        memory: of what came before, ``init_memory`` at the beginning of a document.
        states: the body's final states ``[batch, time, width]``.
        labels: ``[batch, time]`` int: the token after each position.
        weights: ``[batch, time]``: of the loss at each position, in what is learned. Where it is
            zero, the position learns nothing and its label may be anything.

    Returns:
        Features ``[batch, time, size]``, which ``table`` turns into scores, at least float32; and
        the memory after the segment.

    Raises:
        ValueError: shapes disagree, or the chunk or the reference is not positive.

    Source: Clark et al., "Meta-Learning Fast Weight Language Models" (2022), equations 1-4; chunks
    as in Hua et al., "Transformer Quality in Linear Time" (2022), section 3.2.
    """
    _check(config, params, table, states, labels, weights)
    dtype = memory.up.dtype
    states, weights = states.astype(dtype), weights.astype(dtype)
    slow = slow_pass(params, states, config.eps)
    learned = gradients(params, slow, table, labels, weights, config.scored)
    if config.first_order:
        learned = jax.lax.stop_gradient(learned)
    steps = _steps(config, params, memory.weight[:, None] + _before(weights))

    moved, up = linear_attention(states, learned.states, learned.up, memory.up, config.chunk)
    hidden = squared_relu(slow.up - steps["up"] * moved)
    moved, down = linear_attention(hidden, learned.hidden, learned.down, memory.down, config.chunk)
    out = dense(hidden, params["down"]) - steps["down"] * moved
    scale = memory.scale[:, None] + _before(learned.scale)
    bias = memory.bias[:, None] + _before(learned.bias)
    after = Memory(
        up,
        down,
        memory.scale + learned.scale.sum(1),
        memory.bias + learned.bias.sum(1),
        memory.weight + weights.sum(1),
    )
    return _normalised(config, params, out, steps["norm"] * scale, steps["norm"] * bias), after


def read(config: FastWeights, params: Params, memory: Memory, states: Array) -> Array:
    """What the block says at one position of each document, from what it has learned before.

    Args:
        config: how it is computed.
        params: what ``init`` returned.
        memory: of what came before.
        states: the body's final states ``[batch, width]``.

    Returns:
        Features ``[batch, size]``, at least float32.
    """
    states = states.astype(memory.up.dtype)
    steps = _steps(config, params, memory.weight)
    moved = jnp.einsum("bd,bdh->bh", states, memory.up)
    hidden = squared_relu(dense(states, params["up"]) - steps["up"] * moved)
    moved = jnp.einsum("bh,bhs->bs", hidden, memory.down)
    out = dense(hidden, params["down"]) - steps["down"] * moved
    norm = steps["norm"]
    return _normalised(config, params, out, norm * memory.scale, norm * memory.bias)


def learn(
    config: FastWeights,
    params: Params,
    table: Array,
    memory: Memory,
    states: Array,
    labels: Array,
    weights: Array,
) -> Memory:
    """The memory after one more position of each document.

    Args:
        config: how it is computed.
        params: what ``init`` returned.
        table: the unembedding ``[vocab, size]``.
        memory: of what came before.
        states: the body's final states ``[batch, width]``.
        labels: ``[batch]`` int: the token that followed.
        weights: ``[batch]``; 0 learns nothing.

    Returns:
        The new memory.
    """
    states, weights = states.astype(memory.up.dtype), weights.astype(memory.up.dtype)
    slow = slow_pass(params, states[:, None], config.eps)
    found = gradients(params, slow, table, labels[:, None], weights[:, None], None)
    each = Learned(*(x[:, 0] for x in found))
    return Memory(
        memory.up + each.states[:, :, None] * each.up[:, None],
        memory.down + each.hidden[:, :, None] * each.down[:, None],
        memory.scale + each.scale,
        memory.bias + each.bias,
        memory.weight + weights,
    )


def features(
    config: FastWeights,
    params: Params,
    table: Array,
    states: Array,
    labels: Array,
    weights: Array,
) -> Array:
    """What the block says at each position of whole documents; ``segment`` from an empty memory.

    Args:
        config: how it is computed.
        params: what ``init`` returned.
        table: the unembedding ``[vocab, size]``.
        states: the body's final states ``[batch, time, width]``.
        labels: ``[batch, time]`` int: the token after each position.
        weights: ``[batch, time]``.

    Returns:
        ``[batch, time, size]``, at least float32.

    Example:
        >>> block, table = init(6, 4, jax.random.key(0)), jnp.ones((9, 4))
        >>> labels, weights = next_tokens(jnp.arange(7)[None])
        >>> run = jax.jit(features, static_argnums=0)
        >>> run(FastWeights(), block, table, jnp.ones((1, 7, 6)), labels, weights).shape
        (1, 7, 4)
    """
    memory = init_memory(params, states.shape[0])
    return segment(config, params, table, memory, states, labels, weights)[0]


def slow_features(config: FastWeights, params: Params, states: Array) -> Array:
    """What the block says without its fast weights, as an ordinary layer.

    Args:
        config: only ``eps`` is read.
        params: what ``init`` returned.
        states: the body's final states ``[..., width]``.

    Returns:
        ``[..., size]``, at least float32.
    """
    dtype = at_least_float32(params["up"]["kernel"].dtype)
    flat = states.reshape(1, -1, states.shape[-1]).astype(dtype)
    return slow_pass(params, flat, config.eps).features.reshape(*states.shape[:-1], -1)


def token_losses(features: Array, table: Array, labels: Array) -> Array:
    """Negative log-likelihoods of labels, in nats.

    Args:
        features: ``[..., size]``.
        table: the unembedding ``[vocab, size]``.
        labels: ``[...]`` int.

    Returns:
        ``[...]``, at least float32.

    Example:
        >>> each = token_losses(jnp.zeros((2, 3)), jnp.ones((4, 3)), jnp.array([0, 1]))
        >>> print(each.round(4))  # log 4
        [1.3863 1.3863]
    """
    flat, table = features.reshape(-1, features.shape[-1]), table.astype(features.dtype)
    rows = jnp.take(table, labels.reshape(-1), axis=0, mode="clip")
    scores = flat @ table.T
    # The label's score is a product of rows, never picked out of [tokens, vocab].
    return (_logsumexp(scores) - (flat * rows).sum(-1)).reshape(labels.shape)


def loss(
    config: FastWeights,
    params: Params,
    table: Array,
    states: Array,
    labels: Array,
    weights: Array,
) -> tuple[Array, dict[str, Array]]:
    r"""The weighted mean loss of the fast block: its derivative goes through what it learned.

    .. math:: \frac{\sum_{b,t} w_{bt} \left(-\log p_{W^{(t)}}(y_{bt} \mid x_{bt})\right)}
        {\sum_{b,t} w_{bt}}

    Args:
        config: how it is computed; ``first_order`` decides what is differentiated.
        params: what ``init`` returned.
        table: the unembedding ``[vocab, size]``.
        states: the body's final states ``[batch, time, width]``.
        labels: ``[batch, time]`` int: the token after each position.
        weights: ``[batch, time]``: of each position, learned from and scored.

    Returns:
        The loss, a scalar, 0 if all weights are; and ``{"tokens": sum of the weights}``.

    Example:
        >>> block, table = init(6, 4, jax.random.key(0)), jnp.zeros((9, 4))
        >>> labels, weights = next_tokens(jnp.arange(7)[None])
        >>> run = jax.jit(loss, static_argnums=0)
        >>> value, aux = run(FastWeights(), block, table, jnp.ones((1, 7, 6)), labels, weights)
        >>> print(value.round(4), aux["tokens"])  # log 9
        2.1972 6.0
    """
    each = token_losses(features(config, params, table, states, labels, weights), table, labels)
    counts = weights.astype(each.dtype)
    total = counts.sum()
    return (each * counts).sum() / jnp.where(total == 0, 1, total), {"tokens": total}


def _check(
    config: FastWeights, params: Params, table: Array, states: Array, labels: Array, weights: Array
) -> None:
    width, size = params["up"]["kernel"].shape[0], params["down"]["kernel"].shape[1]
    if config.chunk < 1 or (config.scored is not None and config.scored < 1):
        raise ValueError(f"chunk={config.chunk} and scored={config.scored} must be at least 1")
    if config.reference is not None and not config.reference > 0:
        raise ValueError(
            f"reference={config.reference} divides the gradients: choose a number of tokens above "
            "0, or None for those read so far"
        )
    if states.ndim != 3 or states.shape[2] != width:
        raise ValueError(
            f"states have shape {states.shape}; the block takes [batch, time, {width}]"
        )
    if table.ndim != 2 or table.shape[1] != size:
        raise ValueError(
            f"the unembedding has shape {table.shape}; the block needs [vocab, {size}]"
        )
    for name, array in (("labels", labels), ("weights", weights)):
        if array.shape != states.shape[:2]:
            raise ValueError(f"{name} have shape {array.shape}, the states {states.shape}")


def _steps(config: FastWeights, params: Params, weight: Array) -> dict[str, Array]:
    """Step sizes over the normaliser, ``[..., 1]``, from the weight of the positions before."""
    total = jnp.where(weight == 0, 1, weight) if config.reference is None else config.reference
    return {
        name: (rate.astype(weight.dtype) / total * jnp.ones_like(weight))[..., None]
        for name, rate in params["steps"].items()
    }


def _before(x: Array) -> Array:
    """Sums over all positions before, ``[batch, time, ...]``."""
    sums = jnp.cumsum(x[:, :-1], axis=1)
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), sums], 1)


def _normalised(
    config: FastWeights, params: Params, out: Array, scale: Array, bias: Array
) -> Array:
    """LayerNorm with its scale and bias moved by a step against what was learned."""
    lead = (1,) * (out.ndim - 1)
    slow = (params["norm"][name].astype(out.dtype).reshape(*lead, -1) for name in ("scale", "bias"))
    gain, shift = (old - step for old, step in zip(slow, (scale, bias), strict=True))
    return standardised(out, config.eps)[0] * gain + shift


def _logsumexp(scores: Array) -> Array:
    shift = jax.lax.stop_gradient(scores).max(-1, keepdims=True)
    return jnp.log(jnp.exp(scores - shift).sum(-1)) + shift[..., 0]
