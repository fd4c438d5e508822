"""Scoring of the reviews experiment: adaptation to unseen domains, choices on validation domains.

Baselines that take no gradient steps on the network get the rows of the same episodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _reviews_model as model
from jmeta.core.types import Array, Episode, PyTree
from jmeta.runtime.evaluate import adaptation_values, in_chunks
from jmeta.tasks import reviews
from jmeta.tasks.episodes import Sample

RATES = {"full": (0.02, 0.1, 0.3), "head": (0.1, 0.3, 1.0), "lora": (0.03, 0.1, 0.3)}
"""Inner rates to choose from at test, by which weights adapt."""
RIDGES = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the linear probe's penalty to choose from."""
# Seeds of the episodes; training takes the run's own, which are small.
VALIDATION, TEST = 10**6, 2 * 10**6
CHUNK = 6  # episodes per compiled evaluation: one program for every number of episodes
CurveFn: TypeAlias = Callable[[PyTree, float, model.Source, "Test"], np.ndarray]


class Test(NamedTuple):
    """Episodes as rows of a source, of a fixed number from each domain.

    Attributes:
        rows: int ``[episodes, shots + queries]``, the support first.
        shots: how many are the support.
        domains: ``[episodes]`` names.
    """

    rows: np.ndarray
    shots: int
    domains: tuple[str, ...]


class Scored(NamedTuple):
    """A method's accuracy at one number of support examples.

    Attributes:
        values: ``[episodes, points]`` by inner steps at the rate chosen; ``[episodes, 1]`` without.
        domains: ``[episodes]`` names.
        chosen: index of the number of inner steps chosen.
        rate: the inner rate chosen, or None.
    """

    values: np.ndarray
    domains: tuple[str, ...]
    chosen: int = 0
    rate: float | None = None


Scores: TypeAlias = dict[str, dict[int, Scored]]  # by method and number of support examples


def written(scored: Scores) -> str:
    """Scores as JSON."""
    plain = {
        name: {shots: found._replace(values=found.values.tolist()) for shots, found in at.items()}
        for name, at in scored.items()
    }
    return json.dumps(plain)


def read_scored(text: str) -> Scores:
    """What ``written`` wrote.

    Example:
        >>> found = {"maml": {8: Scored(np.ones((1, 2)), ("pens",), 1, 0.5)}}
        >>> read_scored(written(found))["maml"][8]
        Scored(values=array([[1., 1.]]), domains=('pens',), chosen=1, rate=0.5)
    """
    return {
        name: {
            int(shots): Scored(np.asarray(values), tuple(domains), chosen, rate)
            for shots, (values, domains, chosen, rate) in at.items()
        }
        for name, at in json.loads(text).items()
    }


def episodes(source: model.Source, *, shots: int, queries: int, tasks: int) -> Sample:
    """Episodes of one domain each, as ``reviews.domain_episodes``, of states in place of tokens."""
    drawn = reviews.draws(source.encoded, shots=shots, queries=queries, tasks=tasks)

    def sample(seed: int, step: int) -> Episode:
        rows = drawn(seed, step)
        return Episode(model.batch(source, rows[:, :shots]), model.batch(source, rows[:, shots:]))

    return sample


def tests(
    source: model.Source, names: Sequence[str], shots: int, queries: int, each: int, seed: int
) -> Test:
    """A fixed number of episodes from each of some domains.

    Raises:
        ValueError: a domain holds too few reviews: "office_products has 30, needs 100".
    """
    size = {"shots": shots, "queries": queries, "tasks": each}
    reviews.draws(source.encoded, domains=names, **size)  # all that are too small in one message
    found = [reviews.draws(source.encoded, domains=[name], **size)(seed, 0) for name in names]
    domains = tuple(name for name in names for _ in range(each))
    return Test(np.concatenate(found), shots, domains)


def domains_at(config: Any, source: model.Source, needed: int) -> tuple[str, ...]:
    """The low-resource domains with enough reviews; where one has not, larger ones stand in."""
    enough = set(reviews.at_least(source.encoded, needed))
    small = tuple(name for name in config.test_domains if name in enough)
    if len(small) == len(config.test_domains):
        return small
    return small + tuple(name for name in config.larger_domains if name in enough)


