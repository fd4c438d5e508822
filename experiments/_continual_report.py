"""The run directory of continual pre-training: rows, tables, probabilities over time, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._continual_model import ADAMW, NAMES
from experiments._continual_samplers import LEARNED, UNIFORM
from experiments._shared import write_metrics
from jmeta.runtime import drawing, figures, report
from jmeta.runtime.statistics import mean_ci, summarise

NONE, MAJORITY = "no continual pre-training", "majority"
MEAN = "mean of tasks"
OVERHEAD = "CPU time of the sampler, share of training"
MOVING = ("loss-proportional", *LEARNED)

Figure = tuple[str, tuple[Path, Path]]


def rows_of(config: Any, found: Sequence[Mapping[str, Any]], trivial: Mapping[str, float]):
    """Result rows of all runs."""
    rows: list[dict[str, Any]] = []

    def add(method: str, seed: int, metric: str, value: float) -> None:
        rows.append({"method": method, "seed": seed, "metric": metric, "value": value})

    def add_scores(method: str, seed: int, scores: Mapping[str, float]) -> None:
        add(method, seed, MEAN, float(np.mean(list(scores.values()))))
        for task, value in scores.items():
            add(method, seed, task, value)

    for run in found:
        for rule, scores in run["scores"].items():
            name = run["name"] if rule == ADAMW else f"{run['name']}, fine-tuned by {rule}"
            add_scores(name, run["seed"], scores)
    for seed in config.seed_list:
        add_scores(MAJORITY, seed, trivial)
    for run in found:
        for name, loss in run["losses"].items():
            add(run["name"], run["seed"], f"held-out loss of {name}", loss)
        if "drawn" in run:
            total = sum(run["drawn"])
            for name, drawn in zip(NAMES, run["drawn"], strict=True):
                add(run["name"], run["seed"], f"share of steps on {name}", drawn / total)
            training, sampler = run["seconds"]
            if training:  # a run of two windows has compiled and no more
                add(run["name"], run["seed"], OVERHEAD, sampler / training)
    return rows


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every score and loss against uniform; the mean of tasks in its order, the rest as it is."""
    plain = [row for row in rows if row["metric"].startswith(("share", "CPU"))]
    summary = summarise([row for row in rows if row not in plain], baseline=UNIFORM)
    means = [row for row in summary if row["metric"] == MEAN]
    means.sort(key=lambda row: -row["mean"])
    return [*means, *(row for row in summary if row["metric"] != MEAN), *summarise(plain)]


def probabilities(config: Any, found: Sequence[Mapping[str, Any]]) -> Figure:
    """Probabilities of the objectives over time, a panel for each sampler that moves them."""
    shown = [name for name in MOVING if name in config.samplers]
    with drawing.style():
        figure, axes = drawing.panels(2.6 * len(shown) + 1.2, 3.4, max(1, len(shown)))
        for panel, name in zip(axes, shown, strict=False):
            runs = [np.asarray(r["probabilities"]) for r in found if r["name"] == name]
            steps, values = runs[0][:, 0], np.stack([run[:, 1:] for run in runs])
            for k, objective in enumerate(NAMES):
                mean = values[:, :, k].mean(0)
                look = drawing.look(k)
                panel.plot(steps, mean, label=objective, **look)
                if len(runs) > 1:
                    half = [mean_ci(column).half_width or 0.0 for column in values[:, :, k].T]
                    panel.fill_between(
                        steps, mean - half, mean + half, color=look["color"], alpha=0.12
                    )
            panel.set_title(name)
            panel.set_xlabel("step")
            panel.set_ylim(0, 1)
        axes[0].set_ylabel("probability")
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
        return (
            "Probability of each objective during continual pre-training: mean over seeds, shaded "
            "its 95 % interval. What UCB draws through a window is certain, so that its mean over "
            "seeds is a share of them.",
            drawing.save(figure, config.out / "probabilities"),
        )


