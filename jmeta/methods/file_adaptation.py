"""TSSA: a model of source code that takes a few steps on the file at hand before it predicts.

What is meta-learned is where those steps start from.
"""

from __future__ import annotations

from typing import Any

import optax

from jmeta.core import estimators
from jmeta.core.types import MetaGradient
from jmeta.methods.maml import TaskLoss, learned_start


def tssa(
    loss: TaskLoss, *, steps: int, optimizer: optax.GradientTransformation, **options: Any
) -> MetaGradient:
    r"""Targeted support set adaptation, with exact second-order gradients.

    .. math:: \min_\phi \; CE(x_{hole} \mid context; \theta_k), \qquad
        \theta_{i+1} = \theta_i - \alpha \nabla CE(w_i; \theta_i), \qquad \theta_0 = \phi

    for support windows :math:`w_1 \dots w_k` of the file that the hole is in.
    ``jmeta.tasks.files.holes`` draws such tasks.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``, a language model's, of ``tokens`` and
            ``weights``: all tokens of a support window weigh, and of the query the hole alone.
        steps: number of inner steps, at most the number of support windows.
        optimizer: the inner optimizer, ``optax.sgd(...)`` in the paper.
        **options: of ``jmeta.mixed_mode``.

    Returns:
        A ``MetaGradient`` for meta = params; its episodes' support is ``Steps``, one window each.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.core.types import Episode, Steps
        >>> mean = lambda p, batch, key: ((batch["weights"] * (p - batch["tokens"]) ** 2).sum(), {})
        >>> one = {"tokens": jnp.zeros(1), "weights": jnp.ones(1)}
        >>> windows = Steps({"tokens": jnp.zeros((2, 1)), "weights": jnp.ones((2, 1))})
        >>> mg = tssa(mean, steps=2, optimizer=optax.sgd(0.25))
        >>> float(mg.estimate(4.0, (), Episode(windows, one), None)[0])  # 2 * (4 / 4) * (1 / 4)
        0.5

    Source: Shrivastava et al., "On-the-Fly Adaptation of Source Code Models using Meta-Learning"
    (2020), section 3.
    """
    return estimators.mixed_mode(learned_start(loss, optimizer), steps, **options)


def first_order_tssa(
    loss: TaskLoss, *, steps: int, optimizer: optax.GradientTransformation, **options: Any
) -> MetaGradient:
    r"""Targeted support set adaptation as published: the hole's gradient at the adapted weights.

    .. math:: \nabla_{\theta_k} CE(x_{hole} \mid context; \theta_k)

    Args:
        loss: as in ``tssa``.
        steps: number of inner steps.
        optimizer: the inner optimizer.
        **options: of ``jmeta.first_order``.

    Returns:
        A ``MetaGradient`` for meta = params.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.core.types import Episode, Steps
        >>> mean = lambda p, batch, key: ((batch["weights"] * (p - batch["tokens"]) ** 2).sum(), {})
        >>> one = {"tokens": jnp.zeros(1), "weights": jnp.ones(1)}
        >>> windows = Steps({"tokens": jnp.zeros((2, 1)), "weights": jnp.ones((2, 1))})
        >>> mg = first_order_tssa(mean, steps=2, optimizer=optax.sgd(0.25))
        >>> float(mg.estimate(4.0, (), Episode(windows, one), None)[0])  # 2 * (4 / 4)
        2.0

    Source: Shrivastava et al. (2020), section 3.
    """
    return estimators.first_order(learned_start(loss, optimizer), steps, **options)
