"""What a run of Two Moons leaves: the methods' files as one table beside the published, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _two_moons_data as data_of
from experiments._shared import learning_curve, write_metrics
from experiments._teacher_shared import MLM
from experiments._two_moons_data import Data
from experiments._two_moons_methods import METHODS, NONE
from jmeta.methods import has_collapsed
from jmeta.runtime import drawing, figures, report
from jmeta.runtime.statistics import mean_ci, summarise
from jmeta.tasks.two_moons import GRID

NEIGHBOUR, MAJORITY = "nearest neighbour", "majority"
LUCKIEST = "accuracy, chosen on test points"
CHOICE = (
    "One checkpoint and one rate are chosen for all seeds, on a few labelled points, and intervals "
    f"do not cover that choice. {LUCKIEST[0].upper()}{LUCKIEST[1:]} is that of the checkpoint and "
    "rate with the highest mean on these: what no choice can be better than."
)
# Test accuracy with one seed; "/": the last checkpoint, the one of the least loss.
PUBLISHED = {
    MLM: {10: "0.614 / 0.734", 20: "0.766 / 0.812", 40: "0.824 / 0.828", 80: "0.853 / 0.835",
          160: "0.923 / 0.889"},
    "hard": {10: "0.606", 20: "0.629", 40: "0.748", 80: "0.860", 160: "0.905"},
    "soft": {10: "0.563", 20: "0.746", 40: "0.710", 80: "0.862", 160: "0.932"},
    "input-only soft": {10: "0.751", 160: "0.940"},
}  # fmt: skip

Found = dict[str, dict[str, Any]]


def write(config: Any, data: Data, files: Sequence[Path], lost: Sequence[str] = ()) -> None:
    """Merge what the methods left into results.json, metrics.jsonl, figures and report.html.

    Args:
        config: the experiment's configuration.
        data: the data.
        files: of the methods; those that are there count.
        lost: what is to be said of methods that diverged.
    """
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    found: Found = {each["method"]: each for each in read}
    write_metrics(config.out, {name: each["history"] for name, each in found.items()})
    rows = [row for each in found.values() for row in each["rows"]]
    rows += trivial_rows(config, data)
    summary = summarise(rows, baseline=MLM if MLM in found else NONE)
    shown = [_beside(row) for row in summary]
    # Rows are what was measured here; what was published stands in the summary alone, and so on
    # every page that is made of it.
    report.write_results(config.out, rows, shown)
    report.print_table(shown)
    report.write_report(
        config.out,
        "Two Moons as text",
        _INTRO,
        config,
        shown,
        draw(config, data, found, summary),
        [without_a_network(summary), *_notes(config, found), *lost],
    )


def _beside(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the summary, and of accuracy what was published for it, if anything was."""
    if row["metric"] != "accuracy" or row["labels"] not in PUBLISHED.get(row["method"], {}):
        return dict(row)
    return {**row, "published": PUBLISHED[row["method"]][row["labels"]]}


def trivial_rows(config: Any, data: Data) -> list[dict[str, Any]]:
    """Predictors without a network: the more frequent moon, and the nearest labelled point."""
    rows = []
    for method, right in ((NEIGHBOUR, _of_the_nearest), (MAJORITY, _of_the_more_frequent)):
        for n in config.label_counts:
            for seed in config.seed_list:
                points = data_of.labelled(n, seed, fresh=config.fresh_labels)
                rows.append(
                    {"method": method, "seed": seed, "metric": "accuracy",
                     "value": right(points, data), "labels": n}
                )  # fmt: skip
    return rows


def _of_the_nearest(points: data_of.Labelled, data: Data) -> float:
    said = data_of.nearest_neighbour(points, data.test.cells)
    return float((said == data.test.labels).mean())


def _of_the_more_frequent(points: data_of.Labelled, data: Data) -> float:
    del points
    return data_of.majority(data.test)


def shares(margins: np.ndarray) -> list[list[int]]:
    """Margins ``[64, 64]`` as the probability of the second moon, in whole per cent."""
    return np.round(100 / (1 + np.exp(-np.clip(margins, -50, 50)))).astype(int).tolist()


def draw(
    config: Any, data: Data, found: Found, summary: Sequence[Mapping[str, Any]]
) -> list[tuple[str, tuple[Path, Path]]]:
    """Accuracy against labels, MLM accuracy against sequences, decision maps, differences."""
    made = []
    accuracy = [row for row in summary if row["metric"] == "accuracy"]
    curves: dict[str, figures.Curve] = {}
    for method in dict.fromkeys(row["method"] for row in accuracy):
        mine = [row for row in accuracy if row["method"] == method]
        curves[method] = (
            [row["labels"] for row in mine],
            [row["mean"] for row in mine],
            [row["ci95"] or 0.0 for row in mine],
        )
    made.append(
        (
            f"Test accuracy after fine-tuning, with 95 % intervals over {config.seeds} seeds.",
            figures.adaptation_curves(
                config.out / "accuracy", curves, "test accuracy", xlabel="labelled points",
                title="Two Moons as text", limits=(0.0, 1.0),
            ),
        )
    )  # fmt: skip
    trained = {name: each["history"] for name, each in found.items() if each["history"]}
    names = [f"mlm_accuracy_seed{seed}" for seed in config.seed_list]
    if trained:
        made.append(
            (
                "Masked tokens that the students find again, on validation sequences, while they "
                "are pre-trained; without a teacher they are trained to do so.",
                figures.learning_curves(
                    config.out / "mlm",
                    {name: against_samples(history, names) for name, history in trained.items()},
                    xlabel="sequences seen", ylabel="MLM accuracy", limits=(0.0, 1.0),
                ),
            )
        )  # fmt: skip
    made.append(
        (
            "What the first seed says of every cell of the plane after fine-tuning: the "
            "probability of the second moon, from white to dark. Dots are the labelled points.",
            draw_maps(config, data, found),
        )
    )
    if any(row["paired_difference"] is not None for row in accuracy):
        made.append(
            (
                "Differences in test accuracy, paired by seed; filled where the 95 % interval "
                "excludes zero.",
                figures.forest(config.out / "differences", accuracy, "accuracy"),
            )
        )
    return made


