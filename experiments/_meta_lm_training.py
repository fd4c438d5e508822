"""Pre-training of one method and seed, and fine-tuning of its student on every task.

Both go on where they stopped: pre-training from its checkpoint, fine-tuning at the next task.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jmeta
from experiments import _meta_lm_data as data_of
from experiments import _meta_lm_methods as methods_of
from experiments._meta_lm_data import Data, Downstream
from experiments._meta_lm_methods import HeldOut, Method
from experiments._shared import train_method, write_rows
from experiments._teacher_shared import CORRUPTIONS, adamw
from jmeta import methods
from jmeta.core.types import Array, Info, PyTree
from jmeta.data.loader import episode_loader
from jmeta.methods import check_teacher
from jmeta.models import masked_lm
from jmeta.runtime import checkpoint, distributed
from jmeta.runtime.parameters import save_params
from jmeta.runtime.train import TrainState, as_stages, init_state
from jmeta.tasks.feeding import over_windows, text_batches
from jmeta.tasks.text import best_tokens, class_scores, decode_classes, decode_spans

CHUNK = 10  # steps of fine-tuning in a dispatch: one program for every number of steps
_MONITORED, _SHOWN = 16, 3  # held-out windows that a teacher rewrites: for numbers, for a panel


class Pretrained(NamedTuple):
    """What pre-training leaves.

    Attributes:
        student: the student's parameters.
        history: rows of the training's metrics.
        looks: rows of the evaluations: ``step`` (of the student), the held-out ``loss`` and
            ``accuracy`` of MLM, and the teacher's monitors.
        panel: texts as the teacher rewrites them at the end; empty without one.
        cpu_seconds: user and system time, interrupted attempts included.
        per_step: median wall seconds of a student's step, without compilation and evaluations.
    """

    student: PyTree
    history: list[dict[str, Any]]
    looks: list[dict[str, Any]]
    panel: str
    cpu_seconds: float
    per_step: float | None


def slug(name: str, seed: int) -> str:
    """The folder of a method's seed."""
    return f"{name.replace(' ', '-')}-{seed}"


