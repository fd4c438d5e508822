"""Language models that adapt as they read: fast weights, dynamic evaluation and others, one table.

A small decoder is trained once for each seed; what is trained further takes the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import _adaptive_lm_data as data_of
from experiments import _adaptive_lm_methods as methods_of
from experiments import _adaptive_lm_report as page
from experiments import _adaptive_lm_scoring as scoring
from experiments._adaptive_lm_data import Data
from experiments._adaptive_lm_methods import (
    BLOCK,
    EXACT,
    FIRST,
    HSO,
    KNN,
    META,
    METHODS,
    NGRAM,
    RMS,
    SGD,
    SHORT,
    STATIC,
    TRAINED,
    Body,
    Losses,
)
from experiments._shared import command_line, record, require_positive, train_method
from experiments._teacher_shared import named
from jmeta.core.types import Episode, PyTree
from jmeta.data.sources import DataUnavailable
from jmeta.methods import fast_weights, plain_gradient
from jmeta.methods.fast_weights import FastWeights
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, fit

BASE = "decoder"  # what all but Transformer-N begin from


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Perplexity of language models that adapt as they read, and what it costs."""

    seeds: int = 3
    """Number of seeds: of initialisation and of the order of training text."""
    corpus: str = "embedded"
    """embedded: files of Python's standard library, split by package; wikitext2: $JMETA_DATA/lm."""
    model: str = "decoder"
    """decoder: trained here; otherwise a GPT-2 checkpoint, a folder or a name on the hub."""
    methods: tuple[str, ...] = METHODS
    """Which are trained and scored; static must be among them."""
    vocab: int = 1024
    """Size of the byte-level BPE vocabulary of the decoder."""
    width: int = 96
    """Width of the decoder, and of the block of fast weights."""
    layers: int = 3
    """Layers of the decoder."""
    heads: int = 4
    """Heads of the decoder."""
    length: int = 512
    """Tokens of a document that are read; all of them are context."""
    segment: int = 64
    """Tokens between two updates of dynamic evaluation and of HSO; divides length."""
    batch: int = 8
    """Documents of a training step."""
    base_steps: int = 300
    """Training steps of the shared decoder."""
    extra_steps: int = 200
    """Training steps of each method from there, of static too; Transformer-N takes both."""
    rate: float = 3e-3
    """Adam's rate in training, with a warm-up and a cosine decay to a tenth of it."""
    step_size: float = 0.1
    """Where the learned step sizes of fast weights begin."""
    reference: float = 64.0
    """Tokens that the gradients of fast weights are divided by."""
    inner_rate: float = 0.01
    """Where the learned rates of dynamic evaluation begin."""
    neighbours: int = 64
    """Entries that kNN-LM looks up."""
    datastore: int = 40_000
    """Entries of its datastore, of training text."""
    key_penalty: float = 1e-3
    """Weight of the squared length of kNN-LM's keys in the training of "short keys"."""
    statistics_batches: int = 50
    """Training batches whose gradients give RMS its sizes."""
    validation_documents: int = 16
    """Documents on which rates are chosen."""
    test_documents: int = 64
    """Documents that are scored."""
    score_batch: int = 8
    """Documents that are scored at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "methods", named("methods", self.methods, METHODS))
        if STATIC not in self.methods:
            raise ValueError(f"all are compared with {STATIC!r}: add it to methods")
        if len(self.methods) < 2:
            raise ValueError(f"{STATIC!r} alone is compared with nothing: name another method")
        require_positive(
            self, "length", "batch", "neighbours", "datastore", "statistics_batches",
            "validation_documents", "test_documents", "score_batch", "inner_rate", "reference",
            "extra_steps",
        )  # fmt: skip
        if self.model != BASE and NGRAM in self.methods:
            others = ",".join(name for name in self.methods if name != NGRAM)
            raise ValueError(
                f"{NGRAM} is no way to read {self.model}: leave it out, --methods {others!r}"
            )
        if self.corpus not in ("embedded", "wikitext2"):
            raise ValueError(f"corpus={self.corpus!r}: choose embedded or wikitext2")
        if NGRAM in self.methods and self.layers < 2:
            raise ValueError(f"layers={self.layers}: {NGRAM} needs one above its first")
        if self.base_steps < 0:
            raise ValueError(f"base_steps={self.base_steps}: 0, which trains no base, or more")
        fewest = 2 * scoring.KNN_PAIRS
        if {KNN, SHORT} & set(self.methods) and self.datastore < fewest:
            raise ValueError(
                f"datastore={self.datastore}: temperatures are in units of the distance between "
                f"{scoring.KNN_PAIRS} pairs of entries; choose at least {fewest}"
            )
        if self.segment < 1 or self.length % self.segment:
            raise ValueError(f"segment={self.segment} does not divide length={self.length}")


PRESETS = {
    # One seed, so that it ends in minutes on two cores: intervals are over documents.
    "demo": Config(
        seeds=1, width=64, layers=2, heads=2, length=256, segment=32, base_steps=200,
        extra_steps=200, validation_documents=8,
    ),
    # Three seeds at a size between the two; --methods takes some of it at a time.
    "small": Config(),
    # For an accelerator: minutes there, days on two cores.
    "full": Config(
        vocab=2048, width=256, layers=4, heads=4, length=512, batch=16, base_steps=400,
        extra_steps=300, rate=1e-3, datastore=200_000, statistics_batches=100,
        validation_documents=32, test_documents=128, score_batch=32,
    ),
    "smoke": Config(
        seeds=2, vocab=320, width=16, layers=2, heads=2, length=32, segment=8, batch=2,
        base_steps=4, extra_steps=2, neighbours=4, datastore=100, statistics_batches=2,
        validation_documents=2, test_documents=5, score_batch=2,
    ),
}  # fmt: skip


def train(
    config: Config, data: Data, name: str, loss: Any, start: PyTree, seed: int, steps: int,
    first: int,
) -> PyTree:  # fmt: skip
    """Train from a start on the batches ``first``, ``first + 1``, ... of a seed."""
    warm, last = max(steps // 20, 1), max(steps, 2)  # a decay needs a step after the warm-up
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.rate, warm, last, config.rate / 10)
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    sample = data_of.sampler(data, config.length, config.batch)
    done = train_method(
        f"{name}, seed {seed}",
        plain_gradient(loss),
        outer,
        jax.tree.map(jnp.copy, start),
        fit.from_function(lambda step: Episode((), sample(seed, first + step))),
        config.out / "trained" / f"{page.slug(name)}-{seed}",
        resume=config.resume,
        steps=steps,
        checkpoint_every=max(steps // 4, 1),
        keep=1,
        log_every=max(steps // 20, 1),
    )
    return done.meta


def readers(config: Config, body: Body, vocab: int) -> dict[str, Losses]:
    """How each method reads documents."""
    exact = FastWeights(reference=config.reference)
    near = methods_of.neighbours(body, config.neighbours)
    return {
        STATIC: methods_of.static(body),
        SGD: methods_of.dynamic(body, methods_of.sgd, config.segment),
        RMS: methods_of.dynamic(body, methods_of.rms, config.segment),
        META: methods_of.dynamic(body, methods_of.learned, config.segment),
        BLOCK: methods_of.with_block(body, None),
        FIRST: methods_of.with_block(body, exact._replace(first_order=True)),
        EXACT: methods_of.with_block(body, exact),
        HSO: methods_of.hso(body, config.segment),
        KNN: near,
        SHORT: near,
        NGRAM: methods_of.n_gram(config, vocab)[1],
    }


def learners(config: Config, body: Body, vocab: int) -> dict[str, Any]:
    """For each method that is trained: its training loss, and its start from the shared decoder."""
    reading = readers(config, body, vocab)

    def block(base: PyTree, seed: int) -> PyTree:
        width = body.config.width
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return {
            "body": base,
            "block": fast_weights.init_near_identity(width, key, config.step_size),
        }

    def rates(base: PyTree, seed: int) -> PyTree:
        start = jnp.log(jnp.float32(config.inner_rate)) / methods_of.SPEED
        return {"start": base, "rates": jax.tree.map(lambda _: start, base)}

    begins = {META: rates, BLOCK: block, FIRST: block, EXACT: block}
    same = lambda base, seed: base  # noqa: E731
    losses = {name: methods_of.mean(reading[name]) for name in TRAINED if name != SHORT}
    losses[SHORT] = methods_of.with_short_keys(body, config.key_penalty)
    return {name: (loss, begins.get(name, same)) for name, loss in losses.items()}


def file_of(config: Config, name: str, seed: int) -> Path:
    """Where the losses of a method are kept."""
    return config.out / "scores" / f"{page.slug(name)}-{seed}.npz"


def score_seed(config: Config, data: Data, body: Body, made: dict[str, Losses], seed: int) -> None:
    """Train and score every method of a seed that is not done."""
    learning = learners(config, body, data.vocab)

    @functools.cache
    def base() -> PyTree:
        start = body.init(jax.random.key(seed))
        if config.model != BASE or not config.base_steps:
            return start
        loss = methods_of.mean(methods_of.static(body))
        return train(config, data, BASE, loss, start, seed, config.base_steps, 0)

    @functools.cache
    def trained(name: str) -> PyTree:
        loss, begin = learning[name]
        start = begin(base(), seed)
        return train(config, data, name, loss, start, seed, config.extra_steps, config.base_steps)

    def prepared(name: str) -> tuple[PyTree, dict[str, Any]]:
        if name == SHORT:
            return scoring.tune_knn(body, trained(SHORT), data, config, seed)
        static = trained(STATIC)
        if name in learning:
            return trained(name), page.learned_settings(name, trained(name))
        if name == SGD:
            return scoring.tune_dynamic(made[name], static, data, config, None)
        if name == RMS:
            sizes = scoring.statistics_of(body, static, data, config, seed)
            return scoring.tune_dynamic(made[name], static, data, config, sizes)
        if name == HSO:
            return scoring.tune_hso(made[name], static, data, config)
        if name == KNN:
            return scoring.tune_knn(body, static, data, config, seed)
        init, losses = methods_of.n_gram(config, data.vocab)
        steps = config.base_steps + config.extra_steps
        start = init(jax.random.key(seed))
        return train(config, data, NGRAM, methods_of.mean(losses), start, seed, steps, 0), {}

    for name in config.methods:
        file = file_of(config, name, seed)
        if file.exists():
            continue
        params, settings = prepared(name)
        each = scoring.in_batches(made[name], params, data.test, config.score_batch)
        scoring.keep(file, each, settings)
        loss = scoring.mean_loss(each, data.test)
        print(f"{name}, seed {seed}: {loss:.4f} nats per token {settings}", flush=True)


def time_all(config: Config, data: Data, body: Body, made: dict[str, Losses]) -> None:
    """Measure what reading costs, unless it was measured for these methods."""
    if page.timed(config) == set(config.methods):
        return
    start, learning = body.init(jax.random.key(0)), learners(config, body, data.vocab)
    trained = {name: begin(start, 0) for name, (_, begin) in learning.items() if name != SHORT}
    trained[NGRAM] = methods_of.n_gram(config, data.vocab)[0](jax.random.key(0))
    reading = {
        name: (made[name], scoring.untuned(config, body, name, start, trained.get(name)))
        for name in config.methods
    }
    page.keep_costs(config, scoring.costs(reading, data))


def run(config: Config) -> None:
    """Train, tune, score, time, and write the run directory."""
    record(config, "methods")
    try:
        data = data_of.load(config)
        body = methods_of.make_body(config, data.vocab)
    except (DataUnavailable, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    made = {name: jax.jit(losses) for name, losses in readers(config, body, data.vocab).items()}
    for seed in config.seed_list:
        score_seed(config, data, body, made, seed)
    if distributed.is_writer():
        time_all(config, data, body, made)
        page.write(config, data, functools.partial(file_of, config))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
