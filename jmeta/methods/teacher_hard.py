"""A teacher that draws what it writes, and learns by the score function.

What is drawn is worth its coefficient: how much the student is better for having learned from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import GradTransform, mixed_mode_grad
from jmeta.core.types import Array, Episode, Info, Key, MetaGradient, PyTree, Steps
from jmeta.methods.baselines import Baseline, no_baseline
from jmeta.methods.coefficients import Coefficient, coefficients
from jmeta.methods.relaxations import draw, log_probability, of_heads
from jmeta.methods.rewriting import Batch, Rewriting
from jmeta.methods.students import (
    Student,
    TeacherState,
    born,
    moved,
    over_microbatches,
    record_from,
)
from jmeta.methods.teacher import Auxiliary, auxiliary_gradient, joined, require_episodes


def hard_teacher(
    student: Student,
    rewriting: Rewriting,
    *,
    steps: int = 1,
    coefficient: Coefficient = "exact",
    baseline: Baseline | None = None,
    weighting: Literal["sum", "mean"] = "sum",
    auxiliary: Auxiliary | None = None,
    meta_weight: float = 1.0,
    grad: GradTransform = mixed_mode_grad,
    microbatch: int | None = None,
) -> MetaGradient:
    r"""The score-function gradient of a teacher that draws pseudo-examples, and its student.

    .. math:: \hat g = \frac1N \sum_{i=1}^N \lambda \sum_b (h_{ib} - b_i)
        \nabla_\phi\left(-\log T_\phi(z_{ib} \mid x_{ib})\right) + \nabla_\phi L_{aux}(x_i; \phi)

    =====================  =======================================================================
    ``coefficient``        :math:`h`, positive where the draw helped the student
    =====================  =======================================================================
    ``"exact"``            :math:`-dL_{query}/dw_b` for the weight :math:`w_b = 1` of example b in
                           the pseudo-loss: with SGD :math:`\eta_0 \langle dL_{query}/d\theta_1,
                           g_b\rangle`; one reverse pass through the unroll gives all of them,
                           for any optimizer.
    ``"first_order"``      the same without the Hessians of the student: :math:`\eta_0 \langle
                           \nabla_{\theta_2} L_{query}, g_b\rangle`.
    ``"cosine"``           :math:`\cos(\nabla_{\theta_2} L_{query}, \theta_0 - \theta_1)`, one for
                           a micro-batch, as published.
    ``"loss_difference"``  the query loss (after fine-tuning) from :math:`\theta_0` less that from
                           :math:`\theta_1`, one for a micro-batch.
    ``"negative_loss"``    :math:`-L_{query}`, one for a micro-batch; with ``"sum"`` the estimate
                           is unbiased for :math:`\nabla_\phi E[L_{query}]`.
    =====================  =======================================================================

    Look at one batch of a text teacher's episodes with ``check_teacher`` first, as for
    ``soft_teacher``: it refuses tasks without a label, texts that are too long, and tokens and
    labels outside the vocabulary, for which a step would silently read another entry.

    Args:
        student: what is pre-trained; it moves as under ``soft_teacher``.
        rewriting: what the teacher writes.
        steps: steps on pseudo-examples in one unroll, as in ``soft_teacher``.
        coefficient: one of the table.
        baseline: ``no_baseline()`` (the default), ``moving_average(rate)`` or ``leave_one_out()``.
        weighting: ``"sum"`` over positions and heads, the score function; ``"mean"``, as published.
        auxiliary: as in ``soft_teacher``.
        meta_weight: :math:`\lambda`.
        grad: how the unroll is differentiated for ``"exact"``.
        microbatch: how many micro-batches are mapped together; None: all.

    Returns:
        A ``MetaGradient`` for meta = the teacher's parameters, with a ``TeacherState``; it needs a
        random key. Episodes and diagnostics as in ``soft_teacher``, and ``coefficient`` and
        ``baseline``, their means, and ``coefficient_spread``, the standard deviation. An
        unlabelled batch may bring what was drawn for it, ``drawn``: ``{head: int [...]}``.

    Raises:
        ValueError: an unknown coefficient; when called, no key, or ``leave_one_out`` alone.

    Example:
        >>> import optax
        >>> from jmeta.methods.rewriting import class_labels
        >>> def loss(w, batch, key):  # a student that counts how often it is told class 1
        ...     return jnp.mean((w - batch["labels"]) ** 2), {}
        >>> student = Student(loss, lambda key: jnp.zeros(()), optax.sgd(0.25), support_steps=0)
        >>> mg = hard_teacher(student, class_labels(lambda meta, batch, key: meta))
        >>> query = {"labels": jnp.ones((1, 1, 1))}
        >>> batch = {"x": jnp.ones((1, 1)), "drawn": {"labels": jnp.ones((1, 1), int)}}
        >>> data, key = Episode(batch, Episode(None, query)), jax.random.key(0)
        >>> meta = jnp.zeros((1, 2))
        >>> grads, _, _ = mg.estimate(meta, mg.init(meta, key), data, key)
        >>> grads.tolist()  # h = 2 (1 - 1/2) 0.5 = 1/2: class 1 becomes more likely
        [[0.25, -0.25]]

    Source: Shen (2021); Williams, "Simple Statistical Gradient-Following Algorithms" (1992).
    """
    value_of = coefficients(student, steps, coefficient, grad)
    chosen = no_baseline() if baseline is None else baseline

    def init(meta: PyTree, key: Key) -> TeacherState:
        return TeacherState(born(student, key), chosen.init())

    def estimate(meta: PyTree, state: TeacherState, episodes: Episode, key: Key):
        require_episodes(episodes)
        first = record_from(student.optimizer, state.student, steps)
        worth_key, score_key = jax.random.split(_given(key))

        def worth(episode: Episode, key: Key):
            draw_key, unroll_key = jax.random.split(_given(key))

            def written(batch: Batch, key: Key) -> tuple[PyTree, Batch]:
                drawn = batch.get("drawn")
                if drawn is None:
                    drawn = of_heads(draw, rewriting.scores(meta, batch, None), key)
                return drawn, rewriting.write(drawn, batch)

            drawn, pseudo = _each_step(written, episode.support, draw_key)
            h, pseudo_grads, info = value_of(first, Episode(pseudo, episode.query), unroll_key)
            return pseudo_grads, (h, drawn), info

        pseudo_grads, (h, drawn), info = over_microbatches(
            worth, first.opt_state.grads, episodes, worth_key, microbatch
        )
        mean, after = chosen.value(state.baseline, h)
        advantage = jax.lax.stop_gradient(h - mean)

        def scored(data: tuple[Episode, PyTree, Array], key: Key):
            episode, drawn, advantage = data

            def surrogate(meta: PyTree) -> Array:
                def log_p(batch: Batch, drawn: PyTree) -> Array:
                    scores = rewriting.scores(meta, batch, None)
                    return log_probability(scores, drawn, rewriting.counts(batch), weighting)

                if isinstance(episode.support, Steps):
                    each = jax.vmap(log_p)(episode.support.batches, drawn)
                else:
                    each = log_p(episode.support, drawn)
                return -jnp.sum(jnp.broadcast_to(advantage, each.shape).astype(each.dtype) * each)

            loss, grads = jax.value_and_grad(surrogate)(meta)
            helped, metrics = auxiliary_gradient(auxiliary, meta, episode, key)
            return (grads, helped), (), Info(loss, jnp.zeros(0), {}, jnp.zeros(()), metrics)

        like = (meta, None if auxiliary is None else meta)
        (grads, helped), _, extra = over_microbatches(
            scored, like, (episodes, drawn, advantage), score_key, microbatch
        )
        numbers = {
            "coefficient": jnp.mean(h),
            "coefficient_spread": jnp.std(h),
            "baseline": jnp.mean(mean),
        }
        info = info._replace(diagnostics=info.diagnostics | extra.diagnostics | numbers)
        moved_on = TeacherState(moved(student, state.student, pseudo_grads), after)
        return joined(grads, helped, meta_weight, moved_on, info)

    return MetaGradient(init, estimate)


def _each_step(function: Callable[[Batch, Key], Any], support: Any, key: Array) -> tuple[Any, Any]:
    """A pair-valued function of one unlabelled batch, over ``Steps`` too."""
    if not isinstance(support, Steps):
        return function(support, key)
    steps = jax.tree.leaves(support.batches)[0].shape[0]
    drawn, pseudo = jax.vmap(function)(support.batches, jax.random.split(key, steps))
    return drawn, Steps(pseudo)


def _given(key: Key) -> Array:
    if key is None:
        raise ValueError("a hard teacher draws what it writes; pass a jax.random.key")
    return key
