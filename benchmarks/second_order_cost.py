"""What second order costs: estimators x inner steps x model, interleaved, in several processes.

Seconds (median), XLA's temporary memory, FLOPs, compile seconds, and the gradient's error against
float64. Ratios are to first order, its cheapest variant by each measure in the same process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics as median_of
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

import jmeta
from benchmarks.pieces import keep_float32, leave
from benchmarks.second_order_problems import (
    DecoderConfig,
    Setting,
    classifier,
    decoder,
    regressor,
)
from jmeta import cost
from jmeta.core.steps import Remat
from jmeta.core.types import MetaGradient
from jmeta.runtime import config as configuration
from jmeta.runtime import figures, statistics

Model = Literal["mlp", "conv", "lm"]


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """What second order costs against first order."""

    model: Model = "lm"
    """mlp (sinusoid network), conv (few-shot images), lm (a 3.4M-parameter decoder)."""
    steps: tuple[int, ...] = (8,)
    """Numbers of inner steps that are timed."""
    repeats: int = 5
    """Timed runs of each cell, interleaved."""
    processes: int = 3
    """Processes that measure one after the other: where the arrays happen to lie decides 10 %."""
    compilers: int = 1
    """Programs compiled at a time; with more than one, their compile seconds mean nothing."""
    growth: bool = True
    """Also compile mixed mode at 16 and 64 inner steps and report how its memory grows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_decoder = ("dtype", "width", "layers", "heads", "vocab", "batch")
        if self.model == "mlp":
            of_decoder += ("small",)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = [name for name in of_decoder if getattr(self, name) != defaults[name]]
        if self.model != "lm" and changed:
            raise ValueError(
                f"{', '.join(changed)}: of the decoder, and this is model={self.model}: leave "
                "them out"
            )


PRESETS = {
    "lm": Config(),
    # 23M parameters and 2048 tokens a step: as much as fills a GPU, and reverse mode one of 80 GB.
    "gpu": Config(
        width=512,
        layers=6,
        heads=8,
        vocab=4096,
        batch=(8, 256),
        processes=1,
        repeats=10,
        compilers=8,
        growth=False,
        cells=(
            "mixed_mode",
            "mixed_mode, block remat",
            "mixed_mode, products kept",
            "mixed_mode, nested",
            "unrolled",
        ),
    ),
    "mlp": Config(model="mlp", steps=(1, 5, 10), repeats=15, growth=False),
    "conv": Config(model="conv", steps=(1, 5), repeats=5, growth=False),
    "smoke": Config(steps=(2,), repeats=1, processes=1, growth=False, small=True),
}


class Cell(NamedTuple):
    """One estimator on one variant."""

    name: str
    mg: MetaGradient
    setting: Setting


def cells(config: Config, steps: int) -> list[Cell]:
    """The cells of one table, those of them that are wanted."""
    if config.model == "lm":
        return wanted(decoder_cells(config, steps), config.cells)
    setting = regressor() if config.model == "mlp" else classifier(small=config.small)
    made = cost.estimators(setting.problem, steps)
    return wanted([Cell(name, mg, setting) for name, mg in made.items()], config.cells)


def wanted(every: list[Cell], chosen: Sequence[str]) -> list[Cell]:
    """The cells of these names and first order; all where none is named."""
    names = [cell.name for cell in every]
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(f"no rows named {', '.join(unknown)}: there are {'; '.join(names)}")
    return [c for c in every if c.name in (chosen or names) or c.name.startswith("first_order")]


