"""MAML++: multi-step loss, per-layer-per-step learning rates, derivative-order annealing."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax

from jmeta.core import estimators
from jmeta.core.inner import multi_step
from jmeta.core.optim import init_rates, per_step
from jmeta.core.types import MetaGradient, Problem, PyTree
from jmeta.methods.maml import TaskLoss, learned_start


def per_step_rates(loss: TaskLoss) -> Problem:
    """The problem of MAML++: ``{"start": params, "rates": a rate for each leaf and step}``.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.

    Returns:
        A ``Problem``.

    Example:
        >>> problem = per_step_rates(lambda p, batch, key: (p**2, {}))
        >>> problem.init({"start": 1.0, "rates": jnp.ones(3)}, None)
        1.0
    """
    start = learned_start(loss, optax.identity())
    return start._replace(
        optimizer=lambda meta: per_step(meta["rates"]),
        init=lambda meta, key: meta["start"],
    )


def maml_plus_plus_init(
    params: PyTree,
    rate: float,
    steps: int,
    per: Literal["leaf", "layer", "element"] = "leaf",
    *,
    stacked: str = "**",
) -> PyTree:
    """Meta-parameters for ``maml_plus_plus``.

    Args:
        params: the initial parameters.
        rate: the initial learning rate.
        steps: number of inner steps.
        per: ``"leaf"``; ``"layer"`` where layers are stacked on a leading axis; ``"element"``.
        stacked: for ``"layer"``, the path glob of the leaves that stack their layers, such as
            ``"blocks.**"`` for jmeta's transformers; the others get one rate each. By default all
            of them.

    Returns:
        ``{"start": params, "rates": rates}``, every rate with a leading ``[steps]`` axis.

    Raises:
        ValueError: a glob that matches no leaf.

    Example:
        >>> maml_plus_plus_init({"w": jnp.zeros(2)}, 0.5, steps=3)["rates"]
        {'w': Array([0.5, 0.5, 0.5], dtype=float32)}
    """
    rates = init_rates(params, rate, steps=steps, per=per, stacked=stacked)
    return {"start": params, "rates": rates}


def step_weights(steps: int, progress: float) -> jnp.ndarray:
    r"""The annealed weights of the multi-step loss: uniform at first, then the last step alone.

    Args:
        steps: number of inner steps ``T``.
        progress: 0 at the beginning of the annealing, 1 at its end.

    Returns:
        ``[steps]``, summing to one: :math:`(1 - p) / T` each, and the rest on the last.

    Example:
        >>> step_weights(4, 0.0).tolist(), step_weights(4, 1.0).tolist()
        ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0])
    """
    weights = jnp.full((steps,), (1.0 - min(max(progress, 0.0), 1.0)) / steps)
    return weights.at[-1].add(1.0 - jnp.sum(weights))


def maml_plus_plus(
    loss: TaskLoss, *, steps: int, progress: float = 0.0, second_order: bool = True, **options: Any
) -> MetaGradient:
    r"""MAML++ at one point of its schedules.

    .. math:: \nabla_{(\theta_0, \alpha)} \sum_{t=1}^{T} w_t \, L_{query}(\theta_t), \qquad
        \theta^{(l)}_{t+1} = \theta^{(l)}_t - \alpha^{(l)}_t \nabla^{(l)} L_{support}(\theta_t)

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        steps: number of inner steps.
        progress: of the multi-step loss's annealing, from 0 to 1.
        second_order: False for the first phase of derivative-order annealing.
        **options: of ``jmeta.mixed_mode`` or ``jmeta.first_order``.

    Returns:
        A ``MetaGradient`` for meta = ``maml_plus_plus_init(params, rate, steps)``; one for each
        phase goes into ``annealed``.

    Example:
        >>> from jmeta.core.types import Episode
        >>> mg = maml_plus_plus(lambda p, x, key: (0.5 * (p - x) ** 2, {}), steps=1)
        >>> meta = {"start": jnp.asarray(4.0), "rates": jnp.asarray([0.5])}
        >>> float(mg.estimate(meta, (), Episode(0.0, 0.0), None)[0]["start"])
        1.0

    Source: Antoniou et al., "How to train your MAML" (2019), sections 4.1, 4.2 and 4.4.
    """
    estimator = estimators.mixed_mode if second_order else estimators.first_order
    objective = multi_step(step_weights(steps, progress))
    return estimator(per_step_rates(loss), steps, objective=objective, **options)


def annealed(
    loss: TaskLoss,
    *,
    steps: int,
    first_order_until: int,
    multi_step_until: int,
    phases: int = 5,
    **options: Any,
) -> list[tuple[int, MetaGradient]]:
    """The phases of MAML++ over outer steps, for ``jmeta.stages``.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``.
        steps: number of inner steps.
        first_order_until: outer step from which second order is used.
        multi_step_until: outer step from which the last inner step alone is scored.
        phases: in how many stages the weights are annealed; each is compiled once.
        **options: of the estimators.

    Returns:
        ``[(outer step, estimator), ...]``.

    Example:
        >>> schedule = annealed(lambda p, x, key: (p**2, {}), steps=2, first_order_until=100,
        ...                     multi_step_until=200, phases=2)
        >>> [begin for begin, _ in schedule]
        [0, 100, 200]

    Source: Antoniou et al. (2019), sections 4.1 and 4.4.
    """
    begins = {round(i * multi_step_until / phases) for i in range(phases + 1)}
    return [
        (
            begin,
            maml_plus_plus(
                loss,
                steps=steps,
                progress=begin / multi_step_until if multi_step_until else 1.0,
                second_order=begin >= first_order_until,
                **options,
            ),
        )
        for begin in sorted(begins | {first_order_until})
    ]
