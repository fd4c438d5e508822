"""A mixture of objectives whose weights follow the exact meta-gradient through training steps.

The other samplers guess from what windows earned; this one differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core.estimators.unrolled import mixed_mode
from jmeta.core.types import Array, Episode, Key, MetaGradient, Problem, PyTree, Steps
from jmeta.methods.objective_sampler import (
    Sampler,
    SamplerState,
    Window,
    entropy_gradient,
    sampler,
)
from jmeta.methods.objective_training import Measure, Objective, measured, objective_loss


class Mixture(NamedTuple):
    """The meta-parameters of ``mixture_problem``.

    Attributes:
        logits: ``[objectives]``, the mixture is their softmax.
        params: where the inner steps start; a constant.
    """

    logits: Array
    params: PyTree


def mixture_problem(
    objectives: Sequence[Objective],
    optimizer: Callable[[Any], optax.GradientTransformation],
    rows: PyTree,
    key: Array,
) -> Problem:
    r"""The mixture of objectives as meta-parameters: which one would have helped all of them most?

    .. math:: L_{in}(\theta, \phi) = \sum_k p_k L_k(\theta), \quad p = \mathrm{softmax}(\phi),
        \qquad L_{out} = \sum_k \frac{V_k(\theta_T)}{V_k(\theta_0)}

    V are the losses on held-out rows with fixed corruption; the outer loss is minus the sum of
    relative improvements, MOMETAS' reward, and a constant.

    Args:
        objectives: all.
        optimizer: ``meta -> GradientTransformation`` of the inner steps.
        rows: held-out rows.
        key: of their corruption.

    Returns:
        A ``Problem`` whose meta is a ``Mixture``: support ``Steps`` of rows, query
        ``[objectives]``, the held-out losses at the start.

    Example:
        >>> loss = lambda p, batch, key: ((p - batch) ** 2, {})
        >>> pair = [Objective(str(s), lambda r, k, s=s: r + s, loss) for s in (0.0, 9.0)]
        >>> problem = mixture_problem(pair, lambda meta: optax.sgd(0.1), 1.0, jax.random.key(0))
        >>> meta = Mixture(jnp.zeros(2), jnp.float32(1.0))
        >>> float(problem.inner_loss(meta.params, meta, 1.0, jax.random.key(0))[0])  # 81 / 2
        40.5
    """

    def inner(fast: PyTree, meta: Mixture, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        if key is None:
            raise ValueError("objectives corrupt at random: pass a key")
        shares = jax.nn.softmax(meta.logits)
        each = jax.random.split(key, len(objectives))
        found = [
            objective_loss(objective, fast, batch, k, train=True)
            for objective, k in zip(objectives, each, strict=True)
        ]
        return (shares * jnp.stack([jnp.asarray(x).astype(shares.dtype) for x in found])).sum(), {}

    def outer(fast: PyTree, meta: Mixture, start: Array, step_key: Key) -> tuple[Array, PyTree]:
        del meta, step_key
        return (measured(objectives, fast, rows, key) / start).sum(), {}

    def begin(meta: Mixture, key: Key) -> PyTree:
        del key
        return jax.lax.stop_gradient(meta.params)

    return Problem(inner, outer, optimizer, init=begin)


def mixture_gradients(
    objectives: Sequence[Objective],
    optimizer: optax.GradientTransformation,
    rows: PyTree,
    key: Array,
    *,
    steps: int,
    batch: int,
    estimator: Callable[[Problem, int], MetaGradient] = mixed_mode,
) -> Measure:
    r"""Measure :math:`dL_{out}/d\phi` at the sampler's mixture, through a few training steps.

    The inner steps start at the network as it is and take rows of the next training batch, so no
    other data are read; they are then forgotten.

    Args:
        objectives: all.
        optimizer: of the inner steps.
        rows: held-out rows.
        key: of their corruption.
        steps: inner steps.
        batch: rows of each; ``steps * batch`` rows of the training batch are used.
        estimator: ``(problem, steps) -> MetaGradient``.

    Returns:
        A measure for ``sampled_training``, which gives ``learned_mixture`` its gradients.

    Raises:
        ValueError: when traced: the training batch has fewer rows.

    Example:
        >>> loss = lambda p, batch, key: (((p - batch) ** 2).mean(), {})
        >>> pair = [Objective(n, lambda r, k, s=s: s * r, loss) for n, s in (("a", 1), ("b", -1))]
        >>> held_out = jnp.array([1.0])
        >>> measure = mixture_gradients(
        ...     pair, optax.sgd(0.1), held_out, jax.random.key(0), steps=1, batch=1)
        >>> found = measure(jnp.float32(0.5), None, jnp.ones(2) / 2, held_out, jax.random.key(1))
        >>> bool(found[0] < 0 < found[1])  # more of a: its held-out loss weighs more at 0.5
        True
    """
    problem = mixture_problem(objectives, lambda meta: optimizer, rows, key)
    mg = estimator(problem, steps)

    def cut(leaf: Array) -> Array:
        if len(leaf) < steps * batch:
            raise ValueError(
                f"{steps} inner steps of {batch} rows need {steps * batch} rows; the training "
                f"batch has {len(leaf)}"
            )
        return leaf[: steps * batch].reshape(steps, batch, *leaf.shape[1:])

    def measure(
        params: PyTree, state: SamplerState, probabilities: Array, batch: PyTree, own: Array
    ) -> Array:
        del state
        # Softmax has the same derivative at logits that differ by a constant.
        meta = Mixture(jnp.log(probabilities), params)
        start = measured(objectives, params, rows, key)
        episode = Episode(Steps(jax.tree.map(cut, batch)), start)
        return mg.estimate(meta, (), episode, own)[0].logits

    return measure


def learned_mixture(
    objectives: int,
    optimizer: optax.GradientTransformation,
    *,
    entropy: float = 0.0,
) -> Sampler:
    r"""Draw from a mixture that follows its own exact meta-gradient.

    .. math:: \phi \leftarrow \mathrm{update}(\nabla_\phi L_{out} - \gamma \nabla_\phi H(p))

    Args:
        objectives: how many there are.
        optimizer: of the logits.
        entropy: the weight :math:`\gamma` of the entropy, which pulls to uniform.

    Returns:
        A ``Sampler`` for ``sampled_training`` with ``mixture_gradients``; its memory is the logits
        and the optimizer's state.

    Example:
        >>> learner = learned_mixture(2, optax.sgd(1.0))
        >>> state = learner.update(learner.init(), jnp.zeros(2), jnp.zeros(2))  # the first call
        >>> state = learner.update(state, jnp.zeros(2), jnp.array([-1.0, 1.0]))
        >>> state.memory[0].tolist()
        [1.0, -1.0]
    """

    def learn(memory: tuple[Array, PyTree], window: Window) -> tuple[Array, PyTree]:
        logits, state = memory
        gradient = window.after - entropy * entropy_gradient(logits)
        updates, state = optimizer.update(gradient, state, logits)
        return optax.apply_updates(logits, updates), state  # type: ignore[return-value]

    def memory() -> tuple[Array, PyTree]:
        logits = jnp.zeros(objectives)
        return logits, optimizer.init(logits)

    return sampler(objectives, memory, lambda state: jax.nn.softmax(state.memory[0]), learn)
