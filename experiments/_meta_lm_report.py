"""What a run of the text experiment leaves: the methods' files as one table, figures, the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _meta_lm_data as data_of
from experiments._meta_lm_data import Data
from experiments._meta_lm_methods import METHODS, NONE
from experiments._shared import write_metrics
from experiments._teacher_shared import CORRUPTIONS, MLM
from jmeta.methods import has_collapsed
from jmeta.runtime import drawing, figures, report
from jmeta.runtime.statistics import mean_ci, summarise
from jmeta.tasks.scores import aggregate

TRIVIAL = "most frequent class"
STEP, CPU = "seconds of a student's step", "pre-training CPU seconds"
_SHARES = ("inputs_copied", "inputs_masked", "labels_label_tokens", "mask_rate")
_ENTROPIES = ("inputs_entropy", "labels_entropy", "masked_entropy")
_LIMITS = {"probability": (0.0, 1.0), "cosine": (-1.0, 1.0), "entropy, nats": (0.0, np.inf)}

Row = dict[str, Any]
Found = dict[str, dict[str, Any]]
Figure = tuple[str, tuple[Path, Path]]


def score_rows(name: str, seed: int, scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The aggregate over tasks, each task's score, and each metric of a task with several."""
    base = {"method": name, "seed": seed}
    each = {task: list(found["metrics"].values()) for task, found in scores.items()}
    rows: list[Row] = [{**base, "metric": "score", "value": aggregate(each)}]
    for task, found in scores.items():
        settings = {"task": task, "examples": found["n"]}
        mean = float(np.mean(each[task]))
        rows.append({**base, "metric": "score by task", "value": mean, **settings})
        rows += [
            {**base, "metric": "metrics by task", "value": value, "measure": measure, **settings}
            for measure, value in found["metrics"].items()
        ]
    return rows


