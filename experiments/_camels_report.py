"""What a run of CaMeLS leaves: rows, the verdict, figures and the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments import _camels_data as reading
from experiments._camels_model import LEARNED, NONE, UNIFORM
from experiments._camels_scoring import EXACT, F1, LOSS, MOVED
from experiments._shared import Trained, learning_curve, scored_row, write_metrics
from jmeta.runtime import figures, report
from jmeta.runtime.statistics import mean_ci, summarise

KIND = "mean weight, the document's being 1"


class Seed(NamedTuple):
    """What one seed leaves.

    Attributes:
        seed: its number.
        scores: ``{method: {metric: [streams]}}``.
        rates: the rate that each method chose.
        kinds: mean weight by kind of token, of each method with weights.
        alignment: by kind, the mean slope of the outer loss in a token's weight, where all weigh
            the same.
        runs: the trainings.
    """

    seed: int
    scores: dict[str, dict[str, list[float]]]
    rates: dict[str, float]
    kinds: dict[str, dict[str, float]]
    alignment: dict[str, float]
    runs: dict[str, Trained]


def rows_of(config: Any, each: Seed) -> list[dict[str, Any]]:
    """Result rows of one seed."""
    rows: list[dict[str, Any]] = []

    def add(method: str, metric: str, values: Any, **settings: Any) -> None:
        rows.append(
            scored_row(config, method, each.seed, metric, values)
            | settings
            | {"source": config.source}
        )

    for metric in (LOSS, F1, EXACT, MOVED):
        for method, found in each.scores.items():
            add(method, metric, found[metric])
    for method, kinds in each.kinds.items():
        for label, weight in kinds.items():
            add(method, KIND, weight, tokens=label)
    for label, slope in each.alignment.items():
        add(UNIFORM, "slope of the outer loss in a token's weight", slope, tokens=label)
    for method, rate in each.rates.items():
        if method != NONE:
            add(method, "rate at test", rate)
    for name, run in each.runs.items():
        add(name, "training CPU seconds", run.cpu_seconds)
    return rows


def verdict(summary: Sequence[dict[str, Any]]) -> str:
    """Whether learned weights help, in a plain sentence."""
    row = next(r for r in summary if r["method"] == LEARNED and r["metric"] == LOSS)
    gap, half = row["paired_difference"], row["paired_ci95"]
    word = "are not told apart from uniform ones"
    if half is not None and abs(gap) > half:
        word = "beat uniform ones" if gap < 0 else "are worse than uniform ones"
    number = report.format_interval(gap, half, sign=True)
    return (
        f"Learned weights {word}: the loss of the answers changes by {number} nats per token, "
        f"paired over {row['n']} {row['over']}."
    )


def write(config: Any, base: Trained, seeds: Sequence[Seed]) -> None:
    """Results, metrics, figures and report."""
    histories = {"base": base.history} | {
        f"{LEARNED}, seed {each.seed}": each.runs[LEARNED].history for each in seeds
    }
    write_metrics(config.out, histories)
    seeds[0].runs["base"] = base
    rows = [row for each in seeds for row in rows_of(config, each)]
    compared = [row for row in rows if row["metric"] in (LOSS, F1, EXACT, MOVED)]
    rest = [row for row in rows if row["metric"] not in (LOSS, F1, EXACT, MOVED)]
    summary = summarise(compared, baseline=UNIFORM) + summarise(rest)
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    print(verdict(summary))
    curve = {}
    names = ["loss"]
    for each in seeds:
        curve[f"seed {each.seed}"] = learning_curve(each.runs[LEARNED].history, names, mean_ci)
    made = [
        (
            "Loss of the answers minus that with uniform weights, with 95 % intervals; filled "
            "where the interval excludes zero.",
            figures.forest(config.out / "differences", compared_only(summary), LOSS),
        ),
        (
            f"Validation loss of the questions while weights are learned, at rate "
            f"{config.inner_lr}.",
            figures.learning_curves(
                config.out / "learning", curve, ylabel="validation loss, divergence included"
            ),
        ),
    ]
    report.write_report(
        config.out, f"CaMeLS: which tokens to learn from, {config.source}", _INTRO, config,
        summary, made, [verdict(summary), *_notes(config)],
    )  # fmt: skip
    print(f"report: {config.out / 'report.html'}")


def compared_only(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the figure of differences shows: not the reference that knows the answers."""
    return [row for row in summary if row["metric"] == LOSS and row["method"] != reading.RULES[-1]]


_INTRO = """A language model reads documents by gradient descent, one step on each, and is then
asked about them without seeing them. Which tokens should the gradient listen to? CaMeLS learns a
weight for each, by differentiating the loss of the answers through the steps.

The base is a small decoder trained here on other documents and on other questions with their
answers. All methods read the same streams of documents from the same base with SGD; only the
weights of tokens differ, and the rate, which every method chooses for itself."""


def _notes(config: Any) -> list[str]:
    over = "seeds" if config.seeds > 1 else "streams of the one seed"
    notes = [
        f"Intervals are 95 % t-intervals over {over}. A seed learns its own weights and reads its "
        "own streams; the base is the same for all, so that the intervals do not cover its "
        f"training. The rate at test is chosen of {list(config.rates)} for every method on "
        "validation documents.",
        f"'{reading.RULES[-1]}' weighs the tokens of the answer in the document and no others. No "
        "method can know them: it says what the best of weights could do.",
        "Salient spans are runs of capitalised words and words that begin with a digit, found by "
        "rule and not by an entity recogniser.",
        "A model of this size answers few questions word for word: the loss of the answers is what "
        "tells the methods apart, and exact match is there to keep it honest.",
    ]
    if config.source == "facts":
        notes.insert(0, "The documents are made up: the numbers show how the method works.")
    return notes
