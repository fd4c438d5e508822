"""The run directory of the question-answering transfer experiment: rows, tables, figures, page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments._shared import scored_row, write_metrics
from jmeta.runtime import drawing, figures, report
from jmeta.runtime.statistics import mean_ci, summarise

NONE = "no intermediate task"
KINDS = ("sequence", "mixture", "Reptile")
ANSWERS = {"exact": "exact answers", "token accuracy": "answer tokens right", "loss": "answer loss"}

Figure = tuple[str, tuple[Path, Path]]
Subset = frozenset[str]


class Seed(NamedTuple):
    """What one seed leaves.

    Attributes:
        seed: its number.
        plans: what each intermediate training left, by name.
        baselines: 1 where a baseline is right, ``[sentences]``, by name.
        target: positions and tokens of fine-tuning on SST-2.
        phrases: rows of SST-2 that could be trained on.
    """

    seed: int
    plans: dict[str, dict[str, Any]]
    baselines: dict[str, np.ndarray]
    target: tuple[int, int]
    phrases: int


def read_diversity(path: Path | None, sources: Sequence[str]) -> dict[Subset, float]:
    """Coefficients of subsets of the sources, ``{"squad+squad2": 0.17, ...}``.

    Args:
        path: a JSON file, or None: no coefficients.
        sources: the sources that there are.

    Returns:
        The coefficient of each subset named; the order of the names does not matter.

    Raises:
        ValueError: the file cannot be read, names a source that is not there or one subset
            twice, or has a value that is no number; the entry is named.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must map subsets such as {'+'.join(sources[:2])!r} to numbers")
    found: dict[Subset, float] = {}
    for name, value in content.items():
        names = name.split("+")
        subset = frozenset(names)
        if not subset <= set(sources) or len(subset) != len(names):
            raise ValueError(f"{path}: {name!r} is no subset of the sources {'+'.join(sources)}")
        if subset in found:
            raise ValueError(f"{path}: the subset {name!r} is there twice")
        if type(value) not in (int, float) or not np.isfinite(value):
            raise ValueError(f"{path}: the coefficient of {name!r} is {value!r}, no number")
        found[subset] = float(value)
    return found


