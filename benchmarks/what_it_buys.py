"""What second order buys: exact against first order at equal wall-clock.

Sinusoids are trained here: the time of one outer step, measured apart on a quiet machine, turns
steps into seconds. Few-shot text and fast weights are read off their committed runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from benchmarks.pieces import Rows, piece, show
from benchmarks.readme import RESULTS
from experiments import sinusoid
from experiments._shared import record
from jmeta import cost
from jmeta.core.types import Episode, PyTree
from jmeta.runtime import config as configuration
from jmeta.runtime import figures, report, statistics

EXACT, FIRST = "exact", "first order"
SHOTS = 10
# A run, and one whose first order has about the time that exact MAML takes in it.
TEXT_RUNS = {
    "fewshot_text-demo": "fewshot_text-demo-time",
    "fewshot_text-clinc150": "fewshot_text-clinc150-time",
}
ACCURACY, WORK, SECONDS = "accuracy", "gradient evaluations", "training CPU seconds"
FWL, FWL_FIRST = "FWL exact", "FWL first order"
FWL_RUNS = {
    "as many steps": "adaptive_lm-wikitext2-512",
    "as much time, 1.25 x the steps": "adaptive_lm-wikitext2-512-time",
}


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Exact MAML against first order at equal wall-clock."""

    seeds: int = 3
    """Trained side by side, each with its own start and tasks."""
    steps: int = 3000
    """Outer steps of exact MAML."""
    longest: float = 3.0
    """First order trains for this many times as many."""
    looks: int = 6
    """How often exact MAML is scored on test tasks."""
    test_tasks: int = 300
    """Held-out tasks."""
    phases: tuple[str, ...] = ("train", "time")
    """What is measured now; what is kept in the run directory stays."""
    repeats: int = 9
    """Timed turns."""


PRESETS = {
    "paper": Config(),
    "quick": Config(seeds=3, steps=1500, looks=6, test_tasks=100, repeats=5),
    "smoke": Config(seeds=2, steps=20, looks=2, test_tasks=5, repeats=1),
}


def trainer(config: Config, method: str, steps: int) -> Callable[..., Any]:
    """``(meta, opt_state, key) -> (meta, opt_state)``: some outer steps of all seeds at once."""
    problem = sinusoid.problem_at(0.01)
    single = jmeta.mixed_mode(problem, 5, remat="step") if method == EXACT else jmeta.first_order(
        problem, 5)  # fmt: skip
    mg, optimizer = jmeta.over_tasks(single), optax.adam(1e-3)

    def draw(key: jax.Array) -> Episode:
        """Twenty-five waves, as ``tasks.sinusoid`` draws them."""
        keys = jax.random.split(key, 3)
        height = jax.random.uniform(keys[0], (25, 1, 1), minval=0.1, maxval=5.0)
        phase = jax.random.uniform(keys[1], (25, 1, 1), maxval=np.pi)
        x = jax.random.uniform(keys[2], (25, 2 * SHOTS, 1), minval=-5.0, maxval=5.0)
        y, mask = height * jnp.sin(x - phase), jnp.ones((25, 2 * SHOTS))
        parts = [{"x": x[:, cut], "y": y[:, cut], "mask": mask[:, cut]}
                 for cut in (slice(SHOTS), slice(SHOTS, None))]  # fmt: skip
        return Episode(*parts)

    def one_seed(meta: PyTree, state: PyTree, key: jax.Array) -> Any:
        def step(carry: Any, index: jax.Array) -> Any:
            meta, state = carry
            grads, _, _ = mg.estimate(meta, (), draw(jax.random.fold_in(key, index)), None)
            updates, state = optimizer.update(grads, state, meta)
            return (optax.apply_updates(meta, updates), state), None

        return jax.lax.scan(step, (meta, state), jnp.arange(steps))[0]

    return jax.jit(jax.vmap(one_seed))


def start(config: Config) -> tuple[PyTree, PyTree]:
    """Every seed's initial parameters and Adam's state."""
    meta = sinusoid.initial(sinusoid.Config(seeds=config.seeds, first_seed=config.first_seed))
    return meta, jax.vmap(optax.adam(1e-3).init)(meta)


