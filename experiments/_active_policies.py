"""Which passages of a pool to label next: the policies of the active few-shot experiment.

Each is ``(Pool, rng) -> rows of the pool``; none sees a label that was not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import jax.numpy as jnp
import numpy as np

from jmeta.methods import bait, point_factors


class Pool(NamedTuple):
    """What a policy sees.

    Attributes:
        x: features of all passages of the pool, ``[points, width]``.
        probabilities: the present classifier's, ``[points, classes]``.
        labelled: bool ``[points]``.
        budget: how many to choose.
    """

    x: np.ndarray
    probabilities: np.ndarray
    labelled: np.ndarray
    budget: int


Policy: TypeAlias = Callable[[Pool, np.random.Generator], np.ndarray]


def at_random(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """Any that are not labelled."""
    return rng.choice(np.flatnonzero(~pool.labelled), pool.budget, replace=False)


def most_uncertain(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """Those whose predictions have the largest entropy."""
    del rng
    p = pool.probabilities
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
    return np.argsort(np.where(pool.labelled, np.inf, -entropy), kind="stable")[: pool.budget]


def nearest_to_centres(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """Of as many k-means clusters of what is not labelled, the passage nearest to each centre."""
    from sklearn.cluster import KMeans

    left = np.flatnonzero(~pool.labelled)
    seed = int(rng.integers(2**31))
    fitted = KMeans(n_clusters=pool.budget, n_init=cast(Any, 4), random_state=seed).fit(
        pool.x[left]
    )
    distances = fitted.transform(pool.x[left])
    chosen: list[int] = []
    for cluster in range(pool.budget):
        order = np.argsort(distances[:, cluster], kind="stable")
        chosen.append(next(int(i) for i in order if i not in chosen))
    return left[chosen]


def by_fisher(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """BAIT: those whose Fisher information covers that of the pool best."""
    del rng
    factors = point_factors(jnp.asarray(pool.x), jnp.asarray(pool.probabilities))
    left, known = np.flatnonzero(~pool.labelled), np.flatnonzero(pool.labelled)
    found = bait(factors[left], pool.budget, labelled=factors[known])
    return left[np.asarray(found.chosen)]


POLICIES: Mapping[str, Policy] = {
    "random": at_random,
    "entropy": most_uncertain,
    "k-means": nearest_to_centres,
    "BAIT": by_fisher,
}
