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


def corrupt(
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocabulary: Unified,
    *,
    select: float = 0.15,
    keep: float = 0.1,
    random: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide some of the ordinary tokens of each row; special tokens are never touched.

    Of the n ordinary tokens of a row, ``floor(select * n + U)`` with U uniform in [0, 1) are
    selected without replacement. Of these, some stay, some become an ordinary token or [SEP] at
    random, and the others [MASK].

    Args:
        tokens: int ``[..., positions]``.
        rng: the generator.
        vocabulary: says what is special.
        select: the share selected.
        keep: of these, the share left as it is.
        random: of these, the share replaced at random.

    Returns:
        Inputs and labels, int32 like ``tokens``; a label is [PAD] where nothing was selected.

    Raises:
        ValueError: the shares are none.

    Source:
        Devlin et al. 2019, "BERT", section 3.1.
    """
    if not (0 <= select <= 1 and keep >= 0 and random >= 0 and keep + random <= 1):
        raise ValueError(f"select={select}, keep={keep} and random={random} are no shares")
    tokens = np.asarray(tokens, np.int32)
    is_ordinary = np.zeros(vocabulary.size, bool)
    is_ordinary[vocabulary.ordinary] = True
    ordinary = is_ordinary[tokens]
    wanted = np.floor(select * ordinary.sum(-1) + rng.random(tokens.shape[:-1]))
    keys = np.where(ordinary, rng.random(tokens.shape), 2)
    chosen = keys.argsort(-1).argsort(-1) < wanted[..., None]
    fate, replacements = rng.random(tokens.shape), np.append(vocabulary.ordinary, vocabulary.sep)
    drawn = replacements[rng.integers(len(replacements), size=tokens.shape)]
    hidden = np.where(fate < keep, tokens, np.where(fate < keep + random, drawn, vocabulary.mask))
    inputs = np.where(chosen, hidden, tokens).astype(np.int32)
    return inputs, np.where(chosen, tokens, vocabulary.pad).astype(np.int32)


def masked(source: Corpus, vocabulary: Unified, positions: int, **shares: float) -> ExampleSource:
    """A corpus as examples to draw, corrupted anew each time.

    A text is drawn with a probability in proportion to its length, by drawing one of all tokens;
    of a text longer than the model, a window that holds this token.

    Args:
        source: the corpus.
        vocabulary: the vocabulary it was tokenised with.
        positions: tokens of an example, special tokens included.
        **shares: ``select``, ``keep`` and ``random`` of ``corrupt``.

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
        mask = (tokens != vocabulary.pad).astype(np.float32)
        inputs, labels = corrupt(tokens, rng, vocabulary, **shares)
        return {
            "tokens": inputs,
            "segments": np.zeros_like(tokens),
            "mask": mask,
            "labels": labels,
            "weights": (labels != vocabulary.pad).astype(np.float32),
        }

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
