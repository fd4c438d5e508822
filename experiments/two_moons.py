"""Two Moons as text: teachers that write what a student is pre-trained on, beside MLM.

A student is pre-trained on sequences of points, fine-tuned on 10 to 160 labelled ones, and tested.
All seeds of a method are trained at once; a method is kept when it is done, and others join it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import jax

from experiments import _teacher_shared as shared
from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
from experiments import _two_moons_report as page
from experiments._shared import command_line, record, require_positive
from experiments._teacher_shared import CORRUPTIONS, DRAWN, HARD, MLM, SOFT, TEACHERS, named
from experiments._two_moons_methods import METHODS, NONE
from experiments._two_moons_training import Diverged, Pretrained, pretrain
from experiments._two_moons_tuning import Tuned, fine_tune, fine_tuner, luckiest
from jmeta import methods
from jmeta.models import masked_lm
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed

_DEVICES = "xla_force_host_platform_device_count"

# Who reads a setting that some methods do not.
READERS = {
    **shared.READERS,
    **dict.fromkeys(
        ("teacher_labels", "labelled_batch", "among_classes", "restart_every", "population"),
        TEACHERS,
    ),
    "soft_gradient": SOFT,
    **dict.fromkeys(("coefficient", "weighting", "baseline"), HARD),
}

Tuner: TypeAlias = Callable[[Sequence[Any]], tuple[dict[int, Tuned], float]]


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Two Moons as text: teachers that write what a student is pre-trained on, beside MLM."""

    seeds: int = 5
    """Number of seeds, trained side by side."""
    methods: tuple[str, ...] = METHODS
    """Which are pre-trained by this call; those that are in the run directory already are kept."""
    label_counts: tuple[int, ...] = (10, 20, 40, 80, 160)
    """Labelled points to fine-tune on; as many others choose checkpoint and rate."""
    fresh_labels: bool = False
    """Labelled points of each seed's own, in place of the published ones for all seeds."""
    samples: int = 640_000
    """Sequences that each method is pre-trained on, repetitions counted."""
    batch: int = 4
    """Sequences of a micro-batch."""
    micro_batches: int = 4
    """Micro-batches of an outer step, which unroll from the same student."""
    chunk: int = 50
    """Outer steps of one dispatch."""
    devices: int = 0
    """Devices that the seeds are spread over, each with a program of its own to compile; 0: all.
    Several processes train all seeds on one each."""
    evaluations: int = 40
    """How often students and teachers are looked at, and saved, while they train."""
    width: int = 8
    """Width of student and teacher."""
    layers: int = 2
    """Their layers."""
    heads: int = 2
    """Their attention heads."""
    ff: int = 32
    """Width inside their feed-forward layers."""
    dropout: float = 0.1
    """Dropout, of the residual branches and of attention, while a student learns."""
    rate: float = 0.08
    """AdamW's rate of students and teachers before its inverse square root schedule: the peak is
    this over the root of warmup."""
    warmup: int = 1000
    """Outer steps until the peak."""
    inner_rate: float = 0.1
    """Rate of the student's step on labelled points inside a teacher's step."""
    support_steps: int = 1
    """How many of these; 0 scores the student as it is."""
    inner_steps: int = 1
    """Steps on rewritten text inside a teacher's step."""
    teacher_labels: int = 10
    """Labelled points that a teacher sees: the set that students of as many labels get."""
    labelled_batch: int = 0
    """How many of these a student learns from, and how many others it is scored on, in each
    micro-batch of a teacher; 0: as many as it has sequences, as published."""
    masked: float = shared.MASKED
    """Share of a sequence's tokens that methods without a teacher hide, and that teachers of masks
    and of replacements begin with or keep. MLM as a task, as a teacher's own loss and as what
    students are validated on stays as published."""
    mlm_task: tuple[str, ...] = ("soft",)
    """Methods whose student is scored on MLM half of the time, on labelled points otherwise."""
    mask_bug: bool = False
    """Count the missing labels of MLM as a task as [PAD], as the published runs did."""
    among_classes: bool = False
    """Inside a teacher's step, score labelled points among the labels of their task, as they are
    read in the end, and not among the whole vocabulary, as published."""
    soft_weight: float = 100.0
    """Weight of the soft teacher's meta-gradient beside its own MLM losses."""
    input_weight: float = 1.0
    """The same of the input-only soft teacher, and of the one that replaces tokens."""
    soft_gradient: Literal["exact", "first_order"] = "exact"
    """Meta-gradient of soft teachers: through the student's Hessians, or without."""
    hard_weight: float = 100.0
    """Weight of the meta-gradient of hard teachers."""
    coefficient: Literal["exact", "first_order", "cosine", "loss_difference", "negative_loss"] = (
        "exact"
    )
    """What a drawn example is worth to a hard teacher."""
    weighting: Literal["sum", "mean"] = "sum"
    """Log-probability of a drawn example: sum over its tokens, or the published mean."""
    baseline: Literal["leave_one_out", "moving_average", "none"] = "leave_one_out"
    """What is subtracted from the worth."""
    largest_gradient: float = 0.0
    """Teachers of masks do not move where the norm of their meta-gradient is this or more, or not
    a number: through many support steps it explodes where students know little. 0: they always
    move."""
    restart_every: int = 0
    """Outer steps of a student's life beside a teacher; 0: one student for ever."""
    population: int = 1
    """Students that a teacher teaches in turn."""
    finetune_steps: int = 1000
    """Steps of fine-tuning, for every method and number of labels."""
    finetune_batch: int = 8
    """Points of each."""
    finetune_rates: tuple[float, ...] = (0.003, 0.01, 0.04, 0.12)
    """AdamW's rates to choose from; the peak is a rate over the root of ten."""
    validation_sequences: int = 1000
    """Sequences on which MLM is validated."""
    test_points: int = 1000
    """Points of the final number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "methods", named("methods", self.methods, METHODS))
        teachers = tuple(name for name in METHODS if name not in CORRUPTIONS)
        object.__setattr__(self, "mlm_task", named("mlm_task", self.mlm_task, teachers))
        if not self.methods:
            raise ValueError(f"no methods: choose of {', '.join(METHODS)}")
        for n in (*self.label_counts, self.teacher_labels):
            if n < 2:
                raise ValueError(f"{n} labelled points cannot hold one of each moon: at least 2")
        if not self.label_counts or len(set(self.label_counts)) < len(self.label_counts):
            raise ValueError(f"label_counts {self.label_counts}: different numbers, at least one")
        require_positive(
            self, "batch", "micro_batches", "inner_steps", "chunk", "population",
            "finetune_steps", "finetune_batch", "finetune_rates", "rate", "warmup", "inner_rate",
        )  # fmt: skip
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: 0 or more, and below 1")
        per_dispatch = self.batch * self.micro_batches * self.inner_steps * self.chunk
        if self.samples < per_dispatch or self.samples % per_dispatch:
            raise ValueError(
                f"samples={self.samples} is no multiple of the {per_dispatch} sequences of a "
                "dispatch (batch * micro_batches * inner_steps * chunk)"
            )
        if not 1 <= self.evaluations <= self.samples // per_dispatch:
            raise ValueError(
                f"evaluations={self.evaluations}: between 1 and the {self.samples // per_dispatch} "
                "dispatches of a method"
            )
        hard = [name for name in self.methods if name in HARD]
        if hard and self.baseline == "leave_one_out" and self.micro_batches < 2:
            raise ValueError("leave_one_out compares micro-batches: set micro_batches to 2 or more")
        if self.among_classes and set(self.methods) & set(self.mlm_task):
            raise ValueError(
                "among_classes scores points among the labels of their task, but MLM, which has "
                f"none, is a task of {', '.join(self.mlm_task)}: set mlm_task to nothing"
            )
        shared.refuse_unread(self, READERS)
        if not 0 < self.masked < 1:
            raise ValueError(f"masked={self.masked}: a share between 0 and 1")
        elsewhere = [name for name in self.methods if name not in (*CORRUPTIONS, *DRAWN)]
        if self.masked != shared.MASKED and elsewhere:
            raise ValueError(f"masked is a share that {', '.join(elsewhere)} does not read")
        others = [name for name in self.methods if name not in (*CORRUPTIONS, *shared.MASKS)]
        masks = set(self.methods) & set(shared.MASKS)
        if not self.largest_gradient >= 0 or (self.largest_gradient and (others or not masks)):
            raise ValueError(
                f"largest_gradient={self.largest_gradient}: 0 or more, and 0 without a teacher of "
                f"masks or with others than {' and '.join(shared.MASKS)}"
            )
        if self.support_steps < 0:
            raise ValueError(f"support_steps={self.support_steps}: 0 or more")
        if not 0 <= self.labelled_batch <= self.teacher_labels // 2:
            raise ValueError(
                f"labelled_batch={self.labelled_batch}: at most half of the "
                f"{self.teacher_labels} labelled points that a teacher sees (teacher_labels), or 0"
            )
        if self.mask_bug and not set(self.methods) & set(self.mlm_task):
            raise ValueError(
                "mask_bug is about MLM as a labelled task, which none of these methods has: name "
                "them in mlm_task"
            )
        if not 1 <= self.validation_sequences <= 1000 or not 1 <= self.test_points <= 1000:
            raise ValueError("validation_sequences and test_points are between 1 and 1000")
        if self.validation_sequences % min(50, self.validation_sequences):
            raise ValueError("validation_sequences above 50 are a multiple of 50")
        if min(self.restart_every, self.devices) < 0:
            raise ValueError("restart_every and devices are 0 or more")

    def sequences_of(self, name: str) -> int:
        """Sequences that a method reads in an outer step: one without a teacher unrolls nothing."""
        return self.batch * self.micro_batches * (1 if name in CORRUPTIONS else self.inner_steps)


PRESETS = {
    "quick": Config(
        seeds=3, samples=3200, evaluations=4, warmup=100, layers=1, label_counts=(10, 160),
        methods=(MLM, "input-only soft"), finetune_steps=200, finetune_rates=(0.01, 0.04),
        validation_sequences=200, devices=1,
    ),
    "paper": Config(),
    "smoke": Config(
        seeds=2, samples=32, batch=2, micro_batches=2, chunk=2, evaluations=2, warmup=2,
        width=4, layers=1, heads=1, ff=4, label_counts=(2, 10), methods=(MLM, "mask-only"),
        finetune_steps=4, finetune_batch=2, finetune_rates=(0.01, 0.04), validation_sequences=4,
        test_points=40,
    ),
}  # fmt: skip


def check(config: Config, data: data_of.Data, name: str, method: methods_of.Method) -> None:
    """Look at a method's first batch before anything is compiled."""
    if name not in CORRUPTIONS:
        first = jax.tree.map(lambda leaf: leaf[0], method.chunk(config.first_seed, 0))
        methods.check_teacher(first, vocabulary=data.words.size, positions=data_of.POSITIONS)