def train(config: Config) -> Rows:
    """Test errors after five inner steps, as training goes on."""
    rows: Rows = []
    rates = sinusoid.Config(
        seeds=config.seeds, first_seed=config.first_seed, validation_tasks=config.test_tasks
    )
    test = sinusoid.tasks(config.test_tasks, SHOTS, sinusoid.TEST)
    between = config.steps // config.looks
    for method, factor in ((EXACT, 1.0), (FIRST, config.longest)):
        meta, state = start(config)
        run = trainer(config, method, between)
        for look in range(1, round(factor * config.looks) + 1):
            keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), look)
                              for seed in config.seed_list])  # fmt: skip
            meta, state = run(meta, state, keys)
            chosen = sinusoid.choose_rates(rates, meta, SHOTS)
            values = np.asarray(sinusoid.errors(meta, jnp.asarray(chosen), test))[:, :, 5]
            for seed, value in zip(config.seed_list, values.mean(1), strict=True):
                rows.append({"method": method, "seed": seed, "metric": "mse",
                             "value": float(value), "outer_steps": look * between})  # fmt: skip
    return rows


def timed(config: Config) -> Rows:
    """Seconds of one outer step of one seed, in turns."""
    meta, state = start(dataclasses.replace(config, seeds=1))
    steps = min(200, config.steps)
    keys = jax.random.key(0)[None]

    def program(method: str) -> cost.Program:
        run = trainer(config, method, steps)
        return cost.Program(lambda meta, _: run(meta, state, keys), 0, 0.0, 0.0, 0.0)

    programs = {method: program(method) for method in (EXACT, FIRST)}
    inputs = dict.fromkeys(programs, (meta, Episode(None)))
    seconds, _ = cost.interleave(programs, inputs, config.repeats)
    return [
        {"method": method, "seed": 0, "metric": "seconds of an outer step",
         "value": cost.median(values) / steps}
        for method, values in seconds.items()
    ]  # fmt: skip


def at_equal_time(rows: Sequence[dict[str, Any]]) -> Rows:
    """First order's error at the look whose time is the nearest to each of exact MAML's.

    What exact MAML reached later than first order's last look is compared with nothing.
    """
    step = {r["method"]: r["value"] for r in rows if r["metric"] == "seconds of an outer step"}
    if len(step) < 2:
        return []
    errors = {(r["method"], r["seed"], r["outer_steps"]): r["value"] for r in rows
              if r["metric"] == "mse"}  # fmt: skip
    looks = {m: sorted({n for method, _, n in errors if method == m}) for m in step}
    found: Rows = []
    for exact in looks[EXACT]:
        seconds = exact * step[EXACT]
        if seconds > looks[FIRST][-1] * step[FIRST]:
            break
        near = min(looks[FIRST], key=lambda n: abs(n * step[FIRST] - seconds))
        for (method, seed, n), value in errors.items():
            if (method, n) in ((EXACT, exact), (FIRST, near)):
                found.append({"method": method, "seed": seed, "metric": "mse at equal time",
                              "value": value, "seconds": round(seconds, 2)})  # fmt: skip
    return found


