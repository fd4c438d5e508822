"""What pre-trains a student of text: each method's meta-gradient, start, episodes and monitors.

All share the networks, the optimizer and its schedule, and how many texts a student's step sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from experiments import _meta_lm_data as data_of
from experiments import _teacher_shared as shared
from experiments._meta_lm_data import Batch, Data
from experiments._teacher_shared import CORRUPTIONS, DRAWN, HARD, MASKS, SOFT
from jmeta import methods
from jmeta.core.types import Array, Key, MetaGradient, PyTree
from jmeta.models import heads, masked_lm, teacher_lm
from jmeta.models.soft_tokens import PAD
from jmeta.models.transformer import TransformerConfig

NONE = "no pre-training"
METHODS = (*CORRUPTIONS, *SOFT, *HARD)


class Method(NamedTuple):
    """One way to pre-train.

    Attributes:
        mg: its meta-gradient.
        start: ``key -> meta``: the teacher, or without one the student.
        sample: ``(seed, step) -> episodes`` of an outer step.
        student: ``(meta, estimator's state) -> the student's parameters``.
        student_steps: steps that the student takes in an outer step.
        monitor: ``(meta, unlabelled batch) -> scalars``; without a teacher none.
        write: ``(meta, unlabelled batch, key) -> what the teacher makes of it``; None: there is
            none.
    """

    mg: MetaGradient
    start: Callable[[Array], PyTree]
    sample: data_of.Sample
    student: Callable[[PyTree, PyTree], PyTree]
    student_steps: int
    monitor: Callable[[PyTree, Batch], dict[str, Array]]
    write: Callable[[PyTree, Batch, Key], Batch] | None


def network(config: Any, words: int) -> TransformerConfig:
    """The shape of student and teacher."""
    # Recomputing blocks is undone on a CPU unless they are a scan.
    saving: dict[str, Any] = {"loop": "scan", "remat": "full"} if config.remat else {}
    return masked_lm.config(
        words, config.width, config.layers, config.heads, config.positions,
        dropout=config.dropout, attention_dropout=config.dropout, **saving,
    )  # fmt: skip


def student_loss(config: Any, shape: TransformerConfig) -> Any:
    """The student's cross-entropy, ``(params, batch, key)``."""
    return functools.partial(masked_lm.loss, shape, chunk=config.vocab_chunk or None)


def build(config: Any, data: Data, name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: the tasks or the corpus are too small for its episodes.
    """
    shape = network(config, data.words.size)
    loss = student_loss(config, shape)
    if name in CORRUPTIONS:
        return Method(
            methods.plain_gradient(loss),
            functools.partial(masked_lm.init, shape),
            data_of.corrupted_sample(config, data, CORRUPTIONS[name]),
            lambda meta, state: meta,
            1,
            lambda meta, batch: {},
            None,
        )
    rewriting, start = shared.rewriting(name, data.words, shape)
    asked = name in config.mlm_task
    sample = data_of.teacher_sample(
        config, data, keep=shared.read_by(name), mlm_task=asked,
        mask_bug=config.mask_bug and asked,
    )  # fmt: skip

    return Method(
        _meta_gradient(config, name, shape, shared.student(config, shape, loss), rewriting),
        start,
        sample,
        lambda meta, state: state.student.fast,
        config.inner_steps,
        shared.monitor(name, data.words, shape),
        shared.panel(name, rewriting),
    )


def _meta_gradient(
    config: Any,
    name: str,
    shape: TransformerConfig,
    student: methods.Student,
    rewriting: methods.Rewriting,
) -> MetaGradient:
    options: dict[str, Any] = {"steps": config.inner_steps}
    if name not in MASKS:
        options["auxiliary"] = methods.mlm_auxiliary(_supervised(config, shape))
    if config.vocab_chunk:
        options["microbatch"] = 1
    if name in HARD:
        baseline = methods.leave_one_out() if config.micro_batches > 1 else methods.moving_average()
        return methods.hard_teacher(
            student, rewriting, coefficient="exact", baseline=baseline,
            meta_weight=config.hard_weight, **options,
        )  # fmt: skip
    options["relax"] = shared.relaxation(name)
    if config.vocab_chunk and name not in DRAWN:
        # No pass may hold a distribution over the vocabulary for all tokens at once; a draw of
        # each is one in whatever form.
        lazy = functools.partial(teacher_lm.write_factors, shape)
        rewriting, options["relax"] = shared.kind_of(name)(lazy), methods.unevaluated
    options["meta_weight"] = shared.soft_weight(config, name)
    return methods.soft_teacher(student, rewriting, **options)


def _supervised(config: Any, shape: TransformerConfig) -> Any:
    """The auxiliary losses' cross-entropy of both heads; [PAD] is no class of either."""
    if not config.vocab_chunk:
        write = functools.partial(teacher_lm.write, shape)
        return methods.two_head_loss(methods.without(write, [PAD]))

    def loss(meta: PyTree, batch: Batch, key: Key) -> tuple[Array, PyTree]:
        read = {"tokens": batch["tokens"], "mask": batch["mask"]}
        factors = teacher_lm.write_factors(shape, meta, read, key)
        parts = {}
        for name, weights in (("inputs", batch["mask"]), ("labels", batch["weights"])):
            states, table, bias = (factors[name][k] for k in ("states", "table", "bias"))
            targets, picked = table[batch[name]], bias[batch[name]]
            # A label that does not count may be [PAD], which has no probability.
            picked = jnp.where(weights != 0, picked, 0)
            parts[name], _ = heads.token_loss(
                states, table, targets, weights, (bias, picked), config.vocab_chunk
            )
        return parts["inputs"] + parts["labels"], parts

    return loss


HeldOut: TypeAlias = Callable[[PyTree, Batch], dict[str, Array]]


def make_held_out(shape: TransformerConfig, size: int = 32) -> HeldOut:
    """Loss and accuracy of a student on corrupted windows, jitted.

    Args:
        shape: of the student.
        size: windows at a time; the last ones are left out if they do not fill a part.

    Returns:
        ``(params, batch [windows, positions]) -> {"loss", "accuracy"}``: the mean over hidden
        tokens, and the mean over windows of the share of them that is found, in per cent.
    """
    score = shared.mlm_scores(shape, size)

    @jax.jit
    def per_cent(params: PyTree, batch: Batch) -> dict[str, Array]:
        found = score(params, batch)
        return found | {"accuracy": 100 * found["accuracy"]}

    return per_cent
