"""The communication of a compiled program: which collectives, how many bytes, how often.

Read from the text of the optimised HLO, loops multiplied out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # others carry their number

_COMPUTATION = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation|called_computations"
    r"|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_WHILE = re.compile(r"\b(condition|body)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LISTED = re.compile(r"replica_groups=\{\{([0-9,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=")
_MESH = re.compile(r"replica_groups=@?\w*mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_USED = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_REPLICAS = re.compile(r"\breplica_count=(\d+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CONSTANT = re.compile(r"\bconstant\((-?\d+)\)")


class Collective(NamedTuple):
    """One communication of a compiled program.

    Attributes:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``,
            ``collective-permute``, ...
        bytes: of the whole array that takes part, on one device, each time: the operand of a
            reduction, the result of a gather.
        devices: how many devices exchange it with one another.
        times: how often it runs in one call of the program, loops multiplied out; a loop of
            unknown length counts once.
        looped: whether it is inside a loop.
        shapes: the arrays it yields, such as ``f32[2,3]``.
        name: the instruction's ``op_name``, which tells where in the program it comes from.
    """

    kind: str
    bytes: int
    devices: int
    times: int
    looped: bool
    shapes: tuple[str, ...]
    name: str


class _Instruction(NamedTuple):
    name: str
    shapes: tuple[str, ...]
    opcode: str
    rest: str
    line: str


def collectives(text: str) -> list[Collective]:
    """The communication of a compiled program.

    Args:
        text: ``compiled.as_text()``.

    Returns:
        One ``Collective`` for each instruction that moves data between devices, in the order of
        the program; an instruction that is called from two places is there twice.

    Raises:
        ValueError: the text is no HLO module.

    Example:
        >>> text = '''HloModule jit_f, num_partitions=8
        ... ENTRY %main (x: f32[4]) -> f32[4] {
        ...   %x = f32[4]{0} parameter(0)
        ...   ROOT %sum = f32[4]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
        ... }'''
        >>> [(c.kind, c.bytes, c.devices, c.looped) for c in collectives(text)]
        [('all-reduce', 16, 4, False)]
    """
    entry, bodies = _computations(text)
    everyone = math.prod(
        int(found[1]) for found in (_PARTITIONS.search(text), _REPLICAS.search(text)) if found
    )
    return list(_walk(bodies, entry, everyone, times=1, looped=False))


def wire_bytes(collective: Collective) -> float:
    r"""What one device sends for a collective, by the ring algorithm, all its runs together.

    .. math:: \text{all-reduce: } 2 \frac{n-1}{n} B, \qquad
        \text{gather, scatter, all-to-all: } \frac{n-1}{n} B, \qquad \text{permute: } B

    Args:
        collective: of ``collectives``.

    Returns:
        Bytes.

    Example:
        >>> wire_bytes(Collective("all-reduce", 100, 4, 2, True, ("f32[25]",), ""))
        300.0
    """
    share = (collective.devices - 1) / max(collective.devices, 1)
    factor = {
        "all-reduce": 2 * share,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }.get(collective.kind, share)
    return factor * collective.bytes * collective.times


def _computations(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """The name of the entry, and the instructions of every computation."""
    bodies: dict[str, list[_Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and " = " not in line.partition("(")[0]:
            current = header[2]
            bodies[current] = []
            entry = current if header[1] else entry
        elif line.strip() == "}":
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            bodies[current].append(_instruction(found[1], found[2], line))
    if entry is None:
        raise ValueError(
            "this text is no HLO module, it has no ENTRY computation; pass compiled.as_text()"
        )
    return entry, bodies


def _instruction(name: str, tail: str, line: str) -> _Instruction:
    """Split ``TYPE opcode(operands), attributes``; a tuple's type has parentheses of its own."""
    end = _closing(tail) + 1 if tail.startswith("(") else tail.find(" ")
    kind, rest = tail[:end], tail[end:].lstrip()
    shapes = tuple(found[0] for found in _SHAPE.finditer(kind))
    return _Instruction(name, shapes, rest.partition("(")[0].strip(), rest, line)


