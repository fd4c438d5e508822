"""A pre-norm encoder with a masked language model's head, and one that writes for it.

The student reads tokens or distributions over them, and learns from labels of either kind; the
teacher has two heads on one body, or one score for each position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key
from jmeta.models import blocks, heads, transformer
from jmeta.models.transformer import TransformerConfig

Params = dict[str, Any]
Batch: TypeAlias = Mapping[str, Any]

PAD = 0  # the row of the embedding that no input reads a gradient into


def config(
    vocab: int, width: int, layers: int, heads: int, max_len: int, **fields: Any
) -> TransformerConfig:
    """The shape of RoBERTa's encoder in its pre-norm form: sees both ways, exact GELU.

    Args:
        vocab: number of tokens.
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads.
        max_len: the longest sequence.
        **fields: the other fields of ``TransformerConfig``.

    Returns:
        A ``TransformerConfig``.

    Example:
        >>> config(11, 8, 2, 2, 5).causal
        False
    """
    shape = TransformerConfig(vocab, width, layers, heads, max_len, causal=False, gelu="exact")
    return shape._replace(**fields)


def init_body(config: TransformerConfig, key: Array) -> Params:
    """Draws the encoder: N(0, 0.02), zero biases, attention's joint kernel Xavier-uniform.

    Args:
        config: the shape.
        key: a PRNG key.

    Returns:
        ``{"embed", "blocks", "ln_f"}`` as ``transformer.init`` lays them out, but every linear
        layer is ``{"kernel", "bias"}``; the row of [PAD] is zero.
    """
    blocks.check(config)
    layers, width = config.layers, config.width
    ff = config.ff or 4 * width
    keys = iter(jax.random.split(key, 6))

    def linear(*shape: int) -> Params:
        return {
            "kernel": 0.02 * jax.random.normal(next(keys), shape),
            "bias": jnp.zeros((*shape[:-2], shape[-1])),
        }

    bound = math.sqrt(6 / (width + 3 * width))
    joint = jax.random.uniform(next(keys), (layers, width, 3 * width), minval=-bound, maxval=bound)
    return {
        "embed": {
            "tokens": _embedding(next(keys), config),
            "positions": 0.02 * jax.random.normal(next(keys), (config.max_len, width)),
        },
        "blocks": {
            "ln1": _norm(layers, width),
            "attn": {
                "qkv": {"kernel": joint, "bias": jnp.zeros((layers, 3 * width))},
                "out": linear(layers, width, width),
            },
            "ln2": _norm(layers, width),
            "mlp": {"up": linear(layers, width, ff), "down": linear(layers, ff, width)},
        },
        "ln_f": _norm(width),
    }


def init(config: TransformerConfig, key: Array) -> Params:
    """Draws a student: an encoder and a head tied to its embedding.

    Args:
        config: the shape.
        key: a PRNG key.

    Returns:
        ``init_body`` and ``head``: ``{"dense", "ln", "bias" [vocab]}``.

    Example:
        >>> shape = config(vocab=30000, width=256, layers=6, heads=4, max_len=128)
        >>> sizes = jax.eval_shape(lambda key: init(shape, key), jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(sizes))
        12548144
    """
    body, head = jax.random.split(key)
    return {**init_body(config, body), "head": _head(config, head)}


def init_teacher(config: TransformerConfig, key: Array) -> Params:
    """Draws a teacher: an encoder and two heads, each with a table of its own.

    Args:
        config: the shape.
        key: a PRNG key.

    Returns:
        ``init_body``, and ``inputs`` and ``labels``: ``{"dense", "ln", "table" [vocab, width],
        "bias" [vocab]}``.

    Example:
        >>> shape = config(vocab=30000, width=256, layers=6, heads=4, max_len=128)
        >>> sizes = jax.eval_shape(lambda key: init_teacher(shape, key), jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(sizes))
        28004448
    """
    body, *rest = jax.random.split(key, 5)
    params = init_body(config, body)
    for name, head, table in (("inputs", *rest[:2]), ("labels", *rest[2:])):
        drawn = 0.02 * jax.random.normal(table, (config.vocab, config.width))
        params[name] = {**_head(config, head), "table": drawn}
    return params


def init_scorer(config: TransformerConfig, key: Array, share: float = 0.15) -> Params:
    """Draws a teacher that says of each position how likely it is to be masked.

    Args:
        config: the shape.
        key: a PRNG key.
        share: the probability that all positions start near.

    Returns:
        ``init_body`` and ``score``: ``{"kernel" [width, 1], "bias" [1]}``.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} is no probability between 0 and 1")
    body, head = jax.random.split(key)
    score = {
        "kernel": 0.02 * jax.random.normal(head, (config.width, 1)),
        "bias": jnp.full((1,), math.log(share / (1 - share))),
    }
    return {**init_body(config, body), "score": score}


