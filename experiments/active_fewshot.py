"""Which passages should be labelled? BAIT, entropy and k-means choose a few-shot task's support.

Unseen classes of the few-shot text experiment; a linear classifier on its jointly trained network.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _active_report as page
from experiments import _fewshot_model as model
from experiments import _fewshot_scoring as scoring
from experiments import fewshot_text
from experiments._active_policies import POLICIES, Pool
from experiments._shared import command_line, kept, record
from jmeta.core.types import Array
from jmeta.data.sources import DataUnavailable
from jmeta.methods import fit_head
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed
from jmeta.tasks.episodes import FewShot

PARTS = (8, 8, 4, 2, 2)
"""Sizes of the classes of a skewed pool, in twenty-fourths."""

APART = 1000
"""A seed's tasks are numbered from so many times the seed: as many are its own at most."""


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Active few-shot classification: which passages of a pool become the support."""

    source: str = "stdlib"
    """What ``experiments.fewshot_text`` reads: stdlib, clinc150, banking77, huffpost, hwu64."""
    ways: int = 5
    """Classes of a task."""
    pool: int = 60
    """Passages without a label in a task."""
    budget: int = 5
    """Passages that are labelled in one round."""
    rounds: int = 4
    """Rounds of choosing; one passage of each class is labelled before the first."""
    queries: int = 15
    """Passages of each class that are scored."""
    tasks: int = 60
    """Tasks of each kind of pool."""
    penalty: float = 1.0
    """Of the linear classifier's weights."""
    joint_steps: int = 800
    """Steps of joint training, which makes the features."""
    width: int = 128
    """Width of the network."""
    vocab: int = 2048
    """Size of the vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ways != len(PARTS):
            raise ValueError(f"ways={self.ways}: skewed pools are made for {len(PARTS)} classes")
        if not 1 <= self.tasks <= APART:
            raise ValueError(f"tasks={self.tasks}: 1 to {APART}, or seeds would share tasks")
        if self.budget * self.rounds > self.pool // 2:
            raise ValueError(
                f"{self.rounds} rounds of {self.budget} are more than half of a pool of "
                f"{self.pool}: whatever was chosen, most of it would be labelled"
            )


PRESETS = {
    "demo": Config(seeds=3),
    "full": Config(seeds=5, tasks=200),
    "smoke": Config(pool=24, budget=2, rounds=2, queries=3, tasks=2, joint_steps=2, width=8,
                    vocab=512),
}  # fmt: skip


class Task(NamedTuple):
    """A few-shot task with a pool.

    Attributes:
        x: features ``[ways + pool + queries, width]``, in an orthonormal basis of their span.
        y: classes of all of them.
        begin: rows that are labelled from the start, one of each class.
        pool: rows that may be labelled.
        query: rows that are scored.
    """

    x: np.ndarray
    y: np.ndarray
    begin: np.ndarray
    pool: np.ndarray
    query: np.ndarray


def class_sizes(pool: int, ways: int, kind: str) -> list[int]:
    """How many of each class a pool holds: evenly many, or skewed; what is left, to the first."""
    parts = [1] * ways if kind == "balanced" else PARTS
    sizes = [pool * part // sum(parts) for part in parts]
    left = pool - sum(sizes)
    return [size + (at < left) for at, size in enumerate(sizes)]


def make_task(config: Config, adapter: Any, source: FewShot, kind: str, seed: int) -> Task:
    """Draw a task of unseen classes.

    Distances, inner products and penalised linear classifiers are the same in any orthonormal
    basis, and one of the span of all passages is short.
    """
    rng = np.random.default_rng([seed, 11, kind == "balanced"])
    sizes = class_sizes(config.pool, config.ways, kind)
    most = 1 + max(sizes) + config.queries
    counts = np.bincount(source.y, minlength=len(source.names))
    large = np.flatnonzero(counts >= most)
    if len(large) < config.ways:
        raise ValueError(
            f"{len(large)} classes have the {most} passages that a task needs; "
            f"{config.ways} are needed: ask for a smaller pool or fewer queries"
        )
    classes = rng.permutation(large)[: config.ways]
    parts: dict[str, list[int]] = {"begin": [], "pool": [], "query": []}
    for label, size in zip(classes, sizes, strict=True):
        rows = rng.permutation(np.flatnonzero(source.y == label))
        for part, low, high in (("begin", 0, 1), ("pool", 1, 1 + size),
                                ("query", 1 + size, 1 + size + config.queries)):  # fmt: skip
            parts[part] += rows[low:high].tolist()
    rows = [*parts["begin"], *parts["pool"], *parts["query"]]
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), source.x)
    wide = np.asarray(model.features(adapter, x), np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    ends = np.cumsum([len(part) for part in parts.values()])
    where = [np.arange(low, high) for low, high in zip([0, *ends], ends, strict=False)]
    place = {label: i for i, label in enumerate(classes)}
    return Task(
        (vectors * np.sqrt(np.maximum(values, 0))[None]).astype(np.float32),
        np.asarray([place[source.y[i]] for i in rows], np.int32),
        *where,
    )


@functools.partial(jax.jit, static_argnames=("classes",))
def classify(x: Array, y: Array, labelled: Array, penalty: float, *, classes: int) -> Array:
    """Probabilities of all passages, of the classifier that fits the labelled ones."""
    head, _ = fit_head(
        x, y, classes=classes, penalty=penalty, weights=labelled, steps=100, tolerance=1e-4
    )
    return jax.nn.softmax(x @ head.kernel + head.bias[None])


def run_task(config: Config, task: Task, seed: int) -> dict[str, dict[str, list[float]]]:
    """Accuracies and numbers of classes seen by policy, after each round."""
    found: dict[str, dict[str, list[float]]] = {}
    everything = np.concatenate([task.begin, task.pool])

    def learn(rows: np.ndarray) -> tuple[np.ndarray, float]:
        labelled = np.zeros(len(task.y), np.float32)
        labelled[rows] = 1
        p = np.asarray(classify(task.x, task.y, labelled, config.penalty, classes=config.ways))
        return p, float((p[task.query].argmax(1) == task.y[task.query]).mean())

    for name, policy in POLICIES.items():
        rng = np.random.default_rng([seed, 12])
        labelled = task.begin
        p, accuracy = learn(labelled)
        scores, rare = [accuracy], [0.0]
        smallest = np.bincount(task.y[task.pool], minlength=config.ways).argmin()
        for _ in range(config.rounds):
            pool = Pool(
                task.x[everything], p[everything], np.isin(everything, labelled), config.budget
            )
            labelled = np.concatenate([labelled, everything[policy(pool, rng)]])
            p, accuracy = learn(labelled)
            scores.append(accuracy)
            rare.append(float((task.y[labelled] == smallest).sum() - 1))
        found[name] = {"accuracy": scores, "rarest": rare}
    found[page.ALL] = {"accuracy": [learn(everything)[1]], "rarest": []}
    return found


def joint_features(config: Config, seed: int, tokens: Mapping[str, FewShot]) -> tuple[Any, FewShot]:
    """The adapter after joint training on other classes, and the test classes, encoded."""
    settings = dataclasses.replace(
        fewshot_text.PRESETS["demo"], out=config.out / "joint", resume=config.resume,
        source=config.source, width=config.width, vocab=config.vocab,
        joint_steps=config.joint_steps,
    )  # fmt: skip
    _, start, data = fewshot_text.joint_start(settings, seed, dict(tokens), scoring.Clock())
    return start["adapter"], data.encoded["test"]


def run_seed(config: Config, seed: int, tokens: Mapping[str, FewShot]) -> page.Found:
    """All tasks of a seed, read from the run folder where they are done."""
    path = config.out / f"seed-{seed}.json"
    if (done := kept(config, path)) is not None:
        return done
    adapter, source = joint_features(config, seed, tokens)
    found: page.Found = {}
    for kind in page.KINDS:
        made = [
            run_task(config, make_task(config, adapter, source, kind, APART * seed + i), i)
            for i in range(config.tasks)
        ]
        found[kind] = {
            policy: {
                what: np.asarray([task[policy][what] for task in made]).T.tolist()
                for what in ("accuracy", "rarest")
            }
            for policy in made[0]
        }
    distributed.write(path, json.dumps(found) + "\n")
    return found


def run(config: Config) -> None:
    """Train, choose, score, and write the run directory."""
    record(config, "seeds", "first_seed")
    settings = dataclasses.replace(
        fewshot_text.PRESETS["demo"], source=config.source, vocab=config.vocab
    )
    try:
        tokens = fewshot_text.load(settings)
        found = {seed: run_seed(config, seed, tokens) for seed in config.seed_list}
    except (DataUnavailable, ValueError) as error:
        sys.exit(str(error))
    if distributed.is_writer():
        page.write(config, found)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
