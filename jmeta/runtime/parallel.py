"""One outer step over many devices: a mesh, rules for the weights, tasks split over the devices.

All of it is layout: ``jit`` and ``NamedSharding`` place the same program, so the numbers stay.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmeta.core.over_tasks import TASK_AXES
from jmeta.core.tree import matches, path_name
from jmeta.core.types import Info, MetaGradient, PyTree
from jmeta.runtime.train import TrainState, advance

AXES = (*TASK_AXES, "tensor")
Rules: TypeAlias = Sequence[tuple[str, P]]

REPLICATED: Rules = (("**", P()),)

# Megatron's split: the first matrix of a branch by columns, the second by rows, so that a branch
# ends in one reduction; the layer axis stays whole, because the loop over layers slices it.
TRANSFORMER: Rules = (
    ("**.embed.tokens", P("tensor", "fsdp")),
    ("**.embed.*", P(None, "fsdp")),
    *((f"**.blocks.**.{name}", P(None, "fsdp", "tensor")) for name in ("qkv", "up")),
    *((f"**.blocks.**.{name}.kernel", P(None, "fsdp", "tensor")) for name in ("qkv", "up")),
    *((f"**.blocks.**.{name}.bias", P(None, "tensor")) for name in ("qkv", "up")),
    *((f"**.blocks.**.{name}", P(None, "tensor", "fsdp")) for name in ("out", "down")),
    *((f"**.blocks.**.{name}.kernel", P(None, "tensor", "fsdp")) for name in ("out", "down")),
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
        >>> dict(mlp(2))["**.layer1.kernel"]
        PartitionSpec(('tensor', 'fsdp'), None)
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
        >>> make_mesh(MeshConfig(tasks=1), jax.devices()[:1]).shape
        OrderedDict({'tasks': 1, 'fsdp': 1, 'tensor': 1})
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
        ValueError: a mesh of tasks=2 x fsdp=3 x tensor=1 has 6 devices, but there is 1
    """
    raise NotImplementedError


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
        >>> shardings(mesh, params, [("up", P(None, "tensor"))])["up"].spec
        PartitionSpec(None, 'tensor')
    """
    raise NotImplementedError


def state_shardings(mesh: Mesh, state: TrainState, rules: Rules) -> TrainState:
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
        ValueError: see ``shardings``; persistent students that cannot be split evenly.
    """
    raise NotImplementedError


def task_sharding(mesh: Mesh) -> NamedSharding:
    """Where batched episodes lie: their leading task axis over ``tasks`` x ``fsdp``.

    Example:
        >>> task_sharding(make_mesh()).spec
        PartitionSpec(('tasks', 'fsdp'),)
    """
    return NamedSharding(mesh, P(TASK_AXES))


def shard_state(mesh: Mesh, state: TrainState, rules: Rules) -> TrainState:
    """Put a training state, of which every process has the whole, on the mesh.

    Args:
        mesh: the mesh.
        state: from ``meta_trainer``'s ``init``.
        rules: for its meta-parameters.

    Returns:
        The state as global arrays.

    Raises:
        ValueError: see ``state_shardings``.
    """
    raise NotImplementedError


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
    raise NotImplementedError


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
    raise NotImplementedError


def sharded_step(
    mg: MetaGradient,
    outer_optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    rules: Rules,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Info]]:
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
    raise NotImplementedError


def abstract(tree: PyTree, layout: PyTree) -> PyTree:
    """Shapes and dtypes with a layout, to lower a program from without any array.

    Args:
        tree: arrays or ``ShapeDtypeStruct``s.
        layout: a tree of shardings, or one for all leaves.

    Returns:
        A tree of ``ShapeDtypeStruct`` with shardings.
    """
    raise NotImplementedError


class Collective(NamedTuple):
    """One communication in a compiled program.

    Attributes:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all`` or
            ``collective-permute``.
        shapes: the arrays it yields on each device, as in ``f32[2,3]``.
        bytes: their size.
        looped: whether it is inside the body of a loop.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    looped: bool


def collectives(text: str) -> list[Collective]:
    """The communication of a compiled program.

    Args:
        text: ``compiled.as_text()``.

    Returns:
        One ``Collective`` for each instruction.
    """
    raise NotImplementedError
