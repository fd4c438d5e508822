"""A pre-norm transformer, causal or bidirectional, as pure functions over nested dicts of arrays.

Layers are stacked on a leading axis, so that they can be looped over or scanned; every
derivative of every order exists in both modes (there is no ``custom_vjp`` anywhere).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jmeta.core.types import Array, Key

Params = dict[str, Any]

SCAN_FROM = 8  # layers: from here the compile time of a Python loop costs more than it saves
MASKED = -1e30  # a score that softmax sends to exactly zero, finite so that no derivative is NaN

_CHOICES = {
    "loop": (None, "scan", "unroll"),
    "remat": ("none", "dots", "hidden", "full"),
    "attention": ("xla", "fused"),
    "gelu": ("tanh", "exact"),
}


class TransformerConfig(NamedTuple):
    """The shape of a transformer and how it is computed; hashable, so it can be a static argument.

    Attributes:
        vocab: number of tokens.
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads; divides ``width``.
        max_len: number of learned positions, the longest sequence accepted.
        ff: width of the hidden layer of the MLP; None: ``4 * width``.
        causal: True: a position sees itself and the past (a decoder); False: it sees every
            position that the padding mask allows (an encoder).
        loop: ``"unroll"``: a Python loop over the layers, fastest at run time; ``"scan"``: one
            compiled block, whatever the depth; None: unroll below 8 layers, scan from there.
        remat: what the backward pass recomputes in each branch of a block: ``"none"``; all but
            the ``"dots"`` (weight matmuls) or the MLP's ``"hidden"`` layer; or ``"full"``. On a
            CPU XLA undoes it for unrolled layers, so use ``loop="scan"`` with it.
        attention: ``"xla"``: batched matmuls, differentiable to any order; ``"fused"``:
            ``jax.nn.dot_product_attention``, whose implementation jax chooses by platform. On
            CPU that is again plain XLA; on a GPU cuDNN's kernel has no second derivative, so keep
            it out of inner losses (it is for ``Problem.encode`` and for first-order training).
        dropout: probability of zeroing, at the embeddings and at both branches of every block;
            active only where a key is passed.
        gelu: ``"tanh"``: the approximation of GPT-2; ``"exact"``: with the error function.
        dtype: what blocks are computed in, such as ``jnp.bfloat16``; None: the dtype of the
            parameters. Parameters keep their own dtype and are cast inside; normalisation,
            softmax, logits and losses are at least float32.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    max_len: int
    ff: int | None = None
    causal: bool = True
    loop: Literal["scan", "unroll"] | None = None
    remat: Literal["none", "dots", "hidden", "full"] = "none"
    attention: Literal["xla", "fused"] = "xla"
    dropout: float = 0.0
    gelu: Literal["tanh", "exact"] = "tanh"
    dtype: Any = None


def init(config: TransformerConfig, key: Array) -> Params:
    """Draws parameters as GPT-2 does: N(0, 0.02), residual projections over sqrt(2 layers).

    Linear layers have no biases, normalisations have; the unembedding is the embedding.

    Args:
        config: the shape of the model.
        key: a PRNG key.

    Returns:
        ``{"embed": {"tokens", "positions"}, "blocks": {...}, "ln_f"}`` in the default float, with
        blocks ``{"ln1", "attn": {"qkv", "out"}, "ln2", "mlp": {"up", "down"}}`` stacked on a
        leading ``[layers]`` axis, kernels ``[in, out]``, and each ``ln`` ``{"scale", "bias"}``.
        The columns of ``qkv`` are ordered query, key, value, and heads within each.

    Raises:
        ValueError: a field of the config has no meaning.

    Example:
        >>> config = TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = init(config, jax.random.key(0))
        >>> params["blocks"]["attn"]["qkv"].shape
        (2, 8, 24)
    """
    _check(config)
    layers, width = config.layers, config.width
    ff = config.ff or 4 * width
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int, std: float = 0.02) -> Array:
        return std * jax.random.normal(next(keys), shape)

    def norm(*shape: int) -> Params:
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    residual = 0.02 / (2 * layers) ** 0.5
    return {
        "embed": {
            "tokens": normal(config.vocab, width),
            "positions": normal(config.max_len, width),
        },
        "blocks": {
            "ln1": norm(layers, width),
            "attn": {
                "qkv": normal(layers, width, 3 * width),
                "out": normal(layers, width, width, std=residual),
            },
            "ln2": norm(layers, width),
            "mlp": {
                "up": normal(layers, width, ff),
                "down": normal(layers, ff, width, std=residual),
            },
        },
        "ln_f": norm(width),
    }