def decoder_cells(config: DecoderConfig, steps: int) -> list[Cell]:
    """All rows of the decoder's table."""

    def lm(variant: str) -> Setting:
        return decoder(config, steps, variant)

    looped, scanned = lm("unroll/none"), lm("scan/none")
    dots, full = lm("scan/dots"), lm("scan/full")
    # Products over three widths and more: those that cost most for each float that is kept.
    long = jmeta.keep_products(3 * looped.meta["ln_f"]["scale"].size)
    # SGD's update is linear in the gradient: the "step" remat keeps the weights alone, for nothing.
    return [
        Cell("first_order", jmeta.first_order(looped.problem, steps), looped),
        Cell("first_order, block remat", jmeta.first_order(dots.problem, steps), dots),
        Cell("first_order, full block remat", jmeta.first_order(full.problem, steps), full),
        Cell("mixed_mode", jmeta.mixed_mode(looped.problem, steps, remat="step"), looped),
        Cell("mixed_mode, block remat", jmeta.mixed_mode(dots.problem, steps, remat="step"), dots),
        Cell(
            "mixed_mode, full block remat",
            jmeta.mixed_mode(full.problem, steps, remat="step"),
            full,
        ),
        Cell(
            "mixed_mode, products kept", jmeta.mixed_mode(looped.problem, steps, keep=long), looped
        ),
        Cell("mixed_mode, nested", jmeta.mixed_mode(dots.problem, steps, remat="nested"), dots),
        Cell("mixed_mode, rounded", jmeta.mixed_mode(dots.problem, steps, remat="rounded"), dots),
        Cell("unrolled", jmeta.unrolled(scanned.problem, steps), scanned),
        Cell("unrolled, layers looped", jmeta.unrolled(looped.problem, steps), looped),
        Cell("unrolled, step remat", jmeta.unrolled(full.problem, steps, remat="step"), full),
        Cell("reptile", jmeta.reptile(looped.problem, steps), looped),
    ]


def over_processes(config: Config, steps: int) -> list[dict[str, Any]]:
    """The rows of ``measure`` from fresh processes, one after the other; their number is a seed."""
    rows = []
    for process in range(config.processes):
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            rows += pool.submit(measure, config, steps, process).result()
    return rows


def measure(config: Config, steps: int, process: int) -> list[dict[str, Any]]:
    """Compile every cell, then run them in turns."""
    # A compile time that a cache has answered is not one.
    jax.config.update("jax_enable_compilation_cache", False)
    keep_float32(config.dtype)
    every = cells(config, steps)

    def compiled(c: Cell) -> cost.Program:
        program = cost.compile_estimate(c.mg, c.setting.meta, c.setting.episode)
        print(f"{c.name}: compiled in {program.compile_seconds:.0f} s", file=sys.stderr)
        return program

    with ThreadPoolExecutor(config.compilers) as pool:
        programs = dict(zip([c.name for c in every], pool.map(compiled, every), strict=True))
    exact = dataclasses.replace(config, dtype="float32")
    first = cells(exact, steps)[0].setting
    reference = cost.exact_reference(first.problem, steps, first.meta, first.episode)
    arguments = {c.name: (c.setting.meta, c.setting.episode) for c in every}
    seconds, errors = cost.interleave(programs, arguments, config.repeats, reference)
    base = [c.name for c in every if c.name.startswith("first_order")]
    cheapest = {
        "seconds": min(cost.median(seconds[name]) for name in base),
        "temp_bytes": min(programs[name].temp_bytes for name in base),
        "compile_seconds": min(programs[name].compile_seconds for name in base),
        "flops": min(programs[name].flops for name in base),
    }
    rows = []
    for name, program in programs.items():
        values = {
            "seconds": cost.median(seconds[name]),
            "temp_bytes": program.temp_bytes,
            "compile_seconds": program.compile_seconds,
            "flops": program.flops,
        }
        ratios = {f"{metric} x": values[metric] / max(cheapest[metric], 1) for metric in values}
        ratios["seconds x"] = values["seconds"] / cheapest["seconds"]
        ratios["compile_seconds x"] = values["compile_seconds"] / cheapest["compile_seconds"]
        found = values | ratios | {"error": errors[name]}
        for metric, value in found.items():
            row = {"method": name, "seed": process, "metric": metric, "model": config.model}
            row["steps"] = steps
            if metric == "seconds":
                rows.append(row | {"values": list(seconds[name])})
                metric = "median seconds"
            if name != "reptile" or metric != "error":  # Reptile estimates something else
                rows.append(row | {"metric": metric, "value": value})
    return rows


