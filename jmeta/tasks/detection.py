"""Detecting edits: tokens that were added, and places where tokens were deleted.

The edit itself and its random choice are apart, so that either can be tested or replaced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.types import Array
from jmeta.tasks.objectives import Batch, Words, draw_ordinary, is_ordinary, present


def insert(tokens: Array, inserted: Array, noise: Array, pad: int) -> tuple[Array, Array]:
    r"""Write tokens between those of a row; what no longer fits is cut.

    Output position j holds noise where ``inserted``, and else the next token of the row:

    .. math:: \mathrm{source}_j = \sum_{i \le j} (1 - \mathrm{inserted}_i) - 1

    The first token stays first, nothing is inserted behind the last, and where the row is cut its
    last token takes the last place.

    Args:
        tokens: int32 ``[..., positions]``, padded at the end.
        inserted: bool ``[..., positions]``, at places of the output.
        noise: int32 ``[..., positions]``, what is inserted there.
        pad: the id that pads.

    Returns:
        The new tokens, and bool where one was inserted; both ``[..., positions]``.

    Example:
        >>> row, at = jnp.array([[5, 6, 7, 0, 0]]), jnp.array([[0, 1, 0, 0, 1]], bool)
        >>> put = jax.jit(insert, static_argnames="pad")
        >>> tokens, added = put(row, at, jnp.full((1, 5), 9), pad=0)
        >>> tokens.tolist(), added.astype(int).tolist()
        ([[5, 9, 6, 7, 0]], [[0, 1, 0, 0, 0]])
    """
    place = _places(tokens)
    inserted = inserted & (place > 0)
    last = (tokens != pad).sum(-1, keepdims=True).astype(place.dtype) - 1
    source = jnp.cumsum(~inserted, -1).astype(place.dtype) - 1
    added = inserted & (source < last)
    copied = jnp.take_along_axis(tokens, jnp.clip(source, 0, tokens.shape[-1] - 1), -1)
    edited = jnp.where(
        added, noise, jnp.where(~inserted & (source <= last), copied, jnp.full_like(tokens, pad))
    )
    # A row that is cut keeps its last token, as [SEP] is, in the last place.
    is_cut = (place == tokens.shape[-1] - 1) & (source < last)
    ending = jnp.take_along_axis(tokens, jnp.maximum(last, 0), -1)
    return jnp.where(is_cut, ending, edited), added & ~is_cut


def delete(tokens: Array, deleted: Array, pad: int) -> tuple[Array, Array]:
    """Take tokens out of a row, close the gaps, and pad at the end.

    Args:
        tokens: int32 ``[..., positions]``, padded at the end.
        deleted: bool ``[..., positions]``.
        pad: the id that pads.

    Returns:
        The new tokens, and int32 how many were deleted right before each; both
        ``[..., positions]``. Tokens deleted at the end of a row, before none, are not counted.

    Example:
        >>> row, gone = jnp.array([[5, 6, 7, 8, 0]]), jnp.array([[0, 1, 1, 0, 0]], bool)
        >>> take = jax.jit(delete, static_argnames="pad")
        >>> tokens, missing = take(row, gone, pad=0)
        >>> tokens.tolist(), missing.tolist()
        ([[5, 8, 0, 0, 0]], [[0, 2, 0, 0, 0]])
    """
    place = _places(tokens)
    kept = (tokens != pad) & ~deleted
    # Sorted by their place, those that go behind all that stay.
    order = jnp.argsort(jnp.where(kept, place, place + tokens.shape[-1]), -1).astype(place.dtype)
    inside = place < kept.sum(-1, keepdims=True).astype(place.dtype)
    closed = jnp.where(inside, jnp.take_along_axis(tokens, order, -1), jnp.full_like(tokens, pad))
    before = jnp.concatenate([jnp.full_like(order[..., :1], -1), order[..., :-1]], -1)
    return closed, jnp.where(inside, order - before - 1, 0)


def added_tokens(tokens: Array, key: Array, words: Words, *, share: float = 0.15) -> Batch:
    """Added-token detection: ordinary tokens are inserted at random, and are to be found.

    Every place of the output behind the first holds an inserted token with probability ``share``;
    so a run of them has a geometric length.

    Args:
        tokens: int32 ``[..., positions]``, padded at the end; its first token stays first.
        key: a random key.
        words: what is special, and what can be drawn.
        share: the probability.

    Returns:
        ``tokens``; ``mask`` of the new length; ``labels`` int32, 1 where a token was added;
        ``weights`` float32, 1 at every ordinary token, 0 at special ones and padding. All
        ``[..., positions]``.

    Raises:
        ValueError: the share is no probability below 1.

    Example:
        >>> from jmeta.tasks.objectives import from_ids
        >>> import numpy as np
        >>> words = from_ids(0, 1, np.arange(3, 9), 9)
        >>> make = jax.jit(lambda tokens, key: added_tokens(tokens, key, words))
        >>> batch = make(jnp.array([[2, 5, 6, 2, 0, 0, 0]]), jax.random.key(3))
        >>> int(batch["mask"].sum()) == 4 + int(batch["labels"].sum())
        True

    Source: Wu et al. (2022), "atd"; with a mask of the new length, and no special token edited.
    """
    _check(share)
    where, what = jax.random.split(key)
    inserted = jax.random.bernoulli(where, share, tokens.shape)
    noise = draw_ordinary(what, tokens.shape, words).astype(tokens.dtype)
    edited, added = insert(tokens, inserted, noise, words.pad)
    return {
        "tokens": edited,
        "mask": present(edited, words),
        "labels": added.astype(jnp.int32),
        "weights": is_ordinary(edited, words).astype(jnp.float32),
    }


def deleted_tokens(tokens: Array, key: Array, words: Words, *, share: float = 0.15) -> Batch:
    """Deleted-token detection: tokens are taken out, and the places where are to be found.

    Each ordinary token but the first and the last of a row is deleted with probability ``share``;
    the token behind a run of them is labelled.

    Args:
        tokens: int32 ``[..., positions]``, padded at the end.
        key: a random key.
        words: what is special.
        share: the probability.

    Returns:
        ``tokens``; ``mask`` of the new length; ``labels`` int32, 1 where something is missing
        right before; ``weights`` float32, 1 at every token but the first, whose label is always
        0. All ``[..., positions]``.

    Raises:
        ValueError: the share is no probability below 1.

    Example:
        >>> from jmeta.tasks.objectives import from_ids
        >>> import numpy as np
        >>> words = from_ids(0, 1, np.arange(3, 9), 9)
        >>> make = jax.jit(lambda tokens, key: deleted_tokens(tokens, key, words))
        >>> batch = make(jnp.array([[2, 5, 6, 7, 8, 2]]), jax.random.key(1))
        >>> bool(batch["labels"].sum() <= 6 - batch["mask"].sum())  # at most one for each
        True

    Source: Wu et al. (2022), "dtd"; with a mask of the new length, and no special token deleted.
    """
    _check(share)
    place = _places(tokens)
    last = (tokens != words.pad).sum(-1, keepdims=True).astype(place.dtype) - 1
    inner = is_ordinary(tokens, words) & (place > 0) & (place < last)
    deleted = inner & jax.random.bernoulli(key, share, tokens.shape)
    edited, missing = delete(tokens, deleted, words.pad)
    mask = present(edited, words)
    return {
        "tokens": edited,
        "mask": mask,
        "labels": (missing > 0).astype(jnp.int32),
        "weights": jnp.where(place > 0, mask, 0.0),
    }


def _places(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)


def _check(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is no probability below 1")