def hidden(
    config: TransformerConfig,
    params: Params,
    tokens: Array,
    mask: Array | None = None,
    key: Key = None,
) -> Array:
    """The final hidden states, normalised.

    Args:
        config: the shape of the model.
        params: what ``init`` returned.
        tokens: ``[..., time]`` int; any number of leading axes.
        mask: ``[..., time]``, 1 for tokens and 0 for padding, which no position then attends to.
            What is returned at a padded position means nothing.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, width]`` in the compute dtype.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or shapes disagree.
    """
    rows = jnp.take(params["embed"]["tokens"], tokens, axis=0, mode="clip")
    return _trunk(config, params, rows, mask, key)


def logits(
    config: TransformerConfig,
    params: Params,
    tokens: Array,
    mask: Array | None = None,
    key: Key = None,
) -> Array:
    """Scores of the vocabulary at every position, through the transposed embedding.

    For a loss prefer `next_token_loss`, which is faster.

    Args:
        config: the shape of the model.
        params: what ``init`` returned.
        tokens: ``[..., time]`` int.
        mask: ``[..., time]``, 1 for tokens, 0 for padding.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, vocab]``, at least float32.
    """
    states = hidden(config, params, tokens, mask, key)
    table = params["embed"]["tokens"]
    flat = states.reshape(-1, config.width)
    return _unembed(flat, table).reshape(*tokens.shape, table.shape[0])


def pooled(
    config: TransformerConfig,
    params: Params,
    tokens: Array,
    mask: Array | None = None,
    key: Key = None,
) -> Array:
    """One vector per sequence: the mean of the final hidden states over its tokens.

    Args:
        config: the shape of the model.
        params: what ``init`` returned.
        tokens: ``[..., time]`` int.
        mask: ``[..., time]``, 1 for tokens, 0 for padding; None: every position counts. The
            vector of a sequence without tokens is zero.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., width]``, at least float32.
    """
    states = hidden(config, params, tokens, mask, key)
    states = states.astype(_accumulate(states.dtype))
    if mask is None:
        return states.mean(-2)
    # where, not multiplication: a sequence without tokens may hold anything at its positions.
    keep = (mask != 0)[..., None]
    total = jnp.where(keep, states, 0).sum(-2)
    return total / jnp.maximum(keep.sum(-2), 1).astype(states.dtype)