def make_curve(encoder: model.Encoder, kind: str, steps: Sequence[int]) -> CurveFn:
    """``(meta, rate, source, test) -> accuracy [episodes, len(steps)]``."""

    @jax.jit
    def chunk(meta: PyTree, rate: Array, batch: Episode) -> Array:
        problem = model.problem(encoder, kind, rate)[1]

        def one(episode: Episode) -> Array:
            return adaptation_values(problem, meta, episode, steps)["accuracy"]

        return jax.lax.map(one, batch)

    def curve(meta: PyTree, rate: float, source: model.Source, test: Test) -> np.ndarray:
        def part(at: np.ndarray) -> Array:
            support, query = np.split(test.rows[at], [test.shots], axis=1)
            batch = Episode(model.batch(source, support), model.batch(source, query))
            return chunk(meta, jnp.float32(rate), batch)

        return in_chunks(part, len(test.rows), CHUNK)

    return curve


def score(
    curve: CurveFn,
    meta: PyTree,
    rates: Sequence[float],
    validation: tuple[model.Source, Test],
    test: tuple[model.Source, Test],
) -> Scored:
    """Choose rate and steps on validation domains; accuracy on the test domains at that rate."""
    grid = np.stack([curve(meta, rate, *validation).mean(0) for rate in rates])
    best, at = np.unravel_index(int(grid.argmax()), grid.shape)
    rate = rates[int(best)]
    return Scored(curve(meta, rate, *test), test[1].domains, int(at), rate)


def majority(y: np.ndarray, test: Test) -> np.ndarray:
    """Always the most frequent label of the support, the first of equals.

    Example:
        >>> majority(np.array([1, 1, 0, 1]), Test(np.array([[0, 1, 2, 3]]), 2, ("pens",)))
        array([0.5])
    """
    said = y[test.rows]
    support, query = said[:, : test.shots], said[:, test.shots :]
    return (query == (2 * support.sum(1) > test.shots)[:, None]).mean(1)


def nearest_neighbour(vectors: np.ndarray, y: np.ndarray, test: Test) -> np.ndarray:
    """The label of the support review with the largest cosine.

    Example:
        >>> found = Test(np.array([[0, 1, 2, 3]]), 2, ("pens",))
        >>> nearest_neighbour(np.eye(2)[[0, 1, 1, 0]], np.array([0, 1, 1, 1]), found)
        array([0.5])
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    right = []
    for rows in test.rows:
        support, query = rows[: test.shots], rows[test.shots :]
        best = (unit[query] @ unit[support].T).argmax(1)
        right.append((y[support][best] == y[query]).mean())
    return np.array(right)


def linear_probe(vectors: np.ndarray, y: np.ndarray, test: Test, ridge: float) -> np.ndarray:
    """scikit-learn's logistic regression on the support; with one label there, that label."""
    from sklearn.linear_model import LogisticRegression

    right = []
    for rows in test.rows:
        support, query = rows[: test.shots], rows[test.shots :]
        if len(set(y[support].tolist())) == 1:
            said = np.full(len(query), y[support][0])
        else:
            fitted = LogisticRegression(C=ridge, max_iter=500).fit(vectors[support], y[support])
            said = fitted.predict(vectors[query])
        right.append((said == y[query]).mean())
    return np.array(right)


def baselines(
    validation: tuple[model.Source, Test], test: tuple[model.Source, Test]
) -> dict[str, Scored]:
    """What needs no gradient steps on the network; the probe's penalty is chosen on validation."""

    def data(source: model.Source) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(source.vectors), source.encoded.labels

    (source, episodes), (held_out, choices) = test, validation
    ridge = max(RIDGES, key=lambda ridge: linear_probe(*data(held_out), choices, ridge).mean())
    found = {
        "linear probe, frozen features": linear_probe(*data(source), episodes, ridge),
        "nearest neighbour, frozen features": nearest_neighbour(*data(source), episodes),
        "majority": majority(source.encoded.labels, episodes),
    }
    return {name: Scored(values[:, None], episodes.domains) for name, values in found.items()}
