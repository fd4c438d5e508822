"""Errors in the user's words: what cannot be differentiated, what is never read, what is NaN.

They are raised while a problem is traced, before any compilation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.autodiff import variables_read
from jmeta.core.inner import checked, encode_episode, final, keys, start, step_batches
from jmeta.core.tree import names, require_inexact
from jmeta.core.types import Episode, Key, Problem, PyTree, Steps

# Primitives that carry a derivative rule of their own, or none: the ones worth naming.
_OPAQUE = ("custom_vjp", "pallas_call", "custom_call", "ffi_call", "callback", "while", "fused")


class NotDifferentiableError(TypeError):
    """A loss contains an operation without the derivative that an estimator needs."""


@contextlib.contextmanager
def differentiating(
    problem: Problem, outer: Callable[[PyTree], Any], meta: PyTree
) -> Iterator[None]:
    """Explain a failure to differentiate, where the losses themselves trace without one.

    Args:
        problem: for the message.
        outer: ``meta -> (loss, ...)``, what is differentiated in the block.
        meta: where.

    Yields:
        Nothing.

    Raises:
        NotDifferentiableError: an operation lacks the derivative; it names the suspects and what
            to use instead. Errors in the user's own code pass through unchanged.

    Example:
        >>> with differentiating(Problem(None, None, None), lambda m: m, 1.0):
        ...     pass
    """
    del problem
    try:
        yield
    except (TypeError, ValueError, NotImplementedError, AssertionError) as error:
        if isinstance(error, NotDifferentiableError):
            raise
        try:
            jaxpr = jax.make_jaxpr(outer)(meta)
        except Exception:  # the loss itself does not trace: its own error says more
            raise error from None
        suspects = sorted(set(_opaque(jaxpr.jaxpr)))
        if not suspects:
            raise
        raise NotDifferentiableError(
            "the losses can be evaluated, but not differentiated as this estimator needs: "
            f"{', '.join(suspects)} has no such derivative ({_first_line(error)}). Use plain "
            "jax.numpy operations in the inner loss (attention='xla' in jmeta.models), move the "
            "fused one into Problem.encode, or choose an estimator that asks for less "
            "(jmeta.first_order, jmeta.reptile, jmeta.evolution)"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _opaque(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if any(word in name for word in _OPAQUE):
            label = eqn.params.get("name") or eqn.params.get("target_name") or name
            rule = eqn.params.get("fwd_jaxpr_thunk") or eqn.params.get("call_jaxpr")
            function = getattr(getattr(rule, "jaxpr", None), "debug_info", None)
            source = getattr(function, "func_name", None)
            yield f"{source} ({name})" if source and source != label else f"{label} ({name})"
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns"):
                    yield from _opaque(body)


def require_dependence(function: Callable[[PyTree], Any], meta: PyTree, message: str) -> None:
    """Raise where a function never reads any leaf of meta, found in its jaxpr.

    Args:
        function: ``meta -> scalar or pytree``.
        meta: the meta-parameters.
        message: what to say.

    Raises:
        ValueError: with the message and the names of meta's leaves.

    Example:
        >>> require_dependence(lambda m: 1.0, {"w": 0.0}, "nothing reads meta")
        Traceback (most recent call last):
        ...
        ValueError: nothing reads meta (its leaves: w)
    """
    jaxpr = jax.make_jaxpr(function)(meta).jaxpr
    read = variables_read(jaxpr, jaxpr.outvars)
    if not any(v in read for v in jaxpr.invars):
        raise ValueError(f"{message} (its leaves: {', '.join(names(meta))})")


def check(problem: Problem, meta: PyTree, episode: Episode, key: Key = None) -> None:
    """Evaluate a problem once, before training, and say in plain words what is wrong with it.

    Args:
        problem: the problem.
        meta: the meta-parameters.
        episode: one episode (no task axis).
        key: a random key, or None.

    Raises:
        TypeError: an integer leaf in meta or in the fast weights; a loss that is not a scalar.
        FloatingPointError: a loss or an inner gradient that is NaN or infinite at step 0; the
            message names the leaf.

    Example:
        >>> import optax
        >>> loss = lambda fast, meta, batch, key: (jnp.log(fast), {})
        >>> check(Problem(loss, loss, lambda meta: optax.sgd(0.1)), -1.0, Episode(0, 0))
        Traceback (most recent call last):
        ...
        FloatingPointError: inner_loss is nan at step 0, before any update
    """
    require_inexact(meta)
    init_key, encode_key, inner_key = keys(key, 3)
    fast = start(problem, meta, init_key).fast
    require_inexact(fast, "the fast weights")
    episode = encode_episode(problem, meta, episode, encode_key)
    support = episode.support
    if isinstance(support, Steps):
        steps = step_batches(support, 1, final)
        assert steps is not None
        support = jax.tree.map(lambda x: x[0], steps.batches)
    inner = checked(problem.inner_loss, "inner_loss")
    (loss, _), grads = jax.value_and_grad(inner, has_aux=True)(fast, meta, support, inner_key)
    _require_finite(loss, "inner_loss")
    for name, leaf in zip(names(grads), jax.tree.leaves(grads), strict=True):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise FloatingPointError(
                f"the inner gradient of {name!r} is not finite at step 0, though the loss is"
            )
    if episode.query is not None:
        outer = checked(problem.outer_loss, "outer_loss")
        _require_finite(outer(fast, meta, episode.query, inner_key)[0], "outer_loss")


def _require_finite(loss: jax.Array, name: str) -> None:
    if not bool(jnp.isfinite(loss)):
        raise FloatingPointError(f"{name} is {float(loss)} at step 0, before any update")
