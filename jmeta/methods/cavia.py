"""CAVIA: adapt a small context vector, keep the network; both are meta-learned jointly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jmeta.core import estimators
from jmeta.core.types import Array, Key, MetaGradient, Problem, PyTree


def learned_context(
    loss: Callable[[PyTree, Array, PyTree, Key], tuple[Array, PyTree]],
    size: int,
    optimizer: optax.GradientTransformation,
) -> Problem:
    """The problem of CAVIA: the fast weights are a context that starts at zero.

    Args:
        loss: ``(params, context, batch, key) -> (loss, aux)``.
        size: number of context parameters.
        optimizer: the inner optimizer.

    Returns:
        A ``Problem`` for meta = params.

    Example:
        >>> problem = learned_context(lambda p, c, batch, key: (p, {}), 2, optax.sgd(1.0))
        >>> problem.init(1.0, None).tolist()
        [0.0, 0.0]
    """

    def whole(fast: Array, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return loss(meta, fast, batch, key)

    return Problem(whole, whole, lambda meta: optimizer, init=lambda meta, key: jnp.zeros(size))


def cavia(
    loss: Callable[[PyTree, Array, PyTree, Key], tuple[Array, PyTree]],
    *,
    steps: int,
    size: int,
    optimizer: optax.GradientTransformation,
    **options: Any,
) -> MetaGradient:
    r"""Fast context adaptation via meta-learning, exactly differentiated.

    .. math:: \nabla_\phi L_{query}(\phi, c_T), \qquad
        c_{t+1} = c_t - \alpha \nabla_c L_{support}(\phi, c_t), \qquad c_0 = 0

    Args:
        loss: ``(params, context, batch, key) -> (loss, aux)``.
        steps: number of inner steps.
        size: number of context parameters.
        optimizer: the inner optimizer.
        **options: of ``jmeta.mixed_mode``.

    Returns:
        A ``MetaGradient`` for meta = params.

    Example:
        >>> from jmeta.core.types import Episode
        >>> mg = cavia(lambda p, c, x, key: (0.5 * (p + c[0] - x) ** 2, {}), steps=1, size=1,
        ...            optimizer=optax.sgd(0.5))
        >>> float(mg.estimate(4.0, (), Episode(0.0, 0.0), None)[0])  # (4 - 2) * (1 - 0.5)
        1.0

    Source: Zintgraf et al., "Fast Context Adaptation via Meta-Learning" (2019), equations 2-4.
    """
    return estimators.mixed_mode(learned_context(loss, size, optimizer), steps, **options)
