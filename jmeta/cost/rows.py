"""A plan's rows: what one way to run a meta step costs per device, and which row to choose.

Plain words and numbers, so that a row crosses from one process to another as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jmeta.cost import topology as machines
from jmeta.cost.hlo import Collective, wire_bytes

EXACT = ("mixed_mode", "mixed_mode nested", "mixed_mode offload", "unrolled", "unrolled step")
SCALARS = 4096  # bytes: a reduction of metrics, not of gradients


class Candidate(NamedTuple):
    """One way to run a meta step; everything in it is a word or a number.

    Attributes:
        estimator: a name of ``estimators`` (``mixed_mode nested``, ``unrolled step``, ...), or
            ``mixed_mode offload``.
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
        host_bytes: temporaries in the memory of the host; each is sent there and back.
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
    host_bytes: int = 0


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
    approximate one. What keeps its weights on the host waits for them: it is chosen where no other
    exact one fits.

    Args:
        rows: of ``plan``.

    Returns:
        A row, or None where nothing fits.

    Example:
        >>> choose([]) is None
        True
    """
    fitting = [row for row in rows if row.fits]
    exact = [row for row in fitting if row.candidate.estimator in EXACT]
    pool = [row for row in exact if not row.host_bytes] or exact or fitting
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
    host = any(row.host_bytes for row in rows)
    name, rule = (" host |", " --: |") if host else ("", "")
    lines = [
        f"| estimator | mesh | together | GiB | state | temp |{name} TFLOP | sent | fits | by size "
        "| s |",
        f"| --- | --- | --: | --: | --: | --: |{rule} --: | --- | --- | --- | --: |",
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
            *([f"{row.host_bytes / 2**30:.2f}"] if host else []),
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