def check(config: Any, data: Data, names: list[str]) -> dict[str, Method]:
    """Every method, with its first batch looked at.

    Raises:
        ValueError: a batch that nothing could be learned from; the method and the place are named.
    """
    built = {name: methods_of.build(config, data, name) for name in names}
    for name, method in built.items():
        if name not in CORRUPTIONS:
            try:
                check_teacher(
                    method.sample(config.first_seed, 0),
                    vocabulary=data.words.size, positions=config.positions,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return built


class Looking:
    """Evaluations of the student while ``fit`` trains what teaches it; kept beside its metrics.

    ``looks.jsonl`` has a row of numbers for each, ``panels.jsonl`` of a teacher what it writes, and
    ``teacher-best.safetensors`` the one whose student had the least held-out loss of MLM.
    """

    def __init__(self, data: Data, method: Method, score: HeldOut, folder: Path, every: int):
        self.every, self.score = every, score
        self.method, self.words = method, data.words
        self.write = None if method.write is None else jax.jit(method.write)
        self.held_out = jax.tree.map(jnp.asarray, data.validation)
        read = data_of.unlabelled(data.validation, data.words)
        self.read = {k: jnp.asarray(read[k][:_MONITORED]) for k in ("tokens", "mask", "ordinary")}
        self.monitor = jax.jit(method.monitor)
        self.best = folder / "teacher-best.safetensors"
        self.looks = _Rows(folder / "looks.jsonl")
        self.panels = _Rows(folder / "panels.jsonl")

    def __call__(self, step: int, state: TrainState, info: Info) -> None:
        """Look, if it is time to."""
        if step % self.every:
            return
        student = self.method.student(state.meta, state.estimator_state)
        found = {**self.score(student, self.held_out), **self.monitor(state.meta, self.read)}
        row = {"step": step * self.method.student_steps}
        row |= {name: float(f"{float(value):.6g}") for name, value in found.items()}
        self.looks.add(row)
        if self.write is not None:
            *earlier, _ = self.looks.rows
            if all(row["loss"] < each["loss"] for each in earlier):
                meta = distributed.own_copy(state.meta)
                if distributed.is_writer():
                    save_params(self.best, meta, row)
            self.panels.add({"step": row["step"], "panel": self.panel(state.meta)})

    def panel(self, meta: PyTree) -> str:
        """A few texts as the teacher reads, rewrites and labels them."""
        if self.write is None:
            return ""
        few = {name: leaf[:_SHOWN] for name, leaf in self.read.items()}
        pseudo = self.write(distributed.own_copy(meta), few, jax.random.key(0))

        def decode(ids: list[int]) -> str:
            return self.words.tokenizer.decode(ids, skip_special_tokens=False).replace("\n", "\\n")

        return methods.panels(few, pseudo, decode, examples=_SHOWN)


class _Rows:
    """Rows by step in a file of JSON lines; one of an earlier attempt makes way for a new one."""

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; a resumed run adds again what came after its checkpoint."""
        self.rows = [*(each for each in self.rows if each["step"] < row["step"]), row]
        write_rows(self.file, self.rows)


def pretrain(
    config: Any, data: Data, name: str, method: Method, seed: int, score: HeldOut
) -> Pretrained:
    """Pre-train one method with one seed, in a folder of its own.

    Args:
        config: the experiment's configuration.
        data: the data.
        name: the method's name.
        method: the method.
        seed: of the parameters, the texts and the labelled draws.
        score: of ``make_held_out``, for the evaluations.

    Returns:
        A ``Pretrained``.
    """
    folder = config.out / slug(name, seed) / "pretraining"
    steps = config.steps // method.student_steps
    every = max(1, steps // config.evaluations)
    outer = adamw(config.rate, config.warmup)
    begin = jax.jit(method.start)(jax.random.key(seed))
    looking = Looking(data, method, score, folder, every)
    loader = episode_loader(method.sample, seed=seed, threads=1)
    try:
        trained = train_method(
            f"{name}, seed {seed}", method.mg, outer, begin, loader, folder,
            resume=config.resume, steps=steps, key=seed, keep=1, checkpoint_every=every,
            log_every=max(1, every // 5), on_step=looking,
        )  # fmt: skip
    finally:
        loader.close()
    template = jax.eval_shape(
        lambda meta: init_state(as_stages(method.mg), outer, meta, jax.random.key(seed)), begin
    )
    with checkpoint.open_checkpoints(folder / "checkpoints", keep=1) as manager:
        state: TrainState = checkpoint.restore(manager, template).tree
    rates = [row["steps_per_second"] for row in trained.history[1:] if "steps_per_second" in row]
    return Pretrained(
        method.student(state.meta, state.estimator_state),
        trained.history,
        looking.looks.rows,
        looking.panel(state.meta),
        trained.cpu_seconds,
        1 / (statistics.median(rates) * method.student_steps) if rates else None,
    )


class Tuner(NamedTuple):
    """Fine-tuning and prediction, compiled once for all tasks, methods and seeds.

    Attributes:
        tune: ``(params, seed, task) -> params``.
        predict: ``(params, task, windows) -> predictions``, as ``data_of.score`` takes them.
    """

    tune: Callable[[PyTree, int, Downstream], PyTree]
    predict: Callable[[PyTree, Downstream, Any], list[Any]]


def tuning_steps(config: Any, task: Downstream) -> int:
    """Steps of fine-tuning on a task: its epochs, at most so many, in whole dispatches."""
    wanted = -(-config.finetune_epochs * len(task.train.label) // config.finetune_batch)
    return -(-min(wanted, config.finetune_steps) // CHUNK) * CHUNK


def make_tuner(config: Any, data: Data) -> Tuner:
    """Fine-tuning by masked_lm's head: a label is a token at every position."""
    shape = methods_of.network(config, data.words.size)
    outer = adamw(config.finetune_rate, config.finetune_warmup)
    trainer = jmeta.meta_trainer(
        methods.plain_gradient(methods_of.student_loss(config, shape)), outer
    )
    begin = jax.jit(trainer.init)

    def run(state: TrainState, batches: PyTree) -> TrainState:
        return jax.lax.scan(trainer.step, state, batches)[0]

    run = jax.jit(run, donate_argnums=0)

    @jax.jit
    def of_classes(params: PyTree, tokens: Array, mask: Array, classes: Any) -> Array:
        logits = masked_lm.logits(shape, params, {"tokens": tokens, "mask": mask})
        return class_scores(logits, mask, classes)

    @jax.jit
    def of_spans(params: PyTree, tokens: Array, mask: Array) -> tuple[Array, Array]:
        return best_tokens(masked_lm.logits(shape, params, {"tokens": tokens, "mask": mask}))

    def tune(params: PyTree, seed: int, task: Downstream) -> PyTree:
        sample = text_batches(task.train, config.finetune_batch)
        # A copy: the first step donates what it is given.
        state = begin(jax.tree.map(jnp.copy, params), jax.random.key(seed))
        for first in range(0, tuning_steps(config, task), CHUNK):
            each = [sample(seed, step) for step in range(first, first + CHUNK)]
            names = ("tokens", "mask", "labels", "weights")
            query = {name: np.stack([batch[name] for batch in each]) for name in names}
            state = run(state, jmeta.Episode((), query))
        return state.meta

    def predict(params: PyTree, task: Downstream, windows: Any) -> list[Any]:
        if task.task.kind == "spans":
            ids, log_probs = over_windows(
                windows, lambda batch: of_spans(params, batch["tokens"], batch["mask"])
            )
            return decode_spans(ids, log_probs, windows, data.words)
        classes = jnp.asarray(windows.class_tokens)
        scores = over_windows(
            windows, lambda batch: of_classes(params, batch["tokens"], batch["mask"], classes)
        )
        return decode_classes(scores, windows).tolist()

    return Tuner(tune, predict)


def fine_tune(
    config: Any, data: Data, tuner: Tuner, params: PyTree, name: str, seed: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Fine-tune on every task, write its predictions, and score them.

    Args:
        config: the experiment's configuration.
        data: the data.
        tuner: of ``make_tuner``.
        params: the pre-trained student.
        name: the method, for messages.
        seed: decides the order of the examples, the same for every method.
        folder: for ``scores.json``, ``predictions/TASK.jsonl`` and ``submission/TASK.jsonl``.

    Returns:
        For each task ``{"metrics", "n", "steps"}``.
    """
    file = folder / "scores.json"
    scores = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for each, task in data.tasks.items():
        if each in scores:
            continue
        print(f"{name}, seed {seed}: {each}", flush=True)
        tuned = tuner.tune(params, seed, task)
        examples, windows = task.val
        predicted = tuner.predict(tuned, task, windows)
        write_predictions(folder / "predictions", task, predicted, examples)
        if task.hidden is not None:
            said = tuner.predict(tuned, task, task.hidden[1])
            write_predictions(folder / "submission", task, said, task.hidden[0])
        found = data_of.score(task.task, predicted, examples)
        steps = tuning_steps(config, task)
        scores[each] = {"metrics": found.metrics, "n": found.n, "steps": steps}
        distributed.write(file, json.dumps(scores, indent=1) + "\n")
    return {each: scores[each] for each in data.tasks}


def write_predictions(folder: Path, task: Downstream, predicted: list[Any], examples: Any) -> None:
    """Write ``TASK.jsonl``, a row for each example as the benchmark's server takes it."""
    rows = data_of.official(task.task, predicted, examples)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    distributed.write(folder / f"{task.task.name}.jsonl", lines)