def against_samples(history: list[dict[str, Any]], names: list[str]) -> figures.Curve:
    """A learning curve over sequences seen, with its interval over seeds."""
    as_evaluated = [
        {"step": row["samples"], **{f"eval/{name}": row[name] for name in names}} for row in history
    ]
    return learning_curve(as_evaluated, names, mean_ci)


def draw_maps(config: Any, data: Data, found: Found) -> tuple[Path, Path]:
    """The decision maps: a row for each method, a column for each number of labels."""
    counts = config.label_counts
    with drawing.style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        size = (1.7 * len(counts) + 1.2, 1.75 * (len(found) + 1) + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(len(found) + 1, len(counts), squeeze=False)
        for column, n in enumerate(counts):
            points = data_of.labelled(n, config.first_seed, fresh=config.fresh_labels)
            near = 100 * data_of.nearest_neighbour(points, data.cells).reshape(GRID, GRID)
            maps = {name: np.asarray(each["maps"][str(n)]) for name, each in found.items()}
            for row, (name, values) in enumerate({**maps, NEIGHBOUR: near}.items()):
                axes = all_axes[row, column]
                axes.imshow(
                    values.T, origin="lower", cmap="Blues", vmin=-15, vmax=115,
                    interpolation="none",  # in an SVG as it is, 64 x 64, and not drawn larger
                )  # fmt: skip
                x, y = points.cells.T
                colour = np.where(points.labels == 1, drawing.PALETTE[4], drawing.PALETTE[1])
                axes.scatter(x, y, s=5, c=colour, linewidths=0)
                axes.set(xticks=[], yticks=[])
                if row == 0:
                    axes.set_title(f"{n} labels", fontsize=9)
                if column == 0:
                    axes.set_ylabel(name, fontsize=8)
        return drawing.save(figure, config.out / "maps")


def without_a_network(summary: Sequence[Mapping[str, Any]]) -> str:
    """Where the nearest labelled point is better than every network, in a sentence."""
    by: dict[int, dict[str, float]] = {}
    for row in summary:
        if row["metric"] == "accuracy":
            by.setdefault(row["labels"], {})[row["method"]] = row["mean"]
    lost = [n for n, means in by.items() if max(means, key=lambda name: means[name]) == NEIGHBOUR]
    if not lost:
        return "Some network is better than the nearest labelled point at every number of labels."
    return (
        "The nearest labelled point, without any network, is better than all of them with "
        f"{', '.join(map(str, lost))} labelled points."
    )


def _notes(config: Any, found: Found) -> list[str]:
    chosen = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{n} labels {c['checkpoint']} {c['rate']:g}" for n, c in each["chosen"].items()
        )
        for name, each in found.items()
    )
    seconds = ", ".join(
        f"{name} {each['seconds']['pre-training']:.0f} + {each['seconds']['fine-tuning']:.0f}"
        for name, each in found.items()
    )
    notes = [
        f"Every method is fine-tuned for {config.finetune_steps} steps of {config.finetune_batch} "
        f"points, at rates of one grid, {list(config.finetune_rates)}. The rate, and whether the "
        "last student or that of the least validation loss of MLM is fine-tuned, are chosen on as "
        "many other labelled points as there are to learn from.",
        f"Chosen: {chosen}.",
        CHOICE,
        f"A teacher sees {config.teacher_labels} labelled points while it trains: at "
        f"{config.teacher_labels} labels the very points that all methods are fine-tuned on, at "
        "other numbers these and the ones of that number. Methods without a teacher see none.",
        "The published numbers are of one seed and of unequal fine-tuning budgets; where there are "
        "two, of the last checkpoint and of the one with the least loss.",
        f"Wall-clock seconds of pre-training and fine-tuning, all seeds together: {seconds}.",
    ]
    notes += collapses(found, config.seed_list)
    notes += [
        f"What the first teacher of {name} read and wrote: {each['panels']}"
        for name, each in found.items()
        if each["panels"]
    ]
    missing = [name for name in METHODS if name not in found]
    if missing:
        notes.append(f"Not yet in this run: {', '.join(missing)}.")
    return notes


def collapses(found: Found, seeds: Sequence[int]) -> list[str]:
    """Which teachers have collapsed, by their last evaluation, a sentence for each."""
    notes = []
    for name, each in found.items():
        for seed in seeds if each["history"] else ():
            end = f"_seed{seed}"
            last = each["history"][-1].items()
            numbers = {k.removesuffix(end): v for k, v in last if k.endswith(end)}
            if said := has_collapsed(numbers):
                notes.append(f"The teacher of {name}, seed {seed}, has collapsed: {said}.")
    return notes


_INTRO = """Points of two interleaved half circles on a grid of 64 x 64 are written as text, sixteen
at a time, and a small transformer is pre-trained on them: by masked language modelling, or on what
a teacher makes of them, which learns by how well the student does on a few labelled points after
a step, or several, on others. Which pre-training helps to tell the two moons apart from few
labelled points?"""
