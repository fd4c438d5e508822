"""Recognise an optimizer whose update is one scalar times the gradient, such as ``optax.sgd``.

Then the scalar can move into the inner loss, and mixed mode neither stores the inner gradients
for a learned rate nor holds a scaled copy of the cotangent.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core as jex

from jmeta.core.tracing import variables_read
from jmeta.core.types import Array, LossFn, PyTree
from jmeta.core.updates import updated

_ALIASES = ("convert_element_type", "copy", "broadcast_in_dim")


def common_factor(
    optimizer: optax.GradientTransformation, opt_state: PyTree, fast: PyTree
) -> tuple[Array, PyTree] | None:
    r"""The scalar :math:`c` of an update :math:`u = c \, g`, read off the update's jaxpr.

    Args:
        optimizer: the inner optimizer.
        opt_state: its state.
        fast: the fast weights.

    Returns:
        ``(c, next_state)``, or None where the update is anything else: one factor for each leaf,
        weight decay, momentum, clipping, a rate or a state that depends on the gradient or on the
        loss.

    Example:
        >>> fast = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> sgd, momentum = optax.sgd(0.5), optax.sgd(0.5, momentum=0.9)
        >>> float(common_factor(sgd, sgd.init(fast), fast)[0])
        -0.5
        >>> common_factor(momentum, momentum.init(fast), fast) is None
        True
    """
    leaves = jax.tree.leaves(fast)
    if len({leaf.dtype for leaf in leaves}) != 1:  # one factor cannot be rounded to two dtypes
        return None
    no_loss = jnp.zeros((), leaves[0].dtype)
    jaxpr = jax.make_jaxpr(lambda g, loss: updated(optimizer, g, opt_state, fast, loss))(
        fast, no_loss
    ).jaxpr
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    state_reads = variables_read(jaxpr, jaxpr.outvars[len(leaves) :])
    if state_reads & set(jaxpr.invars):
        return None
    roots = set()
    pairs = zip(jaxpr.invars[: len(leaves)], jaxpr.outvars[: len(leaves)], strict=True)
    for gradient, update in pairs:
        eqn = None if isinstance(update, jex.Literal) else made.get(update)
        if eqn is None or eqn.primitive.name != "mul" or gradient not in list(_variables(eqn)):
            return None
        factors = [v for v in eqn.invars if v is not gradient]
        if len(factors) != 1:  # the gradient squared
            return None
        root = _root(factors[0], made)
        if root.aval.shape or variables_read(jaxpr, [root]) & set(jaxpr.invars):
            return None
        roots.add(float(root.val) if isinstance(root, jex.Literal) else root)
    if len(roots) != 1:
        return None
    # The update has just been seen to multiply by a scalar alone, so ones of no shape will do, and
    # any loss.
    ones = jax.tree.map(lambda leaf: jnp.ones((), leaf.dtype), fast)
    factors, state = updated(optimizer, ones, opt_state, fast, no_loss)
    return jax.tree.leaves(factors)[0], state


def _variables(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if not isinstance(v, jex.Literal)]


def _root(variable: Any, made: dict[Any, Any]) -> Any:
    """The scalar behind casts, copies and broadcasts."""
    while not isinstance(variable, jex.Literal) and variable in made:
        eqn = made[variable]
        if eqn.primitive.name not in _ALIASES:
            break
        variable = eqn.invars[0]
    return variable


def scaled(loss: LossFn) -> LossFn:
    r"""The loss times a scalar that travels with meta: :math:`(\theta, (\phi, c)) \mapsto c L`.

    Args:
        loss: ``(fast, meta, batch, key) -> (loss, aux)``.

    Returns:
        ``(fast, (meta, c), batch, key) -> (c * loss, loss)``.

    Example:
        >>> square = lambda fast, meta, batch, key: (fast**2, {})
        >>> fast, factor = jnp.asarray(3.0), jnp.asarray(-0.5)
        >>> float(scaled(square)(fast, (None, factor), None, None)[0])
        -4.5
    """

    def scaled_loss(fast: PyTree, meta: tuple[PyTree, Array], batch: PyTree, key: Any):
        value, _ = loss(fast, meta[0], batch, key)
        return meta[1].astype(value.dtype) * value, value

    return scaled_loss
