"""The transfer grid: from every three of six tasks to a seventh, in sequence, by Reptile, by MAML.

All see the same number of rows; then each is fine-tuned on the target alike.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from experiments._task_diversity_data import Encoded
from experiments._task_diversity_probe import Probe
from jmeta.core import optim
from jmeta.core.types import Array, Episode, Key, MetaGradient, PyTree, Steps
from jmeta.methods.maml import learned_start
from jmeta.models import heads
from jmeta.runtime.evaluate import in_chunks

NONE = "no source"
METHODS = ("transfer", "Reptile", "MAML")
SUBSET, INNER = 3, 3
SOURCES = ("CoLA", "QNLI", "electronics", "emotion", "huffpost", "banking77")
TARGET = "clinc150"


class Rates(NamedTuple):
    """Rates of training.

    Attributes:
        transfer: AdamW's, on one source after the other.
        target: AdamW's, of fine-tuning on the target.
        inner: of gradient descent inside of MAML.
        reptile: Adam's inside of Reptile.
        outer: Adam's, of MAML.
    """

    transfer: float = 1e-4
    target: float = 1e-3
    inner: float = 0.1
    reptile: float = 1e-4
    outer: float = 1e-4


class Sizes(NamedTuple):
    """Sizes of the grid.

    Attributes:
        batches: batches that every method sees; a multiple of 12, so that three tasks share them.
        batch: rows of each.
        target_steps: steps of fine-tuning.
        target_train: rows of the target that may be trained on; all others are scored.
        classes: outputs of the head.
    """

    batches: int
    batch: int
    target_steps: int
    target_train: int
    classes: int


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every three of the sources."""
    return list(itertools.combinations(names, SUBSET))


def chosen(tasks: Sequence[Encoded]) -> tuple[dict[str, Encoded], Encoded]:
    """The sources and the target; of tasks that have other names, the first seven."""
    named = {task.name: task for task in tasks}
    if set(SOURCES) | {TARGET} <= set(named):
        return {name: named[name] for name in SOURCES}, named[TARGET]
    return {task.name: task for task in tasks[: len(SOURCES)]}, tasks[len(SOURCES)]


class Grid(NamedTuple):
    """The trainings, compiled once for all subsets and seeds.

    Attributes:
        start: ``() -> params``: the probe with a head of zeros.
        source: ``(method, tasks, seed) -> params`` that learned from tasks, in their order where
            there is one.
        score: ``(params, target, seed) -> accuracy`` after fine-tuning, with a head of zeros.
    """

    start: Callable[[], PyTree]
    source: Callable[[str, Sequence[Encoded], int], PyTree]
    score: Callable[[PyTree, Encoded, int], float]


def make_grid(probe: Probe, sizes: Sizes, rates: Rates) -> Grid:
    """The trainings of a probe."""
    loss = _loss(probe)
    plain = jmeta.methods.plain_gradient(loss)
    stage = _trainer(plain, _adamw(rates.transfer, sizes.batches // SUBSET))
    fine_tune = _trainer(plain, _adamw(rates.target, sizes.target_steps))
    each = INNER + 1  # batches of a task in an outer step: MAML's last one is its query
    reptile = jmeta.methods.reptile(loss, steps=each, optimizer=optim.adam(rates.reptile))
    towards = optax.linear_schedule(1.0, 0.0, sizes.batches // (SUBSET * each))
    maml = jmeta.mixed_mode(learned_start(loss, optax.sgd(rates.inner)), INNER)
    by_task = {
        "Reptile": _trainer(jmeta.over_tasks(reptile), optax.sgd(towards)),
        "MAML": _trainer(jmeta.over_tasks(maml), optim.adam(rates.outer)),
    }
    hits = jax.jit(functools.partial(_hits, probe))

    def start() -> PyTree:
        width, classes = probe.config.width, sizes.classes
        head = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
        return {"body": probe.params, "head": head}

    def source(method: str, tasks: Sequence[Encoded], seed: int) -> PyTree:
        params = start()
        drawn = [
            _draw(task, sizes.batches // SUBSET, sizes.batch, seed, i)
            for i, task in enumerate(tasks)
        ]
        if method == "transfer":
            for batches in drawn:
                params = stage(params, Episode((), batches))
            return params
        stacked: Any = jax.tree.map(lambda *x: np.stack(x, 1), *drawn)  # [batches, task, ...]
        episodes = jax.tree.map(lambda x: x.reshape(-1, each, *x.shape[1:]).swapaxes(1, 2), stacked)
        support = jax.tree.map(lambda x: x if method == "Reptile" else x[:, :, :INNER], episodes)
        query = jax.tree.map(lambda x: x[:, :, INNER], episodes)
        return by_task[method](params, Episode(Steps(support), query))

    def score(params: PyTree, target: Encoded, seed: int) -> float:
        order = np.random.default_rng([seed, 9]).permutation(len(target.y))
        train, test = np.split(order, [sizes.target_train])
        part = target._replace(x={k: v[train] for k, v in target.x.items()}, y=target.y[train])
        batches = _draw(part, sizes.target_steps, 2 * sizes.batch, seed, 100)
        tuned = fine_tune({**start(), "body": params["body"]}, Episode((), batches))

        def right(at: np.ndarray) -> Array:
            x = {k: v[test[at]] for k, v in target.x.items()}
            return hits(tuned, x, target.y[test[at]].astype(np.int32))

        return float(in_chunks(right, len(test), 64).mean())

    return Grid(start, source, score)


def _draw(task: Encoded, batches: int, size: int, seed: int, salt: int) -> dict[str, np.ndarray]:
    """Random batches of a task, ``[batches, size, ...]``."""
    rows = np.random.default_rng([seed, 10, salt]).integers(0, len(task.y), (batches, size))
    return {**{k: v[rows] for k, v in task.x.items()}, "y": task.y[rows].astype(np.int32)}


def _scores(probe: Probe, params: PyTree, batch: Mapping[str, Array]) -> Array:
    pooled = heads.mean_pool(probe.hidden(params["body"], batch), batch["mask"])
    return pooled @ params["head"]["kernel"] + params["head"]["bias"][None]


def _loss(probe: Probe) -> Any:
    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        del key
        return heads.class_loss(_scores(probe, params, batch), batch)

    return loss


def _hits(probe: Probe, params: PyTree, batch: PyTree, y: Array) -> Array:
    return (_scores(probe, params, batch).argmax(-1).astype(y.dtype) == y).astype(jnp.float32)


def _adamw(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps))
    return optax.chain(optax.clip_by_global_norm(1.0), optim.adamw(schedule, weight_decay=0.01))


def _trainer(mg: MetaGradient, outer: optax.GradientTransformation) -> Any:
    """A jitted training on stacked episodes."""
    begin, step = jmeta.meta_trainer(mg, outer)

    @jax.jit
    def train(params: PyTree, episodes: PyTree) -> PyTree:
        state = begin(params, jax.random.key(0))
        state, _ = jax.lax.scan(lambda s, e: (step(s, e)[0], None), state, episodes)
        return state.meta

    return train
