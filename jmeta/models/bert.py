"""BERT and those built like it (RoBERTa, DistilBERT, MiniLM), as pure functions over nested dicts.

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


class BertConfig(NamedTuple):
    """The shape of an encoder, its head, and how it is computed; hashable.

    ``loop``, ``remat``, ``attention``, ``gelu`` and ``dtype`` mean what they do in
    ``TransformerConfig``.

    Attributes:
        vocab: number of tokens.
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads; divides ``width``.
        max_len: the longest sequence accepted.
        ff: width of the hidden layer of the MLP; None: ``4 * width``.
        kind: whose checkpoints these are. RoBERTa counts positions over real tokens, from
            ``pad_id + 1``; the others count every position from 0, as transformers does.
        types: rows of the segment embedding; 0: there is none (DistilBERT).
        head: what ``apply`` returns: None: hidden states; ``"masked_lm"``: scores of the
            vocabulary, through the transposed embedding; ``"classify"``: scores of the labels;
            ``"spans"``: scores of start and end.
        labels: outputs of ``"classify"``; with one, ``loss`` is the squared error.
        pad_id: the token that pads, where RoBERTa gets no mask.
        dropout: probability of zeroing, at the embeddings and at both branches of every block;
            active only where a key is passed.
        attention_dropout: probability of zeroing an attention weight.
        head_dropout: probability of zeroing in the classification head.
        eps: added to the variance in every normalisation.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    max_len: int
    ff: int | None = None
    kind: Literal["bert", "roberta", "distilbert"] = "bert"
    types: int = 2
    head: Literal["masked_lm", "classify", "spans"] | None = None
    labels: int = 2
    pad_id: int = 0
    loop: Literal["scan", "unroll"] | None = None
    remat: Literal["none", "dots", "hidden", "full"] = "none"
    attention: Literal["xla", "fused"] = "xla"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.0
    gelu: Literal["tanh", "exact"] = "exact"
    eps: float = 1e-12
    dtype: Any = None


def init(config: BertConfig, key: Array) -> Params:
    """Draws parameters as BERT does: N(0, 0.02), zero biases, unit scales.

    Args:
        config: the shape of the model.
        key: a PRNG key.

    Returns:
        A dict of ``embed``, ``blocks`` and ``head``, in the default float. ``embed`` has
        ``{"tokens", "positions", "types", "ln"}``; ``blocks``, stacked on a leading ``[layers]``
        axis, ``attn`` with ``{"query", "key", "value", "out"}``, ``ln1``, ``mlp`` with
        ``{"up", "down"}``, and ``ln2``. Linear layers are ``{"kernel" [in, out], "bias"}``,
        normalisations ``{"scale", "bias"}``. ``head`` is ``{"dense", "ln", "bias" [vocab]}``,
        ``{"dense", "out"}`` or ``{"out"}``, as the config says, and missing where it says None.

    Raises:
        ValueError: a field of the config has no meaning.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=2, heads=2, max_len=5, head="classify")
        >>> params = init(config, jax.random.key(0))
        >>> params["blocks"]["mlp"]["up"]["kernel"].shape, params["head"]["out"]["kernel"].shape
        ((2, 8, 32), (8, 2))
    """
    _check(config)
    layers, width, ff = config.layers, config.width, config.ff or 4 * config.width
    body, head = jax.random.split(key)
    keys = iter(jax.random.split(body, 9))

    def normal(*shape: int) -> Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    def linear(*shape: int) -> Params:
        return {"kernel": normal(*shape), "bias": jnp.zeros((*shape[:-2], shape[-1]))}

    def norm(*shape: int) -> Params:
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    embed = {
        "tokens": normal(config.vocab, width),
        "positions": normal(config.max_len + first_position(config), width),
        "ln": norm(width),
    }
    if config.types:
        embed["types"] = normal(config.types, width)
    square = (layers, width, width)
    params = {
        "embed": embed,
        "blocks": {
            "attn": {name: linear(*square) for name in ("query", "key", "value", "out")},
            "ln1": norm(layers, width),
            "mlp": {"up": linear(layers, width, ff), "down": linear(layers, ff, width)},
            "ln2": norm(layers, width),
        },
    }
    return params if config.head is None else {**params, "head": init_head(config, head)}


