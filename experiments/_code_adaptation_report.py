"""What a run of code adaptation leaves: rows, verdicts in plain sentences, figures, the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments._code_adaptation_methods import EXACT, FIRST, JOINT, LOSS, MAIN, NONE, TUNED
from experiments._shared import Trained, learning_curve, scored_row, write_metrics
from jmeta.runtime import figures, report
from jmeta.runtime.statistics import mean_ci, summarise

_INTRO = """A hole is the next few tokens at some place of a source file. A model that may look at
the rest of the file can do so in several ways: take gradient steps on a few windows of it (TSSA,
with a start that is meta-learned for such steps), follow it by dynamic evaluation, or attend to it.

The base is a small decoder trained here on other modules of the standard library, on rows as long
as support and context together, so that attention is used as it was trained."""


class Seed(NamedTuple):
    """What one seed leaves.

    Attributes:
        seed: its number.
        scores: ``{method: {support: [holes]}}``; the support is "" where none is read.
        rates: the rate that each method chose.
        runs: the trainings.
    """

    seed: int
    scores: dict[str, dict[str, list[float]]]
    rates: dict[str, float]
    runs: dict[str, Trained]


def rows_of(config: Any, each: Seed) -> list[dict[str, Any]]:
    """Result rows of one seed."""
    rows: list[dict[str, Any]] = []

    def add(method: str, metric: str, values: Any, **settings: Any) -> None:
        rows.append(scored_row(config, method, each.seed, metric, values) | settings)

    for name, kinds in each.scores.items():
        for kind, values in kinds.items():
            add(name, LOSS, values, **({"support": kind} if kind else {}))
    for name, rate in each.rates.items():
        add(name, "rate at test", rate)
    for name, run in each.runs.items():
        add(name, "training CPU seconds", run.cpu_seconds)
    return rows


def verdicts(summary: Sequence[dict[str, Any]]) -> list[str]:
    """Whether adapting helps, in plain sentences."""
    rows = {(r["method"], r.get("support", "")): r for r in summary if r["metric"].startswith(LOSS)}
    said = []
    compared = [
        key
        for key in rows
        if key[1] in ("", MAIN)
        and key[0].startswith(("tssa", TUNED, JOINT, "dynamic", "attention"))
    ]
    for key in compared:
        gap, half = rows[key]["paired_difference"], rows[key]["paired_ci95"]
        word = "is not told apart from no adaptation"
        if half is not None and abs(gap) > half:
            word = "helps" if gap < 0 else "hurts"
        number = report.format_interval(gap, half, sign=True)
        said.append(f"{key[0]}: {word} ({number} nats per token).")
    return said


def write(config: Any, base: Trained, seeds: Sequence[Seed]) -> None:
    """Everything, from what the seeds left."""
    histories = {"base": base.history} | {
        f"{name}, seed {each.seed}": run.history
        for each in seeds
        for name, run in each.runs.items()
    }
    write_metrics(config.out, histories)
    seeds[0].runs["base"] = base
    rows = [row for each in seeds for row in rows_of(config, each)]
    losses = [row for row in rows if row["metric"] == LOSS]
    rest = [row for row in rows if row["metric"] != LOSS]
    joint = [
        {**row, "metric": f"{LOSS}, against {JOINT}"} for row in losses
        if row["method"] in (EXACT, FIRST, JOINT)
    ]  # fmt: skip
    first = summarise(losses, baseline=NONE)
    summary = first + summarise(joint, baseline=JOINT) + summarise(rest)
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    said = verdicts(first)
    print("\n".join(said))
    curves = {
        name: learning_curve(each.runs[name].history, ["loss"], mean_ci)
        for each in seeds[:1] for name in (EXACT, FIRST, JOINT)
    }  # fmt: skip
    shown = [row for row in first if row.get("support", MAIN) == MAIN]
    made = [
        (
            "Loss of the hole minus that without adaptation, support by shared vocabulary, with "
            "95 % intervals; filled where the interval excludes zero.",
            figures.forest(config.out / "differences", shown, LOSS),
        ),
        (
            f"Validation loss of holes after {config.support} steps of rate {config.inner_lr} "
            "(none for training on holes), first seed.",
            figures.learning_curves(config.out / "learning", curves, ylabel="validation loss"),
        ),
    ]
    report.write_report(
        config.out, "Code models that adapt to the file at hand", _INTRO, config, summary, made,
        [*said, *_notes(config)],
    )  # fmt: skip
    print(f"report: {config.out / 'report.html'}")


def _notes(config: Any) -> list[str]:
    over = "seeds" if config.seeds > 1 else "holes of the one seed"
    return [
        f"Intervals are 95 % t-intervals over {over}. A seed meta-trains by itself and has its own "
        "holes; the base is the same for all, so that the intervals do not cover its training. "
        f"The rate at test is chosen of {list(config.rates)} for every method on validation files.",
        "Support windows overlap neither the hole nor its context. Those of dynamic evaluation and "
        "of 'shared, before the hole' lie before the hole, as when a file is read; the others may "
        "lie behind it, as when a file is edited.",
        f"'{JOINT}' continues the base's training on the same holes for as many meta-steps, "
        "without inner steps: what TSSA gains beyond it is due to adapting.",
    ]
