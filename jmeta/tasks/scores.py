"""The official metrics of GLUE, SuperGLUE and SQuAD, in per cent, and a table that prints n."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Score(NamedTuple):
    """What a task was scored.

    Attributes:
        metrics: per cent by name, in the order of the table.
        n: examples scored.
        details: what is worth knowing, but in no table and no mean.
    """

    metrics: dict[str, float]
    n: int
    details: dict[str, float] = {}  # noqa: RUF012 (never written to)


def _pair(predicted: Any, gold: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, gold = np.asarray(predicted), np.asarray(gold)
    if predicted.shape != gold.shape or predicted.ndim != 1:
        raise ValueError(f"{predicted.shape} predictions cannot be scored on {gold.shape} labels")
    if not len(gold):
        raise ValueError("there is nothing to score")
    return predicted, gold


def check_classes(predicted: Any, classes: int, name: str) -> None:
    """Refuse predictions that are no indices of classes; a name of a class would match nothing.

    Raises:
        ValueError: the first that is not 0 .. classes - 1 is named.

    Example:
        >>> check_classes(["entailment"], 2, "RTE")
        Traceback (most recent call last):
        ValueError: RTE: prediction 0 is 'entailment', not the index of one of 2 classes
    """
    for i, value in enumerate(np.asarray(predicted).tolist()):
        if not isinstance(value, int | float) or value not in range(classes):
            raise ValueError(
                f"{name}: prediction {i} is {value!r}, not the index of one of {classes} classes"
            )


def check_answers(predicted: Sequence[str], name: str) -> None:
    """Refuse predictions that are no texts.

    Raises:
        ValueError: the first that is none is named.
    """
    for i, value in enumerate(predicted):
        if not isinstance(value, str):
            raise ValueError(f"{name}: prediction {i} is {value!r}, no text")


def accuracy(predicted: Any, gold: Any) -> float:
    """The share of predictions that are right, in per cent.

    Example:
        >>> accuracy([0, 1, 1, 1], [0, 0, 1, 1])
        75.0
    """
    predicted, gold = _pair(predicted, gold)
    return float(100 * (predicted == gold).mean())


def binary_f1(predicted: Any, gold: Any, positive: Hashable = 1) -> float:
    r"""F1 of one class, in per cent; 0 where it is neither predicted nor there.

    .. math:: F_1 = 2 t / (2 t + \text{false positives} + \text{false negatives})

    Example:
        >>> binary_f1([1, 1, 0], [1, 0, 0])
        66.66666666666667
    """
    predicted, gold = _pair(predicted, gold)
    hits = ((predicted == positive) & (gold == positive)).sum()
    total = (predicted == positive).sum() + (gold == positive).sum()
    return float(100 * 2 * hits / total) if total else 0.0


def macro_f1(predicted: Any, gold: Any) -> float:
    """The mean F1 of the classes that are predicted or there, each counting alike, in per cent.

    Example:
        >>> macro_f1([0, 1], [0, 0])  # 66.7 and, for a class that is not there, 0
        33.333333333333336
    """
    predicted, gold = _pair(predicted, gold)
    classes = np.union1d(predicted, gold)
    return float(np.mean([binary_f1(predicted, gold, each) for each in classes]))


def matthews(predicted: Any, gold: Any) -> float:
    """Matthews' correlation of two binary labels, times 100; 0 where one of them is constant.

    Example:
        >>> matthews([0, 1, 1, 0], [0, 1, 0, 0])
        57.73502691896258
    """
    return pearson(predicted, gold)  # the correlation of indicators is Matthews' coefficient


def pearson(predicted: Any, gold: Any) -> float:
    """Pearson's correlation, times 100; 0 where one side is constant."""
    predicted, gold = _pair(predicted, gold)
    x, y = (each.astype(np.float64) - each.mean() for each in (predicted, gold))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(100 * (x @ y) / scale) if scale else 0.0


def spearman(predicted: Any, gold: Any) -> float:
    """Spearman's rank correlation, times 100; 0 where one side is constant.

    Example:
        >>> spearman([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])
        100.0
    """
    from scipy.stats import rankdata

    predicted, gold = _pair(predicted, gold)
    return pearson(rankdata(predicted), rankdata(gold))


