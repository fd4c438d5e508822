"""Weights of tokens by rule, to compare learned ones with: TF-IDF, and names and numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jmeta.tasks.tokenizer import Pieces

_WORD = re.compile(r"\w[\w'’-]*")
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n][\"'”’)]*)\s*[\"'“‘(]*$")
# Between two capitalised words these belong to one name: "University of Oxford".
_LINKS = {"of", "de", "la", "le", "du", "van", "von", "der", "den", "del", "di", "and", "the"}


def fit_tf_idf(texts: Sequence[str]) -> Any:
    """Document frequencies of words, from texts that may be others than those to be weighed.

    Args:
        texts: documents.

    Returns:
        scikit-learn's ``TfidfVectorizer``, fitted: words of two or more letters in lower case,
        ``idf = log((1 + documents) / (1 + df)) + 1``, and a document's weights of length one.

    Raises:
        ValueError: no text holds a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit(texts)


def tf_idf(text: str, pieces: Pieces, fitted: Any, *, drop: float = 0.0) -> np.ndarray:
    """The TF-IDF of the word that each token is a part of.

    Args:
        text: a document.
        pieces: its tokens, from ``token_pieces``.
        fitted: what ``fit_tf_idf`` returned.
        drop: the share of the tokens with a weight that lose it, the smallest first.

    Returns:
        float32 ``[tokens]``; a token that several words touch has the largest of theirs; words
        that were not there when the frequencies were counted have none.

    Raises:
        ValueError: a share outside [0, 1].

    Example:
        >>> fitted = fit_tf_idf(["the cat", "the dog"])
        >>> tokens = Pieces(np.zeros(3), np.array([0, 3, 5]), np.array([3, 5, 7]))  # The| c|at
        >>> tf_idf("The cat", tokens, fitted).round(3).tolist()
        [0.5799999833106995, 0.8149999976158142, 0.8149999976158142]
        >>> int((tf_idf("The cat", tokens, fitted, drop=0.34) == 0).sum())
        1
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop={drop} is no share of the tokens: choose one in [0, 1]")
    row = fitted.transform([text]).toarray()[0]
    known, analyse = fitted.vocabulary_, fitted.build_tokenizer()
    pattern = re.compile(fitted.token_pattern)
    spans, values = [], []
    for found in pattern.finditer(text):
        # In lower case it may be several: there a dotted capital I is two characters.
        words = [word for word in analyse(found[0].lower()) if word in known]
        if words:
            spans.append(found.span())
            values.append(max(row[known[word]] for word in words))
    weights = over_tokens(spans, values, pieces)
    held = np.flatnonzero(weights)
    order = held[np.argsort(weights[held], kind="stable")]
    weights[order[: round(drop * len(held))]] = 0
    return weights


def over_tokens(
    spans: Sequence[tuple[int, int]], values: Sequence[float], pieces: Pieces
) -> np.ndarray:
    """What is said of characters, said of tokens: the largest value of the spans each touches.

    Args:
        spans: the first character of each and the one after its last.
        values: one for each span.
        pieces: tokens.

    Returns:
        float32 ``[tokens]``; 0 where no span is.

    Example:
        >>> tokens = Pieces(np.zeros(3), np.array([0, 3, 5]), np.array([3, 5, 7]))
        >>> over_tokens([(0, 2), (4, 7)], [1.0, 2.0], tokens).tolist()
        [1.0, 2.0, 2.0]
    """
    weights = np.zeros(len(pieces.ids), np.float32)
    for (start, stop), value in zip(spans, values, strict=True):
        touched = (pieces.start < stop) & (pieces.stop > start)
        weights[touched] = np.maximum(weights[touched], value)
    return weights


def salient_spans(text: str) -> list[tuple[int, int]]:
    """Names and numbers, found by rule.

    A name is a run of words that begin with a capital, linked by words such as "of" and "van". The
    first word of a sentence is none, unless its run is longer or it has two capitals, such as an
    abbreviation. A number is a word that begins with a digit: years, dates and amounts. An entity
    recogniser finds more and errs less; this needs no model.

    Args:
        text: any text.

    Returns:
        Spans of characters, from left to right.

    Example:
        >>> text = "In 1096 teaching began at the University of Oxford. It grew. NASA was later."
        >>> [text[a:b] for a, b in salient_spans(text)]
        ['1096', 'University of Oxford', 'NASA']
    """
    words = list(_WORD.finditer(text))
    spans: list[tuple[int, int]] = []
    i = 0
    while i < len(words):
        word = words[i]
        if word[0][0].isdigit():
            spans.append(word.span())
            i += 1
            continue
        if not word[0][0].isupper():
            i += 1
            continue
        last = _end_of_name(text, words, i)
        opens = _SENTENCE_START.search(text[max(0, word.start() - 8) : word.start()])
        capitals = sum(c.isupper() for c in word[0])
        if last > i or not opens or capitals > 1:
            spans.append((word.start(), words[last].end()))
        i = last + 1
    return spans


def _end_of_name(text: str, words: list[re.Match[str]], first: int) -> int:
    """The index of the last word of the name that begins with a word."""
    last = first
    for i in range(first + 1, len(words)):
        if text[words[i - 1].end() : words[i].start()].strip(" "):
            break  # punctuation between them
        if words[i][0][0].isupper():
            last = i
        elif words[i][0] not in _LINKS:
            break
    return last


def salient(text: str, pieces: Pieces) -> np.ndarray:
    """1 for tokens of names and numbers, 0 for others, as in salient span masking.

    Args:
        text: a document.
        pieces: its tokens.

    Returns:
        float32 ``[tokens]``.

    Example:
        >>> tokens = Pieces(np.zeros(2), np.array([0, 2]), np.array([2, 6]))
        >>> salient("to Rome", tokens).tolist()
        [0.0, 1.0]
    """
    spans = salient_spans(text)
    return over_tokens(spans, [1.0] * len(spans), pieces)
