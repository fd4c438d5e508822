"""Scoring of the few-shot text experiment: adaptation curves, choices on validation, baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _fewshot_baselines as baselines
from experiments import _fewshot_model as model
from experiments._fewshot_report import STEPS, Scored
from jmeta.core.types import Array, Episode, PyTree
from jmeta.runtime.evaluate import adaptation_values, in_chunks
from jmeta.tasks.episodes import FewShot, draws, episodes

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
# Seeds of the episodes; training takes the run's own, which are small.
VALIDATION, TEST = 10**6, 10**6 + 1
CHUNK = 20  # episodes per compiled evaluation: one program for every number of episodes
CurveFn: TypeAlias = Callable[[PyTree, float, Episode], np.ndarray]


class Data(NamedTuple):
    """What a seed's methods share.

    Attributes:
        tokens: the sources by split, as tokens.
        encoded: the sources that went through the frozen body: ``train`` (the classes that the
            body has not seen), ``validation`` and ``test``.
    """

    tokens: dict[str, FewShot]
    encoded: dict[str, FewShot]


def make_curves() -> dict[str, CurveFn]:
    """``(meta, rate, episodes) -> accuracy [episodes, len(STEPS)]`` by which weights adapt."""

    def make(problem: Any) -> CurveFn:
        @jax.jit
        def chunk(meta: PyTree, rate: Array, batch: Episode) -> Array:
            def one(episode: Episode) -> Array:
                return adaptation_values(problem(rate), meta, episode, STEPS)["accuracy"]

            return jax.lax.map(one, batch)

        def curve(meta: PyTree, rate: float, batch: Episode) -> np.ndarray:
            def part(rows: np.ndarray) -> Array:
                return chunk(meta, jnp.float32(rate), jax.tree.map(lambda leaf: leaf[rows], batch))

            return in_chunks(part, len(batch.query["y"]), CHUNK)

        return curve

    return {"full": make(model.full_problem), "head": make(model.head_problem)}


def search(
    curve: CurveFn, meta: PyTree, batch: Episode, rates: Sequence[float] = RATES
) -> np.ndarray:
    """Mean validation accuracy by rate and number of inner steps, ``[rates, steps]``."""
    return np.stack([curve(meta, rate, batch).mean(0) for rate in rates])


def score(
    config: Any,
    curve: CurveFn,
    meta: PyTree,
    sources: dict[str, FewShot],
    tests: dict[str, int],
    rates: Sequence[float] = RATES,
) -> Scored:
    """Choose rate and steps on validation classes; accuracy on the test episodes at that rate."""
    make = episodes(sources["validation"], tasks=config.validation_episodes, **tests)
    grid = search(curve, meta, make(VALIDATION, 0), rates)
    best, at = np.unravel_index(int(grid.argmax()), grid.shape)
    rate = rates[int(best)]
    test = episodes(sources["test"], tasks=config.test_episodes, **tests)(TEST, 0)
    return Scored(curve(meta, rate, test), int(at), rate)


def score_baselines(
    config: Any, adapter: PyTree, data: Data, tests: dict[str, int]
) -> dict[str, Scored]:
    """What needs no gradient steps on the network, on the rows of the same episodes."""
    make = jax.jit(model.features)
    on = {k: np.asarray(make(adapter, data.encoded[k].x)) for k in ("validation", "test")}
    held_out = draws(data.encoded["validation"], tasks=config.validation_episodes, **tests)
    draw = draws(data.encoded["test"], tasks=config.test_episodes, **tests)(TEST, 0)
    counts = model.bags(data.tokens["test"].x, config.vocab)
    weights = model.inverse_document_frequency(model.bags(data.tokens["train"].x, config.vocab))
    ridge = baselines.choose_ridge(on["validation"], held_out(VALIDATION, 0))
    found = {
        "linear probe, joint features": baselines.linear_probe(on["test"], draw, ridge),
        "prototypes, joint features": baselines.prototypes(on["test"], draw),
        "nearest neighbour, joint features": baselines.nearest_neighbour(on["test"], draw),
        "prototypes, tf-idf": baselines.prototypes(counts * weights[None], draw),
        "nearest neighbour, tokens": baselines.nearest_neighbour(counts, draw),
        "majority": baselines.majority(draw),
    }
    return {name: Scored(values[:, None]) for name, values in found.items()}


class Clock:
    """Wall and CPU seconds of each phase of a run."""

    def __init__(self) -> None:
        self.spent: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add what the block takes to a phase."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        before = self.spent.get(phase, (0.0, 0.0))
        now = time.perf_counter() - wall, time.process_time() - cpu
        self.spent[phase] = (before[0] + now[0], before[1] + now[1])
