"""Students that restart or take turns, so that a teacher does not learn to teach one alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.inner import fold
from jmeta.core.types import Array, Episode, Key, MetaGradient, PyTree


def restarting(mg: MetaGradient, every: int) -> MetaGradient:
    """Begin anew with a student every so many outer steps, so that no one is overfitted.

    Args:
        mg: an estimator with a state, such as ``soft_teacher(...)``.
        every: outer steps of a student's life.

    Returns:
        A ``MetaGradient`` with the state ``(state of mg, its age)``.

    Raises:
        ValueError: a life of no steps; when called, no random key.

    Example:
        >>> import optax
        >>> from jmeta.methods.students import Student, TeacherState, born
        >>> learner = Student(None, lambda key: jnp.zeros(2), optax.sgd(0.1))
        >>> mg = MetaGradient(lambda meta, key: TeacherState(born(learner, key)), None)
        >>> state, age = restarting(mg, every=100).init((), None)
        >>> int(age)
        0
    """
    if every < 1:
        raise ValueError(f"a student cannot restart every {every} steps")

    def init(meta: PyTree, key: Key) -> tuple[PyTree, Array]:
        return mg.init(meta, key), jnp.zeros((), jnp.int32)

    def estimate(meta: PyTree, state: tuple[PyTree, Array], episode: Episode, key: Key):
        if key is None:
            raise ValueError("restarting draws new students; pass a jax.random.key")
        start_key, key = jax.random.split(key)
        kept, age = state
        over = age >= every
        kept = jax.lax.cond(over, lambda: mg.init(meta, start_key), lambda: kept)
        grads, kept, info = mg.estimate(meta, kept, episode, key)
        return grads, (kept, jnp.where(over, 1, age + 1).astype(jnp.int32)), info

    return MetaGradient(init, estimate)


def population(mg: MetaGradient, size: int) -> MetaGradient:
    """Several students in turn: each outer step teaches one of them, drawn at random.

    A step costs as much as with one student. To teach all of them at every step, each with
    episodes of its own, wrap the estimator in ``jmeta.over_tasks(mg, tasks=size)`` instead.

    Args:
        mg: an estimator with a state, such as ``restarting(soft_teacher(...), every=1000)``.
        size: how many students.

    Returns:
        A ``MetaGradient`` whose state has a leading axis of students.

    Raises:
        ValueError: no student; when called, no random key.

    Example:
        >>> import optax
        >>> from jmeta.methods.students import Student, TeacherState, born
        >>> learner = Student(None, lambda key: jnp.zeros(2), optax.sgd(0.1))
        >>> mg = MetaGradient(lambda meta, key: TeacherState(born(learner, key)), None)
        >>> population(mg, size=3).init((), jax.random.key(0)).student.fast.shape
        (3, 2)
    """
    if size < 1:
        raise ValueError(f"a population of {size} students cannot learn")

    def init(meta: PyTree, key: Key) -> PyTree:
        return jax.vmap(lambda i: mg.init(meta, fold(_drawing(key), i)))(jnp.arange(size))

    def estimate(meta: PyTree, states: PyTree, episode: Episode, key: Key):
        which_key, key = jax.random.split(_drawing(key))
        which = jax.random.randint(which_key, (), 0, size)
        state = jax.tree.map(lambda x: x[which], states)
        grads, state, info = mg.estimate(meta, state, episode, key)
        states = jax.tree.map(lambda x, new: x.at[which].set(new), states, state)
        return grads, states, info

    return MetaGradient(init, estimate)


def _drawing(key: Key) -> Array:
    if key is None:
        raise ValueError("a population draws its students; pass a jax.random.key")
    return key
