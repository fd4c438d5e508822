"""NPLM, and Transformer-N: the first layer concatenates the last tokens in place of attention.

The layer of the neural probabilistic language model: the last tokens and averages of those before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key
from jmeta.models import attention, block_config, blocks, heads, primitives, transformer
from jmeta.models.dropout import dropout
from jmeta.models.transformer import TransformerConfig

Params = dict[str, Any]


class Context(NamedTuple):
    """What the concatenation layer reads at a position; hashable.

    Attributes:
        last: how many of the last tokens are concatenated, the current one included.
        window: how many tokens before those are averaged.
        averages: how many averages of that window are concatenated too; 0: none.
        middle: width of the layer's hidden units.
    """

    last: int
    window: int = 0
    averages: int = 0
    middle: int = 256


def init_layer(context: Context, width: int, key: Array, std: float = 0.02) -> Params:
    """Draws a concatenation layer; every average starts as the plain one, ``1 / window``.

    Args:
        context: what it reads.
        width: width of the token vectors.
        key: a PRNG key.
        std: of the projection back to ``width``.

    Returns:
        ``{"up" [(last + averages) * width, middle], "down" [middle, width], "average"
        [averages, window]}``.

    Raises:
        ValueError: a context that reads nothing, or averages over nothing.

    Example:
        >>> init_layer(Context(last=3, window=8, averages=2, middle=16), 4, jax.random.key(0))[
        ...     "up"].shape
        (20, 16)
    """
    _check(context)
    up, down = jax.random.split(key)
    rows = (context.last + context.averages) * width
    average = jnp.full((context.averages, context.window), 1 / max(context.window, 1))
    return {
        "up": 0.02 * jax.random.normal(up, (rows, context.middle)),
        "down": std * jax.random.normal(down, (context.middle, width)),
        "average": average.astype(jnp.zeros(()).dtype),
    }


def _check(context: Context) -> None:
    if context.last < 1 or context.middle < 1:
        raise ValueError(f"last={context.last} and middle={context.middle} are at least 1")
    if context.averages < 0 or context.window < 0:
        raise ValueError(
            f"averages={context.averages} and window={context.window} are not negative"
        )
    if bool(context.averages) != bool(context.window):
        raise ValueError(
            f"{context.averages} averages over a window of {context.window} tokens: give both, or "
            "neither"
        )


def concatenated(context: Context, layer: Params, x: Array) -> Array:
    r"""The last token vectors and the long-term averages, side by side; zeros before the text.

    .. math:: c_t = [x_t; x_{t-1}; \dots; x_{t-n+1}; g^1_t; \dots; g^G_t], \qquad
        g^k_t = \sum_{j=0}^{W-1} a_{kj} \, x_{t-n-j}

    An average is a product with a banded matrix of its weights, the same for all channels: no
    convolution, so that every derivative is as fast.

    Args:
        context: ``n``, ``W`` and ``G``.
        layer: what ``init_layer`` returned.
        x: ``[batch, time, width]``.

    Returns:
        ``[batch, time, (last + averages) * width]``.

    Example:
        >>> context = Context(last=2, window=2, averages=1)
        >>> layer = init_layer(context, 1, jax.random.key(0))
        >>> concatenated(context, layer, jnp.arange(1.0, 5.0)[None, :, None])[0].tolist()
        [[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [3.0, 2.0, 0.5], [4.0, 3.0, 1.5]]
    """
    time = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (context.last - 1, 0), (0, 0)))
    parts = [
        jax.lax.slice_in_dim(
            padded, context.last - 1 - back, context.last - 1 - back + time, axis=1
        )
        for back in range(context.last)
    ]
    if context.averages:
        place = jnp.arange(time)
        back = place[:, None] - context.last - place[None]  # which weight a token before gets
        inside = (back >= 0) & (back < context.window)
        weights = jnp.take(layer["average"], jnp.clip(back, 0, context.window - 1), axis=1)
        band = jnp.where(inside[None], weights, 0).astype(x.dtype)
        averages = jnp.einsum("gts,bsd->btgd", band, x)
        parts.append(averages.reshape(*x.shape[:2], -1))
    return jnp.concatenate(parts, axis=-1)


def concatenation(config: TransformerConfig, context: Context, layer: Params, x: Array) -> Array:
    """The layer: concatenate, project up, GELU, project down to the width of ``x``.

    Args:
        config: of whose blocks the GELU is.
        context: what is read.
        layer: what ``init_layer`` returned.
        x: ``[batch, time, width]``.

    Returns:
        ``[batch, time, width]``; position t depends on no later one.
    """
    joined = primitives.linear(concatenated(context, layer, x), layer["up"])
    return primitives.linear(primitives.gelu(joined, config.gelu), layer["down"])


def init(config: TransformerConfig, context: Context, key: Array) -> Params:
    """Draws Transformer-N as ``transformer.init`` does, with the other first layer.

    Args:
        config: the shape of the decoder; ``layers`` counts the first.
        context: what the first layer reads.
        key: a PRNG key.

    Returns:
        As ``transformer.init``, with ``layers - 1`` in ``blocks`` and in ``first`` ``{"ln1",
        "concat", "ln2", "mlp"}``.

    Raises:
        ValueError: a field of either has no meaning.

    Example:
        >>> config = TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> make = jax.jit(init, static_argnums=(0, 1))
        >>> params = make(config, Context(last=3, middle=16), jax.random.key(0))
        >>> params["first"]["concat"]["up"].shape, params["blocks"]["attn"]["qkv"].shape
        ((24, 16), (1, 8, 24))
    """
    _check(context)
    first, rest = jax.random.split(key)
    params = transformer.init(config, rest)
    bottom = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    residual = 0.02 / (2 * config.layers) ** 0.5
    made = {name: bottom[name] for name in ("ln1", "ln2", "mlp")}
    made["concat"] = init_layer(context, config.width, first, residual)
    others = jax.tree.map(lambda leaf: leaf[1:], params["blocks"])
    return {**params, "blocks": others, "first": made}


def without_attention(params: Params) -> Params:
    """NPLM from Transformer-N: no layer attends, so what the first one read is all the context.

    Args:
        params: what ``init`` returned.

    Returns:
        The same without attention and its normalisation; ``hidden`` and ``next_token_loss`` take
        either.

    Example:
        >>> config = TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = jax.jit(init, static_argnums=(0, 1))(
        ...     config, Context(last=3, middle=16), jax.random.key(0))
        >>> sorted(without_attention(params)["blocks"])
        ['ln2', 'mlp']

    Source: Sun and Iyyer (2021), section 2.
    """
    kept = {name: params["blocks"][name] for name in ("ln2", "mlp")}
    return {**params, "blocks": kept}


def hidden(
    config: TransformerConfig,
    context: Context,
    params: Params,
    tokens: Array,
    key: Key = None,
) -> Array:
    """The final hidden states of Transformer-N or NPLM, normalised.

    Args:
        config: the shape of the decoder, ``causal``.
        context: what the first layer reads.
        params: what ``init`` or ``without_attention`` returned.
        tokens: ``[..., time]`` int; padding, if any, on the right.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, width]`` in the compute dtype.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or the model is not causal.
    """
    rows = jnp.take(params["embed"]["tokens"], tokens, axis=0, mode="clip")
    return _trunk(config, context, params, rows, key)


def next_token_loss(
    config: TransformerConfig,
    context: Context,
    params: Params,
    tokens: Array,
    weights: Array | None = None,
    key: Key = None,
) -> tuple[Array, dict[str, Array]]:
    """Weighted mean negative log-likelihood of each token given those before it.

    Args:
        config: the shape of the decoder.
        context: what the first layer reads.
        params: what ``init`` or ``without_attention`` returned.
        tokens: ``[..., time]`` int.
        weights: ``[..., time]``, the weight of each token as a target, as in
            ``transformer.next_token_loss``; 0 for padding, which is on the right.
        key: drives dropout; None is deterministic.

    Returns:
        The loss and ``{"tokens": sum of weights}``.

    Raises:
        ValueError: shapes disagree, or as in ``hidden``.

    Example:
        >>> config = TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> context = Context(last=3, middle=16)
        >>> params = jax.jit(init, static_argnums=(0, 1))(config, context, jax.random.key(0))
        >>> score = jax.jit(next_token_loss, static_argnums=(0, 1))
        >>> loss, _ = score(config, context, params, jnp.arange(5)[None])
        >>> bool(abs(loss - jnp.log(11)) < 0.05)
        True

    Source: Sun and Iyyer, "Revisiting Simple Neural Probabilistic Language Models" (2021),
    sections 2 and 4.
    """
    if weights is not None and weights.shape != tokens.shape:
        raise ValueError(f"weights have shape {weights.shape}, tokens {tokens.shape}")
    table = params["embed"]["tokens"]
    rows = jnp.take(table, tokens, axis=0, mode="clip")
    states = _trunk(config, context, params, rows, key)
    counts = jnp.ones(tokens.shape, states.dtype) if weights is None else weights
    loss, total = heads.next_token_loss(states, table, rows, counts)
    return loss, {"tokens": total}


def _trunk(
    config: TransformerConfig, context: Context, params: Params, rows: Array, key: Key
) -> Array:
    if not config.causal:
        raise ValueError("Transformer-N is a decoder: it needs causal=True")
    block_config.check(config)
    _check(context)
    block_config.check_length(rows.shape[:-1], None, config.max_len)
    lead, (time, width) = rows.shape[:-2], rows.shape[-2:]
    x = rows.reshape(-1, time, width)
    x = x + jax.lax.slice_in_dim(params["embed"]["positions"], 0, time)[None]
    x = x.astype(x.dtype if config.dtype is None else config.dtype)
    keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
    x = dropout(x, config.dropout, keys[0])
    first = params["first"]
    normal = primitives.layer_norm(x, first["ln1"], config.eps)
    branch = concatenation(config, context, first["concat"], normal)
    x = x + dropout(branch, config.dropout, keys[1])
    branch = blocks.feed_forward(
        config, first["mlp"], primitives.layer_norm(x, first["ln2"], config.eps)
    )
    x = x + dropout(branch, config.dropout, keys[2])
    if config.layers > 1:
        above = config._replace(layers=config.layers - 1)
        block = blocks.pre_norm if "attn" in params["blocks"] else blocks.feed_forward_alone
        allowed = attention.visible(True, None, time)
        x = blocks.over_layers(above, block, allowed, x, [params["blocks"]], keys[3])
    return primitives.layer_norm(x, params["ln_f"], config.eps).reshape(*lead, time, width)
