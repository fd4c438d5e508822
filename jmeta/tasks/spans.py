"""Span corruption: spans of tokens become a sentinel each, and are asked for behind the text.

For a decoder: text and answer stand in one row, and only the answer counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.types import Array
from jmeta.tasks.objectives import Batch, Words, is_ordinary, present


def noise_spans(count: Array, share: float, mean_length: float, room: int, key: Array) -> Array:
    r"""Which of the first ``count`` places of a row are noise: a fixed number, in random spans.

    .. math:: n_{noise} = \mathrm{round}(s n), \qquad n_{spans} = \mathrm{round}(n_{noise} / \mu)

    both at least 1 and leaving at least a span of text each. Noise and text are cut into
    ``n_spans`` random parts that are no emptier than one token, and alternate, text first.

    Args:
        count: int32 ``[...]``, places that there are.
        share: :math:`s`, of them that is noise.
        mean_length: :math:`\mu`, of a span.
        room: places of a row.
        key: a random key.

    Returns:
        bool ``[..., room]``; a row of fewer than two places has no noise.

    Example:
        >>> spans = jax.jit(lambda count, key: noise_spans(count, 0.2, 2.0, 24, key))
        >>> noise = spans(jnp.array([20]), jax.random.key(0))
        >>> int(noise.sum()), int((noise[:, 1:] & ~noise[:, :-1]).sum())
        (4, 2)

    Source: Raffel et al., "T5" (2020), section 3.1.4, and its released code.
    """
    size = count[..., None].astype(jnp.float32)
    noisy = jnp.clip(jnp.round(size * share), 1, jnp.maximum(size - 1, 1))
    spans = jnp.clip(jnp.round(noisy / mean_length), 1, jnp.minimum(noisy, size - noisy))
    first, second = jax.random.split(key)
    of_noise = _part_lengths(noisy, spans, room, first)
    of_text = _part_lengths(size - noisy, spans, room, second)
    # Text, noise, text, noise ...: a place is noise where it lies behind an odd number of ends.
    lengths = jnp.stack([of_text, of_noise], -1).reshape(*of_text.shape[:-1], -1)
    ends = jnp.cumsum(lengths, -1)
    place = jnp.arange(room, dtype=ends.dtype)
    passed = (place.reshape((1,) * (ends.ndim - 1) + (-1, 1)) >= ends[..., None, :]).sum(-1)
    inside = place.reshape((1,) * (ends.ndim - 1) + (-1,)) < size
    return inside & (passed % 2 == 1) & (size >= 2)


def span_corruption(
    tokens: Array,
    key: Array,
    words: Words,
    sentinels: Sequence[int] | np.ndarray,
    *,
    share: float = 0.15,
    mean_length: float = 3.0,
) -> Batch:
    """Span corruption for a decoder: ``text with sentinels, sentinel span sentinel span ...``.

    The k-th span of noise becomes the k-th sentinel in the text; behind the text follow, for each
    span, its sentinel and its tokens. Special tokens are never part of a span: one in the middle
    of a span makes two of it. Spans for which no sentinel is left stay text.

    Args:
        tokens: int32 ``[..., positions]``, padded at the end.
        key: a random key.
        words: what is special.
        sentinels: ids of the sentinels, special tokens that occur nowhere else.
        share: of the ordinary tokens that is noise.
        mean_length: of a span.

    Returns:
        ``tokens`` int32, ``mask`` float32 and ``weights`` float32, 1 for the answer's tokens, at
        the token that is predicted; ``[..., positions + 2 * len(sentinels)]``, which holds any
        row.

    Raises:
        ValueError: no sentinel, one that is an ordinary token, or shares that are none.

    Example:
        >>> from jmeta.tasks.objectives import from_ids
        >>> words = from_ids(0, None, np.arange(5, 30), 30)
        >>> row = jnp.arange(5, 17)[None]
        >>> make = jax.jit(lambda row, key: span_corruption(row, key, words, [1, 2], share=0.25))
        >>> batch = make(row, jax.random.key(0))
        >>> batch["tokens"][0, batch["weights"][0] > 0][0]  # the answer begins with its sentinel
        Array(1, dtype=int32)

    Source: Raffel et al., "T5" (2020), section 3.1.4; the decoder-only form of Tay et al., "UL2"
    (2023).
    """
    marks = np.asarray(sentinels, np.int32)
    if not marks.size or words.is_ordinary[marks].any():
        raise ValueError(f"sentinels={marks.tolist()} must be special tokens, at least one")
    if not (0 < share < 1 and mean_length >= 1):
        raise ValueError(f"share={share} and mean_length={mean_length}: give 0 < share < 1 <= mean")
    time = tokens.shape[-1]
    ordinary = is_ordinary(tokens, words)
    rank = jnp.cumsum(ordinary, -1) - 1
    count = ordinary.sum(-1).astype(jnp.int32)
    of_rank = noise_spans(count, share, mean_length, time, key)
    noise = ordinary & jnp.take_along_axis(of_rank, jnp.maximum(rank, 0), -1)
    before = jnp.concatenate([jnp.zeros_like(noise[..., :1]), noise[..., :-1]], -1)
    number = jnp.cumsum(noise & ~before, -1)  # of the span, from 1
    noise = noise & (number <= marks.size)
    begins = noise & ~before
    sentinel = jnp.asarray(marks)[jnp.clip(number - 1, 0, marks.size - 1)]

    # Every token as it stands in the text or in the answer, and each sentinel in both.
    kept = (tokens != words.pad) & ~noise
    of_text = jnp.where(begins, sentinel, tokens)
    answer = jnp.stack([sentinel, tokens], -1).reshape(*tokens.shape[:-1], 2 * time)
    wanted = jnp.stack([begins, noise], -1).reshape(*tokens.shape[:-1], 2 * time)
    every = jnp.concatenate([of_text, answer], -1)
    counts = jnp.concatenate([kept | begins, wanted], -1)
    asked = jnp.concatenate([jnp.zeros_like(kept), wanted], -1)

    room = time + 2 * marks.size
    order = jnp.argsort(~counts, -1, stable=True)[..., :room]
    full = jnp.take_along_axis(counts, order, -1)
    row = jnp.where(full, jnp.take_along_axis(every, order, -1), words.pad).astype(tokens.dtype)
    weights = (full & jnp.take_along_axis(asked, order, -1)).astype(jnp.float32)
    return {"tokens": row, "mask": present(row, words), "weights": weights}


def _part_lengths(total: Array, parts: Array, room: int, key: Array) -> Array:
    """``total`` items cut at random into ``parts`` of at least one: ``[..., room]``, then zeros."""
    shape = (*total.shape[:-1], room)
    place = jnp.broadcast_to(jnp.arange(room, dtype=total.dtype), shape)
    # The first item of every part but the first is drawn without replacement.
    free = (place >= 1) & (place < total)
    order = jnp.argsort(jnp.where(free, jax.random.uniform(key, shape), 2.0), -1)
    begins = free & (jnp.argsort(order, -1).astype(total.dtype) < parts - 1)
    part = jnp.cumsum(begins, -1)
    is_of = (part[..., None] == jnp.arange(room).reshape((1,) * part.ndim + (-1,))) & (
        place < total
    )[..., None]
    return is_of.sum(-2).astype(total.dtype)
