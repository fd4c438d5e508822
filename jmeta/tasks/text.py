"""One format for every text task: a text or a pair in, a label of as many tokens out.

An input is ``[CLSk] A [SEP] B [SEP]``, where k says which task it is; a label is a token for every
position of it, so that one language-modelling head serves all tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.types import Array
from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir
from jmeta.tasks.tokenizer import (
    Pieces,
    Unified,
    cache_name,
    token_ids,
    token_pieces,
    whole_characters,
)
from jmeta.tasks.windows import check_outputs, pair_windows, windows

HIDDEN = -1  # the label of an example whose label is not given, as in a test set
LabelToken = Literal["sep", "mask", "cls"]
_VERSION = 1  # part of every cache key: raise it when the encoding changes


class TextTask(NamedTuple):
    """What a task is called and how its labels are written.

    Attributes:
        name: the name used in tables and errors.
        number: the k of its [CLSk].
        classes: the names of its classes, in the order of their indices.
        tokens: the label token of each class: ``"sep"``, ``"mask"``, or ``"cls"`` for its [CLSk].
        kind: ``"classes"``: the class token at every position; ``"spans"``: its own token where
            an answer is mentioned in B and [SEP] elsewhere; ``"score"``: a number, and no tokens.
    """

    name: str
    number: int
    classes: tuple[str, ...] = ()
    tokens: tuple[LabelToken, ...] = ()
    kind: Literal["classes", "spans", "score"] = "classes"


class Example(NamedTuple):
    """One example of a task, as text.

    Attributes:
        a: the first text.
        b: the second text, or None.
        label: the index of the class, a score, or ``HIDDEN``.
        spans: the answers' places in ``b``: ``(first character, character after the last)``.
        answers: the answers' texts, for scoring.
        idx: what the data set calls this example.
    """

    a: str
    b: str | None = None
    label: int | float = HIDDEN
    spans: tuple[tuple[int, int], ...] = ()
    answers: tuple[str, ...] = ()
    idx: Any = None


class Encoded(NamedTuple):
    """Examples as windows of tokens; the windows of an example follow each other.

    Attributes:
        tokens: uint16 or int32 ``[windows, positions]``, padded with ``pad``.
        length: int32 ``[windows]``, tokens before the padding.
        second: int32 ``[windows]``, where B begins; equal to ``length`` without one.
        gold: bool ``[windows, positions]``, where an answer is; ``[windows, 0]`` if not spans.
        example: int32 ``[windows]``, which example a window is of.
        label: int32 ``[examples]`` (float32 for scores): classes, ``HIDDEN`` where not given.
        class_tokens: the id of the label token of each class.
        pad: the id of [PAD].
        sep: the id of [SEP].
    """

    tokens: np.ndarray
    length: np.ndarray
    second: np.ndarray
    gold: np.ndarray
    example: np.ndarray
    label: np.ndarray
    class_tokens: tuple[int, ...]
    pad: int
    sep: int


def class_tokens(task: TextTask, vocabulary: Unified) -> tuple[int, ...]:
    """The ids of the label tokens of a task's classes, in the order of the classes.

    Raises:
        ValueError: the task has no [CLSk], or not one token of its own for every class.
    """
    if not 0 <= task.number < len(vocabulary.cls):
        raise ValueError(
            f"{task.name} has the number {task.number}: there are [CLS0] to "
            f"[CLS{len(vocabulary.cls) - 1}]"
        )
    if not len(task.tokens) == len(set(task.tokens)) == len(task.classes):
        raise ValueError(
            f"{task.name} has the classes {task.classes} and the label tokens {task.tokens}: each "
            "class needs one of its own"
        )
    ids = {"sep": vocabulary.sep, "mask": vocabulary.mask, "cls": vocabulary.cls[task.number]}
    return tuple(ids[token] for token in task.tokens)


def encode(
    task: TextTask,
    examples: Sequence[Example],
    vocabulary: Unified,
    *,
    positions: int = 128,
    stride: int = 64,
) -> Encoded:
    """Tokenise examples once, cut long ones into overlapping windows, and keep the result on disk.

    Every token of A and of B is in at least one window; where a pair is too long, the longer text
    is cut first. The cache is named after the examples, the tokeniser and the settings.

    Args:
        task: the task.
        examples: n examples.
        vocabulary: ``unified(tokenizer)``.
        positions: tokens per window, special tokens included.
        stride: tokens from the start of one window to the start of the next.

    Returns:
        The windows.

    Raises:
        ValueError: no example, a label that is none of the task's, a span that is outside of its
            text, or too few positions; the row and the field are named.

    Example:
        >>> from jmeta.tasks.tokenizer import train_unified, unified
        >>> words = unified(train_unified(["a b"], 300))
        >>> task = TextTask("moon", 2, ("low", "high"), ("sep", "cls"))
        >>> encoded = encode(task, [Example("a", "b", 1)], words, positions=7)
        >>> window = batch(encoded, [0])
        >>> window["tokens"][0].tolist(), window["labels"][0].tolist()
        ([5, 97, 2, 98, 2, 0, 0], [5, 5, 5, 5, 5, 0, 0])
    """
    _check(task, examples, positions)
    tokens = class_tokens(task, vocabulary)
    name = re.sub(r"\W+", "-", task.name.lower())  # whatever it is, it stays in the folder
    key = cache_key(
        version=_VERSION,
        task=task,
        examples=list(examples),
        tokenizer=cache_name(vocabulary),
        positions=positions,
        stride=stride,
    )
    arrays = cached_arrays(
        cache_dir() / f"text-{name}-{key}.npz",
        lambda: _encode(task, examples, vocabulary, positions, stride),
    )
    return Encoded(
        **arrays,
        class_tokens=tokens,
        pad=vocabulary.pad,
        sep=vocabulary.sep,
    )


def _check(task: TextTask, examples: Sequence[Example], positions: int) -> None:
    if not examples:
        raise ValueError(f"{task.name} has no example to encode")
    for i, example in enumerate(examples):
        where = f"row {i} of {task.name} (idx {example.idx!r})"
        for field, text in (("a", example.a), ("b", example.b)):
            if field == "a" or text is not None:
                whole_characters(text, f"{where}, field {field!r}")
        needed = 3 if example.b is None else 5
        if positions < needed:
            raise ValueError(f"{where} needs at least {needed} positions, not {positions}")
        _check_label(task, example.label, f"{where}, field 'label': {example.label!r} is")
        for start, stop in example.spans:
            if not 0 <= start <= stop <= len(example.b or ""):
                raise ValueError(
                    f"{where}, field 'spans': characters {start} to {stop} are outside of a text "
                    f"of {len(example.b or '')}"
                )


def _check_label(task: TextTask, label: Any, said: str) -> None:
    hidden = f"({HIDDEN} stands for a hidden label)"
    if not isinstance(label, int | float | np.number | np.bool_) or not np.isfinite(label):
        raise ValueError(f"{said} no number {hidden}")
    if task.kind == "classes" and label not in range(HIDDEN, len(task.classes)):
        raise ValueError(f"{said} no index of {task.classes} {hidden}")
    if task.kind == "spans" and label not in (0, HIDDEN):
        raise ValueError(f"{said} not 0, which says that the answers are known {hidden}")


def _encode(
    task: TextTask, examples: Sequence[Example], vocabulary: Unified, positions: int, stride: int
) -> dict[str, np.ndarray]:
    spans = task.kind == "spans"
    firsts = token_ids(vocabulary.tokenizer, [example.a for example in examples])
    texts = [example.b or "" for example in examples]
    if spans:
        pieces = token_pieces(vocabulary.tokenizer, texts)
    else:
        none = np.zeros(0, np.int32)
        pieces = [Pieces(ids, none, none) for ids in token_ids(vocabulary.tokenizer, texts)]

    rows, second, example_of, gold = [], [], [], []
    cls, sep = [vocabulary.cls[task.number]], [vocabulary.sep]
    for i, (example, a, b) in enumerate(zip(examples, firsts, pieces, strict=True)):
        if example.b is None:
            cuts = [
                ((start, stop), (0, 0)) for start, stop in windows(len(a), positions - 2, stride)
            ]
        else:
            cuts = pair_windows(len(a), len(b.ids), positions - 3, stride)
        answer = _mentioned(b, example.spans) if spans else None
        for (a0, a1), (b0, b1) in cuts:
            front = [cls, a[a0:a1], sep]
            whole = front if example.b is None else [*front, b.ids[b0:b1], sep]
            rows.append(np.concatenate(whole))
            second.append(a1 - a0 + 2 if example.b is not None else len(rows[-1]))
            example_of.append(i)
            if answer is not None:
                gold.append((second[-1], answer[b0:b1]))

    dtype = np.uint16 if vocabulary.size <= 2**16 else np.int32
    tokens = np.full((len(rows), positions), vocabulary.pad, dtype)
    marks = np.zeros((len(rows), positions if spans else 0), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    for i, (start, mentioned) in enumerate(gold):
        marks[i, start : start + len(mentioned)] = mentioned
    kind = np.float32 if task.kind == "score" else np.int32
    return {
        "tokens": tokens,
        "length": np.asarray([len(row) for row in rows], np.int32),
        "second": np.asarray(second, np.int32),
        "gold": marks,
        "example": np.asarray(example_of, np.int32),
        "label": np.asarray([example.label for example in examples], kind),
    }


def _mentioned(pieces: Pieces, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens overlap one of the spans."""
    found = np.zeros(len(pieces.ids), bool)
    for start, stop in spans:
        found |= (pieces.start < stop) & (pieces.stop > start)
    return found


