"""Pre-training of one method: all seeds side by side, many outer steps per dispatch, resumable.

Evaluations count outer steps; the whole state, and every row so far, is in each checkpoint.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jmeta
from experiments import _two_moons_data as data_of
from experiments._shared import refuse_unresumed, write_rows
from experiments._teacher_shared import mlm_scores
from experiments._two_moons_data import Data
from experiments._two_moons_methods import Method, Skipping, network
from jmeta import methods
from jmeta.core.types import Array, Info, PyTree
from jmeta.runtime import checkpoint, distributed
from jmeta.runtime.parameters import save_params
from jmeta.runtime.train import TrainState

_TOGETHER = 50  # validation sequences that a student reads at a time
_MONITORED, _SHOWN = 64, 4  # validation sequences that a teacher rewrites: for numbers, to show


class Kept(NamedTuple):
    """What a checkpoint holds; all leaves have a leading axis of seeds.

    Attributes:
        states: the training states.
        best: the student with the least validation loss of MLM so far.
        best_meta: what taught it.
        best_loss: that loss, ``[seeds]``.
    """

    states: TrainState
    best: PyTree
    best_meta: PyTree
    best_loss: Array


class Pretrained(NamedTuple):
    """What pre-training leaves behind.

    Attributes:
        latest: the students at the end, leaves ``[seeds, ...]``.
        best: the students with the least validation loss of MLM.
        meta: the meta-parameters at the end.
        history: the rows of the evaluations.
        panel: what the first seed's teacher reads and writes at the end; empty without one.
        seconds: wall time, interrupted attempts included up to their last checkpoint.
    """

    latest: PyTree
    best: PyTree
    meta: PyTree
    history: list[dict[str, Any]]
    panel: str
    seconds: float


class Diverged(FloatingPointError):
    """A loss or a parameter of a method is not finite any more; the message says where."""


def pretrain(config: Any, data: Data, name: str, method: Method, folder: Path) -> Pretrained:
    """Train one method to its end, from its newest checkpoint if there is one.

    Args:
        config: the experiment's configuration.
        data: the data.
        name: the method's name.
        method: the method.
        folder: for its checkpoints, metrics.jsonl and, of teachers, panels.jsonl: at each
            evaluation what the first seed's teacher reads and writes; and in the end
            teachers.safetensors, of all seeds those that taught ``latest`` and ``best``.

    Returns:
        The students and the history.

    Raises:
        Diverged: a loss or a parameter is not finite.
    """
    seeds, samples = config.seed_list, config.chunk * config.sequences_of(name)
    chunks = config.samples // samples
    every = chunks // config.evaluations
    run, look = _programs(config, data, method)
    show = panels_of(config, data, method)
    template = _begin(config, method)
    manager = checkpoint.open_checkpoints(folder / "checkpoints", keep=1)
    kept, history, panels, before, done = template, [], [], 0.0, 0
    if manager.all_steps():
        refuse_unresumed(config.out, config.resume)
        found = checkpoint.restore(manager, template)
        checkpoint.set_aside(manager, after=found.step)
        kept, done = found.tree, found.step // config.chunk
        history, before = found.extra["history"], found.extra["seconds"]
        panels = found.extra.get("panels", [])  # older checkpoints have none
    begun = time.monotonic()
    print(f"{name}: {chunks * config.chunk} outer steps", file=sys.stderr, flush=True)

    parts = _apart(kept.states, config.devices)
    for at in range(done, chunks):
        each = [method.chunk(seed, at) for seed in seeds]
        episodes = jax.tree.map(lambda *leaves: np.stack(leaves, 1), *each)
        # The devices work at the same time: a call returns before its program ends.
        moved = [part._replace(states=None) for part in parts]
        for number, part in enumerate(parts):
            mine = jax.tree.map(lambda leaf, part=part: leaf[:, part.seeds], episodes)
            states, info = run(part.states, jax.device_put(mine, part.device))
            moved[number] = part._replace(states=states, info=info)
        parts = moved
        if (at + 1) % every and at + 1 < chunks:
            continue
        states = _together([part.states for part in parts], axis=0)
        info = _together([part.info for part in parts], axis=1)
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((info.loss, states.meta))):
            checkpoint.wait(manager)
            manager.close()
            raise Diverged(
                f"{name}: a loss or a parameter is not finite at outer step "
                f"{(at + 1) * config.chunk}; what was saved before is in {folder}"
            )
        kept, numbers = look(kept._replace(states=states))
        spent = before + time.monotonic() - begun
        row = {"step": (at + 1) * config.chunk, "samples": (at + 1) * samples, "seconds": spent}
        row |= _plain(seeds, _numbers(config, info) | numbers)
        history.append(row)
        write_rows(folder / "metrics.jsonl", history)
        if method.panel is not None:
            panels.append({"step": row["step"], "panel": show(states.meta)})
            write_rows(folder / "panels.jsonl", panels)
        extra = {"history": history, "panels": panels, "seconds": spent}
        checkpoint.save(manager, row["step"], kept, extra=extra)
        print(_line(name, row, seeds), file=sys.stderr, flush=True)
    checkpoint.wait(manager)
    manager.close()
    kept = distributed.own_copy(kept)
    latest = jax.vmap(method.student)(kept.states.meta, kept.states.estimator_state)
    seconds = before + time.monotonic() - begun
    panel = show(kept.states.meta)
    if method.panel is not None and distributed.is_writer():
        teachers = {"latest": kept.states.meta, "best": kept.best_meta}
        save_params(folder / "teachers.safetensors", teachers, {"seeds": seeds, "method": name})
    return Pretrained(latest, kept.best, kept.states.meta, history, panel, seconds)


def panels_of(config: Any, data: Data, method: Method) -> Callable[[PyTree], str]:
    """``meta [seeds, ...] ->`` texts as the first seed's teacher reads, rewrites and labels them.

    The texts are the same at each call, and so is what is drawn for them.
    """
    if method.panel is None:
        return lambda meta: ""
    write = jax.jit(method.panel)
    read = data_of.unlabelled(data.held_out, data.words)
    read = {k: read[k][:_SHOWN] for k in ("tokens", "mask", "ordinary")}
    decode = functools.partial(data.words.tokenizer.decode, skip_special_tokens=False)

    def show(meta: PyTree) -> str:
        first = jax.tree.map(lambda leaf: leaf[0], distributed.own_copy(meta))
        pseudo = write(first, read, jax.random.key(config.first_seed))
        return methods.panels(read, pseudo, decode)

    return show


class _Part(NamedTuple):
    """Seeds that a device trains: their slice, its states and what the last dispatch told."""

    seeds: slice
    device: Any
    states: Any
    info: Any = None


def _apart(states: TrainState, most: int) -> list[_Part]:
    """The seeds over this process's devices, at most so many if not 0.

    Several processes have them as one part each.
    """
    count = jax.tree.leaves(states)[0].shape[0]
    if jax.process_count() > 1:
        return [_Part(slice(0, count), None, states)]
    devices = jax.local_devices()[: min(count, most or count)]
    ends = [count * i // len(devices) for i in range(len(devices) + 1)]
    return [
        _Part(
            slice(begin, end),
            device,
            # A copy, since the steps donate what they are given.
            jax.device_put(
                jax.tree.map(lambda leaf, b=begin, e=end: jnp.copy(leaf[b:e]), states), device
            ),
        )
        for device, begin, end in zip(devices, ends, ends[1:], strict=False)
    ]


def _together(trees: list[Any], axis: int) -> Any:
    """What the devices hold as one tree on the first of them."""
    if len(trees) == 1:
        return trees[0]
    first = jax.local_devices()[0]
    here = [jax.device_put(tree, first) for tree in trees]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *here)


def _begin(config: Any, method: Method) -> Kept:
    trainer = jmeta.meta_trainer(method.mg, method.optimizer)

    def one(key: Array) -> Kept:
        start, run = jax.random.split(key)
        state = trainer.init(method.start(start), run)
        student = method.student(state.meta, state.estimator_state)
        return Kept(state, student, state.meta, jnp.float32(jnp.inf))

    keys = jnp.stack([jax.random.key(seed) for seed in config.seed_list])
    # Several processes do the same: the seeds are a batch of one program, too small to be split.
    alike = None
    if jax.process_count() > 1:
        alike = NamedSharding(Mesh(_first_of_each(jax.devices()), "processes"), P())
    # Each leaf has a buffer of its own: the steps donate theirs.
    return jax.tree.map(jnp.copy, jax.jit(jax.vmap(one), out_shardings=alike)(keys))


def _first_of_each(devices: Sequence[Any]) -> list[Any]:
    """One device of each process: the others would do over again what it does."""
    first: dict[int, Any] = {}
    for device in devices:
        first.setdefault(device.process_index, device)
    return [first[process] for process in sorted(first)]


def _programs(
    config: Any, data: Data, method: Method
) -> tuple[Callable[..., Any], Callable[[Kept], Any]]:
    """One dispatch of training, and one look at the students and what teaches them."""
    trainer = jmeta.meta_trainer(method.mg, method.optimizer)
    scores = mlm_scores(network(config, data), _TOGETHER)
    held_out = jax.tree.map(jnp.asarray, data.held_out)
    read = data_of.unlabelled(data.held_out, data.words)
    read = {k: jnp.asarray(read[k][:_MONITORED]) for k in ("tokens", "mask", "ordinary")}

    def run(states: TrainState, episodes: PyTree) -> tuple[TrainState, Info]:
        return jax.lax.scan(jax.vmap(trainer.step), states, episodes)

    def one(kept: Kept) -> tuple[Kept, dict[str, Array]]:
        state = kept.states
        student = method.student(state.meta, state.estimator_state)
        mlm = scores(student, held_out)
        better = mlm["loss"] < kept.best_loss
        now, before = (student, state.meta), (kept.best, kept.best_meta)
        best, taught = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, before)
        numbers = {f"mlm_{key}": value for key, value in mlm.items()}
        numbers |= method.monitor(state.meta, read)
        if isinstance(state.opt_state, Skipping):
            numbers["skipped"] = state.opt_state.skipped / state.step  # of all steps so far
        least = jnp.where(better, mlm["loss"], kept.best_loss)
        return Kept(state, best, taught, least), numbers

    return jax.jit(run, donate_argnums=0), jax.jit(jax.vmap(one))


def _numbers(config: Any, info: Info) -> dict[str, Array]:
    """A chunk's means for each seed, ``[seeds]``.

    Where a teacher skips what is too large, a norm counts as the largest at most: others may be no
    number.
    """
    values = {"loss": info.loss, **info.diagnostics}
    if config.largest_gradient and "meta_norm" in values:
        norm, most = values["meta_norm"], config.largest_gradient
        values["meta_norm"] = jnp.where(norm < most, norm, most)
    return {key: jnp.mean(value, axis=0) for key, value in values.items()}


def _plain(seeds: list[int], numbers: dict[str, Array]) -> dict[str, Any]:
    """Each number of each seed, as ``name_seedN``."""
    return {
        f"{key}_seed{seed}": float(f"{value:.6g}")
        for key, values in numbers.items()
        for seed, value in zip(seeds, np.asarray(values, np.float64), strict=True)
    }


def mean_of(row: dict[str, Any], key: str, seeds: list[int]) -> float:
    """The mean over seeds of a number in a row of the history."""
    return float(np.mean([row[f"{key}_seed{seed}"] for seed in seeds]))


def _line(name: str, row: dict[str, Any], seeds: list[int]) -> str:
    wanted = ("loss", "mlm_loss", "mlm_accuracy", "meta_norm", "auxiliary_norm", "cosine",
              "inputs_entropy", "labels_entropy", "inputs_copied", "mask_rate",
              "skipped")  # fmt: skip
    said = [
        f"{key} {mean_of(row, key, seeds):.4g}" for key in wanted if f"{key}_seed{seeds[0]}" in row
    ]
    return f"{name}: {row['samples']} samples, {row['seconds']:.0f} s, {', '.join(said)}"
