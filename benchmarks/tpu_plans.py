"""What the real TPU compiler says of meta-training GPT-2 and BERT shapes, without a TPU.

Compiles one program after the other, minutes each, and keeps every plan in plans.json as soon as it
is there; ``--resume`` goes on where the last run ended.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pieces import CostConfig, Rows, leave
from experiments._shared import record
from jmeta.cost.planner import in_a_child
from jmeta.cost.rows import Candidate, Row, as_json, mesh_name, row_from, sent
from jmeta.cost.topology import require_libtpu
from jmeta.files import write_atomically
from jmeta.runtime import config as configuration
from jmeta.runtime import statistics

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
        part: of ``PARTS``.
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


PARTS = ("fits", "traffic", "table")


@dataclasses.dataclass(frozen=True)
class Config(CostConfig):
    """Plans of the TPU compiler."""

    parts: tuple[str, ...] = PARTS
    """What is compiled now; other plans that the run directory holds stay."""
    match: str = ""
    """Only cells whose title holds this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted({*self.parts} - {*PARTS}):
            raise ValueError(f"parts {', '.join(unknown)}: known are {', '.join(PARTS)}")


PRESETS = {
    "paper": Config(),
    "smoke": Config(parts=("traffic",), match="first_order"),
}


class Plan(NamedTuple):
    """A cell that was compiled.

    Attributes:
        part: of the benchmark.
        method: what the tables call it.
        key: as of ``key_of``.
        row: what the compiler said.
    """

    part: str
    method: str
    key: str
    row: Row


def read(path: Path) -> list[Plan]:
    """The plans that a file holds; none where there is no file."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Plan(**{**each, "row": row_from(each["row"])}) for each in content]


def write(path: Path, plans: Sequence[Plan]) -> None:
    """The plans, one on each line."""
    lines = [json.dumps(plan._asdict() | {"row": as_json(plan.row)}) for plan in plans]
    write_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n")


def rows_of(plan: Plan) -> Rows:
    """A plan as numbers: GiB a chip, and where there is a program, TFLOP and GiB sent by a chip."""
    row, c = plan.row, plan.row.candidate
    shared = {
        "method": plan.method, "seed": 0, "part": plan.part, "topology": row.topology,
        "model": c.options["model"], "mesh": mesh_name(c.mesh), "tasks": c.tasks,
        "microbatch": c.microbatch, "fits": row.fits,
    }  # fmt: skip
    values = {"GiB, at the least" if not row.temp_bytes else "GiB": row.bytes / 2**30}
    if row.temp_bytes:
        values |= {"TFLOP": row.flops / 1e12, "GiB sent": sent(row) / 2**30}
    return [shared | {"metric": metric, "value": value} for metric, value in values.items()]


def compile_cell(one: Cell, known: Sequence[Plan]) -> Row:
    """What the compiler says of a cell, or has said of the same program in another part."""
    same = next((plan.row for plan in known if plan.key == key_of(one)), None)
    return same or in_a_child(SETTING, one.candidate, steps=STEPS, topology=one.topology)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile what is wanted, and report all that is kept."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    require_libtpu()
    record(config, "parts", "match")
    file = Path(config.out) / "plans.json"
    plans = read(file)
    known = list(plans) if config.resume else []  # what need not be compiled again
    for one in cells():
        chosen = one.part in config.parts and config.match in title_of(one)
        old = [plan for plan in plans if (plan.part, plan.key) == (one.part, key_of(one))]
        if not chosen or (old and config.resume):
            continue
        row = compile_cell(one, known)
        what = row.note or f"{row.bytes / 2**30:.2f} of {row.usable_bytes / 2**30:.2f} GiB"
        print(f"{title_of(one)}: {what} ({row.seconds:.0f} s)", flush=True)
        if math.isnan(row.flops):  # no answer of the compiler's
            continue
        known.append(Plan(one.part, one.method, key_of(one), row))
        plans = [*(plan for plan in plans if plan not in old), known[-1]]
        write(file, plans)
    rows = [row for plan in plans for row in rows_of(plan)]
    leave(
        config, "Meta-training under the TPU compiler",
        "What it plans on every chip, compiled ahead of time without one.",
        rows, statistics.summarise(rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
