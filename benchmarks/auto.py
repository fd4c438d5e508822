"""``jmeta.auto`` against the best variant picked by hand, on six problems, within a memory.

By hand means: every exact variant is compiled, and on decoders two that ``auto`` does not try;
those over the memory are dropped, all others are timed in turns with what ``auto`` chose, and the
fastest is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jmeta
from benchmarks import peers_jax, peers_problems
from benchmarks.pieces import CostConfig, Rows, at_rounded, piece, show
from benchmarks.second_order_bars import AT_ROUNDED, ERROR, verdict
from experiments._shared import record
from jmeta import cost
from jmeta.core.types import Array, Episode, MetaGradient, Problem, PyTree
from jmeta.cost.choosing import shapes_of
from jmeta.cost.topology import memory_bytes
from jmeta.cost.variants import compiled, describe, microbatches, variants
from jmeta.methods.maml import learned_start
from jmeta.runtime import config as configuration
from jmeta.runtime import figures, report, statistics

AUTO = "jmeta.auto"
LONG_KEPT = "mixed_mode, products over three widths kept"
BLOCKS = "mixed_mode, blocks rematerialised"
WITHIN = 1.10  # of the best variant's time


class Case(NamedTuple):
    """A problem and the memory that is asked for."""

    problem: Problem
    steps: int
    meta: PyTree
    episode: Episode
    tasks: int | None
    memory: str | float
    others: dict[str, MetaGradient] = {}  # noqa: RUF012  (exact, and outside what auto tries)


@dataclasses.dataclass(frozen=True)
class Config(CostConfig):
    """The planner against the best hand-picked variant."""

    problems: tuple[str, ...] = ()
    """Which problems are measured now; none: all. Those kept in the run directory stay."""
    repeats: int = 15
    """Timed runs of each, in turns."""
    small: bool = False
    """Shrink the problems, to see that everything runs."""


PRESETS = {
    "paper": Config(),
    # Every variant is compiled twice: a decoder takes four minutes of it, images ten.
    "quick": Config(problems=("sinusoid", "weights"), repeats=5, small=True),
    "smoke": Config(problems=("decoder tight",), repeats=1, small=True),
}


def from_arrays(kind: str, size: str, steps: int, memory: str, tasks: int | None) -> Case:
    """A problem of ``benchmarks.peers``, under jmeta."""
    made = peers_problems.given(kind, size)
    loss = peers_jax.loss_of(made, lean=False)
    problem = learned_start(lambda p, batch, key: (loss(p, batch), {}), optax.sgd(made.rate))
    parts = [jax.tree.map(jnp.asarray, part) for part in (made.support, made.query)]
    if tasks is None:
        parts = [jax.tree.map(lambda x: x[0], part) for part in parts]
    else:
        parts = [jax.tree.map(lambda x: x[:tasks], part) for part in parts]
    meta = peers_jax.nested({name: jnp.asarray(a) for name, a in made.params.items()})
    others: dict[str, MetaGradient] = {}
    if kind == "decoder":  # what somebody who knows it is a transformer would try
        leaner = peers_jax.loss_of(made, lean=True)
        again = learned_start(lambda p, batch, key: (leaner(p, batch), {}), optax.sgd(made.rate))
        long = jmeta.keep_products(3 * meta["ln_f"]["scale"].size)
        others = {
            LONG_KEPT: jmeta.mixed_mode(problem, steps, keep=long),
            BLOCKS: jmeta.mixed_mode(again, steps, remat="step"),
        }
    return Case(problem, steps, meta, Episode(*parts), tasks, memory, others)


def weights_of_examples(steps: int, count: int, width: int, memory: str) -> Case:
    """A weight for each training example, learned through the training of a small network."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, count, width))
    y = x.sum(-1)
    start = {"in": 0.3 * jax.random.normal(keys[1], (width, 64)),
             "out": 0.1 * jax.random.normal(keys[2], (64,))}  # fmt: skip

    def error(fast: PyTree, batch: Any) -> Array:
        return (jnp.tanh(batch[0] @ fast["in"]) @ fast["out"] - batch[1]) ** 2

    def inner(fast: PyTree, meta: PyTree, batch: Any, key: Any):
        return jnp.mean(jax.nn.sigmoid(meta) * error(fast, batch)), {}

    def outer(fast: PyTree, meta: PyTree, batch: Any, key: Any):
        return jnp.mean(error(fast, batch)), {}

    problem = Problem(inner, outer, lambda meta: optax.adam(0.01), init=lambda meta, key: start)
    episode = Episode((x[0], y[0]), (x[1], y[1]))
    return Case(problem, steps, jnp.zeros(count), episode, None, memory)


