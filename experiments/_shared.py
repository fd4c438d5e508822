"""What several experiments share: the command line, and training one method in its own folder."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from jmeta.core.types import MetaGradient, PyTree
from jmeta.files import write_atomically
from jmeta.runtime import agreement, checkpoint, distributed, fit, train
from jmeta.runtime import config as configuration
from jmeta.runtime.cache import use_compilation_cache
from jmeta.runtime.coerce import plain

_CPU = "cpu_seconds"


class Trained(NamedTuple):
    """What ``train_method`` returns.

    Attributes:
        meta: the meta-parameters: the best by ``best``, else the last.
        step: the outer step they are from.
        history: the rows of the method's metrics.jsonl.
        cpu_seconds: user and system time of this process that training took, compilation,
            validation, checkpoints and interrupted attempts included.
    """

    meta: PyTree
    step: int
    history: list[dict[str, Any]]
    cpu_seconds: float


def command_line(
    presets: Mapping[str, Any], run: Callable[[Any], object], argv: Sequence[str] | None = None
) -> None:
    """An experiment's ``main``: read the configuration, join the other processes of a launch, run.

    Args:
        presets: configurations by name.
        run: ``config -> anything``.
        argv: default: the process's own arguments.
    """
    config = configuration.parse(presets, argv)
    with distributed.session():
        use_compilation_cache()
        # Where the run directory is mounted may differ; nothing else may.
        named = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        agreement.require_same({name: value for name, value in named.items() if name != "out"})
        if distributed.is_writer():
            with configuration.track(config) as tracked:
                run(tracked)
        else:  # which reports nothing, and so does not read all of the configuration
            run(config)


def require_positive(config: Any, *names: str) -> None:
    """Check settings that are numbers, or lists of at least one number, and count or measure.

    Raises:
        ValueError: one is not above 0.
    """
    for name in names:
        value = getattr(config, name)
        each = value if isinstance(value, tuple) else (value,)
        if not each or not all(number > 0 for number in each):
            raise ValueError(f"{name}={value}: choose more than 0")


def least(settings: Sequence[Any], losses: Any) -> np.ndarray:
    """The setting with the least loss, ``losses [settings, ...] -> [...]``.

    One that diverges gives NaN, which nothing may prefer.
    """
    return np.asarray(settings)[np.nan_to_num(np.asarray(losses), nan=np.inf).argmin(0)]


def scored_row(config: Any, method: str, seed: int, metric: str, values: Any) -> dict[str, Any]:
    """A result row: the mean of values, and each to six digits where one seed is all there is."""
    each = np.asarray(values, float).reshape(-1)
    row = {"method": method, "seed": seed, "metric": metric, "value": float(each.mean())}
    if config.seeds > 1 or len(each) == 1:
        return row
    return row | {"values": [float(f"{value:.6g}") for value in each]}


def record(config: Any, *free: str) -> None:
    """Write what a run was asked for, unless the folder holds one that was asked for other things.

    Args:
        config: a ``RunConfig``.
        *free: as of ``require_same_settings``.

    Raises:
        SystemExit: the folder holds a run of other settings.
    """
    require_same_settings(config, *free)
    configuration.dump(config, config.out)


def require_same_settings(config: Any, *free: str) -> None:
    """End where the folder holds a run that was asked for other things.

    Otherwise what is there already, trained or scored under other settings, would go on as a part
    of this run.

    Args:
        config: a ``RunConfig``.
        *free: fields that may change between a run and its continuation, beside ``out`` and
            ``resume``: those that change no number that is kept.

    Raises:
        SystemExit: the folder holds a run of other settings.
    """
    import yaml

    file = config.out / "config.yaml"
    if file.exists() and _holds_work(config.out):
        now = configuration.values(config)
        # A field that is newer than the run had its default.
        fields = [f for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING]
        before = {f.name: plain(f.default) for f in fields}
        before |= yaml.safe_load(file.read_text(encoding="utf-8"))
        ignored = {"out", "resume", *free}
        changed = [
            f"{name} {before.get(name)!r}, now {now.get(name)!r}"
            for name in dict.fromkeys([*before, *now])
            if name not in ignored and before.get(name) != now.get(name)
        ]
        if changed:
            sys.exit(
                f"{config.out} was made with other settings ({'; '.join(changed)}): choose another "
                "--out"
            )
        plain(config)  # all count as read: what is complete is not asked for them again


def _holds_work(out: Path) -> bool:
    """Whether a run directory has anything but what says how it was asked for."""
    said = ("config.yaml", "run.json")
    return any(file.is_file() and file.name not in said for file in out.rglob("*"))


def refuse_unresumed(folder: Path, resume: bool) -> None:
    """End where a folder holds a run already and nobody has asked to go on with it."""
    if not resume:
        sys.exit(
            f"{folder} holds a run already: add --resume to go on with it, or choose another --out"
        )


def kept(config: Any, file: Path) -> Any:
    """What an earlier attempt has left in a file of JSON; None where there is none.

    Raises:
        SystemExit: there is, and the run is not resumed.
    """
    if not file.exists():
        return None
    refuse_unresumed(config.out, config.resume)
    return json.loads(file.read_text(encoding="utf-8"))


def train_method(
    name: str,
    mg: MetaGradient,
    outer: optax.GradientTransformation,
    meta: PyTree,
    batches: fit.Batches,
    folder: Path,
    *,
    resume: bool,
    best: str | None = None,
    **options: Any,
) -> Trained:
    """Train one method with ``fit`` in ``folder``; an interruption ends the program.

    Args:
        name: the method, for messages.
        mg: its meta-gradient.
        outer: the outer optimizer.
        meta: where it starts.
        batches: endless episodes.
        folder: for its metrics and checkpoints.
        resume: go on with what is there; a method that is complete is only read.
        best: ``"max:NAME"`` or ``"min:NAME"`` of evaluate's numbers.
        **options: of ``fit``.

    Returns:
        A ``Trained``.
    """
    spent = float((folder / _CPU).read_text()) if (folder / _CPU).exists() else 0.0
    begun, taken, told = time.process_time(), [0], options.pop("on_step", None)

    def on_step(*now: Any) -> None:
        taken[0] += 1
        if told is not None:
            told(*now)

    print(f"{name}: {options['steps']} meta-steps", file=sys.stderr, flush=True)
    try:
        done = fit.fit(
            mg, outer, meta, batches, out=folder, resume=resume, best=best, on_step=on_step,
            **options,
        )  # fmt: skip
    except FileExistsError:
        refuse_unresumed(folder, resume)
        raise
    except BaseException:
        _note_cpu(folder, spent + time.process_time() - begun)
        raise
    if taken[0]:  # else all was there, and only read
        spent += time.process_time() - begun
        _note_cpu(folder, spent)
    meta = distributed.own_copy(done.meta)
    if done.interrupted:
        sys.exit(f"stopped at meta-step {int(done.state.step)} of {name}: go on with --resume")
    if best is None:
        return Trained(meta, int(done.state.step), done.history, spent)
    with checkpoint.open_checkpoints(folder / "checkpoints", keep=1, best=best) as manager:
        found = checkpoint.restore(manager, done.state, step=manager.best_step())
    state: train.TrainState = found.tree
    return Trained(distributed.own_copy(state.meta), found.step, done.history, spent)


def _note_cpu(folder: Path, seconds: float) -> None:
    if folder.exists():
        distributed.write(folder / _CPU, f"{seconds}\n")


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a file of JSON lines, in place of what it held."""
    distributed.write(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_metrics(out: Path, histories: Mapping[str, list[dict[str, Any]]]) -> None:
    """The metrics.jsonl of a run of several methods: every row of each, with its method."""
    lines = [
        json.dumps({"method": method} | row) for method, rows in histories.items() for row in rows
    ]
    write_atomically(out / "metrics.jsonl", "\n".join(lines) + "\n")


def learning_curve(
    history: list[dict[str, Any]], names: list[str], interval: Callable[[Any], Any]
) -> tuple[list[int], list[float], list[float] | None]:
    """Evaluated steps, and the mean of some of evaluate's numbers with its interval.

    Args:
        history: rows of ``fit``.
        names: of the numbers, one for each seed.
        interval: ``jmeta.runtime.statistics.mean_ci``.

    Returns:
        (steps, means, half widths or None for one seed).
    """
    rows = [row for row in history if f"eval/{names[0]}" in row]
    found = [interval([row[f"eval/{name}"] for name in names]) for row in rows]
    half = None if len(names) == 1 else [each.half_width for each in found]
    return [row["step"] for row in rows], [each.mean for each in found], half