def rows_of(
    name: str, seed: int, scores: Mapping[str, Any], held_out: Mapping[str, float], trained: Any
) -> list[Row]:
    """Result rows of a method's seed; ``trained`` is its ``Pretrained``, or None."""
    rows = score_rows(name, seed, scores)
    values = {
        "MLM accuracy": held_out["accuracy"],
        "MLM loss": held_out["loss"],
        "mean of score and MLM accuracy": (rows[0]["value"] + held_out["accuracy"]) / 2,
    }
    if trained is not None:
        values |= {CPU: trained.cpu_seconds}
        values |= {} if trained.per_step is None else {STEP: trained.per_step}
        if name not in CORRUPTIONS:
            last = trained.history[-max(1, len(trained.history) // 5) :]
            values["query loss"] = float(np.mean([row["loss"] for row in last]))
    base = {"method": name, "seed": seed}
    rows += [{**base, "metric": metric, "value": value} for metric, value in values.items()]
    if trained is not None and trained.looks:
        rows += [
            {**base, "metric": "monitors at the end", "monitor": monitor, "value": value}
            for monitor, value in trained.looks[-1].items()
            if monitor not in ("step", "loss", "accuracy")
        ]
    return rows


def trivial_rows(config: Any, data: Data) -> list[Row]:
    """The most frequent class of each task; of ReCoRD, the entity that is mentioned most."""
    scores = {}
    for name, task in data.tasks.items():
        found = data_of.score(task.task, data_of.trivial(task), task.val[0])
        scores[name] = {"metrics": found.metrics, "n": found.n}
    return [row for seed in config.seed_list for row in score_rows(TRIVIAL, seed, scores)]


def cost_rows(rows: Sequence[Row]) -> list[Row]:
    """What a student's step costs in steps of MLM, seed by seed."""
    steps = [row for row in rows if row["metric"] == STEP]
    own = {row["seed"]: row["value"] for row in steps if row["method"] == MLM}
    return [
        {**row, "metric": "a student's step in steps of MLM",
         "value": row["value"] / own[row["seed"]]}
        for row in steps if row["seed"] in own
    ]  # fmt: skip


def write(config: Any, data: Data, files: Sequence[Path]) -> None:
    """Merge what the methods left into results.json, metrics.jsonl, figures and report.html."""
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    found: Found = {each["method"]: each for each in read}
    write_metrics(
        config.out,
        {
            f"{name}, seed {seed}": history
            for name, each in found.items()
            for seed, history in zip(config.seed_list, each["history"], strict=False)
        },
    )
    rows = [row for each in found.values() for row in each["rows"]] + trivial_rows(config, data)
    rows += cost_rows(rows)
    baseline = MLM if MLM in found else NONE
    scored = ("score", "score by task")
    summary = summarise([row for row in rows if row["metric"] in scored], baseline=baseline)
    summary += summarise([row for row in rows if row["metric"] not in scored])
    report.write_results(config.out, rows, summary)
    report.print_table([row for row in summary if row["metric"] != "monitors at the end"])
    report.write_report(
        config.out,
        "What to pre-train on: text",
        _INTRO,
        config,
        summary,
        draw(config, found, summary),
        _notes(config, data, found),
    )
    print(f"report: {config.out / 'report.html'}")


def _curve(runs: Sequence[Sequence[Row]], key: str) -> figures.Curve:
    """A number of the rows over the student's steps, with its interval over seeds."""
    rows = [[row for row in run if key in row] for run in runs]
    means = [mean_ci([row[key] for row in at]) for at in zip(*rows, strict=True)]
    half = None if len(runs) == 1 else [each.half_width or 0.0 for each in means]
    return [row["step"] for row in rows[0]], [each.mean for each in means], half


def _curves(found: Found, part: str, keys: Sequence[str]) -> dict[str, figures.Curve]:
    """The curves of all methods that have one of the keys."""
    drawn = {}
    for name, each in found.items():
        for key in keys:
            if any(key in row for run in each[part] for row in run):
                label = f"{name}: {key.replace('_', ' ')}" if len(keys) > 1 else name
                drawn[label] = _curve(each[part], key)
    return drawn


def draw(config: Any, found: Found, summary: Sequence[Row]) -> list[Figure]:
    """Scores by task, differences, losses and monitors over steps, costs."""
    made: list[Figure] = []
    over = f"95 % intervals over {config.seeds} seeds" if config.seeds > 1 else "one seed"
    by_task = [row for row in summary if row["metric"] == "score by task"]
    made.append((f"The score of each task, {over}.", draw_scores(config.out / "scores", by_task)))
    total = [row for row in summary if row["metric"] == "score" and row["paired_difference"]]
    if total:
        path = figures.forest(config.out / "differences", total)
        said = "Differences in the mean score of all tasks, paired by seed; filled where the 95 % "
        made.append((said + "interval excludes zero.", path))
    teachers = {name: each for name, each in found.items() if name not in (*CORRUPTIONS, NONE)}
    panels = (
        ("query", teachers, "history", ("loss",), "query loss",
         "The loss that a teacher descends: of its student on query examples, after its steps "
         "on support examples. Methods with MLM among their tasks have other queries."),
        ("mlm", found, "looks", ("loss",), "MLM loss",
         "The students' loss of masked language modelling on held-out text: the loss that only "
         "MLM's students are trained on."),
        ("entropy", found, "looks", _ENTROPIES, "entropy, nats",
         "Mean entropy of what a teacher writes; towards zero, it always writes the same."),
        ("shares", found, "looks", _SHARES, "probability",
         "How likely a teacher is to copy a token, to mask it, and to label it with a class of a "
         "task."),
        ("cosine", teachers, "history", ("diagnostics/cosine",), "cosine",
         "Cosine between the meta-gradient and the gradient of the teacher's own MLM losses."),
    )  # fmt: skip
    for stem, of, part, keys, label, caption in panels:
        curves = _curves(of, part, keys)
        if curves:
            path = figures.learning_curves(
                config.out / stem, curves, xlabel="outer step" if part == "history" else
                "step of the student", ylabel=label,
                limits=_LIMITS.get(label, (-np.inf, np.inf)),
            )  # fmt: skip
            made.append((caption, path))
    measured = {STEP: "wall time of a student's step", CPU: "CPU time in all"}
    costs = [row for row in summary if row["metric"] in measured]
    if any(row["metric"] == STEP and row["method"] == MLM for row in costs):
        path = figures.cost_figure(config.out / "cost", costs, reference=MLM, metrics=measured)
        made.append(("What pre-training costs, in multiples of MLM at equal student steps.", path))
    return made


def draw_scores(path: Path, rows: Sequence[Row]) -> tuple[Path, Path]:
    """A line for each task, a mark for each method."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    with drawing.style():
        figure, axes = drawing.canvas(6.6, 0.5 * len(tasks) + 1.5)
        for index, name in enumerate(names):
            mine = [row for row in rows if row["method"] == name]
            shift = 0.6 * (index / max(1, len(names) - 1) - 0.5)
            places = [tasks.index(row["task"]) + shift for row in mine]
            half = [row["ci95"] or 0.0 for row in mine]
            axes.errorbar(
                [row["mean"] for row in mine], places, xerr=half, fmt="o", markersize=4, capsize=2,
                color=drawing.look(index)["color"], label=name,
            )  # fmt: skip
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(len(tasks) - 0.4, -0.6)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -2), min(high, 102))  # an interval of few seeds is cut
        axes.set_xlabel("score, per cent")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
        return drawing.save(figure, path)


def _notes(config: Any, data: Data, found: Found) -> list[str]:
    notes = [
        f"Every method's student takes {config.steps} steps on {config.batch} x "
        f"{config.micro_batches} windows of {config.positions} tokens, and is fine-tuned on each "
        f"task for {config.finetune_epochs} epochs, at most {config.finetune_steps} steps, at one "
        "rate; the last student is scored, and nothing is chosen on scored examples. What the "
        "steps cost is in the tables.",
        "A teacher sees the training examples of the tasks, which the student is fine-tuned on; "
        "methods without a teacher see none of them.",
        "A task's score is the mean of its official metrics; the score is the mean over tasks. "
        "Validation sets are scored"
        + (f", at most {config.scored_examples} examples each." if config.scored_examples else "."),
        "Published, on validation sets, one seed, six layers of width 256: MLM 52.4, soft 46.6.",
    ]
    if config.mask_bug:
        notes.append(
            "The label mask is wrong on purpose: where MLM is a labelled task, positions without a "
            "label count as [PAD]."
        )
    for name, each in found.items():
        for seed, looks in zip(config.seed_list, each["looks"], strict=False):
            if looks and (said := has_collapsed(looks[-1])):
                notes.append(f"The teacher of {name}, seed {seed}, has collapsed: {said}.")
        if any(each["panels"]):
            notes.append(f"What the first teacher of {name} read, wrote, and named at the end:")
            notes += each["panels"][0].splitlines()
    missing = [name for name in METHODS if name not in found]
    if missing:
        notes.append(f"Not in this run: {', '.join(missing)}.")
    return notes


_INTRO = """A small transformer is pre-trained on unlabelled text: by masked language modelling
(MLM), or on what a teacher makes of the text. The teacher learns by how well its student does on a
few labelled examples of the tasks after a step (or several) on as many others. Which pre-training
helps to fine-tune on the tasks?

A soft teacher writes distributions over tokens and labels; an input-only one writes the tokens
alone, and the labels are the text itself; a mask-only one chooses which tokens are hidden, and a
mask-budget one which, but not how many. One of replacements writes other tokens for some, and the
student is asked for those alone. Three methods have no teacher: denoising is the corruption of MLM
with every token asked for, random tokens is MLM with a random token for each it hides, and random
masks MLM with [MASK] for each."""
