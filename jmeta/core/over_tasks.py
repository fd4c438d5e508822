"""From one episode to many: the mean meta-gradient over tasks, all at once or a few at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.inner import fold
from jmeta.core.tree import global_norm
from jmeta.core.types import Episode, Info, Key, MetaGradient, PyTree

TASK_AXES = ("tasks", "fsdp")  # the axes of a mesh over which the tasks are split


def over_tasks(
    mg: MetaGradient, tasks: int | None = None, *, microbatch: int | None = None
) -> MetaGradient:
    r"""The mean meta-gradient over a batch of episodes.

    .. math:: \frac{1}{N} \sum_{i=1}^{N} \hat g(\phi, \mathrm{episode}_i)

    Args:
        mg: an estimator for one episode.
        tasks: number of episodes; needed where the estimator keeps a state for each.
        microbatch: how many episodes are mapped together; their gradients are summed before the
            next few begin, so memory does not grow with the number of tasks. None for all at once.

    Returns:
        An estimator for episodes with a leading task axis. Its ``Info`` is the mean over tasks,
        but for ``grad_norm``, which is the norm of the mean gradient.

    Raises:
        ValueError: ``microbatch`` does not divide the number of tasks; a stateful estimator
            without ``tasks``.

    Example:
        >>> import optax
        >>> from jmeta.core.estimators.unrolled import unrolled
        >>> from jmeta.core.types import Problem
        >>> loss = lambda fast, meta, batch, key: (0.5 * (fast - batch) ** 2, {})
        >>> mg = over_tasks(unrolled(Problem(loss, loss, lambda m: optax.sgd(0.5)), steps=1))
        >>> targets = jnp.asarray([0.0, 2.0])
        >>> float(mg.estimate(4.0, (), Episode(targets, targets), None)[0])  # mean of 1 and 0.5
        0.75
    """

    def init(meta: PyTree, key: Key) -> PyTree:
        single = jax.eval_shape(lambda m: mg.init(m, key), meta)
        if not jax.tree.leaves(single):
            return mg.init(meta, key)
        if tasks is None:
            raise ValueError(
                "this estimator keeps a state for each task: say over_tasks(mg, tasks=N)"
            )
        if key is None:
            state = mg.init(meta, None)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (tasks, *jnp.shape(x))), state)
        return jax.vmap(lambda i: mg.init(meta, fold(key, i)))(jnp.arange(tasks))

    def estimate(meta: PyTree, state: PyTree, episodes: Episode, key: Key):
        count = _count(episodes)
        if tasks is not None and count != tasks:
            raise ValueError(f"over_tasks was built for {tasks} tasks and got {count} episodes")
        together = count if microbatch is None else microbatch
        if together < 1 or count % together:
            raise ValueError(f"microbatch={microbatch} does not divide the {count} episodes")

        def one(index: jax.Array, state: PyTree, episode: Episode):
            return mg.estimate(meta, state, episode, fold(key, index))

        def several(indices: jax.Array, state: PyTree, episodes: Episode):
            grads, state, info = jax.vmap(one)(indices, state, episodes)
            return jax.tree.map(lambda g: jnp.sum(g.astype(wide(g)), axis=0), grads), state, info

        indices = _like_tasks(jnp.arange(count), episodes)
        if together == count:
            total, state, info = several(indices, state, episodes)
        else:
            parts = jax.tree.map(
                lambda x: x.reshape(count // together, together, *x.shape[1:]),
                (indices, state, episodes),
            )

            def add(total: PyTree, part):
                grads, state, info = several(*part)
                return jax.tree.map(jnp.add, total, grads), (state, info)

            zeros = jax.tree.map(lambda m: jnp.zeros(jnp.shape(m), wide(m)), meta)
            total, (state, info) = jax.lax.scan(add, zeros, parts)
            state, info = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), (state, info))
        grads = jax.tree.map(lambda g, m: (g / count).astype(jnp.result_type(m)), total, meta)
        info = jax.tree.map(lambda x: jnp.mean(x, axis=0), info)
        return grads, state, Info(*info)._replace(grad_norm=global_norm(grads))

    return MetaGradient(init, estimate)


def wide(leaf: Any) -> jnp.dtype:
    """The dtype in which gradients are summed: the leaf's own, and float32 at least.

    Args:
        leaf: an array.

    Returns:
        A floating-point dtype.

    Example:
        >>> wide(jnp.ones(2, jnp.bfloat16))
        dtype('float32')
    """
    dtype = jnp.result_type(leaf)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


def _like_tasks(indices: jax.Array, episodes: Episode) -> jax.Array:
    """The indices laid out as the tasks are, which a mesh of explicit axes asks of ``vmap``."""
    sharding = jax.typeof(jax.tree.leaves(episodes)[0]).sharding
    if not sharding.mesh.explicit_axes:
        return indices
    spec = jax.sharding.PartitionSpec(*sharding.spec[:1])
    return jax.sharding.reshard(indices, jax.sharding.NamedSharding(sharding.mesh, spec))


def _count(episodes: Episode) -> int:
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(episodes)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(
            "every leaf of batched episodes needs the same leading task axis; found leading axes "
            f"{sorted(counts)}"
        )
    return counts.pop()[0]
