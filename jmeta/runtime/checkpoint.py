"""Checkpoints of a whole run, through orbax; ``parameters`` saves one model as a single file.

Nothing is pickled; files appear whole or not at all; damaged ones are found out and stepped over.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import warnings
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.tree import path_name
from jmeta.core.types import Array, PyTree
from jmeta.runtime import distributed
from jmeta.runtime.train import describe, dotted

_MAX_SHOWN = 5


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read."""


class Restored(NamedTuple):
    """What ``restore`` returns.

    Attributes:
        step: the step the tree was saved at.
        tree: the saved tree, in the template's structure, dtypes and shardings.
        extra: the JSON values saved beside it.
    """

    step: int
    tree: PyTree
    extra: dict[str, Any]


def open_checkpoints(folder: str | os.PathLike, *, keep: int = 3, best: str | None = None) -> Any:
    """Open, or create, a folder of checkpoints.

    Args:
        folder: where; each checkpoint is a sub-folder named by its step.
        keep: how many of the newest stay; 0 keeps all.
        best: ``"max:accuracy"`` or ``"min:loss"``: the best by that metric stays too.

    Returns:
        An orbax ``CheckpointManager``: a context manager, asynchronous, atomic.
    """
    import orbax.checkpoint as ocp

    folder, policies = pathlib.Path(folder).absolute(), ocp.checkpoint_managers
    kept: Any = policies.LatestN(keep or None)
    score = partial(_score, *parse_best(best)) if best is not None else None
    if score is not None:
        top = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        kept = policies.AnyPreservationPolicy([kept, top])
    if distributed.is_writer():
        _forget_unreadable_metrics(folder)
    distributed.barrier("checkpoints")
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        best_fn=score,  # orbax writes metrics only if it is set
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        **_by_renaming(),
    )
    return ocp.CheckpointManager(folder, options=options)


def save(
    manager: Any,
    step: int,
    tree: PyTree,
    *,
    extra: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Save a tree of arrays in the background; returns once it is copied from the device.

    Args:
        manager: from ``open_checkpoints``.
        step: its number; nothing happens if that step is there already.
        tree: arrays of any dtype, PRNG keys among them.
        extra: values for JSON, such as the position in the data.
        metrics: scalars, by which the best is kept.

    Raises:
        CheckpointError: this save, or the one before it, could not be written.
    """
    import orbax.checkpoint as ocp

    if step in manager.all_steps():
        return
    tree = jax.tree.map(_array, tree)
    head: dict[str, Any] = {"step": step, "extra": dict(extra or {}), "leaves": _kinds(tree)}
    head["crc32"] = _crc(head)
    state = {"tree": tree, "fingerprint": fingerprint(tree)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), head=ocp.args.JsonSave(head))
    try:
        manager.save(step, args=items, metrics=dict(metrics or {}), force=True)
    except Exception as error:
        raise _not_written(manager, step, error) from error


def wait(manager: Any) -> None:
    """Wait until what was saved is on disk.

    Args:
        manager: from ``open_checkpoints``.

    Raises:
        CheckpointError: it could not be written; the message names the folder and the reason.
    """
    try:
        manager.wait_until_finished()
        manager.check_for_errors()
    except Exception as error:
        raise _not_written(manager, None, error) from error


def restore(manager: Any, template: PyTree, *, step: int | None = None) -> Restored:
    """Read the newest checkpoint that is whole, or that of one step.

    Each leaf has a fingerprint in the checkpoint, so that a flipped bit is found as well as a
    truncated or missing file. A damaged checkpoint is passed over, with a warning, for the one
    before it.

    Args:
        manager: from ``open_checkpoints``.
        template: a tree with the structure, shapes, dtypes and shardings to restore into: a freshly
            initialised state, or ``jax.ShapeDtypeStruct`` leaves.
        step: read this one only.

    Returns:
        The step, the tree and the extra values.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of that step.
        ValueError: the checkpoint is of another structure or shape; the leaf is named.
        CheckpointError: all are damaged.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        there = f"; there are: {sorted(steps)}" if steps else ""
        raise FileNotFoundError(f"{wanted} in {manager.directory}{there}")
    reasons = []
    for candidate in steps if step is None else [step]:
        found, why = None, ""
        try:
            found = _read(manager, candidate, template)
        except (_Misfit, PermissionError, MemoryError):
            raise
        except Exception as error:
            why = _first_line(error)
        # Reading is each process's own; only when all have all of it may they compute with it.
        if distributed.all_say(found is not None).all() and found is not None:
            wrong = _damaged(*found)
            if wrong is None:
                return Restored(candidate, found[1]["tree"], found[0]["extra"])
            why = f"the values of '{wrong}' have a wrong checksum"
        why = why or "another process cannot read its part"
        reasons.append(f"step {candidate}: {why}")
        if step is None and candidate != steps[-1]:
            warnings.warn(
                f"jmeta: the checkpoint of step {candidate} in {manager.directory} is damaged "
                f"({why}); going back to the one before it",
                stacklevel=2,
            )
    raise CheckpointError(
        f"no checkpoint in {manager.directory} can be read: {'; '.join(reasons)}. Start in another "
        "folder, or put a whole copy of a checkpoint there"
    )


def set_aside(manager: Any, after: int) -> None:
    """Move checkpoints later than ``after`` (damaged ones) to ``FOLDER.damaged``, to train on."""
    folder = pathlib.Path(manager.directory)
    aside = folder.with_name(folder.name + ".damaged")
    for step in [step for step in manager.all_steps() if step > after]:
        if distributed.is_writer():
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(step), ignore_errors=True)
            (folder / str(step)).rename(aside / str(step))
    distributed.barrier("damaged checkpoints")
    manager.reload()


