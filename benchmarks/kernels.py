"""Where the time of an exact meta-gradient goes on a GPU: its kernels, by name and by kind.

One profiled run of a cell of ``second_order_cost``, after two that warm up; a CPU has no kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import second_order_cost
from benchmarks.pieces import keep_float32, leave
from benchmarks.second_order_problems import DecoderConfig
from jmeta import cost
from jmeta.runtime import config as configuration
from jmeta.runtime import statistics


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """The kernels of an exact meta-gradient; the traces stay in the run directory."""

    steps: int = 8
    """Inner steps."""
    shown: int = 10
    """How many kernels a table names."""


_PROFILED = ("mixed_mode", "mixed_mode, block remat")
PRESETS = {
    "lm": Config(cells=_PROFILED),
    "gpu": Config(width=512, layers=6, heads=8, vocab=4096, batch=(8, 256), cells=_PROFILED),
    "smoke": Config(steps=2, small=True, cells=_PROFILED),
}


class Kernel(NamedTuple):
    """All launches of one kernel.

    Attributes:
        name: as the profiler has it.
        seconds: together.
        launches: how many.
    """

    name: str
    seconds: float
    launches: int


def read_trace(path: Path) -> list[Kernel]:
    """The kernels in a profiler's trace, most expensive first.

    Args:
        path: a ``*.trace.json.gz``.

    Returns:
        One ``Kernel`` per name; none where nothing ran on a GPU's stream.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    named = {
        (e["name"], e["pid"], e.get("tid")): e["args"]["name"]
        for e in events
        if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
    }
    devices = {
        pid
        for (what, pid, _), name in named.items()
        if what == "process_name" and "/device:GPU" in name
    }
    streams = {
        (pid, tid)
        for (what, pid, tid), name in named.items()
        if what == "thread_name" and name.startswith("Stream") and pid in devices
    }
    spent: collections.Counter[str] = collections.Counter()
    launched: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            spent[event["name"]] += event["dur"] * 1e-6
            launched[event["name"]] += 1
    return [Kernel(name, seconds, launched[name]) for name, seconds in spent.most_common()]


KINDS = (
    ("attention", r"flash|fmha|sdpa"),
    ("matmul", r"gemm|nvjet|cublas|cutlass|xmma"),
    ("copy", r"[Mm]em(cpy|set)|copy|transpose"),
)


def kind(name: str) -> str:
    """What a kernel does, by its name: a matmul, a copy, attention or what is fused of the rest."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "elementwise")


def profile(cell: second_order_cost.Cell, folder: Path) -> list[Kernel]:
    """The kernels of one run, after two that warm up; the trace is left in a folder."""
    program = cost.compile_estimate(cell.mg, cell.setting.meta, cell.setting.episode)
    given = cell.setting.meta, cell.setting.episode
    for _ in range(2):
        jax.block_until_ready(program.run(*given))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(program.run(*given))
    # Folders are named by the second: of several runs, the last.
    return read_trace(max(folder.glob("plugins/profile/*/*.trace.json.gz")))


def rows_of(name: str, found: Sequence[Kernel], shown: int) -> list[dict[str, Any]]:
    """Milliseconds of the largest kernels and of every kind."""
    rows = [
        {"method": name, "seed": 0, "metric": "kernel ms", "value": 1e3 * each.seconds,
         "kernel": each.name, "launches": each.launches}
        for each in found[:shown]
    ]  # fmt: skip
    kinds: collections.Counter[str] = collections.Counter()
    for each in found:
        kinds[kind(each.name)] += each.seconds  # pyright: ignore[reportArgumentType]
    rows += [
        {"method": name, "seed": 0, "metric": "ms of a kind", "value": 1e3 * seconds, "kernel": of}
        for of, seconds in kinds.most_common()
    ]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    if jax.default_backend() == "cpu":
        sys.exit("kernels are profiled on a GPU, and jax sees none here")
    configuration.dump(config, Path(config.out))
    keep_float32(config.dtype)
    rows: list[dict[str, Any]] = []
    every = second_order_cost.decoder_cells(config, config.steps)
    for cell in second_order_cost.wanted(every, config.cells):
        if cell.name.startswith("first_order,"):
            continue
        folder = Path(config.out) / "traces" / cell.name.replace(", ", "-").replace(" ", "_")
        rows += rows_of(cell.name, profile(cell, folder), config.shown)
    leave(
        config, "Kernels of an exact meta-gradient",
        f"One run of each on {jax.devices()[0].device_kind}, {config.dtype}.",
        rows, statistics.summarise(rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