def verdict(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether a learned sampler beats uniform, and what continual pre-training is worth at all."""
    means = {row["method"]: row for row in summary if row["metric"] == MEAN}

    def difference(name: str) -> str:
        row = means[name]
        return report.format_interval(row["paired_difference"], row["paired_ci95"], sign=True)

    def clear(name: str, sign: int) -> bool:
        half = means[name]["paired_ci95"]
        return half is not None and sign * means[name]["paired_difference"] > half

    samplers = [n for n in means if n not in (NONE, MAJORITY, UNIFORM) and "fine-tuned" not in n]
    better = [name for name in samplers if name in LEARNED and clear(name, 1)]
    learned = [name for name in samplers if name in LEARNED]
    if not learned:
        return ["No learned sampler was run."]
    best = max(learned, key=lambda name: means[name]["mean"])
    said = [
        f"Learned samplers that beat uniform, with an interval that excludes zero: "
        f"{'; '.join(better)}."
        if better
        else "No learned sampler beats uniform with an interval that excludes zero; the best, "
        f"{best}, differs by {difference(best)} points."
    ]
    rules = [name for name in samplers if name not in LEARNED]
    up, down = ([n for n in rules if clear(n, sign)] for sign in (1, -1))
    if up:
        said.append(f"Rules that beat uniform, likewise: {'; '.join(up)}.")
    worse = [name for name in samplers if name in LEARNED and clear(name, -1)]
    if down or worse:
        said.append(f"Below uniform, likewise: {'; '.join([*down, *worse])}.")
    word = "is below" if clear(NONE, -1) else "is above" if clear(NONE, 1) else "is not told from"
    said.append(f"No continual pre-training {word} uniform ({difference(NONE)} points).")
    tuned = [name for name in means if "fine-tuned" in name]
    said += [f"{name} differs from AdamW by {difference(name)} points." for name in tuned]
    return said


def write(
    config: Any, found: Sequence[Mapping[str, Any]], trivial: Mapping[str, float],
    base: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Write results.json, metrics.jsonl, figures and report.html; print the tables.

    Args:
        config: of the run.
        found: what each sampler and seed left.
        trivial: scores by task without a network.
        base: rows of the encoder's own training.
    """
    rows = rows_of(config, found, trivial)
    summary = summary_of(rows)
    histories = {
        f"{run['name']}, seed {run['seed']}": [
            {"step": int(step)} | dict(zip(NAMES, shares, strict=True))
            for step, *shares in run["probabilities"]
        ]
        for run in found
        if "probabilities" in run
    }
    write_metrics(config.out, {"encoder": base} | histories)
    report.write_results(config.out, rows, summary)
    made = [
        (
            "Mean score after fine-tuning minus that of uniform, paired by seed, with 95 % "
            "intervals; filled where the interval excludes zero.",
            figures.forest(
                config.out / "differences", summary, MEAN, xlabel="points against uniform"
            ),
        ),
        probabilities(config, found),
    ]
    report.print_table([row for row in summary if row["metric"] == MEAN])
    notes = verdict(summary)
    print("\n".join(notes))
    report.write_report(
        config.out, "Continual pre-training on five objectives", _INTRO, config, summary, made,
        [*notes, *_NOTES],
    )  # fmt: skip


_INTRO = """An encoder goes on learning from text by five objectives: masked language modelling
(mlm), the same guided to names (emlm), detecting added (atd) and deleted (dtd) tokens, and
contrastive sentence embedding (cse). Each step takes one of them. Which, is up to a sampler.

All samplers start from the same encoder and, of a seed, see the same rows in the same order. Then
every result is fine-tuned on each task with the same head, batches and dropout."""

_NOTES = [
    "The budget is equal in the tokens trained on. What a sampler measures on held-out rows, and "
    "what the exact meta-gradient computes and forgets, comes on top: its CPU time as a share "
    "of training is below.",
    "Scores are the mean of a task's official metrics, in per cent.",
]
