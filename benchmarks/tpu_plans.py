"""What the real TPU compiler says of meta-training GPT-2 and BERT shapes, without a TPU.

Compiles one program after the other, minutes each, and keeps every row as soon as it is there, so
that a run goes on where the last one ended: `python -m benchmarks.tpu_plans --out runs/tpu_plans`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jmeta.cost.planner import in_a_child
from jmeta.cost.rows import Candidate, Row, as_json, mesh_name, row_from
from jmeta.cost.topology import require_libtpu
from jmeta.files import write_atomically
from jmeta.runtime.provenance import command_of, versions

SETTING = "jmeta.cost.shapes:setting"
STEPS = 5

# What a table calls a method: the estimator, and what the blocks of the model recompute.
METHODS = {
    "naive": ("unrolled", "none"),
    "remat": ("unrolled step", "full"),
    "mixed mode": ("mixed_mode", "full"),
    "nested": ("mixed_mode nested", "full"),
}
EVERY = ("first_order", "mixed_mode", "mixed_mode nested", "unrolled", "unrolled step", "reptile")
BATCH = {"sequences": 8, "tokens": 512}

# The mesh of a model on a topology: whole tasks on each chip while they fit, then the training
# state over fsdp, then the weights of a task over tensor.
WHOLE = {"tasks": -1}
MESHES: dict[str, dict[str, dict[str, int]]] = {
    "v5e:16x16": {
        "gpt2-355m": {"tasks": 32, "fsdp": 8},
        "bert-large": {"tasks": 32, "fsdp": 8},
        "gpt2-774m": {"tasks": 16, "fsdp": 4, "tensor": 4},
    },
    "v5e:2x4": {
        "gpt2-355m": {"fsdp": 8},
        "bert-large": {"fsdp": 8},
        "gpt2-774m": {"fsdp": 2, "tensor": 4},
    },
    "v5p:4x4x4": {"gpt2-774m": {"tasks": 16, "fsdp": 4}},
}
CHIPS = {"v5e:2x2": 4, "v5e:2x4": 8, "v5e:4x4": 16, "v5e:16x16": 256, "v5p:4x4x4": 64}


class Cell(NamedTuple):
    """One program of the benchmark.

    Attributes:
        part: ``traffic``, ``fits`` or ``table``.
        method: what the tables call it.
        topology: that it is compiled for.
        candidate: how it runs.
    """

    part: str
    method: str
    topology: str
    candidate: Candidate


def cell(
    part: str, model: str, topology: str, method: str, mesh: dict[str, int], **options: Any
) -> Cell:
    """A method on a model, one task of 8 x 512 tokens for each chip, one at a time."""
    estimator, block = METHODS[method]
    chosen = BATCH | {"model": model, "steps": STEPS, "block_remat": block} | options
    mesh = {"tasks": 1, **mesh}
    return Cell(part, method, topology, Candidate(estimator, mesh, CHIPS[topology], 1, "adam",
                                                  chosen))  # fmt: skip


def cells() -> Iterator[Cell]:
    """Every program, the most wanted first."""
    whole, split = ("gpt2-124m", "v5e:16x16"), ("gpt2-774m", "v5e:4x4")
    for method in ("naive", "mixed mode"):
        yield cell("fits", *whole, method, WHOLE)
        yield cell("fits", *split, method, {"fsdp": 4, "tensor": 4})
    for name in EVERY:
        for tasks, microbatch in ((256, None), (512, 1)):
            options = {"model": "tiny", "sequences": 2, "tokens": 64, "steps": STEPS,
                       "block_remat": "full"}  # fmt: skip
            yield Cell("traffic", name, "v5e:16x16",
                       Candidate(name, WHOLE, tasks, microbatch, "adam", options))  # fmt: skip
    models = ("gpt2-124m", "bert-base", "gpt2-355m", "bert-large", "gpt2-774m")
    for method in ("naive", "mixed mode", "nested", "remat"):
        for topology, meshes in MESHES.items():
            for model in models:
                yield cell("table", model, topology, method, meshes.get(model, WHOLE))
    yield cell("fits", *whole, "nested", WHOLE)
    yield cell("fits", *split, "nested", {"fsdp": 4, "tensor": 4})


def key_of(one: Cell) -> str:
    """What tells a cell from the others of its part, and finds a row that is already there."""
    c = one.candidate
    return json.dumps([one.topology, *c], sort_keys=True)


def title_of(one: Cell) -> str:
    """A cell in words."""
    c = one.candidate
    return f"{one.topology} {c.options['model']} {one.method}, {mesh_name(c.mesh)}"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there: each a cell's words and the planner's row."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def write(path: Path, rows: Sequence[dict[str, Any]], command: str) -> None:
    """The rows, one on each line, and beside them the command and what compiled them."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_atomically(path, f'{{"rows": [\n{lines}\n]}}\n')
    run = {
        "command": command,
        "devices": "none: compiled ahead of time",
        "versions": versions() | {"libtpu": importlib.metadata.version("libtpu")},
    }
    write_atomically(path.with_suffix(".run.json"), json.dumps(run, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Compile what is not there yet."""
    asked = argparse.ArgumentParser(prog="python -m benchmarks.tpu_plans", description=__doc__)
    asked.add_argument("--out", default="runs/tpu_plans", help="folder of results.json")
    asked.add_argument("--part", action="append", help="traffic, fits, table; default: all")
    asked.add_argument("--match", default="", help="only cells whose title holds this")
    given = asked.parse_args(argv)
    require_libtpu()
    path = Path(given.out) / "results.json"
    rows = read(path)
    done = {row["key"]: row for row in rows}
    for one in cells():
        chosen = one.part in (given.part or (one.part,)) and given.match in title_of(one)
        if not chosen or any(row["key"] == key_of(one) and row["part"] == one.part for row in rows):
            continue
        known = done.get(key_of(one))  # of another part: the same program
        row: Row = (
            row_from(known["row"])
            if known
            else in_a_child(SETTING, one.candidate, steps=STEPS, topology=one.topology)
        )
        what = row.note or f"{row.bytes / 2**30:.2f} of {row.usable_bytes / 2**30:.2f} GiB"
        print(f"{title_of(one)}: {what} ({row.seconds:.0f} s)", flush=True)
        if math.isnan(row.flops):  # no answer of the compiler's
            continue
        entry = {"part": one.part, "method": one.method, "key": key_of(one), "row": as_json(row)}
        rows.append(entry)
        done[entry["key"]] = entry
        write(path, rows, command_of("benchmarks.tpu_plans", sys.argv[1:]))


if __name__ == "__main__":
    main()