def growth(config: Config) -> list[dict[str, Any]]:
    """How the memory of mixed mode grows from 16 to 64 inner steps, compiled only."""
    jax.config.update("jax_enable_compilation_cache", False)

    def temp(steps: int, remat: Remat) -> int:
        setting = decoder(config, steps, "scan/dots")
        mg = jmeta.mixed_mode(setting.problem, steps, remat=remat)
        return cost.compile_estimate(mg, setting.meta, setting.episode).temp_bytes

    one = decoder(config, 1, "scan/dots")
    fast = cost.fast_bytes(one.problem, one.meta)
    few, many = temp(16, "step"), temp(64, "step")
    slope, nested = (many - few) / 48 / fast, temp(64, "nested") / many
    longest = temp(128, "nested") / temp(8, "nested")
    row = {"seed": 0, "model": config.model}
    return [
        row | {"method": "mixed_mode, block remat", "metric": "memory per step / fast weights",
               "value": slope, "steps": "16-64"},
        row | {"method": "mixed_mode, nested", "metric": "memory / un-nested",
               "value": nested, "steps": 64},
        row | {"method": "mixed_mode, nested", "metric": "memory at 128 steps / at 8",
               "value": longest, "steps": "8-128"},
    ]  # fmt: skip


JUDGED = ("mixed_mode, block remat", "unrolled", "mixed_mode, products kept", "mixed_mode, nested")


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bounds that the lm preset is held to, one sentence each."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "value" in row:
            found.setdefault((row["method"], row["metric"]), []).append(row["value"])
    value = {key: median_of.median(values) for key, values in found.items()}
    if not {name for name, _ in value}.issuperset(JUDGED):
        return []  # some were left out
    chosen, full, fast, lean = JUDGED

    def over(method: str, metric: str) -> float:
        pairs = zip(found[method, metric], found[full, metric], strict=True)
        return median_of.median(a / b for a, b in pairs)

    lines = [
        (chosen, "memory / unrolled without remat", over(chosen, "temp_bytes"), 0.09),
        (chosen, "memory / first order", value[chosen, "temp_bytes x"], 3.7),
        (chosen, "time / unrolled without remat", over(chosen, "median seconds"), 0.6),
        (chosen, "time / first order", value[chosen, "seconds x"], 3.3),
        (chosen, "compile time / first order", value[chosen, "compile_seconds x"], 3.0),
        (fast, "time / first order", value[fast, "seconds x"], 2.9),
        (fast, "time / unrolled without remat", over(fast, "median seconds"), 0.45),
        (lean, "memory / first order", value[lean, "temp_bytes x"], 3.0),
        (lean, "memory / unrolled without remat", over(lean, "temp_bytes"), 0.06),
        (lean, "time / first order", value[lean, "seconds x"], 4.2),
    ]
    if (key := (chosen, "memory per step / fast weights")) in value:
        lines.append((chosen, "memory per added step / fast weights", value[key], 1.1))
        found_nested = value[lean, "memory / un-nested"]
        lines.append((lean, "memory at 64 steps / un-nested", found_nested, 0.4))
        longest = value[lean, "memory at 128 steps / at 8"]
        lines.append((lean, "memory at 128 steps / at 8", longest, 3.0))
    return [
        f"{method}: {what} {got:.3f} (bar {bar}: {'holds' if got <= bar else 'MISSED'})"
        for method, what, got, bar in lines
    ]


def write(config: Config, rows: list[dict[str, Any]]) -> None:
    """Results, figures and the report."""
    out = Path(config.out)
    steps = max(config.steps) if config.model != "lm" else config.steps[0]
    summary = statistics.summarise(rows, baseline="first_order")
    shown = [row for row in rows if row["steps"] == steps and row["metric"] in
             ("median seconds", "temp_bytes")]  # fmt: skip
    picture = figures.cost_figure(
        out / "cost",
        shown,
        metrics={"median seconds": "time", "temp_bytes": "temporary memory"},
        title=f"{config.model}, {steps} inner steps",
    )
    # The bars are for one number of inner steps.
    held = config.model == "lm" and not config.small and len(config.steps) == 1
    notes = bars(rows) if held else []
    leave(
        config, "What second order costs",
        "Every estimator on the same arrays, compiled once in each process and run in turns.",
        rows, summary, notes=notes, pictures={"Time and memory against first order": picture},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    configuration.dump(config, Path(config.out))
    rows: list[dict[str, Any]] = []
    for steps in config.steps:
        rows += over_processes(config, steps)
    if config.growth and config.model == "lm":
        rows += growth(config)
    write(config, rows)


if __name__ == "__main__":
    main()
