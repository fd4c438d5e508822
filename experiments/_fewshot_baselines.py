"""Baselines of the few-shot text experiment that take no gradient steps on the network.

Each gets the rows of the same episodes, and a matrix of features with one row for each passage.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.types import Array
from jmeta.models.losses import cross_entropy
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
    """Penalised logistic regression on the support's features, as scikit-learn defines it.

    The solution lies in the span of the support, so that it is found there, by Newton's method,
    for all episodes in one program: many times faster than one call for each.

    Args:
        x: features ``[n, width]``.
        draw: rows of the episodes.
        ridge: inverse strength of the penalty.

    Returns:
        Accuracy of each episode, ``[tasks]``.
    """
    x = np.asarray(x, np.float32)

    def one(support: np.ndarray, query: np.ndarray) -> float:
        a, b = x[support.reshape(-1)], x[query.reshape(-1)]
        found = _probe(a, b, jnp.float32(ridge), support.shape[-1])
        return float((np.asarray(found) == np.arange(len(b)) % support.shape[-1]).mean())

    return np.array([one(s, q) for s, q in zip(*parts(draw), strict=True)])


@functools.partial(jax.jit, static_argnums=3)
def _probe(support: Array, query: Array, ridge: Array, ways: int) -> Array:
    """Predicted classes of the query, ``[examples]``."""
    # Coordinates in the span of the support, from its Gram matrix; lost directions become zero.
    values, vectors = jnp.linalg.eigh(support @ support.T)
    scale = jnp.where(values > 1e-5 * values[-1], jax.lax.rsqrt(jnp.abs(values) + 1e-30), 0.0)
    project = vectors * scale[None]  # [examples, rank]
    a, b = support @ (support.T @ project), query @ (support.T @ project)
    labels = jnp.arange(len(a), dtype=jnp.int32) % ways
    count = a.shape[1]

    def objective(flat: Array) -> Array:
        weights = flat.reshape(count + 1, ways)
        fit = len(a) * cross_entropy(a @ weights[:-1] + weights[-1:], labels)
        # The biases' common shift changes nothing; a trace of penalty makes it unique.
        return ridge * fit + 0.5 * jnp.sum(weights[:-1] ** 2) + 1e-4 * jnp.sum(weights[-1] ** 2)

    gradient, hessian = jax.grad(objective), jax.hessian(objective)
    lengths = jnp.asarray([1.0, 0.5, 0.25, 0.1, 0.0])

    def newton(_: int, flat: Array) -> Array:
        step = jnp.linalg.solve(hessian(flat), gradient(flat))
        tried = flat[None] - lengths[:, None] * step[None]
        return tried[jnp.argmin(jax.vmap(objective)(tried))]

    flat = jax.lax.fori_loop(0, 12, newton, jnp.zeros((count + 1) * ways))
    weights = flat.reshape(count + 1, ways)
    return jnp.argmax(b @ weights[:-1] + weights[-1:], axis=1)


def choose_ridge(x: np.ndarray, draw: Draw, ridges: Sequence[float] = RIDGES) -> float:
    """The penalty that is best on validation episodes."""
    return max(ridges, key=lambda ridge: linear_probe(x, draw, ridge).mean())
