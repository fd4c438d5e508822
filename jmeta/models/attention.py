"""Multi-head attention: who may see whom, queries, keys and values, and how they mix.

Every derivative of every order exists, but not of the fused kernels.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array, Key
from jmeta.models.block_config import BlockConfig
from jmeta.models.dropout import dropout
from jmeta.models.primitives import Params, linear

MASKED = -1e30  # a score that softmax sends to exactly zero, finite so that no derivative is NaN
# Multiply-adds of a head: of so few, a batch of products takes a call each, ten times their work.
_TINY = 128


def visible(causal: bool, mask: Array | None, time: int) -> Array | None:
    """Who attends to whom.

    Args:
        causal: whether a position sees only itself and the past.
        mask: ``[..., time]``, 1 for tokens, 0 for padding.
        time: length of the sequence.

    Returns:
        ``[batch or 1, 1, query, key]`` bool, or None for everybody.
    """
    allowed = None
    if causal:
        allowed = jnp.tril(jnp.ones((time, time), bool))[None, None]
    if mask is not None:
        present = (mask != 0).reshape(-1, 1, 1, time)
        allowed = present if allowed is None else present & allowed
    return allowed


def masked_softmax(scores: Array, allowed: Array | None) -> Array:
    """Softmax over the last axis; a row that may see nothing is spread evenly."""
    # The mask is added, not selected, and jax's softmax has a derivative in terms of its output:
    # of the [time, time] arrays only the probabilities are kept for a backward pass.
    if allowed is not None:
        scores = scores + jnp.where(allowed, 0.0, MASKED).astype(scores.dtype)
    return jax.nn.softmax(scores, axis=-1)


def attend(
    config: BlockConfig, weights: Params, x: Array, allowed: Array | None, key: Key = None
) -> Array:
    """Multi-head self-attention.

    Args:
        config: heads and how attention is computed.
        weights: ``out`` and either ``qkv``, whose columns are ordered query, key, value, or the
            three apart, as ``query``, ``key`` and ``value``; each a layer of ``linear``.
        x: ``[batch, time, width]``.
        allowed: what ``visible`` returned.
        key: drives the dropout of attention weights.

    Returns:
        ``[batch, time, width]``.
    """
    q, k, v = project(config, weights, x)
    return mix(config, weights, q, k, v, allowed, key)


def project(config: BlockConfig, weights: Params, x: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of every head.

    Args:
        config: its heads.
        weights: as in ``attend``.
        x: ``[batch, time, width]``.

    Returns:
        Three arrays ``[batch, heads, time, width // heads]``.
    """
    batch, time, width = x.shape
    per_head = width // config.heads
    if "qkv" in weights:
        joined = linear(x, weights["qkv"]).reshape(batch, time, 3, config.heads, per_head)
        q, k, v = jnp.transpose(joined, (2, 0, 3, 1, 4))
        return q, k, v
    q, k, v = (
        jnp.transpose(
            linear(x, weights[name]).reshape(batch, time, config.heads, per_head), (0, 2, 1, 3)
        )
        for name in ("query", "key", "value")
    )
    return q, k, v


def mix(
    config: BlockConfig,
    weights: Params,
    q: Array,
    k: Array,
    v: Array,
    allowed: Array | None,
    key: Key = None,
) -> Array:
    """Attention from queries to keys and values, which may be more than the queries.

    Args:
        config: how attention is computed.
        weights: its layer ``out``.
        q: ``[batch, heads, time, per_head]``.
        k: ``[batch, heads, keys, per_head]``.
        v: the same.
        allowed: ``[batch or 1, 1, time, keys]`` bool, or None for everybody.
        key: drives the dropout of attention weights.

    Returns:
        ``[batch, time, width]``.
    """
    batch, heads, time, per_head = q.shape
    if config.attention == "fused":
        q, k, v = (jnp.transpose(each, (0, 2, 1, 3)) for each in (q, k, v))
        capability = getattr(jax.devices()[0], "compute_capability", "")
        kernel = fused_kernel(capability, q, k)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation=kernel)
    else:
        scores = _scores(q * per_head**-0.5, k)
        probabilities = masked_softmax(scores, allowed).astype(q.dtype)
        probabilities = dropout(probabilities, config.attention_dropout, key)
        mixed = jnp.transpose(_mixed(probabilities, v), (0, 2, 1, 3))
    return linear(mixed.reshape(batch, time, heads * per_head), weights["out"])


def _scores(q: Array, k: Array) -> Array:
    """Products of queries and keys, ``[batch, heads, time, keys]``, at least float32."""
    exact = at_least_float32(q.dtype)
    if math.prod(q.shape[2:]) * k.shape[2] <= _TINY:
        return (q.astype(exact)[..., :, None, :] * k.astype(exact)[..., None, :, :]).sum(-1)
    return jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=exact)


def _mixed(probabilities: Array, v: Array) -> Array:
    """Means of values, ``[batch, heads, time, per_head]``."""
    if math.prod(probabilities.shape[2:]) * v.shape[3] <= _TINY:
        exact = at_least_float32(v.dtype)
        products = probabilities.astype(exact)[..., None] * v.astype(exact)[..., None, :, :]
        return products.sum(-2).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", probabilities, v)


def fused_kernel(capability: str, q: Array, k: Array) -> Literal["cudnn", "xla"]:
    """What computes fused attention; jax does not choose by itself.

    Args:
        capability: of the device, such as ``"9.0"``; empty where it is no GPU, and a name where it
            is not NVIDIA's.
        q: queries ``[batch, time, heads, per_head]``.
        k: keys ``[batch, keys, heads, per_head]``.

    Returns:
        cuDNN's flash attention where it exists (8.0 and later) and takes these arrays: half
        precision, at most 128 columns a head in multiples of eight, even lengths; else XLA.
    """
    major = capability.partition(".")[0]
    exists = major.isdecimal() and int(major) >= 8
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if exists and half and even and fits else "xla"