def text_rows(folder: Path = RESULTS) -> list[str]:
    """Few-shot text, from committed runs: exact against first order, that of more steps too.

    Returns:
        Lines of a Markdown table; none where a run is missing. The ratio of CPU seconds is of the
        runs of as many steps, and the other's number of steps was chosen by it.
    """
    lines = [
        "| few-shot text, accuracy | exact | first order | paired difference | CPU seconds x |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, longer in TEXT_RUNS.items():
        files = [folder / f"{run}.json" for run in (name, longer)]
        if not all(file.exists() for file in files):
            return []
        equal, other = (json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files)
        exact = of_training(equal, "maml", ACCURACY)
        ratio = of_training(equal, "maml", SECONDS) / of_training(equal, "fomaml", SECONDS)
        for rows in (equal, other):
            first = of_training(rows, "fomaml", ACCURACY)
            factor = of_training(rows, "fomaml", WORK) / of_training(equal, "fomaml", WORK)
            said = "as many steps" if factor == 1 else f"{factor:g} x the steps"
            gap = statistics.mean_ci(np.subtract(exact, first))
            lines.append(
                f"| {name}, first order: {said} | {np.mean(exact):.4f} | {np.mean(first):.4f} "
                f"| {report.format_interval(gap.mean, gap.half_width, sign=True)} "
                f"| {f'{ratio:.2f}' if factor == 1 else ''} |"
            )
    return lines


def of_training(rows: Sequence[dict[str, Any]], method: str, metric: str) -> Any:
    """The only row of a method and metric, of a run of one seed.

    Args:
        rows: of a committed run.
        method: whose.
        metric: which.

    Returns:
        Its value, or the values of all test episodes.

    Raises:
        ValueError: the run has several seeds, or no such row.
    """
    [row] = (row for row in rows if (row["method"], row["metric"]) == (method, metric))
    return row["values"] if "values" in row else row["value"]


def fwl_rows(folder: Path = RESULTS) -> list[str]:
    """Fast weights, from their committed runs: exact against first order that trained as long.

    Returns:
        Lines of a Markdown table.
    """
    kept: dict[str, dict[str, dict[int, float]]] = {}
    for name, run in FWL_RUNS.items():
        file = folder / f"{run}.json"
        if not file.exists():
            return []
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        kept[name] = {
            method: {
                r["seed"]: r["value"]
                for r in rows
                if r["metric"] == "perplexity" and r["method"] == method
            }
            for method in (FWL, FWL_FIRST)
        }
    exact = kept["as many steps"][FWL]
    lines = ["| fast weights, perplexity | exact | first order | paired difference |",
             "| --- | --: | --: | --: |"]  # fmt: skip
    for name, methods in kept.items():
        pairs = np.asarray([(exact[seed], methods[FWL_FIRST][seed]) for seed in exact])
        mine, other, gap = (
            statistics.mean_ci(v) for v in (pairs[:, 0], pairs[:, 1], pairs[:, 0] - pairs[:, 1])
        )
        lines.append(
            f"| first order: {name} | {report.format_interval(mine.mean, mine.half_width)} "
            f"| {report.format_interval(other.mean, other.half_width)} "
            f"| {report.format_interval(gap.mean, gap.half_width, sign=True)} |"
        )
    return lines


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Errors at equal time on sinusoids, on few-shot text and of fast weights."""
    summary = statistics.summarise(at_equal_time(rows), baseline=FIRST)
    lines = [
        "| seconds of training | exact | first order | exact - first order, paired |",
        "| --: | --: | --: | --: |",
    ]
    for seconds in dict.fromkeys(row["seconds"] for row in summary):
        both = {row["method"]: row for row in summary if row["seconds"] == seconds}
        means = [report.format_interval(both[m]["mean"], both[m]["ci95"]) for m in (EXACT, FIRST)]
        gap = report.format_interval(
            both[EXACT]["paired_difference"], both[EXACT]["paired_ci95"], sign=True
        )
        lines.append(f"| {seconds:g} | {means[0]} | {means[1]} | {gap} |")
    for more in (text_rows(), fwl_rows()):
        lines += ["", *more] if more else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    out = Path(config.out)
    record(config, "phases")
    rows: Rows = []
    for name, make in {"train": train, "time": timed}.items():
        rows += piece(out, name, lambda make=make: make(config),
                      wanted=name in config.phases, resume=config.resume)  # fmt: skip
    rows += at_equal_time(rows)
    summary = statistics.summarise(rows, baseline=FIRST)
    report.write_results(out, rows, summary)
    text = table(rows)
    show(out, "what_it_buys", text)
    step = {r["method"]: r["value"] for r in rows if r["metric"] == "seconds of an outer step"}
    pictures = {}
    if len(step) == 2:
        lines = {}
        for method, seconds in step.items():
            points = [r for r in summary if r["metric"] == "mse" and r["method"] == method]
            lines[method] = (
                [r["outer_steps"] * seconds for r in points],
                [r["mean"] for r in points],
                [r["ci95"] or 0.0 for r in points],
            )
        pictures["Error against training time"] = figures.learning_curves(
            out / "what_it_buys", lines, xlabel="seconds of training (one seed)",
            ylabel="test error after 5 steps", log_y=True,
        )  # fmt: skip
    report.write_report(
        out, "What second order buys", "Sinusoids: exact MAML against first order, equal time.",
        config, summary, pictures,
    )  # fmt: skip


if __name__ == "__main__":
    main()
