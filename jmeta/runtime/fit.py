"""Meta-training as a run: progress, metrics, evaluation, checkpoints, resuming, clean stops.

``meta_trainer`` is the mathematics; ``fit`` is the loop around it that survives a night.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jmeta.core.types import Array, Info, MetaGradient, PyTree
from jmeta.runtime import agreement, checkpoint, distributed, metrics, nonfinite, parallel
from jmeta.runtime.batches import (
    Batches,
    RecompilationWarning,
    from_function,
    recompilation_watch,
    require_batches,
)
from jmeta.runtime.nonfinite import NonFiniteError
from jmeta.runtime.progress import open_progress
from jmeta.runtime.train import Stages, TrainState, as_stages, init_state, stage_at

__all__ = [
    "Batches",
    "FitResult",
    "NonFiniteError",
    "RecompilationWarning",
    "fit",
    "from_function",
]


class FitResult(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        meta: the meta-parameters at the end.
        state: the whole state at the end.
        history: the rows of metrics.jsonl, those before a resumption too.
        interrupted: whether SIGINT or SIGTERM, to any of the processes, ended the run before
            ``steps``.
    """

    meta: PyTree
    state: TrainState
    history: list[dict[str, Any]]
    interrupted: bool


def fit(
    mg: MetaGradient | Stages,
    outer_optimizer: optax.GradientTransformation,
    meta: PyTree,
    batches: Batches,
    *,
    steps: int,
    key: Array | int = 0,
    out: str | os.PathLike | None = None,
    evaluate: Callable[[PyTree], Mapping[str, Any]] | None = None,
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    keep: int = 3,
    best: str | None = None,
    resume: bool = False,
    log_every: int = 10,
    progress: bool = True,
    on_step: Callable[[int, TrainState, Info], None] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: parallel.Rules | None = None,
) -> FitResult:
    """Train meta-parameters for a number of outer steps.

    The device runs ahead of the host: losses are fetched at logged steps only. A step that is not
    finite is undone on the device and freezes the run there, which the host notices at its next
    look (a logged, evaluated or saved step).

    Args:
        mg: the meta-gradient estimator, or ``stages([...])``. For batched episodes: ``over_tasks``.
        outer_optimizer: any optax optimizer.
        meta: the meta-parameters to start from; the caller's arrays stay valid.
        batches: ``episode_loader(...)``, ``from_function(f)``, or any endless iterator with
            ``state()`` and ``restore(step)``; each batch is what ``mg.estimate`` takes.
        steps: outer steps in all, those before a resumption included.
        key: a PRNG key or a seed. A resumed run goes on with the one it began with.
        out: the run directory: ``metrics.jsonl``, ``tensorboard``, ``checkpoints``. None: no files.
            Of several processes, all see it, and the first writes what is not a checkpoint.
        evaluate: ``meta -> {name: scalar}``; its numbers are logged as ``eval/name``. Of several
            processes, each evaluates by itself, and the first's numbers count.
        evaluate_every: outer steps between evaluations; 0: only after the last step.
        checkpoint_every: outer steps between checkpoints; with ``out``, the last step and an
            interruption save one in any case.
        keep: how many of the newest checkpoints stay; 0: all.
        best: ``"max:NAME"`` or ``"min:NAME"`` of evaluate's numbers: each new best is saved, and
            the best one stays.
        resume: go on from the newest whole checkpoint in ``out``; without one, begin.
        log_every: outer steps between rows of metrics.
        progress: a bar in a terminal, a line at each logged step elsewhere; False: silence.
        on_step: ``(step, state, info) -> None`` after each step (counted from 1), and before the
            step's checkpoint: what it writes, a resumed run has not lost. The next step donates
            the state's buffers: copy what is to be kept.
        mesh: from ``parallel.make_mesh``: the tasks of each batch are split over it. ``batches``
            gives numpy arrays or arrays of one device, in each process its own part of the tasks,
            as ``episode_loader`` and ``from_function`` do. None: of several processes, all devices,
            as ``parallel.mesh_for`` lays them out.
        rules: how meta is split over the mesh, such as ``parallel.TRANSFORMER``; None: not at all.

    Returns:
        The meta-parameters, the state, the rows of metrics, and whether a signal ended the run.

    Raises:
        NonFiniteError: a loss, gradient or meta-parameter is not finite; the state before that step
            and its episodes are in ``out/nan-STEP``.
        CheckpointError: a checkpoint could not be written or read.
        FileExistsError: ``out`` holds a run already and ``resume`` is False.
        TypeError: a leaf of meta is not floating point, or ``batches`` cannot be restored.
        ValueError: options that contradict each other or the checkpoint; the message says which.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jmeta.core.types import Info, MetaGradient
        >>> def estimate(meta, state, target, key):
        ...     loss, grads = jax.value_and_grad(lambda m: 0.5 * (m - target) ** 2)(meta)
        ...     return grads, state, Info(loss, jnp.zeros(0), {}, jnp.abs(grads))
        >>> mg = MetaGradient(init=lambda meta, key: (), estimate=estimate)
        >>> batches = from_function(lambda step: jnp.float32(1.0))
        >>> result = fit(mg, optax.sgd(0.5), jnp.float32(3.0), batches, steps=4, progress=False)
        >>> float(result.meta)
        1.125
    """
    require_batches(batches)
    needs = {"checkpoint_every": checkpoint_every, "best": best, "resume": resume}
    _require(out is not None, needs, "a folder to save to: pass out=")
    needs = {"evaluate_every": evaluate_every, "best": best}
    _require(evaluate is not None, needs, "something to evaluate: pass evaluate=")
    _require(mesh is not None, {"rules": rules}, "a mesh to lay the weights out on: pass mesh=")
    if min(steps, evaluate_every, checkpoint_every, keep) < 0 or log_every < 1:
        raise ValueError("steps, evaluate_every, checkpoint_every, keep >= 0 and log_every >= 1")
    asked = {
        "steps": steps, "out": out is None, "evaluate": evaluate is None, "best": best,
        "evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every, "keep": keep,
        "log_every": log_every, "resume": resume, "mesh": mesh and dict(mesh.shape),
        "rules": rules, "position in the data": batches.state(),
    }  # fmt: skip
    agreement.require_same(asked)
    schedule, out = as_stages(mg), None if out is None else pathlib.Path(out)
    seed_key = jax.random.key(key) if isinstance(key, int) else key
    state, done = init_state(schedule, outer_optimizer, meta, seed_key), 0
    if mesh is None and jax.process_count() > 1:
        mesh = _mesh_of_all(batches, steps)
    if mesh is not None:
        rules = parallel.REPLICATED if rules is None else rules
        shard = partial(parallel.sharded, mesh=mesh, rules=rules)
        schedule = Stages(schedule.starts, tuple(map(shard, schedule.estimators)))
        agreement.require_one_start(state)
        state = parallel.place(state, parallel.state_shardings(mesh, state, rules))

    with contextlib.ExitStack() as stack:
        manager, record = None, None
        if out is not None:
            agreement.require_one_folder(out)
            manager = stack.enter_context(_checkpoints(out / "checkpoints", keep, best))
            state, done = _begin(manager, state, batches, resume)
            record = checkpoint.best_value(manager, best) if best else None
        first = distributed.is_writer()
        log = metrics.open_log(out if first else None, done)
        stack.callback(log.close)
        bar = open_progress(steps, done, progress and first)
        stack.callback(bar.close)
        caught = stack.enter_context(_signals())

        rows = metrics.read_log(out / metrics.FILE) if out else []
        history = [row for row in rows if row["step"] <= done]  # the writer may be ahead
        clock = _Clock(done, history[-1]["seconds"] if history else 0.0)
        now, watch = nonfinite.guard(state), recompilation_watch()
        compiled: dict[int, Callable[..., tuple[nonfinite.Guarded, Info]]] = {}
        unseen: dict[int, int] = {}  # where the data were at each step since the host last looked

        stop = False
        while done < steps and not stop:
            unseen[done + 1] = batches.state()
            with clock.timed("wait"):
                episodes = _next(batches, done, steps)
            if mesh is not None:
                episodes = parallel.shard_episodes(mesh, episodes)
            stage = stage_at(schedule, done)
            if not compiled:
                now = _on_one_mesh(now, episodes)
            if stage not in compiled:
                compiled[stage] = _compile(schedule.estimators[stage], outer_optimizer, now)
            watch(stage, episodes)
            now, info = compiled[stage](now, episodes)
            done += 1

            logged = done % log_every == 0 or done == steps
            judged = evaluate is not None and (done == steps or _is_due(done, evaluate_every))
            saved = out is not None and (done == steps or _is_due(done, checkpoint_every))
            if logged or judged or saved:
                _raise_if_failed(now, unseen, batches, out)
                unseen.clear()
            row, scores = {"step": done}, {}
            if logged:
                row |= metrics.info_row(jax.device_get(info)) | clock.lap(done)
            if judged and evaluate is not None:
                with clock.timed("evaluation"):
                    scores = metrics.scalars(evaluate(distributed.own_copy(now.state.meta)))
                row |= {f"eval/{name}": value for name, value in scores.items()}
                row["seconds"] = clock.seconds()
                if best is not None:
                    improved = distributed.first_says(_improves(best, scores, record))
                    record = scores[checkpoint.parse_best(best)[1]] if improved else record
                    saved = saved or improved
            if logged or judged:
                history.append(row)
                log.write(row)
                bar.report(done, row)
            if on_step is not None:
                on_step(done, now.state, info)
            if saved:
                log.settle()  # no checkpoint is later than the rows that lead to it
                position = {"position": batches.state()}
                checkpoint.save(manager, done, now.state, extra=position, metrics=scores)
            bar.advance(done)
            stop = bool(caught) or distributed.told_to_stop(done)
        if manager is not None:
            if stop and done < steps:
                _raise_if_failed(now, unseen, batches, out)
                position = {"position": batches.state()}
                checkpoint.save(manager, done, now.state, extra=position)
            checkpoint.wait(manager)
    return FitResult(now.state.meta, now.state, history, stop and done < steps)


