"""What the two experiments on teachers share: optimizer, what a teacher writes, how MLM is scored.

Two Moons trains seeds side by side and SuperGLUE one after the other; these pieces are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta import methods, optim
from jmeta.core.types import Array, Key, PyTree
from jmeta.methods.relaxations import Relaxation, draw, expected, of_heads
from jmeta.models import masked_lm, teacher_lm
from jmeta.models.transformer import TransformerConfig
from jmeta.tasks import corruption
from jmeta.tasks.corruption import Objective
from jmeta.tasks.tokenizer import Unified

Batch: TypeAlias = dict[str, Any]

MLM, DENOISING, RANDOM, RANDOM_MASKS = "mlm", "denoising", "random tokens", "random masks"
CORRUPTIONS: dict[str, Objective] = {  # without a teacher
    MLM: corruption.masked_lm,
    DENOISING: corruption.denoising,
    RANDOM: functools.partial(corruption.masked_lm, keep=0, random=1),
    RANDOM_MASKS: functools.partial(corruption.masked_lm, keep=0, random=0),
}
MASKS = ("mask-only", "mask-budget")  # what chooses where to mask, the first also how much
REPLACEMENTS = "replacements"  # what writes other tokens for some, which alone are asked for
DRAWN = (*MASKS, REPLACEMENTS)  # what is differentiated as soft, and drawn
SOFT = ("soft", "input-only soft", *DRAWN)
HARD = ("hard", "input-only hard")
TEACHERS = (*SOFT, *HARD)
MASKED = 0.15  # the share of positions that MLM masks, and that DRAWN teachers begin with or keep
# Who reads a setting that some methods do not.
READERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("inner_steps", "inner_rate", "support_steps"), TEACHERS),
    "soft_weight": ("soft", *MASKS),
    "input_weight": ("input-only soft", REPLACEMENTS),
    "hard_weight": HARD,
}


def named(setting: str, asked: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Names as a list or with commas between them, in the order of those that there are.

    Raises:
        ValueError: one is unknown.
    """
    each = [part.strip() for name in asked for part in name.split(",") if part.strip()]
    unknown = [name for name in each if name not in known]
    if unknown:
        raise ValueError(f"{setting} {', '.join(unknown)}: choose of {', '.join(known)}")
    return tuple(name for name in known if name in each)


def refuse_unread(config: Any, readers: dict[str, tuple[str, ...]]) -> None:
    """Refuse a setting that was changed and that no method of this call reads.

    ``config.track`` finds those that were typed, too, but only when the training is over.

    Args:
        config: the experiment's configuration.
        readers: the methods that read a setting, by its name.

    Raises:
        ValueError: there is one; the message says who would read it.
    """
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    for name, methods_of in readers.items():
        if getattr(config, name) != usual[name] and not set(methods_of) & set(config.methods):
            raise ValueError(
                f"{name}={getattr(config, name)}: none of the methods {', '.join(config.methods)} "
                f"reads it: leave it out, or name one that does ({', '.join(methods_of)}) beside "
                "them"
            )


def read_by(name: str) -> tuple[str, ...]:
    """What a method's teacher takes of unlabelled text beside tokens and mask.

    Of ``tasks.corruption.unlabelled``: where it may write, and what it learns MLM from itself.
    """
    where = ("ordinary",) if name in DRAWN else ()
    return where if name in MASKS else (*where, "masked")


def adamw(rate: Any, warmup: int) -> optax.GradientTransformation:
    """The published optimizer, of student, teacher and fine-tuning."""
    schedule = methods.inverse_sqrt(rate, warmup)
    return optax.chain(
        optim.clip_by_global_norm(5.0), optim.adamw(schedule, 0.9, 0.98, 1e-6, weight_decay=0.01)
    )


def judge(rate: Any) -> optax.GradientTransformation:
    """What moves a student on labelled points before a teacher is told how good it is."""
    return optax.chain(optim.clip_by_global_norm(5.0), optax.sgd(rate))


def student(config: Any, shape: TransformerConfig, loss: Any) -> methods.Student:
    """The student that a teacher teaches: AdamW on what is written, plain steps on support."""
    return methods.Student(
        loss,
        functools.partial(masked_lm.init, shape),
        adamw(config.rate, config.warmup),
        judge(config.inner_rate),
        config.support_steps,
    )


