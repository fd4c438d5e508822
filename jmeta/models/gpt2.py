"""GPT-2 as pure functions over nested dicts of arrays, with heads for text, classes and spans.

``apply`` and ``loss``, both of ``(config, params, batch, key)``, do what the config's head says.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array, Key
from jmeta.models import attention, block_config, blocks, heads, primitives
from jmeta.models.dropout import dropout
from jmeta.models.heads import Batch

Params = dict[str, Any]


class GPT2Config(NamedTuple):
    """The shape of a decoder, its head, and how it is computed; hashable.

    ``loop``, ``remat``, ``attention``, ``gelu`` and ``dtype`` mean what they do in
    ``TransformerConfig``.

    Attributes:
        vocab: number of tokens.
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads; divides ``width``.
        max_len: number of learned positions, the longest sequence accepted.
        ff: width of the hidden layer of the MLP; None: ``4 * width``.
        head: what ``apply`` returns: None: hidden states; ``"causal_lm"``: scores of the next
            token, through the transposed embedding; ``"classify"``: scores of the labels, read at
            the last real token; ``"spans"``: scores of start and end.
        labels: outputs of ``"classify"``; with one, ``loss`` is the squared error.
        pad_id: the token that pads; written to ``config.json``, where transformers needs it to
            classify. Here only the mask says what padding is.
        dropout: probability of zeroing, at the embeddings and at both branches of every block;
            active only where a key is passed.
        attention_dropout: probability of zeroing an attention weight.
        eps: added to the variance in every normalisation.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    max_len: int
    ff: int | None = None
    head: Literal["causal_lm", "classify", "spans"] | None = None
    labels: int = 2
    pad_id: int | None = None
    loop: Literal["scan", "unroll"] | None = None
    remat: Literal["none", "dots", "hidden", "full"] = "none"
    attention: Literal["xla", "fused"] = "xla"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    gelu: Literal["tanh", "exact"] = "tanh"
    eps: float = 1e-5
    dtype: Any = None


def init(config: GPT2Config, key: Array) -> Params:
    """Draws parameters as GPT-2 does: N(0, 0.02), residual projections over sqrt(2 layers).

    Args:
        config: the shape of the model.
        key: a PRNG key.

    Returns:
        A dict of ``embed``, ``blocks``, ``ln_f`` and ``head``, in the default float. ``embed`` has
        ``{"tokens", "positions"}``; ``blocks``, stacked on a leading ``[layers]`` axis, ``ln1``,
        ``attn`` with ``{"qkv", "out"}``, ``ln2``, and ``mlp`` with ``{"up", "down"}``. Linear
        layers are ``{"kernel" [in, out], "bias"}``, normalisations ``{"scale", "bias"}``. The
        columns of ``qkv`` are ordered query, key, value. ``head`` is ``{"out"}`` for classes
        (without a bias) and spans, and missing otherwise.

    Raises:
        ValueError: a field of the config has no meaning.

    Example:
        >>> config = GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> init(config, jax.random.key(0))["blocks"]["attn"]["qkv"]["bias"].shape
        (2, 24)
    """
    _check(config)
    layers, width, ff = config.layers, config.width, config.ff or 4 * config.width
    body, head = jax.random.split(key)
    keys = iter(jax.random.split(body, 6))
    residual = 0.02 / (2 * layers) ** 0.5

    def normal(*shape: int, std: float = 0.02) -> Array:
        return std * jax.random.normal(next(keys), shape)

    def linear(rows: int, columns: int, std: float = 0.02) -> Params:
        kernel = normal(layers, rows, columns, std=std)
        return {"kernel": kernel, "bias": jnp.zeros((layers, columns))}

    def norm(*shape: int) -> Params:
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    params = {
        "embed": {
            "tokens": normal(config.vocab, width),
            "positions": normal(config.max_len, width),
        },
        "blocks": {
            "ln1": norm(layers, width),
            "attn": {"qkv": linear(width, 3 * width), "out": linear(width, width, residual)},
            "ln2": norm(layers, width),
            "mlp": {"up": linear(width, ff), "down": linear(ff, width, residual)},
        },
        "ln_f": norm(width),
    }
    made = init_head(config, head)
    return {**params, "head": made} if made else params


