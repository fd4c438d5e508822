"""What a sampler of objectives costs: a window of training, and what the sampler adds to it.

Both are timed in turns; the share of each pair of runs is what is reported.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.pieces import WholeConfig, leave
from experiments import _continual_model as model
from experiments import _continual_training as training
from experiments._continual_samplers import Entry
from jmeta import cost, methods, optim
from jmeta.core.types import PyTree
from jmeta.models import pretraining
from jmeta.models.bert import BertConfig
from jmeta.runtime import config as configuration
from jmeta.runtime import statistics
from jmeta.tasks import objectives

BAR = 0.02
SHARE = "share of training"


@dataclasses.dataclass(frozen=True)
class Config(WholeConfig):
    """What samplers add to a window of training on five objectives."""

    vocab: int = 2048
    """Size of the vocabulary."""
    width: int = 64
    """Width of the encoder."""
    layers: int = 2
    """Blocks of the encoder."""
    positions: int = 32
    """Tokens of a row."""
    batch: int = 16
    """Rows per step."""
    window: int = 100
    """Steps between two updates of a sampler: the default."""
    window_rows: int = 8
    """Held-out rows that a window's measurement reads."""
    repeats: int = 7
    """Timed pairs, after one that is not."""


PRESETS = {
    "small": Config(),
    "large": Config(vocab=8192, width=256, layers=4, positions=128, batch=32, repeats=3),
    "smoke": Config(vocab=64, width=8, layers=1, positions=8, window=3, repeats=1),
}


def measure(config: Config) -> list[dict[str, Any]]:
    """Rows of seconds and shares."""
    words = objectives.from_ids(0, 1, np.arange(5, config.vocab), config.vocab)
    shape = BertConfig(
        vocab=config.vocab, width=config.width, layers=config.layers,
        heads=max(1, config.width // 32), max_len=config.positions, dropout=0.1,
    )  # fmt: skip
    five = model.objectives_of(shape, words, config.positions)
    params = pretraining.init(shape, jax.random.key(0), model.HEADS)
    loop = training.loop(five, model.adamw(1e-3, 10_000))
    rng = np.random.default_rng(0)

    def rows(*lead: int) -> PyTree:
        tokens = rng.integers(5, config.vocab, (*lead, config.positions)).astype(np.int32)
        return jax.tree.map(jnp.asarray, {"tokens": tokens, "guide": tokens % 5 == 0})

    batches, held_out = rows(config.window, config.batch), rows(config.window_rows)
    drawn = jnp.arange(config.window) % len(five)
    _, keys, own = training.keys_of(0, 0, config.window)
    paired = jax.jit(methods.paired_losses(five, held_out, jax.random.key(0)))
    exact = jax.jit(
        methods.mixture_gradients(
            five, optax.sgd(0.1), held_out, jax.random.key(0), steps=2, batch=config.batch // 4
        )
    )
    entries = {
        "uniform": Entry(methods.uniform_mix(5)),
        "mometas": Entry(methods.mometas(5), paired),
        "exp3": Entry(methods.exp3(5), paired),
        "exact mixture": Entry(methods.learned_mixture(5, optim.adam(0.1)), exact),
    }
    parts = {
        name: sampling(entry, params, batches, keys, own[0]) for name, entry in entries.items()
    }
    carry = loop.init(params)

    def train() -> None:
        jax.block_until_ready(loop.window(carry, batches, drawn, keys))

    results: list[dict[str, Any]] = []
    runs = {"training": train, **parts}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(config.repeats + 1):
        for name in cost.turn(list(runs), repeat):
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    for name, found in seconds.items():
        row = {"method": name, "seed": 0}
        results.append(row | {"metric": "seconds of a window", "values": found[1:]})
        pairs = zip(found[1:], seconds["training"][1:], strict=True)
        share = float(np.median([a / b for a, b in pairs]))
        results.append(row | {"metric": SHARE, "value": share})
    return results


def sampling(
    entry: Entry, params: PyTree, batches: PyTree, keys: Any, own: Any
) -> Callable[[], None]:
    """All that a sampler does in a window: draw for every step, measure, and learn."""
    draw, update = training.draws(entry.sampler), jax.jit(entry.sampler.update)
    chances = jax.jit(entry.sampler.probabilities)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    state = entry.sampler.init()

    def run() -> None:
        drawn, _ = draw(state, keys)
        if entry.measure is not None:
            losses = entry.measure(params, drawn, chances(drawn), first, own)
            drawn = update(drawn, drawn.counts, losses)
        jax.block_until_ready(drawn)

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    configuration.dump(config, Path(config.out))
    rows = measure(config)
    share = next(r["value"] for r in rows if r["metric"] == SHARE and r["method"] == "mometas")
    held = (
        f"MOMETAS adds {100 * share:.2f} % to a window of {config.window} steps (bar "
        f"{100 * BAR:.0f} %: {'holds' if share <= BAR else 'MISSED'})"
    )
    leave(
        config, "What a sampler of objectives costs",
        f"A window of {config.window} steps of {config.batch} x {config.positions} tokens, and "
        f"what each sampler adds; losses are measured on {config.window_rows} rows.",
        rows, statistics.summarise(rows), notes=[held],
    )  # fmt: skip


if __name__ == "__main__":
    main()
