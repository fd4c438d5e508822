"""Reptile: the difference between where the inner loop starts and where it ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import stopped_grad
from jmeta.core.checks import differentiating, losses_at_start
from jmeta.core.inner import checked, encode_batch, inner_loop, keys, start, unscored
from jmeta.core.tree import global_norm, path_name, require_inexact
from jmeta.core.types import Episode, Info, Key, MetaGradient, Problem, PyTree


def reptile(problem: Problem, steps: int) -> MetaGradient:
    r"""Reptile's direction as a gradient, to be followed by any outer optimizer.

    .. math:: \hat g = \theta_0 - \theta_T

    Outer ``optax.sgd(epsilon)`` over several tasks is Reptile as published; Adam makes it
    scale-free. No query is needed; without one the last inner loss is reported.

    Args:
        problem: its fast weights must have the structure of meta.
        steps: number of inner steps.

    Returns:
        A ``MetaGradient``.

    Raises:
        ValueError: fast weights and meta differ in structure or shape; the message names the leaf.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> mg = reptile(Problem(loss, loss, lambda meta: optax.sgd(0.5)), steps=2)
        >>> float(mg.estimate(4.0, (), Episode(0.0), None)[0])  # 4 - 1
        3.0

    Source: Nichol et al., "On First-Order Meta-Learning Algorithms" (2018), algorithm 1.
    """
    run = inner_loop(problem, steps, objective=unscored, grad=stopped_grad)
    outer_loss = checked(problem.outer_loss, "outer_loss")

    def init(meta: PyTree, key: Key) -> PyTree:
        require_inexact(meta)
        _require_same_structure(jax.eval_shape(lambda m: problem.init(m, key), meta), meta)
        return ()

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Key):
        require_inexact(meta)
        init_key, run_key, query_key, loss_key = keys(key, 4)
        first = start(problem, meta, init_key)
        _require_same_structure(first.fast, meta)

        def adapted(meta: PyTree):
            return run(meta, first, episode, run_key)

        with differentiating(adapted, losses_at_start(problem, episode, key), first.fast, meta):
            _, (last, losses, _) = adapted(meta)
        grads = jax.tree.map(
            lambda m, end: (m - end).astype(jnp.result_type(m)), first.fast, last.fast
        )
        loss, aux = (losses[-1] if steps else jnp.zeros(())), {}
        if episode.query is not None:
            query = encode_batch(problem, meta, episode.query, query_key)
            loss, aux = outer_loss(last.fast, meta, query, loss_key)
        return grads, state, Info(loss, losses, aux, global_norm(grads))

    return MetaGradient(init, estimate)


def _require_same_structure(fast: PyTree, meta: PyTree) -> None:
    if jax.tree.structure(fast) != jax.tree.structure(meta):
        raise ValueError(
            "reptile moves meta to the adapted weights, so both must have one structure; here the "
            f"fast weights are {jax.tree.structure(fast)} and meta is {jax.tree.structure(meta)}. "
            "Use jmeta.first_order, or let Problem.init return all of meta"
        )
    leaves = jax.tree_util.tree_leaves_with_path(fast)
    for (path, f), m in zip(leaves, jax.tree.leaves(meta), strict=True):
        if jnp.shape(f) != jnp.shape(m):
            raise ValueError(
                f"reptile: the fast weights' leaf {path_name(path)!r} has shape {jnp.shape(f)} and "
                f"meta's has {jnp.shape(m)}; they must agree"
            )