def multirc(predicted: Any, gold: Any, questions: Sequence[Hashable]) -> dict[str, float]:
    """MultiRC: F1 over all answers, and the share of questions with every answer right.

    Args:
        predicted: ``[answers]``, 0 or 1.
        gold: ``[answers]``, 0 or 1.
        questions: which question each answer belongs to, such as ``(passage, question)``.

    Returns:
        ``{"F1a": ..., "EM": ...}`` in per cent.

    Example:
        >>> multirc([1, 0, 1], [1, 0, 0], ["q", "q", "r"])
        {'F1a': 66.66666666666667, 'EM': 50.0}
    """
    predicted, gold = _pair(predicted, gold)
    right: dict[Hashable, bool] = {}
    for question, same in zip(questions, predicted == gold, strict=True):
        right[question] = right.get(question, True) and bool(same)
    exact = 100 * sum(right.values()) / len(right)
    return {"F1a": binary_f1(predicted, gold), "EM": exact}


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, no ASCII punctuation, articles, extra blanks.

    Example:
        >>> normalised("The  Eiffel-Tower, a 1889 tower!")
        'eiffeltower 1889 tower'
    """
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(predicted: str, gold: str) -> float:
    """1.0 where two answers are equal once normalised, else 0.0."""
    return float(normalised(predicted) == normalised(gold))


def token_f1(predicted: str, gold: str) -> float:
    """F1 of the bags of words of two normalised answers; 0.0 where either has no word.

    Example:
        >>> token_f1("the big cat", "a cat sat")
        0.5
    """
    ours, theirs = normalised(predicted).split(), normalised(gold).split()
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def _best(measure: Callable[[str, str], float], predicted: str, golds: Iterable[str]) -> float:
    return max(measure(predicted, gold) for gold in golds)


def _scored(
    predicted: Sequence[str], golds: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    if len(predicted) != len(golds) or not len(golds):
        raise ValueError(f"{len(predicted)} answers cannot be scored on {len(golds)} questions")
    for i, each in enumerate(golds):
        if not each:
            raise ValueError(f"question {i} has no gold answer to score against")
    pairs = list(zip(predicted, golds, strict=True))
    return (
        np.asarray([_best(exact_match, *pair) for pair in pairs]),
        np.asarray([_best(token_f1, *pair) for pair in pairs]),
    )


def squad(predicted: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD 1.1 and ReCoRD: exact match and F1, each with the best of the gold answers.

    Args:
        predicted: one answer for each question.
        golds: the gold answers of each question, at least one.

    Returns:
        ``{"EM": ..., "F1": ...}`` in per cent.

    Raises:
        ValueError: the lengths differ, or a question has no gold answer.

    Example:
        >>> squad(["the cat"], [["Cat!", "dog"]])
        {'EM': 100.0, 'F1': 100.0}

    Source:
        Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions", section 6.1.
    """
    exact, f1 = _scored(predicted, golds)
    return {"EM": float(100 * exact.mean()), "F1": float(100 * f1.mean())}


