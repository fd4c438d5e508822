"""The three ways to differentiate an inner gradient.

An inner gradient is ``(fast, meta, batch, key) -> (loss, aux, grads)``; they differ only in what
the derivative of ``grads`` is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jmeta.core.kept import Policy, linearised
from jmeta.core.tracing import contains, dense, is_primal, variables_read
from jmeta.core.types import Array, Key, LossFn, PyTree

InnerGradFn: TypeAlias = Callable[[PyTree, PyTree, PyTree, Key], tuple[Array, PyTree, PyTree]]
GradTransform: TypeAlias = Callable[[LossFn], InnerGradFn]


def reverse_grad(loss: LossFn) -> InnerGradFn:
    r"""The inner gradient, differentiated by reverse mode over reverse mode: the reference.

    Args:
        loss: ``(fast, meta, batch, key) -> (loss, aux)``.

    Returns:
        ``(fast, meta, batch, key) -> (loss, aux, grads)``, grads with respect to ``fast``.

    Example:
        >>> square = lambda fast, meta, batch, key: (fast**2, {})
        >>> reverse_grad(square)(3.0, None, None, None)[2]
        Array(6., dtype=float32, weak_type=True)
    """
    transformed = jax.value_and_grad(loss, has_aux=True)

    def value_and_grad(fast: PyTree, meta: PyTree, batch: PyTree, key: Key):
        (value, aux), grads = transformed(fast, meta, batch, key)
        return value, jax.lax.stop_gradient(aux), grads

    return value_and_grad


def stopped_grad(loss: LossFn) -> InnerGradFn:
    r"""The inner gradient as a constant: what *first order* means.

    Only the gradient is stopped, not the parameters, so weight decay and an optimizer's dependence
    on meta keep their derivatives. The loss keeps its derivative too (``online`` needs it). The
    gradient's own derivative is not even traced, so an operation may have none.

    Args:
        loss: ``(fast, meta, batch, key) -> (loss, aux)``.

    Returns:
        ``(fast, meta, batch, key) -> (loss, aux, grads)``.

    Example:
        >>> cube = lambda fast, meta, batch, key: (fast**3, {})
        >>> float(jax.grad(lambda x: stopped_grad(cube)(x, None, None, None)[2])(2.0))
        0.0
    """
    return _with_rule(loss, _Rule(_forget, _value_only))


def mixed_mode_grad(loss: LossFn, keep: Policy | None = None) -> InnerGradFn:
    r"""The inner gradient, differentiated by forward mode over reverse mode; exact.

    The backward pass of an inner step needs only the vector-Jacobian product of the gradient, and
    the Hessian is symmetric, so one Jacobian-vector product gives all of it:

    .. math::
        v^\top \frac{\partial}{\partial(\theta, \phi)} \nabla_\theta L
        = \frac{d}{d\epsilon} \nabla_{(\theta, \phi)} L(\theta + \epsilon v, \phi).

    Nothing of the inner gradient is stored but its inputs. Leaves that the loss never reads are
    found in its jaxpr and get no cotangent at all.

    Args:
        loss: ``(fast, meta, batch, key) -> (loss, aux)``; it may close over traced values.
        keep: which values of the gradient are stored beside its inputs and not computed again, a
            policy of ``jax.checkpoint`` such as ``keep_products(512)``; None: none.

    Returns:
        ``(fast, meta, batch, key) -> (loss, aux, grads)``, to be differentiated in reverse mode.

    Example:
        >>> cube = lambda fast, meta, batch, key: (meta * fast**3, {})
        >>> gradient = lambda x, m: mixed_mode_grad(cube)(x, m, None, None)[2]
        >>> [float(d) for d in jax.grad(gradient, argnums=(0, 1))(2.0, 5.0)]
        [60.0, 12.0]

    Source: Kemaev et al., "Scalable Meta-Learning via Mixed-Mode Differentiation" (2025).
    """
    recomputing = _Rule(_forget, _hessian_vector)
    return _with_rule(loss, recomputing if keep is None else _keeping(keep))


def is_mixed_mode(grad: GradTransform) -> bool:
    """Whether a transform is ``mixed_mode_grad``, with values to keep or without."""
    return getattr(grad, "func", grad) is mixed_mode_grad


class _Rule(NamedTuple):
    """The derivative of an inner gradient: what its forward pass keeps, and its backward pass.

    Attributes:
        forward: ``(value, weights, perturbed) -> (outputs or None, kept)``; the outputs are
            ``(loss, aux, gradient)`` where they were computed on the way.
        backward: ``(value, weights, perturbed, kept, value_bar, grads_bar) -> cotangents`` of
            weights and perturbed.
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., tuple[Any, Any]]


