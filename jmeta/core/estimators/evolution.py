"""Meta-gradients by evolution strategies: only evaluations, any loss, smoothed.

Antithetic pairs for whole inner loops, and persistent evolution strategies for partial unrolls.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import stopped_grad
from jmeta.core.checks import differentiating, losses_at_start
from jmeta.core.inner import InnerState, Objective, final, inner_loop, start
from jmeta.core.tree import global_norm, require_inexact
from jmeta.core.types import Array, Episode, Info, Key, MetaGradient, Problem, PyTree


class Particles(NamedTuple):
    """The state of persistent evolution strategies.

    Attributes:
        inner: the inner states, every leaf ``[2, pairs, ...]``: plus and minus.
        drift: the sum of all perturbations so far, every leaf ``[pairs, ...]``.
    """

    inner: InnerState
    drift: PyTree


def evolution(
    problem: Problem,
    steps: int,
    *,
    pairs: int = 16,
    sigma: float = 0.1,
    objective: Objective = final,
    persistent: bool = False,
) -> MetaGradient:
    r"""The gradient of the smoothed meta-objective, from antithetic pairs of evaluations.

    .. math:: \hat g = \frac{1}{2 n \sigma} \sum_{i=1}^{n} \xi_i
        \left[ L(\phi + \sigma\epsilon_i) - L(\phi - \sigma\epsilon_i) \right], \qquad
        \epsilon_i \sim N(0, I)

    with :math:`\xi_i = \epsilon_i`, unbiased for
    :math:`\nabla_\phi E_\epsilon L(\phi + \sigma\epsilon)`.
    With ``persistent=True`` every particle keeps its inner state from one estimate to the next and
    :math:`\xi_i` is the sum of all its perturbations (PES): unbiased for the whole unroll, however
    short each part of it.

    Args:
        problem: what to differentiate; nothing in it needs a derivative but the inner gradient.
        steps: number of inner steps in one estimate.
        pairs: number of antithetic pairs ``n``.
        sigma: standard deviation of the perturbations, in units of the meta-parameters.
        objective: where the outer loss is read.
        persistent: PES instead of ES.

    Returns:
        A ``MetaGradient``; it needs a random key. ``Info.diagnostics`` holds ``spread``, the
        standard deviation of the pairs' differences.

    Raises:
        ValueError: no random key.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> mg = evolution(Problem(loss, loss, lambda m: optax.sgd(0.5)), steps=2, pairs=4096)
        >>> grads, _, _ = mg.estimate(4.0, (), Episode(0.0, 0.0), jax.random.key(0))
        >>> bool(abs(grads - 0.25) < 0.02)
        True

    Source: Salimans et al., "Evolution Strategies" (2017); Vicol et al., "Unbiased Gradient
    Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies" (2021),
    algorithm 2.
    """
    run = inner_loop(problem, steps, objective=objective, grad=stopped_grad)

    def init(meta: PyTree, key: Key) -> PyTree:
        require_inexact(meta)
        if not persistent:
            return ()
        particles = jnp.zeros((2, pairs))
        # Both members of every pair start at the same point and see the same noise.
        inner = start(problem, meta, key)
        inner = jax.tree.map(lambda x: jnp.broadcast_to(x, (*particles.shape, *x.shape)), inner)
        drift = jax.tree.map(lambda m: jnp.zeros((pairs, *jnp.shape(m)), jnp.result_type(m)), meta)
        return Particles(inner, drift)

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Key):
        require_inexact(meta)
        if key is None:
            raise ValueError("evolution draws random perturbations; pass a jax.random.key")
        init_key, run_key, noise_key = jax.random.split(key, 3)
        noise = _normal_like(noise_key, meta, pairs)

        def value(sign: Array, noise: PyTree, inner: PyTree):
            shifted = jax.tree.map(lambda m, e: m + sign.astype(e.dtype) * sigma * e, meta, noise)
            first = inner if persistent else start(problem, shifted, init_key)
            loss, (last, losses, aux) = run(shifted, first, episode, run_key)
            return loss, last, losses, aux

        each = jax.vmap(jax.vmap(value, in_axes=(None, 0, 0)), in_axes=(0, None, 0))
        inner = state.inner if persistent else jnp.zeros((2, pairs))

        def sampled(noise: PyTree):
            return each(jnp.asarray([1.0, -1.0]), noise, inner)

        plain = losses_at_start(problem, episode, key)
        with differentiating(lambda _: sampled(noise), plain, None, meta):
            loss, last, losses, aux = sampled(noise)
        difference = (loss[0] - loss[1]) / (2 * sigma)
        drift = jax.tree.map(jnp.add, state.drift, noise) if persistent else noise
        grads = jax.tree.map(
            lambda d, m: (
                jnp.tensordot(difference.astype(d.dtype), d, 1).astype(jnp.result_type(m)) / pairs
            ),
            drift,
            meta,
        )
        info = Info(
            jnp.mean(loss),
            jnp.mean(losses, axis=(0, 1)),
            jax.tree.map(lambda a: jnp.mean(a, axis=(0, 1)), aux),
            global_norm(grads),
            {"spread": jnp.std(difference)},
        )
        return grads, (Particles(last, drift) if persistent else ()), info

    return MetaGradient(init, estimate)


def _normal_like(key: jax.Array, meta: PyTree, count: int) -> PyTree:
    leaves, structure = jax.tree.flatten(meta)
    draws = [
        jax.random.normal(k, (count, *jnp.shape(leaf)), jnp.result_type(leaf))
        for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draws)