def fresh_students(config: Config, data: data_of.Data) -> Any:
    """Students that learned nothing, ``[seeds, ...]``."""
    shape = methods_of.network(config, data)
    keys = [jax.random.key(seed) for seed in config.seed_list]
    return jax.vmap(lambda key: masked_lm.init(shape, key))(jax.numpy.stack(keys))


def file_in(folder: Path, name: str) -> Path:
    """Where a method's results are kept in a run directory."""
    return folder / "methods" / f"{name.replace(' ', '-')}.json"


def file_of(config: Config, name: str) -> Path:
    """Where a method's results are kept."""
    return file_in(config.out, name)


def keep(
    config: Config, name: str, tuned: dict[int, Tuned], trained: Pretrained | None,
    tuning_seconds: float,
) -> None:  # fmt: skip
    """Write what is known of a method: rows, history, choices and the first seed's maps."""
    rows: list[dict[str, Any]] = []
    for n, found in tuned.items():
        for metric, values in (
            ("accuracy", found.test), ("validation accuracy", found.validation),
            (page.LUCKIEST, luckiest(found)),
        ):  # fmt: skip
            rows += [
                {"method": name, "seed": seed, "metric": metric, "value": float(value), "labels": n}
                for seed, value in zip(config.seed_list, values, strict=True)
            ]
    if trained is not None:
        last = trained.history[-1]
        rows += [
            {"method": name, "seed": seed, "metric": "MLM accuracy",
             "value": last[f"mlm_accuracy_seed{seed}"]}
            for seed in config.seed_list
        ]  # fmt: skip
    content = {
        "method": name,
        "rows": rows,
        "chosen": {str(n): {"checkpoint": t.checkpoint, "rate": t.rate} for n, t in tuned.items()},
        "candidates": {str(n): t.candidates for n, t in tuned.items()},
        "history": [] if trained is None else trained.history,
        "seconds": {"pre-training": 0.0 if trained is None else trained.seconds,
                    "fine-tuning": tuning_seconds},
        # Shares in per cent of the first seed's logistic outputs, by x and y.
        "maps": {str(n): page.shares(t.margins[0]) for n, t in tuned.items()},
        "panels": "" if trained is None else trained.panel,
    }  # fmt: skip
    distributed.write(file_of(config, name), json.dumps(content) + "\n")


