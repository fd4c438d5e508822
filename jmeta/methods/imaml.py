"""iMAML: meta-learn the centre of a proximal term, by implicit differentiation."""

from __future__ import annotations

import optax

from jmeta.core import estimators
from jmeta.core.estimators.implicit import Solver
from jmeta.core.types import MetaGradient, Problem
from jmeta.methods.maml import TaskLoss, learned_start


def proximal_start(
    loss: TaskLoss, optimizer: optax.GradientTransformation, strength: float
) -> Problem:
    r"""The problem of iMAML: a learned start that the fast weights stay close to.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        optimizer: the inner optimizer.
        strength: :math:`\lambda` of the proximal term.

    Returns:
        A ``Problem`` for meta = params.

    Example:
        >>> problem = proximal_start(lambda p, batch, key: (p**2, {}), optax.sgd(0.1), 2.0)
        >>> float(problem.inner_loss(3.0, 1.0, None, None)[0])  # 9 + 4
        13.0
    """
    start = learned_start(loss, optimizer)
    return estimators.proximal(start, strength)._replace(outer_loss=start.outer_loss)


def imaml(
    loss: TaskLoss,
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    strength: float = 1.0,
    solver: Solver | None = None,
) -> MetaGradient:
    r"""Meta-learning with implicit gradients: no path is stored.

    .. math:: \left(I + \tfrac{1}{\lambda} \nabla^2 L_{support}(\theta^*)\right)^{-1}
        \nabla L_{query}(\theta^*)

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        steps: inner steps; enough to reach the optimum.
        optimizer: the inner optimizer.
        strength: :math:`\lambda`.
        solver: ``jmeta.cg(...)`` (the default, five iterations), ``neumann`` or ``identity``.

    Returns:
        A ``MetaGradient`` for meta = params.

    Example:
        >>> from jmeta.core.types import Episode
        >>> mg = imaml(lambda p, x, key: (0.5 * (p - x) ** 2, {}), steps=60,
        ...            optimizer=optax.sgd(0.25))
        >>> round(float(mg.estimate(4.0, (), Episode(0.0, 0.0), None)[0]), 4)  # 2 / (1 + 1)
        1.0

    Source: Rajeswaran et al., "Meta-Learning with Implicit Gradients" (2019), equation 6.
    """
    chosen = estimators.cg(5) if solver is None else solver
    return estimators.implicit(proximal_start(loss, optimizer, strength), steps, solver=chosen)
