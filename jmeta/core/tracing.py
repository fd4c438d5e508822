"""Reading jaxprs: what depends on what, and which primitives occur.

The parts of automatic differentiation that look at a traced function without running it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jmeta.core.types import Array


def is_primal(leaf: Any) -> bool:
    """Whether a leaf is what ``custom_vjp(symbolic_zeros=True)`` hands to a forward rule."""
    return hasattr(leaf, "perturbed")


def dense(cotangent: Any, primal: Array) -> Array:
    """A cotangent as an array, a symbolic zero too, which is laid out as its primal is."""
    return jnp.zeros_like(primal) if isinstance(cotangent, SymbolicZero) else cotangent


def contains(jaxpr: Any, name: str) -> bool:
    """Whether a primitive occurs in a jaxpr, or in one that it calls."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == name:
            return True
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns") and contains(body, name):
                    return True
    return False


def scan_parts(eqn: Any) -> tuple[int, int]:
    """How many inputs of a ``scan`` are constants, and how many are carried.

    Read off shapes, which every version of jax has: what is scanned over or stacked has an axis
    more outside than inside.

    Args:
        eqn: an equation of a jaxpr whose primitive is ``scan``.

    Returns:
        ``(constants, carried)``; inputs come in this order, then what is scanned over, and
        outputs are what is carried, then what is stacked.

    Example:
        >>> import jax
        >>> f = lambda w, xs: jax.lax.scan(lambda c, x: (w * c + x, c), 0.0, xs)
        >>> scan_parts(jax.make_jaxpr(f)(2.0, jax.numpy.ones(3)).eqns[-1])
        (1, 1)
    """
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])

    def alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    carried = alike(eqn.outvars, body.outvars)
    return alike(eqn.invars, body.invars) - carried, carried


def variables_read(jaxpr: Any, outputs: Sequence[Any]) -> set[Any]:
    """The variables of a jaxpr on which some of its outputs depend.

    Calls (``jit``, ``remat``) are followed inside; loops, conditionals and functions with a
    derivative rule of their own (which may read what the function itself does not) count all
    their inputs as read, which is never wrong, only less sharp.

    Args:
        jaxpr: an open jaxpr.
        outputs: some of its output variables.

    Returns:
        The set of variables that can reach them, inputs and constants among them.

    Example:
        >>> import jax
        >>> jaxpr = jax.make_jaxpr(lambda x, y: (x * 2, y))(1.0, 1.0).jaxpr
        >>> read = variables_read(jaxpr, [jaxpr.outvars[0]])
        >>> [v in read for v in jaxpr.invars]
        [True, False]
    """
    live = {v for v in outputs if not isinstance(v, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        wanted = [i for i, v in enumerate(eqn.outvars) if v in live]
        if not wanted:
            continue
        inner = next(
            (eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None
        )
        body: Any = getattr(inner, "jaxpr", inner)
        if (
            body is not None
            and eqn.primitive.name not in ("scan", "while", "cond")
            and not eqn.primitive.name.startswith("custom_")
            and len(body.invars) == len(eqn.invars)
            and len(body.outvars) == len(eqn.outvars)
        ):
            read = variables_read(body, [body.outvars[i] for i in wanted])
            sources = [v for v, b in zip(eqn.invars, body.invars, strict=True) if b in read]
        else:
            sources = eqn.invars
        live.update(v for v in sources if not isinstance(v, jex.Literal))
    return live
