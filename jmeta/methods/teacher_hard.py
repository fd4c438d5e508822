"""A teacher that draws what it writes, and learns by the score function.

What is drawn is worth its coefficient: how much the student is better for having learned from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import GradTransform, mixed_mode_grad, reverse_grad
from jmeta.core.estimators.unrolled import unrolled
from jmeta.core.inner import InnerState, inner_loop, unscored
from jmeta.core.tree import global_norm
from jmeta.core.types import Array, Episode, Info, Key, MetaGradient, Problem, PyTree, Steps
from jmeta.methods.rewriting import Batch, Rewriting, draw, log_probability, of_heads
from jmeta.methods.students import (
    Student,
    TeacherState,
    born,
    direct_grad,
    fine_tuned,
    moved,
    over_microbatches,
    record_from,
    recorded,
    recording,
)
from jmeta.methods.teacher import Auxiliary, auxiliary_gradient, joined, require_episodes

Coefficient: TypeAlias = Literal[
    "exact", "first_order", "cosine", "loss_difference", "negative_loss"
]


class Baseline(NamedTuple):
    """What is subtracted from coefficients: it must not depend on the draw it is subtracted for.

    Attributes:
        init: ``() -> state``.
        value: ``(state, coefficients [microbatches, ...]) -> (baseline, state)``, the baseline of
            a shape that broadcasts with the coefficients.
    """

    init: Callable[[], PyTree]
    value: Callable[[PyTree, Array], tuple[Array, PyTree]]


def no_baseline() -> Baseline:
    """Nothing is subtracted.

    Example:
        >>> float(no_baseline().value((), jnp.ones((2, 3)))[0].sum())
        0.0
    """
    return Baseline(lambda: (), lambda state, h: (jnp.zeros((1,) * h.ndim, h.dtype), state))


def moving_average(rate: float = 0.01) -> Baseline:
    r"""The exponential moving average of the coefficients of earlier outer steps.

    .. math:: b_s = \frac{\sum_{r<s} (1-\gamma)^{s-1-r} \bar h_r}{\sum_{r<s} (1-\gamma)^{s-1-r}}

    Args:
        rate: :math:`\gamma`, how much a new mean counts.

    Returns:
        A ``Baseline``; zero at the first step.

    Raises:
        ValueError: the rate is not in (0, 1].

    Example:
        >>> average = moving_average(0.5)
        >>> _, state = average.value(average.init(), jnp.array([3.0]))
        >>> float(average.value(state, jnp.array([9.0]))[0][0])  # of what came before
        3.0

    Source: Pham et al., "Meta Pseudo Labels" (2021), the released code, with the bias of the first
    steps divided out.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a moving average with the rate {rate} is none; it must be in (0, 1]")

    def value(state: tuple[Array, Array], h: Array) -> tuple[Array, tuple[Array, Array]]:
        total, weight = state
        mean = total / jnp.where(weight == 0, 1, weight)
        new = (
            (1 - rate) * total + rate * jnp.mean(h).astype(total.dtype),
            (1 - rate) * weight + rate,
        )
        return mean.astype(h.dtype).reshape((1,) * h.ndim), new

    return Baseline(lambda: (jnp.zeros(()), jnp.zeros(())), value)


def leave_one_out() -> Baseline:
    r"""The mean coefficient of the other micro-batches, which unroll from the same student.

    .. math:: b_i = \frac{1}{N - 1} \sum_{j \ne i} \bar h_j

    Returns:
        A ``Baseline``; it needs at least two micro-batches.

    Example:
        >>> leave_one_out().value((), jnp.array([[1.0], [2.0], [6.0]]))[0].ravel().tolist()
        [4.0, 3.5, 1.5]

    Source: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019).
    """

    def value(state: PyTree, h: Array) -> tuple[Array, PyTree]:
        if h.shape[0] < 2:
            raise ValueError("leave_one_out compares micro-batches: it needs at least two of them")
        means = h.reshape(h.shape[0], -1).mean(1)
        others = (means.sum() - means) / (h.shape[0] - 1)
        return others.reshape((-1,) + (1,) * (h.ndim - 1)), state

    return Baseline(lambda: (), value)


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
    if kind not in ("exact", "first_order", "cosine", "loss_difference", "negative_loss"):
        raise ValueError(
            f"coefficient={kind!r}; choose exact, first_order, cosine, loss_difference or "
            "negative_loss"
        )
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
            h = _cosine(slope, jax.tree.map(jnp.subtract, first.fast, last.fast))
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


def _cosine(a: PyTree, b: PyTree) -> Array:
    size = global_norm(a) * global_norm(b)
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    dot = sum(jax.tree.leaves(products), jnp.zeros((), size.dtype))
    return jnp.where(size > 0, dot / jnp.where(size > 0, size, 1), 0)
