"""Texts and pairs as a pretrained model reads them: ``[CLS] A [SEP] B [SEP]`` of its own tokens.

For a head on top of the model; longer inputs lose their end, the longer text of a pair first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir
from jmeta.tasks.episodes import FewShot
from jmeta.tasks.text import Example, TextTask
from jmeta.tasks.tokenizer import Vocabulary, cache_name, token_ids, whole_characters
from jmeta.tasks.windows import shares

_VERSION = 1  # part of every cache key: raise it when the encoding changes


class Inputs(NamedTuple):
    """Texts or pairs as tokens, padded at the end.

    Attributes:
        tokens: uint16 or int32 ``[n, positions]``.
        length: int32 ``[n]``, tokens before the padding.
        second: int32 ``[n]``, where B begins; equal to ``length`` without one.
        cut: how many inputs were longer and lost their end.
    """

    tokens: np.ndarray
    length: np.ndarray
    second: np.ndarray
    cut: int


def frame(vocabulary: Vocabulary) -> tuple[list[int], list[int], list[int]]:
    """What stands before A, between A and B, and at the end.

    RoBERTa has two separators in the middle. A vocabulary without [CLS] and [SEP], such as
    GPT-2's, has nothing before and its end of text, where it has one, in the other places.

    Example:
        >>> from jmeta.tasks.bpe import train_bpe
        >>> from jmeta.tasks.tokenizer import vocabulary
        >>> frame(vocabulary(train_bpe(["a"], 261)))
        ([3], [4], [4])
    """
    before = [] if vocabulary.cls is None else [vocabulary.cls]
    end = vocabulary.eos if vocabulary.sep is None else vocabulary.sep
    after = [] if end is None else [end]
    roberta = bool(before) and vocabulary.tokenizer.token_to_id("<s>") == before[0]
    return before, after * (1 + roberta), after


def encode(
    texts: Sequence[str] | Sequence[tuple[str, str | None]],
    vocabulary: Vocabulary,
    *,
    positions: int = 128,
) -> Inputs:
    """Tokenise texts or pairs once and keep the result on disk.

    Args:
        texts: texts, or pairs whose second may be None.
        vocabulary: ``vocabulary(tokenizer)`` of the model.
        positions: tokens of an input, special tokens included.

    Returns:
        The tokens.

    Raises:
        ValueError: there is no text, an input is none, or there is no room for a token of each.
    """
    pairs = [_pair(each, f"input {i}") for i, each in enumerate(texts)]
    if not pairs:
        raise ValueError("there is no text to encode")
    before, between, after = frame(vocabulary)
    paired = any(b is not None for _, b in pairs)
    special = len(before) + len(after) + paired * len(between)
    if positions < special + 1 + paired:
        raise ValueError(
            f"{positions} positions leave no room for a token of the text beside {special} special "
            "tokens"
        )
    key = cache_key(
        version=_VERSION, pairs=pairs, tokenizer=cache_name(vocabulary), positions=positions
    )
    arrays = cached_arrays(
        cache_dir() / f"text-inputs-{key}.npz", lambda: _encode(pairs, vocabulary, positions)
    )
    return Inputs(arrays["tokens"], arrays["length"], arrays["second"], int(arrays["cut"]))


def _pair(given: Any, where: str) -> tuple[str, str | None]:
    if not isinstance(given, tuple | list):
        return whole_characters(given, where), None
    if len(given) != 2:
        raise ValueError(f"{where} is neither a text nor a pair: it holds {len(given)} things")
    a, b = given
    a = whole_characters(a, f"{where}, first text")
    return a, None if b is None else whole_characters(b, f"{where}, second text")


def _encode(
    pairs: Sequence[tuple[str, str | None]], vocabulary: Vocabulary, positions: int
) -> dict[str, np.ndarray]:
    before, between, after = frame(vocabulary)
    firsts = token_ids(vocabulary.tokenizer, [a for a, _ in pairs])
    seconds = token_ids(vocabulary.tokenizer, [b or "" for _, b in pairs])
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.int32
    tokens = np.full((len(pairs), positions), vocabulary.pad, dtype)
    length, second = np.zeros((2, len(pairs)), np.int32)
    cut = 0
    for i, (a, b, (_, said)) in enumerate(zip(firsts, seconds, pairs, strict=True)):
        middle, end = ([], after) if said is None else (between, after)
        room = positions - len(before) - len(middle) - len(end)
        of_a, of_b = shares(len(a), len(b), room)
        cut += of_a + of_b < len(a) + len(b)
        front = [*before, *a[:of_a], *middle]
        row = [*front, *b[:of_b], *end]
        tokens[i, : len(row)], length[i] = row, len(row)
        second[i] = len(row) if said is None else len(front)
    return {"tokens": tokens, "length": length, "second": second, "cut": np.asarray(cut)}


def batch(inputs: Inputs, rows: Any) -> dict[str, np.ndarray]:
    """Inputs as arrays for a model.

    Args:
        inputs: the inputs.
        rows: int array of any shape.

    Returns:
        ``tokens`` and ``segments`` (1 for B and what ends it) int32, ``mask`` float32 (1 for
        tokens), all ``[*rows, positions]``.
    """
    rows = np.asarray(rows, np.int64)
    place = np.arange(inputs.tokens.shape[1])
    mask = place < inputs.length[rows][..., None]
    return {
        "tokens": inputs.tokens[rows].astype(np.int32),
        "segments": (mask & (place >= inputs.second[rows][..., None])).astype(np.int32),
        "mask": mask.astype(np.float32),
    }


def labelled(
    task: TextTask, examples: Sequence[Example], vocabulary: Vocabulary, *, positions: int = 128
) -> FewShot:
    """A task's labelled examples as a source, for a classification head and for ``episodes``.

    Examples of a class whose inputs are equal, token for token, are kept once, so that support
    and query never share one.

    Args:
        task: a task with classes (``glue.TASKS``, ``superglue.TASKS``).
        examples: its examples, none with a hidden label.
        vocabulary: ``vocabulary(tokenizer)`` of the model.
        positions: tokens of an input.

    Returns:
        The source: ``x`` is ``{"tokens", "segments", "mask"}`` as ``batch`` makes them, ``y`` the
        class, ``names`` the names of the classes.

    Raises:
        ValueError: the task has no classes, a label is hidden or none of them, or there is no
            text where one must be.

    Example:
        >>> from jmeta.tasks import glue
        >>> from jmeta.tasks.bpe import train_bpe
        >>> from jmeta.tasks.tokenizer import vocabulary
        >>> rows = [Example("good", label=1), Example("bad", label=0)]
        >>> labelled(glue.TASKS["SST-2"], rows, vocabulary(train_bpe(["a"], 261))).y
        array([1, 0])
    """
    if not task.classes:
        raise ValueError(f"{task.name} has no classes to tell apart")
    for i, example in enumerate(examples):
        if example.label not in range(len(task.classes)):
            raise ValueError(
                f"the label of row {i} of {task.name} is hidden, or none of {task.classes}: "
                f"{example.label!r}"
            )
    y = np.asarray([example.label for example in examples], np.int64)
    inputs = encode([(e.a, e.b) for e in examples], vocabulary, positions=positions)
    rows = np.sort(np.unique(np.column_stack([y, inputs.tokens]), axis=0, return_index=True)[1])
    return FewShot(batch(inputs, rows), y[rows], task.classes)
