"""One outer step over many devices: a mesh, rules for the weights, tasks split over the devices.

All of it is layout: ``jit`` and ``NamedSharding`` place the same program, so the numbers stay.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmeta.core.over_tasks import TASK_AXES
from jmeta.core.types import MetaGradient, PyTree
from jmeta.runtime.layouts import (
    CONV,
    REPLICATED,
    TRANSFORMER,
    Rules,
    mlp,
    shardings,
    state_shardings,
    task_parts,
    without,
)
from jmeta.runtime.train import TrainState, meta_trainer

__all__ = [
    "AXES",
    "CONV",
    "REPLICATED",
    "TRANSFORMER",
    "MeshConfig",
    "Rules",
    "abstract",
    "make_mesh",
    "mesh_for",
    "mlp",
    "place",
    "shard_episodes",
    "shard_state",
    "sharded",
    "sharded_step",
    "shardings",
    "state_shardings",
    "task_sharding",
]

AXES = (*TASK_AXES, "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of a mesh has; -1, for one of them: as many as are left.

    Example:
        >>> dict(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]).shape)
        {'tasks': 1, 'fsdp': 1, 'tensor': 1}
    """

    tasks: int = -1
    """The tasks are split over this axis; each part of it holds all the meta-parameters."""
    fsdp: int = 1
    """The tasks are split over this axis, and so are the meta-parameters between outer steps."""
    tensor: int = 1
    """Each weight matrix of each task is split over this axis."""


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run, with axes ``tasks``, ``fsdp`` and ``tensor``.

    Args:
        config: the sizes of the axes.
        devices: default: all devices of all processes. The devices of a topology that is not
            there (``jax.experimental.topologies``) serve for compiling.

    Returns:
        A mesh whose axes are ``AxisType.Auto``: XLA places what the rules leave open.

    Raises:
        ValueError: a size is neither positive nor -1, two are -1, or their product is not the
            number of devices.

    Example:
        >>> make_mesh(MeshConfig(tasks=2, fsdp=3), jax.devices()[:1])
        Traceback (most recent call last):
        ...
        ValueError: a mesh of tasks=2 x fsdp=3 x tensor=1 needs 6 devices, and there are 1
    """
    found = list(jax.devices() if devices is None else np.ravel(np.asarray(devices, dtype=object)))
    sizes = dataclasses.astuple(config)
    asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"the axes of a mesh are positive, and one may be -1; got {asked}")
    fixed = math.prod(size for size in sizes if size != -1)
    shape = tuple(len(found) // fixed if size == -1 else size for size in sizes)
    if math.prod(shape) != len(found):
        needed = f"a multiple of {fixed}" if -1 in sizes else str(fixed)
        raise ValueError(f"a mesh of {asked} needs {needed} devices, and there are {len(found)}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=found)


def mesh_for(tasks: int) -> Mesh:
    """All devices of all processes, on one axis if each can have as many tasks as the others.

    Otherwise as many devices of each process as divide its tasks share them, and the rest repeat
    their work, along ``tensor``: a warning says so.

    Args:
        tasks: in a batch, of this process.

    Returns:
        A mesh whose ``tasks`` axis divides the tasks.

    Example:
        >>> mesh_for(2 * jax.local_device_count()).shape["tensor"]
        1
    """
    here = jax.local_device_count()
    parts = math.gcd(tasks, here)
    if parts == here:
        return make_mesh()
    processes = jax.process_count()
    warnings.warn(
        f"jmeta: {tasks * processes} tasks cannot be split evenly over {here * processes} devices: "
        f"only {parts * processes} work, and the others repeat what they do. Take a multiple of "
        f"{here * processes} tasks for each outer step",
        stacklevel=3,
    )
    # A process's own devices lie together: it has the data of its own tasks alone.
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.asarray(ordered, dtype=object).reshape(parts * processes, 1, here // parts)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def task_sharding(mesh: Mesh) -> NamedSharding:
    """Where batched episodes lie: their leading task axis over ``tasks`` x ``fsdp``.

    Example:
        >>> task_sharding(make_mesh()).spec == P(("tasks", "fsdp"))
        True
    """
    return NamedSharding(mesh, P(TASK_AXES))


def shard_state(mesh: Mesh, state: TrainState, rules: Rules) -> TrainState:
    """Put a training state, of which every process has the whole, on the mesh.

    Args:
        mesh: the mesh.
        state: from ``meta_trainer``'s ``init``.
        rules: for its meta-parameters.

    Returns:
        The state as global arrays, which share no buffer with the one given.

    Raises:
        ValueError: see ``state_shardings``.
    """
    # device_put keeps the buffer of the device that has one, and a step donates what it is given.
    return place(jax.tree.map(jnp.copy, state), state_shardings(mesh, state, rules))


def place(tree: PyTree, layout: PyTree) -> PyTree:
    """``device_put``, also of PRNG keys onto the devices of other processes.

    Args:
        tree: arrays, of which every process has the whole.
        layout: a tree of shardings.

    Returns:
        Global arrays.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, layout)
    return jax.jit(lambda tree: tree, out_shardings=layout)(tree)


