"""Meta-SGD: meta-learn the start and a learning rate for every parameter."""

from __future__ import annotations

from typing import Any

import optax

from jmeta.core import estimators
from jmeta.core.optim import init_rates, learned_sgd
from jmeta.core.types import MetaGradient, Problem, PyTree
from jmeta.methods.maml import TaskLoss, learned_start


def learned_rates(loss: TaskLoss) -> Problem:
    """The problem of Meta-SGD, for meta = ``{"start": params, "rates": rates}``.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.

    Returns:
        A ``Problem``.

    Example:
        >>> problem = learned_rates(lambda p, batch, key: (p**2, {}))
        >>> problem.init({"start": 1.0, "rates": 0.1}, None)
        1.0
    """
    start = learned_start(loss, optax.identity())
    return start._replace(
        optimizer=lambda meta: learned_sgd(meta["rates"]),
        init=lambda meta, key: meta["start"],
    )


def meta_sgd_init(params: PyTree, rate: float) -> PyTree:
    """Meta-parameters for ``meta_sgd``: every parameter's rate starts at the same value.

    Args:
        params: the initial parameters.
        rate: the initial learning rate.

    Returns:
        ``{"start": params, "rates": rates}``.

    Example:
        >>> import jax
        >>> meta_sgd_init({"w": jax.numpy.zeros(2)}, 0.5)["rates"]
        {'w': Array([0.5, 0.5], dtype=float32)}
    """
    return {"start": params, "rates": init_rates(params, rate, per="element")}


def meta_sgd(loss: TaskLoss, *, steps: int = 1, **options: Any) -> MetaGradient:
    r"""Meta-SGD, exactly differentiated in the start and in every learning rate.

    .. math:: \theta_{t+1} = \theta_t - \alpha \odot \nabla L_{support}(\theta_t),
        \qquad \nabla_{(\theta_0, \alpha)} L_{query}(\theta_T)

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        steps: number of inner steps; the paper takes one.
        **options: of ``jmeta.mixed_mode``.

    Returns:
        A ``MetaGradient`` for meta = ``meta_sgd_init(params, rate)``.

    Example:
        >>> from jmeta.core.types import Episode
        >>> mg = meta_sgd(lambda p, x, key: (0.5 * (p - x) ** 2, {}))
        >>> grads = mg.estimate({"start": 4.0, "rates": 0.5}, (), Episode(0.0, 0.0), None)[0]
        >>> float(grads["start"]), float(grads["rates"])  # 2 * (1 - 0.5), -4 * 2
        (1.0, -8.0)

    Source: Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning" (2017),
    equation 2.
    """
    return estimators.mixed_mode(learned_rates(loss), steps, **options)