def tight(case: Case) -> Case:
    """The same with nine tenths of what mixed mode needs that keeps the weights of every step."""
    middle = microbatches(case.tasks)[-2:][0]
    variant = cost.Variant("mixed_mode", "step", middle)
    mg = cost.build(case.problem, case.steps, variant, tasks=case.tasks)
    trial, _ = compiled(mg, variant, shapes_of((case.meta, (), case.episode, None)), 0)
    return case._replace(memory=0.9 * trial.bytes)


def cases(small: bool) -> dict[str, Callable[[], Case]]:
    """The six problems."""
    size = "smoke" if small else "quick"
    few, several = (2, 3) if small else (4, 25)
    return {
        "sinusoid": lambda: from_arrays("sinusoid", size, 5, "1GiB", several),
        "sinusoid tight": lambda: tight(from_arrays("sinusoid", size, 10, "1GiB", several)),
        "omniglot": lambda: from_arrays("omniglot", size, 2 if small else 3, "2GiB", few),
        "decoder": lambda: from_arrays("decoder", size, 4, "2GiB", None),
        "decoder tight": lambda: tight(from_arrays("decoder", size, 8, "1GiB", None)),
        "weights": lambda: weights_of_examples(4 if small else 32, 64 if small else 512, 16,
                                               "1GiB"),
    }  # fmt: skip


def measure(name: str, case: Case, repeats: int) -> Rows:
    """Choose by ``auto``, choose by hand, and time both in turns."""
    begin = time.perf_counter()
    usable = memory_bytes(case.memory)
    with tempfile.TemporaryDirectory() as folder:
        choice = cost.fastest(
            case.problem, case.steps, *shapes_of((case.meta, case.episode)), memory=case.memory,
            tasks=case.tasks, folder=folder,
        )  # fmt: skip
    spent = time.perf_counter() - begin
    arguments = (case.meta, (), case.episode, None)
    programs: dict[str, cost.Program] = {}
    trials = {}
    mg = choice.mg
    for microbatch in microbatches(case.tasks):
        for variant in variants(case.steps, microbatch):
            built = cost.build(case.problem, case.steps, variant, tasks=case.tasks)
            trial, program = compiled(built, variant, shapes_of(arguments), usable)
            if program is not None:
                trials[describe(variant)] = trial
                programs[describe(variant)] = as_program(program, trial)
    for other, built in case.others.items():
        trial, program = compiled(built, cost.Variant(other, "none"), shapes_of(arguments), usable)
        if program is not None:
            trials[other], programs[other] = trial, as_program(program, trial)
    # What a user calls: the estimator that auto has become, compiled on its own.
    trial, program = compiled(mg, choice.variant, shapes_of(arguments), usable)
    assert program is not None, "auto chose what does not fit"
    trials[AUTO], programs[AUTO] = trial, as_program(program, trial)
    inputs = dict.fromkeys(programs, (case.meta, case.episode))
    seconds, _ = cost.interleave(programs, inputs, repeats)
    shared = {"seed": 0, "problem": name}
    rows: Rows = []
    for method in programs:
        row = shared | {"method": method}
        rows.append(row | {"metric": "seconds", "values": seconds[method]})
        rows.append(row | {"metric": "median seconds", "value": cost.median(seconds[method])})
        rows.append(row | {"metric": "bytes", "value": trials[method].bytes})
    by_hand = {m: cost.median(s) for m, s in seconds.items() if m != AUTO}
    best = min(by_hand, key=lambda method: by_hand[method])
    ratio = cost.median([a / b for a, b in zip(seconds[AUTO], seconds[best], strict=True)])
    got = mg.estimate(case.meta, (), case.episode, None)[0]
    found = {
        "time / best by hand": ratio,
        "bytes / asked": trials[AUTO].bytes / usable,
        "asked bytes": usable,
        "seconds to choose": spent,
        "variants compiled to choose": len(choice.trials),
        "variants by hand that fit": len(by_hand),
        "error": cost.gradient_error(got, exact(case, case.meta, case.episode)),
    }
    row = shared | {"method": AUTO, "chosen": describe(choice.variant), "best by hand": best}
    return rows + [row | {"metric": metric, "value": value} for metric, value in found.items()]


def as_program(run: Any, trial: cost.Trial) -> cost.Program:
    """A compiled variant as ``cost.interleave`` takes it."""
    return cost.Program(
        lambda meta, episode: run(meta, (), episode, None)[0],
        trial.temp_bytes, trial.flops, 0.0, trial.compile_seconds,
    )  # fmt: skip


