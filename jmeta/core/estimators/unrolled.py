"""Meta-gradients through the unrolled inner loop: exact, mixed mode, first order, truncated.

One function builds them all; the named ones differ in how inner gradients are differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import GradTransform, mixed_mode_grad, reverse_grad, stopped_grad
from jmeta.core.checks import differentiating, losses_at_start, require_dependence
from jmeta.core.inner import InnerLoop, InnerState, Objective, final, inner_loop, keys, start
from jmeta.core.kept import Policy
from jmeta.core.steps import Loop, Remat
from jmeta.core.tree import global_norm, require_inexact
from jmeta.core.types import Episode, Info, Key, MetaGradient, Problem, PyTree, Steps


def unrolled(
    problem: Problem,
    steps: int,
    *,
    objective: Objective = final,
    persistent: bool = False,
    remat: Remat = "none",
    grad: GradTransform = reverse_grad,
    loop: Loop = "scan",
) -> MetaGradient:
    r"""The exact meta-gradient, by reverse mode through every inner step: the reference.

    .. math:: \frac{d}{d\phi} L_{out}(\theta_T(\phi), \phi)

    Args:
        problem: what to differentiate.
        steps: number of inner steps ``T``; with 0 it is the plain gradient of the outer loss.
        objective: ``final``, ``multi_step(weights)`` or ``online``.
        persistent: keep the inner loop's state from one estimate to the next (truncated
            backpropagation through time), instead of starting anew from ``problem.init``.
        remat: ``"none"``, ``"step"``, ``"nested"`` or ``"offload"``: what the backward pass
            recomputes; with ``"rounded"`` the gradient is no longer exact, see ``mixed_mode``.
        grad: how inner gradients are differentiated.
        loop: ``"unroll"`` writes out every step, so that nothing is stacked and sliced: for few
            steps less time and memory, for a compilation that grows with ``T``. Goes with
            ``remat="none"``.

    Returns:
        A ``MetaGradient``; its state is ``()``, or an ``InnerState`` when persistent.

    Raises:
        ValueError, TypeError: when built or first traced, see ``inner_loop`` and ``jmeta.check``.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> problem = Problem(loss, loss, lambda meta: optax.sgd(0.5))
        >>> mg = unrolled(problem, steps=2)
        >>> grads, _, info = mg.estimate(4.0, (), Episode(0.0, 0.0), None)
        >>> float(grads), float(info.loss)  # theta_2 = theta_0 / 4
        (0.25, 0.5)

    Source: Finn et al., "Model-Agnostic Meta-Learning" (2017), equation 1.
    """
    run = inner_loop(problem, steps, objective=objective, remat=remat, grad=grad, loop=loop)
    return _estimator(problem, run, persistent)


def first_order(
    problem: Problem,
    steps: int,
    *,
    objective: Objective = final,
    persistent: bool = False,
    remat: Remat = "none",
    loop: Loop = "scan",
) -> MetaGradient:
    r"""The first-order meta-gradient: inner gradients are constants, all else is differentiated.

    .. math:: \frac{d\theta_{t+1}}{d\phi} \approx
        \frac{\partial}{\partial(\theta_t, \phi)} \mathrm{update}_\phi(\mathrm{sg}[g_t], \theta_t)

    With SGD and a learned initialisation this is the query gradient at the adapted weights; weight
    decay and learned learning rates keep their derivatives.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        objective: where the outer loss is read.
        persistent: keep the inner state between estimates.
        remat: what the backward pass recomputes.
        loop: ``"scan"`` or ``"unroll"``, see ``unrolled``.

    Returns:
        A ``MetaGradient``.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> mg = first_order(Problem(loss, loss, lambda meta: optax.sgd(0.5)), steps=2)
        >>> float(mg.estimate(4.0, (), Episode(0.0, 0.0), None)[0])  # the gradient at theta_2
        1.0

    Source: Finn et al. (2017), section 5.2; Nichol et al., "On First-Order Meta-Learning
    Algorithms" (2018), section 2.
    """
    return unrolled(
        problem,
        steps,
        objective=objective,
        persistent=persistent,
        remat=remat,
        grad=stopped_grad,
        loop=loop,
    )


def mixed_mode(
    problem: Problem,
    steps: int,
    *,
    objective: Objective = final,
    persistent: bool = False,
    remat: Remat = "none",
    keep: Policy | None = None,
    loop: Loop = "scan",
) -> MetaGradient:
    r"""The exact meta-gradient, by forward mode over reverse mode: the same numbers for less.

    Each inner step is differentiated by one Jacobian-vector product of its gradient, so nothing
    of a step is stored but the weights it started from, and what ``keep`` says.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        objective: where the outer loss is read.
        persistent: keep the inner state between estimates.
        remat: what the backward pass recomputes. ``"step"`` keeps one set of weights less than
            ``"none"`` and costs nothing where the update is linear in the gradient (SGD); under
            Adam it recomputes the gradients instead of keeping them. ``"nested"``: long loops.
            ``"offload"``: ``"step"`` with these weights in the memory of the host. ``"rounded"``:
            ``"step"`` for half the memory, and no longer exact: about 1e-5 off.
        keep: which values of every inner gradient are kept for the backward pass and not computed
            again, a policy of ``jax.checkpoint`` such as ``keep_products(512)``: faster for more
            memory, above all where few weights adapt. Goes with ``remat="none"``.
        loop: ``"scan"``, or ``"unroll"``, see ``unrolled``; a compiler then merges what a step
            computes again with what was there, which costs memory. Goes with ``remat="none"``.

    Returns:
        A ``MetaGradient`` equal to ``unrolled``.

    Raises:
        ValueError: ``keep`` or ``loop="unroll"`` with a ``remat`` that computes again what they
            keep.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> mg = mixed_mode(Problem(loss, loss, lambda meta: optax.sgd(0.5)), steps=2)
        >>> float(mg.estimate(4.0, (), Episode(0.0, 0.0), None)[0])
        0.25

    Source: Kemaev et al., "Scalable Meta-Learning via Mixed-Mode Differentiation" (2025).
    """
    if keep is not None and remat != "none":
        raise ValueError(
            f"keep= stores values of the inner gradients and remat={remat!r} computes them again: "
            'choose one of the two, or remat="none"'
        )
    return unrolled(
        problem,
        steps,
        objective=objective,
        persistent=persistent,
        remat=remat,
        grad=functools.partial(mixed_mode_grad, keep=keep),
        loop=loop,
    )


def truncated(
    problem: Problem,
    steps: int,
    *,
    window: int,
    remat: Remat = "none",
    grad: GradTransform = mixed_mode_grad,
) -> MetaGradient:
    r"""The meta-gradient through the last ``window`` of ``T`` inner steps only.

    .. math:: \frac{d}{d\phi} L_{out}(\theta_T(\mathrm{sg}[\theta_{T-w}], \phi), \phi)

    For a meta-parameter that every step reads (a learned loss, a learning rate) the bias falls
    geometrically with the window; memory and time do not depend on ``T - window``.

    Args:
        problem: what to differentiate; its losses, optimizer or encoder must read meta.
        steps: number of inner steps ``T``.
        window: how many of the last steps are differentiated.
        remat: what the backward pass recomputes.
        grad: how inner gradients are differentiated; ``mixed_mode_grad`` is exact.

    Returns:
        A ``MetaGradient``; exact where ``window == steps`` but for the initialisation.

    Raises:
        ValueError: a window longer than the loop; a problem in which meta is only the start, whose
            truncated gradient is exactly zero.

    Example:
        >>> import optax
        >>> inner = lambda fast, meta, batch, key: (0.5 * (fast - meta) ** 2, {})
        >>> outer = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> problem = Problem(inner, outer, lambda m: optax.sgd(0.5), init=lambda m, key: 0.0)
        >>> mg = truncated(problem, steps=3, window=2)
        >>> float(mg.estimate(8.0, (), Episode(0.0, 0.0), None)[0])  # 7 * (1 - 0.5 ** 2)
        5.25

    Source: Shaban et al., "Truncated Back-propagation for Bilevel Optimization" (2019).
    """
    if not 0 <= window <= steps:
        raise ValueError(f"a window of {window} steps does not fit into {steps} inner steps")
    warm_up = inner_loop(problem, steps - window)
    tail = inner_loop(problem, window, remat=remat, grad=grad)
    # One step shows what is read; in reverse mode a loop takes in nothing but what it reads.
    shortest = inner_loop(problem, min(window, 1))

    def run(meta: PyTree, state: InnerState, episode: Episode, key: Key):
        early, late = _cut(episode, steps - window)
        warm_key, tail_key = keys(key, 2)
        frozen = jax.lax.stop_gradient(meta)
        _, (state, losses, _) = warm_up(frozen, jax.lax.stop_gradient(state), early, warm_key)
        loss, (state, more, aux) = tail(meta, jax.lax.stop_gradient(state), late, tail_key)
        # A loop of no steps has no dtype of its own to give its empty losses.
        parts = [part for part in (losses, more) if part.size] or [more]
        return loss, (state, jnp.concatenate(parts), aux)

    def require_read(meta: PyTree, episode: Episode, key: Key) -> None:
        fixed = start(problem, meta, key)
        require_dependence(
            lambda m: shortest(m, fixed, _cut(episode, steps - window)[1], key)[0],
            meta,
            "truncated cuts the path to the initialisation, and nothing else in this problem reads "
            "meta: the gradient is exactly zero; use mixed_mode or first_order",
        )

    return _estimator(problem, run, persistent=False, before=require_read)


def _cut(episode: Episode, at: int) -> tuple[Episode, Episode]:
    """Two episodes: the first ``at`` inner steps' batches, and those after."""
    if not isinstance(episode.support, Steps):
        return episode, episode
    early = jax.tree.map(lambda x: x[:at], episode.support)
    late = jax.tree.map(lambda x: x[at:], episode.support)
    return episode._replace(support=early), episode._replace(support=late)


def _estimator(
    problem: Problem,
    run: InnerLoop,
    persistent: bool,
    before: Callable[[PyTree, Episode, Key], None] | None = None,
) -> MetaGradient:
    """Differentiate an inner loop in reverse mode."""

    def init(meta: PyTree, key: Key) -> PyTree:
        require_inexact(meta)
        return start(problem, meta, key) if persistent else ()

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Key):
        require_inexact(meta)
        init_key, run_key = keys(key, 2)

        def outer(meta: PyTree):
            first = state if persistent else start(problem, meta, init_key)
            return run(meta, first, episode, run_key)

        fast = state.fast if persistent else None
        with differentiating(outer, losses_at_start(problem, episode, key), fast, meta):
            (loss, (last, losses, aux)), grads = jax.value_and_grad(outer, has_aux=True)(meta)
        if before is not None:
            before(meta, episode, key)
        grads = jax.tree.map(lambda g, m: g.astype(jnp.result_type(m)), grads, meta)
        info = Info(loss, losses, aux, global_norm(grads))
        return grads, (last if persistent else ()), info

    return MetaGradient(init, estimate)