def train(config: Config, data: data_of.Data) -> tuple[Tuner, list[str]]:
    """Pre-train and fine-tune every method that is asked for and not kept yet.

    Returns:
        What fine-tunes students at every number of labels, compiled when first used; and what is
        to be said of methods that diverged, which are left out.
    """
    wanted = [name for name in config.methods if not file_of(config, name).exists()]
    built = {name: methods_of.build(config, data, name) for name in wanted}
    for name, method in built.items():
        try:
            check(config, data, name, method)
        except (TypeError, ValueError) as error:
            sys.exit(f"{name}: {error}")
    program = fine_tuner(config, data)

    def tune(students: Sequence[Any]) -> tuple[dict[int, Tuned], float]:
        begun = time.monotonic()
        found = {n: fine_tune(config, data, program, students, n) for n in config.label_counts}
        return found, time.monotonic() - begun

    lost = []
    for name, method in built.items():
        try:
            trained = pretrain(config, data, name, method, file_of(config, name).with_suffix(""))
        except Diverged as error:
            print(error, file=sys.stderr, flush=True)
            lost.append(str(error))
            continue
        tuned, seconds = tune([trained.latest, trained.best])
        keep(config, name, tuned, trained, seconds)
    return tune, lost


def left_out(lost: Sequence[str]) -> NoReturn:
    """End with what is to be said of methods that diverged, once the writer has written."""
    distributed.barrier("left out")
    sys.exit("\n".join(("Left out:", *lost)))


def run(config: Config) -> None:
    """Pre-train, fine-tune, test, and write the run directory."""
    record(config, "methods", "devices")
    data = data_of.load(config.validation_sequences, config.test_points)
    tune, lost = train(config, data)
    if not file_of(config, NONE).exists():
        students = fresh_students(config, data)
        tuned, seconds = tune([students, students])
        keep(config, NONE, tuned, None, seconds)
    if distributed.is_writer():
        page.write(config, data, [file_of(config, name) for name in (*METHODS, NONE)], lost)
    if lost:
        left_out(lost)


def a_device_for_each_core() -> None:
    """Networks this small leave a core idle: each core is a device, with seeds of its own.

    Where JAX is in use already, or somebody has said how many, its devices are as they are.
    """
    asked = getattr(jax.config, "jax_num_cpu_devices", -1) > 0
    if not asked and _DEVICES not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", os.cpu_count())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    a_device_for_each_core()
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
