"""What an inner gradient keeps from its forward pass, and its derivative need not compute again.

A float of a product costs two operations for each entry contracted: long ones are worth keeping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.extend import core as jex

# As of ``jax.checkpoint``: (primitive, *abstract values, **parameters) -> whether to keep it.
Policy: TypeAlias = Callable[..., Any]


def keep_products(at_least: int = 1) -> Policy:
    r"""A policy of ``jax.checkpoint`` that keeps the outputs of long products.

    An output of a product over :math:`k` entries costs :math:`2k` operations and one float, so of a
    transformer with hidden layers of :math:`4d` the outputs over :math:`3d` and more (those of
    ``down``, and the cotangents before ``up`` and ``qkv``) are two fifths of what mixed mode
    recomputes, for three floats a token, layer and width.

    A product with a batch axis is kept where its output is no larger than what it is made of: in
    attention those that contract over time (its output, and the cotangents of queries, keys and
    values), not the scores of all pairs of tokens.

    Args:
        at_least: the fewest entries that a product is kept for.

    Returns:
        A policy for ``jmeta.mixed_mode(keep=)``.

    Raises:
        ValueError: fewer than one entry.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.ones((2, 8)), jnp.ones((8, 2))
        >>> def products(policy):  # in the linearisation of sin(x w)
        ...     f = jax.checkpoint(lambda w: jnp.sin(x @ w), policy=policy)
        ...     return str(jax.make_jaxpr(jax.linearize(f, w)[1])(w)).count("dot_general")
        >>> products(keep_products(at_least=8)), products(keep_products(at_least=9))
        (1, 2)
    """
    if at_least < 1:
        raise ValueError(f"a product contracts at least one entry; at_least is {at_least}")

    def policy(primitive: Any, *values: Any, **parameters: Any) -> bool:
        if primitive.name != "dot_general":
            return False
        (contracted, _), (batch, _) = parameters["dimension_numbers"]
        left, right = (value.shape for value in values)
        length = math.prod(left[axis] for axis in contracted)
        shared = math.prod(left[axis] for axis in batch)
        read = math.prod(left) + math.prod(right)
        written = math.prod(left) * math.prod(right) // max(1, length**2 * shared)
        return length >= at_least and (not batch or written <= read)

    return policy


def linearised(function: Callable[..., Any], point: Any, policy: Policy) -> tuple[Any, Any, Any]:
    """The value of a function, its linearisation as a pytree, and its auxiliary output.

    Args:
        function: ``point -> (value, aux)``.
        point: a pytree of arrays.
        policy: which values the linearisation holds; it computes the others again.

    Returns:
        The value; a ``jax.tree_util.Partial`` that takes tangents of ``point`` to those of the
        value, whose leaves are what it holds; aux.

    Example:
        >>> import jax.numpy as jnp
        >>> value, linear, _ = linearised(lambda x: (x**3, {}), jnp.asarray(2.0), keep_products())
        >>> float(value), float(linear(1.0))
        (8.0, 12.0)
    """
    # What is computed again lies in a backward pass of its own: no barrier is needed.
    value, linear, aux = jax.linearize(
        jax.checkpoint(function, policy=policy, prevent_cse=False), point, has_aux=True
    )
    traced, shapes = jax.make_jaxpr(linear, return_shape=True)(point)
    structure = jax.tree.structure(shapes)

    # A closure cannot cross the boundary between a forward and a backward rule; its arrays can.
    def apply(held: list[Any], tangents: Any) -> Any:
        evaluate = jex.jaxpr_as_fun(jex.ClosedJaxpr(traced.jaxpr, held))
        return jax.tree.unflatten(structure, evaluate(*jax.tree.leaves(tangents)))

    return value, jax.tree_util.Partial(apply, traced.consts), aux
