"""Questions as prompts for a causal language model: context, question, and an answer to go on with.

The loss counts the answer and the end of text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir
from jmeta.tasks.questions import Question
from jmeta.tasks.tokenizer import Pieces, Vocabulary, cache_name, token_ids, token_pieces
from jmeta.tasks.windows import windows

UNANSWERABLE = "unanswerable"  # what is said where there is no answer
_VERSION = 2  # part of every cache key: raise it when the encoding changes


class Prompts(NamedTuple):
    """Prompts as tokens, padded at the end.

    Attributes:
        tokens: int32 ``[rows, positions]``.
        mask: float32 ``[rows, positions]``, 1 for tokens and 0 for padding.
        weights: float32 ``[rows, positions]``, 1 for the tokens to be predicted: those of the
            answer and the end of text; all 0 in prompts to be answered.
        question: int32 ``[rows]``, which question a row is of.
    """

    tokens: np.ndarray
    mask: np.ndarray
    weights: np.ndarray
    question: np.ndarray


def answered(
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    *,
    positions: int = 256,
    stride: int = 128,
    longest_question: int = 64,
) -> Prompts:
    """Prompts with their first gold answer, to train on: one row for each question.

    ``Context: ...``, ``Question: ...`` and ``Answer: ...``, a line each, and the end of text. Of a
    context that is too long, the first window that holds the answer is taken; where the windows
    cut it, one that begins at it; the first of all where the context does not hold it.

    Args:
        questions: the questions.
        vocabulary: ``vocabulary(tokenizer)`` of a causal model; it must have an end of text.
        positions: tokens of a row.
        stride: tokens from the start of one window to the start of the next.
        longest_question: tokens of a question; the rest is cut off. An answer is cut to as many.

    Returns:
        The prompts.

    Raises:
        ValueError: no question, no end of text, or too few positions.
    """
    return _cached("answered", questions, vocabulary, positions, stride, longest_question, 0)


def to_answer(
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    *,
    positions: int = 256,
    stride: int = 128,
    longest_question: int = 64,
    room: int = 32,
) -> Prompts:
    """Prompts that end in ``"Answer:"``, to go on from: one row for each window of the context.

    Args:
        questions: the questions.
        vocabulary: as for ``answered``.
        positions: tokens of a row.
        stride: tokens from the start of one window to the start of the next.
        longest_question: tokens of a question; the rest is cut off.
        room: positions left free for the answer.

    Returns:
        The prompts; ``mask.sum(-1)`` is where each answer begins.

    Raises:
        ValueError: no question, no end of text, or too few positions.
    """
    return _cached("to-answer", questions, vocabulary, positions, stride, longest_question, room)


def said(generated: str) -> str:
    r"""What a model has answered: its first line; empty if it says that there is no answer.

    Example:
        >>> said(" in 1973\nQuestion: who?"), said(" Unanswerable.")
        ('in 1973', '')
    """
    lines = generated.strip().splitlines() or [""]
    first = lines[0].strip()
    return "" if first.casefold().rstrip(".") == UNANSWERABLE else first


def _cached(
    kind: str,
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    positions: int,
    stride: int,
    longest_question: int,
    room: int,
) -> Prompts:
    if not questions:
        raise ValueError("there is no question to write a prompt for")
    if longest_question < 0 or room < 0:
        raise ValueError(f"longest_question={longest_question}, room={room} are no tokens")
    if vocabulary.eos is None:
        raise ValueError("the tokeniser has no end of text, so an answer could not end")
    key = cache_key(
        version=_VERSION,
        questions=list(questions),
        tokenizer=cache_name(vocabulary),
        settings=[kind, positions, stride, longest_question, room],
    )
    return Prompts(
        **cached_arrays(
            cache_dir() / f"text-prompts-{key}.npz",
            lambda: _encode(
                questions, vocabulary, positions, stride, longest_question, room, kind == "answered"
            ),
        )
    )


def _encode(
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    positions: int,
    stride: int,
    longest_question: int,
    room: int,
    with_answer: bool,
) -> dict[str, np.ndarray]:
    tokenizer, eos = vocabulary.tokenizer, vocabulary.eos
    (head,), (tail,) = token_ids(tokenizer, ["Context:"]), token_ids(tokenizer, ["\nAnswer:"])
    asked = token_ids(tokenizer, ["\nQuestion: " + each.question for each in questions])
    contexts = token_pieces(tokenizer, [" " + each.context for each in questions])
    firsts = [each.answers[0] if each.answers else UNANSWERABLE for each in questions]
    answers = token_ids(tokenizer, [" " + each.strip() for each in firsts])

    rows: list[tuple[int, list[int], int]] = []  # question, tokens, tokens of the answer
    for q, (context, question, answer) in enumerate(zip(contexts, asked, answers, strict=True)):
        end = [*answer[:longest_question], eos] if with_answer else []
        after = [*question[:longest_question], *tail, *end]
        free = positions - len(head) - len(after) - room
        if free < 1:
            raise ValueError(
                f"question {questions[q].id!r}: {positions} positions leave no room for the "
                f"context beside {len(head) + len(after)} tokens of the prompt"
                + (f" and {room} for the answer" if room else "")
            )
        cuts = windows(len(context.ids), free, stride)
        for a, b in [_holding(questions[q], context, cuts, free)] if with_answer else cuts:
            rows.append((q, [*head, *context.ids[a:b], *after], len(end)))

    tokens = np.full((len(rows), positions), vocabulary.pad, np.int32)
    mask, weights = np.zeros((2, len(rows), positions), np.float32)
    for i, (_, row, predicted) in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
        weights[i, len(row) - predicted : len(row)] = 1
    question = np.asarray([q for q, _, _ in rows], np.int32)
    return {"tokens": tokens, "mask": mask, "weights": weights, "question": question}


def _holding(
    question: Question, context: Pieces, cuts: Sequence[tuple[int, int]], free: int
) -> tuple[int, int]:
    """The first window with the whole of the first answer; one that begins at it; or the first."""
    if question.starts and question.starts[0] >= 0:
        begin = question.starts[0] + 1  # for the blank before the context
        end = begin + len(question.answers[0])
        held = np.flatnonzero((context.start < end) & (context.stop > begin))
        for a, b in cuts:
            if len(held) and a <= held[0] and held[-1] < b:
                return a, b
        if len(held):
            start = max(min(int(held[0]), len(context.ids) - free), 0)
            return start, min(start + free, len(context.ids))
    return cuts[0]
