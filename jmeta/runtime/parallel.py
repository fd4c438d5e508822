"""One outer step over many devices: a mesh, rules for the weights, tasks split over the devices.

All of it is layout: ``jit`` and ``NamedSharding`` place the same program, so the numbers stay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmeta.core.over_tasks import TASK_AXES
from jmeta.core.tree import matches, path_name
from jmeta.core.types import MetaGradient, PyTree
from jmeta.runtime.train import TrainState, meta_trainer

AXES = (*TASK_AXES, "tensor")
Rules: TypeAlias = Sequence[tuple[str, P]]

REPLICATED: Rules = (("**", P()),)

# Megatron's split: the first matrix of a branch by columns, the second by rows, so that a branch
# ends in one reduction; the layer axis stays whole, because the loop over layers slices it.
_COLUMNS = ("qkv", "query", "key", "value", "up")
_ROWS = ("out", "down")

TRANSFORMER: Rules = (
    ("**.embed.tokens", P("tensor", "fsdp")),
    ("**.embed.*", P(None, "fsdp")),
    *((f"**.blocks.*.{name}", P(None, "fsdp", "tensor")) for name in _COLUMNS),
    *((f"**.blocks.*.{name}.kernel", P(None, "fsdp", "tensor")) for name in _COLUMNS),
    *((f"**.blocks.*.{name}.bias", P(None, "tensor")) for name in _COLUMNS),
    *((f"**.blocks.*.{name}", P(None, "tensor", "fsdp")) for name in _ROWS),
    *((f"**.blocks.*.{name}.kernel", P(None, "tensor", "fsdp")) for name in _ROWS),
    ("**.head.*.kernel", P("fsdp")),
    ("**.scale", P()),
    ("**.bias", P()),
)

CONV: Rules = (
    ("**.block*.kernel", P(None, None, None, ("tensor", "fsdp"))),
    ("**.head.kernel", P(("tensor", "fsdp"))),
    ("**.scale", P()),
    ("**.bias", P()),
)


def mlp(layers: int) -> Rules:
    """Rules for ``jmeta.models.mlp``: columns and rows by turns, the input and output axes whole.

    Args:
        layers: number of weight matrices, ``len(sizes) - 1``.

    Returns:
        Rules.

    Example:
        >>> [glob for glob, _ in mlp(2)]
        ['**.layer0.kernel', '**.layer1.kernel', '**.bias']
    """
    rules = []
    for i in range(layers):
        first, last = i == 0, i == layers - 1
        spec = P("fsdp", "tensor") if i % 2 == 0 else P("tensor", "fsdp")
        if first or last:
            both = ("tensor", "fsdp")
            spec = P() if first and last else P(None, both) if first else P(both, None)
        rules.append((f"**.layer{i}.kernel", spec))
    return (*rules, ("**.bias", P()))


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


def shardings(mesh: Mesh, tree: PyTree, rules: Rules) -> PyTree:
    """Where each leaf of a tree of parameters lies: the first rule whose glob matches its path.

    A leaf that no rule matches, and an axis that does not divide its dimension, are errors: laid
    out whole instead, they would show as memory that runs out on a machine that is paid for.

    Args:
        mesh: with the axes that the rules name.
        tree: arrays or ``ShapeDtypeStruct``s.
        rules: ``(path glob, PartitionSpec)`` pairs, as in ``jmeta.core.tree``; scalars need none.

    Returns:
        A tree of ``NamedSharding`` of the same structure.

    Raises:
        ValueError: no rule for a leaf, more entries than dimensions, an axis the mesh has not, or
            one that does not divide its dimension; the message names leaf, dimension and axis.

    Example:
        >>> mesh = make_mesh()
        >>> params = {"up": jax.ShapeDtypeStruct((2, 4), "float32")}
        >>> shardings(mesh, params, [("up", P(None, "tensor"))])["up"].spec == P(None, "tensor")
        True
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, path_name(path), leaf, rules)), tree
    )


