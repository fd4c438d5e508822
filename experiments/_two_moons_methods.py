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
from experiments import _teacher_shared as shared
from experiments import _two_moons_data as data_of
from experiments._teacher_shared import CORRUPTIONS, MASKS, REPLACEMENTS, SOFT
from experiments._two_moons_data import Batch, Data
from jmeta import methods
from jmeta.core.types import Array, Episode, Key, MetaGradient, PyTree
from jmeta.models import masked_lm, teacher_lm
from jmeta.models.transformer import TransformerConfig
from jmeta.tasks.corruption import Objective

METHODS = (
    *CORRUPTIONS, "input-only soft", *MASKS, REPLACEMENTS, "soft", "hard", "input-only hard"
)  # fmt: skip
NONE = "no pre-training"


class Method(NamedTuple):
    """One way to pre-train.

    Attributes:
        mg: its meta-gradient, of one seed.
        start: ``key -> meta``: the teacher, or without one the student.
        chunk: ``(seed, chunk) -> episodes [steps, ...]`` of a chunk's outer steps.
        student: ``(meta, estimator's state) -> the student's parameters``.
        monitor: ``(meta, unlabelled batch) -> scalars``.
        optimizer: what moves meta.
        panel: ``(meta, unlabelled batch, key) -> what the teacher writes for it``; None: there is
            no teacher.
    """

    mg: MetaGradient
    start: Callable[[Array], PyTree]
    chunk: Callable[[int, int], Episode]
    student: Callable[[PyTree, PyTree], PyTree]
    monitor: Callable[[PyTree, Batch], dict[str, Array]]
    optimizer: optax.GradientTransformation
    panel: Callable[[PyTree, Batch, Key], Batch] | None


def network(config: Any, data: Data) -> TransformerConfig:
    """The shape of student and teacher."""
    return masked_lm.config(
        data.words.size, config.width, config.layers, config.heads, data_of.POSITIONS,
        ff=config.ff, dropout=config.dropout, attention_dropout=config.dropout,
    )  # fmt: skip


def optimizer(rate: Any, warmup: int) -> optax.GradientTransformation:
    """The published optimizer over one vector of all parameters.

    Leaf by leaf, operations on a few hundred numbers are a fifth of what there is to compile.
    """
    return optax.flatten(shared.adamw(rate, warmup))


class Skipping(NamedTuple):
    """The state of ``skipping``: the inner optimizer's, and how many steps were left out."""

    inner: PyTree
    skipped: Array


def skipping(inner: optax.GradientTransformation, largest: float) -> optax.GradientTransformation:
    """Leaves the steps out whose gradient has a norm of ``largest`` or more, or is not a number.

    Nothing of the inner optimizer's state moves in them. ``optax.MultiSteps`` does the same, but
    not under strict promotion of dtypes.
    """

    def init(params: PyTree) -> Skipping:
        return Skipping(inner.init(params), jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Skipping]:
        small = optax.tree.norm(updates) < largest  # false for what is not a number

        def pick(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(small, a, b), new, old)

        nothing = optax.tree.zeros_like(updates)
        moved, after = inner.update(pick(updates, nothing), state.inner, params)
        skipped = state.skipped + jnp.where(small, 0, 1)
        return pick(moved, nothing), Skipping(pick(after, state.inner), skipped)

    return optax.GradientTransformation(init, update)


def build(config: Any, data: Data, name: str) -> Method:
    """A method by its name."""
    shape = network(config, data)
    loss = functools.partial(masked_lm.loss, shape)
    if name in CORRUPTIONS:
        return _corrupted(config, data, shape, loss, CORRUPTIONS[name])
    return _teacher(config, data, name, shape, loss)


def _batch_shape(config: Any) -> tuple[int, int, int]:
    return config.chunk, config.micro_batches, config.batch


def _corrupted(
    config: Any, data: Data, shape: TransformerConfig, loss: Any, corrupt: Objective
) -> Method:
    size = _batch_shape(config)
    corrupt = functools.partial(corrupt, select=config.masked)
    return Method(
        jmeta.over_tasks(methods.plain_gradient(loss)),
        functools.partial(masked_lm.init, shape),
        lambda seed, chunk: Episode(None, data_of.corrupted(data, seed, chunk, size, corrupt)),
        lambda meta, state: meta,
        lambda meta, batch: {},
        optimizer(config.rate, config.warmup),
        None,
    )


def _teacher(config: Any, data: Data, name: str, shape: TransformerConfig, loss: Any) -> Method:
    rewriting, start = shared.rewriting(name, data.words, shape, config.masked)
    auxiliary = None
    if name not in MASKS:
        # With [PAD] among its classes, which is never one of its labels: as published.
        writer = functools.partial(teacher_lm.write, shape)
        auxiliary = methods.mlm_auxiliary(methods.two_head_loss(writer))
    student = shared.student(config, shape, loss)
    student = student._replace(
        optimizer=optimizer(config.rate, config.warmup),
        support_optimizer=optax.flatten(student.support_optimizer),
    )
    options: dict[str, Any] = {"steps": config.inner_steps, "auxiliary": auxiliary}
    if name in SOFT:
        options["meta_weight"] = shared.soft_weight(config, name)
        options["relax"] = shared.relaxation(name)
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

    options_of_chunk: dict[str, Any] = {
        "inner_steps": config.inner_steps,
        "keep": shared.read_by(name),
        "mlm_task": name in config.mlm_task,
        "mask_bug": config.mask_bug and name in config.mlm_task,
        "among_classes": config.among_classes,
        "labelled": config.labelled_batch or config.batch,
    }

    def chunk(seed: int, number: int) -> Episode:
        points = data_of.labelled(config.teacher_labels, seed, fresh=config.fresh_labels)
        size = _batch_shape(config)
        return data_of.teacher_chunk(data, points, seed, number, size, **options_of_chunk)

    monitor = shared.monitor(name, data.words, shape, config.masked)
    moves = optimizer(config.rate, config.warmup)
    if config.largest_gradient:
        moves = skipping(moves, config.largest_gradient * options["meta_weight"])
    return Method(mg, start, chunk, fast, monitor, moves, shared.panel(name, rewriting))


def _baseline(config: Any) -> methods.Baseline:
    if config.baseline == "leave_one_out":
        return methods.leave_one_out()
    return (
        methods.moving_average(0.01)
        if config.baseline == "moving_average"
        else methods.no_baseline()
    )