def next_token_loss(
    config: TransformerConfig,
    params: Params,
    tokens: Array,
    weights: Array | None = None,
    key: Key = None,
    mask: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    r"""Weighted mean negative log-likelihood of each token given those before it.

    .. math::
        L = \frac{\sum_{b,t \ge 1} w_{bt} \left(\log \sum_v e^{h_{b,t-1} \cdot E_v}
            - h_{b,t-1} \cdot E_{x_{bt}}\right)}{\sum_{b,t \ge 1} w_{bt}}

    Nothing but the logits has ``[tokens, vocab]`` entries: the logit of the target is the product
    of the state and its embedding row, never picked out of a log-softmax.

    Args:
        config: the shape of the model; ``causal`` must be True.
        params: what ``init`` returned.
        tokens: ``[..., time]`` int.
        weights: ``[..., time]``: the weight of each token *as a target*; the first of a sequence
            has no past and is never one. None: ``mask``, or 1 everywhere. If all weights are
            zero, so is the loss.
        key: drives dropout; None is deterministic.
        mask: ``[..., time]``, 1 for tokens, 0 for padding, which is then not attended to; padding
            on the right needs zero weights only.

    Returns:
        The loss, a scalar of at least float32, and ``{"tokens": sum of weights}``.

    Raises:
        ValueError: the model is not causal, or shapes disagree.
    """
    if not config.causal:
        raise ValueError(
            "next_token_loss needs causal=True: with causal=False every position sees its target"
        )
    if weights is None:
        weights = mask
    elif weights.shape != tokens.shape:
        raise ValueError(f"weights have shape {weights.shape}, tokens {tokens.shape}")
    table = params["embed"]["tokens"]
    # One gather serves inputs and targets, so one scatter-add serves their gradients.
    rows = jnp.take(table, tokens, axis=0, mode="clip")
    states = _trunk(config, params, rows, mask, key)
    exact = _accumulate(states.dtype)
    # The last position, without a target, is kept with weight zero: round shapes multiply faster.
    targets = jnp.roll(rows, -1, axis=-2).astype(states.dtype).astype(exact)
    flat = states.reshape(-1, config.width)
    picked = (flat.astype(exact) * targets.reshape(-1, config.width)).sum(-1)
    losses = _logsumexp(_unembed(flat, table)) - picked
    counts = jnp.ones(tokens.shape, exact) if weights is None else weights.astype(exact)
    counts = jnp.concatenate([counts[..., 1:], jnp.zeros_like(counts[..., :1])], -1).reshape(-1)
    total = counts.sum()
    loss = (losses * counts).sum() / jnp.where(total == 0, 1, total)
    return loss, {"tokens": total}


def _check(config: TransformerConfig) -> None:
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}; choose one of {allowed}")
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is not a multiple of heads {config.heads}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout={config.dropout} is not in [0, 1)")


