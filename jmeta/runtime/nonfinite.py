"""Stopping on the first NaN or infinity, with the state before it and the episode that made it.

The check runs on the device and freezes the state there, so that no step waits for the host.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core.tree import path_name
from jmeta.core.types import Array, Info, MetaGradient, PyTree
from jmeta.runtime.train import TrainState, advance, describe, dotted


class NonFiniteError(FloatingPointError):
    """A loss, a meta-gradient or a meta-parameter became NaN or infinite.

    Attributes:
        step: the outer step that failed, counted from 1 as in the progress display.
        leaves: what was not finite, in words.
        folder: where the state before the step and its episode were written, or None.
    """

    def __init__(self, step: int, leaves: list[str], folder: pathlib.Path | None):
        """Put the three attributes into a sentence."""
        self.step, self.leaves, self.folder = step, leaves, folder
        shown = ", ".join(leaves[:8]) + (f" and {len(leaves) - 8} more" if leaves[8:] else "")
        where = (
            f"the state before the step and its episode are in {folder} "
            "(jmeta.runtime.nonfinite.load_dump reads them)"
            if folder
            else "give fit an out= folder and the state and the episode are kept for debugging"
        )
        super().__init__(
            f"outer step {step} is not finite: {shown}. Training stopped; {where}. Usual causes: "
            "an outer or inner learning rate that is too high, no gradient clipping "
            "(optax.clip_by_global_norm), a log or a square root of zero, an inner optimizer "
            "without a second derivative at zero"
        )


class Guarded(NamedTuple):
    """A training state that stops moving at the first step that is not finite.

    Attributes:
        state: the state after the last finite step.
        failed: bool scalar, whether a step was not finite.
        flags: bool ``[1 + 2 * leaves of meta]``, what was not finite in it; see ``flag_names``.
    """

    state: TrainState
    failed: Array
    flags: Array


def guard(state: TrainState) -> Guarded:
    """A state that has not failed."""
    return Guarded(state, jnp.zeros((), bool), jnp.zeros(len(flag_names(state.meta)), bool))


def flag_names(meta: PyTree) -> list[str]:
    """What each entry of ``Guarded.flags`` stands for."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(meta)]
    return [
        "the loss",
        *(f"the gradient of '{name}'" for name in names),
        *(f"the meta-parameter '{name}' after the update" for name in names),
    ]


def guarded_step(
    mg: MetaGradient, outer_optimizer: optax.GradientTransformation, now: Guarded, episodes: PyTree
) -> tuple[Guarded, Info]:
    """One outer step, undone if it is not finite; after a failure nothing moves any more.

    The optimizer's state is not checked: it may hold infinities by design (a best value so far).

    Args:
        mg: the estimator.
        outer_optimizer: the outer optimizer.
        now: the state and whether it has failed.
        episodes: what ``mg.estimate`` takes.

    Returns:
        The next guarded state, and the step's ``Info``.

    Raises:
        TypeError: at trace time, if a leaf of the state changes its shape or dtype in the step.
    """
    after, info, grads = advance(mg, outer_optimizer, now.state, episodes)
    _require_same_kind(now.state, after)
    checked = [info.loss, *jax.tree.leaves(grads), *jax.tree.leaves(after.meta)]
    flags = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in checked])
    failed = now.failed | jnp.any(flags)
    state = jax.tree.map(lambda old, new: jnp.where(failed, old, new), now.state, after)
    return Guarded(state, failed, jnp.where(now.failed, now.flags, flags)), info


def dump(
    out: str | os.PathLike, step: int, state: TrainState, episodes: PyTree, leaves: list[str]
) -> pathlib.Path:
    """Write what reproduces a failed step to ``out/nan-STEP``: two .npz files and a report.

    Args:
        out: the run directory.
        step: the failed step, counted from 1.
        state: the state before it.
        episodes: what it was given.
        leaves: what was not finite, in words.

    Returns:
        The folder ``out/nan-STEP``; one of that name is replaced.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = out / f"nan-{step}"
    draft = pathlib.Path(tempfile.mkdtemp(prefix=".nan-", dir=out))
    kinds = {}
    for name, tree in (("state", state), ("episodes", episodes)):
        arrays = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[path_name(path)] = _plain(leaf)
            kinds[f"{name}/{path_name(path)}"] = describe(leaf)
        np.savez(draft / f"{name}.npz", **arrays)
    report = {"step": step, "not_finite": leaves, "leaves": kinds}
    (draft / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def load_dump(
    folder: str | os.PathLike, state: TrainState, episodes: PyTree
) -> tuple[TrainState, PyTree]:
    """Read a dump back, to run the failed step again under a debugger.

    Args:
        folder: a ``nan-STEP`` folder.
        state: a state of the same structure: ``meta_trainer(...).init(meta, key)``.
        episodes: episodes of the same structure: any ``next(batches)``.

    Returns:
        The state before the failed step and the episodes it was given, as they were.
    """
    folder = pathlib.Path(folder)

    def read(name: str, like: PyTree) -> PyTree:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            there = {dotted(name): name for name in arrays.files}
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: _typed(arrays[there[dotted(path_name(path))]], leaf), like
            )

    return read("state", state), read("episodes", episodes)


def _plain(leaf: Array) -> np.ndarray:
    """The leaf as a dtype that .npz can hold without pickle: keys as data, bfloat16 as bits."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _typed(array: np.ndarray, like: Array) -> Array:
    if isinstance(like, jax.Array) and jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    dtype = np.asarray(like).dtype
    return jnp.asarray(array.view(dtype) if dtype.kind == "V" else array)


def _require_same_kind(before: TrainState, after: TrainState) -> None:
    one, other = (jax.tree_util.tree_flatten_with_path(tree) for tree in (before, after))
    if one[1] != other[1]:
        raise TypeError(
            "the training state changes its structure in a step: an optimizer or an estimator must "
            f"return the state it was given, with new values. Before: {one[1]}; after: {other[1]}"
        )
    for (path, old), (_, new) in zip(one[0], other[0], strict=True):
        if describe(old) != describe(new):
            raise TypeError(
                f"'{path_name(path)}' changes from {describe(old)} to {describe(new)} in a step: "
                "cast it in the optimizer or the estimator, or every step would compile anew and "
                "no checkpoint would fit"
            )