def rows_of(config: Any, each: Seed, bench: Any) -> list[dict[str, Any]]:
    """Result rows of one seed."""
    rows: list[dict[str, Any]] = []
    hits = {name: found["hits"] for name, found in each.plans.items()} | each.baselines
    for name in sorted(hits, key=lambda name: -float(np.mean(hits[name]))):
        row = scored_row(config, name, each.seed, "SST-2 accuracy", hits[name])
        rows.append(row | {"sentences": len(hits[name])})

    def add(method: str, metric: str, value: float, **settings: Any) -> None:
        rows.append(
            {"method": method, "seed": each.seed, "metric": metric, "value": value} | settings
        )

    for source, found in bench.sources.items():
        label = f"{source}, {found.questions[0]} to learn from, {found.questions[1]} scored"
        for metric, shown in ANSWERS.items():
            for name, plan in each.plans.items():
                add(name, shown, plan["answers"][source][metric], questions=label)
            if metric == "exact":
                add("the most frequent answer", shown, found.constant, questions=label)
    for name, plan in each.plans.items():
        add(name, "positions of intermediate training", plan["positions"])
        add(name, "tokens of intermediate training, padding excluded", plan["tokens"])
        add(name, "relative change of the weights before SST-2", plan["distance"])
        add(name, "CPU seconds of intermediate training", plan["seconds"])
    add("every plan", "positions of fine-tuning", each.target[0])
    add("every plan", "tokens of fine-tuning, padding excluded", each.target[1])
    if bench.lm is not None:
        losses = [row["eval/loss"] for row in bench.lm.history if "eval/loss" in row]
        add("small GPT-2", "loss per token on development contexts", losses[-1])
    return rows


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores against no intermediate task, in the order of the mean; the rest as it is."""
    compared = [r for r in rows if r["metric"] in ("SST-2 accuracy", *ANSWERS.values())]
    others = [row for row in rows if row not in compared]
    summary = summarise(compared, baseline=NONE)
    accuracy = [row for row in summary if row["metric"] == "SST-2 accuracy"]
    accuracy.sort(key=lambda row: -row["mean"])
    answers = [row for row in summary if row["metric"] != "SST-2 accuracy"]
    return accuracy + answers + summarise(others)


def against_diversity(
    config: Any, summary: Sequence[Mapping[str, Any]], plans: Sequence[Any],
    diversity: Mapping[Subset, float],
) -> Figure:  # fmt: skip
    """Accuracy of every plan against the diversity of its sources, or against their number."""
    accuracy = {row["method"]: row for row in summary if row["metric"] == "SST-2 accuracy"}
    with drawing.style():
        figure, axes = drawing.canvas(7.4, 4.4)
        for index, kind in enumerate(KINDS):
            chosen = [plan for plan in plans if plan.kind == kind]
            places = [diversity.get(frozenset(plan.sources)) for plan in chosen]
            if not diversity:
                places = _lanes([len(plan.sources) for plan in chosen], 0.24 * (index - 1))
            drawn = [(p, x) for p, x in zip(chosen, places, strict=True) if x is not None]
            if drawn:
                found = [accuracy[plan.name] for plan, _ in drawn]
                axes.errorbar(
                    [x for _, x in drawn], [row["mean"] for row in found],
                    yerr=[row["ci95"] or 0.0 for row in found], fmt="osD"[index], capsize=2,
                    elinewidth=1.2, color=drawing.PALETTE[index], label=kind,
                )  # fmt: skip
        for name, dash in ((NONE, "-"), ("more language modelling", "--")):
            axes.axhline(
                accuracy[name]["mean"], color="#555555", linewidth=1.2, linestyle=dash, label=name
            )
        if not diversity:
            axes.set_xticks(range(1, 1 + max(len(plan.sources) for plan in plans)))
        axes.set_xlabel(
            "diversity coefficient of the sources" if diversity else "number of sources"
        )
        axes.set_ylabel("SST-2 accuracy")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    what = "the diversity coefficient of its sources" if diversity else "the number of its sources"
    known = {"+".join(p.sources): frozenset(p.sources) in diversity for p in plans if p.sources}
    left = [name for name, there in known.items() if diversity and not there]
    caption = f"SST-2 accuracy after each intermediate training against {what}; bars are 95 % "
    caption += f"intervals.{' Without a coefficient: ' + ', '.join(left) + '.' if left else ''}"
    return caption, drawing.save(figure, config.out / "diversity")


def _lanes(counts: Sequence[int], offset: float) -> list[float | None]:
    """Places of points of equal counts side by side, around the count and an offset."""
    places: list[float | None] = []
    for at, count in enumerate(counts):
        before, total = counts[:at].count(count), counts.count(count)
        places.append(count + offset + 0.06 * (before - (total - 1) / 2))
    return places


def learning(config: Any, seeds: Sequence[Seed], plans: Sequence[Any]) -> Figure:
    """Validation accuracy during fine-tuning, after no and after all sources."""
    most = max(len(plan.sources) for plan in plans)
    shown = [p for p in plans if p.kind in ("none", "text") or len(p.sources) == most]
    drawn: dict[str, figures.Curve] = {}
    for plan in shown:
        curves = np.asarray([each.plans[plan.name]["curve"] for each in seeds])
        found = [mean_ci(column) for column in curves[:, :, 1].T]
        half = None if len(seeds) == 1 else np.array([each.half_width or 0.0 for each in found])
        drawn[plan.name] = (curves[0, :, 0], [each.mean for each in found], half)
    return (
        "Accuracy on validation sentences during fine-tuning on SST-2, after no intermediate task "
        "and after all sources.",
        figures.learning_curves(
            config.out / "learning", drawn, xlabel="step of fine-tuning on SST-2",
            ylabel="validation accuracy",
        ),
    )  # fmt: skip


def answers_learned(
    config: Any, summary: Sequence[Mapping[str, Any]], bench: Any, plans: Sequence[Any]
) -> Figure:
    """How much of each source was learned."""
    metric = ANSWERS["token accuracy"]
    with drawing.style():
        names = list(bench.sources)
        figure, axes = drawing.panels(3.0 * len(names) + 2.2, 0.27 * len(plans) + 1.2, len(names))
        for place, name in enumerate(names):
            found = {
                row["method"]: row
                for row in summary
                if row["metric"] == metric and row["questions"].startswith(f"{name},")
            }
            for at, plan in enumerate(plans):
                row, learned = found[plan.name], name in plan.sources
                axes[place].errorbar(
                    row["mean"], at, xerr=row["ci95"] or 0.0, fmt="o", capsize=2, elinewidth=1.2,
                    color=drawing.PALETTE[0] if learned else "#999999",
                    markerfacecolor=drawing.PALETTE[0] if learned else "white",
                )  # fmt: skip
            axes[place].axvline(found[NONE]["mean"], color="#555555", linewidth=1.0)
            axes[place].set_title(name)
            axes[place].set_xlabel(metric)
        axes[0].set_yticks(range(len(plans)), [plan.name for plan in plans])
        axes[0].set_ylim(len(plans) - 0.4, -0.6)
        return (
            "Share of answer tokens that are the likeliest after the gold ones before them, the "
            "end of text included; filled where the plan learned from that source, the line is "
            "the language model as it was.",
            drawing.save(figure, config.out / "answers"),
        )


def write(
    config: Any, seeds: Sequence[Seed], bench: Any, plans: Sequence[Any],
    diversity: Mapping[Subset, float],
) -> None:  # fmt: skip
    """Write results.json, metrics.jsonl, figures and report.html; print the tables.

    Args:
        config: of the run.
        seeds: what each seed left.
        bench: what the seeds shared.
        plans: the intermediate trainings.
        diversity: coefficients of subsets, or none.
    """
    rows = [row for each in seeds for row in rows_of(config, each, bench)]
    if diversity:
        rows = [row | _coefficient(row, plans, diversity) for row in rows]
    summary = summary_of(rows)
    made = [
        against_diversity(config, summary, plans, diversity),
        (
            f"SST-2 accuracy minus that of {NONE}, paired, with 95 % intervals; filled where the "
            "interval excludes zero.",
            figures.forest(
                config.out / "differences", summary, "SST-2 accuracy",
                xlabel=f"accuracy minus that of {NONE}",
            ),
        ),
        learning(config, seeds, plans),
        answers_learned(config, summary, bench, plans),
    ]  # fmt: skip
    histories = {
        f"{name}, then SST-2, seed {each.seed}": [
            {"step": step, "eval/accuracy": value} for step, value in found["curve"]
        ]
        for each in seeds
        for name, found in each.plans.items()
    }
    histories |= {"language model": bench.lm.history} if bench.lm is not None else {}
    write_metrics(config.out, histories)
    report.write_results(config.out, rows, summary)
    report.print_table([row for row in summary if row["metric"] == "SST-2 accuracy"])
    report.write_report(
        config.out,
        "Question answering on the way to sentiment",
        _INTRO,
        config,
        summary,
        made,
        notes(config, seeds, summary),
    )
    print(f"report: {config.out / 'report.html'}")


def _coefficient(
    row: Mapping[str, Any], plans: Sequence[Any], diversity: Mapping[Subset, float]
) -> dict[str, float]:
    """The diversity of a row's sources, as a setting of its accuracy."""
    found = [plan.sources for plan in plans if plan.name == row["method"]]
    subset = frozenset(found[0]) if found else frozenset()
    known = row["metric"] == "SST-2 accuracy" and subset in diversity
    return {"diversity": diversity[subset]} if known else {}