def embed(table: Array, tokens: Any, chunk: int | None = None) -> Array:
    r"""Rows of the embedding for tokens, or their mean under a distribution.

    .. math:: r_i = E_{x_i}, \qquad r_i = \sum_v p_{iv} E_v,
        \qquad r_i = \sum_k s_{ik} E_{x_{ik}}

    Args:
        table: ``[vocab, width]``.
        tokens: int ``[..., time]``; or a float distribution ``[..., time, vocab]``; or a mixture
            of a few tokens, ``{"ids" int [..., time, k], "shares" float [..., time, k]}``; or a
            distribution that is not multiplied out, as ``write_factors`` returns it.
        chunk: of a distribution that is not multiplied out, so many entries of the vocabulary, as
            a mean over all tokens, exist at a time; None: all.

    Returns:
        ``[..., time, width]``. No gradient reaches the row of [PAD].

    Example:
        >>> table = jnp.arange(6.0).reshape(3, 2)
        >>> soft, hard = embed(table, jnp.eye(3)), embed(table, jnp.arange(3))
        >>> bool((soft == hard).all())
        True
    """
    (rows,), of_pad = _lookup((table,), tokens, chunk)
    # The row of [PAD] is put in again as a constant, which needs no copy of the table.
    constant = jax.lax.stop_gradient(table[PAD]) - table[PAD]
    return rows + of_pad[..., None] * constant.reshape((1,) * of_pad.ndim + (-1,))


def states(config: TransformerConfig, params: Params, batch: Batch, key: Key = None) -> Array:
    """The encoder's final states.

    Args:
        config: the shape.
        params: with ``init_body``'s entries.
        batch: ``tokens`` as ``embed`` takes them; ``mask`` ``[..., time]``, 1 for tokens and 0 for
            padding, or missing.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, width]``.
    """
    rows = embed(params["embed"]["tokens"], batch["tokens"])
    return transformer.trunk(config, params, rows, batch.get("mask"), key)


def logits(config: TransformerConfig, params: Params, batch: Batch, key: Key = None) -> Array:
    """The student's scores of the vocabulary at every position.

    Args:
        config: the shape.
        params: of ``init``.
        batch: as ``states`` takes it.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time, vocab]``, at least float32.
    """
    transformed = _transformed(config, params["head"], states(config, params, batch, key))
    return _scores(transformed, params["embed"]["tokens"], params["head"]["bias"])


