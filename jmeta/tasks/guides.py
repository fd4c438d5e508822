"""Which tokens guided masking may hide: rare ones, or those of words with a capital letter."""

from __future__ import annotations

import re

import numpy as np

from jmeta.tasks.tokenizer import Pieces

_WORD = re.compile(r"\S+")
_ENDS = (
    ".!?:=\"'`"  # what a sentence or a heading ends with, so that a capital behind means nothing
)


def rare_tokens(tokens: np.ndarray, size: int, share: float = 0.2) -> np.ndarray:
    r"""The rarest types of a corpus that together are at most a share of its tokens.

    .. math:: \sum_{v\ \mathrm{rare}} n_v \le s \sum_v n_v

    Args:
        tokens: int, the corpus.
        size: of the vocabulary.
        share: :math:`s`, in [0, 1].

    Returns:
        bool ``[size]``: index it with tokens for a guide. Of types equally frequent all are rare
        or none is; what never occurs is rare.

    Raises:
        ValueError: the share is none.

    Example:
        >>> rare_tokens(np.array([1, 1, 1, 1, 2, 3]), 4, share=0.4).tolist()
        [True, False, True, True]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is no share")
    counts = np.bincount(np.ravel(tokens), minlength=size)
    levels, level = np.unique(counts, return_inverse=True)
    mass = np.cumsum(np.bincount(level, weights=counts))
    return (mass <= share * counts.sum())[level] & (levels[level] < counts.max())


def capitalised(text: str, pieces: Pieces) -> np.ndarray:
    """Tokens of words with a capital letter that no sentence begins with: mostly names.

    Args:
        text: the text.
        pieces: its tokens with their places, of ``tokenizer.token_pieces``.

    Returns:
        bool ``[tokens]``; a word's tokens are all in or all out.

    Example:
        >>> from jmeta.tasks.bpe import train_bpe
        >>> from jmeta.tasks.tokenizer import token_pieces
        >>> text = "He saw Rome . Then he left"
        >>> pieces = token_pieces(train_bpe([text], 300), [text])[0]
        >>> guide = capitalised(text, pieces)
        >>> {text[a:b].strip() for a, b in zip(pieces.start[guide], pieces.stop[guide])}
        {'Rome'}
    """
    named = np.zeros(len(text), bool)
    begins = True
    for word in _WORD.finditer(text):
        said = word[0]
        if any(letter.isupper() for letter in said) and not begins:
            named[word.start() : word.end()] = True
        begins = said[-1] in _ENDS
    # A byte-level token may begin with the space before it: its last character says what it is of.
    last = np.maximum(pieces.stop - 1, 0)
    return named[last] & (pieces.stop > pieces.start) if len(text) else np.zeros(len(last), bool)
