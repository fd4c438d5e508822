"""What a teacher of Two Moons is told: the loss that it follows, of students with and without MLM.

A teacher can only want what its judge prefers. Each judge (steps on labelled points, their rate,
the classes of a label) scores the same students: pre-trained by MLM, and not at all. What leads a
teacher is the gradient of that score: its size, and whether first order points the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
from experiments import two_moons
from experiments._shared import command_line, record, require_positive, write_metrics
from experiments._teacher_shared import MLM, judge
from experiments._two_moons_gradients import EXACT, OVERFLOW, slopes
from experiments._two_moons_methods import NONE
from experiments._two_moons_training import pretrain
from jmeta.core.types import Array, Episode, Key, PyTree
from jmeta.methods.maml import learned_start
from jmeta.models import masked_lm
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, figures, report
from jmeta.runtime.evaluate import adaptation_values
from jmeta.runtime.statistics import summarise
from jmeta.tasks.text import class_scores

LOSS, ACCURACY = "query loss", "query accuracy"
CLASSES = {"vocabulary": False, "two": True}  # of a label, by whether among_classes is set


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """What a teacher of Two Moons is told of students with and without MLM."""

    seeds: int = 5
    """Number of seeds, trained side by side."""
    size: Literal["paper", "smoke"] = "paper"
    """Whose networks, batches and labelled points: a preset of two_moons."""
    samples: int = 64_000
    """Sequences that MLM is trained on."""
    support_steps: tuple[int, ...] = (1, 10, 100)
    """Steps on labelled points, increasing, before a student is scored on others."""
    inner_rates: tuple[float, ...] = (0.1, 0.01)
    """Their rates. The published judge takes one step at 0.1 and scores among the vocabulary."""
    labels: tuple[int, ...] = (10, 40)
    """Labelled points that a judge has, halved into support and query; published: 10."""
    examples: tuple[int, ...] = (4, 20)
    """How many of each half it uses, for each number of labels; published: 4."""
    draws: int = 32
    """How often each seed's labelled points are halved anew."""
    gradient_draws: int = 8
    """On how many of these the judge's gradient is measured at most, which costs most; 0: none."""
    devices: int = 0
    """Devices that the seeds are spread over while they train; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "support_steps", "inner_rates", "examples", "draws")
        if self.gradient_draws < 0:
            raise ValueError(f"gradient_draws={self.gradient_draws}: 0 or more")
        if len(self.labels) != len(self.examples) or not all(
            2 * each <= labels for labels, each in zip(self.labels, self.examples, strict=False)
        ):
            raise ValueError(
                f"examples={self.examples} for labels={self.labels}: one number for each, and at "
                "most half of it"
            )
        _ = self.setting  # which refuses what cannot be

    @property
    def setting(self) -> two_moons.Config:
        """The configuration of the pre-training."""
        return dataclasses.replace(
            two_moons.PRESETS[self.size], seeds=self.seeds, first_seed=self.first_seed,
            methods=(MLM,), samples=self.samples, evaluations=1, devices=self.devices,
            resume=self.resume, out=self.out,
        )  # fmt: skip


PRESETS = {
    "paper": Config(),
    "smoke": Config(seeds=2, size="smoke", samples=32, support_steps=(1, 2), labels=(10,),
                    examples=(4,), draws=3),
}  # fmt: skip


def students(config: Config, data: data_of.Data) -> dict[str, PyTree]:
    """Students pre-trained by MLM and students that learned nothing, ``[seeds, ...]``."""
    given = config.setting
    method = methods_of.build(given, data, MLM)
    trained = pretrain(given, data, MLM, method, config.out / MLM)
    write_metrics(config.out, {MLM: trained.history})
    return {NONE: two_moons.fresh_students(given, data), MLM: trained.latest}


def labelled_episodes(
    config: Config, data: data_of.Data, seed: int, labels: int, examples: int, *, among: bool
) -> Episode:
    """Support and query of a teacher's episodes, leaves ``[draws, examples, ...]``."""
    points = data_of.labelled(labels, seed, fresh=config.setting.fresh_labels)
    shape = (config.draws, 1, examples)
    made = data_of.judge_chunk(data, points, seed, 0, shape, among_classes=among)
    return jax.tree.map(lambda leaf: leaf[:, 0, 0], made)


def judged(
    given: two_moons.Config, data: data_of.Data, steps: Sequence[int]
) -> Callable[[PyTree, Episode, Array], dict[str, Array]]:
    """``(student, episode, rate) -> {LOSS, ACCURACY: [steps]}`` after steps on the support."""
    shape = methods_of.network(given, data)
    loss = functools.partial(masked_lm.loss, shape)

    def scored(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, dict[str, Array]]:
        tokens = data_of.label_tokens(data)
        said = class_scores(masked_lm.logits(shape, params, batch), batch["mask"], tokens)
        right = jnp.asarray(tokens)[said.argmax(-1)] == batch["labels"][:, 0]
        return loss(params, batch, key)[0], {ACCURACY: right.astype(jnp.float32).mean()}

    def score(params: PyTree, episode: Episode, rate: Array) -> dict[str, Array]:
        problem = learned_start(loss, judge(rate), scored)
        found = adaptation_values(problem, params, episode, steps)
        return {LOSS: found["loss"], ACCURACY: found[ACCURACY]}

    return score