def best_value(manager: Any, best: str) -> float | None:
    """The best value of the metric among the checkpoints there, or None."""
    mode, name = parse_best(best)
    found = [manager.metrics(step) or {} for step in manager.all_steps()]
    values = [metrics[name] for metrics in found if name in metrics]
    return (max if mode == "max" else min)(values) if values else None


def parse_best(best: str) -> tuple[str, str]:
    """``"max:accuracy"`` as ``("max", "accuracy")``."""
    mode, _, name = best.partition(":")
    if mode not in ("max", "min") or not name:
        raise ValueError(f'best is "max:METRIC" or "min:METRIC", not {best!r}')
    return mode, name


class _Misfit(ValueError):
    """The checkpoint is whole but of another structure."""


def _read(manager: Any, step: int, template: PyTree) -> tuple[dict[str, Any], PyTree]:
    """The head and the state of a checkpoint, by this process alone: it waits for no other."""
    import orbax.checkpoint as ocp

    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reads.{here}"
    )
    folder = pathlib.Path(manager.directory) / str(step)
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:

        def read(**items: Any) -> Any:
            return reader.restore(folder, args=ocp.args.Composite(**items))

        head = read(head=ocp.args.JsonRestore())["head"]
        crc = head.pop("crc32")
        if crc != _crc(head):
            raise CheckpointError("its head has a wrong checksum")
        kinds, wanted = (
            {dotted(name): kind for name, kind in each.items()}
            for each in (head["leaves"], _kinds(template))
        )
        _require_fit(kinds, wanted, f"step {step} in {manager.directory}")
        shape = (len(head["leaves"]),)
        prints = jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=_everywhere(template))
        target = {"tree": jax.tree.map(_struct, template), "fingerprint": prints}
        return head, read(state=ocp.args.StandardRestore(target))["state"]


def _damaged(head: Mapping[str, Any], state: PyTree) -> str | None:
    """The first leaf whose values are not those that were saved; every process must ask."""
    found, stored = np.asarray(fingerprint(state["tree"])), np.asarray(state["fingerprint"])
    wrong = [name for name, a, b in zip(head["leaves"], found, stored, strict=True) if a != b]
    return wrong[0] if wrong else None


def _require_fit(saved: dict[str, str], wanted: dict[str, str], where: str) -> None:
    lines = [
        f"'{name}' is {saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
        for name in dict.fromkeys([*wanted, *saved])
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        more = f"; and {len(lines) - _MAX_SHOWN} more" if len(lines) > _MAX_SHOWN else ""
        raise _Misfit(
            f"the checkpoint of {where} does not fit: {'; '.join(lines[:_MAX_SHOWN])}{more}. "
            "Resume with the model, the outer optimizer and the estimator it was saved with, or "
            "start in another folder"
        )


def _kinds(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): describe(leaf) for path, leaf in leaves}


def _everywhere(template: PyTree) -> jax.sharding.Sharding:
    """Where a small array lies among the template's; left open, orbax wants the saved devices."""
    for leaf in jax.tree.leaves(template):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array | np.ndarray) else jnp.asarray(leaf)


@jax.jit
def fingerprint(tree: PyTree) -> Array:
    """uint32 per leaf: the sum of (2 i + 1) times word i, mod 2^32; any one flipped bit moves it.

    Integer sums are exact, so the number of devices does not matter.
    """

    def one(leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.stack([leaf.real, leaf.imag])
        bits = leaf.dtype.itemsize * 8
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
            leaf = jax.lax.bitcast_convert_type(leaf, kind)
        elif bits == 64:
            leaf = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        words = leaf.astype(jnp.uint32).ravel()
        weights = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
        return jnp.sum(words * weights, dtype=jnp.uint32)

    leaves = jax.tree.leaves(tree)
    return jnp.stack([one(leaf) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


def _by_renaming() -> dict[str, Any]:
    """Orbax's option to finish a checkpoint by renaming its folder, on every file system.

    Left to choose, it could mark checkpoints on a mounted bucket with a file instead, take one that
    was copied there for one that is being written, and remove it.
    """
    import orbax.checkpoint as ocp

    if hasattr(ocp.options, "AtomicityOptions"):
        mode = ocp.options.AtomicityMode.ATOMIC_RENAME
        return {"atomicity_options": ocp.options.AtomicityOptions(mode=mode)}
    return {"temporary_path_class": ocp.path.atomicity.AtomicRenameTemporaryPath}


def _forget_unreadable_metrics(folder: pathlib.Path) -> None:
    """Orbax reads all metrics to open a folder: one damaged file must not close the others."""
    for file in folder.glob("*/metrics/metrics"):
        try:
            json.loads(file.read_text())
        except ValueError:
            shutil.rmtree(file.parent)


def _score(mode: str, name: str, metrics: Mapping[str, float]) -> float:
    value = float(metrics.get(name, math.nan))
    if math.isnan(value):
        return -math.inf
    return value if mode == "max" else -value


def _crc(head: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(head, sort_keys=True).encode())


def _not_written(manager: Any, step: int | None, error: Exception) -> CheckpointError:
    what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
    manager.reload()
    left = manager.latest_step()
    rest = "no earlier one is there" if left is None else f"that of step {left} is still whole"
    return CheckpointError(f"{what} could not be written to {manager.directory}: {error}; {rest}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