def _closing(text: str) -> int:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    return len(text)


def _walk(
    bodies: dict[str, list[_Instruction]], name: str, everyone: int, times: int, looped: bool
) -> Iterator[Collective]:
    begun: set[str] = set()
    for instruction in bodies.get(name, ()):
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(kind, instruction, everyone, times, looped)
        elif instruction.opcode == "while":
            parts = dict(_WHILE.findall(instruction.rest))
            trips = _trips(instruction, bodies.get(parts["condition"], ()))
            yield from _walk(bodies, parts["body"], everyone, times * trips, True)
        else:
            for called in _called(instruction):
                channels = {c for i in bodies.get(called, ()) for c in _CHANNEL.findall(i.rest)}
                if instruction.opcode == "fusion" and channels and channels <= begun:
                    continue  # a TPU fusion that carries on, or ends, what another has begun
                begun |= channels
                inside = _walk(bodies, called, everyone, times, looped)
                if instruction.opcode == "fusion" and "all-reduce-scatter" in called:
                    # The TPU's reduce-scatter: a fusion that keeps a slice of an all-reduce.
                    inside = (each._replace(kind="reduce-scatter") for each in inside)
                yield from inside


def _called(instruction: _Instruction) -> list[str]:
    names = []
    for several, one in _CALLED.findall(instruction.rest):
        names += [one] if one else [each.strip().lstrip("%") for each in several.split(",")]
    return names


def _collective(
    kind: str, instruction: _Instruction, everyone: int, times: int, looped: bool
) -> Collective:
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # An asynchronous start yields its operands, its results, and perhaps scalars for itself.
        arrays = [s for s in shapes if not (s.startswith(("u32[]", "s32[]")) and len(shapes) > 2)]
        shapes = tuple(arrays[len(arrays) // 2 :])
    devices = _group(instruction.rest, everyone)
    size = sum(map(shape_bytes, shapes)) * (devices if kind == "reduce-scatter" else 1)
    origin = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, size, devices, times, looped, shapes, origin[1] if origin else "")


def shape_bytes(shape: str) -> int:
    """The size of an array in HLO's notation, without padding.

    Args:
        shape: such as ``f32[2,3]``.

    Returns:
        Bytes.

    Example:
        >>> shape_bytes("bf16[3,5]"), shape_bytes("pred[]"), shape_bytes("s4[10]")
        (30, 1, 5)
    """
    found = _SHAPE.fullmatch(shape)
    if found is None:
        raise ValueError(f"{shape!r} is no HLO shape; an example is f32[2,3]")
    number = re.search(r"\d+", found[1])
    bits = BITS[found[1]] if found[1] in BITS else int(number[0]) if number else 0
    count = math.prod(int(d.removeprefix("<=")) for d in found[2].split(",") if d)
    return -(-count * bits // 8)


def _group(attributes: str, everyone: int) -> int:
    """How many devices are in one group, in any of HLO's notations; where it is empty, all."""
    if listed := _LISTED.search(attributes):
        return len(listed[1].split(","))
    if iota := _IOTA.search(attributes):
        return int(iota[1].split(",")[-1])
    if mesh := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in _AXIS.findall(mesh[1])}
        return math.prod(
            int(part) if part else sizes[name] for name, _, part in _USED.findall(mesh[2])
        )
    return everyone


def _trips(loop: _Instruction, condition: tuple[_Instruction, ...] | list[_Instruction]) -> int:
    """How often a loop runs: as XLA notes it, or the constant its counter is compared with."""
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    compared = [i for i in condition if "direction=LT" in i.rest or "pred[]" in i.shapes]
    constants = [int(c[1]) for i in condition if (c := _CONSTANT.search(i.rest))]
    return constants[0] if compared and len(constants) == 1 and constants[0] > 0 else 1
