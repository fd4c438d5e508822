"""Objectives on whole sentences: each beside itself, and two of them in order or exchanged."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.types import Array
from jmeta.tasks.objectives import Batch, Words, present


def twins(tokens: Array, key: Array, words: Words) -> Batch:
    """Contrastive sentence embedding: half of the rows, each twice, told apart by dropout alone.

    Rows 2i and 2i + 1 are one sentence. The key of the dropout travels with the batch, so that a
    fixed batch has a fixed loss, and that evaluation, which passes no key, is no degenerate one.

    Args:
        tokens: int32 ``[rows, positions]``, padded at the end; of an odd number the last row, and
            of the others the second half, are not used.
        key: a random key.
        words: what pads.

    Returns:
        ``tokens`` int32 and ``mask`` float32, ``[rows // 2 * 2, positions]``; ``dropout``, a key.

    Raises:
        ValueError: fewer than four rows: there is nothing to tell a sentence from.

    Example:
        >>> from jmeta.tasks.objectives import from_ids
        >>> import numpy as np
        >>> words = from_ids(0, None, np.arange(3, 9), 9)
        >>> rows = jnp.array([[5], [6], [7], [8]])
        >>> twins(rows, jax.random.key(0), words)["tokens"][:, 0].tolist()
        [5, 5, 6, 6]

    Source: Gao et al., "SimCSE" (2021), section 3.
    """
    if tokens.ndim != 2 or len(tokens) < 4:
        raise ValueError(
            f"tokens have the shape {tokens.shape}: [rows, positions] with at least four rows, two "
            "sentences, are needed for one to be told from another"
        )
    doubled = jnp.repeat(tokens[: len(tokens) // 2], 2, axis=0)
    return {"tokens": doubled, "mask": present(doubled, words), "dropout": key}


def twin_of(rows: int) -> Array:
    """The row that holds the same sentence as each, of ``twins``.

    Example:
        >>> twin_of(4).tolist()
        [1, 0, 3, 2]
    """
    return jnp.arange(rows) ^ 1


def exchange(tokens: Array, second: Array, exchanged: Array, pad: int) -> tuple[Array, Array]:
    """``[CLS] A [SEP] B [SEP]`` to ``[CLS] B [SEP] A [SEP]``, where asked for.

    Args:
        tokens: int32 ``[..., positions]``, padded at the end.
        second: int32 ``[...]``, where B begins, behind the separator of A.
        exchanged: bool ``[...]``.
        pad: the id that pads.

    Returns:
        The tokens, and where the second text now begins.

    Example:
        >>> row = jnp.array([[2, 5, 3, 6, 7, 3, 0]])
        >>> tokens, second = exchange(row, jnp.array([3]), jnp.array([True]), pad=0)
        >>> tokens.tolist(), second.tolist()
        ([[2, 6, 7, 3, 5, 3, 0]], [4])
    """
    place, begin = _places(tokens), second[..., None]
    length = (tokens != pad).sum(-1, keepdims=True).astype(place.dtype)
    of_second = length - begin
    from_second = place + begin - 1
    from_first = place - of_second
    source = jnp.where(place <= of_second, from_second, from_first)
    source = jnp.where((place == 0) | (place >= length) | ~exchanged[..., None], place, source)
    moved = jnp.take_along_axis(tokens, source, -1)
    return moved, jnp.where(exchanged, of_second[..., 0] + 1, second)


def sentence_order(
    tokens: Array, second: Array, key: Array, words: Words, *, share: float = 0.5
) -> Batch:
    """Sentence order: two neighbouring texts, exchanged or not; which is to be told.

    Args:
        tokens: int32 ``[..., positions]``: ``[CLS] A [SEP] B [SEP]``, padded at the end.
        second: int32 ``[...]``, where B begins.
        key: a random key.
        words: what pads.
        share: the probability that a pair is exchanged.

    Returns:
        ``tokens``, ``mask``, ``segments`` int32 (1 for the second text), all
        ``[..., positions]``; ``y`` int32 ``[...]``, 1 where the pair was exchanged.

    Raises:
        ValueError: the share is no probability.

    Example:
        >>> from jmeta.tasks.objectives import from_ids
        >>> import numpy as np
        >>> words = from_ids(0, None, np.arange(5, 9), 9)
        >>> row = jnp.array([[2, 5, 3, 6, 7, 3, 0]])
        >>> batch = sentence_order(row, jnp.array([3]), jax.random.key(0), words, share=1.0)
        >>> batch["segments"].tolist(), batch["y"].tolist()
        ([[0, 0, 0, 0, 1, 1, 0]], [1])

    Source: Lan et al., "ALBERT" (2020), section 3.1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is no probability")
    exchanged = jax.random.bernoulli(key, share, second.shape)
    ordered, start = exchange(tokens, second, exchanged, words.pad)
    mask = present(ordered, words)
    behind = _places(tokens) >= start[..., None]
    return {
        "tokens": ordered,
        "mask": mask,
        "segments": (behind & (mask != 0)).astype(jnp.int32),
        "y": exchanged.astype(jnp.int32),
    }


def _places(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
