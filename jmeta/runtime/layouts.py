"""Where the leaves of parameters and training states lie on a mesh: path globs and their specs.

The rules of every model here, and the layout of a whole state that follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmeta.core.over_tasks import TASK_AXES
from jmeta.core.tree import matches, path_name
from jmeta.core.types import PyTree
from jmeta.runtime.train import TrainState

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
    # Low-rank factors beside the kernels.
    ("**.blocks.*.*.a", P(None, "fsdp")),
    ("**.blocks.*.*.b", P(None, None, "tensor")),
    ("**.head.*.kernel", P("fsdp")),
    # A teacher's heads: each has a table of its own, or one score for each position.
    ("**.table", P("tensor", "fsdp")),
    ("**.dense.kernel", P("fsdp")),
    ("**.score.kernel", P("fsdp")),
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


def shardings(mesh: Mesh, tree: PyTree, rules: Rules) -> PyTree:
    """Where each leaf of a tree of parameters lies: the first rule whose glob matches its path.

    A leaf that no rule matches, and an axis that does not divide its dimension, are errors: laid
    out whole instead, they would show as memory that runs out on a machine that is paid for.

    Args:
        mesh: with the axes that the rules name.
        tree: arrays or ``ShapeDtypeStruct``.
        rules: ``(path glob, PartitionSpec)`` pairs, as in ``jmeta.core.tree``; scalars need none.

    Returns:
        A tree of ``NamedSharding`` of the same structure.

    Raises:
        ValueError: no rule for a leaf, more entries than dimensions, an axis the mesh has not, or
            one that does not divide its dimension; the message names leaf, dimension and axis.

    Example:
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
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
        state: arrays or ``ShapeDtypeStruct``.
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
        return NamedSharding(mesh, P(*lead, *(without(spec, TASK_AXES) if lead else spec)))

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


def without(spec: P, axes: Sequence[str]) -> P:
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
    return len(lengths) == 1 and lengths != {()} and not lengths.pop()[0] % task_parts(mesh)


def task_parts(mesh: Mesh) -> int:
    """The number of parts into which a mesh splits the tasks."""
    return math.prod(mesh.shape[axis] for axis in TASK_AXES)
