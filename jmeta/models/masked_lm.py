"""A pre-norm encoder with a masked language model's head: the student of teachers and of MLM.

It reads tokens or distributions over them, and learns from labels of either kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key
from jmeta.models import block_config, heads, primitives, transformer
from jmeta.models.soft_tokens import PAD, embed, lookup
from jmeta.models.transformer import TransformerConfig

Params = dict[str, Any]
Batch: TypeAlias = Mapping[str, Any]


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
    block_config.check(config)
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
    return {**init_body(config, body), "head": init_head(config, head)}


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
    transformed = head_states(config, params["head"], states(config, params, batch, key))
    return head_scores(transformed, params["embed"]["tokens"], params["head"]["bias"])


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
            label counts, 0 where there is none. If they sum to zero, so does the loss. With
            ``classes`` int ``[k]``, without an axis of examples, labels are ids, and are scored
            among these entries of the vocabulary alone; if one that counts is none of them, the
            loss is NaN.
        key: drives dropout; None is deterministic.
        chunk: entries of the vocabulary scored at a time; None: all.

    Returns:
        A scalar of at least float32, and ``{"tokens": sum of the weights}``.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or shapes disagree.
        KeyError: the batch has no labels or no weights.

    Example:
        >>> shape = config(vocab=11, width=8, layers=1, heads=2, max_len=5)
        >>> params = jax.jit(init, static_argnums=0)(shape, jax.random.key(0))
        >>> tokens = jnp.array([[3, 4, 5]])
        >>> hard = {"tokens": tokens, "labels": tokens, "weights": jnp.ones((1, 3))}
        >>> soft = {**hard, "tokens": jnp.eye(11)[tokens], "labels": jnp.eye(11)[tokens]}
        >>> score = jax.jit(loss, static_argnums=0, static_argnames="chunk")
        >>> one, other = score(shape, params, hard), score(shape, params, soft, chunk=4)
        >>> bool(jnp.allclose(one[0], other[0]))
        True
    """
    labels, weights = batch["labels"], batch["weights"]
    rows = embed(params["embed"]["tokens"], batch["tokens"], chunk)
    body = transformer.trunk(config, params, rows, batch.get("mask"), key)
    transformed = head_states(config, params["head"], body)
    table, bias = params["embed"]["tokens"], params["head"]["bias"]
    (targets, picked), _ = lookup((table, bias[:, None]), labels, chunk)
    picked = picked[..., 0]
    if transformed.shape[:-1] != weights.shape or targets.shape[:-1] != weights.shape:
        raise ValueError(
            f"the batch has tokens {transformed.shape[:-1]}, labels {targets.shape[:-1]} and "
            f"weights {weights.shape}: all three are [..., time]"
        )
    if "classes" in batch:
        classes = batch["classes"]
        known = (labels[..., None] == classes.reshape((1,) * labels.ndim + (-1,))).any(-1)
        picked = jnp.where(known | (weights == 0), picked, jnp.nan)
        table, bias = table[classes], bias[classes]
    value, total = heads.token_loss(transformed, table, targets, weights, (bias, picked), chunk)
    return value, {"tokens": total}


def _embedding(key: Array, config: TransformerConfig) -> Array:
    return (0.02 * jax.random.normal(key, (config.vocab, config.width))).at[PAD].set(0)


def _norm(*shape: int) -> Params:
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def init_head(config: TransformerConfig, key: Array) -> Params:
    """Draws ``{"dense", "ln", "bias" [vocab]}``, what stands between states and a table."""
    kernel = 0.02 * jax.random.normal(key, (config.width, config.width))
    return {
        "dense": {"kernel": kernel, "bias": jnp.zeros(config.width)},
        "ln": _norm(config.width),
        "bias": jnp.zeros(config.vocab),
    }


def head_states(config: TransformerConfig, head: Params, states: Array) -> Array:
    """States ``[..., width]`` as a head's table scores them."""
    states = primitives.gelu(primitives.linear(states, head["dense"]), config.gelu)
    return primitives.layer_norm(states, head["ln"], config.eps)


def head_scores(states: Array, table: Array, bias: Array) -> Array:
    """Scores ``[..., vocab]``, at least float32, of transformed states ``[..., width]``."""
    scores = heads.unembed(states.reshape(-1, states.shape[-1]), table)
    scores = scores + bias.astype(scores.dtype)[None]
    return scores.reshape(*states.shape[:-1], table.shape[0])
