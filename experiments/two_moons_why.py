"""Why a teacher loses to MLM on Two Moons: the soft teacher, with one thing changed at a time.

Every variant is pre-trained and fine-tuned as ``two_moons`` does; one that is done is kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from experiments import _two_moons_data as data_of
from experiments import _two_moons_report as page
from experiments import two_moons
from experiments._shared import command_line, record, write_metrics
from experiments._teacher_shared import named
from experiments._two_moons_methods import MLM
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, figures, report
from jmeta.runtime.statistics import summarise

BASE = "soft"
# What is pre-trained, and the settings that differ from those of its preset.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    MLM: (MLM, {}),
    BASE: ("soft", {}),
    "mask bug": ("soft", {"mask_bug": True}),
    "MLM no task": ("soft", {"mlm_task": ()}),
    "first order": ("soft", {"soft_gradient": "first_order"}),
    "four inner steps": ("soft", {"inner_steps": 4}),
    "restarted students": ("soft", {"restart_every": 500}),
    "four students": ("soft", {"population": 4}),
    "hard": ("hard", {}),
    "hard first order": ("hard", {"coefficient": "first_order"}),
    "hard as published": (
        "hard",
        {"coefficient": "cosine", "baseline": "none", "weighting": "mean", "hard_weight": 1.0},
    ),
    "input-only soft": ("input-only soft", {}),
    "mask-only": ("mask-only", {}),
}
# What the last evaluation of pre-training says of student and teacher.
MONITORS = ("mlm_accuracy", "labels_entropy", "inputs_entropy", "inputs_copied", "cosine")


def setting(config: Any, name: str) -> two_moons.Config:
    """The configuration of a variant, with a folder of its own."""
    method, changes = VARIANTS[name]
    shared = {
        field: getattr(config, field)
        for field in ("seeds", "first_seed", "resume", "samples", "evaluations", "label_counts",
                      "devices")
    }  # fmt: skip
    return dataclasses.replace(
        two_moons.PRESETS[config.size], **shared, methods=(method,), **changes,
        out=config.out / "variants" / name.replace(" ", "-"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Why a teacher loses on Two Moons: the soft teacher with one thing changed at a time."""

    seeds: int = 5
    """Number of seeds, trained side by side."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which are trained by this call; those that are in the run directory already are kept."""
    size: Literal["paper", "smoke"] = "paper"
    """Whose networks, batches and fine-tuning: a preset of two_moons."""
    samples: int = 64_000
    """Sequences that each variant is pre-trained on: a tenth of the published number."""
    evaluations: int = 10
    """How often students and teachers are looked at, and saved, while they train."""
    label_counts: tuple[int, ...] = (10,)
    """Labelled points to fine-tune on; as many others choose checkpoint and rate."""
    devices: int = 0
    """Devices that the seeds are spread over, each with a program of its own to compile; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "variants", named("variants", self.variants, tuple(VARIANTS)))
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


def write(config: Config) -> None:
    """Merge what the variants left into results.json, a figure and report.html."""
    found: dict[str, dict[str, Any]] = {}
    for name, (method, _) in VARIANTS.items():
        file = two_moons.file_of(setting(config, name), method)
        if file.exists():
            found[name] = json.loads(file.read_text(encoding="utf-8"))
    write_metrics(config.out, {name: each["history"] for name, each in found.items()})
    seeds = config.seed_list
    rows = [row for name, each in found.items() for row in rows_of(name, each, seeds)]
    summary = summarise(rows, baseline=BASE if BASE in found else next(iter(found)))
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    accuracy = [row for row in summary if row["metric"] == "accuracy"]
    pictures: list[tuple[str, tuple[Path, Path]]] = []
    if any(row["paired_difference"] is not None for row in accuracy):
        caption = f"Test accuracy against {BASE}, paired by seed; filled where 0 is excluded."
        drawn = figures.forest(config.out / "differences", accuracy, "accuracy")
        pictures.append((caption, drawn))
    notes = [
        f"Every variant is pre-trained on {config.samples} sequences. A variant without 'hard', "
        "'input-only' or 'mask' in its name is the soft teacher.",
        "Test accuracy is that after fine-tuning; rate and checkpoint are chosen on as many other "
        "labelled points. Monitors are those of the last evaluation.",
        *page.collapses(found, seeds),
    ]
    missing = [name for name in VARIANTS if name not in found]
    if missing:
        notes.append(f"Not yet in this run: {', '.join(missing)}.")
    report.write_report(
        config.out, "Why a teacher loses, or wins", __doc__ or "", config, summary, pictures, notes
    )


def run(config: Config) -> None:
    """Train the variants that are asked for, and write the run directory."""
    record(config, "variants", "devices")
    for name in config.variants:
        given = setting(config, name)
        record(given, "devices")
        print(f"variant: {name}", flush=True)
        two_moons.train(given, data_of.load(given.validation_sequences, given.test_points))
    if distributed.is_writer():
        write(config)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    two_moons.a_device_for_each_core()
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