def _require(given: bool, options: Mapping[str, Any], what: str) -> None:
    """Every option does something, or is an error."""
    for name, asked in options.items():
        if asked and not given:
            raise ValueError(f"{name} needs {what}")


def _mesh_of_all(batches: Batches, steps: int) -> jax.sharding.Mesh:
    """A mesh of all devices that can split the first batch; the data are put back."""
    if not steps:
        return parallel.make_mesh()
    position = batches.state()
    leaves = jax.tree.leaves(_next(batches, 0, steps))
    batches.restore(position)
    own = [leaf for leaf in leaves if getattr(leaf, "is_fully_addressable", True)]
    tasks = {np.shape(leaf)[:1] for leaf in own}
    if len(tasks) != 1 or tasks == {()}:
        return parallel.make_mesh()
    return parallel.mesh_for(*tasks.pop())


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class _Clock:
    """Seconds of the whole run, and since the last logged step: the rate, and the wait for data.

    The wait is a share of the steps' time, without evaluations. It is an upper bound of what more
    loader threads could save: the device may be at work on an earlier step while the host waits.
    """

    def __init__(self, done: int, before: float):
        self._before, self._begun = before, time.monotonic()
        self._done, self._at = done, self._begun
        self._spent = {"wait": 0.0, "evaluation": 0.0}

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._spent[what] += time.monotonic() - begun

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begun

    def lap(self, done: int) -> dict[str, float]:
        at = time.monotonic()
        rate = (done - self._done) / max(at - self._at, 1e-9)
        waited = self._spent["wait"] / max(at - self._at - self._spent["evaluation"], 1e-9)
        self._done, self._at, self._spent = done, at, dict.fromkeys(self._spent, 0.0)
        return {"steps_per_second": rate, "data_wait": waited, "seconds": self.seconds()}


