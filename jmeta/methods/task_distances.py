"""Distances between task embeddings: of vectors, and of the Gaussians they are precisions of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

Distance: TypeAlias = Callable[[np.ndarray, np.ndarray], float]


def cosine(a: Any, b: Any) -> float:
    r"""One minus the cosine of two vectors; neither's length matters.

    .. math:: d = 1 - \frac{a \cdot b}{\lVert a \rVert \lVert b \rVert}

    Args:
        a: ``[n]``.
        b: ``[n]``.

    Returns:
        In [0, 2]; of embeddings, which are not negative, in [0, 1].

    Example:
        >>> cosine([1.0, 0.0], [0.0, 2.0]), cosine([1.0, 2.0], [2.0, 4.0])
        (1.0, 0.0)
    """
    a, b = _pair(a, b)
    norms = np.sqrt((a @ a) * (b @ b))
    return float(max(0.0, 1 - (a @ b) / norms)) if norms else 0.0 if not (a - b).any() else 1.0


def normalised_cosine(a: Any, b: Any, eps: float = 0.0) -> float:
    r"""The cosine distance of two embeddings, each entry as a share of both.

    .. math:: d = 1 - \cos\left(\frac{a}{a + b}, \frac{b}{a + b}\right)

    Every row counts alike, whatever its magnitude; one that is zero in both has no share.

    Args:
        a: ``[n]``, at least 0.
        b: ``[n]``, at least 0.
        eps: added to the sum. The released code adds 1e-8, which is no longer small where entries
            of the Fisher information are not.

    Returns:
        In [0, 1].

    Example:
        >>> normalised_cosine([1e-9, 1.0], [1e-9, 1.0]), normalised_cosine([1.0, 0.0], [0.0, 5.0])
        (0.0, 1.0)

    Source: Achille et al., "Task2Vec" (2019), section 4.
    """
    return cosine(*_shares(a, b, eps, 0.0))


def entropy(a: Any, b: Any) -> float:
    r"""How far two embeddings are from even shares.

    .. math:: d = \log 2 - \frac{1}{n} \sum_i H_2\left(\frac{a_i}{a_i + b_i}\right)

    Args:
        a: ``[n]``, at least 0.
        b: ``[n]``, at least 0.

    Returns:
        In [0, log 2].

    Example:
        >>> entropy([1.0, 2.0], [1.0, 2.0]), round(entropy([1.0, 0.0], [0.0, 1.0]), 4)
        (0.0, 0.6931)

    Source: the released code of Achille et al., "Task2Vec" (2019).
    """
    from scipy.special import entr

    share, other = _shares(a, b, 0.0, 0.5)
    return max(0.0, float(np.log(2) - np.mean(entr(share) + entr(other))))


def symmetric_kl(a: Any, b: Any) -> float:
    r"""The larger of both divergences of Gaussians of these precisions, row by row.

    .. math:: d = \sum_i \max(KL_i, KL'_i), \qquad
        KL_i = \tfrac12 \left(\frac{b_i}{a_i} - 1 - \log \frac{b_i}{a_i}\right)

    Args:
        a: precisions ``[n]``, above 0.
        b: precisions ``[n]``, above 0.

    Returns:
        At least 0.

    Raises:
        ValueError: an entry is not above zero.

    Example:
        >>> symmetric_kl([1.0, 3.0], [1.0, 3.0]), round(symmetric_kl([1.0], [2.0]), 4)
        (0.0, 0.1534)

    Source: the released code of Achille et al., "Task2Vec" (2019).
    """
    ratio = np.log(_positive(b)) - np.log(_positive(a))
    kl = [0.5 * (np.expm1(r) - r) for r in (ratio, -ratio)]
    return float(np.maximum(*kl).sum())


def jensen_shannon(a: Any, b: Any) -> float:
    r"""The mean divergence of two Gaussians from that of their mean variance, over rows.

    .. math:: d = \frac{1}{2n} \sum_i \left(KL(v_i \| \bar v_i) + KL(v'_i \| \bar v_i)\right)
        = \frac{1}{2n} \sum_i \left(\log \bar v_i - \tfrac12 \log v_i v'_i\right)

    Args:
        a: precisions ``[n]``, above 0.
        b: precisions ``[n]``, above 0.

    Returns:
        At least 0.

    Raises:
        ValueError: an entry is not above zero.

    Example:
        >>> jensen_shannon([1.0, 3.0], [1.0, 3.0])
        0.0

    Source: the released code of Achille et al., "Task2Vec" (2019).
    """
    half = 0.5 * (np.log(_positive(b)) - np.log(_positive(a)))
    # The arithmetic over the geometric mean of two numbers is cosh of half their log ratio.
    return max(0.0, float(0.5 * np.mean(np.logaddexp(half, -half) - np.log(2))))


def correlation(a: Any, b: Any) -> float:
    """One minus Pearson's correlation of two variances, as in the released code.

    Args:
        a: precisions ``[n]``, above 0.
        b: precisions ``[n]``, above 0.

    Returns:
        In [0, 2].

    Raises:
        ValueError: an entry is not above zero.

    Example:
        >>> round(correlation([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]), 9)
        0.0
    """
    x, y = 1 / _positive(a), 1 / _positive(b)
    return cosine(x - x.mean(), y - y.mean())


DISTANCES: Mapping[str, Distance] = {
    "normalised cosine": normalised_cosine,
    "cosine": cosine,
    "entropy": entropy,
    "symmetric KL": symmetric_kl,
    "Jensen-Shannon": jensen_shannon,
    "correlation": correlation,
}


def distance_matrix(embeddings: Any, distance: Distance, others: Any = None) -> np.ndarray:
    """Distances between all pairs.

    Args:
        embeddings: ``[tasks, n]``.
        distance: of two vectors, symmetric.
        others: ``[others, n]``, for distances from each task to each of these.

    Returns:
        float64 ``[tasks, tasks]``, symmetric with a diagonal of zeros; or ``[tasks, others]``.

    Example:
        >>> distance_matrix([[1.0, 0.0], [0.0, 1.0]], cosine).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    rows = np.asarray(embeddings, np.float64)
    if others is not None:
        columns = np.asarray(others, np.float64)
        return np.array([[distance(a, b) for b in columns] for a in rows])
    found = np.zeros((len(rows), len(rows)))
    for i in range(len(rows)):
        for j in range(i):
            found[i, j] = found[j, i] = distance(rows[i], rows[j])
    return found


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"embeddings are vectors of one length, not {x.shape} and {y.shape}")
    return x, y


def _shares(a: Any, b: Any, eps: float, empty: float) -> tuple[np.ndarray, np.ndarray]:
    """Each entry as a share of both; ``empty`` where both are zero."""
    x, y = _pair(a, b)
    if (x < 0).any() or (y < 0).any():
        raise ValueError("an embedding has a negative entry: no share of two of them")
    total = x + y + eps
    nothing = total == 0
    shares = (np.where(nothing, empty, part / np.where(nothing, 1, total)) for part in (x, y))
    return next(shares), next(shares)


def _positive(a: Any) -> np.ndarray:
    x = np.asarray(a, np.float64)
    if not (x > 0).all():
        raise ValueError(
            f"{int((~(x > 0)).sum())} of {x.size} precisions are not above zero, and have no "
            "variance: add a prior's, or take a distance of shares or angles"
        )
    return x
