"""Training on one of several objectives at a time, as a sampler draws them, and measuring them all.

An objective is a name and two functions: anybody's own is as good as those that come along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.tree import global_norm
from jmeta.core.types import Array, Episode, Info, Key, MetaGradient, PyTree
from jmeta.methods.objective_sampler import Sampler, SamplerState, draw_objective

Measure: TypeAlias = Callable[[PyTree, SamplerState, Array, PyTree, Array], Array]


class Objective(NamedTuple):
    """What can be trained on.

    Attributes:
        name: in tables and logs.
        corrupt: ``(rows, key) -> batch``.
        loss: ``(params, batch, key) -> (loss, aux)``; without a key it is deterministic.
    """

    name: str
    corrupt: Callable[[PyTree, Array], PyTree]
    loss: Callable[[PyTree, PyTree, Key], tuple[Array, Any]]


def objective_loss(
    objective: Objective, params: PyTree, rows: PyTree, key: Array, *, train: bool
) -> Array:
    """The loss of one objective on rows, corrupted by a key, which drives dropout in training.

    Args:
        objective: which.
        params: of the network.
        rows: what it corrupts.
        key: a random key.
        train: whether the loss gets a key.

    Returns:
        A scalar.

    Example:
        >>> square = Objective("x", lambda rows, key: rows, lambda p, b, key: ((p - b) ** 2, {}))
        >>> float(objective_loss(square, 3.0, 1.0, jax.random.key(0), train=True))
        4.0
    """
    corruption, dropout = jax.random.split(key)
    batch = objective.corrupt(rows, corruption)
    return objective.loss(params, batch, dropout if train else None)[0]


def one_of(
    objectives: Sequence[Objective], params: PyTree, rows: PyTree, index: Array, key: Array
) -> Array:
    """The training loss of the objective of a number: only that one is computed.

    Args:
        objectives: all.
        params: of the network.
        rows: what is corrupted.
        index: int scalar.
        key: a random key.

    Returns:
        A scalar.

    Example:
        >>> loss = lambda scale: lambda p, b, key: (scale * (p - b) ** 2, {})
        >>> both = [Objective(str(s), lambda rows, key: rows, loss(s)) for s in (1.0, 10.0)]
        >>> float(one_of(both, 3.0, 1.0, jnp.int32(1), jax.random.key(0)))
        40.0
    """
    branches = [
        lambda params, rows, key, each=each: jnp.asarray(
            objective_loss(each, params, rows, key, train=True)
        )
        for each in objectives
    ]
    return jax.lax.switch(index, branches, params, rows, key)


def measured(objectives: Sequence[Objective], params: PyTree, rows: PyTree, key: Array) -> Array:
    """The losses of all objectives on rows, without dropout: ``[objectives]``."""
    keys = jax.random.split(key, len(objectives))
    return jnp.stack(
        [
            jnp.asarray(objective_loss(each, params, rows, k, train=False))
            for each, k in zip(objectives, keys, strict=True)
        ]
    )


def paired_losses(objectives: Sequence[Objective], rows: PyTree, key: Array) -> Measure:
    """Measure all objectives on the same rows with the same corruption, each time.

    Two measurements then differ by what was learned between them and by nothing else: their
    difference is exactly zero where the parameters are the same.

    Args:
        objectives: all.
        rows: held-out rows.
        key: a random key, used at every measurement.

    Returns:
        A measure for ``sampled_training``.

    Example:
        >>> noise = lambda rows, key: rows + jax.random.normal(key)
        >>> one = Objective("x", noise, lambda p, b, key: ((p - b) ** 2, {}))
        >>> measure = paired_losses([one], 1.0, jax.random.key(0))
        >>> a, b = (measure(3.0, None, None, None, jax.random.key(i)) for i in (1, 2))
        >>> bool(a[0] == b[0])
        True
    """

    def measure(
        params: PyTree, state: SamplerState, probabilities: Array, batch: PyTree, own: Array
    ) -> Array:
        del state, probabilities, batch, own
        return measured(objectives, params, rows, key)

    return measure


def fresh_losses(objectives: Sequence[Objective], rows: PyTree, size: int) -> Measure:
    """Measure each objective on held-out rows drawn anew and corrupted anew: as published.

    Args:
        objectives: all.
        rows: held-out rows, a pytree whose leaves have a leading axis.
        size: rows of a measurement.

    Returns:
        A measure for ``sampled_training``.

    Raises:
        ValueError: there are fewer rows.

    Example:
        >>> loss = lambda p, batch, key: (((p - batch) ** 2).mean(), {})
        >>> one = Objective("x", lambda rows, key: rows, loss)
        >>> measure = fresh_losses([one], jnp.arange(100.0), 2)
        >>> a, b = (measure(3.0, None, None, None, jax.random.key(i)) for i in (1, 2))
        >>> bool(a[0] == b[0])
        False
    """
    there = min(len(leaf) for leaf in jax.tree.leaves(rows))
    if there < size:
        raise ValueError(f"{size} held-out rows are to be drawn, and there are {there}")

    def measure(
        params: PyTree, state: SamplerState, probabilities: Array, batch: PyTree, own: Array
    ) -> Array:
        del state, probabilities, batch
        each = jax.random.split(own, len(objectives) + 1)
        found = []
        for objective, key in zip(objectives, each[1:], strict=True):
            choice, key = jax.random.split(key)
            at = jax.random.choice(choice, there, (size,), replace=False)
            drawn = jax.tree.map(lambda leaf, at=at: leaf[at], rows)
            found.append(jnp.asarray(objective_loss(objective, params, drawn, key, train=False)))
        return jnp.stack(found)

    return measure


def sampled_training(
    objectives: Sequence[Objective],
    sampler: Sampler,
    measure: Measure | None = None,
    *,
    window: int = 100,
) -> MetaGradient:
    """Train on the objective that a sampler draws at each step; after each window it learns.

    The sampler is a part of the compiled step and of the state, so that draws agree on all devices
    and a run goes on where it stopped. Its drawing is the only thing that differs from plain
    training in a step; a measurement happens once a window.

    Args:
        objectives: all.
        sampler: of as many objectives.
        measure: ``(params, sampler's state, its probabilities, the next rows, key) ->
            [objectives]``, called at the first step and after every window: ``paired_losses``,
            ``fresh_losses``, ``mixture_gradients``. None: nothing is measured, for samplers that
            learn nothing.
        window: steps between two measurements.

    Returns:
        A ``MetaGradient`` for ``fit`` and ``meta_trainer``: episodes are ``Episode(None, rows)``;
        its diagnostics are each objective's probability, measured loss and whether it was drawn.

    Raises:
        ValueError: not as many objectives as the sampler has, two of one name, no window, or (when
            traced) no key.

    Example:
        >>> import optax
        >>> from jmeta.core.types import Episode
        >>> from jmeta.methods.rule_samplers import uniform_mix
        >>> loss = lambda p, batch, key: (((p - batch) ** 2).mean(), {})
        >>> near, far = (Objective(n, lambda r, k, s=s: r + s, loss) for n, s in
        ...              (("near", 0.0), ("far", 10.0)))
        >>> mg = sampled_training([near, far], uniform_mix(2))
        >>> state = mg.init(jnp.float32(0), jax.random.key(0))
        >>> rows = Episode(None, jnp.ones(3))
        >>> grads, state, info = mg.estimate(jnp.float32(0), state, rows, jax.random.key(1))
        >>> float(grads) in (-2.0, -22.0), int(state.step)
        (True, 1)
    """
    names = [each.name for each in objectives]
    if len(names) != sampler.objectives or len(set(names)) != len(names):
        raise ValueError(
            f"the sampler draws of {sampler.objectives} objectives; these are {names}: give as "
            "many, each with a name of its own"
        )
    if window < 1:
        raise ValueError(f"window={window} holds no step")

    def init(meta: PyTree, key: Key) -> SamplerState:
        del meta, key
        return sampler.init()

    def estimate(meta: PyTree, state: SamplerState, episode: Episode, key: Key):
        if key is None:
            raise ValueError("objectives are drawn at random: pass a key")
        rows = episode.query
        draw_key, loss_key, measure_key = jax.random.split(key, 3)
        if measure is not None:
            end = partial(_end_window, sampler, measure, meta)
            state = jax.lax.cond(
                state.step % window == 0, end, lambda s, *_: s, state, rows, measure_key
            )
        probabilities = sampler.probabilities(state)
        index, state = draw_objective(sampler, state, draw_key)
        loss, grads = jax.value_and_grad(lambda p: one_of(objectives, p, rows, index, loss_key))(
            meta
        )
        said = {f"probability of {name}": probabilities[k] for k, name in enumerate(names)}
        said |= {f"drawn {name}": (index == k).astype(jnp.int32) for k, name in enumerate(names)}
        if measure is not None:
            said |= {f"measured {name}": state.losses[k] for k, name in enumerate(names)}
        return grads, state, Info(loss, jnp.zeros((0,)), {}, global_norm(grads), said)

    return MetaGradient(init, estimate)


def _end_window(
    sampler: Sampler,
    measure: Measure,
    params: PyTree,
    state: SamplerState,
    rows: PyTree,
    key: Array,
) -> SamplerState:
    """Measure where all objectives are, and let the sampler learn from it."""
    found = measure(params, state, sampler.probabilities(state), rows, key)
    return sampler.update(state, state.counts, found)
