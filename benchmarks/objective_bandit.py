"""Samplers of objectives where one objective is useful and the answer is known.

Every window starts from losses of one. Drawing the useful objective lowers all of them; drawing
another lowers none. Whoever always draws the useful one has no regret.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pieces import leave
from jmeta import methods
from jmeta.core.types import Array
from jmeta.methods.objective_sampler import Sampler
from jmeta.runtime import config as configuration
from jmeta.runtime import figures, statistics

UNIFORM = "uniform"
PROBABILITY = "probability of the useful objective, second half"
REGRET = "regret, share of draws"


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Samplers of objectives in a world with one useful objective."""

    objectives: int = 5
    """How many there are; which is useful goes round with the seed."""
    windows: int = 500
    """Windows of a run."""
    window: int = 100
    """Draws of a window."""
    gain: float = 0.1
    """By how much a window of nothing but the useful objective lowers every loss."""
    training_noise: float = 0.01
    """Standard deviation of what else a window does to each loss."""
    measurement_noise: float = 0.02
    """Standard deviation of a measurement on data drawn anew; measured in pairs there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume:
            raise ValueError("resume: this benchmark is one piece and keeps nothing to go on from")


PRESETS = {"full": Config(seeds=20), "smoke": Config(seeds=2, windows=20)}


class Entry(NamedTuple):
    """A sampler and how its losses are measured.

    Attributes:
        sampler: of the objectives.
        paired: whether both measurements of a window are on the same data.
    """

    sampler: Sampler
    paired: bool


def entries(config: Config) -> dict[str, Entry]:
    """All samplers."""
    count, most = config.objectives, config.objectives * config.gain
    average = methods.moving_average(0.1)
    mometas = functools.partial(methods.mometas, count)
    return {
        "uniform": Entry(methods.uniform_mix(count), True),
        "round-robin": Entry(methods.round_robin(count), True),
        "loss-proportional": Entry(methods.loss_proportional(count), True),
        "mometas, as published": Entry(mometas(), False),
        "mometas, paired": Entry(mometas(), True),
        "mometas, baseline": Entry(mometas(baseline=average), False),
        "mometas, paired, baseline": Entry(mometas(baseline=average), True),
        "mometas, paired, baseline, own credit": Entry(
            mometas(baseline=average, credit=methods.own_credit), True
        ),
        "mometas, paired, baseline, entropy 0.1": Entry(
            mometas(baseline=average, entropy=0.1), True
        ),
        "exp3": Entry(methods.exp3(count, low=0.0, high=most), True),
        "ucb": Entry(methods.ucb(count, low=0.0, high=most), True),
    }


def simulate(config: Config, entry: Entry) -> Callable[[Array, Array], tuple[Array, Array]]:
    """``(useful, key) -> (probability of the useful one, its share of draws)``, ``[windows]``."""
    sampler, ones = entry.sampler, jnp.ones(config.objectives)

    def noisy(losses: Array, key: Array) -> Array:
        sigma = 0.0 if entry.paired else config.measurement_noise
        return losses + sigma * jax.random.normal(key, losses.shape)

    def one_window(useful: Array, state: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
        draw_key, train_key, first_key, last_key = jax.random.split(key, 4)
        state = state._replace(losses=noisy(ones, first_key))
        chance = sampler.probabilities(state)[useful]

        def draw(state: Any, key: Array) -> tuple[Any, None]:
            return methods.draw_objective(sampler, state, key)[1], None

        state = jax.lax.scan(draw, state, jax.random.split(draw_key, config.window))[0]
        share = state.counts[useful] / config.window
        change = config.training_noise * jax.random.normal(train_key, ones.shape)
        after = ones - config.gain * share + change
        return sampler.update(state, state.counts, noisy(after, last_key)), (chance, share)

    def run(useful: Array, key: Array) -> tuple[Array, Array]:
        first = sampler.init()
        first = sampler.update(first, first.counts, ones)
        keys = jax.random.split(key, config.windows)
        return jax.lax.scan(functools.partial(one_window, useful), first, keys)[1]

    return run


def rows_of(config: Config) -> tuple[list[dict[str, Any]], dict[str, figures.Curve]]:
    """Result rows, and the probability of the useful objective by window."""
    rows: list[dict[str, Any]] = []
    curves: dict[str, figures.Curve] = {}
    useful = jnp.asarray([seed % config.objectives for seed in config.seed_list])
    keys = jnp.stack([jax.random.key(seed) for seed in config.seed_list])
    for name, entry in entries(config).items():
        chance, share = map(np.asarray, jax.jit(jax.vmap(simulate(config, entry)))(useful, keys))
        half = config.windows // 2
        # The expected share of draws, for what is certain in every window too: over windows.
        values = {
            PROBABILITY: chance[:, half:].mean(1),
            "probability of the useful objective, at the end": chance[:, -1],
            REGRET: 1 - share.mean(1),
            "regret, reward": (1 - share).sum(1) * config.gain * config.objectives,
        }
        for metric, each in values.items():
            rows += [
                {"method": name, "seed": seed, "metric": metric, "value": float(value)}
                for seed, value in zip(config.seed_list, each, strict=True)
            ]
        ci = [statistics.mean_ci(column).half_width or 0.0 for column in chance.T]
        curves[name] = (np.arange(config.windows), chance.mean(0), np.asarray(ci))
    return rows, curves


def said(config: Config, rows: Sequence[dict[str, Any]]) -> list[str]:
    """In how many seeds each sampler that learns is above uniform."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["metric"] == PROBABILITY:
            found.setdefault(row["method"], []).append(row["value"])
    lowest = 1 / config.objectives
    return [
        f"{name}: above {lowest:g} in {sum(v > lowest for v in values)} of {len(values)} seeds "
        f"(lowest {min(values):.3f})"
        for name, values in found.items()
        if name not in ("uniform", "round-robin", "loss-proportional")
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    configuration.dump(config, Path(config.out))
    rows, curves = rows_of(config)
    summary = statistics.summarise(rows, baseline=UNIFORM)
    shown = {name: curve for name, curve in curves.items() if name not in ("round-robin", "ucb")}
    figure = figures.learning_curves(
        Path(config.out) / "probability", shown, xlabel="window",
        ylabel="probability of the useful objective",
    )  # fmt: skip
    caption = "Probability of the useful objective, mean and 95 % interval over seeds."
    leave(
        config, "One useful objective", "Which sampler finds it, and what does finding it cost?",
        rows, summary, notes=said(config, rows), pictures={caption: figure},
    )  # fmt: skip


if __name__ == "__main__":
    main()
