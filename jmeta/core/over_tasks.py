"""From one episode to many: the mean meta-gradient over tasks, all at once or a few at a time."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jmeta.core.inner import fold
from jmeta.core.tree import at_least_float32, global_norm
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
            On a mesh with ``tasks`` and ``fsdp`` axes (``jax.set_mesh``, or ``fit(mesh=)``) each
            device maps as many of its own tasks, and the gradients are reduced once, at the end.

    Returns:
        An estimator for episodes with a leading task axis. Its ``Info`` is the mean over tasks,
        but for ``grad_norm``, which is the norm of the mean gradient.

    Raises:
        ValueError: ``microbatch`` does not divide the number of tasks; a stateful estimator
            without ``tasks``; a number of tasks that the mesh does not divide.

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
        axes, shards = _task_shards()
        own, odd = divmod(count, shards)
        if odd:
            raise ValueError(f"{count} episodes cannot be split evenly over {shards} devices")
        together = own if microbatch is None else microbatch
        if shards > 1:
            together = min(together, own)  # the same program on fewer and on more devices
        if together < 1 or own % together:
            each = "" if shards == 1 else f" of each of {shards} devices"
            raise ValueError(f"microbatch={microbatch} does not divide the {own} episodes{each}")

        def one(index: jax.Array, state: PyTree, episode: Episode):
            return mg.estimate(meta, state, episode, fold(key, index))

        def several(indices: jax.Array, state: PyTree, episodes: Episode):
            grads, state, info = jax.vmap(one)(indices, state, episodes)
            total = lambda g: jnp.sum(g, axis=0, dtype=at_least_float32(g.dtype))  # noqa: E731
            return jax.tree.map(total, grads), state, info

        def accumulated(*tasks: PyTree):
            if together == own:
                return several(*tasks)
            if together == 1:  # without a mapped axis of length one, for which XLA copies the data
                step, parts, cut = one, tasks, 1
            else:
                step, cut = several, 2
                parts = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), tasks)

            def add(total: PyTree, part):
                grads, state, info = step(*part)
                return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (state, info)

            zeros = jax.tree.map(
                lambda m: jnp.zeros_like(m, at_least_float32(jnp.result_type(m))), meta
            )
            total, rest = jax.lax.scan(add, zeros, parts)
            return total, *jax.tree.map(lambda x: x.reshape(own, *x.shape[cut:]), rest)

        tasks_of = (_like_tasks(jnp.arange(count), episodes), state, episodes)
        if shards == 1:
            total, state, info = accumulated(*tasks_of)
        else:
            # Each device sums its own tasks first: one reduction, after the loop over microbatches.
            split = jax.tree.map(lambda x: x.reshape(shards, own, *x.shape[1:]), tasks_of)
            sums = jax.vmap(accumulated, spmd_axis_name=axes)(*_split_over(axes, split))
            sums, state, info = _split_over(axes, sums)
            total = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
            state, info = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), (state, info))
        grads = jax.tree.map(lambda g, m: (g / count).astype(jnp.result_type(m)), total, meta)
        info = jax.tree.map(lambda x: jnp.mean(x, axis=0), info)
        return grads, state, Info(*info)._replace(grad_norm=global_norm(grads))

    return MetaGradient(init, estimate)


def _task_shards() -> tuple[tuple[str, ...], int]:
    """The axes of the mesh in use that split the tasks, and the number of parts."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in TASK_AXES if axis in mesh.auto_axes)
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def _split_over(axes: tuple[str, ...], tree: PyTree) -> PyTree:
    """The tree with leading axes split over these mesh axes, the others left to the compiler."""

    def split(leaf: jax.Array) -> jax.Array:
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(axes, *rest))

    return jax.tree.map(split, tree)


def _like_tasks(indices: jax.Array, episodes: Episode) -> jax.Array:
    """The indices laid out as the tasks are, which a mesh of explicit axes asks of ``vmap``."""
    sharding = jax.typeof(jax.tree.leaves(episodes)[0]).sharding
    if not sharding.mesh.explicit_axes:
        return indices
    spec = PartitionSpec(*sharding.spec[:1])
    return jax.sharding.reshard(indices, NamedSharding(sharding.mesh, spec))


def _count(episodes: Episode) -> int:
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(episodes)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(
            "every leaf of batched episodes needs the same leading task axis; found leading axes "
            f"{sorted(counts)}"
        )
    return counts.pop()[0]
