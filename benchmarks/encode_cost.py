"""What it saves to run once per episode what does not adapt, and to attend there by one kernel.

ANIL on a decoder: a head adapts, the body is meta-learned. The body inside every inner step,
in ``encode``, and in ``encode`` with fused attention, interleaved on the same arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.pieces import WholeConfig, keep_float32, leave
from jmeta import cost, methods
from jmeta.core.types import Array, Episode, MetaGradient, PyTree
from jmeta.models import heads, losses, transformer
from jmeta.runtime import config as configuration
from jmeta.runtime import figures, statistics

INSIDE, ENCODED, FUSED = "body in every step", "body in encode", "body in encode, fused attention"


@dataclasses.dataclass(frozen=True)
class Config(WholeConfig):
    """What ``encode`` saves."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the body is computed in."""
    width: int = 256
    """Width of the body."""
    layers: int = 4
    """Its blocks."""
    heads: int = 4
    """Its attention heads."""
    vocab: int = 4096
    """Its vocabulary."""
    examples: int = 8
    """Texts of support and of query."""
    tokens: int = 128
    """Tokens of a text."""
    classes: int = 4
    """Classes of a task."""
    steps: int = 5
    """Inner steps."""
    repeats: int = 5
    """Timed runs of each, interleaved, after one that warms up."""


PRESETS = {
    "cpu": Config(),
    # GPT-2's smallest body on texts of its full length.
    "gpu": Config(dtype="bfloat16", width=768, layers=12, heads=12, vocab=50_257, tokens=1024,
                  repeats=10),
    "smoke": Config(width=16, layers=1, heads=2, vocab=32, tokens=8, repeats=1),
}  # fmt: skip


class Made(NamedTuple):
    """What is compared: estimators of the same gradient, of the same arrays."""

    ways: dict[str, MetaGradient]
    meta: PyTree
    episode: Episode


def make(config: Config) -> Made:
    """The three ways, a body with random weights and an episode of random tokens."""
    shape = transformer.TransformerConfig(
        config.vocab, config.width, config.layers, config.heads, config.tokens,
        dtype=None if config.dtype == "float32" else jnp.dtype(config.dtype),
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 4)

    def pooled(attention: Literal["xla", "fused"]) -> Callable[..., Any]:
        def features(params: PyTree, batch: PyTree, key: Any) -> PyTree:
            given = shape._replace(attention=attention)
            states = transformer.hidden(given, params["body"], batch["x"])
            states = states.astype(params["head"].dtype)
            mean = heads.mean_pool(states, jnp.ones(batch["x"].shape))
            return {"x": mean, "y": batch["y"]}

        return features

    def loss(params: PyTree, batch: PyTree, key: Any) -> tuple[Array, PyTree]:
        return losses.cross_entropy(batch["x"] @ params["head"], batch["y"]), {}

    def inside(params: PyTree, batch: PyTree, key: Any) -> tuple[Array, PyTree]:
        return loss(params, pooled("xla")(params, batch, key), key)

    def batch(key: Array) -> dict[str, Array]:
        return {
            "x": jax.random.randint(key, (config.examples, config.tokens), 0, config.vocab),
            "y": jnp.arange(config.examples) % config.classes,
        }

    given: dict[str, Any] = {"steps": config.steps, "optimizer": optax.sgd(0.1), "adapt": "head"}
    ways = {
        INSIDE: methods.anil(inside, **given),
        ENCODED: methods.anil(loss, features=pooled("xla"), **given),
        FUSED: methods.anil(loss, features=pooled("fused"), **given),
    }
    head = 0.1 * jax.random.normal(keys[0], (config.width, config.classes))
    meta = {"body": transformer.init(shape, keys[1]), "head": head}
    return Made(ways, meta, Episode(batch(keys[2]), batch(keys[3])))


def measure(config: Config) -> list[dict[str, Any]]:
    """Compile the three, compare their gradients, run them in turns."""
    keep_float32(config.dtype)
    made = make(config)
    programs = {
        name: cost.compile_estimate(mg, made.meta, made.episode) for name, mg in made.ways.items()
    }
    exact = make(dataclasses.replace(config, dtype="float32"))
    with jax.default_matmul_precision("highest"):
        first = cost.compile_estimate(exact.ways[ENCODED], exact.meta, exact.episode)
    reference = jax.device_get(first.run(exact.meta, exact.episode))
    arguments = dict.fromkeys(programs, (made.meta, made.episode))
    seconds, errors = cost.interleave(programs, arguments, config.repeats, reference)
    rows: list[dict[str, Any]] = []
    for name, program in programs.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds[ENCODED], strict=True)]
        found = {
            "median seconds": cost.median(seconds[name]),
            "seconds x": cost.median(ratios),
            "temporary MB": program.temp_bytes / 1e6,
            "difference to float32": errors[name],
        }
        rows += [
            {"method": name, "seed": 0, "metric": metric, "value": value}
            for metric, value in found.items()
        ]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    configuration.dump(config, Path(config.out))
    rows = measure(config)
    picture = figures.cost_figure(
        Path(config.out) / "cost",
        [row for row in rows if row["metric"] in ("median seconds", "temporary MB")],
        metrics={"median seconds": "time", "temporary MB": "temporary memory"},
        title=f"ANIL, {config.steps} inner steps, {config.tokens} tokens, {config.dtype}",
        reference=ENCODED,
    )
    leave(
        config, "What encode saves", "The same gradient in three ways.", rows,
        statistics.summarise(rows), pictures={"Time and memory": picture},
    )  # fmt: skip


if __name__ == "__main__":
    main()