def _forget(value: Callable, weights: Any, perturbed: Any) -> tuple[None, tuple[()]]:
    del value, weights, perturbed
    return None, ()


def _with_rule(loss: LossFn, rule: _Rule) -> InnerGradFn:
    """An inner gradient whose derivative is a rule."""

    def value_and_grad(fast: PyTree, meta: PyTree, batch: PyTree, key: Key):
        # As a jaxpr the loss has no hidden inputs: what it closes over becomes an argument.
        fast = jax.tree.map(jnp.asarray, fast)
        jaxpr, shapes = jax.make_jaxpr(loss, return_shape=True)(fast, meta, batch, key)
        fast_leaves, fast_structure = jax.tree.flatten(fast)
        inputs = [*fast_leaves, *jax.tree.leaves((meta, batch, key)), *jaxpr.consts]
        order = [*jaxpr.jaxpr.invars, *jaxpr.jaxpr.constvars]
        read = variables_read(jaxpr.jaxpr, [jaxpr.jaxpr.outvars[0]])
        moved = len(fast_leaves)
        differentiable = [
            position
            for position in range(moved, len(inputs))
            if order[position] in read and jnp.issubdtype(order[position].aval.dtype, jnp.inexact)
        ]
        static = [p for p in range(moved, len(inputs)) if p not in set(differentiable)]
        end = len(jaxpr.jaxpr.invars)

        def flat_loss(weights: Sequence[Array], others: dict[int, Array]) -> tuple[Array, Any]:
            consts = [others[p] for p in range(end, len(inputs))]
            evaluate = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr.jaxpr, consts))
            value, *aux = evaluate(*weights, *(others[p] for p in range(moved, end)))
            return value, aux

        value, aux, grads = _primitive(
            flat_loss,
            rule,
            fast_leaves,
            {p: inputs[p] for p in differentiable},
            # What the loss never reads needs no cotangent: not even zeros in a scan's carry.
            {p: jax.lax.stop_gradient(inputs[p]) for p in static},
        )
        _, aux_shapes = cast(tuple[Any, Any], shapes)
        aux = jax.tree.unflatten(jax.tree.structure(aux_shapes), aux)
        return value, jax.lax.stop_gradient(aux), jax.tree.unflatten(fast_structure, grads)

    return value_and_grad


def _hessian_vector(
    value: Callable, weights: Any, perturbed: Any, kept: Any, value_bar: Any, grads_bar: Any
):
    """Forward over reverse: one Jacobian-vector product of the gradient."""
    del kept
    direction = [dense(bar, leaf) for bar, leaf in zip(grads_bar, weights, strict=True)]
    if not _has_product(value, weights, perturbed):  # reverse this step
        both = lambda w, p: (value(w, p)[0], jax.grad(value, has_aux=True)(w, p)[0])  # noqa: E731
        (loss, _), pull = jax.vjp(both, weights, perturbed)
        return pull((dense(value_bar, loss), direction))
    return _scored(value_bar, *_product(value, weights, perturbed, direction))


def _product(value: Callable, weights: Any, perturbed: Any, direction: Any):
    """The gradient in all that is differentiated, and its derivative along the weights."""
    gradients = lambda w: jax.grad(value, argnums=(0, 1), has_aux=True)(w, perturbed)[0]  # noqa: E731
    return jax.jvp(gradients, (weights,), (direction,))


