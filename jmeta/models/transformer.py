"""A pre-norm transformer, causal or bidirectional, as pure functions over nested dicts of arrays.

Layers are stacked on a leading axis, so that they can be looped over or scanned; every
derivative of every order exists in both modes (there is no ``custom_vjp`` anywhere).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key
from jmeta.models import attention, block_config, blocks, heads, primitives
from jmeta.models.dropout import dropout

Params = dict[str, Any]


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
            ``jax.nn.dot_product_attention``, which on a GPU and in half precision is cuDNN's flash
            attention and elsewhere plain XLA. That kernel has no second derivative, so keep it out
            of inner losses (it is for ``Problem.encode`` and for first-order training).
        dropout: probability of zeroing, at the embeddings and at both branches of every block;
            active only where a key is passed.
        gelu: ``"tanh"``: the approximation of GPT-2; ``"exact"``: with the error function.
        dtype: what blocks are computed in, such as ``jnp.bfloat16``; None: the dtype of the
            parameters. Parameters keep their own dtype and are cast inside; normalisation,
            softmax, logits and losses are at least float32.
        attention_dropout: probability of zeroing an attention weight, under the same key.
        eps: added to the variance in every normalisation.
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
    attention_dropout: float = 0.0
    eps: float = 1e-5


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
    block_config.check(config)
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
    return trunk(config, params, rows, mask, key)


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
    return heads.unembed(flat, table).reshape(*tokens.shape, table.shape[0])


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
    return heads.mean_pool(hidden(config, params, tokens, mask, key), mask)


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
    states = trunk(config, params, rows, mask, key)
    counts = jnp.ones(tokens.shape, states.dtype) if weights is None else weights
    loss, total = heads.next_token_loss(states, table, rows, counts)
    return loss, {"tokens": total}


def trunk(
    config: TransformerConfig, params: Params, rows: Array, mask: Array | None, key: Key = None
) -> Array:
    """The final hidden states from embedding rows, for inputs that are no tokens.

    Args:
        config: the shape of the model.
        params: what ``init`` returned.
        rows: ``[..., time, width]``; positions are added here.
        mask: ``[..., time]``, 1 for tokens and 0 for padding, or None.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, width]`` in the compute dtype.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or shapes disagree.
    """
    block_config.check(config)
    block_config.check_length(rows.shape[:-1], mask, config.max_len)
    lead, (time, width) = rows.shape[:-2], rows.shape[-2:]
    if width != config.width:
        raise ValueError(f"embeddings have width {width}, the config says {config.width}")
    x = rows.reshape(-1, time, width)
    x = x + jax.lax.slice_in_dim(params["embed"]["positions"], 0, time)[None]
    x = x.astype(x.dtype if config.dtype is None else config.dtype)
    rest = None
    if key is not None and max(config.dropout, config.attention_dropout) > 0:
        first, rest = jax.random.split(key)
        x = dropout(x, config.dropout, first)
    allowed = attention.visible(config.causal, mask, time)
    x = blocks.over_layers(config, blocks.pre_norm, allowed, x, [params["blocks"]], rest)
    return primitives.layer_norm(x, params["ln_f"], config.eps).reshape(*lead, time, width)
