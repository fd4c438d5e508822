"""Know before you rent: compile the sharded meta step for a machine that need not be there.

``plan`` compiles every estimator on every mesh; for a TPU in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jmeta.core.types import Episode, Problem, PyTree
from jmeta.cost import topology as machines
from jmeta.cost.programs import OUTER, compile_row, made
from jmeta.cost.rows import EXACT, Candidate, Row, row_from
from jmeta.cost.shapes import Setting

CHILD = ("-m", "jmeta.cost.child")


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
        names: of ``cost.estimators``, or ``mixed_mode offload``.
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
    if steps < 0:
        raise ValueError(f"steps is {steps}; it cannot be negative")
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


def _is_reference(text: Any) -> bool:
    module, colon, name = str(text).partition(":")
    return bool(colon) and name.isidentifier() and all(p.isidentifier() for p in module.split("."))


def check_estimator(name: str) -> None:
    """Refuse a name that is none of ``cost.estimators`` and not ``mixed_mode offload``.

    Raises:
        ValueError: it is none; the message lists them.

    Example:
        >>> check_estimator("mixed_mode")
    """
    known = (*EXACT, "first_order", "reptile")
    if name not in known:
        raise ValueError(
            f"there is no estimator {name!r} to plan for; known are {', '.join(known)}"
        )


def _check(candidate: Candidate) -> None:
    check_estimator(candidate.estimator)
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
