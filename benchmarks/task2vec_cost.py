"""What a Task2Vec embedding costs: by taps, against one gradient per example in a loop, and vmap.

MiniLM's shape with random weights: neither time nor memory depends on their values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.pieces import WholeConfig, leave
from jmeta import cost
from jmeta.core.tree import merge, partition
from jmeta.core.types import Array, PyTree
from jmeta.methods.fisher import fisher, per_example, sampled, tapped
from jmeta.models import bert, taps
from jmeta.runtime import config as configuration
from jmeta.runtime import statistics

TAPS, LOOP, VMAP = "taps", "loop", "vmap"
BARS = {"cpu": 1.3, "gpu": 3.0}
"""How many times faster than the loop taps are to be."""


@dataclasses.dataclass(frozen=True)
class Config(WholeConfig):
    """What the Fisher information of a MiniLM costs."""

    vocab: int = 30_522
    """Tokens of the vocabulary."""
    width: int = 384
    """Width of the network."""
    layers: int = 6
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    classes: int = 10
    """Classes of the head."""
    tokens: int = 128
    """Tokens of an example."""
    examples: int = 512
    """Examples that are embedded in a timed run."""
    batch: int = 4
    """Examples at a time, by taps and by vmap."""
    repeats: int = 3
    """Timed runs of each, interleaved, after one that warms up."""


PRESETS = {
    "minilm": Config(),
    "gpu": Config(batch=64, repeats=5),
    "smoke": Config(vocab=50, width=16, layers=1, heads=2, tokens=8, examples=8, repeats=1),
}


def cells(config: Config) -> dict[str, tuple[Callable[..., PyTree], PyTree, PyTree]]:
    """``{name: (embedding of (fixed, leaves, inputs, key), fixed, leaves)}``."""
    shape = bert.BertConfig(
        config.vocab, config.width, config.layers, config.heads, config.tokens, head="classify",
        labels=config.classes, loop="unroll",
    )  # fmt: skip
    params = bert.init(shape, jax.random.key(0))
    kernels, rest = partition(params, "blocks.*.*.kernel")

    def by_taps(params: PyTree, made: PyTree, batch: PyTree) -> Array:
        return bert.apply(shape, taps.insert(params, made), batch)

    def whole(rest: PyTree, kernels: PyTree, batch: PyTree) -> Array:
        return bert.apply(shape, merge(rest, kernels), batch)

    def embed(scores: Any, squares: Any, batch: int) -> Callable[..., PyTree]:
        def run(fixed: PyTree, leaves: PyTree, inputs: PyTree, key: Array) -> PyTree:
            return fisher(
                scores, fixed, leaves, inputs, key, labels=sampled(), squares=squares,
                batch_size=batch,
            )  # fmt: skip

        return run

    return {
        TAPS: (embed(by_taps, tapped, config.batch), params, taps.taps(params)),
        LOOP: (embed(whole, per_example(), 1), rest, kernels),
        VMAP: (embed(whole, per_example(), config.batch), rest, kernels),
    }


def inputs(config: Config, examples: int) -> dict[str, Array]:
    """Random tokens, without padding."""
    shape = (examples, config.tokens)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab)
    return {"tokens": tokens, "mask": jnp.ones(shape)}


def measure(config: Config) -> list[dict[str, Any]]:
    """Memory at two numbers of examples, then the time of all in turns."""
    every, key = cells(config), jax.random.key(2)
    rows: list[dict[str, Any]] = []

    def add(name: str, metric: str, value: float, **settings: Any) -> None:
        rows.append({"method": name, "seed": 0, "metric": metric, "value": value} | settings)

    programs, arguments = {}, {}
    for name, (run, fixed, leaves) in every.items():
        for examples in (config.examples, 8 * config.examples):
            given = (fixed, leaves, inputs(config, examples), key)
            program = cost.compile_program(run, *given)
            add(name, "temporary MB", program.temp_bytes / 1e6, examples=examples)
            if examples == config.examples:
                programs[name], arguments[name] = program, given
    seconds, _ = cost.interleave(programs, arguments, config.repeats)
    for name, program in programs.items():
        size = {"examples": config.examples}
        rows.append(
            {"method": name, "seed": 0, "metric": "seconds", "values": seconds[name]} | size
        )
        add(name, "median seconds", cost.median(seconds[name]), **size)
        ratios = [a / b for a, b in zip(seconds[name], seconds[TAPS], strict=True)]
        add(name, "seconds x", cost.median(ratios), **size)
        add(name, "flops x", program.flops / programs[TAPS].flops, **size)
    return rows


def bars(rows: Sequence[dict[str, Any]], backend: str) -> list[str]:
    """The bounds that the benchmark is held to, one sentence each."""
    times = {row["method"]: row["value"] for row in rows if row["metric"] == "seconds x"}
    lines = []
    if backend in BARS:
        held = "holds" if times[LOOP] >= BARS[backend] else "MISSED"
        lines.append(
            f"a loop of one gradient per example takes {times[LOOP]:.2f} x the time of taps "
            f"(bar {BARS[backend]} on this backend: {held}); vmap {times[VMAP]:.2f} x"
        )
    for name in times:
        found = [(r["examples"], r["value"]) for r in rows
                 if r["method"] == name and r["metric"] == "temporary MB"]  # fmt: skip
        (few, small), (many, large) = found
        lines.append(f"{name}: {small:.1f} MB for {few} examples, {large:.1f} MB for {many}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    configuration.dump(config, Path(config.out))
    rows = measure(config)
    leave(
        config, "What a Task2Vec embedding costs",
        f"The Fisher information of {config.examples} examples of {config.tokens} tokens, one "
        "label drawn for each, of all kernels of a network of MiniLM's shape.",
        rows, statistics.summarise(rows), notes=bars(rows, jax.default_backend()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