def loss(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    key: Key = None,
    *,
    chunk: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    r"""The student's cross-entropy, to labels or to distributions over them.

    .. math:: L = \frac{\sum_i w_i \left(\log \sum_v e^{z_{iv}} - \sum_v y_{iv} z_{iv}\right)}
        {\sum_i w_i}, \qquad z_{iv} = h_i \cdot E_v + c_v

    The second sum is :math:`h_i \cdot (y E)_i + (y c)_i`: no log-softmax is ever formed, and with
    ``chunk`` no scores of the whole vocabulary either, at any order of differentiation.

    Args:
        config: the shape.
        params: of ``init``.
        batch: as ``states`` takes it, and ``labels``: int ``[..., time]`` or a float distribution
            ``[..., time, vocab]`` that sums to one; ``weights`` ``[..., time]``: how much each
            label counts, 0 where there is none. If they sum to zero, so does the loss.
        key: drives dropout; None is deterministic.
        chunk: entries of the vocabulary scored at a time; None: all.

    Returns:
        A scalar of at least float32, and ``{"tokens": sum of the weights}``.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or shapes disagree.
        KeyError: the batch has no labels or no weights.

    Example:
        >>> shape = config(vocab=11, width=8, layers=1, heads=2, max_len=5)
        >>> params = init(shape, jax.random.key(0))
        >>> tokens = jnp.array([[3, 4, 5]])
        >>> hard = {"tokens": tokens, "labels": tokens, "weights": jnp.ones((1, 3))}
        >>> soft = {**hard, "tokens": jnp.eye(11)[tokens], "labels": jnp.eye(11)[tokens]}
        >>> bool(jnp.allclose(loss(shape, params, hard)[0], loss(shape, params, soft, chunk=4)[0]))
        True
    """
    labels, weights = batch["labels"], batch["weights"]
    rows = embed(params["embed"]["tokens"], batch["tokens"], chunk)
    body = transformer.trunk(config, params, rows, batch.get("mask"), key)
    transformed = _transformed(config, params["head"], body)
    table, bias = params["embed"]["tokens"], params["head"]["bias"]
    (targets, picked), _ = _lookup((table, bias[:, None]), labels, chunk)
    picked = picked[..., 0]
    if transformed.shape[:-1] != weights.shape or targets.shape[:-1] != weights.shape:
        raise ValueError(
            f"the batch has tokens {transformed.shape[:-1]}, labels {targets.shape[:-1]} and "
            f"weights {weights.shape}: all three are [..., time]"
        )
    value, total = heads.token_loss(transformed, table, targets, weights, (bias, picked), chunk)
    return value, {"tokens": total}


def write(
    config: TransformerConfig, params: Params, batch: Batch, key: Key = None
) -> dict[str, Array]:
    """The teacher's scores: what to put in place of each token, and what to label it.

    Args:
        config: the shape.
        params: of ``init_teacher``.
        batch: as ``states`` takes it.
        key: drives dropout; None is deterministic.

    Returns:
        ``inputs`` and ``labels``, both ``[..., time, vocab]``, at least float32.
    """
    body = states(config, params, batch, key)

    def scores(head: Params) -> Array:
        return _scores(_transformed(config, head, body), head["table"], head["bias"])

    return {"inputs": scores(params["inputs"]), "labels": scores(params["labels"])}


def write_factors(
    config: TransformerConfig, params: Params, batch: Batch, key: Key = None
) -> dict[str, Params]:
    """The teacher's distributions, not multiplied out: states and the table they are scored by.

    ``loss`` with ``chunk`` evaluates them a few tokens at a time, so that no pass of a soft
    teacher's gradient holds ``[tokens, vocab]`` entries; each pass computes them anew.

    Args:
        config: the shape.
        params: of ``init_teacher``.
        batch: as ``states`` takes it.
        key: drives dropout; None is deterministic.

    Returns:
        ``inputs`` and ``labels``, both ``{"states" [..., time, width], "table", "bias"}``, which
        stand for ``softmax(states @ table.T + bias)``. Of [PAD], which is no class, the
        probability is zero.
    """
    body = states(config, params, batch, key)

    def factors(head: Params) -> Params:
        bias = jnp.where(jnp.arange(config.vocab) == PAD, blocks.MASKED, head["bias"])
        return {"states": _transformed(config, head, body), "table": head["table"], "bias": bias}

    return {"inputs": factors(params["inputs"]), "labels": factors(params["labels"])}


def score(config: TransformerConfig, params: Params, batch: Batch, key: Key = None) -> Array:
    """The log-odds that each position is masked.

    Args:
        config: the shape.
        params: of ``init_scorer``.
        batch: as ``states`` takes it.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time]``.
    """
    return blocks.linear(states(config, params, batch, key), params["score"])[..., 0]


def _lookup(
    tables: tuple[Array, ...], tokens: Any, chunk: int | None
) -> tuple[tuple[Array, ...], Array]:
    """Rows of tables ``[vocab, width]`` for what ``embed`` takes, and the probability of [PAD]."""
    if isinstance(tokens, Mapping) and "ids" in tokens:
        shares = tokens["shares"].astype(tables[0].dtype)
        rows = [jnp.take(table, tokens["ids"], axis=0, mode="clip") for table in tables]
        found = tuple((shares[..., None] * each).sum(-2) for each in rows)
        return found, jnp.where(tokens["ids"] == PAD, shares, 0).sum(-1)
    if isinstance(tokens, Mapping):
        return _evaluated(tables, tokens, chunk)
    if jnp.issubdtype(tokens.dtype, jnp.integer):
        found = tuple(jnp.take(table, tokens, axis=0, mode="clip") for table in tables)
        return found, (tokens == PAD).astype(tables[0].dtype)
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(tables[0].dtype)
    rows = ((flat @ table).reshape(*tokens.shape[:-1], table.shape[-1]) for table in tables)
    return tuple(rows), tokens[..., PAD].astype(tables[0].dtype)


def _evaluated(
    tables: tuple[Array, ...], factors: Mapping[str, Array], chunk: int | None
) -> tuple[tuple[Array, ...], Array]:
    """``_lookup`` of a distribution that is not multiplied out, some tokens at a time."""
    states, weights, bias = factors["states"], factors["table"], factors["bias"]
    lead, vocab = states.shape[:-1], weights.shape[0]
    flat = states.reshape(-1, states.shape[-1])

    def some(flat: Array) -> tuple[tuple[Array, ...], Array]:
        p = jax.nn.softmax(heads.unembed(flat, weights) + bias[None], axis=-1)
        return tuple(p @ table for table in tables), p[:, PAD]

    # As many entries as a chunk of the vocabulary has over all tokens: whole rows, so that each
    # row's softmax is taken at once.
    each = len(flat) if chunk is None else max(1, len(flat) * chunk // vocab)
    while len(flat) % each:
        each -= 1
    one = jax.checkpoint(some, prevent_cse=False)
    parts = jax.lax.map(one, flat.reshape(-1, each, flat.shape[-1]))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[2:]), parts)


def _embedding(key: Array, config: TransformerConfig) -> Array:
    return (0.02 * jax.random.normal(key, (config.vocab, config.width))).at[PAD].set(0)


def _norm(*shape: int) -> Params:
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def _head(config: TransformerConfig, key: Array) -> Params:
    kernel = 0.02 * jax.random.normal(key, (config.width, config.width))
    return {
        "dense": {"kernel": kernel, "bias": jnp.zeros(config.width)},
        "ln": _norm(config.width),
        "bias": jnp.zeros(config.vocab),
    }


def _transformed(config: TransformerConfig, head: Params, states: Array) -> Array:
    states = blocks.gelu(blocks.linear(states, head["dense"]), config.gelu)
    return blocks.layer_norm(states, head["ln"], config.eps)


def _scores(states: Array, table: Array, bias: Array) -> Array:
    scores = heads.unembed(states.reshape(-1, states.shape[-1]), table)
    scores = scores + bias.astype(scores.dtype)[None]
    return scores.reshape(*states.shape[:-1], table.shape[0])
