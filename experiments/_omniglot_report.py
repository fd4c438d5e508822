"""The run directory of Omniglot: results, adaptation and learning curves, differences, page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments._shared import learning_curve, write_metrics
from jmeta.runtime import figures, report
from jmeta.runtime.statistics import mean_ci, summarise

STEPS = (0, 1, 2, 3, 5)  # inner steps that are scored

Histories = dict[str, list[list[dict[str, Any]]]]


def write(
    config: Any,
    rows: list[dict[str, Any]],
    curves: list[dict[str, np.ndarray]],
    histories: Histories,
) -> None:
    """Write results.json, metrics.jsonl, figures and report.html, and print the table.

    Args:
        config: the experiment's configuration.
        rows: of every method and seed.
        curves: each seed's accuracies ``[episodes, STEPS]`` by method.
        histories: each method's rows of metrics.jsonl, one list for each seed.
    """
    write_metrics(
        config.out,
        {f"{m}, seed {s}": h for m in histories
         for s, h in zip(config.seed_list, histories[m], strict=True)},
    )  # fmt: skip
    settings = {
        "ways": config.ways, "shots": 1, "filters": config.filters, "network": config.network,
        "meta_steps": config.meta_steps, "inner_steps": config.inner_steps,
        "statistics": "transductive",
    }  # fmt: skip
    rows = [row | settings for row in rows]
    summary = summarise(rows, baseline=config.methods[0])
    made = draw_figures(config, summary, curves, histories)
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    report.write_report(
        config.out,
        f"Omniglot, {config.ways}-way 1-shot",
        "Can a conv network, meta-trained on background alphabets, tell new characters apart "
        "from one drawing of each? Exact MAML (mixed mode) and first order see the same episodes "
        "for the same number of meta-steps.",
        config,
        summary,
        made,
        [
            "Results are transductive: batch normalisation uses the statistics of the batch at "
            "hand, so the query drawings of an episode are classified together.",
            f"The checkpoint and the number of inner steps at test (of {list(STEPS)}) were chosen "
            "on held-out background alphabets; so were rate and steps of fine-tuning without "
            "meta-training. Evaluation alphabets chose nothing in this run.",
            "Training CPU minutes are user and system time of the process: compilation, "
            "validation and checkpoints included.",
        ],
    )


def draw_figures(
    config: Any,
    summary: list[dict[str, Any]],
    curves: list[dict[str, np.ndarray]],
    histories: Histories,
) -> list[tuple[str, tuple[Path, Path]]]:
    """Adaptation curves, learning curves and paired differences."""
    drawn: dict[str, figures.Curve] = {}
    for method in curves[0]:
        # Over seeds where there are several, else over episodes.
        several = len(curves) > 1
        values = np.stack([each[method].mean(0) for each in curves]) if several else None
        values = curves[0][method] if values is None else values
        found = [mean_ci(column) for column in values.T]
        half = np.array([f.half_width for f in found], float)
        drawn[method] = (STEPS, [f.mean for f in found], half)
    for row in summary:
        if row["metric"] == "accuracy" and row["method"] not in drawn:
            drawn[row["method"]] = ([0], [row["mean"]], [row["ci95"] or 0.0])
    where = f"{config.ways}-way 1-shot"
    title = f"Omniglot {where}: evaluation characters"
    made = [
        (
            f"Query accuracy after inner steps on the support, {where}, with 95 % intervals. "
            "Methods that take no steps are dotted.",
            figures.adaptation_curves(
                config.out / "adaptation", drawn, "query accuracy", 1 / config.ways, title=title
            ),
        )
    ]
    learning: dict[str, figures.Curve] = {}
    for method, runs in histories.items():
        lines = [learning_curve(run, ["accuracy"], mean_ci) for run in runs]
        found = [mean_ci(column) for column in np.array([line[1] for line in lines]).T]
        half = None if len(runs) == 1 else np.array([f.half_width for f in found], float)
        learning[method] = (lines[0][0], [f.mean for f in found], half)
    if learning:
        drawn_learning = figures.learning_curves(
            config.out / "learning",
            learning,
            ylabel="validation query accuracy",
            title=f"Omniglot {where}: held-out background alphabets",
        )
        caption = "Accuracy on held-out background alphabets during meta-training."
        made.append((caption, drawn_learning))
    made.append(
        (
            "Differences on the same episodes; filled where the interval excludes zero.",
            figures.forest(config.out / "differences", summary, "accuracy"),
        )
    )
    return made
