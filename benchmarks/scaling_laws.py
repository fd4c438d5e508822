"""How the cost of second order grows: with inner steps, parameters, sequence length and tasks.

Memory and FLOPs are compiled, time is measured; exponents are fitted on logarithms, and beside each
stands the physical floor, so that the distance to it is a number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from benchmarks.pieces import CostConfig, Rows, piece, show
from experiments._shared import record
from jmeta import cost
from jmeta.core.steps import block_length
from jmeta.core.types import Episode, MetaGradient, Problem
from jmeta.methods.maml import learned_start
from jmeta.models import transformer
from jmeta.runtime import config as configuration
from jmeta.runtime import report, statistics

Axis = Literal["inner steps", "parameters", "tokens", "tasks"]
METHODS: dict[str, Callable[[Problem, int], MetaGradient]] = {
    "first_order": jmeta.first_order,
    "mixed_mode": lambda problem, steps: jmeta.mixed_mode(problem, steps, remat="step"),
    "mixed_mode nested": lambda problem, steps: jmeta.mixed_mode(problem, steps, remat="nested"),
    "unrolled": jmeta.unrolled,
}
# Passes over the network, in units of F, the FLOPs of one forward pass: of an inner step, in all.
FLOOR = {"first_order": 3, "unrolled": 9, "mixed_mode": 12, "mixed_mode nested": 12}
RATE = "flop/s"


class Size(NamedTuple):
    """One point: all that is varied, one at a time."""

    steps: int = 8
    width: int = 64
    tokens: int = 32
    tasks: int = 1


SWEEPS: dict[Axis, tuple[Size, ...]] = {
    "inner steps": tuple(Size(steps=n) for n in (1, 2, 4, 8, 16, 32, 64, 128)),
    "parameters": tuple(Size(width=n) for n in (32, 64, 128, 256)),
    "tokens": tuple(Size(tokens=n) for n in (16, 32, 64, 128, 256)),
    "tasks": tuple(Size(tasks=n) for n in (1, 2, 4, 8, 16)),
}
QUICK: dict[Axis, tuple[Size, ...]] = {
    "inner steps": tuple(Size(steps=n) for n in (4, 16, 64)),
    "parameters": tuple(Size(width=n) for n in (32, 64, 128)),
    "tokens": tuple(Size(tokens=n) for n in (16, 32, 64)),
    "tasks": tuple(Size(tasks=n) for n in (1, 4)),
}


@dataclasses.dataclass(frozen=True)
class Config(CostConfig):
    """Scaling laws of the meta-gradient."""

    axes: tuple[Axis, ...] = ("inner steps", "parameters", "tokens", "tasks")
    """Which are measured now; those kept in the run directory stay."""
    repeats: int = 5
    """Timed runs of each point, in turns; 0 compiles only."""
    quick: bool = False
    """Fewer points."""


PRESETS = {
    "paper": Config(),
    "quick": Config(repeats=3, quick=True),
    "smoke": Config(axes=("tasks",), repeats=1, quick=True),
}


class Point(NamedTuple):
    """A problem of one size, and the physical quantities that bound its cost."""

    problem: Problem
    meta: Any
    episode: Episode
    forward: float
    fast_bytes: int
    parameters: int


def point(size: Size) -> Point:
    """A decoder of two layers, vocabulary 256, two texts a batch, SGD inside."""
    config = transformer.TransformerConfig(
        vocab=256, width=size.width, layers=2, heads=4, max_len=size.tokens, loop="unroll"
    )
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(params: Any, tokens: jax.Array, key: Any):
        return transformer.next_token_loss(config, params, tokens, key=key)

    lead = () if size.tasks == 1 else (size.tasks,)
    texts = [jax.random.randint(k, (*lead, 2, size.tokens), 0, 256) for k in keys[:2]]
    problem = learned_start(loss, optax.sgd(0.1))
    meta = transformer.init(config, keys[2])
    one = texts[0] if size.tasks == 1 else texts[0][0]
    forward = cost.flops(jax.make_jaxpr(lambda p: loss(p, one, None)[0])(meta))
    count = sum(leaf.size for leaf in jax.tree.leaves(meta))
    fast = cost.fast_bytes(problem, meta)
    return Point(problem, meta, Episode(*texts), forward, fast, count)


def amount(axis: Axis, size: Size, made: Point) -> int:
    """Where a point lies on its axis."""
    return {"inner steps": size.steps, "parameters": made.parameters, "tokens": size.tokens,
            "tasks": size.tasks}[axis]  # fmt: skip


def floor(method: str, metric: str, size: Size, made: Point) -> float | None:
    r"""The least memory or work that a method of this kind can cost.

    .. math:: \text{FLOPs} = N (c T + 3) F, \qquad \text{bytes} = N (T - 1) |\theta|

    with ``c`` 3 for first order, 9 for second order with everything saved, 12 with each step's
    forward and backward pass computed again. Nested loops of blocks of ``b`` steps keep the weights
    at which blocks begin and those of one block, :math:`\lceil T / b \rceil + b - 2` sets, and
    take the first ``b - 1`` steps of every block but the last once more.

    Args:
        method: of ``METHODS``.
        metric: ``temp_bytes`` or ``flops``.
        size: of the point.
        made: the point.

    Returns:
        The floor, or None where there is none: what first order keeps need not grow.
    """
    block = block_length(size.steps)
    blocks = math.ceil(size.steps / block)
    again = 3 * (blocks - 1) * (block - 1) if method == "mixed_mode nested" else 0
    if metric == "flops":
        return size.tasks * (FLOOR[method] * size.steps + again + 3) * made.forward
    sets = {"mixed_mode": size.steps - 1, "mixed_mode nested": blocks + block - 2}
    kept = sets.get(method, 0) * size.tasks * made.fast_bytes
    return kept or None


def matmul_rate() -> float:
    """FLOP per second of a large float32 matmul on this machine, the best of ten."""
    a = jnp.ones((1024, 1024))
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    seconds = cost.interleave(
        {"matmul": cost.Program(lambda m, e: multiply(m, m), 0, 0.0, 0.0, 0.0)},
        {"matmul": (a, Episode(None))},
        10,
    )[0]["matmul"]
    return 2 * 1024**3 / min(seconds)


def measure(axis: Axis, sizes: Sequence[Size], repeats: int) -> Rows:
    """All methods at all points of an axis: compiled, then timed in turns."""
    jax.config.update("jax_enable_compilation_cache", False)
    points = {size: point(size) for size in sizes}
    programs: dict[tuple[str, Size], cost.Program] = {}
    for size, made in points.items():
        for name, build in METHODS.items():
            mg = build(made.problem, size.steps)
            mg = mg if size.tasks == 1 else jmeta.over_tasks(mg)
            programs[name, size] = cost.compile_estimate(mg, made.meta, made.episode)
    named = {f"{name}/{i}": program for i, ((name, _), program) in enumerate(programs.items())}
    inputs = {
        key: (points[size].meta, points[size].episode)
        for key, (_, size) in zip(named, programs, strict=True)
    }
    seconds, _ = cost.interleave(named, inputs, repeats)
    rate = matmul_rate()
    rows: Rows = [{"method": "matmul", "seed": 0, "metric": RATE, "value": rate, "axis": axis}]
    for ((name, size), program), key in zip(programs.items(), named, strict=True):
        made = points[size]
        found = {"temp_bytes": program.temp_bytes, "flops": program.flops}
        if repeats:
            found["median seconds"] = cost.median(seconds[key])
        shared = {"method": name, "seed": 0, "axis": axis, "at": amount(axis, size, made)}
        rows += [shared | {"metric": metric, "value": value} for metric, value in found.items()]
        for metric in ("temp_bytes", "flops"):
            bound = floor(name, metric, size, made)
            if bound is not None:
                rows.append(shared | {"metric": f"{metric}, floor", "value": bound})
    return rows


def time_floors(rows: Rows) -> Rows:
    """The least time of every point that was timed: its FLOPs at the best rate of a large matmul.

    The best of all axes: a machine that others use is at times a third as fast as it can be.

    Args:
        rows: of ``measure``, of any axes.

    Returns:
        Further rows.
    """
    rate = max((row["value"] for row in rows if row["metric"] == RATE), default=math.nan)
    timed = {(r["axis"], r["method"], r["at"]) for r in rows if r["metric"] == "median seconds"}
    return [
        row | {"metric": "median seconds, floor", "value": row["value"] / rate}
        for row in rows
        if row["metric"] == "flops, floor" and (row["axis"], row["method"], row["at"]) in timed
    ]


def exponent(x: Sequence[float], y: Sequence[float]) -> statistics.Interval:
    r"""The slope of :math:`\log y` on :math:`\log x` by least squares, with its 95 % interval.

    Args:
        x: positive numbers.
        y: positive numbers.

    Returns:
        ``Interval(slope, half width or None for two points, n)``.
    """
    a, b = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    centred = a - a.mean()
    slope = float(centred @ b / (centred @ centred))
    if len(a) < 3:
        return statistics.Interval(slope, None, len(a))
    from scipy.special import stdtrit

    left = b - b.mean() - slope * centred
    error = math.sqrt(float(left @ left) / (len(a) - 2) / float(centred @ centred))
    return statistics.Interval(slope, float(stdtrit(len(a) - 2, 0.975)) * error, len(a))


def curves(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[float, float]]:
    """``{(axis, method, metric): {at: value}}``."""
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for row in rows:
        if "at" in row:
            key = row["axis"], row["method"], row["metric"]
            found.setdefault(key, {})[row["at"]] = row["value"]
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Fitted exponents, and how far the largest point of each axis is from the floor.

    Args:
        rows: of ``measure``, with those of ``time_floors``.

    Returns:
        A Markdown table.
    """
    found = curves(rows)
    axes = list(dict.fromkeys(axis for axis, _, _ in found))
    lines = [
        "| against | method | time | memory | FLOPs | time / floor | memory / floor "
        "| FLOPs / floor |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for axis in axes:
        for method in METHODS:
            cells = []
            for metric in ("median seconds", "temp_bytes", "flops"):
                curve = found.get((axis, method, metric), {})
                if len(curve) < 2:
                    cells.append("")
                    continue
                slope = exponent(list(curve), list(curve.values()))
                cells.append(report.format_interval(slope.mean, slope.half_width))
            for metric in ("median seconds", "temp_bytes", "flops"):
                curve = found.get((axis, method, metric), {})
                bound = found.get((axis, method, f"{metric}, floor"), {})
                last = max(set(curve) & set(bound), default=None)
                cells.append("" if last is None else f"{curve[last] / bound[last]:.2f}")
            lines.append(f"| {axis} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(number: float) -> str:
    """A number as an axis has room for it: 128, 35k, 1.7M.

    Args:
        number: not negative.

    Returns:
        At most three digits and a unit.
    """
    if number < 1000:
        return f"{number:g}"
    return f"{number / 1000:.0f}k" if number < 999_500 else f"{number / 1e6:.1f}M"


def figure(rows: Sequence[dict[str, Any]], path: Path) -> tuple[Path, Path]:
    """Time and memory against each axis, on logarithmic scales; the floor of mixed mode dashed."""
    from jmeta.runtime.drawing import PALETTE, panels, save, style

    found = curves(rows)
    axes_named = list(dict.fromkeys(axis for axis, _, _ in found))
    shown = [metric for metric in ("median seconds", "temp_bytes")
             if any(key[2] == metric for key in found)]  # fmt: skip
    titles = {"median seconds": "seconds", "temp_bytes": "temporary MiB"}
    with style():
        drawn, all_axes = panels(3.1 * len(axes_named) + 0.8, 2.6 * len(shown) + 0.9, 1)
        all_axes[0].remove()
        grid = drawn.subplots(len(shown), len(axes_named), squeeze=False)
        for (row, column), axes in np.ndenumerate(grid):
            metric, axis = shown[row], axes_named[column]
            unit = 2**20 if metric == "temp_bytes" else 1
            for index, method in enumerate(METHODS):
                curve = found.get((axis, method, metric), {})
                values = [value / unit for value in curve.values()]
                axes.plot(list(curve), values, "o-", color=PALETTE[index], label=method)
            bound = found.get((axis, "mixed_mode", f"{metric}, floor"), {})
            if bound:
                values = [value / unit for value in bound.values()]
                label = "floor of mixed_mode"
                axes.plot(list(bound), values, "--", color="#777777", label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            at = list(found.get((axis, next(iter(METHODS)), metric), {}))
            axes.set_xticks(at, [short(x) for x in at])
            axes.set_xticks([], minor=True)  # whose labels would cover one another
            axes.set_xlabel(axis if row == len(shown) - 1 else "")
            axes.set_ylabel(titles[metric] if column == 0 else "")
        labels = grid[0, 0].get_legend_handles_labels()
        drawn.legend(*labels, loc="outside lower center", ncols=5, frameon=False)
        return save(drawn, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    out = Path(config.out)
    record(config, "axes")
    rows: Rows = []
    for axis, sizes in (QUICK if config.quick else SWEEPS).items():
        rows += piece(
            out, axis.replace(" ", "-"),
            lambda axis=axis, sizes=sizes: measure(axis, sizes, config.repeats),
            wanted=axis in config.axes, resume=config.resume,
        )  # fmt: skip
    rows += time_floors(rows)
    summary = statistics.summarise(rows)
    report.write_results(out, rows, summary)
    text = table(rows)
    show(out, "scaling_laws", text)
    picture = figure(rows, out / "scaling_laws")
    report.write_report(
        out, "How second order grows", "A decoder of two layers; exponents of power laws.",
        config, summary, {"Time and memory": picture},
    )  # fmt: skip


if __name__ == "__main__":
    main()
