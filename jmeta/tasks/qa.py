"""Question answering by spans of the context, with SQuAD's official scores.

Long contexts become overlapping windows; answers are exact characters of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jmeta.core.types import Array
from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir
from jmeta.tasks.inputs import frame
from jmeta.tasks.questions import Question
from jmeta.tasks.scores import Score, squad, squad2
from jmeta.tasks.tokenizer import Pieces, Vocabulary, cache_name, token_ids, token_pieces
from jmeta.tasks.windows import check_outputs, windows

_VERSION = 1  # part of every cache key: raise it when the encoding changes


class EncodedQuestions(NamedTuple):
    """Questions as windows of tokens; the windows of a question follow each other.

    Attributes:
        tokens: uint16 or int32 ``[windows, positions]``.
        length: int32 ``[windows]``, tokens before the padding.
        first: int32 ``[windows]``, the position of the first context token.
        last: int32 ``[windows]``, the position after the last.
        start: int32 ``[windows]``, the position of the answer's first token; 0, the first token of
            all, where the window does not hold the answer, or there is none.
        stop: int32 ``[windows]``, the position of the answer's last token.
        from_char: int32 ``[windows, positions]``, the context character at which a token begins;
            -1 outside of the context.
        to_char: int32 ``[windows, positions]``, the character after it.
        question: int32 ``[windows]``, which question a window is of.
    """

    tokens: np.ndarray
    length: np.ndarray
    first: np.ndarray
    last: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    from_char: np.ndarray
    to_char: np.ndarray
    question: np.ndarray


def encode(
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    *,
    positions: int = 384,
    stride: int = 128,
    longest_question: int = 64,
) -> EncodedQuestions:
    """Tokenise questions once, as ``[CLS] question [SEP] context [SEP]``, and keep it on disk.

    The context is cut into windows that together hold all of it. The first gold answer is the
    target; a token that only overlaps it belongs to it.

    Args:
        questions: the questions.
        vocabulary: ``vocabulary(tokenizer)``. RoBERTa's pairs have two separators in the middle.
            One without [CLS] and [SEP], such as GPT-2's, uses its end of text for both.
        positions: tokens per window, special tokens included.
        stride: tokens from the start of one window to the start of the next.
        longest_question: tokens of a question; the rest is cut off.

    Returns:
        The windows.

    Raises:
        ValueError: no question, too few positions, or a vocabulary without any separator.
    """
    if not questions:
        raise ValueError("there is no question to encode")
    if longest_question < 0:
        raise ValueError(f"longest_question={longest_question} is no number of tokens")
    key = cache_key(
        version=_VERSION,
        questions=list(questions),
        tokenizer=cache_name(vocabulary),
        positions=positions,
        stride=stride,
        longest_question=longest_question,
    )
    return EncodedQuestions(
        **cached_arrays(
            cache_dir() / f"text-qa-{key}.npz",
            lambda: _encode(questions, vocabulary, positions, stride, longest_question),
        )
    )


def _separators(vocabulary: Vocabulary) -> tuple[list[int], list[int], list[int]]:
    """What stands before the question, between, and after the context; the first says "none"."""
    before, between, after = frame(vocabulary)
    if not after:
        raise ValueError("the tokeniser has neither [CLS] and [SEP] nor an end of text to use")
    return before or after, between, after


def _encode(
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    positions: int,
    stride: int,
    longest_question: int,
) -> dict[str, np.ndarray]:
    before, between, after = _separators(vocabulary)
    special = len(before) + len(between) + len(after)
    asked = token_ids(vocabulary.tokenizer, [each.question for each in questions])
    contexts = token_pieces(vocabulary.tokenizer, [each.context for each in questions])
    most = min(longest_question, max(len(ids) for ids in asked))
    if positions < special + most + 1:
        raise ValueError(
            f"{positions} positions leave no room for a context token beside a question of {most} "
            f"and {special} special tokens: ask for more, or for a smaller longest_question"
        )
    cuts = []  # question, position of its first context token, start and stop in the context
    for q, (ids, context) in enumerate(zip(asked, contexts, strict=True)):
        front = special - len(after) + min(len(ids), longest_question)
        room = positions - front - len(after)
        cuts += [(q, front, a, b) for a, b in windows(len(context.ids), room, stride)]

    shape = (len(cuts), positions)
    tokens = np.full(shape, vocabulary.pad, np.uint16 if vocabulary.size <= 2**16 else np.int32)
    from_char, to_char = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    place = np.zeros((5, len(cuts)), np.int32)
    for w, (q, front, a, b) in enumerate(cuts):
        context, last = contexts[q], front + b - a
        question = asked[q][:longest_question]
        row = np.concatenate([before, question, between, context.ids[a:b], after])
        tokens[w, : len(row)] = row
        from_char[w, front:last], to_char[w, front:last] = context.start[a:b], context.stop[a:b]
        place[:, w] = len(row), front, last, *_target(questions[q], context, front, a, b)
    length, first, last, start, stop = place
    return {
        "tokens": tokens,
        "length": length,
        "first": first,
        "last": last,
        "start": start,
        "stop": stop,
        "from_char": from_char,
        "to_char": to_char,
        "question": np.asarray([q for q, *_ in cuts], np.int32),
    }


def _target(question: Question, context: Pieces, front: int, a: int, b: int) -> tuple[int, int]:
    """Positions of the first and the last token of the answer in a window; 0, 0 if not there."""
    found = next(
        ((s, g) for s, g in zip(question.starts, question.answers, strict=True) if s >= 0), None
    )
    if found is None:
        return 0, 0
    begin = found[0] + len(found[1]) - len(found[1].lstrip())
    end = found[0] + len(found[1].rstrip())
    held = np.flatnonzero((context.start < end) & (context.stop > begin))
    if not len(held) or held[0] < a or held[-1] >= b:
        return 0, 0
    return front + int(held[0]) - a, front + int(held[-1]) - a


def batch(encoded: EncodedQuestions, rows: Any) -> dict[str, np.ndarray]:
    """Windows as arrays for a model and a loss.

    Args:
        encoded: the windows.
        rows: int array of any shape, which windows.

    Returns:
        ``tokens``, ``segments`` (1 for the context and what ends it) int32
        ``[*rows, positions]``; ``mask`` float32, 1 for tokens; ``start`` and ``stop`` int32
        ``[*rows]``.
    """
    rows = np.asarray(rows, np.int64)
    place = np.arange(encoded.tokens.shape[1])
    mask = place < encoded.length[rows][..., None]
    return {
        "tokens": encoded.tokens[rows].astype(np.int32),
        "segments": (mask & (place >= encoded.first[rows][..., None])).astype(np.int32),
        "mask": mask.astype(np.float32),
        "start": encoded.start[rows],
        "stop": encoded.stop[rows],
    }


class Answer(NamedTuple):
    """A predicted answer.

    Attributes:
        text: the characters of the context, or "" where a window said that there is no answer.
        start: the character at which it begins in the context.
        stop: the character after it.
        score: start logit plus end logit of the best span.
        null_odds: the score of "no answer" less that of the best span.
    """

    text: str
    start: int
    stop: int
    score: float
    null_odds: float


def decode(
    start_logits: Array,
    stop_logits: Array,
    encoded: EncodedQuestions,
    questions: Sequence[Question],
    *,
    longest_answer: int = 30,
) -> list[Answer]:
    """The best span of each question over all its windows, and how it stands against no answer.

    A span is scored by its start logit plus its end logit; every span inside the context of up to
    ``longest_answer`` tokens is tried. "No answer" scores the sum of the first position's logits,
    the least of all windows: it must hold in every one.

    Args:
        start_logits: ``[windows, positions]``.
        stop_logits: ``[windows, positions]``.
        encoded: the windows.
        questions: the questions they were made of.
        longest_answer: tokens of an answer.

    Returns:
        One answer for each question, never empty unless the context has no token; ``give_up``
        turns some into "no answer".

    Raises:
        ValueError: the logits or the questions do not fit the windows, or a logit is NaN.

    Source:
        Devlin et al. 2019, "BERT", sections 4.2 and 4.3.
    """
    check_outputs(start_logits, encoded.tokens.shape, "start_logits")
    check_outputs(stop_logits, encoded.tokens.shape, "stop_logits")
    if len(questions) != encoded.question[-1] + 1:
        raise ValueError(
            f"the windows are of {encoded.question[-1] + 1} questions, not of {len(questions)}"
        )
    starts, stops = np.asarray(start_logits, np.float64), np.asarray(stop_logits, np.float64)
    positions = starts.shape[1]
    place = np.arange(positions)
    inside = (place >= encoded.first[:, None]) & (place < encoded.last[:, None])
    begin, end = np.where(inside, starts, -np.inf), np.where(inside, stops, -np.inf)
    best = np.full(len(starts), -np.inf)
    span = np.zeros((len(starts), 2), np.int64)
    for tokens in range(min(longest_answer, positions)):
        sums = begin[:, : positions - tokens] + end[:, tokens:]
        at = sums.argmax(1)
        value = np.take_along_axis(sums, at[:, None], 1)[:, 0]
        better = value > best
        best = np.where(better, value, best)
        span[better] = np.stack([at, at + tokens], 1)[better]
    null = starts[:, 0] + stops[:, 0]

    answers = []
    order = np.split(np.arange(len(starts)), np.flatnonzero(np.diff(encoded.question)) + 1)
    for held, question in zip(order, questions, strict=True):
        window = held[best[held].argmax()]
        nothing, value = float(null[held].min()), float(best[window])
        if value == -np.inf:
            answers.append(Answer("", 0, 0, value, np.inf))
            continue
        a = int(encoded.from_char[window, span[window, 0]])
        b = int(encoded.to_char[window, span[window, 1]])
        said = question.context[a:b]
        a, said = a + len(said) - len(said.lstrip()), said.strip()  # GPT-2's tokens hold the blank
        answers.append(Answer(said, a, a + len(said), value, nothing - value))
    return answers


def give_up(answers: Sequence[Answer], threshold: float = 0.0) -> list[str]:
    """The texts of answers, empty where the odds of "no answer" are above a threshold.

    Args:
        answers: of ``decode``.
        threshold: SQuAD 2.0's; found on development questions, see ``score``.

    Returns:
        A text for each question.

    Example:
        >>> give_up([Answer("cat", 0, 3, 1.0, -2.0), Answer("dog", 4, 7, 1.0, 2.0)])
        ['cat', '']
    """
    return ["" if answer.null_odds > threshold else answer.text for answer in answers]


def score(answers: Sequence[Answer], questions: Sequence[Question]) -> Score:
    """Official EM and F1: SQuAD 2.0's where a question has no answer, SQuAD 1.1's elsewhere.

    For SQuAD 2.0 the answers stand at threshold 0, and the best threshold is given beside it.

    Args:
        answers: of ``decode``.
        questions: the questions.

    Returns:
        EM and F1 over all questions, and their number. For SQuAD 2.0 the details hold both over
        the questions with and without an answer, and the best threshold.
    """
    golds = [question.answers for question in questions]
    if all(golds):
        return Score(squad([answer.text for answer in answers], golds), len(questions))
    best = squad2(
        [answer.text for answer in answers], golds, [answer.null_odds for answer in answers]
    )
    found = squad2(give_up(answers), golds)
    found |= {name: value for name, value in best.items() if name.startswith("best_")}
    metrics = {name: found.pop(name) for name in ("EM", "F1")}
    return Score(metrics, len(questions), found)