def _accumulate(dtype: Any) -> Any:
    """Float32 for anything narrower, else the dtype itself."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def _trunk(
    config: TransformerConfig, params: Params, rows: Array, mask: Array | None, key: Key
) -> Array:
    """Final hidden states ``[..., time, width]`` from embedding rows of that shape."""
    _check(config)
    lead, (time, width) = rows.shape[:-2], rows.shape[-2:]
    if time > config.max_len:
        raise ValueError(f"{time} tokens, but the model has max_len={config.max_len} positions")
    if width != config.width:
        raise ValueError(f"embeddings have width {width}, the config says {config.width}")
    if mask is not None and mask.shape != rows.shape[:-1]:
        raise ValueError(f"mask has shape {mask.shape}, tokens {rows.shape[:-1]}")
    x = rows.reshape(-1, time, width)
    x = x + jax.lax.slice_in_dim(params["embed"]["positions"], 0, time)[None]
    x = x.astype(x.dtype if config.dtype is None else config.dtype)
    keys = None
    if key is not None and config.dropout > 0:
        first, rest = jax.random.split(key)
        keys = jax.random.split(rest, config.layers)
        x = _dropout(x, config.dropout, first)
    allowed = _allowed(config, mask, time)
    block = functools.partial(_block, config, allowed)
    x = _over_layers(config, block, x, params["blocks"], keys)
    return _layer_norm(x, params["ln_f"]).reshape(*lead, time, width)


def _over_layers(
    config: TransformerConfig, block: Callable, x: Array, blocks: Params, keys: Key
) -> Array:
    if _loop(config) == "scan":
        return jax.lax.scan(lambda x, layer: (block(x, *layer), None), x, (blocks, keys))[0]
    # split, not indexing: its transpose is one concatenation, while the transpose of each x[i] is
    # a scatter or a pad into zeros of the size of the whole stack, summed over the layers.
    pieces = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * config.layers), blocks)
    for i in range(config.layers):
        layer = jax.tree.map(lambda _, split, i=i: split[i].squeeze(0), blocks, pieces)
        x = block(x, layer, None if keys is None else keys[i])
    return x


def _loop(config: TransformerConfig) -> str:
    return config.loop or ("unroll" if config.layers < SCAN_FROM else "scan")


def _rematerialised(branch: Callable, config: TransformerConfig) -> Callable:
    if config.remat == "none":
        return branch
    policy = {
        "hidden": jax.checkpoint_policies.save_only_these_names("hidden"),
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }.get(config.remat)
    # Inside a scan nothing can be merged with the forward pass, so no barrier is needed.
    return jax.checkpoint(branch, policy=policy, prevent_cse=_loop(config) != "scan")


def _block(
    config: TransformerConfig, allowed: Array | None, x: Array, layer: Params, key: Key
) -> Array:
    """One pre-norm block: ``x + attention(ln1(x))``, then ``x + mlp(ln2(x))``."""
    keys = (None, None) if key is None else jax.random.split(key)

    def attention(x: Array, layer: Params, key: Key) -> Array:
        branch = _attention(config, layer["attn"], _layer_norm(x, layer["ln1"]), allowed)
        return x + _dropout(branch, config.dropout, key)

    def mlp(x: Array, layer: Params, key: Key) -> Array:
        branch = _mlp(config, layer["mlp"], _layer_norm(x, layer["ln2"]))
        return x + _dropout(branch, config.dropout, key)

    # Each branch by itself: the temporaries of one are gone before the other's are recomputed.
    x = _rematerialised(attention, config)(x, layer, keys[0])
    return _rematerialised(mlp, config)(x, layer, keys[1])


def _mlp(config: TransformerConfig, weights: Params, x: Array) -> Array:
    hidden = checkpoint_name(_linear(x, weights["up"]), "hidden")
    return _linear(_gelu(hidden, config.gelu), weights["down"])


def _attention(
    config: TransformerConfig, weights: Params, x: Array, allowed: Array | None
) -> Array:
    batch, time, width = x.shape
    per_head = width // config.heads
    qkv = _linear(x, weights["qkv"]).reshape(batch, time, 3, config.heads, per_head)
    if config.attention == "fused":
        q, k, v = (qkv[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=allowed)
    else:
        q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))
        exact = _accumulate(x.dtype)
        q = q * per_head**-0.5
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=exact)
        probabilities = _softmax(scores, allowed).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", probabilities, v)
        mixed = jnp.transpose(mixed, (0, 2, 1, 3))
    return _linear(mixed.reshape(batch, time, width), weights["out"])


def _allowed(config: TransformerConfig, mask: Array | None, time: int) -> Array | None:
    """Who attends to whom, ``[batch or 1, 1, query, key]`` bool, or None for everybody."""
    allowed = None
    if config.causal:
        allowed = jnp.tril(jnp.ones((time, time), bool))[None, None]
    if mask is not None:
        present = (mask != 0).reshape(-1, 1, 1, time)
        allowed = present if allowed is None else present & allowed
    return allowed


def _softmax(scores: Array, allowed: Array | None) -> Array:
    # The mask is added, not selected, and jax's softmax has a derivative in terms of its output:
    # of the [time, time] arrays only the probabilities are kept for a backward pass.
    if allowed is not None:
        scores = scores + jnp.where(allowed, 0.0, MASKED).astype(scores.dtype)
    return jax.nn.softmax(scores, axis=-1)


def _logsumexp(scores: Array) -> Array:
    shift = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    return jnp.log(jnp.exp(scores - shift).sum(-1)) + shift[..., 0]


def _unembed(flat: Array, table: Array) -> Array:
    """``[n, width]`` states to ``[n, vocab]`` logits, accumulated in at least float32."""
    return jax.lax.dot_general(
        flat,
        table.astype(flat.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=_accumulate(flat.dtype),
    )


def _linear(x: Array, weight: Array) -> Array:
    """``x @ weight`` as one matmul of matrices, in the dtype of ``x``."""
    flat = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], weight.shape[-1])


def _layer_norm(x: Array, weights: Params, eps: float = 1e-5) -> Array:
    exact = x.astype(_accumulate(x.dtype))
    centred = exact - exact.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    gain, bias = (
        weights[name].astype(exact.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        for name in ("scale", "bias")
    )
    return (centred * scale * gain + bias).astype(x.dtype)


def _gelu(x: Array, kind: str) -> Array:
    return jax.nn.gelu(x, approximate=kind == "tanh")


def _dropout(x: Array, rate: float, key: Key) -> Array:
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
