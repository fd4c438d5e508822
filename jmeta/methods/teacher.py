"""A teacher that writes what a student is pre-trained on, differentiated through the student.

Soft: what the teacher writes is a distribution, and its gradient is exact through both steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import GradTransform, mixed_mode_grad
from jmeta.core.estimators.unrolled import unrolled
from jmeta.core.inner import keys
from jmeta.core.steps import Remat
from jmeta.core.tree import global_norm
from jmeta.core.types import Array, Episode, Info, Key, MetaGradient, Problem, PyTree
from jmeta.methods.relaxations import Relaxation, expected, of_heads
from jmeta.methods.rewriting import Batch, Rewriting
from jmeta.methods.students import (
    Student,
    TeacherState,
    born,
    fine_tuned,
    moved,
    over_microbatches,
    record_from,
    recorded,
    recording,
)

Auxiliary: TypeAlias = Callable[[PyTree, Episode, Key], tuple[Array, PyTree]]


def pre_training(
    student: Student,
    rewriting: Rewriting,
    relax: Relaxation = expected,
    *,
    grad: GradTransform = mixed_mode_grad,
) -> Problem:
    r"""The problem of a teacher: meta writes the inner batch, labelled tasks score the student.

    .. math::
        \theta_1 = \theta_0 + \mathrm{optimizer}\left(\nabla_{\theta_0}
            L(\theta_0; T_\phi(x_u))\right), \qquad
        \min_\phi L_{query}\left(\theta_1 - \eta \nabla_{\theta_1} L_{support}(\theta_1)\right)

    For the estimators of ``jmeta``, one episode at a time: ``Episode(unlabelled batch,
    Episode(support, query))``. The teacher runs once for each unlabelled batch, in ``encode``.

    Args:
        student: what is pre-trained.
        rewriting: what the teacher writes.
        relax: how its scores become something to write: ``expected``, ``straight_through``,
            ``gumbel_softmax(...)``.
        grad: how the support steps are differentiated.

    Returns:
        A ``Problem`` for meta = the teacher's parameters; its fast weights are the student's.

    Example:
        >>> import optax
        >>> from jmeta.methods.rewriting import class_labels
        >>> learner = Student(None, lambda key: jnp.zeros(2), optax.sgd(0.1))
        >>> problem = pre_training(learner, class_labels(lambda meta, batch, key: meta))
        >>> problem.encode(jnp.zeros((1, 2)), {"x": jnp.ones(1)}, None)["labels"].tolist()
        [[0.5, 0.5]]
    """

    def inner(fast: PyTree, meta: PyTree, batch: Batch, key: Key) -> tuple[Array, PyTree]:
        return student.loss(fast, batch, key)

    def encode(meta: PyTree, batch: Batch | Episode, key: Key) -> Batch | Episode:
        if isinstance(batch, Episode):  # the labelled data: as they are
            return batch
        scores = rewriting.scores(meta, batch, None)  # a teacher writes without dropout
        return rewriting.write(of_heads(relax, scores, key), batch)

    return Problem(
        inner,
        fine_tuned(student, grad),
        lambda meta: student.optimizer,
        init=lambda meta, key: student.start(key),
        encode=encode,
    )


def soft_teacher(
    student: Student,
    rewriting: Rewriting,
    *,
    steps: int = 1,
    relax: Relaxation = expected,
    auxiliary: Auxiliary | None = None,
    meta_weight: float = 1.0,
    grad: GradTransform = mixed_mode_grad,
    remat: Remat = "none",
    microbatch: int | None = None,
) -> MetaGradient:
    r"""The exact meta-gradient of a teacher whose writing is differentiable, and its student.

    .. math:: \hat g = \frac1N \sum_{i=1}^N \lambda \frac{d}{d\phi} L_{query}\left(
        \theta_2(\theta_1(T_\phi(x_i)))\right) + \nabla_\phi L_{aux}(x_i; \phi)

    Each of the N micro-batches of an outer step unrolls from the same student; the student then
    takes its own steps along the mean of their pseudo gradients (at the first step, their gradient
    at the student itself: gradient accumulation), and lives on in the state.

    Look at one batch of a text teacher's episodes with ``check_teacher`` before the first step: it
    refuses tasks without a label, texts longer than the models, and tokens and labels outside the
    vocabulary, which a jitted step cannot see: it would read another entry for them, silently.

    Args:
        student: what is pre-trained.
        rewriting: ``inputs_and_labels``, ``inputs_only``, ``replacements``, ``masks_only`` or
            ``class_labels`` of the teacher's network.
        steps: steps on pseudo-examples in one unroll. With several, an episode's support is
            ``jmeta.Steps`` of as many unlabelled batches, or one batch for all.
        relax: ``expected`` (soft labels), ``straight_through`` or ``gumbel_softmax(...)``.
        auxiliary: ``(meta, episode, key) -> (loss, metrics)``, such as ``mlm_auxiliary(...)``.
        meta_weight: :math:`\lambda`.
        grad: ``mixed_mode_grad`` or ``reverse_grad``, both exact; ``direct_grad``: first order.
        remat: what the backward pass through the pseudo-steps recomputes.
        microbatch: how many micro-batches are mapped together; None: all.

    Returns:
        A ``MetaGradient`` for meta = the teacher's parameters, with a ``TeacherState``. Its
        episodes have a leading axis of micro-batches: ``Episode(unlabelled [N, ...],
        Episode(support [N, tasks, ...], query [N, tasks, ...]))``. ``Info.diagnostics``:
        ``meta_norm`` (of the unweighted meta-gradient), and with auxiliary losses
        ``auxiliary_loss``, ``auxiliary_norm`` and ``cosine`` between the two gradients.

    Example:
        >>> import optax
        >>> from jmeta.methods.rewriting import class_labels
        >>> def loss(w, batch, key):  # a linear student that learns from soft labels
        ...     gap = batch["x"] * w - batch["labels"][..., 1].astype(float)
        ...     return jnp.mean(gap**2), {}
        >>> student = Student(loss, lambda key: jnp.zeros(()), optax.sgd(0.25), support_steps=0)
        >>> mg = soft_teacher(student, class_labels(lambda meta, batch, key: meta))
        >>> query = {"x": jnp.ones((1, 1, 1)), "labels": jnp.asarray([[[[0.0, 1.0]]]])}
        >>> episodes = Episode({"x": jnp.ones((1, 1))}, Episode(None, query))
        >>> meta = jnp.zeros((1, 2))
        >>> grads, state, info = mg.estimate(meta, mg.init(meta, None), episodes, None)
        >>> state.student.fast.tolist(), grads.tolist()  # follows 1/2 halfway; more of class 1
        (0.25, [[0.1875, -0.1875]])

    Source: Shen, "Meta-Learned Language Modelling Objective" (2021); mixed mode as in Kemaev et
    al. (2025).
    """
    problem = pre_training(student, rewriting, relax, grad=grad)
    problem = problem._replace(optimizer=lambda meta: recording(student.optimizer, steps))
    mg = unrolled(problem, steps, persistent=True, remat=remat, grad=grad)

    def init(meta: PyTree, key: Key) -> TeacherState:
        return TeacherState(born(student, key))

    def estimate(meta: PyTree, state: TeacherState, episodes: Episode, key: Key):
        require_episodes(episodes)
        first = record_from(student.optimizer, state.student, steps)

        def one(episode: Episode, key: Key):
            unroll_key, auxiliary_key = keys(key, 2)
            grads, last, info = mg.estimate(meta, first, episode, unroll_key)
            helped, metrics = auxiliary_gradient(auxiliary, meta, episode, auxiliary_key)
            info = info._replace(diagnostics=info.diagnostics | metrics)
            return (grads, helped, recorded(last)), (), info

        like = (meta, None if auxiliary is None else meta, first.opt_state.grads)
        gradients, _, info = over_microbatches(one, like, episodes, key, microbatch)
        grads, helped, pseudo = gradients
        after = state._replace(student=moved(student, state.student, pseudo))
        return (*joined(grads, helped, meta_weight, after, info),)

    return MetaGradient(init, estimate)


def auxiliary_gradient(
    auxiliary: Auxiliary | None, meta: PyTree, episode: Episode, key: Key
) -> tuple[PyTree, dict[str, Array]]:
    """The gradient of the auxiliary loss and its value; None and nothing where there is none."""
    if auxiliary is None:
        return None, {}
    (loss, _), grads = jax.value_and_grad(auxiliary, has_aux=True)(meta, episode, key)
    return grads, {"auxiliary_loss": loss}


def joined(
    grads: PyTree, helped: PyTree | None, weight: float, state: TeacherState, info: Info
) -> tuple[PyTree, TeacherState, Info]:
    """The weighted sum of meta-gradient and auxiliary gradient, and how they lie to each other."""
    numbers: dict[str, Array] = {**info.diagnostics, "meta_norm": global_norm(grads)}
    total = jax.tree.map(lambda g: weight * g, grads)
    if helped is not None:
        numbers |= {"auxiliary_norm": global_norm(helped), "cosine": cosine(grads, helped)}
        total = jax.tree.map(jnp.add, total, helped)
    return total, state, info._replace(grad_norm=global_norm(total), diagnostics=numbers)


def cosine(a: PyTree, b: PyTree) -> Array:
    """The cosine between two trees of one structure; 0 where one of them is zero."""
    size = global_norm(a) * global_norm(b)
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    dot = sum(jax.tree.leaves(products), jnp.zeros((), size.dtype))
    return jnp.where(size > 0, dot / jnp.where(size > 0, size, 1), 0)


def require_episodes(episodes: Episode) -> None:
    """Refuse data that are no teacher's episodes, while the estimate is traced.

    Raises:
        TypeError: the query is no ``Episode`` of labelled data.
        ValueError: no common leading axis of micro-batches; a labelled batch has no labels.
    """
    labelled = episodes.query
    if not isinstance(labelled, Episode):
        raise TypeError(
            "a teacher's episode is Episode(unlabelled, Episode(support, query)); its query is "
            f"{'missing' if labelled is None else 'a ' + type(labelled).__name__}"
        )
    leading = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(episodes)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            "every leaf of a teacher's episodes needs the same leading axis of micro-batches; "
            f"found leading axes {sorted(leading)}"
        )
    for name, batch in (("support", labelled.support), ("query", labelled.query)):
        if isinstance(batch, dict) and "tokens" in batch and "labels" not in batch:
            raise ValueError(f"the labelled {name} has no labels, only {sorted(batch)}")