def rows_of(
    config: Config, data: data_of.Data, students: dict[str, PyTree]
) -> list[dict[str, Any]]:
    """What each judge says of each student, and its gradient: the mean over the draws."""
    rows: list[dict[str, Any]] = []
    scores, gradients = (
        jax.jit(jax.vmap(jax.vmap(of(config.setting, data, config.support_steps),
                                  (None, 0, None)), (0, 0, None)))
        for of in (judged, slopes)
    )  # fmt: skip
    sizes = tuple(zip(config.labels, config.examples, strict=True))
    for size, classes in itertools.product(sizes, CLASSES):
        each = [
            labelled_episodes(config, data, seed, *size, among=CLASSES[classes])
            for seed in config.seed_list
        ]
        episodes = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        for rate, (name, params) in itertools.product(config.inner_rates, students.items()):
            found = scores(params, episodes, jnp.float32(rate))
            if config.gradient_draws:
                few = jax.tree.map(lambda leaf: leaf[:, : config.gradient_draws], episodes)
                found |= gradients(params, few, jnp.float32(rate))
            means = {metric: np.asarray(values).mean(1) for metric, values in found.items()}
            for at, steps in enumerate(config.support_steps):
                settings = {"labels": size[0], "label among": classes, "support steps": steps}
                settings["rate"] = rate
                rows += [
                    {"method": name, "seed": seed, "metric": metric, "value": float(value)}
                    | settings
                    for metric, values in means.items()
                    for seed, value in zip(config.seed_list, values[:, at], strict=True)
                ]
            said = "; ".join(
                f"{metric} " + ", ".join(f"{value:.4g}" for value in means[metric].mean(0))
                for metric in (LOSS, EXACT)
                if metric in means
            )
            print(
                f"{size[0]} labels, among {classes}, rate {rate}: {name} {said}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return rows


def said_by(summary: Sequence[dict[str, Any]]) -> str:
    """Which judges prefer students without pre-training, in a sentence."""
    losses = [row for row in summary if row["metric"] == LOSS and row["method"] == MLM]
    sure = {MLM: 0, NONE: 0}
    for row in losses:
        if row["paired_ci95"] is not None and abs(row["paired_difference"]) > row["paired_ci95"]:
            sure[MLM if row["paired_difference"] < 0 else NONE] += 1
    return (
        f"Of {len(losses)} judges {sure[NONE]} have the lower loss for students without "
        f"pre-training, and {sure[MLM]} for those of MLM; the intervals of the others hold zero."
    )


def pictures_of_slopes(
    config: Config, summary: Sequence[dict[str, Any]]
) -> list[tuple[str, tuple[Path, Path]]]:
    """The size of the gradient by the number of support steps."""
    if len(config.support_steps) < 2 or not config.gradient_draws:
        return []
    curves: dict[str, figures.Curve] = {}
    labels = config.labels[-1]
    for name, rate in itertools.product((NONE, MLM), config.inner_rates):
        rows = [
            row for row in summary
            if row["metric"] == EXACT and row["method"] == name and row["labels"] == labels
            and row["label among"] == "two" and row["rate"] == rate
        ]  # fmt: skip
        half = None if config.seeds == 1 else [row["ci95"] for row in rows]
        curves[f"{name}, rate {rate:g}"] = (
            [row["support steps"] for row in rows], [row["mean"] for row in rows], half,
        )  # fmt: skip
    caption = f"The gradient of a judge of {labels} labels, among two, by the student's weights."
    drawn = figures.learning_curves(
        config.out / "gradients", curves, xlabel="steps on labelled points",
        ylabel="log10 of the gradient's norm",
    )  # fmt: skip
    return [(caption, drawn)]


def run(config: Config) -> None:
    """Pre-train by MLM, judge, and write the run directory."""
    record(config, "devices", "support_steps", "inner_rates", "labels", "examples", "draws",
           "gradient_draws")  # fmt: skip
    given = config.setting
    data = data_of.load(given.validation_sequences, given.test_points)
    rows = rows_of(config, data, students(config, data))
    if not distributed.is_writer():
        return
    summary = summarise(rows, baseline=NONE)
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    pictures = []
    if config.seeds > 1:
        caption = f"Query loss of students of MLM against {NONE}, by judge; filled where certain."
        pictures.append((caption, figures.forest(config.out / "differences", summary, LOSS)))
    pictures += pictures_of_slopes(config, summary)
    notes = [
        said_by(summary),
        "Who says that a label is one of two, with equal chances, has a loss of "
        f"{np.log(2):.2f}; among the whole vocabulary of {data.words.size} it is "
        f"{np.log(data.words.size):.2f}.",
    ]
    if config.gradient_draws:
        notes.append(
            "A teacher's meta-gradient is the gradient by the student's weights, times what the "
            "teacher changes in them. Both norms are means of their decimal logarithm over "
            f"{min(config.gradient_draws, config.draws)} draws; {OVERFLOW} stands for what "
            "float32 cannot hold, whose cosine counts as zero."
        )
    intro = (__doc__ or "").partition("\n")[2].strip()
    report.write_report(
        config.out, "What a teacher is told", intro, config, summary, pictures, notes
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    two_moons.a_device_for_each_core()
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
