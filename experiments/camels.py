"""CaMeLS: the tokens of a document that a model should learn from, to answer questions afterwards.

A small decoder reads a stream of documents by gradient descent, one step each, and is then asked
about them. Weights on tokens are learned, uniform, or given by a rule.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
import numpy as np
import optax

import jmeta
from experiments import _camels_data as reading
from experiments import _camels_report as page
from experiments._camels_model import LEARNED, NONE, UNIFORM, first_weights, model_of, problem_at
from experiments._camels_report import Seed
from experiments._camels_scoring import (
    LOSS,
    MOVED,
    Read,
    alignment,
    make_read,
    score,
    weights_by_kind,
)
from experiments._shared import Trained, command_line, least, record, require_positive, train_method
from jmeta.core.types import Array, Key, MetaGradient, PyTree
from jmeta.data.sources import DataUnavailable
from jmeta.methods import plain_gradient
from jmeta.models import transformer
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, fit


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Learned weights on tokens against uniform ones and rules, on a stream of documents."""

    source: str = "facts"
    """facts (made-up lives, needs no data), or questions: squad ($JMETA_DATA/qa)."""
    documents: tuple[int, ...] = (800, 800, 120, 240)
    """Documents that the base model is trained on, that weights are learned on, for the choices,
    and to test on."""
    vocab: int = 512
    """Size of the byte-level BPE, trained on the base's documents."""
    length: int = 80
    """Tokens of a document: a window that holds the answer, anywhere in it."""
    question_length: int = 32
    """Tokens of a question with its answer."""
    longest_answer: int = 10
    """Tokens of an answer, the separator included; longer ones lose their end."""
    width: int = 48
    """Width of the decoder; the model of the weights is a copy of it with a head."""
    layers: int = 2
    """Layers of the decoder."""
    base_steps: int = 600
    """Steps of the base model's training on documents and questions."""
    base_batch: int = 16
    """Rows in each of them."""
    base_lr: float = 2e-3
    """AdamW's rate there, at the start of a cosine decay."""
    stream: int = 6
    """Documents that are read in turn before the questions about them."""
    locality_documents: int = 2
    """Documents of the base's training whose predictions should stay."""
    locality: float = 0.1
    """Weight of the divergence there."""
    inner_lr: float = 0.1
    """Rate of the inner SGD while weights are learned."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.06, 0.1, 0.14, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0)
    """Rates at test to choose from, for every method by itself, on validation documents."""
    meta_steps: int = 200
    """Meta-steps."""
    meta_lr: float = 1e-3
    """Adam's rate of the weights' model, at the start of a cosine decay."""
    drop: float = 0.5
    """Share of a document's tokens, those of the least TF-IDF, that the rule with a threshold
    does not weigh."""
    evaluate_every: int = 100
    """Meta-steps between looks at validation documents; the best is kept."""
    validation_streams: int = 20
    """Streams for the choices."""
    test_streams: int = 40
    """Streams of the final numbers, the same for all methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rates")
        if len(self.documents) != 4 or min(self.documents) < self.stream:
            raise ValueError(
                f"documents={self.documents}: four numbers, each at least stream={self.stream}"
            )
        if not 1 < self.longest_answer < self.question_length:
            raise ValueError(
                f"longest_answer={self.longest_answer} leaves no room for a question of "
                f"question_length={self.question_length}"
            )


PRESETS = {
    "demo": Config(seeds=3),
    "squad": Config(
        seeds=3, source="squad", documents=(1800, 1600, 120, 360), vocab=1024, length=96,
        question_length=48, longest_answer=12, base_steps=2000, meta_steps=400,
        evaluate_every=80, test_streams=60,
    ),
    "smoke": Config(
        seeds=2, documents=(60, 40, 16, 16), vocab=320, length=32, question_length=32, width=16,
        layers=1, base_steps=20, base_batch=4, stream=2, meta_steps=8, evaluate_every=4,
        rates=(0.1, 0.5), validation_streams=3, test_streams=4,
    ),
}  # fmt: skip


