"""Know before you rent: ``python -m jmeta.cost --topology v5e:16x16 --model gpt2-124m``.

Compiles the sharded meta step of each estimator, prints what it costs per device and which fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from jmeta.cost.planner import check_estimator, plan
from jmeta.cost.rows import Row, as_json, plan_markdown
from jmeta.cost.shapes import MODELS

NAMED = "jmeta.cost.shapes:setting"
# What NAMED is given of the command line, and what each is by default.
OF_MODEL = {"sequences": 8, "tokens": 512, "compute": None, "weights": "float32"}
FULL, LEAN = "unrolled", ("unrolled step", "mixed_mode", "mixed_mode nested")


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(prog="python -m jmeta.cost", description=__doc__)
    add = made.add_argument
    add("--topology", default="local", help="v5e:2x4, v5p:4x4x4, ...; local: the devices here")
    add("--memory", help="per device, such as 16GiB; default: what the compiler says")
    add("--model", choices=sorted(MODELS), help="plan for a model of this shape")
    add("--problem", metavar="MODULE:FUNCTION", help="or for what this function returns")
    add("--option", action="append", default=[], metavar="NAME=VALUE",
        help="a keyword argument of the function, JSON or a word; may be repeated")  # fmt: skip
    add("--steps", type=int, default=5, help="inner steps")
    add("--sequences", type=int, help="in a batch of a task; default 8 (with --model)")
    add("--tokens", type=int, help="of each sequence; default 512 (with --model)")
    add("--compute", help="dtype that blocks compute in, such as bfloat16 (with --model)")
    add("--weights", help="dtype of the fast weights; default float32 (with --model)")
    add("--tasks", type=int, help="in one outer step, in all; default: one for each device")
    add("--microbatch", type=int, help="tasks that a device maps together; default: all its own")
    add(
        "--estimator",
        action="append",
        metavar="NAME",
        help="as in cost.estimators, or 'mixed_mode offload'; repeatable",
    )
    add("--mesh", action="append", metavar="tasks=4,fsdp=4", help="one may be -1; repeatable")
    add("--outer", default="adam", help="the outer optimizer: adam, adamw, sgd")
    add("--json", metavar="FILE", help="write the rows there too")
    return made


def mesh_of(text: str) -> dict[str, int]:
    """A mesh as it is written on the command line.

    Args:
        text: such as ``tasks=4,fsdp=-1``.

    Returns:
        Sizes of axes.

    Raises:
        ValueError: it is of another form.

    Example:
        >>> mesh_of("tasks=4,fsdp=-1")
        {'tasks': 4, 'fsdp': -1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() in sizes:
            raise ValueError(f"{text!r} names {axis.strip()} twice")
        try:
            sizes[axis.strip()] = int(size)
        except ValueError:
            raise ValueError(f"{text!r} is no mesh; write tasks=4,fsdp=-1") from None
    # What is not said is not split, but for the tasks, which take what is left.
    return sizes if "tasks" in sizes or -1 in sizes.values() else {"tasks": -1, **sizes}


def option_of(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` as a keyword argument: JSON where it is, else a word.

    Example:
        >>> option_of("layers=4"), option_of("block_remat=full")
        (('layers', 4), ('block_remat', 'full'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is no option; write NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def rows_of(asked: argparse.Namespace) -> list[Row]:
    """Compile what the command asks for, a row at a time."""
    if (asked.model is None) == (asked.problem is None):
        raise ValueError("say what to plan for: --model NAME or --problem MODULE:FUNCTION")
    of_model = {name: getattr(asked, name) for name in OF_MODEL}
    given = {name: value for name, value in of_model.items() if value is not None}
    if asked.model is None and given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(
            f"{flags}: these are of --model; what --problem's function is given is said by "
            "--option NAME=VALUE"
        )
    options = dict(map(option_of, asked.option))
    meshes = [mesh_of(text) for text in asked.mesh or ["tasks=-1"]]
    names = asked.estimator or [FULL, *LEAN]
    for name in names:  # each is compiled for minutes
        check_estimator(name)
    common: dict[str, Any] = {
        "steps": asked.steps, "topology": asked.topology, "memory": asked.memory,
        "meshes": meshes, "tasks": asked.tasks, "microbatch": asked.microbatch,
        "outer": asked.outer, "report": announce,
    }  # fmt: skip
    if asked.model is None:
        return plan(asked.problem, names=names, options=options, **common)
    shape = {
        "model": asked.model, "steps": asked.steps, **OF_MODEL, **given,
    }  # fmt: skip
    rows = []
    for name in names:
        # Naive reverse mode is what one gets who does nothing about memory.
        block = {"block_remat": "none" if name == FULL else "full"}
        rows += plan(NAMED, names=[name], options=shape | block | options, **common)
    return rows


def announce(row: Row) -> None:
    """Say that a row is there, on standard error: compiling takes minutes."""
    what = row.note or f"{row.bytes / 2**30:.2f} GiB of {row.usable_bytes / 2**30:.2f}"
    print(f"{row.candidate.estimator}: {what} ({row.seconds:.0f} s)", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; errors of the user are one sentence on standard error."""
    asked = parser().parse_args(argv)
    try:
        rows = rows_of(asked)
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(plan_markdown(rows))
    if asked.json:
        from jmeta.files import write_atomically

        content = json.dumps([as_json(row) for row in rows], indent=1)
        try:
            write_atomically(asked.json, content + "\n")
        except OSError as error:
            print(f"--json {asked.json} cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
