"""Know before you rent: compile the sharded meta step for a machine that need not be there.

Each row of a plan is the program that would run: its memory, FLOPs and communication per device.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jmeta.core.over_tasks import over_tasks
from jmeta.core.types import Episode, Problem, PyTree
from jmeta.cost import topology as machines
from jmeta.cost.hlo import Collective, collectives, wire_bytes
from jmeta.cost.measured import estimators, flops
from jmeta.cost.shapes import Setting

EXACT = ("mixed_mode", "mixed_mode nested", "unrolled", "unrolled step")
OUTER = {"adam": lambda: optax.adam(1e-3), "adamw": lambda: optax.adamw(1e-3),
         "sgd": lambda: optax.sgd(1e-3)}  # fmt: skip
CHILD = ("-m", "jmeta.cost.child")
SCALARS = 4096  # bytes: a reduction of metrics, not of gradients


class Candidate(NamedTuple):
    """One way to run a meta step; everything in it is a word or a number.

    Attributes:
        estimator: a name of ``estimators``: ``mixed_mode nested``, ``unrolled step``, ...
        mesh: sizes of the axes, such as ``{"tasks": 4, "fsdp": 4}``; -1 for the rest.
        tasks: in one outer step, on all devices together; None: one for each device.
        microbatch: how many tasks a device maps together; None: all of its own.
        outer: ``adam``, ``adamw`` or ``sgd``.
        options: keyword arguments of the function that makes the setting.
    """

    estimator: str
    mesh: dict[str, int]
    tasks: int | None = None
    microbatch: int | None = None
    outer: str = "adam"
    options: dict[str, Any] = {}  # noqa: RUF012  (never mutated)


class Row(NamedTuple):
    """What one candidate costs per device.

    Attributes:
        candidate: what was compiled.
        topology: for what.
        bytes: arguments, temporaries and outputs that are no donated argument; what the compiler
            asked for (at the least), where the program does not fit.
        argument_bytes: the state and the episodes.
        temp_bytes: temporaries; 0 where the program does not fit.
        usable_bytes: what the device offers.
        fits: whether the first is no more than the last.
        flops: of matmuls and convolutions in one outer step.
        traffic: ``{kind: [times, bytes each device sends, of those inside loops]}``; reductions of
            a few scalars (metrics) count under their kind with ``"scalars"`` before it.
        seconds: to trace and compile.
        note: why there is no program, in a sentence, or empty.
    """

    candidate: Candidate
    topology: str
    bytes: int
    argument_bytes: int
    temp_bytes: int
    usable_bytes: int
    fits: bool
    flops: float
    traffic: dict[str, list[float]]
    seconds: float
    note: str = ""


def plan(
    problem: Problem | str,
    meta: PyTree = None,
    episode: Episode | None = None,
    *,
    steps: int,
    topology: str = "local",
    memory: str | float | None = None,
    names: Sequence[str] = ("unrolled", "unrolled step", "mixed_mode", "mixed_mode nested"),
    meshes: Sequence[Mapping[str, int]] = ({"tasks": -1},),
    tasks: int | None = None,
    microbatch: int | None = None,
    outer: str = "adam",
    rules: Any = None,
    options: Mapping[str, Any] | None = None,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Compile the meta step of every estimator on every mesh, and say which fit.

    For a TPU topology the compiler runs in a process of its own, into which a problem made of
    functions cannot travel; so there it is named: ``module:function``, a function that returns
    ``Setting(problem, meta, episode, rules)`` or the first three of them, with
    ``jax.ShapeDtypeStruct`` leaves. On the devices here a ``Problem`` will do.

    Args:
        problem: a ``Problem``, or ``"module:function"``.
        meta: with a ``Problem``: its meta-parameters, arrays or shapes.
        episode: with a ``Problem``: the episode of one task.
        steps: inner steps.
        topology: ``local``, or such as ``v5e:16x16``.
        memory: per device, such as ``"16GiB"``; None: what the compiler or runtime says.
        names: of ``cost.estimators``.
        meshes: sizes of the axes ``tasks``, ``fsdp`` and ``tensor``; one may be -1.
        tasks: in one outer step, on all devices together; None: one for each device.
        microbatch: how many tasks a device maps together; None: all of its own.
        outer: the outer optimizer: ``adam``, ``adamw`` or ``sgd``.
        rules: with a ``Problem``: see ``jmeta.runtime.parallel``; None: a copy on every device.
        options: keyword arguments of the function.
        report: called with each row as soon as it is there.

    Returns:
        One ``Row`` for each estimator and mesh.

    Raises:
        TopologyError: an unknown topology; one that needs a compiler which is not installed.
        ValueError: names, meshes, tasks or memory that make no sense.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> rows = plan(q.problem, q.meta, q.episode, steps=3, names=["first_order", "mixed_mode"])
        >>> [row.fits for row in rows]
        [True, True]
    """
    machines.check_topology(topology)
    usable = None if memory is None else machines.memory_bytes(memory)
    named = isinstance(problem, str)
    if topology != "local" and not named:
        raise machines.TopologyError(
            f"the compiler of {topology} runs in another process, into which functions cannot "
            "travel: give the problem as 'module:function', a function that returns "
            "(problem, meta, episode)"
        )
    if named and not _is_reference(problem):
        raise ValueError(f"{problem!r} is no reference; write module:function, as for an import")
    if not named and (meta is None or episode is None):
        raise ValueError("a Problem needs the shapes of its meta and of one task's episode")
    if topology != "local":
        machines.require_libtpu()
    candidates = [
        Candidate(name, dict(mesh), tasks, microbatch, outer, dict(options or {}))
        for mesh, name in itertools.product(meshes, names)
    ]
    for candidate in candidates:
        _check(candidate)
    rows = []
    for candidate in candidates:
        if topology != "local":
            row = in_a_child(str(problem), candidate, steps=steps, topology=topology, usable=usable)
        else:
            given = (
                made(str(problem), candidate.options)
                if named
                else Setting(problem, meta, episode, rules)  # pyright: ignore[reportArgumentType]
            )
            row = compile_row(given, candidate, steps=steps, topology="local", usable=usable)
        report(row)
        rows.append(row)
    return rows