def shard_episodes(mesh: Mesh, episodes: PyTree) -> PyTree:
    """Put batched episodes on the mesh: each process gives its own tasks, one after the other.

    Args:
        mesh: the mesh.
        episodes: leaves ``[tasks of this process, ...]``; global arrays stay as they are.

    Returns:
        Global arrays ``[tasks, ...]``.

    Raises:
        ValueError: the tasks cannot be split evenly over the devices.
    """
    layout, devices = task_sharding(mesh), set(mesh.devices.flat)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
            return leaf
        leaf = np.asarray(leaf)
        if not leaf.ndim:
            raise ValueError(
                "an episode's leaf is a single number: every leaf of batched episodes needs a "
                "leading task axis, by which devices share them"
            )
        tasks = leaf.shape[0] * jax.process_count()
        if tasks % task_parts(mesh):
            raise ValueError(
                f"a batch of {tasks} tasks cannot be split evenly over the mesh's "
                f"{' x '.join(f'{axis}={mesh.shape[axis]}' for axis in TASK_AXES)} devices"
            )
        return jax.make_array_from_process_local_data(layout, leaf)

    return jax.tree.map(put, episodes)


def sharded(mg: MetaGradient, mesh: Mesh, rules: Rules) -> MetaGradient:
    """The estimator of a batch of episodes, laid out on a mesh.

    The meta-parameters are gathered over ``fsdp`` once, before the tasks begin, and the gradients
    are reduced once, after they end, into the layout of the meta-parameters; in between only the
    ``tensor`` axis communicates.

    Args:
        mg: from ``over_tasks``, which accumulates microbatches on each device by itself.
        mesh: the mesh.
        rules: for the meta-parameters.

    Returns:
        The same estimator, to be used inside ``jax.jit``.
    """

    def estimate(meta: PyTree, state: PyTree, episodes: PyTree, key: Any):
        layout = shardings(mesh, meta, rules)
        gathered = jax.tree.map(
            lambda each: NamedSharding(mesh, without(each.spec, TASK_AXES)), layout
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which over_tasks looks for
            whole = jax.lax.with_sharding_constraint(meta, gathered)
            grads, state, info = mg.estimate(whole, state, episodes, key)
        return jax.lax.with_sharding_constraint(grads, layout), state, info

    return MetaGradient(mg.init, estimate)


def sharded_step(
    mg: MetaGradient,
    outer_optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    rules: Rules,
) -> jax.stages.Wrapped:
    """One outer step on a mesh, compiled when first called; the state's buffers are donated.

    ``.lower(abstract(state, state_shardings(...)), abstract(episodes, task_sharding(mesh)))``
    compiles it for devices that are not there.

    Args:
        mg: from ``over_tasks``.
        outer_optimizer: any optax optimizer.
        mesh: the mesh.
        state: arrays or ``ShapeDtypeStruct``, for shapes and dtypes alone.
        rules: for the meta-parameters.

    Returns:
        ``(state, episodes) -> (state, Info)``, a ``jax.jit`` function.
    """
    step = meta_trainer(sharded(mg, mesh, rules), outer_optimizer).step
    layout = (state_shardings(mesh, state, rules), NamedSharding(mesh, P()))
    return jax.jit(step, donate_argnums=0, out_shardings=layout)


def abstract(tree: PyTree, layout: PyTree) -> PyTree:
    """Shapes and dtypes with a layout, to lower a program from without any array.

    Args:
        tree: arrays or ``ShapeDtypeStruct``.
        layout: a tree of shardings, or one for all leaves.

    Returns:
        A tree of ``ShapeDtypeStruct`` with shardings.
    """
    if isinstance(layout, jax.sharding.Sharding):
        layout = jax.tree.map(lambda _: layout, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        layout,
    )
