"""What second order costs: estimators x inner steps x model, interleaved, in several processes.

Seconds (median), XLA's temporary memory, FLOPs, compile seconds, and the gradient's error against
float64. Ratios are to first order, its cheapest variant by each measure in the same process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import jmeta
from benchmarks import peers_jax
from benchmarks import second_order_bars as judged
from benchmarks.pieces import at_rounded, keep_float32, leave, show
from benchmarks.second_order_problems import (
    DecoderConfig,
    Setting,
    adapted,
    by_hand,
    classifier,
    decoder,
    regressor,
)
from jmeta import cost
from jmeta.core.steps import Remat
from jmeta.core.types import Episode, MetaGradient, PyTree
from jmeta.models import conv
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
    growth: bool | None = None
    """Also compile mixed mode at 16 and 64 inner steps and report how its memory grows, and run
    the nested one at 128. None: with model=lm, the only one that can."""

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
        if self.model != "lm" and self.growth:
            raise ValueError(
                f"growth: of the decoder's memory, and this is model={self.model}: leave it out"
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
    "mlp": Config(model="mlp", steps=(1, 5, 10), repeats=15),
    "conv": Config(model="conv", steps=(1, 5), repeats=5),
    "smoke": Config(steps=(2,), repeats=1, processes=1, growth=False, small=True),
}


IMPLICIT = "implicit, 5 steps of CG"


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
    every = [Cell(name, mg, setting) for name, mg in made.items()]
    if config.model == "mlp":
        every += further_cells(setting, steps)
    else:  # jmeta's own convolution is a matmul of patches on a CPU
        native = classifier(small=config.small, convolve=conv.conv_native)
        every.append(Cell("mixed_mode, lax.conv", jmeta.mixed_mode(native.problem, steps), native))
    return wanted(every, config.cells)


def further_cells(setting: Setting, steps: int) -> list[Cell]:
    """What else estimates the gradient of a learned start; on a large network it takes too long.

    Args:
        setting: the problem.
        steps: inner steps.

    Returns:
        Forward mode, implicit differentiation of a proximal problem, and evolution strategies.
    """
    near = setting._replace(problem=jmeta.proximal(setting.problem, 1.0))
    drawn = jmeta.evolution(setting.problem, steps, pairs=16, sigma=0.01)

    # It draws directions, and programs are compiled without a key.
    def estimate(meta: PyTree, state: PyTree, episode: Episode, _: Any):
        return drawn.estimate(meta, state, episode, jax.random.key(0))

    return [
        Cell("forward", jmeta.forward(setting.problem, steps), setting),
        Cell(IMPLICIT, jmeta.implicit(near.problem, steps, solver=jmeta.cg(5)), near),
        Cell("evolution, 16 pairs", drawn._replace(estimate=estimate), setting),
    ]


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
    width = looped.meta["ln_f"]["scale"].size
    long = jmeta.keep_products(3 * width)
    # Of low-rank factors most products are of frozen weights; attention's are worth keeping too.
    lora, most = adapted(config, steps), jmeta.keep_products(max(width // config.heads, 1))
    # SGD's update is linear in the gradient: the "step" remat keeps the weights alone, for nothing.
    return [
        Cell("first_order", jmeta.first_order(looped.problem, steps), looped),
        Cell(
            "first_order, written out",
            jmeta.first_order(looped.problem, steps, loop="unroll"),
            looped,
        ),
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
        Cell(judged.WRITTEN_OUT, jmeta.unrolled(looped.problem, steps, loop="unroll"), looped),
        Cell("unrolled, step remat", jmeta.unrolled(full.problem, steps, remat="step"), full),
        *(Cell(row, by_hand(config, steps, row), looped) for row in peers_jax.PLAIN),
        Cell(judged.LORA_FIRST, jmeta.first_order(lora.problem, steps), lora),
        Cell(judged.LORA[0], jmeta.mixed_mode(lora.problem, steps, remat="step"), lora),
        Cell(judged.LORA[1], jmeta.mixed_mode(lora.problem, steps, keep=most), lora),
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
    errors = errors_of(config, steps, every, programs, process)
    arguments = {c.name: (c.setting.meta, c.setting.episode) for c in every}
    seconds, _ = cost.interleave(programs, arguments, config.repeats)
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
            # Reptile follows something else, and implicit has a problem of its own.
            if name not in ("reptile", IMPLICIT) or metric != "error":
                rows.append(row | {"metric": metric, "value": value})
    if judged.AT_ROUNDED in errors:
        row = {"method": judged.AT_ROUNDED, "seed": process, "metric": "error"}
        row |= {"model": config.model, "steps": steps}
        rows.append(row | {"value": errors[judged.AT_ROUNDED]})
    return rows


def errors_of(
    config: Config,
    steps: int,
    every: Sequence[Cell],
    programs: dict[str, cost.Program],
    process: int,
) -> dict[str, float]:
    """The difference of every cell's gradient to float64's; what adapts decides whose."""
    references: dict[Any, Any] = {}
    errors = {}
    exact = cells(dataclasses.replace(config, dtype="float32"), steps)
    for cell, same in zip(every, exact, strict=True):
        meta, episode = same.setting.meta, same.setting.episode
        kind = jax.tree.structure(meta)
        if kind not in references:
            references[kind] = cost.exact_reference(same.setting.problem, steps, meta, episode)
        grads = programs[cell.name].run(cell.setting.meta, cell.setting.episode)
        errors[cell.name] = cost.gradient_error(grads, references[kind])
    if config.model != "lm":  # whose float64 takes minutes, and whose gradient has no kinks
        one = exact[0].setting
        errors[judged.AT_ROUNDED] = at_rounded(
            lambda meta, episode: cost.exact_reference(one.problem, steps, meta, episode),
            one.meta, one.episode, process,
        )  # fmt: skip
    return errors


def growth(config: Config) -> list[dict[str, Any]]:
    """How the memory of mixed mode grows from 16 to 64 inner steps, and one run of 128."""
    jax.config.update("jax_enable_compilation_cache", False)

    def compiled(steps: int, remat: Remat) -> tuple[cost.Program, Setting]:
        setting = decoder(config, steps, "scan/dots")
        mg = jmeta.mixed_mode(setting.problem, steps, remat=remat)
        return cost.compile_estimate(mg, setting.meta, setting.episode), setting

    def temp(steps: int, remat: Remat) -> int:
        return compiled(steps, remat)[0].temp_bytes

    one = decoder(config, 1, "scan/dots")
    fast = cost.fast_bytes(one.problem, one.meta)
    few, many = temp(16, "step"), temp(64, "step")
    slope, nested = (many - few) / 48 / fast, temp(64, "nested") / many
    program, setting = compiled(128, "nested")
    longest = program.temp_bytes / temp(8, "nested")
    begin = time.perf_counter()
    try:
        grads = jax.block_until_ready(program.run(setting.meta, setting.episode))
        finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    except jax.errors.JaxRuntimeError as error:  # the rows that were timed are not lost by it
        print(f"128 steps: {error}", file=sys.stderr)
        finite = False
    spent = time.perf_counter() - begin
    row = {"seed": 0, "model": config.model}
    return [
        row | {"method": "mixed_mode, block remat", "metric": "memory per step / fast weights",
               "value": slope, "steps": "16-64"},
        row | {"method": "mixed_mode, nested", "metric": "memory / un-nested",
               "value": nested, "steps": 64},
        row | {"method": "mixed_mode, nested", "metric": "memory at 128 steps / at 8",
               "value": longest, "steps": "8-128"},
        row | {"method": "mixed_mode, nested", "metric": judged.LONG_SECONDS,
               "value": spent, "steps": 128},
        row | {"method": "mixed_mode, nested", "metric": judged.LONG_FINITE,
               "value": float(finite), "steps": 128},
    ]  # fmt: skip


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
    notes = judged.bars(rows) if held else []
    notes += judged.errors(rows) if config.dtype == "float32" else []
    show(out, "second_order_cost", "\n\n".join([judged.table(rows), *notes]))
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
    if config.model == "lm" and config.growth is not False:
        rows += growth(config)
    write(config, rows)


if __name__ == "__main__":
    main()
