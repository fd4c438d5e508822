"""Continual pre-training on five objectives, under every sampler that draws between them.

Every sampler starts from the same encoder and sees as many tokens; then each result is fine-tuned
on tasks of GLUE and SuperGLUE.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _continual_data as data
from experiments import _continual_model as model
from experiments import _continual_report as page
from experiments import _continual_samplers as samplers
from experiments import _continual_training as training
from experiments._shared import command_line, kept, record, require_positive, train_method
from jmeta import methods
from jmeta.core.types import Array, PyTree
from jmeta.data.sources import DataUnavailable
from jmeta.methods.objective_training import measured
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed
from jmeta.runtime.fit import from_function


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Continual pre-training under every sampler of objectives, at equal budget.

    WikiText-2 and GLUE are read from $JMETA_DATA, GLUE and SuperGLUE also from the hub.
    """

    model: str = "small"
    """small (an encoder trained here from random weights), or a checkpoint of BERT's kind."""
    corpus: str = "wikitext2"
    """Text: embedded (Python's standard library), wikitext2, or a data set with a text column."""
    corpus_config: str = ""
    """Configuration of a data set on the hub."""
    corpus_texts: int = 0
    """At most so many texts; 0: all."""
    held_out_texts: int = 200
    """Texts held out, of a data set that has no such split here."""
    guide: str = "capitals"
    """What guided masking hides: capitals (words with a capital inside a sentence) or rarity."""
    tasks: tuple[str, ...] = ("CoLA", "SST-2", "STS-B", "WiC")
    """Tasks of GLUE and SuperGLUE to fine-tune on; any without spans."""
    samplers: tuple[str, ...] = tuple(samplers.NAMES)
    """Which samplers; uniform, that all are compared to, is one of them."""
    vocab: int = 2048
    """Size of the small encoder's vocabulary."""
    width: int = 64
    """Width of the small encoder."""
    layers: int = 2
    """Blocks of the small encoder."""
    positions: int = 32
    """Tokens of a row of text."""
    tune_positions: int = 40
    """Tokens of an example to fine-tune on."""
    dropout: float = 0.1
    """Dropout; sentence embeddings learn from it."""
    base_steps: int = 1000
    """Steps of MLM before, of the small encoder; the same for all samplers and seeds."""
    base_batch: int = 16
    """Rows per step of it."""
    base_lr: float = 3e-3
    """AdamW's peak rate in it."""
    steps: int = 240
    """Steps of continual pre-training, the same under every sampler."""
    batch: int = 16
    """Rows per step."""
    lr: float = 1e-3
    """AdamW's peak rate."""
    window: int = 6
    """Steps between two updates of a sampler; published: 100, of 50,000 steps."""
    window_rows: int = 8
    """Held-out rows on which all objectives are measured after a window."""
    fresh_rows: int = 128
    """Held-out rows that fresh measurements draw from."""
    measured_rows: int = 128
    """Other held-out rows, on which losses are reported."""
    exact_steps: int = 2
    """Inner steps of the exact meta-gradient."""
    exact_batch: int = 4
    """Rows of each."""
    exact_lr: float = 0.1
    """Rate of each, by gradient descent."""
    tune_steps: int = 80
    """Steps of fine-tuning on a task."""
    tune_batch: int = 16
    """Rows per step."""
    tune_lr: float = 1e-3
    """AdamW's peak rate."""
    rules: tuple[str, ...] = ("DPS-dense",)
    """How else uniform's result is fine-tuned, beside AdamW: DPS-dense, DPS-mix."""
    scored: int = 600
    """Examples scored of a task, fewer where there are not as many; 0: all, and 2000 of SST-2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "window", "steps")
        if self.guide not in data.GUIDES:
            raise ValueError(f"guide={self.guide!r}; choose one of {data.GUIDES}")
        if not self.tasks:
            raise ValueError("there is no task to fine-tune on: tasks is empty")
        unknown = sorted(set(self.samplers) - set(samplers.NAMES))
        if unknown or samplers.UNIFORM not in self.samplers:
            raise ValueError(
                f"samplers={self.samplers}: choose of {samplers.NAMES}, with {samplers.UNIFORM}"
            )
        if self.fresh_rows < self.window_rows or min(self.batch, self.window_rows) < 4:
            raise ValueError(
                "sentence embeddings need batch and window_rows of at least 4, and fresh_rows "
                f"holds window_rows; got {self.batch}, {self.window_rows}, {self.fresh_rows}"
            )


PRESETS = {
    "small": Config(seeds=3),
    "full": Config(
        seeds=5, vocab=8192, width=256, layers=4, positions=128, tune_positions=128,
        base_steps=20_000, base_batch=32, base_lr=1e-3, steps=20_000, batch=32, lr=5e-4,
        window=100, tune_steps=1000, tune_batch=32, tune_lr=3e-4, exact_batch=16, scored=0,
        rules=("DPS-dense", "DPS-mix"),
        tasks=("CoLA", "SST-2", "STS-B", "MRPC", "RTE", "BoolQ", "CB", "WiC"), window_rows=16,
    ),
    "minilm": Config(
        seeds=3, model="minilm", positions=64, tune_positions=64, steps=1000, lr=5e-5,
        tune_steps=300, tune_lr=5e-5, exact_lr=0.01,
    ),
    "smoke": Config(
        corpus="embedded", corpus_texts=6, tasks=("Same_module",), vocab=300, width=8, layers=1,
        positions=16, tune_positions=16, base_steps=2, base_batch=4, steps=6, batch=8, window=2,
        window_rows=4, fresh_rows=8, measured_rows=8, exact_batch=4, tune_steps=2, tune_batch=4,
        scored=16, samplers=("uniform", "mometas, published", "exp3"),
    ),
}  # fmt: skip


class Bench(NamedTuple):
    """What all runs share.

    Attributes:
        start: the encoder that everything starts from.
        data: text and tasks.
        history: of the encoder's own training.
        objectives: what is sampled from.
        entries: the samplers.
        loop: trains under any of them.
        rules: programs that fine-tune, by rule.
        measure: ``(params) -> [objectives]``, losses on held-out rows that no sampler has seen.
    """

    start: model.Start
    data: data.Data
    history: list[dict[str, Any]]
    objectives: list[methods.Objective]
    entries: dict[str, Callable[[], samplers.Entry]]
    loop: training.Loop
    rules: dict[str, model.Tuning]
    measure: Callable[[PyTree], Array]


def prepare(config: Config) -> Bench:
    """Read the data, and train or read the encoder that all samplers share."""
    history: list[dict[str, Any]] = []
    if config.model == "small":
        found = data.load(config, None)
        start, history = trained_start(config, found)
    else:
        start = model.pretrained(config.model, config.dropout)
        if (longest := max(config.positions, config.tune_positions)) > start.config.max_len:
            raise ValueError(
                f"{config.model} has {start.config.max_len} positions; {longest} are asked for"
            )
        found = data.load(config, start.words)
    objectives = model.five(start, config.positions)
    rows = data.held_out(
        found.held_out, config.fresh_rows, config.fresh_rows + config.measured_rows
    )
    rows = jax.tree.map(jnp.asarray, rows)
    rules = model.rules(config)
    return Bench(
        start, found, history, objectives,
        samplers.entries(config, objectives, found.held_out),
        training.loop(objectives, model.adamw(config.lr, config.steps)),
        {name: model.tuning(config, start, found.tasks, rule) for name, rule in rules.items()},
        jax.jit(lambda params: measured(objectives, params, rows, jax.random.key(1))),
    )  # fmt: skip


def trained_start(config: Config, found: data.Data) -> tuple[model.Start, list[dict[str, Any]]]:
    """A small encoder after MLM, and its training's history."""
    start = model.small(config, found.words)
    mlm = model.five(start, config.positions)[:1]
    rows = data.held_out(found.held_out, 0, min(64, config.fresh_rows))
    rows = jax.tree.map(jnp.asarray, rows)
    loss = jax.jit(lambda params: measured(mlm, params, rows, jax.random.key(0))[0])
    done = train_method(
        "the encoder", methods.sampled_training(mlm, methods.uniform_mix(1)),
        model.adamw(config.base_lr, config.base_steps), start.params,
        from_function(data.base_batches(config, found)), config.out / "base",
        resume=config.resume, steps=config.base_steps, key=0, keep=1, checkpoint_every=500,
        log_every=max(1, config.base_steps // 20), evaluate=lambda params: {"mlm": loss(params)},
        evaluate_every=max(1, config.base_steps // 10),
    )  # fmt: skip
    return start._replace(params=done.meta), done.history


def scores(config: Config, bench: Bench, rule: str, params: PyTree, seed: int) -> dict[str, float]:
    """Scores by task after fine-tuning on each."""
    return {
        name: model.fine_tuned(config, bench.rules[rule], params, found, seed)
        for name, found in bench.data.tasks.items()
    }


def run_one(config: Config, bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """A sampler and a seed: trained, measured, fine-tuned; read where it is done already."""
    folder = config.out / "runs" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    file = folder / "scored.json"
    if (done := kept(config, file)) is not None:
        return done
    params: PyTree = bench.start.params
    found: dict[str, Any] = {"name": name, "seed": seed}
    if name != page.NONE:
        print(f"{name}, seed {seed}: {config.steps} steps", file=sys.stderr, flush=True)
        done = training.train(
            bench.loop, bench.entries[name](), params,
            data.continual_batches(config, bench.data, seed), seed,
            steps=config.steps, window=config.window,
        )  # fmt: skip
        params = done.params
        found |= {
            "probabilities": done.probabilities.round(5).tolist(), "drawn": done.drawn.tolist(),
            "seconds": done.seconds,
        }  # fmt: skip
    losses = np.asarray(bench.measure(params)).tolist()
    found["losses"] = dict(zip(model.NAMES, losses, strict=True))
    wanted = bench.rules if name == samplers.UNIFORM else [model.ADAMW]
    found["scores"] = {rule: scores(config, bench, rule, params, seed) for rule in wanted}
    distributed.write(file, json.dumps(found) + "\n")
    return found


def run(config: Config) -> None:
    """Train, fine-tune, score, and write the run directory."""
    record(config, "seeds", "first_seed", "samplers")
    try:
        bench = prepare(config)
    except (DataUnavailable, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    found = [
        run_one(config, bench, name, seed)
        for name in (page.NONE, *config.samplers)
        for seed in config.seed_list
    ]
    if distributed.is_writer():
        tasks = bench.data.tasks.items()
        page.write(
            config, found, {name: data.score(task, task.trivial) for name, task in tasks},
            bench.history,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
