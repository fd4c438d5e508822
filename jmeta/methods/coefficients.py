"""What a drawn pseudo-example is worth: how much the student is better for a step on it.

The exact worth is the slope of the query loss in the example's weight, one for each example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import GradTransform, reverse_grad
from jmeta.core.estimators.unrolled import unrolled
from jmeta.core.inner import InnerState, inner_loop, unscored
from jmeta.core.types import Array, Episode, Info, Key, Problem, PyTree, Steps
from jmeta.methods.rewriting import Batch
from jmeta.methods.students import Student, direct_grad, fine_tuned, recorded, recording
from jmeta.methods.teacher import cosine

Coefficient: TypeAlias = Literal[
    "exact", "first_order", "cosine", "loss_difference", "negative_loss"
]


def coefficients(
    student: Student, steps: int, kind: Coefficient, grad: GradTransform
) -> Callable[[InnerState, Episode, Key], tuple[Array, PyTree, Info]]:
    """What drawn pseudo-examples are worth to a student.

    Args:
        student: the student.
        steps: steps on pseudo-examples.
        kind: a coefficient of ``hard_teacher``.
        grad: how the unroll is differentiated for ``"exact"``.

    Returns:
        ``(student under recording, Episode(pseudo-examples, Episode(support, query)), key) ->
        (coefficients, recorded gradients [steps, ...], info)``; the coefficients have a trailing
        axis of examples, of length 1 where they are one for a micro-batch, after one of steps
        where the pseudo-examples are ``Steps``.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(Coefficient):
        raise ValueError(f"coefficient={kind!r}; choose one of {', '.join(get_args(Coefficient))}")
    direct = kind in ("first_order", "cosine")
    outer = fine_tuned(student, direct_grad if direct else grad)
    problem = Problem(_weighted(student), outer, lambda meta: recording(student.optimizer, steps))

    def unweighted(episode: Episode) -> tuple[Array, Episode]:
        """Weights of one, and the pseudo-batches numbered by step."""
        pseudo = episode.support
        if not isinstance(pseudo, Steps):
            return jnp.ones(_counts(pseudo).shape, _counts(pseudo).dtype), Episode(
                (pseudo, None), episode.query
            )
        each = jax.vmap(_counts)(pseudo.batches)
        numbered = Steps((pseudo.batches, jnp.arange(each.shape[0])))
        return jnp.ones(each.shape, each.dtype), Episode(numbered, episode.query)

    if kind in ("exact", "first_order"):
        mg = unrolled(
            problem, steps, persistent=True, grad=direct_grad if kind == "first_order" else grad
        )

        def differentiated(first: InnerState, episode: Episode, key: Key):
            weights, episode = unweighted(episode)
            slopes, last, info = mg.estimate(weights, first, episode, key)
            return -slopes, recorded(last), info

        return differentiated

    run = inner_loop(problem, steps, objective=unscored, grad=reverse_grad)

    def evaluated(first: InnerState, episode: Episode, key: Key):
        weights, episode = unweighted(episode)
        _, (last, losses, _) = run(weights, first, episode, key)
        if kind == "cosine":
            (loss, aux), slope = jax.value_and_grad(
                lambda fast: outer(fast, (), episode.query, None), has_aux=True
            )(last.fast)
            h = cosine(slope, jax.tree.map(jnp.subtract, first.fast, last.fast))
        else:
            loss, aux = outer(last.fast, (), episode.query, None)
            h = -loss
            if kind == "loss_difference":
                h = h + outer(first.fast, (), episode.query, None)[0]
        info = Info(loss, losses, aux, jnp.zeros(()))
        return h.reshape((1,) * weights.ndim), recorded(last), info

    return evaluated


def _weighted(student: Student) -> Callable[..., tuple[Array, PyTree]]:
    """The student's loss with a weight of one for each example, by which it is differentiated.

    The weights do not enter the normaliser: the loss is the sum over examples of their own means,
    in proportion to how many labels each has.
    """

    def inner(fast: PyTree, weights: Array, batch: tuple[Batch, Any], key: Key):
        pseudo, step = batch
        mine = weights if step is None else weights[step]
        counts = _counts(pseudo)
        total = counts.sum()
        shares = counts / jnp.where(total == 0, 1, total)

        def alone(example: Batch, key: Key) -> Array:
            return student.loss(fast, jax.tree.map(lambda x: x[None], example), key)[0]

        if key is None:
            each = jax.vmap(lambda example: alone(example, None))(pseudo)
        else:
            each = jax.vmap(alone)(pseudo, jax.random.split(key, counts.shape[0]))
        return jnp.sum((mine * shares).astype(each.dtype) * each), {}

    return inner


def _counts(pseudo: Batch) -> Array:
    """How many labels each example has."""
    weights = pseudo["weights"]
    return weights.sum(tuple(range(1, weights.ndim)))