@contextlib.contextmanager
def _checkpoints(folder: pathlib.Path, keep: int, best: str | None) -> Iterator[Any]:
    """The checkpoint manager, closed at the end without hiding an error of the run."""
    manager = checkpoint.open_checkpoints(folder, keep=keep, best=best)
    try:
        yield manager
    except BaseException:
        if jax.process_count() == 1:  # of several, one that is gone would never end its part
            with contextlib.suppress(Exception):
                manager.close()
        raise
    manager.close()


def _begin(
    manager: Any, state: TrainState, batches: Batches, resume: bool
) -> tuple[TrainState, int]:
    """The state to start from and the steps it has done; puts the data where they were."""
    if not manager.all_steps():
        return state, 0
    if not resume:
        raise FileExistsError(
            f"{manager.directory.parent} holds a run up to step {manager.latest_step()}: pass "
            "resume=True to go on with it, or another out="
        )
    found = checkpoint.restore(manager, state)
    checkpoint.set_aside(manager, after=found.step)
    batches.restore(found.extra["position"])
    return found.tree, found.step


def _next(batches: Batches, done: int, steps: int) -> PyTree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"batches ended after {done} of {steps} outer steps: fit needs an endless iterator, "
            "such as episode_loader or from_function"
        ) from None


def _compile(
    mg: MetaGradient, outer_optimizer: optax.GradientTransformation, now: nonfinite.Guarded
) -> Callable[..., tuple[nonfinite.Guarded, Info]]:
    """The guarded step; on a mesh the state keeps its layout, or the next step compiled again."""
    step = partial(nonfinite.guarded_step, mg, outer_optimizer)
    layout = jax.tree.map(lambda leaf: leaf.sharding, now)
    if not isinstance(layout.failed, jax.sharding.NamedSharding):
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, layout.failed))


