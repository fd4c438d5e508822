"""The run directory of the few-shot text experiment: rows, tables, figures and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments._shared import Trained, scored_row
from jmeta.core.types import Episode, PyTree
from jmeta.runtime import figures, report
from jmeta.runtime.statistics import mean_ci, summarise

STEPS = (0, 1, 2, 5, 10, 20)
"""Numbers of inner steps at which a method is scored."""

PHASE_METRICS = ("phase wall seconds", "phase CPU seconds")

Figure = tuple[str, tuple[Path, Path]]


class Scored(NamedTuple):
    """A method's accuracy on the test episodes.

    Attributes:
        values: ``[episodes, len(STEPS)]`` at the rate chosen; ``[episodes, 1]`` without steps.
        chosen: index of the number of inner steps chosen.
        rate: the inner rate chosen, or None.
    """

    values: np.ndarray
    chosen: int = 0
    rate: float | None = None


class Seed(NamedTuple):
    """What one seed leaves.

    Attributes:
        seed: its number.
        scored: accuracies by method.
        runs: the trainings by method.
        grids: mean validation accuracy of the joint start by kind, ``[rates, steps]``.
        rates: the inner rates that meta-training took, by kind.
        meta: where the meta-learners started.
        episode: a batch of training episodes.
    """

    seed: int
    scored: dict[str, Scored]
    runs: dict[str, Trained]
    grids: dict[str, np.ndarray]
    rates: dict[str, float]
    meta: PyTree
    episode: Episode


def rows_of(config: Any, each: Seed, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Result rows of one seed, in the order of their accuracy."""
    rows: list[dict[str, Any]] = []

    def add(method: str, metric: str, values: Any, **settings: Any) -> None:
        rows.append(scored_row(config, method, each.seed, metric, values) | settings)

    def mean(name: str) -> float:
        found = each.scored[name]
        return -float(found.values[:, found.chosen].mean())

    for name in sorted(each.scored, key=mean):
        found = each.scored[name]
        add(name, "accuracy", found.values[:, found.chosen])
    for name, found in each.scored.items():
        if found.rate is not None:
            for at, steps in enumerate(STEPS):
                add(name, "accuracy by inner steps", found.values[:, at], inner_steps=steps)
            add(name, "inner steps at test", STEPS[found.chosen])
            add(name, "inner rate at test", found.rate)
    for name, run in each.runs.items():
        add(name, "gradient evaluations", counts[name])
        add(name, "training CPU seconds", run.cpu_seconds)
        add(name, "training wall seconds", run.history[-1]["seconds"] if run.history else 0.0)
        add(name, "best look at step", run.step)
    settings = {"source": config.source, "ways": config.ways, "shots": config.shots}
    return [row | settings for row in rows]