def init_head(config: BertConfig, key: Array) -> Params:
    """Draws a new head, for a checkpoint that has none of this kind.

    Args:
        config: whose ``head`` is not None.
        key: a PRNG key.

    Returns:
        What ``init`` returns as ``"head"``.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=2, heads=2, max_len=5, head="spans")
        >>> init_head(config, jax.random.key(0))["out"]["kernel"].shape
        (8, 2)
    """
    first, second = jax.random.split(key)
    width = config.width

    def linear(key: Array, out: int) -> Params:
        return {"kernel": 0.02 * jax.random.normal(key, (width, out)), "bias": jnp.zeros(out)}

    if config.head == "spans":
        return {"out": linear(second, 2)}
    head = {"dense": linear(first, width)}
    if config.head == "classify":
        return {**head, "out": linear(second, config.labels)}
    norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    return {**head, "ln": norm, "bias": jnp.zeros(config.vocab)}


def hidden(config: BertConfig, params: Params, batch: Batch, key: Key = None) -> Array:
    """The final hidden states.

    Args:
        config: the shape of the model.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: ``tokens`` ``[..., time]`` int, any number of leading axes; ``mask`` of that shape,
            1 for tokens and 0 for padding, which no position then attends to; ``segments`` int,
            default 0; ``positions`` int, the rows of the position table to use. What is returned
            at a padded position means nothing.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, width]`` in the compute dtype.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or shapes disagree.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = init(config, jax.random.key(0))
        >>> hidden(config, params, {"tokens": jnp.zeros((3, 4), int)}).shape
        (3, 4, 8)
    """
    _check(config)
    tokens, mask = batch["tokens"], batch.get("mask")
    block_config.check_length(tokens.shape, mask, config.max_len)
    lead, time = tokens.shape[:-1], tokens.shape[-1]
    x = _embed(config, params["embed"], batch).reshape(-1, time, config.width)
    x = x.astype(x.dtype if config.dtype is None else config.dtype)
    first, rest = heads.split(key)
    x = primitives.layer_norm(x, params["embed"]["ln"], config.eps)
    x = dropout(x, config.dropout, first)
    allowed = attention.visible(False, mask, time)
    x = blocks.over_layers(config, blocks.post_norm, allowed, x, heads.stacks(params), rest)
    return x.reshape(*lead, time, config.width)


def embed(config: BertConfig, params: Params, batch: Batch, key: Key = None) -> Array:
    """Sentence embeddings: the mean of the final states over tokens, at length one.

    Args:
        config: the shape of the model.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: as in ``hidden``.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., width]``, at least float32; zero for a sequence without tokens.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> batch = {"tokens": jnp.zeros((3, 4), int)}
        >>> vectors = embed(config, init(config, jax.random.key(0)), batch)
        >>> jnp.linalg.norm(vectors, axis=-1).round(5).tolist()
        [1.0, 1.0, 1.0]
    """
    return heads.unit(heads.mean_pool(hidden(config, params, batch, key), batch.get("mask")))


def apply(config: BertConfig, params: Params, batch: Batch, key: Key = None) -> Array:
    """What the config's head returns.

    Args:
        config: the shape of the model, and its head.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: as in ``hidden``.
        key: drives dropout; None is deterministic.

    Returns:
        Without a head the hidden states ``[..., time, width]``; ``"masked_lm"``: ``[..., time,
        vocab]``; ``"classify"``: ``[..., labels]``; ``"spans"``: ``[..., time, 2]``, start and
        end, very low at pads. Scores are at least float32.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=2, heads=2, max_len=5, head="masked_lm")
        >>> params = init(config, jax.random.key(0))
        >>> apply(config, params, {"tokens": jnp.zeros((3, 4), int)}).shape
        (3, 4, 11)
    """
    body_key, head_key = heads.split(key)
    states = hidden(config, params, batch, body_key)
    if config.head is None:
        return states
    head = params["head"]
    if config.head == "spans":
        return heads.span_scores(states, head["out"], batch.get("mask"))
    if config.head == "classify":
        return _class_scores(config, head, states[..., 0, :], head_key)
    table = params["embed"]["tokens"]
    states = _transformed(config, head, states)
    scores = heads.unembed(states.reshape(-1, config.width), table)
    scores = scores + head["bias"].astype(scores.dtype)[None]
    return scores.reshape(*states.shape[:-1], table.shape[0])


