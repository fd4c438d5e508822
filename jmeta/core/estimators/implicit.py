"""Implicit meta-gradients: differentiate the optimum of the inner loss, not the path to it.

Memory and time do not depend on the number of inner steps; a linear solver does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import stopped_grad
from jmeta.core.checks import differentiating, losses_at_start, require_dependence
from jmeta.core.estimators.unrolled import unrolled
from jmeta.core.inner import (
    checked,
    encode_episode,
    inner_loop,
    keys,
    start,
    step_batches,
    unscored,
)
from jmeta.core.inner import final as final_objective
from jmeta.core.tree import global_norm, require_inexact
from jmeta.core.types import Array, Episode, Info, Key, MetaGradient, Problem, PyTree

MatVec: TypeAlias = Callable[[PyTree], PyTree]
Solver: TypeAlias = Callable[[MatVec, PyTree], PyTree]


def cg(iterations: int = 20, *, damping: float = 0.0, tol: float = 1e-6) -> Solver:
    r"""Conjugate gradients on :math:`(H + \lambda I) x = b`; the damped Hessian must be positive.

    Args:
        iterations: most iterations.
        damping: :math:`\lambda`, added to the Hessian's diagonal.
        tol: relative residual at which it stops.

    Returns:
        A solver for ``implicit``.

    Example:
        >>> round(float(cg()(lambda v: 4.0 * v, jnp.asarray(2.0))), 6)
        0.5
    """

    def solve(matvec: MatVec, b: PyTree) -> PyTree:
        damped = _damped(matvec, damping)
        return jax.scipy.sparse.linalg.cg(damped, b, tol=tol, maxiter=iterations)[0]

    return solve


def neumann(terms: int = 20, *, rate: float, damping: float = 0.0) -> Solver:
    r"""The truncated Neumann series :math:`\alpha \sum_{i=0}^{K-1} (I - \alpha H)^i b`.

    With the inner SGD's learning rate as ``rate`` it equals backpropagating through the last K
    steps of a converged loop.

    Args:
        terms: number of terms ``K``.
        rate: :math:`\alpha`, below two over the largest eigenvalue of the Hessian.
        damping: added to the Hessian's diagonal.

    Returns:
        A solver for ``implicit``.

    Example:
        >>> round(float(neumann(50, rate=0.2)(lambda v: 4.0 * v, jnp.asarray(2.0))), 6)
        0.5

    Source: Lorraine et al., "Optimizing Millions of Hyperparameters" (2020), algorithm 3.
    """

    def solve(matvec: MatVec, b: PyTree) -> PyTree:
        damped = _damped(matvec, damping)

        def term(carry: tuple[PyTree, PyTree], _: None):
            total, power = carry
            power = jax.tree.map(lambda p, h: p - rate * h, power, damped(power))
            return (jax.tree.map(jnp.add, total, power), power), None

        (total, _), _ = jax.lax.scan(term, (b, b), None, length=max(terms - 1, 0))
        return jax.tree.map(lambda leaf: rate * leaf, total)

    return solve


def identity(scale: float = 1.0) -> Solver:
    r"""The Hessian taken as the identity (T1-T2): :math:`x = \alpha b`.

    Args:
        scale: :math:`\alpha`; the inner learning rate makes it one step of backpropagation.

    Returns:
        A solver for ``implicit``.

    Example:
        >>> float(identity(0.25)(lambda v: 4.0 * v, jnp.asarray(2.0)))
        0.5

    Source: Luketina et al., "Scalable Gradient-Based Tuning" (2016).
    """
    return lambda matvec, b: jax.tree.map(lambda leaf: scale * leaf, b)


def _damped(matvec: MatVec, damping: float) -> MatVec:
    if not damping:
        return matvec
    return lambda v: jax.tree.map(lambda h, leaf: h + damping * leaf, matvec(v), v)


def proximal(problem: Problem, strength: float) -> Problem:
    r"""Tie the fast weights to where they start, so that the inner optimum depends on meta.

    .. math:: L_{in}(\theta, \phi) + \frac{\lambda}{2} \lVert \theta - \mathrm{init}(\phi) \rVert^2

    Args:
        problem: its ``init`` must not need a random key.
        strength: :math:`\lambda`.

    Returns:
        The problem with the proximal term in its inner loss.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (jnp.zeros(()), {})
        >>> tied = proximal(Problem(loss, loss, lambda meta: optax.sgd(0.1)), 2.0)
        >>> float(tied.inner_loss(3.0, 1.0, None, None)[0])
        4.0

    Source: Rajeswaran et al., "Meta-Learning with Implicit Gradients" (2019), equation 3.
    """

    def inner_loss(fast: PyTree, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        loss, aux = problem.inner_loss(fast, meta, batch, key)
        anchor = problem.init(meta, None)
        loss = jnp.asarray(loss)
        squares = jax.tree.map(
            lambda f, a: jnp.sum(jnp.square(f - a)).astype(loss.dtype), fast, anchor
        )
        return loss + 0.5 * strength * sum(jax.tree.leaves(squares)), aux

    return problem._replace(inner_loss=inner_loss)


def implicit(problem: Problem, steps: int, *, solver: Solver | None = None) -> MetaGradient:
    r"""The meta-gradient at an inner optimum, by the implicit function theorem.

    .. math:: \frac{dL}{d\phi} = \partial_\phi L_{out}
        - \partial_\phi \nabla_\theta L_{in}^\top \, (\nabla^2_\theta L_{in})^{-1}
        \, \partial_\theta L_{out}

    The last inner point is taken for the optimum: run enough steps. Over ``Steps`` the inner loss
    is the mean over the batches of the loop.

    Args:
        problem: its inner loss must read meta (``proximal`` makes a learned start so).
        steps: number of inner steps, not differentiated.
        solver: ``cg(...)``, ``neumann(...)`` or ``identity(...)``; default ``cg()``.

    Returns:
        A ``MetaGradient``. ``Info.diagnostics`` holds ``residual``, the relative residual of the
        linear system, and ``stationarity``, the norm of the inner gradient at the last point.

    Raises:
        ValueError: the inner loss never reads meta, so the gradient through it would be zero.

    Example:
        >>> import optax
        >>> inner = lambda fast, meta, batch, key: (0.5 * (fast - meta) ** 2, {})
        >>> outer = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> problem = Problem(inner, outer, lambda m: optax.sgd(0.5), init=lambda m, key: 0.0)
        >>> grads, _, info = implicit(problem, steps=40).estimate(3.0, (), Episode(0.0, 1.0), None)
        >>> round(float(grads), 4)  # the optimum is meta itself
        2.0

    Source: Rajeswaran et al. (2019), equation 6.
    """
    solve = cg() if solver is None else solver
    if steps == 0:  # nothing has been optimised: the plain gradient
        return unrolled(problem, 0)
    run = inner_loop(problem, steps, objective=unscored, grad=stopped_grad)
    inner = checked(problem.inner_loss, "inner_loss")
    outer = checked(problem.outer_loss, "outer_loss")

    def init(meta: PyTree, key: Key) -> PyTree:
        require_inexact(meta)
        return ()

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Key):
        require_inexact(meta)
        if episode.query is None:
            raise ValueError("implicit scores the query; this episode has none")
        init_key, run_key = keys(key, 2)
        encode_key, inner_key, outer_key = keys(run_key, 3)
        plain = losses_at_start(problem, episode, key)
        adapting = lambda m: run(m, start(problem, m, init_key), episode, run_key)  # noqa: E731
        with differentiating(adapting, plain, None, meta):
            _, (last, losses, _) = adapting(meta)
        fast = jax.lax.stop_gradient(last.fast)

        def inner_total(fast: PyTree, meta: PyTree) -> Array:
            support = encode_episode(problem, meta, episode, encode_key).support
            batches = step_batches(support, steps, final_objective)
            if batches is None:
                return inner(fast, meta, support, inner_key)[0]
            each = jax.vmap(lambda batch: inner(fast, meta, batch, inner_key)[0])
            return jnp.mean(each(batches.batches))

        def outer_total(fast: PyTree, meta: PyTree) -> tuple[Array, PyTree]:
            query = encode_episode(problem, meta, episode, encode_key).query
            return outer(fast, meta, query, outer_key)

        require_dependence(
            lambda m: jax.grad(inner_total)(fast, m),
            meta,
            "implicit differentiates the optimum of the inner loss, and this inner loss never "
            "reads meta: the gradient through it is exactly zero. Add "
            "jmeta.proximal(problem, strength) for a learned initialisation, or use mixed_mode",
        )
        both = lambda m: (outer_total(fast, m)[0], jax.grad(inner_total)(fast, m))  # noqa: E731
        with differentiating(both, plain, fast, meta):
            (loss, aux), (outer_fast, outer_meta) = jax.value_and_grad(
                outer_total, argnums=(0, 1), has_aux=True
            )(fast, meta)
            slope, hessian_vector = jax.linearize(lambda f: jax.grad(inner_total)(f, meta), fast)
            adjoint = solve(hessian_vector, outer_fast)
            # d/d(meta) of <gradient, adjoint>: one jvp of the gradient in meta, along the adjoint.
            _, mixed = jax.jvp(
                lambda f: jax.grad(inner_total, argnums=1)(f, meta), (fast,), (adjoint,)
            )
        residual = jax.tree.map(jnp.subtract, hessian_vector(adjoint), outer_fast)
        grads = jax.tree.map(
            lambda direct, through, m: (direct - through).astype(jnp.result_type(m)),
            outer_meta,
            mixed,
            meta,
        )
        tiny = float(jnp.finfo(loss.dtype).tiny)
        diagnostics = {
            "residual": global_norm(residual) / (global_norm(outer_fast) + tiny),
            "stationarity": global_norm(slope),
        }
        return grads, state, Info(loss, losses, aux, global_norm(grads), diagnostics)

    return MetaGradient(init, estimate)
