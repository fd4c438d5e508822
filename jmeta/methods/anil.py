"""ANIL: almost no inner loop. Only the head adapts; the body is meta-learned and stays put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from jmeta.core import estimators
from jmeta.core.tree import merge, partition
from jmeta.core.types import Array, Key, MetaGradient, Problem, PyTree, no_encoding
from jmeta.methods.maml import TaskLoss


def learned_body(
    loss: TaskLoss,
    optimizer: optax.GradientTransformation,
    *,
    adapt: str | tuple[str, ...] = "head.**",
    features: Callable[[PyTree, PyTree, Key], PyTree] = no_encoding,
) -> Problem:
    r"""The problem of ANIL: a part of meta, chosen by path, starts the fast weights.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)`` with all of params, on encoded batches.
        optimizer: the inner optimizer.
        adapt: path globs of the leaves that adapt.
        features: ``(params, batch, key) -> batch``: what of the body can run once per episode
            instead of once per inner step.

    Returns:
        A ``Problem`` for meta = params.

    Example:
        >>> problem = learned_body(lambda p, x, key: (p["head"] * p["body"], {}), optax.sgd(0.1),
        ...                        adapt="head")
        >>> problem.init({"head": 1.0, "body": 2.0}, None)
        {'body': None, 'head': 1.0}
    """
    globs = (adapt,) if isinstance(adapt, str) else adapt

    def whole(fast: PyTree, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return loss(merge(fast, partition(meta, *globs)[1]), batch, key)

    return Problem(
        whole,
        whole,
        lambda meta: optimizer,
        init=lambda meta, key: partition(meta, *globs)[0],
        encode=features,
    )


def anil(
    loss: TaskLoss,
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    adapt: str | tuple[str, ...] = "head.**",
    features: Callable[[PyTree, PyTree, Key], PyTree] = no_encoding,
    **options: Any,
) -> MetaGradient:
    r"""MAML in which only a part of the network adapts, exactly differentiated.

    .. math:: \nabla_{(b, h)} L_{query}(b, h_T), \qquad
        h_{t+1} = h_t - \alpha \nabla_h L_{support}(b, h_t)

    Args:
        loss: ``(params, batch, key) -> (loss, aux)``, on encoded batches.
        steps: number of inner steps.
        optimizer: the inner optimizer.
        adapt: path globs of the leaves that adapt.
        features: what runs once per episode; its meta-gradient is exact.
        **options: of ``jmeta.mixed_mode``.

    Returns:
        A ``MetaGradient`` for meta = params.

    Example:
        >>> from jmeta.core.types import Episode
        >>> loss = lambda p, x, key: ((p["head"] * p["body"] - x) ** 2, {})
        >>> mg = anil(loss, steps=1, optimizer=optax.sgd(0.0), adapt="head")
        >>> grads = mg.estimate({"head": 1.0, "body": 2.0}, (), Episode(0.0, 0.0), None)[0]
        >>> float(grads["body"]), float(grads["head"])
        (4.0, 8.0)

    Source: Raghu et al., "Rapid Learning or Feature Reuse?" (2020), section 4.
    """
    problem = learned_body(loss, optimizer, adapt=adapt, features=features)
    return estimators.mixed_mode(problem, steps, **options)