def _has_product(value: Callable, weights: Any, perturbed: Any) -> bool:
    """False for a custom_vjp whose forward rule calls the function itself: it has no jvp."""
    if not contains(jax.make_jaxpr(value)(weights, perturbed), "custom_vjp_call"):
        return True
    traced = jax.make_jaxpr(functools.partial(_product, value))(weights, perturbed, weights)
    return not contains(traced, "custom_lin")


def _scored(value_bar: Any, first: Any, second: Any):
    """Cotangents of gradient and loss together; the loss itself is scored by ``online`` alone."""
    if isinstance(value_bar, SymbolicZero):
        return second
    return jax.tree.map(lambda f, s: value_bar.astype(f.dtype) * f + s, first, second)


def _keeping(policy: Policy) -> _Rule:
    """``_hessian_vector`` with the gradient's linearisation from the forward pass."""

    def forward(value: Callable, weights: Any, perturbed: Any):
        if not _has_product(value, weights, perturbed):
            return None, None

        def gradients(weights: Any):
            (loss, aux), grads = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
                weights, perturbed
            )
            return grads, (loss, aux)

        first, linear, (loss, aux) = linearised(gradients, weights, policy)
        return (loss, aux, first[0]), (linear, first)

    def backward(
        value: Callable, weights: Any, perturbed: Any, kept: Any, value_bar: Any, grads_bar: Any
    ):
        if kept is None:
            return _hessian_vector(value, weights, perturbed, (), value_bar, grads_bar)
        linear, first = kept
        direction = [dense(bar, leaf) for bar, leaf in zip(grads_bar, weights, strict=True)]
        return _scored(value_bar, first, linear(direction))

    return _Rule(forward, backward)


def _value_only(
    value: Callable, weights: Any, perturbed: Any, kept: Any, value_bar: Any, grads_bar: Any
):
    """The gradient is a constant; the loss is not."""
    del kept, grads_bar
    if isinstance(value_bar, SymbolicZero):
        return None, {}
    first, _ = jax.grad(value, argnums=(0, 1), has_aux=True)(weights, perturbed)
    return jax.tree.map(lambda f: value_bar.astype(f.dtype) * f, first)


def _primitive(
    flat_loss: Callable[[Sequence[Array], dict[int, Array]], tuple[Array, Any]],
    rule: _Rule,
    weights: list[Array],
    moving: dict[int, Array],
    static: dict[int, Any],
) -> tuple[Array, list[Any], list[Array]]:
    """Value, aux and gradient of a flat loss, whose derivative is the rule's."""

    @jax.custom_vjp
    def inner_gradient(weights, moving, static):
        (value, aux), grads = jax.value_and_grad(flat_loss, has_aux=True)(
            weights, {**moving, **static}
        )
        return value, aux, grads

    def forward(weights, moving, static):
        # Only inputs that are being differentiated get a cotangent; the others stay constants.
        perturbed = {p: leaf.value for p, leaf in moving.items() if leaf.perturbed}
        constant = {p: leaf.value for p, leaf in moving.items() if not leaf.perturbed}
        constant |= jax.tree.map(lambda leaf: leaf.value, static, is_leaf=is_primal)
        weights = [leaf.value for leaf in weights]
        outputs, kept = rule.forward(value_given(constant), weights, perturbed)
        if outputs is None:
            outputs = inner_gradient(
                weights,
                {p: leaf.value for p, leaf in moving.items()},
                {p: constant[p] for p in static},
            )
        return outputs, (weights, perturbed, constant, kept)

    def value_given(constant):
        return lambda weights, perturbed: flat_loss(weights, {**perturbed, **constant})

    def backward(residuals, cotangents):
        weights, perturbed, constant, kept = residuals
        value_bar, _, grads_bar = cotangents
        weights_bar, perturbed_bar = rule.backward(
            value_given(constant), weights, perturbed, kept, value_bar, grads_bar
        )
        moving_bar = {p: perturbed_bar.get(p) for p in (*perturbed, *constant) if p in moving}
        return weights_bar, moving_bar, None

    inner_gradient.defvjp(forward, backward, symbolic_zeros=True)
    return inner_gradient(weights, moving, static)
