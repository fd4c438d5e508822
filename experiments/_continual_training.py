"""Training on sampled objectives in windows: one program for all samplers, theirs beside it.

The numbers are those of ``methods.sampled_training``, which is one program for each sampler: here
its pieces are compiled apart, as there are many samplers and short runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._continual_samplers import Entry
from jmeta import methods
from jmeta.core.types import Array, Episode, PyTree
from jmeta.methods import Objective, SamplerState


class Loop(NamedTuple):
    """What all samplers share.

    Attributes:
        init: ``(params) -> carry``.
        window: ``(carry, rows [steps, ...], drawn [steps], keys [steps]) -> (carry, losses)``.
    """

    init: Callable[[PyTree], Any]
    window: Callable[..., tuple[Any, Array]]


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
        params: of the network.
        probabilities: ``[windows, 1 + objectives]``, the first step of each window and what it
            drew from.
        drawn: ``[objectives]``, steps on each.
        seconds: CPU seconds of training and of the sampler, after the first two windows, which
            hold the compilation.
    """

    params: PyTree
    probabilities: np.ndarray
    drawn: np.ndarray
    seconds: tuple[float, float]


def loop(objectives: Sequence[Objective], optimizer: optax.GradientTransformation) -> Loop:
    """The training loop of all samplers."""

    def init(params: PyTree) -> Any:
        return params, optimizer.init(params)

    @jax.jit
    def window(carry: Any, rows: PyTree, drawn: Array, keys: Array) -> tuple[Any, Array]:
        def step(carry: Any, batch: Any) -> tuple[Any, Array]:
            (params, state), (rows, index, key) = carry, batch
            loss, grads = jax.value_and_grad(
                lambda p: methods.one_of(objectives, p, rows, index, key)
            )(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, carry, (rows, drawn, keys))

    return Loop(init, window)


def draws(sampler: methods.Sampler) -> Callable[..., Any]:
    """``(state, keys) -> (state, drawn, probabilities)`` of a window."""

    def step(state: SamplerState, key: Array) -> tuple[SamplerState, tuple[Array, Array]]:
        shares = sampler.probabilities(state)
        index, state = methods.draw_objective(sampler, state, key)
        return state, (index, shares)

    return jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))


def keys_of(seed: int, first: int, steps: int) -> tuple[Array, Array, Array]:
    """Keys to draw, to train and to measure with, ``[steps]`` each: those of ``meta_trainer``."""
    numbers = jnp.arange(first, first + steps)
    each = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(jax.random.key(seed), n), 3))(
        numbers
    )
    return each[:, 0], each[:, 1], each[:, 2]


def train(
    shared: Loop,
    entry: Entry,
    params: PyTree,
    batch: Callable[[int], Episode],
    seed: int,
    *,
    steps: int,
    window: int,
) -> Trained:
    """Train under a sampler.

    Args:
        shared: the loop.
        entry: the sampler.
        params: where the network starts.
        batch: ``step -> Episode(None, rows)``.
        seed: of draws, corruption and dropout.
        steps: of training.
        window: steps between two updates of the sampler.

    Returns:
        A ``Trained``.
    """
    draw, update = draws(entry.sampler), jax.jit(entry.sampler.update)
    chances = jax.jit(entry.sampler.probabilities)
    carry, state = shared.init(params), entry.sampler.init()
    kept, drawn, seconds = [], np.zeros(entry.sampler.objectives), [0.0, 0.0]
    for first in range(0, steps, window):
        count = min(window, steps - first)
        rows = [batch(step).query for step in range(first, first + count)]
        stacked = jax.tree.map(lambda *leaf: np.stack(leaf), *rows)
        draw_keys, train_keys, measure_keys = keys_of(seed, first, count)
        begin = time.process_time()
        if entry.measure is not None:
            losses = entry.measure(carry[0], state, chances(state), rows[0], measure_keys[0])
            state = update(state, state.counts, losses)
        state, (index, shares) = jax.block_until_ready(draw(state, draw_keys))
        between = time.process_time()
        carry, _ = jax.block_until_ready(shared.window(carry, stacked, index, train_keys))
        # A last window that is shorter is compiled anew.
        if first >= 2 * window and count == window:
            seconds[0] += time.process_time() - between
            seconds[1] += between - begin
        kept.append([first + 1, *np.asarray(shares[0]).tolist()])
        drawn += np.bincount(np.asarray(index), minlength=len(drawn))
    return Trained(carry[0], np.asarray(kept), drawn, (seconds[0], seconds[1]))
