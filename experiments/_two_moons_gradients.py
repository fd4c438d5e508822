"""A judge's gradient by the student's weights: how large, and whether first order points alike.

A teacher's meta-gradient is this gradient times what the teacher changes in the student.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
from experiments import two_moons
from experiments._teacher_shared import judge, student
from jmeta import methods
from jmeta.core.autodiff import reverse_grad
from jmeta.core.types import Array, Episode, PyTree
from jmeta.models import masked_lm

EXACT, FIRST = "log10 of the gradient's norm", "log10 of the first-order gradient's norm"
COSINE = "cosine of first order and exact"
OVERFLOW = 38.5  # log10 of what float32 cannot hold


def log_norm(gradient: PyTree) -> tuple[Array, Array]:
    """The decimal logarithm of a gradient's norm, whose square may overflow, and its direction."""
    flat, _ = ravel_pytree(gradient)
    tiny = jnp.finfo(flat.dtype).tiny
    top = jnp.maximum(jnp.abs(flat).max(), tiny)  # of zero, the logarithm is that of tiny
    held = jnp.isfinite(top)
    part = jnp.where(held, flat / top, 0.0)
    norm = jnp.maximum(jnp.linalg.norm(part), tiny)
    size = jnp.log10(top) + jnp.maximum(jnp.log10(norm), 0.0)  # the norm is 1 or more
    return jnp.where(held, size, OVERFLOW), part / norm


def slopes(
    given: two_moons.Config, data: data_of.Data, steps: Sequence[int]
) -> Callable[[PyTree, Episode, Array], dict[str, Array]]:
    """``(student, episode, rate) -> {EXACT, FIRST, COSINE: [steps]}``, by the student's weights."""
    shape = methods_of.network(given, data)
    learner = student(given, shape, functools.partial(masked_lm.loss, shape))

    def at(n: int, params: PyTree, episode: Episode, rate: Array) -> tuple[Array, ...]:
        judged_by = learner._replace(support_optimizer=judge(rate), support_steps=n)
        tasks = jax.tree.map(lambda leaf: leaf[None], episode)
        (exact, one), (first, other) = (
            log_norm(jax.grad(methods.fine_tuned(judged_by, grad), has_aux=True)(
                params, (), tasks, None
            )[0])
            for grad in (reverse_grad, methods.direct_grad)
        )  # fmt: skip
        return exact, first, one @ other

    def slope(params: PyTree, episode: Episode, rate: Array) -> dict[str, Array]:
        each = zip(*(at(n, params, episode, rate) for n in steps), strict=True)
        return dict(zip((EXACT, FIRST, COSINE), map(jnp.stack, each), strict=True))

    return slope
