"""TSSA: a code model takes a few steps on the file at hand before it fills a hole in it.

Against dynamic evaluation, attention over the same tokens, and no adaptation, on the sources of the
Python standard library.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from experiments import _code_adaptation_report as page
from experiments._code_adaptation_methods import (
    EXACT,
    FIRST,
    JOINT,
    MAIN,
    NONE,
    SUPPORTS,
    TUNED,
    Values,
    estimators,
    holes,
    make_loss,
    model_of,
    readers,
)
from experiments._code_adaptation_report import Seed
from experiments._shared import Trained, command_line, least, record, require_positive, train_method
from jmeta import methods
from jmeta.core.types import Episode, PyTree
from jmeta.models import transformer
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, fit
from jmeta.tasks import corpora, files
from jmeta.tasks.bpe import SEP

# Seeds of the holes; training takes the run's own, which are small.
VALIDATION, TEST = 10**6, 10**6 + 1


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Holes in files of the standard library, and what adapting to the file is worth."""

    vocab: int = 512
    """Size of the byte-level BPE."""
    window: int = 32
    """Tokens of a support window, and of a hole with its context."""
    support: int = 3
    """Support windows, one inner step on each."""
    hole: int = 8
    """Tokens of a hole; each is predicted given the ones before it."""
    before: int = 8
    """Windows before a hole's own that dynamic evaluation may read, at most."""
    width: int = 32
    """Width of the decoder."""
    layers: int = 2
    """Layers of the decoder."""
    base_steps: int = 800
    """Steps of the base model's training, on rows as long as support and context together."""
    base_batch: int = 8
    """Rows in each of them."""
    base_lr: float = 2e-3
    """AdamW's rate there, at the start of a cosine decay."""
    meta_steps: int = 80
    """Meta-steps of each method that is meta-trained, from the base."""
    meta_batch: int = 8
    """Holes in each of them."""
    meta_lr: float = 3e-4
    """Adam's rate there, at the start of a cosine decay."""
    inner_lr: float = 0.05
    """Rate of the inner SGD in meta-training."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Rates at test to choose from, for every method by itself, on validation files."""
    decay: float = 0.0
    """How far dynamic evaluation goes back to its start at every step."""
    evaluate_every: int = 40
    """Meta-steps between looks at validation holes; the best is kept."""
    validation_holes: int = 64
    """Holes for the choices."""
    test_holes: int = 300
    """Holes of the final numbers, the same for all methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "support", "hole", "before", "base_batch", "meta_batch", "inner_lr", "rates",
            "evaluate_every", "validation_holes", "test_holes",
        )  # fmt: skip
        if not self.hole < self.window:
            raise ValueError(
                f"hole={self.hole} leaves no context in a window of window={self.window}"
            )
        if self.before < self.support:
            raise ValueError(
                f"before={self.before} windows before a hole are fewer than the "
                f"support={self.support} to adapt to: choose at least as many"
            )


PRESETS = {
    "demo": Config(seeds=3),
    "full": Config(
        seeds=5, vocab=1024, window=64, width=128, layers=4, base_steps=8000, meta_steps=600,
        evaluate_every=60, test_holes=1000,
    ),
    "smoke": Config(
        seeds=2, vocab=320, window=16, support=2, hole=2, before=3, width=16, layers=1,
        base_steps=10, base_batch=2, meta_steps=4, meta_batch=2, evaluate_every=2,
        rates=(0.1, 0.3), validation_holes=4, test_holes=6,
    ),
}  # fmt: skip


def load(config: Config) -> dict[str, files.Files]:
    """The files of each split; no file is in two of them, and rarity is that of training."""
    found: dict[str, files.Files] = {}
    for split, stream in corpora.stdlib_text(vocab=config.vocab).items():
        texts = [text for text in np.split(stream, np.flatnonzero(stream == SEP) + 1) if len(text)]
        rarity = found["train"].rarity if found else None
        found[split] = files.files(texts, config.vocab, rarity)
    return found


def train_base(config: Config, source: files.Files) -> Trained:
    """A language model of rows of code, the same for all seeds."""
    seed = config.first_seed
    length = model_of(config).max_len

    def batch(step: int) -> Episode:
        rng = np.random.default_rng([seed, 3, step])
        starts = rng.integers(0, len(source.tokens) - length, config.base_batch)
        rows = source.tokens[starts[:, None] + np.arange(length)]
        return Episode(None, {"tokens": rows, "weights": np.ones(rows.shape, np.float32)})

    mg = methods.plain_gradient(make_loss(config))
    schedule = optax.cosine_decay_schedule(config.base_lr, config.base_steps)
    return train_method(
        "base", mg, optax.adamw(schedule, weight_decay=0.01),
        transformer.init(model_of(config), jax.random.key(seed)), fit.from_function(batch),
        config.out / "base",
        resume=config.resume, steps=config.base_steps, keep=1,
        checkpoint_every=max(1, config.base_steps // 4), log_every=max(1, config.base_steps // 10),
    )  # fmt: skip


def run_seed(
    config: Config,
    sources: dict[str, files.Files],
    ways: dict[str, Values],
    base: PyTree,
    seed: int,
) -> Seed:
    """Meta-train from the base, choose rates, and score everything."""
    runs: dict[str, Trained] = {}
    draw = holes(config, sources["validation"], MAIN, config.validation_holes, True)
    validation = draw(VALIDATION, 0)
    test = {
        kind: holes(config, sources["test"], kind, config.test_holes, True)(TEST, seed)
        for kind in SUPPORTS
    }
    sample = holes(config, sources["train"], MAIN, config.meta_batch, False)
    schedule = optax.cosine_decay_schedule(config.meta_lr, config.meta_steps)
    for name, mg in estimators(config).items():
        way = ways[NONE if name == JOINT else TUNED]

        def look(meta: PyTree, way: Values = way) -> dict[str, float]:
            return {"loss": float(way(meta, jnp.float32(config.inner_lr), validation).mean())}

        runs[name] = train_method(
            f"{name}, seed {seed}", jmeta.over_tasks(mg), optax.adam(schedule), base,
            fit.from_function(lambda step: sample(seed, step)),
            config.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
            resume=config.resume, steps=config.meta_steps, keep=1, best="min:loss",
            evaluate=look, evaluate_every=config.evaluate_every,
            checkpoint_every=config.evaluate_every, log_every=config.evaluate_every,
        )  # fmt: skip
    kept = config.out / f"scored-{seed}.json"
    if config.resume and kept.exists():  # a seed that is complete is only read
        scores, rates = json.loads(kept.read_text(encoding="utf-8"))
        return Seed(seed, scores, rates, runs)
    compared = {name: (base, way) for name, way in ways.items()}
    compared[JOINT] = (runs[JOINT].meta, ways[NONE])
    for name in (EXACT, FIRST):
        compared[name] = (runs[name].meta, ways[TUNED])
        compared[f"{name}, before its steps"] = (runs[name].meta, ways[NONE])
    scores, rates = {}, {}
    for name, (params, way) in compared.items():
        if way is ways[TUNED] or name.startswith("dynamic"):
            tried = [
                float(np.asarray(way(params, jnp.float32(rate), validation)).mean())
                for rate in config.rates
            ]
            rates[name] = float(least(config.rates, tried))
        rate = jnp.float32(rates.get(name, 0.0))
        reads_support = way is ways[TUNED] or name == "attention to the support"
        for kind in SUPPORTS if reads_support else (MAIN,):
            losses = np.asarray(way(params, rate, test[kind]), float)
            scores.setdefault(name, {})[kind if reads_support else ""] = losses.tolist()
    distributed.write(kept, json.dumps((scores, rates)))
    return Seed(seed, scores, rates, runs)


def run(config: Config) -> None:
    """Train, score, and write the run directory."""
    record(config, "seeds")  # more of them may come later
    sources, ways = load(config), readers(config)
    base = train_base(config, sources["train"])
    seeds = [run_seed(config, sources, ways, base.meta, seed) for seed in config.seed_list]
    if distributed.is_writer():
        page.write(config, base, seeds)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