def batch(encoded: Encoded, rows: Any) -> dict[str, np.ndarray]:
    """Windows as a batch of arrays for a model and a loss.

    Args:
        encoded: the windows.
        rows: int array of any shape, which windows.

    Returns:
        ``tokens`` and ``labels`` int32 ``[*rows, positions]``; ``segments`` int32, 1 for B and
        the [SEP] after it; ``mask`` float32, 1 for tokens and 0 for padding; ``weights`` float32,
        1 where a label counts: a loss normalises by their sum; ``y`` ``[*rows]``, the class (or
        score) of the example, for a classification head.
    """
    rows = np.asarray(rows, np.int64)
    tokens = encoded.tokens[rows].astype(np.int32)
    place = np.arange(tokens.shape[-1])
    mask = place < encoded.length[rows][..., None]
    y = encoded.label[encoded.example[rows]]
    known = mask & (y != HIDDEN)[..., None]
    if encoded.gold.shape[1]:
        values = np.where(encoded.gold[rows], tokens, encoded.sep)
    elif encoded.class_tokens:
        values = np.asarray((*encoded.class_tokens, encoded.pad))[y][..., None]
    else:
        values, known = np.full_like(tokens, encoded.pad), np.zeros_like(mask)
    return {
        "tokens": tokens,
        "segments": (mask & (place >= encoded.second[rows][..., None])).astype(np.int32),
        "mask": mask.astype(np.float32),
        "labels": np.where(known, values, encoded.pad).astype(np.int32),
        "weights": known.astype(np.float32),
        "y": y,
    }