def rewriting(
    name: str, words: Unified, shape: TransformerConfig, masked: float = MASKED
) -> tuple[methods.Rewriting, Callable[[Array], PyTree]]:
    """What the teacher of a method writes, and where its parameters start.

    Args:
        name: of the method.
        words: the vocabulary.
        shape: of the teacher.
        masked: the share of positions that DRAWN teachers begin with or keep.
    """
    if name in MASKS:
        scorer = functools.partial(teacher_lm.score, shape)
        start = functools.partial(teacher_lm.init_scorer, shape, share=masked)
        share = masked if name == "mask-budget" else None
        return methods.masks_only(scorer, words.mask, share=share), start
    teacher = methods.without(functools.partial(teacher_lm.write, shape), [words.pad])
    return kind_of(name, masked)(teacher), functools.partial(teacher_lm.init_teacher, shape)


def kind_of(name: str, masked: float = MASKED) -> Callable[[Any], methods.Rewriting]:
    """Whether a method's teacher writes inputs alone, or some of them, or labels too."""
    if name == REPLACEMENTS:
        return functools.partial(methods.replacements, share=masked)
    return methods.inputs_only if name.startswith("input-only") else methods.inputs_and_labels


def soft_weight(config: Any, name: str) -> float:
    """The weight of a method's meta-gradient; of masks there is no other loss, so any will do."""
    return config.input_weight if name in ("input-only soft", REPLACEMENTS) else config.soft_weight


def relaxation(name: str) -> Relaxation:
    """How a soft teacher writes: distributions, or draws, with the gradient put through.

    The mean of a token and [MASK], or another token, shows the student the token: it would learn to
    copy.
    """
    return methods.straight_through if name in DRAWN else methods.expected


def monitor(
    name: str, words: Unified, shape: TransformerConfig, masked: float = MASKED
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """``(meta, unlabelled batch) -> scalars`` that tell whether a method's teacher has collapsed.

    Of a teacher with two heads both are looked at, though it may write inputs alone: its own MLM
    losses train the other. Of one that replaces some tokens the other is not.
    """
    shown, _ = rewriting(name if name in DRAWN else "soft", words, shape, masked)

    def look(meta: PyTree, batch: Batch) -> dict[str, Array]:
        return methods.monitors(
            shown.scores(meta, batch, None), batch,
            mask_token=words.mask, label_tokens=[words.sep, *words.cls],
        )  # fmt: skip

    return look


def panel(name: str, shown: methods.Rewriting) -> Callable[[PyTree, Batch, Key], Batch]:
    """``(meta, unlabelled batch, key) -> what the teacher makes of it``."""
    relax = expected if name in SOFT and name not in DRAWN else draw

    def write(meta: PyTree, batch: Batch, key: Key) -> Batch:
        return shown.write(of_heads(relax, shown.scores(meta, batch, None), key), batch)

    return write


def mlm_scores(shape: TransformerConfig, size: int) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """A student's loss and accuracy on corrupted rows of text.

    Args:
        shape: of the student.
        size: rows at a time; the last ones are left out if they do not fill a part.

    Returns:
        ``(params, batch [rows, positions]) -> {"loss", "accuracy"}``: the mean over the tokens
        that count, and the mean over rows of the share of them that is found again, in [0, 1].
    """

    def part(params: PyTree, batch: Batch) -> tuple[Array, ...]:
        weights = batch["weights"]
        scores = masked_lm.logits(shape, params, batch)
        picked = jnp.take_along_axis(scores, batch["labels"][..., None], -1)[..., 0]
        losses = jax.nn.logsumexp(scores, -1) - picked
        right = weights * (scores.argmax(-1) == batch["labels"]).astype(weights.dtype)
        count = weights.sum(-1)
        share = jnp.where(count > 0, right.sum(-1) / jnp.maximum(count, 1), 1)
        return (losses * weights).sum(), count.sum(), share.mean()

    def score(params: PyTree, batch: Batch) -> dict[str, Array]:
        rows = len(batch["weights"])
        each = min(size, rows)
        kept = rows - rows % each
        parts = jax.tree.map(lambda x: x[:kept].reshape(-1, each, *x.shape[1:]), batch)
        losses, counts, shares = jax.lax.map(lambda one: part(params, one), parts)
        return {"loss": losses.sum() / counts.sum(), "accuracy": shares.mean()}

    return score
