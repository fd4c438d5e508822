"""Why a teacher loses to MLM on Two Moons, or wins: the teachers with settings changed.

Every variant is pre-trained and fine-tuned as ``two_moons`` does; one that is done is kept.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments import _two_moons_data as data_of
from experiments import _two_moons_report as page
from experiments import two_moons
from experiments._shared import command_line, record, write_metrics
from experiments._teacher_shared import (
    DENOISING,
    MLM,
    RANDOM,
    RANDOM_MASKS,
    REPLACEMENTS,
    named,
)
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, figures, report
from jmeta.runtime.statistics import summarise

BASE, HARD, BUDGET = "soft", "hard", "mask-budget"
SHARES = (0.05, 0.3, 0.5, 0.7, 0.9)  # of tokens that MLM hides, beside the published 0.15
JUDGE: dict[str, Any] = {"among_classes": True, "support_steps": 10}  # nearer to fine-tuning
# The one judge of two_moons_judge that prefers students of MLM.
FORTY: dict[str, Any] = {
    "among_classes": True, "support_steps": 100, "inner_rate": 0.01, "teacher_labels": 40,
    "labelled_batch": 20,
}  # fmt: skip


class Variant(NamedTuple):
    """One way to pre-train, and what it is compared with.

    Attributes:
        method: of ``two_moons``.
        changes: the settings that differ from those of its preset.
        against: the variant that it differs from in these.
        remark: what else differs by that, for the report.
    """

    method: str
    changes: dict[str, Any]
    against: str = BASE
    remark: str = ""


VARIANTS: dict[str, Variant] = {
    MLM: Variant(MLM, {}),
    **{f"MLM {share}": Variant(MLM, {"masked": share}, MLM) for share in SHARES},
    DENOISING: Variant(
        DENOISING, {}, remark="no teacher, MLM's corruption, and every token is asked for, as "
        "where a teacher writes everything, not the hidden ones alone",
    ),
    RANDOM: Variant(
        RANDOM, {}, remark="no teacher, MLM with a random token wherever it has [MASK] or leaves a "
        "token as it is",
    ),
    BASE: Variant("soft", {}),
    "mask bug": Variant("soft", {"mask_bug": True}),
    "MLM no task": Variant("soft", {"mlm_task": ()}),
    "first order": Variant("soft", {"soft_gradient": "first_order"}),
    "four inner steps": Variant(
        "soft", {"inner_steps": 4},
        remark="its teacher takes as many steps, so that its student takes four times as many",
    ),
    "restarted students": Variant(
        "soft", {"restart_every": 1000},
        remark="the student that is fine-tuned began at the last of them",
    ),
    "four students": Variant(
        "soft", {"population": 4},
        remark="the one that is fine-tuned was taught a quarter of the time",
    ),
    HARD: Variant("hard", {}),
    "hard first order": Variant("hard", {"coefficient": "first_order"}, HARD),
    "hard as published": Variant(
        "hard",
        {"coefficient": "cosine", "baseline": "none", "weighting": "mean", "hard_weight": 1.0},
        HARD, "four settings differ",
    ),
    "input-only soft": Variant("input-only soft", {}),
    "input-only soft led": Variant(
        "input-only soft", {"input_weight": 100.0},
        remark="its meta-gradient weighs a hundred times as much as that of input-only soft",
    ),
    "input-only soft as soft": Variant(
        "input-only soft", {"input_weight": 100.0, "mlm_task": ("input-only soft",)},
        remark="the soft teacher's settings: a weight of a hundred, and MLM as one of the tasks",
    ),
    "input-only hard": Variant("input-only hard", {}),
    "input-only hard not led": Variant(
        "input-only hard", {"hard_weight": 1.0},
        remark="its meta-gradient weighs a hundredth of that of input-only hard",
    ),
    "mask-only": Variant("mask-only", {}, BUDGET, "its teacher chooses how many to mask, too"),
    BUDGET: Variant("mask-budget", {}),
    RANDOM_MASKS: Variant(
        RANDOM_MASKS, {}, BUDGET, "no teacher, MLM with [MASK] wherever it has a random token or "
        "leaves a token as it is: about what a teacher of masks begins with",
    ),
    "among classes": Variant("mask-budget", {"among_classes": True}, BUDGET),
    "ten support steps": Variant("mask-budget", {"support_steps": 10}, BUDGET),
    "both": Variant(
        "mask-budget", JUDGE, BUDGET, "scored among classes after ten support steps"
    ),
    "forty labels": Variant(
        "mask-budget", FORTY, BUDGET,
        "its teacher sees forty labelled points, students of ten are not given the other thirty; "
        "twenty are for a hundred support steps at 0.01, and it is scored among classes",
    ),
    "forty labels first order": Variant(
        "mask-budget", {**FORTY, "soft_gradient": "first_order"}, BUDGET,
        "the same without the Hessians of the steps on labelled points",
    ),
    "forty labels kept small": Variant(
        "mask-budget", {**FORTY, "largest_gradient": 10.0}, BUDGET,
        "the same as forty labels, but its teacher does not move where its meta-gradient has a "
        "norm of ten or more, as at students that know little",
    ),
    REPLACEMENTS: Variant(REPLACEMENTS, {}),
    "replacements led": Variant(
        REPLACEMENTS, {"input_weight": 100.0}, REPLACEMENTS,
        "its meta-gradient weighs a hundred times as much, and leads its own MLM losses",
    ),
    "replacements both": Variant(
        REPLACEMENTS, {"input_weight": 100.0, **JUDGE}, REPLACEMENTS,
        "its meta-gradient weighs a hundred times as much, and its student is scored among "
        "classes after ten support steps",
    ),
}  # fmt: skip
# What the last evaluation of pre-training says of student and teacher.
MONITORS = ("mlm_accuracy", "labels_entropy", "inputs_entropy", "inputs_copied",
            "inputs_variety", "meta_norm", "auxiliary_norm", "cosine",
            "mask_rate", "masked_entropy", "skipped")  # fmt: skip


def folder_of(config: Any, name: str) -> Path:
    """Where a variant is trained."""
    return config.out / "variants" / name.replace(" ", "-")


def setting(config: Any, name: str) -> two_moons.Config:
    """The configuration of a variant, in a folder of its own.

    Raises:
        ValueError: it cannot be; the message names the variant.
    """
    variant, preset = VARIANTS[name], two_moons.PRESETS[config.size]
    inner = variant.changes.get("inner_steps", 1)
    shared = {
        field: getattr(config, field)
        for field in ("seeds", "first_seed", "resume", "evaluations", "label_counts", "devices")
    }
    try:
        return dataclasses.replace(
            preset, **shared, **variant.changes, methods=(variant.method,),
            samples=config.samples * inner, out=folder_of(config, name),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"variant {name!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Why a teacher loses to MLM on Two Moons, or wins: teachers with settings changed."""

    seeds: int = 5
    """Number of seeds, trained side by side."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which are trained by this call; those that are in the run directory already are kept."""
    size: Literal["paper", "smoke"] = "paper"
    """Whose networks, batches and fine-tuning: a preset of two_moons."""
    samples: int = 64_000
    """Sequences that each variant is pre-trained on, a tenth of the published number; four times
    as many with four inner steps."""
    evaluations: int = 10
    """How often students and teachers are looked at, and saved, while they train."""
    label_counts: tuple[int, ...] = (10,)
    """Labelled points to fine-tune on; as many others choose checkpoint and rate."""
    devices: int = 0
    """Devices that the seeds are spread over, each with a program of its own to compile; 0: all.
    Several processes train all seeds on one each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "variants", named("variants", self.variants, tuple(VARIANTS)))
        if not self.variants:
            raise ValueError(f"no variants: choose of {', '.join(VARIANTS)}")
        for name in self.variants:
            setting(self, name)  # which refuses what cannot be


PRESETS = {
    "paper": Config(),
    "smoke": Config(seeds=2, variants=(MLM, "mask-only"), size="smoke", samples=64,
                    evaluations=2, label_counts=(2,)),
}  # fmt: skip


def rows_of(name: str, kept: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What a variant left, under its own name, with the monitors of its last evaluation."""
    rows = [{**row, "method": name} for row in kept["rows"] if row["metric"] != "MLM accuracy"]
    last = kept["history"][-1]
    rows += [
        {"method": name, "seed": seed, "metric": monitor.replace("_", " "),
         "value": last[f"{monitor}_seed{seed}"]}
        for monitor in MONITORS
        for seed in seeds
        if f"{monitor}_seed{seed}" in last
    ]  # fmt: skip
    return rows