def cost_rows(config: Any, costs: Sequence[Any], seed: int) -> list[dict[str, Any]]:
    """Result rows of the cost table."""
    settings = {
        "problem": f"{config.meta_batch} episodes, {config.inner_steps} inner steps",
    }
    return [
        {"method": cost.name, "seed": seed, "metric": metric, "value": value} | settings
        for cost in costs
        for metric, value in (
            ("seconds", cost.seconds),
            ("temp_bytes", cost.temp_bytes),
            ("compile_seconds", cost.compile_seconds),
        )
    ]


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy against transfer; exact MAML against first order; the rest without a baseline."""
    accuracy = [row for row in rows if row["metric"].startswith("accuracy")]
    others = [row for row in rows if not row["metric"].startswith("accuracy")]
    pair = [
        row for row in rows if row["metric"] == "accuracy" and row["method"] in ("maml", "fomaml")
    ]
    against = [
        {**row, "metric": "accuracy of exact MAML against first order"}
        for row in summarise(pair, baseline="fomaml")
    ]
    return summarise(accuracy, baseline="transfer") + against + summarise(others)


def adaptation(config: Any, seeds: Sequence[Seed]) -> Figure:
    """Accuracy against inner steps."""
    drawn: dict[str, figures.Curve] = {}
    for name, found in seeds[0].scored.items():
        # Over seeds where there are several, else over episodes.
        values = found.values
        if len(seeds) > 1:
            values = np.stack([each.scored[name].values.mean(0) for each in seeds])
        points = [mean_ci(column) for column in values.T]
        half = np.array([point.half_width or 0.0 for point in points])
        steps = STEPS if found.rate is not None else (0,)
        if found.rate is not None or name.startswith(("prototypes", "nearest")):
            # Before any step every head is zero and at chance; drawn, it would flatten the rest.
            shown = slice(1, None) if len(steps) > 1 else slice(None)
            drawn[name] = (steps[shown], [point.mean for point in points][shown], half[shown])
    return (
        "Query accuracy on test classes after inner steps on the support. Inner rates are chosen "
        "on validation classes: for what is meta-trained before its training, by the joint start; "
        "for the others in the end. Bands are 95 % intervals over "
        f"{'seeds' if len(seeds) > 1 else 'episodes'}. What takes no steps is dotted. With no step "
        f"every adapted method is at chance, {1 / config.ways:.2f}.",
        figures.adaptation_curves(
            config.out / "adaptation",
            drawn,
            "query accuracy",
            title=f"{config.source}, {config.ways}-way {config.shots}-shot, unseen classes",
        ),
    )


def learning(config: Any, seeds: Sequence[Seed]) -> Figure:
    """Validation accuracy while the methods train."""
    drawn: dict[str, figures.Curve] = {}
    for name in seeds[0].runs:
        runs = [
            [row for row in each.runs[name].history if "eval/accuracy" in row] for each in seeds
        ]
        last = runs[0][-1]["step"]
        shares = [100 * row["step"] / last for row in runs[0]]
        columns = np.array([[row["eval/accuracy"] for row in rows] for rows in runs]).T
        found = [mean_ci(column) for column in columns]
        half = None if len(seeds) == 1 else np.array([each.half_width or 0.0 for each in found])
        drawn[name] = (shares, [each.mean for each in found], half)
    return (
        "Accuracy on validation classes while each method trains; the best look is kept.",
        figures.learning_curves(
            config.out / "learning",
            drawn,
            xlabel="share of the training done, %",
            ylabel="validation query accuracy",
        ),
    )


def draw(
    config: Any, seeds: Sequence[Seed], summary: Sequence[Mapping[str, Any]], costs: Sequence[Any]
) -> list[Figure]:
    """All figures of the page."""
    return [
        adaptation(config, seeds),
        (
            "Accuracy minus that of transfer on the same episodes, with 95 % intervals; filled "
            "where the interval excludes zero.",
            figures.forest(
                config.out / "differences",
                [r for r in summary if r["metric"] == "accuracy" and r["method"] != "majority"],
                xlabel="accuracy minus that of transfer",
            ),
        ),
        learning(config, seeds),
        (
            f"One meta-gradient of {config.meta_batch} episodes and {config.inner_steps} inner "
            "steps on this problem: time (median of "
            f"{config.cost_repeats} interleaved runs) and the temporary memory that XLA plans.",
            figures.cost_figure(config.out / "cost", cost_rows(config, costs, 0)),
        ),
    ]


def write(
    config: Any,
    seeds: Sequence[Seed],
    costs: Sequence[Any],
    counts: Mapping[str, int],
    phases: Mapping[str, tuple[float, float]],
    total: tuple[float, float],
) -> None:
    """Write results.json, figures and report.html; print the tables.

    Args:
        config: of the run.
        seeds: what each seed left.
        costs: the cost table.
        counts: gradient evaluations by method.
        phases: wall and CPU seconds by phase, over all seeds.
        total: wall and CPU seconds of the run.
    """
    rows = [row for each in seeds for row in rows_of(config, each, counts)]
    rows += cost_rows(config, costs, seeds[0].seed)
    spent = {**phases, "the whole run": total}
    rows += phase_rows(spent, seeds[0].seed)
    summary = summary_of(rows)
    made = draw(config, seeds, summary, costs)
    report.write_results(config.out, rows, summary)
    shown = [row for row in summary if row["metric"] != "accuracy by inner steps"]
    report.write_report(
        config.out,
        f"Few-shot text classification: {config.source}, {config.ways}-way {config.shots}-shot",
        _INTRO,
        config,
        shown,
        made,
        _notes(config, seeds),
    )
    show(config.out, rows, summary)


def finished(config: Any) -> dict[str, list[dict[str, Any]]] | None:
    """The results of a run that is complete for the seeds asked for; None where it is not."""
    results, page = config.out / "results.json", config.out / "report.html"
    if not results.exists() or not page.exists():
        return None
    if page.stat().st_mtime < results.stat().st_mtime:  # ended between the two
        return None
    found = report.read_results(results)
    scored = {row["seed"] for row in found["rows"] if row["metric"] == "accuracy"}
    return found if scored == set(config.seed_list) else None


def show(
    out: Path, rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]
) -> None:
    """A run's tables on the screen, and where its page is."""
    headline = [
        row
        for row in summary
        if row["metric"].startswith("accuracy") and row["metric"] != "accuracy by inner steps"
    ]
    report.print_table(headline)
    costs: dict[str, dict[str, float]] = {}
    spent: dict[str, dict[str, float]] = {}
    for row in rows:
        if "problem" in row:
            costs.setdefault(row["method"], {})[row["metric"]] = row["value"]
        elif row["metric"].startswith("phase "):
            spent.setdefault(row["method"], {})[row["metric"]] = row["value"]
    print_costs(costs)
    wall, cpu = PHASE_METRICS
    print_phases({phase: (seconds[wall], seconds[cpu]) for phase, seconds in spent.items()})
    print(f"report: {out / 'report.html'}")


