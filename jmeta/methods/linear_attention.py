"""Attention without softmax in chunks: a sum over the past, at a cost that is linear in its length.

What a layer would say after rank-one updates of its weights, without forming any of these weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.types import Array


def linear_attention(
    queries: Array, keys: Array, values: Array, past: Array, chunk: int
) -> tuple[Array, Array]:
    r"""Sums the values of all positions before, weighted by products of queries and keys.

    .. math::
        o_t = q_t S_0 + \sum_{i<t} \langle q_t, k_i \rangle v_i, \qquad
        S = S_0 + \sum_i k_i v_i^\top

    Inside a chunk the scores are formed; what came before it is one matrix. Causal exactly: what
    a later position holds is multiplied by zero.

    Args:
        queries: ``[batch, time, in]``.
        keys: ``[batch, time, in]``.
        values: ``[batch, time, out]``.
        past: ``S_0``, ``[batch, in, out]``.
        chunk: positions of a chunk; a length that is no multiple is padded inside. It decides the
            cost, never the numbers.

    Returns:
        ``o`` ``[batch, time, out]`` and ``S`` ``[batch, in, out]``.

    Raises:
        ValueError: the chunk is not positive.

    Example:
        >>> ones = jnp.ones((1, 5, 1))
        >>> out, after = linear_attention(ones, ones, ones, jnp.zeros((1, 1, 1)), chunk=2)
        >>> out[0, :, 0].tolist(), float(after[0, 0, 0])
        ([0.0, 1.0, 2.0, 3.0, 4.0], 5.0)

    Source: Hua et al., "Transformer Quality in Linear Time" (2022), section 3.2, mixed chunks.
    """
    if chunk < 1:
        raise ValueError(f"a sequence cannot be cut into chunks of {chunk}")
    batch, time, width = values.shape
    chunk = min(chunk, time)
    pieces = _chunked(queries, chunk), _chunked(keys, chunk), _chunked(values, chunk)
    before = jnp.tril(jnp.ones((chunk, chunk), bool), -1)[None]

    def step(past: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        query, key, value = piece
        scores = jnp.where(before, jnp.einsum("bqd,bkd->bqk", query, key), 0)
        out = jnp.einsum("bqk,bkv->bqv", scores, value) + jnp.einsum("bqd,bdv->bqv", query, past)
        return past + jnp.einsum("bkd,bkv->bdv", key, value), out

    after, out = jax.lax.scan(step, past, pieces)
    return jnp.swapaxes(out, 0, 1).reshape(batch, -1, width)[:, :time], after


def _chunked(x: Array, chunk: int) -> Array:
    """``[batch, time, width]`` to ``[chunks, batch, chunk, width]``, filled up with zeros."""
    batch, time, width = x.shape
    filled = jnp.pad(x, ((0, 0), (0, -time % chunk), (0, 0)))
    return jnp.swapaxes(filled.reshape(batch, -1, chunk, width), 0, 1)
