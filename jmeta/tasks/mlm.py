"""Masked language modelling in the unified format: ``[CLS1] text [SEP]``, some tokens hidden.

The label is the original token where one was selected, and [PAD], which is no loss, elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jmeta.core.types import Array
from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir
from jmeta.tasks.corruption import Objective, masked_lm
from jmeta.tasks.feeding import Batch, ExampleSource
from jmeta.tasks.text import TextTask
from jmeta.tasks.tokenizer import Unified, cache_name, token_ids

MLM = TextTask("MLM", 1)
_VERSION = 1  # part of every cache key: raise it when the encoding changes


class Corpus(NamedTuple):
    """Texts as tokens, one after the other.

    Attributes:
        tokens: int32 ``[tokens]``.
        start: int64 ``[texts + 1]``, where each text begins; the last is where all end.
    """

    tokens: np.ndarray
    start: np.ndarray


def corpus(texts: Sequence[str], vocabulary: Unified) -> Corpus:
    """Tokenise texts once and keep the result on disk; texts without a token are left out.

    Raises:
        ValueError: no text has a token.
    """
    key = cache_key(version=_VERSION, texts=list(texts), tokenizer=cache_name(vocabulary))

    def make() -> dict[str, np.ndarray]:
        ids = [each for each in token_ids(vocabulary.tokenizer, texts) if len(each)]
        if not ids:
            raise ValueError(f"none of the {len(texts)} texts of the corpus has a token")
        return {
            "tokens": np.concatenate(ids),
            "start": np.cumsum([0, *(len(each) for each in ids)]).astype(np.int64),
        }

    return Corpus(**cached_arrays(cache_dir() / f"text-corpus-{key}.npz", make))


def masked(
    source: Corpus,
    vocabulary: Unified,
    positions: int,
    *,
    objective: Objective = masked_lm,
    **shares: float,
) -> ExampleSource:
    """A corpus as examples to draw, corrupted anew each time.

    A text is drawn with a probability in proportion to its length, by drawing one of all tokens;
    of a text longer than the model, a window that holds this token.

    Args:
        source: the corpus.
        vocabulary: the vocabulary it was tokenised with.
        positions: tokens of an example, special tokens included.
        objective: how they are corrupted, a function of ``tasks.corruption``.
        **shares: its options: ``select``, ``keep`` and ``random``.

    Returns:
        The source, for ``feeding.meta_batches``; examples drawn together are of distinct texts.

    Raises:
        ValueError: there is no room for a token.
    """
    if positions < 3:
        raise ValueError(f"[CLS1] and [SEP] leave no room for a token in {positions} positions")
    room, texts = positions - 2, len(source.start) - 1

    def draw(rng: np.random.Generator, k: int) -> Batch:
        if k > texts:
            raise ValueError(f"{k} distinct texts cannot be drawn from a corpus of {texts}")
        tokens = np.full((k, positions), vocabulary.pad, np.int32)
        taken: list[tuple[int, int]] = []
        for row in tokens:
            # One of the tokens that are left, counted without the texts already taken.
            place = int(rng.integers(len(source.tokens) - sum(b - a for a, b in taken)))
            for begin, end in sorted(taken):
                place += (end - begin) * (place >= begin)
            of = int(np.searchsorted(source.start, place, side="right")) - 1
            begin, end = map(int, source.start[of : of + 2])
            taken.append((begin, end))
            start = rng.integers(
                max(begin, place - room + 1), min(place, max(end - room, begin)) + 1
            )
            window = source.tokens[start : min(start + room, end)]
            row[: len(window) + 2] = [vocabulary.cls[MLM.number], *window, vocabulary.sep]
        corrupted = objective(tokens, rng, vocabulary, **shares)
        return {"segments": np.zeros_like(tokens), **corrupted}

    return ExampleSource(MLM.name, texts, draw)


def score(predicted: Array, labels: Array, pad: int) -> np.ndarray:
    """The share of selected tokens that are found again, for each example, in per cent.

    Args:
        predicted: int ``[..., positions]``, the likeliest token (``text.best_tokens``).
        labels: int ``[..., positions]``, ``pad`` where nothing was selected.
        pad: the id of [PAD].

    Returns:
        float64 ``[...]``; 100 for an example in which nothing was selected.

    Example:
        >>> score(np.array([[5, 6], [5, 6]]), np.array([[5, 7], [0, 0]]), pad=0)
        array([ 50., 100.])
    """
    selected = np.asarray(labels) != pad
    right = (selected & (np.asarray(predicted) == np.asarray(labels))).sum(-1)
    return np.where(selected.any(-1), 100 * right / np.maximum(selected.sum(-1), 1), 100.0)
