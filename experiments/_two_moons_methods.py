"""What pre-trains a student on Two Moons: each method's meta-gradient, start and chunk of episodes.

All share the networks, the optimizer and its schedule, and the sequences seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jmeta
from experiments import _two_moons_data as data_of
from experiments._two_moons_data import Batch, Data
from jmeta import methods, optim
from jmeta.core.types import Array, Episode, Key, MetaGradient, PyTree
from jmeta.methods.maml import learned_start
from jmeta.methods.rewriting import draw, expected, of_heads
from jmeta.models import masked_lm
from jmeta.models.transformer import TransformerConfig

MLM = "mlm"
SOFT = ("soft", "input-only soft", "mask-only")
HARD = ("hard", "input-only hard")
METHODS = (MLM, "input-only soft", "mask-only", "soft", "hard", "input-only hard")
NONE = "no pre-training"


class Method(NamedTuple):
    """One way to pre-train.

    Attributes:
        mg: its meta-gradient, of one seed.
        start: ``key -> meta``: for MLM the student, else the teacher.
        chunk: ``(seed, chunk) -> episodes [steps, ...]`` of a chunk's outer steps.
        student: ``(meta, estimator's state) -> the student's parameters``.
        monitor: ``(meta, unlabelled batch) -> scalars``.
        panel: ``(meta, unlabelled batch, key) -> what the teacher writes for it``; None: MLM.
    """

    mg: MetaGradient
    start: Callable[[Array], PyTree]
    chunk: Callable[[int, int], Episode]
    student: Callable[[PyTree, PyTree], PyTree]
    monitor: Callable[[PyTree, Batch], dict[str, Array]]
    panel: Callable[[PyTree, Batch, Key], Batch] | None


def network(config: Any, data: Data) -> TransformerConfig:
    """The shape of student and teacher."""
    return masked_lm.config(
        data.words.size, config.width, config.layers, config.heads, data_of.POSITIONS,
        ff=config.ff, dropout=config.dropout, attention_dropout=config.dropout,
    )  # fmt: skip


def adamw(rate: Any, warmup: int) -> optax.GradientTransformation:
    """The published optimizer, of student, teacher and fine-tuning."""
    schedule = methods.inverse_sqrt(rate, warmup)
    return optax.chain(
        optim.clip_by_global_norm(5.0), optim.adamw(schedule, 0.9, 0.98, 1e-6, weight_decay=0.01)
    )


def build(config: Any, data: Data, name: str) -> Method:
    """A method by its name."""
    shape = network(config, data)
    loss = functools.partial(masked_lm.loss, shape)
    if name == MLM:
        return _mlm(config, data, shape, loss)
    return _teacher(config, data, name, shape, loss)


def _batch_shape(config: Any) -> tuple[int, int, int]:
    return config.chunk, config.micro_batches, config.batch


def _mlm(config: Any, data: Data, shape: TransformerConfig, loss: Any) -> Method:
    size = _batch_shape(config)
    return Method(
        jmeta.over_tasks(jmeta.unrolled(learned_start(loss, optax.sgd(0.0)), steps=0)),
        functools.partial(masked_lm.init, shape),
        lambda seed, chunk: data_of.mlm_chunk(data, seed, chunk, size),
        lambda meta, state: meta,
        lambda meta, batch: {},
        None,
    )


def _teacher(config: Any, data: Data, name: str, shape: TransformerConfig, loss: Any) -> Method:
    student = methods.Student(
        loss,
        functools.partial(masked_lm.init, shape),
        adamw(config.rate, config.warmup),
        optax.chain(optim.clip_by_global_norm(5.0), optax.sgd(config.inner_rate)),
    )
    rewriting, start = _rewriting(config, data, name, shape)
    auxiliary = None
    if name != "mask-only":
        writer = functools.partial(masked_lm.write, shape)
        auxiliary = methods.mlm_auxiliary(methods.two_head_loss(writer))
    options: dict[str, Any] = {"steps": config.inner_steps, "auxiliary": auxiliary}
    if name in SOFT:
        options["meta_weight"] = config.soft_weight
        if config.soft_gradient == "first_order":
            options["grad"] = methods.direct_grad
        mg = methods.soft_teacher(student, rewriting, **options)
    else:
        options |= {"meta_weight": config.hard_weight, "coefficient": config.coefficient}
        options |= {"weighting": config.weighting, "baseline": _baseline(config)}
        mg = methods.hard_teacher(student, rewriting, **options)
    if config.restart_every:
        mg = methods.restarting(mg, every=config.restart_every)
    if config.population > 1:
        mg = methods.population(mg, size=config.population)

    def fast(meta: PyTree, state: Any) -> PyTree:
        own = state[0] if config.restart_every else state
        # Of a population, one student is what is fine-tuned; which one does not matter.
        first = (lambda leaf: leaf[0]) if config.population > 1 else (lambda leaf: leaf)
        return jax.tree.map(first, own.student.fast)

    def monitor(meta: PyTree, batch: Batch) -> dict[str, Array]:
        scores = rewriting.scores(meta, batch, None)
        return methods.monitors(
            scores, batch, mask_token=data.words.mask,
            label_tokens=[data.words.sep, *data.words.cls],
        )  # fmt: skip

    def panel(meta: PyTree, batch: Batch, key: Key) -> Batch:
        relax = expected if name in SOFT and name != "mask-only" else draw
        return rewriting.write(of_heads(relax, rewriting.scores(meta, batch, None), key), batch)

    options_of_chunk: dict[str, Any] = {
        "inner_steps": config.inner_steps,
        "keep": ("ordinary",) if name == "mask-only" else ("masked",),
        "mlm_task": name in config.mlm_task,
        "mask_bug": config.mask_bug and name in config.mlm_task,
    }

    def chunk(seed: int, number: int) -> Episode:
        points = data_of.labelled(config.teacher_labels, seed, fresh=config.fresh_labels)
        size = _batch_shape(config)
        return data_of.teacher_chunk(data, points, seed, number, size, **options_of_chunk)

    return Method(mg, start, chunk, fast, monitor, panel)


def _rewriting(
    config: Any, data: Data, name: str, shape: TransformerConfig
) -> tuple[methods.Rewriting, Callable[[Array], PyTree]]:
    """What the teacher of a method writes, and where its parameters start."""
    if name == "mask-only":
        scorer = functools.partial(masked_lm.score, shape)
        start = functools.partial(masked_lm.init_scorer, shape, share=0.15)
        return methods.masks_only(scorer, data.words.mask), start
    teacher = methods.without(functools.partial(masked_lm.write, shape), [data.words.pad])
    kinds = {"soft": methods.inputs_and_labels, "hard": methods.inputs_and_labels}
    write = kinds.get(name, methods.inputs_only)
    return write(teacher), functools.partial(masked_lm.init_teacher, shape)


def _baseline(config: Any) -> methods.Baseline:
    if config.baseline == "leave_one_out":
        return methods.leave_one_out()
    return (
        methods.moving_average(0.01)
        if config.baseline == "moving_average"
        else methods.no_baseline()
    )


def mlm_scores(shape: TransformerConfig, size: int = 50) -> Callable[[PyTree, Batch], Any]:
    """A student's loss and accuracy on corrupted sequences.

    Args:
        shape: of the student.
        size: sequences at a time; it must divide their number.

    Returns:
        ``(params, batch [sequences, 34]) -> (loss, accuracy)``: the mean over selected tokens, and
        the mean over sequences of the share of them that is found again.
    """

    def part(params: PyTree, batch: Batch) -> tuple[Array, ...]:
        scores = masked_lm.logits(shape, params, batch)
        weights = batch["weights"]
        picked = jnp.take_along_axis(scores, batch["labels"][..., None], -1)[..., 0]
        losses = jax.nn.logsumexp(scores, -1) - picked
        right = weights * (scores.argmax(-1) == batch["labels"]).astype(weights.dtype)
        count = weights.sum(-1)
        share = jnp.where(count > 0, right.sum(-1) / jnp.maximum(count, 1), 1)
        return (losses * weights).sum(), count.sum(), share.sum()

    def score(params: PyTree, batch: Batch) -> tuple[Array, Array]:
        total = batch["weights"].shape[0]
        parts = jax.tree.map(lambda x: x.reshape(-1, min(size, total), *x.shape[1:]), batch)
        losses, counts, shares = jax.lax.map(lambda each: part(params, each), parts)
        return losses.sum() / counts.sum(), shares.sum() / total

    return score