def exact(case: Case, meta: PyTree, episode: Episode) -> PyTree:
    """The gradient in float64: with tasks the mean over them, each exact by itself."""
    episodes = [episode]
    if case.tasks is not None:
        episodes = [jax.tree.map(lambda x, i=i: x[i], episode) for i in range(case.tasks)]
    every = [cost.exact_reference(case.problem, case.steps, meta, each) for each in episodes]
    return jax.tree.map(lambda *g: sum(g) / len(g), *every)


def rounding(name: str, case: Case) -> Rows:
    """How far rounding the meta-parameters and the data to float32 moves the exact gradient."""
    moved = at_rounded(functools.partial(exact, case), case.meta, case.episode)
    row = {"method": AT_ROUNDED, "seed": 0, "problem": name, "metric": "error"}
    return [row | {"value": moved}]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each problem.

    Args:
        rows: of ``measure``.

    Returns:
        A Markdown table.
    """
    lines = [
        "| problem | memory asked | chosen | its memory | best by hand | time / best | to choose "
        "| error | by rounding |",
        "| --- | --: | --- | --: | --- | --: | --: | --: | --: |",
    ]
    moved = moved_by_rounding(rows)
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["method"] == AUTO and "chosen" in row:
            found.setdefault(row["problem"], dict(row))[row["metric"]] = row["value"]
    for name, one in found.items():
        asked = one["asked bytes"]
        lines.append(
            f"| {name} | {cost.in_words(asked)} | {one['chosen']} "
            f"| {cost.in_words(one['bytes / asked'] * asked)} | {one['best by hand']} "
            f"| {one['time / best by hand']:.2f} | {one['seconds to choose']:.0f} s "
            f"| {one['error']:.0e} | {f'{moved[name]:.0e}' if name in moved else ''} |"
        )
    return "\n".join(lines)


def moved_by_rounding(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What ``rounding`` found, by problem."""
    return {row["problem"]: row["value"] for row in rows if row["method"] == AT_ROUNDED}


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is held to, a sentence for each problem."""
    value = {(row["problem"], row["metric"]): row["value"] for row in rows
             if row["method"] == AUTO and "chosen" in row}  # fmt: skip
    lines, moved = [], moved_by_rounding(rows)
    for name in dict.fromkeys(problem for problem, _ in value):
        ratio, used = value[name, "time / best by hand"], value[name, "bytes / asked"]
        gap = value[name, "error"]
        beside = f", rounding its inputs alone {moved[name]:.0e}" if name in moved else ""
        lines.append(
            f"{name}: {ratio:.2f} x the best by hand, {used:.2f} of the memory asked "
            f"({verdict(ratio <= WITHIN and used <= 1)})"
        )
        lines.append(
            f"{name}: float32 error {gap:.0e}{beside} (bar {ERROR:.0e}: {verdict(gap <= ERROR)})"
        )
    return lines


ONE = "the best by hand, the memory asked"


def figure(rows: Sequence[dict[str, Any]], path: Path) -> tuple[Path, Path]:
    """What was chosen for each problem: its time over the best's, its memory over what was asked.

    Args:
        rows: of ``measure``.
        path: where to; .png and .svg are written.

    Returns:
        The paths.
    """
    titles = {"time / best by hand": "time", "bytes / asked": "memory"}
    shown = [
        {"method": row["problem"], "metric": row["metric"], "value": row["value"]}
        for row in rows
        if row["method"] == AUTO and row["metric"] in titles
    ]
    ones = [{"method": ONE, "metric": metric, "value": 1.0} for metric in titles]
    return figures.cost_figure(
        path, [*ones, *shown], reference=ONE, metrics=titles, title="what jmeta.auto chose"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    record(config, "problems")
    known = cases(config.small)
    if unknown := set(config.problems) - set(known):
        raise SystemExit(f"no problem {', '.join(unknown)}; known are {', '.join(known)}")
    rows: Rows = []
    for name, make in known.items():
        wanted = not config.problems or name in config.problems
        file, out = name.replace(" ", "-"), Path(config.out)
        rows += piece(
            out, file, lambda name=name, make=make: measure(name, make(), config.repeats),
            wanted=wanted, resume=config.resume,
        )  # fmt: skip
        rows += piece(
            out, f"{file}-rounding", lambda name=name, make=make: rounding(name, make()),
            wanted=wanted, resume=config.resume,
        )  # fmt: skip
    summary = statistics.summarise(rows)
    report.write_results(Path(config.out), rows, summary)
    text, notes = table(rows), bars(rows)
    show(Path(config.out), "auto", text, *notes)
    picture = figure(rows, Path(config.out) / "auto")
    report.write_report(
        Path(config.out), "The planner against the best by hand",
        "Every exact variant that fits the memory, and what jmeta.auto chose, timed in turns.",
        config, summary, {"What was chosen": picture}, notes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