def init_head(config: GPT2Config, key: Array) -> Params:
    """Draws a new head, for a checkpoint that has none of this kind.

    Args:
        config: the shape of the model, and its head.
        key: a PRNG key.

    Returns:
        What ``init`` returns as ``"head"``; empty where that is missing.

    Example:
        >>> config = GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5, head="classify")
        >>> init_head(config, jax.random.key(0))["out"]["kernel"].shape
        (8, 2)
    """
    if config.head == "classify":
        return {"out": {"kernel": 0.02 * jax.random.normal(key, (config.width, config.labels))}}
    if config.head == "spans":
        kernel = 0.02 * jax.random.normal(key, (config.width, 2))
        return {"out": {"kernel": kernel, "bias": jnp.zeros(2)}}
    return {}


def positions(mask: Array) -> Array:
    """Positions that count real tokens only, so that padding on the left changes nothing.

    They are what transformers' ``generate`` uses. Its plain forward pass, classification
    included, counts every position from 0 unless it is given ``position_ids``: with padding on
    the left it then reads other rows of the position table than an unpadded sequence does.

    Args:
        mask: ``[..., time]``, 1 for tokens, 0 for padding.

    Returns:
        ``[..., time]`` int32.

    Example:
        >>> positions(jnp.array([0, 0, 1, 1, 1])).tolist()
        [0, 0, 0, 1, 2]
    """
    return jnp.maximum(jnp.cumsum((mask != 0).astype(jnp.int32), -1) - 1, 0)


def hidden(config: GPT2Config, params: Params, batch: Batch, key: Key = None) -> Array:
    """The final hidden states, normalised.

    Args:
        config: the shape of the model.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: ``tokens`` ``[..., time]`` int, any number of leading axes; ``mask`` of that shape,
            1 for tokens and 0 for padding on either side, which no position then attends to;
            ``positions`` int, default ``positions(mask)``. What is returned at a padded position
            means nothing.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, width]`` in the compute dtype.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or shapes disagree.

    Example:
        >>> config = GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = init(config, jax.random.key(0))
        >>> hidden(config, params, {"tokens": jnp.zeros((3, 4), int)}).shape
        (3, 4, 8)
    """
    rows = jnp.take(params["embed"]["tokens"], batch["tokens"], axis=0, mode="clip")
    return _trunk(config, params, rows, batch, key)


def embed(config: GPT2Config, params: Params, batch: Batch, key: Key = None) -> Array:
    """Text embeddings: the mean of the final states over tokens, at length one.

    Args:
        config: the shape of the model.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: as in ``hidden``.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., width]``, at least float32; zero for a sequence without tokens.

    Example:
        >>> config = GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> batch = {"tokens": jnp.zeros((3, 4), int)}
        >>> embed(config, init(config, jax.random.key(0)), batch).shape
        (3, 8)
    """
    return heads.unit(heads.mean_pool(hidden(config, params, batch, key), batch.get("mask")))


def apply(config: GPT2Config, params: Params, batch: Batch, key: Key = None) -> Array:
    """What the config's head returns.

    Args:
        config: the shape of the model, and its head.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: as in ``hidden``.
        key: drives dropout; None is deterministic.

    Returns:
        Without a head the hidden states ``[..., time, width]``; ``"causal_lm"``: ``[..., time,
        vocab]``; ``"classify"``: ``[..., labels]``, of the last token that the mask calls real;
        ``"spans"``: ``[..., time, 2]``, start and end, very low at pads. Scores are at least
        float32.

    Example:
        >>> config = GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5, head="causal_lm")
        >>> params = init(config, jax.random.key(0))
        >>> apply(config, params, {"tokens": jnp.zeros((3, 4), int)}).shape
        (3, 4, 11)
    """
    states, mask = hidden(config, params, batch, key), batch.get("mask")
    if config.head is None:
        return states
    if config.head == "spans":
        return heads.span_scores(states, params["head"]["out"], mask)
    if config.head == "classify":
        scores = primitives.linear(heads.last_token(states, mask), params["head"]["out"])
        return scores.astype(at_least_float32(scores.dtype))
    table = params["embed"]["tokens"]
    scores = heads.unembed(states.reshape(-1, config.width), table)
    return scores.reshape(*states.shape[:-1], table.shape[0])


