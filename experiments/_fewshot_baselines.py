"""Baselines of the few-shot text experiment that take no gradient steps on the network.

Each gets the rows of the same episodes, and a matrix of features with one row for each passage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jmeta.tasks.episodes import Draw

RIDGES = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the linear probe's penalty, of which validation chooses one."""


def parts(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """The rows of an episode's support and query, each ``[tasks, examples, ways]``."""
    return draw.rows[:, : draw.shots], draw.rows[:, draw.shots :]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def majority(draw: Draw) -> np.ndarray:
    """Always the most frequent class of the support, the first of equals: chance.

    Args:
        draw: rows of the episodes.

    Returns:
        Accuracy of each episode, ``[tasks]``.
    """
    return np.full(len(draw.rows), 1 / draw.rows.shape[-1])


def nearest_neighbour(x: np.ndarray, draw: Draw) -> np.ndarray:
    """The class of the support passage with the largest cosine.

    Args:
        x: features ``[n, width]``.
        draw: rows of the episodes.

    Returns:
        Accuracy of each episode, ``[tasks]``.

    Example:
        >>> draw = Draw(np.array([[[0, 1], [2, 3]]]), None, None, 1)
        >>> nearest_neighbour(np.array([[1, 0], [0, 1], [3, 1], [3, 1]]), draw)
        array([0.5])
    """
    x = unit(x)

    def one(support: np.ndarray, query: np.ndarray) -> float:
        ways = support.shape[-1]
        best = (x[query.reshape(-1)] @ x[support.reshape(-1)].T).argmax(1) % ways
        return float((best == np.arange(query.size) % ways).mean())

    return np.array([one(s, q) for s, q in zip(*parts(draw), strict=True)])


def prototypes(x: np.ndarray, draw: Draw) -> np.ndarray:
    """The class whose mean support feature has the largest cosine.

    Args:
        x: features ``[n, width]``.
        draw: rows of the episodes.

    Returns:
        Accuracy of each episode, ``[tasks]``.

    Source: Snell et al., "Prototypical Networks for Few-shot Learning" (2017), with cosines.
    """
    x = unit(x)

    def one(support: np.ndarray, query: np.ndarray) -> float:
        scores = x[query] @ unit(x[support].mean(0)).T  # [examples, ways, ways]
        return float((scores.argmax(-1) == np.arange(support.shape[-1])).mean())

    return np.array([one(s, q) for s, q in zip(*parts(draw), strict=True)])


def linear_probe(x: np.ndarray, draw: Draw, ridge: float) -> np.ndarray:
    """Penalised logistic regression on the support's features (scikit-learn).

    Args:
        x: features ``[n, width]``.
        draw: rows of the episodes.
        ridge: inverse strength of the penalty.

    Returns:
        Accuracy of each episode, ``[tasks]``.
    """
    from sklearn.linear_model import LogisticRegression

    def one(support: np.ndarray, query: np.ndarray) -> float:
        ways = support.shape[-1]
        a, b = x[support.reshape(-1)].astype(float), x[query.reshape(-1)].astype(float)
        # The penalised solution lies in the span of the support: the same classifier, smaller.
        basis = np.linalg.qr(a.T)[0]
        model = LogisticRegression(C=ridge, max_iter=200)
        model.fit(a @ basis, np.arange(len(a)) % ways)
        return float((model.predict(b @ basis) == np.arange(len(b)) % ways).mean())

    return np.array([one(s, q) for s, q in zip(*parts(draw), strict=True)])


def choose_ridge(x: np.ndarray, draw: Draw, ridges: Sequence[float] = RIDGES) -> float:
    """The penalty that is best on validation episodes."""
    return max(ridges, key=lambda ridge: linear_probe(x, draw, ridge).mean())