def write(config: Config, lost: Sequence[str] = ()) -> None:
    """Merge what the variants left into results.json, figures and report.html.

    Args:
        config: the experiment's configuration.
        lost: what is to be said of variants that diverged.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, variant in VARIANTS.items():
        file = two_moons.file_in(folder_of(config, name), variant.method)
        if file.exists():
            found[name] = json.loads(file.read_text(encoding="utf-8"))
    if not found:
        return  # all so far have diverged
    write_metrics(config.out, {name: each["history"] for name, each in found.items()})
    seeds = config.seed_list
    rows = [row for name, each in found.items() for row in rows_of(name, each, seeds)]
    summary: list[dict[str, Any]] = []
    pictures: list[tuple[str, tuple[Path, Path]]] = []
    for base in (BASE, MLM, HARD, BUDGET, REPLACEMENTS):
        mine = [name for name in found if VARIANTS[name].against == base]
        if base != BASE:
            mine = [base, *mine] if base in found and mine else mine
        if not mine:
            continue
        baseline = base if base in found else mine[0]
        part = summarise([row for row in rows if row["method"] in mine], baseline=baseline)
        accuracy = [row for row in part if row["metric"] == "accuracy"]
        if any(row["paired_difference"] is not None for row in accuracy):
            caption = f"Test accuracy against {baseline}, by seed; filled where 0 is excluded."
            drawn = figures.forest(config.out / f"differences-{base}", accuracy, "accuracy")
            pictures.append((caption, drawn))
        # The other bases stand in the first table, where they are compared with the soft teacher.
        summary += [row for row in part if base == BASE or row["method"] != base]
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    soft = ", ".join(name for name, variant in VARIANTS.items() if variant.method == "soft")
    notes = [
        f"Pre-trained on {config.samples} sequences. Variants of the soft teacher: {soft}.",
        *(f"{name}: {VARIANTS[name].remark}." for name in found if VARIANTS[name].remark),
        "Test accuracy is that after fine-tuning; rate and checkpoint are chosen on as many other "
        "labelled points. Monitors are those of the last evaluation.",
        page.CHOICE,
        *page.collapses(found, seeds),
    ]
    missing = [name for name in VARIANTS if name not in found]
    if missing:
        notes.append(f"Not in this run: {', '.join(missing)}.")
    notes += lost
    said = (__doc__ or "").partition("\n")[0]
    report.write_report(
        config.out, "Why a teacher loses, or wins", said, config, summary, pictures, notes
    )


def run(config: Config) -> None:
    """Train the variants that are asked for, and write the run directory after each."""
    record(config, "variants", "devices")
    lost = []
    for name in config.variants:
        given = setting(config, name)
        if not two_moons.file_in(given.out, VARIANTS[name].method).exists():
            record(given, "devices")
            if distributed.is_writer():
                print(f"variant: {name}", file=sys.stderr, flush=True)
            data = data_of.load(given.validation_sequences, given.test_points)
            lost += [f"{name}: {said}" for said in two_moons.train(given, data)[1]]
        if distributed.is_writer():
            write(config, lost)
    if lost:
        two_moons.left_out(lost)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    two_moons.a_device_for_each_core()
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
