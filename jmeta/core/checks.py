"""Errors in the user's words: what cannot be differentiated, what is never read, what is NaN.

They are raised while a problem is traced, before any compilation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.inner import checked, encode_episode, final, keys, start, step_batches
from jmeta.core.tracing import variables_read
from jmeta.core.tree import names, require_inexact
from jmeta.core.types import Episode, Key, Problem, PyTree, Steps

# Primitives that carry a derivative rule of their own, or none: the ones worth naming.
_OPAQUE = ("custom_vjp", "pallas_call", "custom_call", "ffi_call", "callback", "while", "fused")
_OURS = ("inner_gradient", "debug_callback", "debug_print")


class NotDifferentiableError(TypeError):
    """A loss contains an operation without the derivative that an estimator needs."""


@contextlib.contextmanager
def differentiating(
    outer: Callable[[PyTree], Any],
    losses: Callable[[PyTree, PyTree], Any],
    fast: PyTree,
    meta: PyTree,
) -> Iterator[None]:
    """Explain a failure to differentiate, where the losses themselves trace without one.

    Args:
        outer: ``meta -> (loss, ...)``, what is differentiated in the block.
        losses: ``(fast, meta) -> scalars``, the plain losses, see ``losses_at_start``.
        fast: fast weights, or None for the start.
        meta: where.

    Yields:
        Nothing.

    Raises:
        NotDifferentiableError: an operation lacks the derivative; it names the suspects and what
            to use instead. Errors in the user's own code pass through unchanged.

    Example:
        >>> with differentiating(lambda m: m, lambda f, m: m, None, 1.0):
        ...     pass
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError, AssertionError) as error:
        plain = None if isinstance(error, NotDifferentiableError) else _traced(losses, fast, meta)
        if plain is None:  # the losses themselves do not trace: their own error says more
            raise
        whole = _traced(outer, meta)
        if whole is None and _traced(_slopes(losses), fast, meta) is not None:
            raise  # one derivative exists: what fails is neither loss, the optimizer perhaps
        suspects = sorted({*_opaque(plain), *(() if whole is None else _opaque(whole))})
        if not suspects:
            raise
        raise NotDifferentiableError(
            f"{_FIRST if whole is None else _SECOND} Suspected: {', '.join(suspects)}. "
            f"({_first_line(error)})"
        ) from error


_FIRST = (
    "the losses can be evaluated, but not differentiated even once in reverse mode, which every "
    "inner step needs. Use jax.lax.scan (or fori_loop with fixed bounds) instead of while_loop, "
    "plain jax.numpy or a jax.custom_vjp instead of a callback or a bare kernel, or move the "
    "operation into Problem.encode where nothing learned flows through it."
)
_SECOND = (
    "the losses can be evaluated, but an operation in them has not the derivative that this "
    "estimator needs. Use plain jax.numpy operations in the inner loss (attention='xla' in "
    "jmeta.models), move the fused one into Problem.encode, or choose an estimator that asks for "
    "less (jmeta.first_order, jmeta.reptile, jmeta.evolution)."
)


def losses_at_start(
    problem: Problem, episode: Episode, key: Key
) -> Callable[[PyTree, PyTree], tuple[Any, ...]]:
    """The plain losses of an episode before any step, to be traced without a derivative.

    Args:
        problem: the problem.
        episode: one episode.
        key: a random key, or None.

    Returns:
        ``(fast, meta) -> (inner loss, outer loss)``, the second only where there is a query;
        ``fast`` None stands for ``problem.init(meta)``.

    Example:
        >>> loss = lambda fast, meta, batch, key: (fast * batch, {})
        >>> problem = Problem(loss, loss, None)
        >>> losses_at_start(problem, Episode(2.0, 3.0), None)(1.0, 1.0)
        (2.0, 3.0)
    """
    init_key, encode_key, loss_key = keys(key, 3)

    def losses(fast: PyTree, meta: PyTree) -> tuple[Any, ...]:
        fast = problem.init(meta, init_key) if fast is None else fast
        encoded = encode_episode(problem, meta, episode, encode_key)
        values = (problem.inner_loss(fast, meta, first_batch(encoded.support), loss_key)[0],)
        if encoded.query is None:
            return values
        return (*values, problem.outer_loss(fast, meta, encoded.query, loss_key)[0])

    return losses


def first_batch(support: PyTree) -> PyTree:
    """The batch of the first inner step.

    Args:
        support: an episode's support.

    Returns:
        One batch.

    Example:
        >>> int(first_batch(Steps(jnp.arange(3, 6))))
        3
    """
    if not isinstance(support, Steps):
        return support
    return jax.tree.map(lambda x: x[0], support.batches)


def _slopes(losses: Callable[[PyTree, PyTree], Any]) -> Callable[[PyTree, PyTree], Any]:
    def slopes(fast: PyTree, meta: PyTree) -> Any:
        if fast is None:
            values, pullback = jax.vjp(lambda m: losses(None, m), meta)
        else:
            values, pullback = jax.vjp(lambda f: losses(f, meta), fast)
        return pullback(jax.tree.map(jnp.ones_like, values))

    return slopes


def _traced(function: Callable[..., Any], *arguments: PyTree) -> Any:
    """The jaxpr of a function, or None where it does not trace."""
    try:
        return jax.make_jaxpr(function)(*arguments).jaxpr
    except Exception:
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _opaque(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if any(word in name for word in _OPAQUE) and name not in _OURS:
            label = eqn.params.get("name") or eqn.params.get("target_name") or name
            function = getattr(eqn.params.get("call_jaxpr"), "jaxpr", None)
            source = getattr(getattr(function, "debug_info", None), "func_src_info", None)
            source = source.split(" at ")[0] if source else None
            known = source or label
            if known not in _OURS:
                yield name if known == name else f"{known} ({name})"
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
    step_batches(support, 1, final)
    support = first_batch(support)
    inner = checked(problem.inner_loss, "inner_loss")
    (loss, _), grads = jax.value_and_grad(inner, has_aux=True)(fast, meta, support, inner_key)
    _require_finite(loss, "inner_loss", fast=fast, meta=meta, support=support)
    for name, leaf in zip(names(grads), jax.tree.leaves(grads), strict=True):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise FloatingPointError(
                f"the inner gradient of {name!r} is not finite at step 0, though the loss is"
            )
    if episode.query is not None:
        outer = checked(problem.outer_loss, "outer_loss")
        loss = outer(fast, meta, episode.query, inner_key)[0]
        _require_finite(loss, "outer_loss", fast=fast, meta=meta, query=episode.query)


def _require_finite(loss: jax.Array, name: str, **inputs: PyTree) -> None:
    if bool(jnp.isfinite(loss)):
        return
    found = [
        f"{leaf_name!r} of {what}"
        for what, tree in inputs.items()
        for leaf_name, leaf in zip(names(tree), jax.tree.leaves(tree), strict=True)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        and not bool(jnp.all(jnp.isfinite(leaf)))
    ]
    blame = f"; not finite among its inputs: {', '.join(found)}" if found else ""
    raise FloatingPointError(f"{name} is {float(loss)} at step 0, before any update{blame}")
