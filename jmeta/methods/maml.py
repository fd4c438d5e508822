"""MAML, first-order MAML and Reptile: meta-learn where the inner loop starts.

Each preset is a problem and an estimator; ``learned_start`` is the problem they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import optax

from jmeta.core import estimators
from jmeta.core.types import Array, Key, MetaGradient, Problem, PyTree

TaskLoss: TypeAlias = Callable[[PyTree, PyTree, Key], tuple[Array, PyTree]]


def learned_start(
    loss: TaskLoss, optimizer: optax.GradientTransformation, outer_loss: TaskLoss | None = None
) -> Problem:
    r"""The problem of a learned initialisation: meta is where the fast weights start.

    .. math:: \min_\phi \; L_{query}(\theta_T), \qquad \theta_0 = \phi

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``, used inside and outside.
        optimizer: the inner optimizer, such as ``optax.sgd(0.1)``.
        outer_loss: another loss for the query.

    Returns:
        A ``Problem``.

    Example:
        >>> problem = learned_start(lambda p, batch, key: (p**2, {}), optax.sgd(0.1))
        >>> problem.inner_loss(3.0, None, None, None)[0]
        9.0
    """

    def inner(fast: PyTree, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return loss(fast, batch, key)

    def outer(fast: PyTree, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return (outer_loss or loss)(fast, batch, key)

    return Problem(inner, inner if outer_loss is None else outer, lambda meta: optimizer)


def plain_gradient(loss: TaskLoss) -> MetaGradient:
    r"""The gradient of the query's loss, with no inner loop before it.

    .. math:: \nabla_\phi L_{query}(\phi)

    What pre-training, joint training on all tasks and fine-tuning follow: the baselines of
    meta-learning, by the same trainer.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.

    Returns:
        A ``MetaGradient`` for meta = params; an episode's support is not read.

    Example:
        >>> from jmeta.core.types import Episode
        >>> mg = plain_gradient(lambda p, x, key: ((p - x) ** 2, {}))
        >>> float(mg.estimate(3.0, (), Episode(None, 1.0), None)[0])
        4.0
    """
    return estimators.first_order(learned_start(loss, optax.identity()), 0)


def maml(
    loss: TaskLoss, *, steps: int, optimizer: optax.GradientTransformation, **options: Any
) -> MetaGradient:
    r"""Model-agnostic meta-learning with exact second-order gradients.

    .. math:: \nabla_\phi L_{query}\left(\phi - \alpha \sum_t \nabla L_{support}(\theta_t)\right)

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        steps: number of inner steps.
        optimizer: the inner optimizer.
        **options: of ``jmeta.mixed_mode``.

    Returns:
        A ``MetaGradient`` for meta = params.

    Example:
        >>> mg = maml(lambda p, x, key: ((p - x) ** 2, {}), steps=1, optimizer=optax.sgd(0.25))
        >>> from jmeta.core.types import Episode
        >>> float(mg.estimate(4.0, (), Episode(0.0, 0.0), None)[0])  # 2 * (4 / 2) * (1 / 2)
        2.0

    Source: Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (2017),
    equation 1; computed as in Kemaev et al. (2025).
    """
    return estimators.mixed_mode(learned_start(loss, optimizer), steps, **options)


def fomaml(
    loss: TaskLoss, *, steps: int, optimizer: optax.GradientTransformation, **options: Any
) -> MetaGradient:
    r"""First-order MAML: the query gradient at the adapted weights.

    .. math:: \nabla_{\theta_T} L_{query}(\theta_T)

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        steps: number of inner steps.
        optimizer: the inner optimizer.
        **options: of ``jmeta.first_order``.

    Returns:
        A ``MetaGradient`` for meta = params.

    Example:
        >>> mg = fomaml(lambda p, x, key: ((p - x) ** 2, {}), steps=1, optimizer=optax.sgd(0.25))
        >>> from jmeta.core.types import Episode
        >>> float(mg.estimate(4.0, (), Episode(0.0, 0.0), None)[0])  # 2 * (4 / 2)
        4.0

    Source: Finn et al. (2017), section 5.2.
    """
    return estimators.first_order(learned_start(loss, optimizer), steps, **options)


def reptile(loss: TaskLoss, *, steps: int, optimizer: optax.GradientTransformation) -> MetaGradient:
    r"""Reptile: move the start towards where the inner loop ends.

    .. math:: \hat g = \phi - \theta_T

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        steps: number of inner steps.
        optimizer: the inner optimizer.

    Returns:
        A ``MetaGradient`` for meta = params; follow it with ``optax.sgd(epsilon)``.

    Example:
        >>> mg = reptile(lambda p, x, key: ((p - x) ** 2, {}), steps=1, optimizer=optax.sgd(0.25))
        >>> from jmeta.core.types import Episode
        >>> float(mg.estimate(4.0, (), Episode(0.0), None)[0])
        2.0

    Source: Nichol et al., "On First-Order Meta-Learning Algorithms" (2018), algorithm 1.
    """
    return estimators.reptile(learned_start(loss, optimizer), steps)
