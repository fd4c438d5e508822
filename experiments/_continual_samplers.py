"""The samplers that continual pre-training compares, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import _continual_data as data
from jmeta import methods, optim
from jmeta.methods import Objective, Sampler

UNIFORM = "uniform"
RULES = (
    UNIFORM, "mlm alone", "fixed mix, half mlm", "round-robin", "annealed from mlm",
    "loss-proportional",
)  # fmt: skip
LEARNED = ("exp3", "ucb", "mometas, published", "mometas, improved", "exact mixture")
NAMES = RULES + LEARNED


class Entry(NamedTuple):
    """A sampler and what is measured for it.

    Attributes:
        sampler: decides.
        measure: of ``sampled_training``, or None.
    """

    sampler: Sampler
    measure: Any = None


def entries(
    config: Any, objectives: Sequence[Objective], rows: data.Rows
) -> dict[str, Callable[[], Entry]]:
    """All samplers; a function each, so that only what is used is made.

    Args:
        config: of the run.
        objectives: what is sampled from; the first is MLM.
        rows: held-out rows.
    """
    count = len(objectives)
    # Which rows measure is the same for all seeds; the losses reported are of others.
    every = jax.tree.map(jnp.asarray, data.held_out(rows, 0, config.fresh_rows))
    few = jax.tree.map(lambda leaf: leaf[: config.window_rows], every)
    # Compiled once, and shared by all samplers that measure alike.
    paired = jax.jit(methods.paired_losses(objectives, few, jax.random.key(0)))
    fresh = jax.jit(methods.fresh_losses(objectives, every, config.window_rows))
    half = [count - 1.0] + [1.0] * (count - 1)  # MLM every second time
    low, high = -0.1, 0.2  # what a window's rewards add up to

    def learned() -> Entry:
        gradients = methods.mixture_gradients(
            objectives, optax.sgd(config.exact_lr), few, jax.random.key(0),
            steps=config.exact_steps, batch=config.exact_batch,
        )  # fmt: skip
        return Entry(methods.learned_mixture(count, optim.adam(0.1)), jax.jit(gradients))

    return {
        UNIFORM: lambda: Entry(methods.uniform_mix(count)),
        "mlm alone": lambda: Entry(methods.fixed_mix([1.0] + [0.0] * (count - 1))),
        "fixed mix, half mlm": lambda: Entry(methods.fixed_mix(half)),
        "round-robin": lambda: Entry(methods.round_robin(count)),
        "annealed from mlm": lambda: Entry(
            methods.annealed_mix([1.0] + [0.0] * (count - 1), [1.0] * count, config.steps)
        ),
        "loss-proportional": lambda: Entry(methods.loss_proportional(count), paired),
        "exp3": lambda: Entry(methods.exp3(count, explore=0.3, low=low, high=high), paired),
        "ucb": lambda: Entry(methods.ucb(count, width=0.2, low=low, high=high), paired),
        "mometas, published": lambda: Entry(methods.mometas(count), fresh),
        "mometas, improved": lambda: Entry(
            methods.mometas(
                count, rate=1.0, entropy=0.02, baseline=methods.moving_average(0.3), least=0.02
            ),
            paired,
        ),
        "exact mixture": learned,
    }