def loss(
    config: BertConfig, params: Params, batch: Batch, key: Key = None
) -> tuple[Array, dict[str, Array]]:
    """The loss of the config's head, as a ``Problem`` wants it.

    Args:
        config: the shape of the model; its head is not None.
        params: what ``init`` or ``from_pretrained`` returned.
        batch: as in ``hidden``, and for ``"masked_lm"`` ``labels`` (and ``weights``) as in
            ``heads.targets``; for ``"classify"`` ``y``; for ``"spans"`` ``start`` and ``end``
            ``[...]`` int (outside of the window: does not count).
        key: drives dropout; None is deterministic.

    Returns:
        The loss, a scalar of at least float32, and metrics.

    Raises:
        ValueError: the config has no head.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=2, heads=2, max_len=5, head="classify")
        >>> batch = {"tokens": jnp.zeros((3, 4), int), "y": jnp.array([0, 1, 1])}
        >>> print(loss(config, init(config, jax.random.key(0)), batch)[0].round(2))  # log 2
        0.69
    """
    if config.head is None:
        raise ValueError("the config has no head, so no loss; set head= in the config")
    if config.head == "masked_lm":
        body_key, _ = heads.split(key)
        states = _transformed(config, params["head"], hidden(config, params, batch, body_key))
        labels, weights = heads.targets(batch)
        table, bias = params["embed"]["tokens"], params["head"]["bias"]
        rows = jnp.take(table, labels, axis=0, mode="clip")
        picked = jnp.take(bias, labels, mode="clip")
        value, total = heads.token_loss(states, table, rows, weights, (bias, picked))
        return value, {"tokens": total}
    scores = apply(config, params, batch, key)
    if config.head == "spans":
        return heads.span_loss(scores, batch["start"], batch["end"]), {}
    return heads.class_loss(scores, batch)


def _check(config: BertConfig) -> None:
    block_config.check(config)
    for name, allowed in {
        "kind": ("bert", "roberta", "distilbert"),
        "head": (None, "masked_lm", "classify", "spans"),
    }.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}; choose one of {allowed}")
    if config.kind == "distilbert" and config.types:
        raise ValueError(f"DistilBERT has no segment embedding: types={config.types}, set types=0")


def first_position(config: BertConfig) -> int:
    """The row of the position table that the first token reads: RoBERTa leaves out the first."""
    return config.pad_id + 1 if config.kind == "roberta" else 0


def _embed(config: BertConfig, tables: Params, batch: Batch) -> Array:
    """The sum of the embeddings, ``[..., time, width]``."""
    tokens = batch["tokens"]
    time = tokens.shape[-1]
    x = jnp.take(tables["tokens"], tokens, axis=0, mode="clip")
    if "types" in tables:
        if (segments := batch.get("segments")) is None:
            x = x + tables["types"][0].reshape((1,) * tokens.ndim + (-1,))
        else:
            x = x + jnp.take(tables["types"], segments, axis=0, mode="clip")
    positions = batch.get("positions")
    if positions is None and config.kind == "roberta":
        mask = batch.get("mask")
        present = ((tokens != config.pad_id) if mask is None else (mask != 0)).astype(jnp.int32)
        positions = jnp.cumsum(present, -1) * present + config.pad_id
    if positions is None:
        rows = jax.lax.slice_in_dim(tables["positions"], 0, time)
        return x + rows.reshape((1,) * (tokens.ndim - 1) + rows.shape)
    return x + jnp.take(tables["positions"], positions, axis=0, mode="clip")


def _transformed(config: BertConfig, head: Params, states: Array) -> Array:
    """What the masked language model sends through the transposed embedding."""
    states = primitives.gelu(primitives.linear(states, head["dense"]), config.gelu)
    return primitives.layer_norm(states, head["ln"], config.eps)


def _class_scores(config: BertConfig, head: Params, first: Array, key: Key) -> Array:
    before, after = heads.split(key)
    if config.kind == "roberta":
        first = dropout(first, config.head_dropout, before)
    dense = primitives.linear(first, head["dense"])
    dense = jax.nn.relu(dense) if config.kind == "distilbert" else jnp.tanh(dense)
    scores = primitives.linear(dropout(dense, config.head_dropout, after), head["out"])
    return scores.astype(at_least_float32(scores.dtype))