def loss(
    config: GPT2Config, params: Params, batch: Batch, key: Key = None
) -> tuple[Array, dict[str, Array]]:
    """The loss of the config's head, as a ``Problem`` wants it.

    Args:
        config: the shape of the model; its head is not None.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: as in ``hidden``, and for ``"causal_lm"`` ``labels`` and ``weights`` as in
            ``heads.targets``, both at the place of the token that is predicted (the first of a
            sequence is never one); for ``"classify"`` ``y``; for ``"spans"`` ``start`` and ``end``.
        key: drives dropout; None is deterministic.

    Returns:
        The loss, a scalar of at least float32, and metrics.

    Raises:
        ValueError: the config has no head.

    Example:
        >>> config = GPT2Config(vocab=11, width=8, layers=2, heads=2, max_len=5, head="causal_lm")
        >>> batch = {"tokens": jnp.arange(4)[None], "mask": jnp.array([[1, 1, 1, 0]])}
        >>> int(loss(config, init(config, jax.random.key(0)), batch)[1]["tokens"])
        2
    """
    if config.head is None:
        raise ValueError("the config has no head, so no loss; set head= in the config")
    if config.head != "causal_lm":
        scores = apply(config, params, batch, key)
        if config.head == "spans":
            return heads.span_loss(scores, batch["start"], batch["end"]), {}
        return heads.class_loss(scores, batch)
    table, tokens = params["embed"]["tokens"], batch["tokens"]
    rows = jnp.take(table, tokens, axis=0, mode="clip")
    labels, weights = heads.targets(batch)
    # One gather serves inputs and targets, so one scatter-add serves their gradients.
    targets = rows if batch.get("labels") is None else jnp.take(table, labels, axis=0, mode="clip")
    if (mask := batch.get("mask")) is not None:
        # The first token after padding has no past to be predicted from.
        before = jnp.concatenate([jnp.zeros_like(mask[..., :1]), mask[..., :-1]], -1)
        weights = jnp.where(before != 0, weights, jnp.zeros_like(weights))
    states = _trunk(config, params, rows, batch, key)
    value, total = heads.next_token_loss(states, table, targets, weights)
    return value, {"tokens": total}


def _check(config: GPT2Config) -> None:
    block_config.check(config)
    allowed = (None, "causal_lm", "classify", "spans")
    if config.head not in allowed:
        raise ValueError(f"head={config.head!r}; choose one of {allowed}")


def _trunk(config: GPT2Config, params: Params, rows: Array, batch: Batch, key: Key) -> Array:
    """Final hidden states ``[..., time, width]`` from embedding rows of that shape."""
    _check(config)
    tokens, mask = batch["tokens"], batch.get("mask")
    block_config.check_length(tokens.shape, mask, config.max_len)
    lead, time = tokens.shape[:-1], tokens.shape[-1]
    table, places = params["embed"]["positions"], batch.get("positions")
    if places is None and mask is not None:
        places = positions(mask)
    if places is None:
        first = jax.lax.slice_in_dim(table, 0, time)
        x = rows + first.reshape((1,) * len(lead) + first.shape)
    else:
        x = rows + jnp.take(table, places, axis=0, mode="clip")
    x = x.reshape(-1, time, config.width)
    x = x.astype(x.dtype if config.dtype is None else config.dtype)
    first_key, rest = heads.split(key)
    x = dropout(x, config.dropout, first_key)
    allowed = attention.visible(True, mask, time)
    x = blocks.over_layers(config, blocks.pre_norm, allowed, x, heads.stacks(params), rest)
    return primitives.layer_norm(x, params["ln_f"], config.eps).reshape(*lead, time, config.width)