def print_costs(costs: Mapping[str, Mapping[str, float]]) -> None:
    """The cost table on the screen.

    Args:
        costs: estimator -> metric of ``cost_rows`` -> value; the others are multiples of the first.
    """
    from rich.console import Console
    from rich.table import Table

    base = next(iter(costs.values()))
    table = Table(title="cost of one meta-gradient on this problem", title_justify="left")
    for name in ("estimator", "ms", "x", "temp MiB", "x", "compile s"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for name, of in costs.items():
        table.add_row(
            name,
            f"{1e3 * of['seconds']:.1f}",
            f"{of['seconds'] / base['seconds']:.2f}",
            f"{of['temp_bytes'] / 2**20:.1f}",
            f"{of['temp_bytes'] / max(base['temp_bytes'], 1):.2f}",
            f"{of['compile_seconds']:.1f}",
        )
    Console().print(table)


def phase_rows(phases: Mapping[str, tuple[float, float]], seed: int) -> list[dict[str, Any]]:
    """Where the time went as result rows, under the run's first seed."""
    return [
        {"method": phase, "seed": seed, "metric": metric, "value": value}
        for phase, spent in phases.items()
        for metric, value in zip(PHASE_METRICS, spent, strict=True)
    ]


def print_phases(phases: Mapping[str, tuple[float, float]]) -> None:
    """Where the time went."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="seconds by phase", title_justify="left")
    for name in ("phase", "wall", "CPU"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, (wall, cpu) in phases.items():
        table.add_row(phase, f"{wall:.1f}", f"{cpu:.1f}")
    Console().print(table)


_INTRO = """What does meta-learning add to a network that was trained jointly? A wide and deep
averaging network learns to tell half of the training classes apart. Its body (token weights and
embedding) is then frozen and run once over all passages; the top (an adapter and a head of zeros)
goes on from there on the other half of the training classes, which the body has not seen, so that
its features are as strange to the meta-learners as those of the test classes will be.

Exact MAML (mixed mode), first-order MAML, Reptile and ANIL see the same episodes. Transfer goes on
with joint training for exactly as many gradient evaluations as exact MAML, and is fine-tuned.
Joint training starts from inverse document frequencies as token weights. "No meta-training"
fine-tunes the same network with random weights; "joint start" fine-tunes what the meta-learners
started from."""


def _notes(config: Any, seeds: Sequence[Seed]) -> list[str]:
    found = seeds[0]
    over = "seeds" if len(seeds) > 1 else "the episodes of the one seed"
    grid = "; ".join(
        f"{'adapter and head' if kind == 'full' else 'head alone'}: {found.rates[kind]:g}"
        for kind in found.rates
    )
    return [
        f"Intervals are 95 % t-intervals over {over}"
        + ("." if len(seeds) > 1 else "; they do not cover the choice of the seed."),
        "A gradient evaluation is a forward and a backward pass of the top over one passage. An "
        "inner step takes one per support passage, its exact derivative counts as two more, the "
        "query takes one per passage. All start from the same joint training, which is not "
        "counted.",
        "All choices were made on validation classes: the inner rate of meta-training (a grid at "
        f"the joint start; here {grid}), the best of {config.evaluations} looks while a method "
        "trains, and each method's number of steps at test. The meta-learned keep their rate; "
        "transfer, joint start and no meta-training choose theirs from the same grid.",
        "A share of the encoded features is dropped while any method trains the top, transfer "
        "included: without that, meta-training fits the passages of its few classes.",
        "Seconds are those of this machine; CPU seconds count both cores.",
    ]