def state_shardings(mesh: Mesh, state: TrainState, rules: Rules) -> PyTree:
    """Where a training state lies: what is kept for a parameter lies as the parameter does.

    A leaf of the optimizer's or the estimator's state follows the parameter whose path ends its
    own and whose shape it has (moments, averages); persistent students, with a leading task axis,
    are split over the tasks; the rest (counts, factored moments, the key) is on every device.

    Args:
        mesh: the mesh.
        state: arrays or ``ShapeDtypeStruct``s.
        rules: for ``state.meta``.

    Returns:
        A ``TrainState`` of ``NamedSharding``.

    Raises:
        ValueError: see ``shardings``.
    """
    laid = shardings(mesh, state.meta, rules)
    named = jax.tree_util.tree_leaves_with_path(state.meta)
    parameters = {
        _dotted(path): (tuple(leaf.shape), sharding.spec)
        for (path, leaf), sharding in zip(named, jax.tree.leaves(laid), strict=True)
    }

    def follow(lead: tuple[Any, ...], path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        shape = tuple(leaf.shape)[len(lead) :]
        spec = P()
        for name in _endings(_dotted(path)):
            if name in parameters and parameters[name][0] == shape:
                spec = parameters[name][1]
                break
        return NamedSharding(mesh, P(*lead, *(_without(spec, TASK_AXES) if lead else spec)))

    along = jax.tree_util.tree_map_with_path
    lead = (TASK_AXES,) if _by_task(mesh, state.estimator_state) else ()
    everywhere: Any = NamedSharding(mesh, P())
    return TrainState(
        step=everywhere,
        meta=laid,
        opt_state=along(partial(follow, ()), state.opt_state),
        estimator_state=along(partial(follow, lead), state.estimator_state),
        key=everywhere,
    )


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
    layout = task_sharding(mesh)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.num_devices == mesh.size:
            return leaf
        leaf = np.asarray(leaf)
        tasks = leaf.shape[0] * jax.process_count()
        if tasks % _task_parts(mesh):
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
            lambda each: NamedSharding(mesh, _without(each.spec, TASK_AXES)), layout
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
        state: arrays or ``ShapeDtypeStruct``s, for shapes and dtypes alone.
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
        tree: arrays or ``ShapeDtypeStruct``s.
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


def _spec(mesh: Mesh, name: str, leaf: Any, rules: Rules) -> P:
    """The spec of the first rule for a leaf, checked against its shape."""
    shape = tuple(leaf.shape)
    spec = next((spec for glob, spec in rules if matches(name, glob)), P() if not shape else None)
    if spec is None:
        raise ValueError(
            f"no rule says where the leaf {name!r} of shape {shape} lies; add one, such as "
            f"({name!r}, PartitionSpec()) for a copy on every device"
        )
    if not shape:
        return P()
    if len(spec) > len(shape):
        raise ValueError(f"the rule for {name!r} is {spec}, but its shape {shape} is shorter")
    for dimension, entry in enumerate(spec):
        for axis in _axes(entry):
            if axis not in mesh.shape:
                raise ValueError(
                    f"the rule for {name!r} names the mesh axis {axis!r}; there are "
                    f"{', '.join(mesh.axis_names)}"
                )
        parts = math.prod(mesh.shape[axis] for axis in _axes(entry))
        if shape[dimension] % parts:
            raise ValueError(
                f"dimension {dimension} of the leaf {name!r} of shape {shape} cannot be split "
                f"evenly over {' x '.join(f'{a}={mesh.shape[a]}' for a in _axes(entry))}; choose "
                "another size for the axis, pad the dimension, or put a rule for this leaf first"
            )
    return spec


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _without(spec: P, axes: Sequence[str]) -> P:
    """The spec with these mesh axes taken out of it."""
    kept = [tuple(axis for axis in _axes(entry) if axis not in axes) for entry in spec]
    return P(*(entry or None for entry in kept))


def _dotted(path: tuple[Any, ...]) -> str:
    """A path that ends in another's exactly where the tree does: ``.mu.layer0.kernel``."""
    return "." + path_name(path) if path else ""


def _endings(dotted: str) -> Iterator[str]:
    """A dotted path and its ends, the longest first, the empty one last."""
    parts = dotted.split(".")
    yield from ("." + ".".join(parts[i:]) for i in range(1, len(parts)))
    yield ""


def _by_task(mesh: Mesh, state: PyTree) -> bool:
    """Whether the leaves of an estimator's state begin with one task axis that can be split."""
    lengths = {tuple(leaf.shape)[:1] for leaf in jax.tree.leaves(state)}
    return len(lengths) == 1 and lengths != {()} and not lengths.pop()[0] % _task_parts(mesh)


def _task_parts(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in TASK_AXES)