def class_scores(logits: Array, mask: Array, tokens: tuple[int, ...]) -> Array:
    """The mean logit of each class token over the positions that are no padding.

    Args:
        logits: ``[..., positions, vocabulary]``.
        mask: ``[..., positions]``, 1 for tokens and 0 for padding.
        tokens: ids of the label tokens, ``encoded.class_tokens``.

    Returns:
        ``[..., classes]``.
    """
    real = (mask != 0)[..., None]
    picked = jnp.where(real, logits[..., jnp.asarray(tokens)], 0)  # a pad may hold inf or NaN
    return picked.sum(-2) / real.sum(-2).astype(picked.dtype)


def decode_classes(scores: Array, encoded: Encoded) -> np.ndarray:
    """The class of each example: the largest mean score over its windows, each counting alike.

    Args:
        scores: ``[windows, classes]`` of ``class_scores``, for all windows in order.
        encoded: the windows.

    Returns:
        int64 ``[examples]``.

    Raises:
        ValueError: the scores have another shape, or one is NaN.
    """
    check_outputs(scores, (len(encoded.tokens), len(encoded.class_tokens)), "scores")
    summed = np.zeros((len(encoded.label), len(encoded.class_tokens)))
    np.add.at(summed, encoded.example, np.asarray(scores, np.float64))
    return (summed / np.bincount(encoded.example)[:, None]).argmax(-1)


def best_tokens(logits: Array) -> tuple[Array, Array]:
    """The likeliest token at every position and its log-probability.

    Args:
        logits: ``[..., positions, vocabulary]``.

    Returns:
        Ids int32 and log-probabilities, both ``[..., positions]``.
    """
    return logits.argmax(-1).astype(jnp.int32), jax.nn.log_softmax(logits, axis=-1).max(-1)


def decode_spans(ids: Array, log_probs: Array, encoded: Encoded, vocabulary: Unified) -> list[str]:
    """The answer of each example: of all runs of tokens that are not [SEP], the surest one.

    Runs are looked for in B alone. Of all windows of an example, the run that holds the single
    highest log-probability is the answer, as the text of the *predicted* tokens.

    Args:
        ids: int ``[windows, positions]`` of ``best_tokens``.
        log_probs: ``[windows, positions]``.
        encoded: the windows.
        vocabulary: the vocabulary they were encoded with.

    Returns:
        A text for each example, empty where every position of B says [SEP].

    Raises:
        ValueError: ids or log-probabilities have another shape, or one is NaN.
    """
    for outputs, name in ((ids, "ids"), (log_probs, "log_probs")):
        check_outputs(outputs, encoded.tokens.shape, name)
    tokens = np.asarray(ids)
    place = np.arange(tokens.shape[1])
    in_b = (place >= encoded.second[:, None]) & (place < encoded.length[:, None] - 1)
    free = in_b & (tokens != encoded.sep)
    sure = np.where(free, np.asarray(log_probs), -np.inf)
    best: dict[int, tuple[float, int, int]] = {}
    for window, (at, of) in enumerate(zip(sure.argmax(1), encoded.example, strict=True)):
        found = (float(sure[window, at]), -window, int(at))
        if free[window, at] and found > best.get(int(of), (-np.inf, 0, 0)):
            best[int(of)] = found
    texts = []
    for of in range(len(encoded.label)):
        if of not in best:
            texts.append("")
            continue
        _, window, at = best[of]
        held = np.flatnonzero(~free[-window])
        start = held[held < at].max(initial=-1) + 1
        stop = held[held > at].min(initial=tokens.shape[1])
        texts.append(vocabulary.tokenizer.decode(tokens[-window, start:stop].tolist()).strip())
    return texts
