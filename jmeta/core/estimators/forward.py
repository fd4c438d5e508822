"""Forward-mode meta-gradients: memory independent of the number of inner steps.

One tangent per meta-parameter travels with the inner loop, so they must be few.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jmeta.core.checks import differentiating, losses_at_start
from jmeta.core.inner import Objective, final, inner_loop, keys, start
from jmeta.core.tree import global_norm, require_inexact
from jmeta.core.types import Episode, Info, Key, MetaGradient, Problem, PyTree

MOST_SCALARS = 10_000


def forward(
    problem: Problem,
    steps: int,
    *,
    objective: Objective = final,
    persistent: bool = False,
    chunk: int | None = None,
) -> MetaGradient:
    r"""The exact meta-gradient by forward mode: for a few learned rates or weights, many steps.

    .. math:: \frac{dL}{d\phi_i} = \partial_{\phi_i} L_{out}
        + \partial_\theta L_{out} \frac{d\theta_T}{d\phi_i}, \qquad
        \frac{d\theta_{t+1}}{d\phi_i} = \frac{\partial\theta_{t+1}}{\partial\theta_t}
        \frac{d\theta_t}{d\phi_i} + \frac{\partial\theta_{t+1}}{\partial\phi_i}

    Args:
        problem: what to differentiate.
        steps: number of inner steps; memory does not depend on it.
        objective: where the outer loss is read.
        persistent: keep the inner state between estimates.
        chunk: how many tangents travel together; None for all of them.

    Returns:
        A ``MetaGradient`` equal to ``unrolled``.

    Raises:
        ValueError: more than 10,000 meta-parameters.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> mg = forward(Problem(loss, loss, lambda meta: optax.sgd(0.5)), steps=2)
        >>> float(mg.estimate(4.0, (), Episode(0.0, 0.0), None)[0])
        0.25

    Source: Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization"
    (2017), algorithm 2.
    """
    run = inner_loop(problem, steps, objective=objective)

    def init(meta: PyTree, key: Key) -> PyTree:
        require_inexact(meta)
        return start(problem, meta, key) if persistent else ()

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Key):
        require_inexact(meta)
        with jax.numpy_dtype_promotion("standard"):  # leaves of several dtypes make one vector
            flat, unravel = ravel_pytree(meta)
        if flat.size > MOST_SCALARS:
            raise ValueError(
                f"forward carries one tangent for each of the {flat.size} meta-parameters, and "
                f"{MOST_SCALARS} is the most it takes; use jmeta.mixed_mode, whose cost does not "
                "depend on their number"
            )
        init_key, run_key = keys(key, 2)

        def outer(flat: jax.Array):
            meta = unravel(flat)
            first = state if persistent else start(problem, meta, init_key)
            loss, info = run(meta, first, episode, run_key)
            return loss, info

        def derivative(direction: jax.Array):
            return jax.jvp(outer, (flat,), (direction,), has_aux=True)

        plain = losses_at_start(problem, episode, key)
        with differentiating(lambda m: outer(ravel_pytree(m)[0]), plain, None, meta):
            if chunk is None:
                # Only the tangents are mapped: the loop itself runs once.
                loss, slopes, (last, losses, aux) = jax.vmap(derivative, out_axes=(None, 0, None))(
                    jnp.eye(flat.size, dtype=flat.dtype)
                )
            else:
                loss, (last, losses, aux) = outer(flat)
                slopes = jax.lax.map(
                    lambda i: derivative(jax.nn.one_hot(i, flat.size, dtype=flat.dtype))[1],
                    jnp.arange(flat.size),
                    batch_size=chunk,
                )
        grads = unravel(slopes.astype(flat.dtype))
        info = Info(loss, losses, aux, global_norm(grads))
        return grads, (last if persistent else ()), info

    return MetaGradient(init, estimate)
