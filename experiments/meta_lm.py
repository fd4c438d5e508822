"""SuperGLUE after pre-training on text that a teacher rewrites, beside masked language modelling.

A student is pre-trained on an unlabelled corpus, fine-tuned on each labelled task, and scored by
its official metrics. A method is kept when it is done, and others join it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import _meta_lm_data as data_of
from experiments import _meta_lm_methods as methods_of
from experiments import _meta_lm_report as page
from experiments import _meta_lm_training as training
from experiments import _teacher_shared as shared
from experiments._meta_lm_data import EMBEDDED, SUPERGLUE, Data
from experiments._meta_lm_methods import METHODS, NONE, Method
from experiments._shared import command_line, record, require_positive
from experiments._teacher_shared import CORRUPTIONS, DENOISING, MLM, REPLACEMENTS, named
from jmeta.data.sources import DataUnavailable
from jmeta.models import masked_lm
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed

_WHOLE = {"superglue": SUPERGLUE, "embedded": EMBEDDED}


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """SuperGLUE after pre-training on text that a teacher rewrites, beside MLM."""

    corpus: str = "wikitext2"
    """Unlabelled text: embedded (Python's standard library), wikitext2 (from $JMETA_DATA), or a
    data set of the Hugging Face hub with a column text, such as wikimedia/wikipedia."""
    corpus_config: str = ""
    """Configuration of a data set of the hub, such as 20231101.en."""
    corpus_texts: int = 0
    """Texts of the corpus at most; 0: all of them, which are held in memory."""
    held_out_texts: int = 1000
    """Of a data set of the hub, texts kept for validation."""
    tasks: tuple[str, ...] = SUPERGLUE
    """Labelled tasks: names, superglue (all eight), or embedded (two tasks about the standard
    library, which need no data)."""
    methods: tuple[str, ...] = (
        MLM, DENOISING, "soft", "input-only soft", "mask-only", REPLACEMENTS,
    )  # fmt: skip
    """Which are pre-trained by this call; those that are in the run directory already are kept."""
    pretrain_only: bool = False
    """Stop after pre-training; the same command without it goes on with --resume."""
    submit: bool = False
    """Also write predictions of the test splits, whose labels are hidden."""
    train_examples: int = 0
    """Training examples of a task at most, drawn at random; 0: all."""
    scored_examples: int = 0
    """Validation examples of a task that are scored, at most; 0: all."""
    vocab: int = 2048
    """Size of the byte-level BPE vocabulary, which is trained on the corpus."""
    positions: int = 64
    """Tokens of a window; longer texts are cut into windows that overlap by half."""
    width: int = 64
    """Width of student and teacher."""
    layers: int = 2
    """Their layers."""
    heads: int = 2
    """Their attention heads."""
    dropout: float = 0.1
    """Dropout, of the residual branches and of attention, while a student learns."""
    vocab_chunk: int = 0
    """Entries of the vocabulary that a loss scores at a time, for memory; 0: all."""
    remat: bool = False
    """Recompute the blocks of the networks in the backward passes, for memory."""
    steps: int = 2000
    """Steps of the student, of every method."""
    batch: int = 16
    """Texts of a micro-batch."""
    micro_batches: int = 1
    """Micro-batches of a step, which unroll from the same student; without a teacher they are one
    batch."""
    tasks_per_batch: int = 2
    """Draws of a task on which a micro-batch is scored."""
    samples_per_task: int = 8
    """Consecutive samples that share a task: so many support and query examples of a draw."""
    inner_steps: int = 1
    """Steps on rewritten text inside a teacher's step."""
    inner_rate: float = 0.1
    """Rate of the student's step on support examples inside a teacher's step."""
    support_steps: int = 1
    """How many of these; 0 scores the student as it is."""
    rate: float = 0.08
    """AdamW's rate of students and teachers before its inverse square root schedule: the peak is
    this over the root of warmup."""
    warmup: int = 1000
    """Steps until the peak."""
    mlm_task: tuple[str, ...] = ("soft",)
    """Methods whose student is scored on MLM half of the time, on the tasks otherwise."""
    mask_bug: bool = False
    """Count the missing labels of MLM as a task as [PAD], as the published runs did."""
    soft_weight: float = 10.0
    """Weight of the soft teacher's meta-gradient beside its own MLM losses."""
    input_weight: float = 1.0
    """The same of the input-only soft teacher, and of the one that replaces tokens."""
    hard_weight: float = 10.0
    """Weight of the meta-gradient of hard teachers, which estimates that of soft ones by draws."""
    finetune_epochs: int = 20
    """Epochs of fine-tuning on a task."""
    finetune_steps: int = 300
    """Its steps at most, for every task and method; they are rounded up to whole tens."""
    finetune_batch: int = 16
    """Examples of each."""
    finetune_rate: float = 0.01
    """AdamW's rate in fine-tuning before its schedule; the peak is over the root of the warm-up."""
    finetune_warmup: int = 100
    """Steps until the peak."""
    evaluations: int = 10
    """How often a student and its teacher are looked at, and saved, in pre-training."""
    validation_windows: int = 128
    """Windows of held-out text on which MLM is validated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tasks = tuple(each for name in self.tasks for each in _WHOLE.get(name, (name,)))
        teachers = tuple(name for name in METHODS if name not in CORRUPTIONS)
        lists = {
            "tasks": named("tasks", tasks, tuple(data_of.TASKS)),
            "methods": named("methods", self.methods, METHODS),
            "mlm_task": named("mlm_task", self.mlm_task, teachers),
        }
        for name, value in lists.items():
            object.__setattr__(self, name, value)
        for name in ("tasks", "methods"):
            if not lists[name]:
                raise ValueError(f"{name} is empty: name at least one")
        require_positive(
            self, "batch", "micro_batches", "tasks_per_batch", "samples_per_task", "inner_steps",
            "finetune_epochs", "finetune_steps", "finetune_batch", "evaluations",
            "validation_windows", "held_out_texts", "rate", "warmup", "inner_rate",
        )  # fmt: skip
        shared.refuse_unread(self, shared.READERS)
        if self.support_steps < 0:
            raise ValueError(f"support_steps={self.support_steps}: 0 or more")
        if self.steps < self.inner_steps or self.steps % self.inner_steps:
            raise ValueError(
                f"steps={self.steps} is no multiple of the {self.inner_steps} steps that a student "
                "takes in a teacher's step"
            )
        if self.evaluations > self.steps // self.inner_steps:
            raise ValueError(f"evaluations={self.evaluations} is more than there are steps")
        if self.mask_bug and not set(self.methods) & set(self.mlm_task):
            raise ValueError(
                "mask_bug is about MLM as a labelled task, which none of these methods has: name "
                "them in mlm_task"
            )


PRESETS = {
    "demo": Config(
        corpus="embedded", tasks=EMBEDDED, methods=(MLM, "input-only soft", "mask-only"),
        steps=200, warmup=50, vocab=1024, width=32, finetune_steps=100, finetune_warmup=20,
    ),
    # Sized for two cores by what a step of MLM and of mask-only was measured to cost.
    "cpu": Config(
        seeds=3, steps=800, batch=8, samples_per_task=4, rate=0.04, warmup=200,
        scored_examples=200, finetune_steps=150, finetune_batch=8, finetune_warmup=50,
    ),
    "paper": Config(
        corpus="wikimedia/wikipedia", corpus_config="20231101.en", vocab=30_000, positions=128,
        width=256, layers=6, heads=4, vocab_chunk=1000, remat=True,
        # 300 epochs of 20,000 samples, 64 to a step.
        steps=93_750, batch=16, micro_batches=4, tasks_per_batch=1, samples_per_task=16,
        warmup=10_000, finetune_steps=40_000, evaluations=50, validation_windows=1024,
    ),
    "smoke": Config(
        corpus="embedded", corpus_texts=30, tasks=EMBEDDED, methods=(MLM, "mask-only"),
        train_examples=30,
        scored_examples=12, vocab=320, positions=24, width=8, layers=1, heads=1, steps=4, batch=2,
        samples_per_task=2, warmup=2, finetune_steps=10, finetune_batch=4, finetune_warmup=2,
        evaluations=2, validation_windows=4,
    ),
}  # fmt: skip


def file_of(config: Config, name: str) -> Path:
    """Where a method's results are kept."""
    return config.out / "methods" / f"{name.replace(' ', '-')}.json"


def prepare(config: Config) -> tuple[Data, dict[str, Method]]:
    """The data, and the methods that are not done yet, with everything checked that can be.

    Raises:
        SystemExit: something is missing or wrong; the message says what.
    """
    try:
        data = data_of.load(config)
        wanted = [name for name in config.methods if not file_of(config, name).exists()]
        return data, training.check(config, data, wanted)
    except (DataUnavailable, TypeError, ValueError) as error:
        sys.exit(str(error))


def keep(
    config: Config, name: str, pretrained: Sequence[training.Pretrained],
    scores: Sequence[dict[str, Any]], held_out: Sequence[dict[str, float]],
) -> None:  # fmt: skip
    """Write what is known of a method, of all seeds."""
    content = {
        "method": name,
        "rows": [
            row
            for i, seed in enumerate(config.seed_list)
            for row in page.rows_of(
                name, seed, scores[i], held_out[i], pretrained[i] if pretrained else None
            )
        ],
        "history": [each.history for each in pretrained],
        "looks": [each.looks for each in pretrained],
        "panels": [each.panel for each in pretrained],
    }
    distributed.write(file_of(config, name), json.dumps(content) + "\n")


def run(config: Config) -> None:
    """Pre-train, fine-tune, predict, score, and write the run directory."""
    record(config, "methods", "pretrain_only")
    data, built = prepare(config)
    shape = methods_of.network(config, data.words.size)
    tuner, validate = training.make_tuner(config, data), methods_of.make_held_out(shape)

    def finish(name: str, students: Sequence[Any], done: Sequence[training.Pretrained]) -> None:
        scores, held_out = [], []
        for seed, student in zip(config.seed_list, students, strict=True):
            folder = config.out / training.slug(name, seed)
            scores.append(training.fine_tune(config, data, tuner, student, name, seed, folder))
            found = validate(student, data.validation)
            held_out.append({key: float(value) for key, value in found.items()})
        keep(config, name, done, scores, held_out)

    for name, method in built.items():
        done = [
            training.pretrain(config, data, name, method, seed, validate)
            for seed in config.seed_list
        ]
        if not config.pretrain_only:
            finish(name, [each.student for each in done], done)
    if config.pretrain_only:
        print(f"pre-trained in {config.out}; the same command without --pretrain-only goes on")
        return
    if not file_of(config, NONE).exists():
        # Where every student began.
        draw = jax.jit(functools.partial(masked_lm.init, shape))
        fresh = [draw(jax.random.key(seed)) for seed in config.seed_list]
        finish(NONE, fresh, [])
    if distributed.is_writer():
        page.write(config, data, [file_of(config, name) for name in (*METHODS, NONE)])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
