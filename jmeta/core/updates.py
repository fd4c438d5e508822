"""One update of an optimizer that may ask for the loss: Polyak's step size, a rate on a plateau."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import optax

from jmeta.core.types import Array, PyTree


def updated(
    optimizer: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    fast: PyTree,
    loss: Array,
) -> tuple[PyTree, PyTree]:
    """``optimizer.update``, told the loss (``value``) and the gradient (``grad``) where it asks.

    Whatever an update makes of the loss is differentiated like the rest of it.

    Args:
        optimizer: any optax optimizer that needs no more than these.
        grads: the gradient of the loss.
        opt_state: the optimizer's state.
        fast: the weights at which loss and gradient were taken.
        loss: the loss before the update, a scalar.

    Returns:
        ``(updates, next_state)``.

    Raises:
        TypeError: the optimizer wants to evaluate the objective itself, as a line search does.

    Example:
        >>> import jax.numpy as jnp
        >>> theta, polyak = jnp.asarray(3.0), optax.polyak_sgd(max_learning_rate=10.0)
        >>> updates, _ = updated(polyak, 2 * theta, polyak.init(theta), theta, theta**2)
        >>> float(updates)  # the loss over the squared gradient, times the gradient
        -1.5
    """
    told = optax.with_extra_args_support(optimizer)
    try:
        return told.update(grads, opt_state, fast, **_taken(told.update, value=loss, grad=grads))
    except (TypeError, ValueError) as error:
        if "value_fn" in str(error):
            raise TypeError(
                "this optimizer is a line search: it asks for value_fn, to evaluate the loss at "
                "weights of its own choice, and how many it takes has no derivative. Use a fixed "
                "or learned rate, or optax.polyak_sgd, whose step size follows from the loss"
            ) from error
        asked = [name for name in ("grad_fn", "obj_fn") if name in str(error)]
        if not asked:
            raise
        raise TypeError(
            f"this optimizer asks for {asked[0]}, to evaluate the objective itself, and a step "
            "has the loss and its gradient at the present weights alone. Use one that needs no "
            "more; optax.contrib.sam does without opaque_mode"
        ) from error


def _taken(update: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """What an update takes of what it is offered; some that take extras name them all."""
    parameters = inspect.signature(update).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}
