"""The student of a teacher: what it learns from, how it is scored, and how it lives on.

Every micro-batch of an outer step unrolls from the same student, which then moves once for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core.autodiff import GradTransform, mixed_mode_grad, reverse_grad, stopped_grad
from jmeta.core.inner import InnerState, fold, inner_loop
from jmeta.core.over_tasks import over_tasks
from jmeta.core.types import Array, Episode, Info, Key, LossFn, MetaGradient, Problem, PyTree
from jmeta.methods.maml import TaskLoss


class Student(NamedTuple):
    """What is pre-trained on pseudo-examples, and how it is scored.

    Attributes:
        loss: ``(params, batch, key) -> (loss, aux)``: one loss for pseudo-examples and labelled
            ones. In a text batch ``tokens`` and ``labels`` are ids or distributions over them, and
            ``weights`` say how much each label counts; the loss is normalised by their sum.
        start: ``key -> params``: a new student.
        optimizer: what moves it on pseudo-examples; any optax optimizer that stays differentiable
            (``jmeta.optim``), clipping and schedule included, but none that asks for the loss: the
            student moves along a mean of gradients.
        support_optimizer: what moves it on labelled support data.
        support_steps: how many such steps; 0 scores it as it is.
    """

    loss: TaskLoss
    start: Callable[[Any], PyTree]
    optimizer: optax.GradientTransformation
    support_optimizer: optax.GradientTransformation = optax.sgd(0.1)
    support_steps: int = 1


class TeacherState(NamedTuple):
    """What a teacher's estimator keeps from one outer step to the next.

    Attributes:
        student: the student, its optimizer's state and the number of its steps.
        baseline: the state of the baseline of a hard teacher; ``()`` otherwise.
    """

    student: InnerState
    baseline: PyTree = ()


class _Recorded(NamedTuple):
    inner: PyTree
    grads: PyTree  # [steps, ...]
    taken: Array


def direct_grad(loss: LossFn) -> Any:
    r"""First order in the student: an inner gradient depends on meta and batch, not on the weights.

    .. math:: \nabla_\theta L(\mathrm{sg}[\theta], \phi)

    ``stopped_grad`` would cut the path from the pseudo-examples to the student too, and with it
    all that a teacher learns from. No Hessian of the student is left, so the steps after a
    pseudo-example count as if they were none.

    Args:
        loss: ``(fast, meta, batch, key) -> (loss, aux)``.

    Returns:
        ``(fast, meta, batch, key) -> (loss, aux, grads)``.

    Example:
        >>> loss = lambda fast, meta, batch, key: (meta * fast**3, {})
        >>> gradient = lambda x, m: direct_grad(loss)(x, m, None, None)[2]
        >>> [float(d) for d in jax.grad(gradient, argnums=(0, 1))(2.0, 5.0)]
        [0.0, 12.0]
    """
    exact = reverse_grad(loss)
    return lambda fast, meta, batch, key: exact(jax.lax.stop_gradient(fast), meta, batch, key)


def fine_tuned(student: Student, grad: GradTransform = mixed_mode_grad) -> LossFn:
    r"""The outer loss of a teacher: fine-tune on support data, score on the query.

    .. math:: \frac1N \sum_{i=1}^N L\left(\theta - \eta \nabla L(\theta; \mathrm{support}_i);
        \mathrm{query}_i\right)

    Nothing in it is random: the student is scored without dropout.

    Args:
        student: its loss, support optimizer and steps.
        grad: how the support gradients are differentiated; ``direct_grad`` counts as first order.

    Returns:
        ``(fast, meta, episodes, key) -> (loss, aux)``, where ``episodes`` is an ``Episode`` of
        labelled batches with a leading task axis, ``[tasks, examples, ...]``.

    Raises:
        TypeError: when traced, if the query of a teacher's episode is no such ``Episode``.

    Example:
        >>> learner = Student(lambda w, x, key: ((w - x) ** 2, {}), None, None, optax.sgd(0.25))
        >>> tasks = Episode(jnp.zeros(2), jnp.array([0.0, 1.0]))
        >>> float(fine_tuned(learner)(jnp.asarray(4.0), (), tasks, None)[0])  # of 4 and of 1
        2.5
    """

    def loss(fast: PyTree, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return student.loss(fast, batch, key)

    problem = Problem(loss, loss, lambda meta: student.support_optimizer)
    chosen = stopped_grad if grad is direct_grad else grad
    run = inner_loop(problem, student.support_steps, grad=chosen)

    def score(fast: PyTree, meta: PyTree, episodes: Episode, key: Key) -> tuple[Array, PyTree]:
        if not isinstance(episodes, Episode):
            raise TypeError(
                "the query of a teacher's episode is itself an Episode of labelled batches, "
                "Episode(unlabelled, Episode(support, query)), with a leading axis of tasks; found "
                f"{type(episodes).__name__}"
            )
        first = InnerState(fast, student.support_optimizer.init(fast), jnp.zeros((), jnp.int32))

        def one(episode: Episode) -> tuple[Array, PyTree]:
            value, (_, losses, aux) = run((), first, episode, None)
            return value, {**aux, "support_loss": losses[0]} if losses.size else aux

        values, aux = _mapped(one, episodes)
        return jnp.mean(values), jax.tree.map(lambda a: jnp.mean(a, axis=0), aux)

    return score


def recording(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """An optimizer that keeps the gradients of its steps, for the student to follow afterwards."""

    def init(params: PyTree) -> _Recorded:
        room = jax.tree.map(lambda p: jnp.zeros((steps, *p.shape), p.dtype), params)
        return _Recorded(optimizer.init(params), room, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        kept = jax.tree.map(
            lambda room, g: room.at[state.taken].set(jax.lax.stop_gradient(g)),
            state.grads,
            updates,
        )
        updates, inner = optimizer.update(updates, state.inner, params)
        return updates, _Recorded(inner, kept, state.taken + 1)

    return optax.GradientTransformation(init, update)


def record_from(
    optimizer: optax.GradientTransformation, student: InnerState, steps: int
) -> InnerState:
    """The student at the start of an unroll under ``recording``."""
    empty: Any = recording(optimizer, steps).init(student.fast)
    return student._replace(opt_state=empty._replace(inner=student.opt_state))


def recorded(state: InnerState) -> PyTree:
    """The gradients of an unroll under ``recording``, ``[steps, ...]``."""
    return state.opt_state.grads


def born(student: Student, key: Key) -> InnerState:
    """A new student, with a fresh state of its optimizer."""
    fast = jax.tree.map(jnp.asarray, student.start(key))
    return InnerState(fast, student.optimizer.init(fast), jnp.zeros((), jnp.int32))


def moved(student: Student, state: InnerState, grads: PyTree) -> InnerState:
    """The student after real steps along gradients ``[steps, ...]``, one after the other."""

    def step(state: InnerState, grads: PyTree) -> tuple[InnerState, None]:
        updates, opt_state = student.optimizer.update(grads, state.opt_state, state.fast)
        fast = optax.apply_updates(state.fast, updates)
        return InnerState(fast, opt_state, state.step + 1), None

    if jax.tree.leaves(grads)[0].shape[0] == 1:
        return step(state, jax.tree.map(lambda g: g[0], grads))[0]
    return jax.lax.scan(step, state, grads)[0]


def over_microbatches(
    one: Callable[[Any, Key], tuple[PyTree, PyTree, Info]],
    like: PyTree,
    episodes: Any,
    key: Key,
    microbatch: int | None,
) -> tuple[PyTree, PyTree, Info]:
    """The mean of gradients over micro-batches, all at once or a few at a time.

    Args:
        one: ``(episode, key) -> (grads, outputs, info)``.
        like: a tree of the structure, shapes and dtypes of ``grads``.
        episodes: with a leading axis of micro-batches.
        key: a random key, or None.
        microbatch: how many are mapped together; None: all.

    Returns:
        The mean gradients, the outputs of each micro-batch ``[microbatches, ...]``, and the mean
        of the infos.
    """
    if microbatch is None and {x.shape[:1] for x in jax.tree.leaves(episodes)} == {(1,)}:
        # Without a mapped axis of length one, which makes batched products of plain ones.
        single = jax.tree.map(lambda x: x[0], episodes)
        grads, outputs, info = one(single, fold(key, 0))
        return grads, jax.tree.map(lambda x: x[None], outputs), info

    def estimate(_: PyTree, state: PyTree, episode: Any, key: Key):
        del state
        return one(episode, key)

    mean = over_tasks(MetaGradient(lambda meta, key: (), estimate), microbatch=microbatch)
    return mean.estimate(like, (), episodes, key)


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """``vmap`` over the leading axis, and a plain call where it has length one."""
    if {jnp.shape(x)[:1] for x in jax.tree.leaves(tree)} != {(1,)}:
        return jax.vmap(function)(tree)
    single = function(jax.tree.map(lambda x: x[0], tree))
    return jax.tree.map(lambda x: x[None], single)