def squad2(
    predicted: Sequence[str],
    golds: Sequence[Sequence[str]],
    null_odds: Sequence[float] | None = None,
) -> dict[str, float]:
    """SQuAD 2.0: an empty answer stands for "unanswerable", and is right where no gold is left.

    Gold answers of nothing but articles and punctuation do not count as answers, except that a
    question with such an answer alone still stands among those of ``HasAns_``.

    Args:
        predicted: one answer for each question; with ``null_odds`` the best answer that is not
            empty, so that every threshold can be tried.
        golds: the gold answers of each question; none where it cannot be answered.
        null_odds: how much rather than by its answer each question is answered by none. Given,
            the best threshold is looked for on these very questions, and said.

    Returns:
        ``EM`` and ``F1`` in per cent; the same with ``HasAns_`` and ``NoAns_`` over the questions
        with and without an answer, where there are such; with ``null_odds`` also ``best_EM``,
        ``best_EM_threshold``, ``best_F1`` and ``best_F1_threshold``: an answer is given where the
        odds are at most the threshold.

    Raises:
        ValueError: the lengths differ, or there is no question.

    Example:
        >>> squad2(["", "cat"], [[], ["a cat"]])["EM"]
        100.0

    Source:
        Rajpurkar et al. 2018, "Know What You Don't Know", and its evaluation script's definition.
    """
    real = [[gold for gold in each if normalised(gold)] for each in golds]
    exact, f1 = _scored(predicted, [each or [""] for each in real])
    # An answer without a word has F1 1 exactly where the gold has none either.
    empty = np.asarray([not normalised(answer) for answer in predicted])
    answerable = np.asarray([bool(each) for each in real])
    has = np.asarray([bool(len(each)) for each in golds])
    f1 = np.where(empty | ~answerable, empty & ~answerable, f1)
    found = {"EM": 100 * exact.mean(), "F1": 100 * f1.mean()}
    for name, part in (("HasAns", has), ("NoAns", ~has)):
        if part.any():
            found[f"{name}_EM"] = 100 * exact[part].mean()
            found[f"{name}_F1"] = 100 * f1[part].mean()
    if null_odds is not None:
        odds = np.asarray(null_odds, np.float64)
        for name, each in (("EM", exact), ("F1", f1)):
            found[f"best_{name}"], found[f"best_{name}_threshold"] = _threshold(
                each, odds, answerable
            )
    return {name: float(value) for name, value in found.items()}


def _threshold(each: np.ndarray, odds: np.ndarray, answerable: np.ndarray) -> tuple[float, float]:
    """The best mean over all thresholds, and the lowest that gives it; -inf answers nothing."""
    if odds.shape != each.shape or np.isnan(odds).any():
        raise ValueError(f"null_odds has shape {odds.shape} for {len(each)} answers, or holds NaN")
    order = np.argsort(odds, kind="stable")
    gains = each[order] - ~answerable[order]  # answering a question in place of leaving it
    totals = (~answerable).sum() + np.concatenate([[0], np.cumsum(gains)])
    last = np.append(odds[order][1:] != odds[order][:-1], True)  # equal odds are answered together
    totals[1:][~last] = -np.inf
    best = int(totals.argmax())
    return 100 * totals[best] / len(each), float(odds[order][best - 1]) if best else -np.inf


def aggregate(metrics: Mapping[str, Sequence[float]]) -> float:
    """The SuperGLUE (or GLUE) score: the mean over tasks of the mean of each task's metrics.

    Args:
        metrics: the metrics of each task.

    Returns:
        The aggregate, in the unit of the metrics.

    Example:
        >>> aggregate({"CB": (98.0, 96.0), "COPA": (91.0,)})
        94.0
        >>> aggregate({"MLM": (60.0,), "SuperGLUE": (94.0,)})  # the overall score of both
        77.0

    Source:
        Wang et al. 2019, "SuperGLUE", section 4.
    """
    if not metrics or not all(len(each) for each in metrics.values()):
        raise ValueError("an aggregate needs at least one metric of every task")
    return float(np.mean([np.mean(each) for each in metrics.values()]))


def table(scores: Mapping[str, Score]) -> str:
    """A Markdown table of scores; every row prints how many examples it stands on.

    Args:
        scores: the score of each task.

    Returns:
        The table, with the aggregate of the tasks shown in its last row.

    Example:
        >>> print(table({"COPA": Score({"accuracy": 57.0}, 100)}))
        | task | n | metrics | score |
        | --- | ---: | --- | ---: |
        | COPA | 100 | accuracy 57.0 | 57.0 |
        | mean of 1 task | 100 |  | 57.0 |
    """
    lines = ["| task | n | metrics | score |", "| --- | ---: | --- | ---: |"]
    for name, (metrics, n, _) in scores.items():
        shown = ", ".join(f"{metric} {value:.1f}" for metric, value in metrics.items())
        mean = float(np.mean(list(metrics.values())))
        lines.append(f"| {name} | {n:,} | {shown} | {mean:.1f} |")
    mean = aggregate({name: list(score.metrics.values()) for name, score in scores.items()})
    tasks = f"{len(scores)} task{'s' * (len(scores) > 1)}"
    total = sum(score.n for score in scores.values())
    lines.append(f"| mean of {tasks} | {total:,} |  | {mean:.1f} |")
    return "\n".join(lines)
