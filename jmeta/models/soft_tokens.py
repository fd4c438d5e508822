"""Rows of tables for tokens, for distributions over them, and for those not multiplied out.

What lets a student read, and learn from, what a teacher writes without drawing from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.types import Array
from jmeta.models import heads

PAD = 0  # the row of the embedding that no input reads a gradient into


def embed(table: Array, tokens: Any, chunk: int | None = None) -> Array:
    r"""Rows of the embedding for tokens, or their mean under a distribution.

    .. math:: r_i = E_{x_i}, \qquad r_i = \sum_v p_{iv} E_v,
        \qquad r_i = \sum_k s_{ik} E_{x_{ik}}

    Args:
        table: ``[vocab, width]``.
        tokens: int ``[..., time]``; or a float distribution ``[..., time, vocab]``; or a mixture
            of a few tokens, ``{"ids" int [..., time, k], "shares" float [..., time, k]}``; or a
            distribution that is not multiplied out, as ``teacher_lm.write_factors`` returns it.
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
    (rows,), of_pad = lookup((table,), tokens, chunk)
    # The row of [PAD] is put in again as a constant, which needs no copy of the table.
    constant = jax.lax.stop_gradient(table[PAD]) - table[PAD]
    return rows + of_pad[..., None] * constant.reshape((1,) * of_pad.ndim + (-1,))


def lookup(
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
    rows = (heads.mean_rows(flat, table) for table in tables)
    found = tuple(each.reshape(*tokens.shape[:-1], each.shape[-1]) for each in rows)
    return found, tokens[..., PAD].astype(tables[0].dtype)


def _evaluated(
    tables: tuple[Array, ...], factors: Mapping[str, Array], chunk: int | None
) -> tuple[tuple[Array, ...], Array]:
    """``lookup`` of a distribution that is not multiplied out, some tokens at a time."""
    states, weights, bias = factors["states"], factors["table"], factors["bias"]
    lead, vocab = states.shape[:-1], weights.shape[0]
    flat = states.reshape(-1, states.shape[-1])

    def some(flat: Array) -> tuple[tuple[Array, ...], Array]:
        p = jax.nn.softmax(heads.unembed(flat, weights) + bias[None], axis=-1)
        return tuple(heads.mean_rows(p, table) for table in tables), p[:, PAD]

    # As many entries as a chunk of the vocabulary has over all tokens: whole rows, so that each
    # row's softmax is taken at once.
    each = len(flat) if chunk is None else max(1, len(flat) * chunk // vocab)
    while len(flat) % each:
        each -= 1
    one = jax.checkpoint(some, prevent_cse=False)
    parts = jax.lax.map(one, flat.reshape(-1, each, flat.shape[-1]))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[2:]), parts)
