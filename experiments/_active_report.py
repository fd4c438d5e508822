"""The run directory of the active few-shot experiment: rows, tables, a figure, page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from experiments._shared import scored_row
from jmeta.runtime import drawing, report
from jmeta.runtime.statistics import summarise

KINDS = ("balanced", "skewed")
ALL = "all of the pool labelled"
BASELINE = "random"
ACCURACY, RARE = "accuracy", "labels of the rarest class found"

Found: TypeAlias = dict[str, dict[str, dict[str, list[list[float]]]]]
"""kind of pool -> policy -> what -> ``[rounds][tasks]``."""


def rows_of(config: Any, found: Mapping[int, Found]) -> list[dict[str, Any]]:
    """Result rows."""
    rows = []
    for seed, kinds in found.items():
        for kind, policies in kinds.items():
            for policy, parts in policies.items():
                for what, metric in (("accuracy", ACCURACY), ("rarest", RARE)):
                    for index, values in enumerate(parts[what]):
                        count = config.ways + index * config.budget
                        row = scored_row(config, policy, seed, metric, values) | {"pool": kind}
                        if policy != ALL:
                            row["labels"] = count
                        if what == "accuracy" or (index == config.rounds and kind == "skewed"):
                            rows.append(row)
    return rows


def draw_curves(config: Any, summary: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[Path, Path]]:
    """Accuracy against the number of labels, one panel for each kind of pool."""
    with drawing.style():
        figure, every = drawing.panels(10.0, 4.0, len(KINDS))
        for axes, kind in zip(every, KINDS, strict=True):
            mine = [r for r in summary if r["metric"] == ACCURACY and r["pool"] == kind]
            for index, policy in enumerate(dict.fromkeys(r["method"] for r in mine)):
                rows = [r for r in mine if r["method"] == policy]
                if policy == ALL:
                    axes.axhline(rows[0]["mean"], color="#555555", linewidth=1.2, label=policy)
                    continue
                axes.errorbar(
                    [r["labels"] for r in rows], [r["mean"] for r in rows],
                    yerr=[r["ci95"] or 0.0 for r in rows], capsize=2, elinewidth=1.0,
                    marker="o", label=policy, **drawing.look(index),
                )  # fmt: skip
            axes.set_title(f"{kind} pool")
            axes.set_xlabel("labelled passages")
        every[0].set_ylabel("accuracy")
        every[-1].legend(frameon=False)
        made = drawing.save(figure, config.out / "curves")
    unit = "seeds" if config.seeds > 1 else "tasks"
    return (f"Accuracy after each round, with 95 % intervals over {unit}.", made)


def verdict(config: Any, summary: Sequence[Mapping[str, Any]]) -> str:
    """Which policies differ from random choice at the last round, in sentences."""
    last = config.ways + config.rounds * config.budget
    said = []
    for kind in KINDS:
        rows = [
            r for r in summary
            if r["metric"] == ACCURACY and r["pool"] == kind and r.get("labels") == last
            and r["method"] != BASELINE
        ]  # fmt: skip
        parts = []
        for row in rows:
            gap, half = row["paired_difference"], row["paired_ci95"]
            clear = half is not None and abs(gap) > half
            how = ("better than random" if gap > 0 else "worse than random") if clear else (
                "not told apart from random"
            )  # fmt: skip
            parts.append(f"{row['method']} {how} ({report.format_interval(gap, half, sign=True)})")
        said.append(f"{kind.capitalize()} pools, {last} labels: {'; '.join(parts)}.")
    return " ".join(said)


def write(config: Any, found: Mapping[int, Found]) -> None:
    """Write results.json, the figure and report.html; print the tables."""
    rows = rows_of(config, found)
    summary = summarise(rows, baseline=BASELINE)
    report.write_results(config.out, rows, summary)
    last = config.ways + config.rounds * config.budget
    shown = [r for r in summary if r.get("labels", last) in (config.ways, last)]
    report.print_table(shown)
    said = verdict(config, summary)
    print(said)
    report.write_report(
        config.out, "Which passages should be labelled?", _INTRO, config, shown,
        [draw_curves(config, summary)],
        [
            said + " No correction is made for looking at many rows.",
            "All policies begin with the same labelled passage of each class, see the same pool, "
            "and use the same classifier: penalised logistic regression on features that were "
            "trained on other classes. Classes are weighted alike in its loss, also where the pool "
            "is skewed; queries are balanced.",
        ],
    )  # fmt: skip


_INTRO = """A task of unseen classes comes with a pool of passages without labels, and a few may be
labelled. Random choice, the entropy of predictions, k-means clusters and BAIT, which covers the
pool's Fisher information, choose in rounds; after each a linear classifier is fitted to what is
labelled.

Pools are balanced, or skewed: a third of the passages are of each of two classes, a twelfth of
each of two others."""