def compile_row(
    given: Setting,
    candidate: Candidate,
    *,
    steps: int,
    topology: str = "local",
    usable: int | None = None,
    keep: Callable[[str], Any] | None = None,
) -> Row:
    """Compile one candidate in this process.

    Args:
        given: the problem, by shape.
        candidate: how it would run.
        steps: inner steps.
        topology: for what.
        usable: bytes of a device; None: what the compiler or runtime says.
        keep: called with the program's HLO text.

    Returns:
        A ``Row``; a program that does not fit is one too.

    Raises:
        ValueError: a mesh, a number of tasks or rules that do not fit one another.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> given = Setting(q.problem, q.meta, q.episode)
        >>> row = compile_row(given, Candidate("first_order", {"tasks": -1}), steps=3)
        >>> row.fits
        True
    """
    from jmeta.runtime import parallel
    from jmeta.runtime.train import meta_trainer

    found = machines.devices(topology)
    usable = machines.usable_bytes(found[0], topology) if usable is None else usable
    mesh = parallel.make_mesh(parallel.MeshConfig(**candidate.mesh), found)
    count = len(found) if candidate.tasks is None else candidate.tasks
    parts = mesh.shape["tasks"] * mesh.shape["fsdp"]
    if count < 1 or count % parts:
        raise ValueError(
            f"{count} tasks cannot be split evenly over the tasks={mesh.shape['tasks']} x "
            f"fsdp={mesh.shape['fsdp']} devices of the mesh; ask for a multiple of {parts}"
        )
    rules = parallel.REPLICATED if given.rules is None else given.rules
    single = estimators(given.problem, steps)[candidate.estimator]
    mg = over_tasks(single, microbatch=candidate.microbatch)
    outer = OUTER[candidate.outer]()
    meta = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given.meta)
    state = jax.eval_shape(meta_trainer(mg, outer).init, meta, jax.random.key(0))
    episodes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), given.episode
    )
    begin = time.perf_counter()
    step: Any = parallel.sharded_step(mg, outer, mesh, state, rules)
    traced = step.trace(
        parallel.abstract(state, parallel.state_shardings(mesh, state, rules)),
        parallel.abstract(episodes, parallel.task_sharding(mesh)),
    )
    work = flops(traced.jaxpr) / len(found)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = machines.exhausted(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - begin
        note = f"does not fit: needs {needed[0] / 2**30:.1f} GiB of {usable / 2**30:.2f}"
        return Row(
            candidate, topology, needed[0], 0, 0, usable, False, work, {}, seconds, note
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    text = compiled.as_text() or ""
    if keep is not None:
        keep(text)
    memory = compiled.memory_analysis()
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = arguments + temp + memory.output_size_in_bytes - memory.alias_size_in_bytes
    note = "" if total <= usable else (
        f"does not fit: needs {total / 2**30:.1f} GiB of {usable / 2**30:.2f}"
    )  # fmt: skip
    return Row(
        candidate, topology, total, arguments, temp, usable, total <= usable, work,
        traffic(collectives(text)), seconds, note,
    )  # fmt: skip


def traffic(found: Sequence[Collective]) -> dict[str, list[float]]:
    """Collectives by kind: how often, what each device sends, and how much of it inside loops.

    Args:
        found: of ``collectives``.

    Returns:
        ``{kind: [times, wire bytes, wire bytes inside loops]}``; reductions of at most 4 KiB are
        metrics and are summed apart, as ``"scalars all-reduce"``.

    Example:
        >>> traffic([Collective("all-reduce", 8192, 2, 3, True, ("f32[2048]",), "")])
        {'all-reduce': [3, 24576.0, 24576.0]}
    """
    total: dict[str, list[float]] = {}
    for each in found:
        if each.devices < 2:
            continue
        small = each.kind == "all-reduce" and each.bytes <= SCALARS
        entry = total.setdefault(f"scalars {each.kind}" if small else each.kind, [0, 0.0, 0.0])
        entry[0] += each.times
        entry[1] += wire_bytes(each)
        entry[2] += wire_bytes(each) if each.looped else 0.0
    return total


def choose(rows: Sequence[Row]) -> Row | None:
    """The row to run, of those that fit: the least FLOPs, then least sent, then least memory.

    FLOPs within a tenth of the least count as equal, and an exact meta-gradient goes before an
    approximate one.

    Args:
        rows: of ``plan``.

    Returns:
        A row, or None where nothing fits.

    Example:
        >>> choose([]) is None
        True
    """
    fitting = [row for row in rows if row.fits]
    pool = [row for row in fitting if row.candidate.estimator in EXACT] or fitting
    if not pool:
        return None
    least = min(row.flops for row in pool)
    pool = [row for row in pool if row.flops <= 1.1 * least]
    return min(pool, key=lambda row: (sent(row), row.bytes))


def sent(row: Row) -> float:
    """Bytes that each device sends in one outer step."""
    return sum(values[1] for values in row.traffic.values())


def mesh_name(mesh: Mapping[str, int]) -> str:
    """A mesh as its axes that are split: ``fsdp=4 x tensor=4``.

    Example:
        >>> mesh_name({"tasks": 1, "fsdp": 4, "tensor": 2})
        'fsdp=4 x tensor=2'
    """
    return " x ".join(f"{k}={v if v > 0 else 'all'}" for k, v in mesh.items() if v != 1) or "one"


def plan_markdown(rows: Sequence[Row]) -> str:
    """A plan as a Markdown table and a line that says which row to choose.

    Args:
        rows: of ``plan``.

    Returns:
        Text.

    Example:
        >>> one = Candidate("mixed_mode", {"tasks": -1})
        >>> print(plan_markdown([Row(one, "v5e:2x4", 2**33, 2**30, 7 * 2**30, 2**34, True, 2e12,
        ...     {"all-reduce": [4, 2**30, 0.0]}, 60.0)]).splitlines()[-1])
        Choose mixed_mode on tasks=all: 8.00 of 16.00 GiB on each device.
    """
    lines = [
        "| estimator | mesh | together | GiB | state | temp | TFLOP | sent | fits | by size | s |",
        "| --- | --- | --: | --: | --: | --: | --: | --- | --- | --- | --: |",
    ]
    told = _varying([row.candidate.options for row in rows])
    for row in rows:
        c, least = row.candidate, "" if row.temp_bytes else "≥ "
        cells = [
            c.estimator + "".join(f", {key}={c.options.get(key)}" for key in told),
            mesh_name(c.mesh),
            "all" if c.microbatch is None else str(c.microbatch),
            f"{least}{row.bytes / 2**30:.2f}",
            f"{row.argument_bytes / 2**30:.2f}" if row.temp_bytes else "",
            f"{row.temp_bytes / 2**30:.2f}" if row.temp_bytes else "",
            f"{row.flops / 1e12:.2f}",
            traffic_words(row.traffic),
            "yes" if row.fits else "no",
            " ".join(name for name, size in machines.USABLE.items() if row.bytes <= size * 2**30),
            f"{row.seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"{row.candidate.estimator}: {row.note}" for row in rows if math.isnan(row.flops)]
    chosen = choose(rows)
    if chosen is None and len(failed) == len(rows):
        verdict = "Nothing was compiled."
    elif chosen is None:
        verdict = (
            "Nothing fits: split the weights (fsdp, tensor), map fewer tasks together "
            "(microbatch), or adapt fewer weights."
        )
    else:
        c = chosen.candidate
        verdict = (
            f"Choose {c.estimator} on {mesh_name(c.mesh)}: {chosen.bytes / 2**30:.2f} of "
            f"{chosen.usable_bytes / 2**30:.2f} GiB on each device."
        )
    return "\n".join([*lines, "", *failed, verdict])


def traffic_words(found: Mapping[str, Sequence[float]]) -> str:
    """Communication in words: how often each kind runs and what a device sends in GiB.

    Example:
        >>> traffic_words({"all-gather": [2, 2**30, 2**29], "scalars all-reduce": [1, 8.0, 0.0]})
        'all-gather 2: 1.00 GiB (0.50 in loops)'
    """
    words = []
    for kind, (times, each, looped) in found.items():
        if not kind.startswith("scalars"):
            loops = f" ({looped / 2**30:.2f} in loops)" if looped else ""
            words.append(f"{kind} {times:.0f}: {each / 2**30:.2f} GiB{loops}")
    return ", ".join(words)


def made(reference: str, options: Mapping[str, Any]) -> Setting:
    """Call the function that a reference names.

    Args:
        reference: ``module:function``.
        options: its keyword arguments.

    Returns:
        A ``Setting``.

    Raises:
        ValueError: no such module or function, or it returns something else.

    Example:
        >>> made("jmeta.cost.shapes:setting", {"model": "tiny", "tokens": 16}).episode.query.shape
        (8, 16)
    """
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{reference!r} cannot be imported: {error}") from error
    answer = function(**options)
    if not isinstance(answer, tuple) or not 3 <= len(answer) <= 4:
        raise ValueError(
            f"{reference!r} returned {type(answer).__name__}; it must return (problem, meta, "
            "episode) or a jmeta.cost.Setting"
        )
    return Setting(*answer)


def in_a_child(
    reference: str,
    candidate: Candidate,
    *,
    steps: int,
    topology: str,
    usable: int | None = None,
    keep: Path | None = None,
) -> Row:
    """Compile one candidate in a process of its own: libtpu neither stays nor takes us with it.

    Args:
        reference: ``module:function``.
        candidate: how it would run.
        steps: inner steps.
        topology: for what.
        usable: bytes of a device; None: what the compiler says.
        keep: a file for the program's HLO text.

    Returns:
        A ``Row``; its ``note`` says so where the compiler died.

    Raises:
        ValueError: what the child has refused, in its words.
    """
    request = {
        "reference": reference, "candidate": candidate._asdict(), "steps": steps,
        "topology": topology, "usable": usable, "keep": None if keep is None else str(keep),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "row.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        ended = subprocess.run(
            [sys.executable, *CHILD, str(asked), str(answer)],
            env=os.environ | machines.environment() | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if not answer.exists():
            last = [line for line in ended.stderr.splitlines() if line.strip()][-1:]
            note = f"the compiler's process ended with {ended.returncode}: {''.join(last)}"
            return Row(candidate, topology, 0, 0, 0, usable or 0, False, math.nan, {}, 0.0, note)
        content = json.loads(answer.read_text(encoding="utf-8"))
    if "refused" in content:
        raise ValueError(content["refused"])
    return row_from(content)


def row_from(content: Mapping[str, Any]) -> Row:
    """A row as JSON holds it; ``as_json`` goes the other way."""
    return Row(**{**content, "candidate": Candidate(**content["candidate"])})


def as_json(row: Row) -> dict[str, Any]:
    """A row as words, numbers, dicts and lists.

    Example:
        >>> row = Row(Candidate("mixed_mode", {}), "local", 1, 1, 0, 2, True, 3.0, {}, 0.5)
        >>> row_from(as_json(row)) == row
        True
    """
    return row._asdict() | {"candidate": row.candidate._asdict()}


def _varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys under which these dicts differ."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(s.get(key) != settings[0].get(key) for s in settings)]


def _is_reference(text: Any) -> bool:
    module, colon, name = str(text).partition(":")
    return bool(colon) and name.isidentifier() and all(p.isidentifier() for p in module.split("."))


def _check(candidate: Candidate) -> None:
    known = (*EXACT, "first_order", "reptile")
    if candidate.estimator not in known:
        raise ValueError(
            f"there is no estimator {candidate.estimator!r} to plan for; known are "
            f"{', '.join(known)}"
        )
    if candidate.outer not in OUTER:
        raise ValueError(
            f"there is no outer optimizer {candidate.outer!r} to plan with; known are "
            f"{', '.join(OUTER)}"
        )
    wrong = set(candidate.mesh) - {"tasks", "fsdp", "tensor"}
    if wrong:
        raise ValueError(f"a mesh has the axes tasks, fsdp and tensor, not {', '.join(wrong)}")
    for name in ("tasks", "microbatch"):
        value = getattr(candidate, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be positive")