def verdict(summary: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Whether any intermediate task helped, in a sentence."""
    rows = [r for r in summary if r["metric"] == "SST-2 accuracy" and r["method"] in names]

    def clear(row: Mapping[str, Any], sign: int) -> bool:
        half = row["paired_ci95"]
        return half is not None and sign * row["paired_difference"] > half

    up = [row["method"] for row in rows if clear(row, 1)]
    down = [row["method"] for row in rows if clear(row, -1)]
    said = (
        f"Better than {NONE}, with an interval that excludes zero: {'; '.join(up)}."
        if up
        else f"No intermediate training on questions is better than {NONE} with an interval that "
        "excludes zero."
    )
    return said + (f" Worse, likewise: {'; '.join(down)}." if down else "")


_INTRO = """Does answering questions first help a GPT-2 to tell the sentiment of a sentence? One
language model is the start of everything. It learns to answer the questions of every subset of
SQuAD 1.1, SQuAD 2.0 and DuoRC (one source after the other, all mixed, or by Reptile, where each
source is a task and all tasks start from the same weights), always with the same number of rows
of the same length; then it is fine-tuned on SST-2, with the same head, phrases and steps.

Two controls take the same path: no intermediate task, and as much language modelling on the texts
that the questions are about, which is more English without any question. A bag-of-words classifier
and the majority class stand beside them."""


def notes(config: Any, seeds: Sequence[Seed], summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers do and do not show."""
    asked = [
        name
        for name in seeds[0].plans
        if name not in (NONE, "more language modelling")
    ]  # fmt: skip
    over = (
        "Intervals are 95 % t-intervals over seeds: each has its own cut of SST-2, batches and "
        "classification head; the language model they start from is one, so that its own "
        "randomness is not covered."
        if config.seeds > 1
        else "With one seed, intervals are over test sentences (the tables call them episodes) and "
        "do not cover the seed."
    )
    return [
        verdict(summary, asked) + " No correction is made for looking at many rows.",
        over,
        f"SST-2: {config.test} test sentences per seed and {config.validation} validation "
        f"sentences, cut from the training file, whose rows are phrases of its sentences; "
        f"{seeds[0].phrases} rows that share no five words in a row with them are left to train "
        f"on, of which fine-tuning sees {config.target_steps * config.target_batch}. They are not "
        "the official development set. The last weights are scored; nothing was chosen on the "
        "test sentences.",
        "Budget: every intermediate training sees the same number of positions; tokens without "
        "padding differ a little, and are counted. A step of Reptile's inner loop on one task "
        "counts like a step of the others.",
        "Answers: prompts hold the window of the context with the first gold answer. An answer is "
        "exact where greedy decoding would say that gold answer token for token; this is stricter "
        'than the official EM, and on SQuAD 2.0 mostly a matter of saying "unanswerable". '
        "Development questions about a context that any source trains on are left out: the parts "
        "of SQuAD and SQuAD 2.0 share articles.",
    ]