def _on_one_mesh(now: nonfinite.Guarded, episodes: PyTree) -> nonfinite.Guarded:
    """If the episodes or part of the state are on a mesh, the rest of the state too, replicated."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves((now, episodes))]
    named = [each for each in shardings if isinstance(each, jax.sharding.NamedSharding)]
    if not named:
        return now
    mesh = max(named, key=lambda each: each.num_devices).mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda leaf: leaf if leaf.sharding.num_devices > 1 else jax.device_put(leaf, everywhere),
        now,
    )


def _raise_if_failed(
    now: nonfinite.Guarded, unseen: dict[int, int], batches: Batches, out: pathlib.Path | None
) -> None:
    if not bool(now.failed):
        return
    step = int(now.state.step) + 1
    names = nonfinite.flag_names(now.state.meta)
    leaves = [name for name, bad in zip(names, np.asarray(now.flags), strict=True) if bad]
    folder = None
    if out is not None:
        batches.restore(unseen[step])  # the host may be batches ahead: this one made it
        here = out if distributed.is_writer() else out / f"process-{jax.process_index()}"
        folder = nonfinite.dump(here, step, distributed.whole(now.state), next(batches), leaves)
    raise NonFiniteError(step, leaves, folder)


def _improves(best: str, scores: Mapping[str, float], record: float | None) -> bool:
    mode, name = checkpoint.parse_best(best)
    if name not in scores:
        raise ValueError(f"best={best!r}, but evaluate returns {sorted(scores)}")
    if np.isnan(scores[name]) or record is None:
        return not np.isnan(scores[name])
    return scores[name] > record if mode == "max" else scores[name] < record


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM fills, to end the loop after the step; a second acts at once.

    Python delivers signals to the main thread: elsewhere the list stays empty. Of several
    processes none may stop by itself: JAX takes SIGTERM, and SIGINT is handed on to it.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    several = jax.process_count() > 1
    ours = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in ours}

    def restore_handlers() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        restore_handlers()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            caught.append(number)

    for number in previous:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore_handlers()
