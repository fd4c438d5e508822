"""Omniglot: few-shot character recognition with a conv network, exact MAML and first order.

Meta-trained on background characters and their rotations; the test step, rate and checkpoint are
chosen on held-out background alphabets; scored on the evaluation alphabets.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from experiments import _omniglot_report as page
from experiments._omniglot_model import FEATURES, make_loss, make_problem
from experiments._omniglot_report import STEPS
from experiments._shared import (
    Trained,
    command_line,
    record,
    scored_row,
    train_method,
)
from jmeta import methods
from jmeta.core.types import Array, Episode, Problem, PyTree
from jmeta.data.loader import episode_loader
from jmeta.data.sources import DataUnavailable
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed
from jmeta.runtime.evaluate import adaptation_values
from jmeta.tasks.episodes import FewShot, episodes
from jmeta.tasks.omniglot import omniglot

ESTIMATORS = {"maml": jmeta.mixed_mode, "fomaml": jmeta.first_order}
RATES = (0.01, 0.05, 0.2, 1.0)
# Seeds of the episodes; training takes the run's own, which are small.
VALIDATION, CHOICE, TEST = 10**6, 10**6 + 1, 10**6 + 2


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Few-shot recognition of handwritten characters: exact MAML beside first order."""

    ways: int = 5
    """Characters per episode."""
    queries: int = 5
    """Query drawings per character in training."""
    test_queries: int = 15
    """Query drawings per character in validation and test."""
    network: str = "pool"
    """How its four blocks halve the image: pool (of the maximum) or stride (the MAML paper's)."""
    filters: int = 32
    """Filters of each of the four blocks."""
    meta_batch: int = 4
    """Episodes per meta-step."""
    meta_steps: int = 12000
    """Meta-steps of each method."""
    inner_steps: int = 2
    """Inner steps in training; the number at test is chosen on validation alphabets."""
    inner_lr: float = 0.4
    """Inner rate; where the rates are learned, their start."""
    learned_rates: bool = True
    """Meta-learn one inner rate for each array of weights."""
    multi_step: bool = False
    """Score the query after every inner step in training, not only after the last."""
    outer_lr: float = 2e-3
    """Adam's rate at the start of a cosine decay."""
    evaluate_every: int = 1000
    """Meta-steps between validations and checkpoints."""
    validation_episodes: int = 100
    """Episodes of each validation; the final choices take twice as many."""
    test_episodes: int = 600
    """Episodes of the final number."""
    methods: tuple[str, ...] = ("maml", "fomaml")
    """Which are meta-trained: maml (exact), fomaml (first order); the first is the baseline of the
    differences."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.methods) - set(ESTIMATORS)
        if unknown or not self.methods:
            raise ValueError(f"methods {self.methods}: choose of {', '.join(ESTIMATORS)}")
        if self.network not in ("stride", "pool"):
            raise ValueError(f"network {self.network}: there are stride and pool")


PRESETS = {
    "5way": Config(),
    "20way": Config(
        ways=20, queries=2, test_queries=5, network="stride", filters=64, meta_steps=5000,
    ),
    "smoke": Config(
        ways=3, queries=2, test_queries=3, filters=4, meta_batch=2, meta_steps=4, evaluate_every=2,
        validation_episodes=4, test_episodes=6,
    ),
}  # fmt: skip


Curve = Callable[[PyTree, float, Episode], np.ndarray]


def make_curve(problem: Callable[[Array], Problem]) -> Curve:
    """``(meta, rate, episodes) -> accuracies [episodes, STEPS]``, compiled once for any number.

    One episode after another: its arrays stay in the processor's cache, which is several times
    faster there than all at once.
    """

    @jax.jit
    def one(meta: PyTree, rate: Array, episode: Episode) -> Array:
        return adaptation_values(problem(rate), meta, episode, STEPS)["accuracy"]

    def curve(meta: PyTree, rate: float, batch: Episode) -> np.ndarray:
        each = (
            jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(len(batch.query["y"]))
        )
        return np.stack([one(meta, np.float32(rate), episode) for episode in each])

    return curve


def meta_train(
    config: Config, method: str, seed: int, data: dict[str, FewShot], curve: Curve
) -> Trained:
    """Meta-train one method; its best checkpoint by validation accuracy."""
    problem, meta = make_problem(config, jax.random.key(seed))
    options = {}
    if config.multi_step:
        weights = jnp.full(config.inner_steps, 1 / config.inner_steps)
        options["objective"] = jmeta.multi_step(weights)
    estimator = ESTIMATORS[method](problem, config.inner_steps, **options)
    held_out = sample(config, data["validation"], config.validation_episodes, VALIDATION)

    def validate(meta: PyTree) -> dict[str, float]:
        return {"accuracy": float(curve(meta, 0.0, held_out).mean(0).max())}

    train = episodes(
        data["train"], ways=config.ways, shots=1, queries=config.queries, tasks=config.meta_batch
    )
    schedule = optax.cosine_decay_schedule(config.outer_lr, config.meta_steps, 0.01)
    batches = episode_loader(train, seed=seed, threads=1)
    try:
        return train_method(
            f"{method}, seed {seed}",
            jmeta.over_tasks(estimator, microbatch=1),
            optax.adam(schedule),
            meta,
            batches,
            config.out / f"{method}-{seed}",
            resume=config.resume,
            best="max:accuracy",
            steps=config.meta_steps,
            key=seed,
            evaluate=validate,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.evaluate_every,
            keep=1,
            log_every=max(1, config.evaluate_every // 10),
        )
    finally:
        batches.close()


def sample(config: Config, source: FewShot, count: int, seed: int) -> Episode:
    """Episodes to validate or test on, the same for every method and training seed."""
    make = episodes(source, ways=config.ways, shots=1, queries=config.test_queries, tasks=count)
    return make(seed, 0)


def nearest(encode: Callable[[Array], Array], batch: Episode) -> Array:
    """Accuracy per episode of the class whose one drawing is nearest by cosine."""

    def unit(x: Array) -> Array:
        flat = encode(x).reshape(x.shape[0], -1)
        return flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-9)

    def one(episode: Episode) -> Array:
        support, query = episode.support, episode.query
        chosen = jnp.argmax(unit(query["x"]) @ unit(support["x"]).T, axis=1)
        return jnp.mean((support["y"][chosen] == query["y"]).astype(jnp.float32))

    return jax.jit(lambda batch: jax.lax.map(one, batch))(batch)


def evaluate_seed(
    config: Config,
    seed: int,
    data: dict[str, FewShot],
    trained: dict[str, Trained],
    learned: Curve,
    plain: Curve,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Rows of every method on the same test episodes, and the adaptation curves."""
    choice = sample(config, data["validation"], 2 * config.validation_episodes, CHOICE)
    test = sample(config, data["test"], config.test_episodes, TEST)
    rows: list[dict[str, Any]] = []
    curves: dict[str, np.ndarray] = {}

    def add(method: str, values: Any, **settings: Any) -> None:
        rows.append(scored_row(config, method, seed, "accuracy", values) | settings)

    for method, run in trained.items():
        at = int(learned(run.meta, 0.0, choice).mean(0).argmax())
        curves[method] = learned(run.meta, 0.0, test)
        add(method, curves[method][:, at])
        for metric, value in (
            ("test steps", STEPS[at]),
            ("training CPU minutes", run.cpu_seconds / 60),
            ("meta-step of the best checkpoint", run.step),
        ):
            rows.append({"method": method, "seed": seed, "metric": metric, "value": float(value)})
    fresh = make_problem(config, jax.random.key(seed))[1]
    params = fresh["start"] if config.learned_rates else fresh
    tried = {rate: plain(params, rate, choice).mean(0) for rate in RATES}
    rate = max(tried, key=lambda rate: tried[rate].max())
    at = int(tried[rate].argmax())
    curves["no meta-training"] = plain(params, rate, test)
    add("no meta-training", curves["no meta-training"][:, at])
    rows.append({"method": "no meta-training", "seed": seed, "metric": "test steps",
                 "value": float(STEPS[at])})  # fmt: skip
    add("prototypes, random features", nearest(lambda x: FEATURES[config.network](params, x), test))
    add("nearest neighbour, pixels", nearest(lambda x: x, test))
    return rows, curves


def run(config: Config) -> None:
    """Train, evaluate, and write the run directory."""
    record(config, "seeds", "first_seed")
    try:
        data = omniglot()
    except DataUnavailable as error:
        sys.exit(str(error))
    rows, curves = [], []
    histories: page.Histories = {method: [] for method in config.methods}
    problem, loss = make_problem(config, jax.random.key(0))[0], make_loss(config.network)
    learned = make_curve(lambda rate: problem)  # its rates are its own
    plain = make_curve(lambda rate: methods.learned_start(loss, optax.sgd(rate)))
    for seed in config.seed_list:
        trained = {m: meta_train(config, m, seed, data, learned) for m in config.methods}
        for method, each in trained.items():
            histories[method].append(each.history)
        more, curve = evaluate_seed(config, seed, data, trained, learned, plain)
        rows += more
        curves.append(curve)
    if distributed.is_writer():  # the first tells what all have done
        page.write(config, rows, curves, histories)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