def train_base(config: Config, data: reading.Data) -> Trained:
    """A language model of documents and of questions with their answers, the same for all seeds."""
    seed = config.first_seed
    model = model_of(config)

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return transformer.next_token_loss(model, params, batch["tokens"], batch["mask"])

    schedule = optax.cosine_decay_schedule(config.base_lr, config.base_steps)
    return train_method(
        "base", plain_gradient(loss), optax.adamw(schedule, weight_decay=0.01),
        transformer.init(model, jax.random.key(seed)),
        fit.from_function(reading.base_batches(config, data.parts["base"], seed)),
        config.out / "base",
        resume=config.resume, steps=config.base_steps, keep=1,
        checkpoint_every=max(1, config.base_steps // 4), log_every=max(1, config.base_steps // 10),
    )  # fmt: skip


def run_seed(
    config: Config, data: reading.Data, readers: dict[str, Read], base: PyTree, seed: int
) -> Seed:
    """Learn weights, choose rates, and score all methods."""
    runs: dict[str, Trained] = {}

    def validation(kind: str, meta: PyTree, rate: float) -> float:
        count = config.validation_streams
        found = score(
            config, data, readers[kind], kind, meta, base, rate, "validation", count, seed
        )
        return float(np.mean(found[LOSS]) + config.locality * np.mean(found[MOVED]))

    mg: MetaGradient = jmeta.mixed_mode(
        problem_at(config, base, LEARNED, config.inner_lr), config.stream
    )
    schedule = optax.cosine_decay_schedule(config.meta_lr, config.meta_steps)
    runs[LEARNED] = train_method(
        f"{LEARNED}, seed {seed}", mg, optax.chain(optax.clip_by_global_norm(1.0),
                                                   optax.adam(schedule)),
        first_weights(config, base, seed),
        fit.from_function(reading.meta_batches(config, data, seed)),
        config.out / f"{LEARNED}-{seed}",
        resume=config.resume, steps=config.meta_steps, keep=1, best="min:loss",
        evaluate=lambda meta: {"loss": validation(LEARNED, meta, config.inner_lr)},
        evaluate_every=config.evaluate_every, checkpoint_every=config.evaluate_every,
        log_every=config.evaluate_every,
    )  # fmt: skip
    kept = config.out / f"scored-{seed}.json"
    if config.resume and kept.exists():  # a seed that is complete is only read
        scores, rates, by_kind, slopes = json.loads(kept.read_text(encoding="utf-8"))
        return Seed(seed, scores, rates, by_kind, slopes, runs)
    scores, rates = {}, {}
    for kind, read in readers.items():
        meta = runs[LEARNED].meta if kind == LEARNED else ()
        tried = (0.0,) if kind == NONE else config.rates
        losses = [validation(kind, meta, rate) for rate in tried]
        rates[kind] = float(least(tried, losses))
        scores[kind] = score(
            config, data, read, kind, meta, base, rates[kind], "test", config.test_streams, seed
        )
    by_kind = weights_by_kind(config, data, runs[LEARNED].meta)
    found = (scores, rates, by_kind, alignment(config, data, base, seed))
    distributed.write(kept, json.dumps(found))
    return Seed(seed, *found, runs)


def run(config: Config) -> None:
    """Train, score, and write the run directory."""
    record(config, "seeds")  # more of them may come later
    try:
        data = reading.load(config)
    except (DataUnavailable, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    by_rule = make_read(config, reading.RULES[0])  # one program for all rules
    readers = {kind: make_read(config, kind) for kind in (NONE, UNIFORM, LEARNED)}
    readers |= dict.fromkeys(reading.RULES, by_rule)
    base = train_base(config, data)
    seeds = [run_seed(config, data, readers, base.meta, seed) for seed in config.seed_list]
    if distributed.is_writer():
        page.write(config, base, seeds)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
