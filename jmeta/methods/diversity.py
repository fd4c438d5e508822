"""The diversity coefficient of a set of tasks, with an interval that knows pairs share tasks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np


class Diversity(NamedTuple):
    """A mean distance between tasks.

    Attributes:
        mean: over pairs.
        standard_error: by the jackknife over tasks.
        half_width: of the interval at its confidence.
        pairs: how many were averaged.
        naive_error: what independent pairs would have; it is far too small, and stands here to
            be seen beside the other.
    """

    mean: float
    standard_error: float
    half_width: float
    pairs: int
    naive_error: float


def diversity(distances: Any, confidence: float = 0.95) -> Diversity:
    r"""The mean distance between distinct tasks, and its jackknife interval.

    .. math:: \hat\theta = \binom{n}{2}^{-1} \sum_{i<j} d_{ij}, \qquad
        SE^2 = \frac{n-1}{n} \sum_i (\hat\theta_{(i)} - \bar\theta_{(\cdot)})^2

    where :math:`\hat\theta_{(i)}` is the mean without task i. The interval is Student's, with
    n - 1 degrees of freedom.

    Args:
        distances: ``[tasks, tasks]``, symmetric; the diagonal is not read.
        confidence: that the interval covers the mean over tasks that were not drawn.

    Returns:
        A ``Diversity``.

    Raises:
        ValueError: fewer than three tasks, or the matrix is not square and symmetric.

    Example:
        >>> found = diversity([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
        >>> found.mean, found.half_width, found.pairs
        (1.0, 0.0, 3)

    Source: Miranda et al., "The Curse of Low Task Diversity" (2022), for the coefficient; Efron and
    Stein, "The Jackknife Estimate of Variance" (1981).
    """
    d = np.asarray(distances, np.float64)
    n = len(d)
    if d.shape != (n, n) or not np.allclose(d, d.T, equal_nan=True):
        raise ValueError(f"distances of tasks are a square symmetric matrix, not {d.shape}")
    if n < 3:
        raise ValueError(f"an interval over {n} tasks: at least three are needed")
    off = d - np.diag(np.diag(d))
    rows, whole = off.sum(1), off.sum() / 2
    without = (whole - rows) / ((n - 1) * (n - 2) / 2)
    error = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    each = d[np.triu_indices(n, 1)]
    naive = each.std(ddof=1) / math.sqrt(each.size)
    return Diversity(
        float(each.mean()), error, _quantile(n - 1, confidence) * error, each.size, float(naive)
    )


def cross_diversity(distances: Any, confidence: float = 0.95) -> Diversity:
    r"""The mean distance between the tasks of two sets, and its jackknife interval.

    .. math:: SE^2 = \frac{n-1}{n} \sum_i (\hat\theta_{(i)} - \bar\theta)^2
        + \frac{m-1}{m} \sum_j (\hat\theta^{(j)} - \bar\theta)^2

    leaving out a task of the one set or of the other, with min(n, m) - 1 degrees of freedom.

    Args:
        distances: ``[n, m]``; the sets have no task in common.
        confidence: that the interval covers the mean over tasks that were not drawn.

    Returns:
        A ``Diversity``.

    Raises:
        ValueError: a set has fewer than two tasks.

    Example:
        >>> cross_diversity([[0.5, 0.5], [0.5, 0.5]]).mean
        0.5

    Source: as ``diversity``.
    """
    d = np.asarray(distances, np.float64)
    if d.ndim != 2 or min(d.shape) < 2:
        raise ValueError(f"an interval over sets of {d.shape} tasks: both need at least two")
    variance = 0.0
    for axis, n in enumerate(d.shape):
        without = (d.sum() - d.sum(1 - axis)) / (d.size - d.shape[1 - axis])
        variance += (n - 1) / n * ((without - without.mean()) ** 2).sum()
    error = math.sqrt(variance)
    naive = d.std(ddof=1) / math.sqrt(d.size)
    half = _quantile(min(d.shape) - 1, confidence) * error
    return Diversity(float(d.mean()), error, half, d.size, float(naive))


def _quantile(freedom: int, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a probability between 0 and 1, got {confidence}")
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + confidence) / 2))
