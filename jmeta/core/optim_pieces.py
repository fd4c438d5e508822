"""The parts of the inner optimizers: optax's transformations with a finite derivative at zero.

Each equals the optax transformation of the same name wherever that one is differentiable.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.tree import path_name

Number: TypeAlias = float | jax.Array
EPS_ROOT = 1e-16
"""Added inside the roots of second moments: float32 bears its power -3/2, a step hardly sees it."""


def safe_norm(x: jax.Array, *, axis: tuple[int, ...] | None = None) -> jax.Array:
    """Euclidean norm with derivative zero at zero, over ``axis`` (kept) or the whole array."""
    square = jnp.sum(jnp.real(x * jnp.conj(x)), axis=axis, keepdims=axis is not None)
    zero = square == 0
    # The root is taken of 1 where the sum is 0: a where after the root would still see its inf.
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def optax_promotion(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """``tx`` under JAX's standard promotion, which optax's bias correction relies on.

    Without it Adam raises ``TypePromotionError`` under ``jax_numpy_dtype_promotion=strict``.
    """

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def drop_in(
    tx: optax.GradientTransformationExtraArgs,
    eps_root: Number,
    name: str = "eps_root",
) -> optax.GradientTransformationExtraArgs:
    """:func:`optax_promotion` that refuses, at ``init``, leaves in whose dtype eps_root is zero."""
    tx = optax_promotion(tx)

    def init(params: Any) -> Any:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            dtype = jnp.result_type(leaf)
            if not (isinstance(eps_root, float | int) and jnp.issubdtype(dtype, jnp.inexact)):
                continue  # a learned eps_root has no value to look at
            if eps_root < float(jnp.finfo(dtype).tiny):
                raise ValueError(
                    f"{name}={eps_root} is zero in {dtype}, the dtype of leaf "
                    f"{path_name(path)!r}: the meta-gradient would be NaN wherever its inner "
                    f"gradient is zero. Use a larger {name}, float32 or bfloat16 parameters, or "
                    "adam_stopped."
                )
        return tx.init(params)

    return tx._replace(init=init)


def scale_by_adam_stopped(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    r"""``optax.scale_by_adam`` with a constant denominator.

    .. math::
        u = \hat m / \mathrm{sg}(\sqrt{\hat v} + \mathrm{eps}), \qquad
        u = 0, \ \partial u = 0 \ \text{where} \ v = 0

    where sg is ``stop_gradient``. Without the second rule the derivative at a gradient that has
    always been zero would be 1/eps = 1e8: finite, and no better than infinite.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
        mu_dtype: dtype of the first moment; the parameter's by default.
        nesterov: Nesterov momentum.

    Returns:
        a transformation whose state is ``optax.ScaleByAdamState``.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        fixed, old_nu = jax.lax.stop_gradient((updates, state.nu))
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(fixed, old_nu, b2, 2)
        count = jnp.asarray(optax.safe_increment(state.count))
        mu_hat = _first_moment(updates, mu, b1, count, nesterov)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(
            lambda m, v: jnp.where(v > 0, m / (jnp.sqrt(v) + eps), jnp.zeros_like(m)),
            mu_hat,
            nu_hat,
        )
        mu, nu = optax.tree.cast(mu, mu_dtype), optax.tree.cast_like(nu, state.nu)
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def scale_by_radam(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = EPS_ROOT,
    threshold: Number = 5.0,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """``optax.scale_by_radam`` without the root of a negative number in its unused branch.

    In the first steps the rectification is the root of a negative number; optax drops it with a
    ``where``, which the derivative passes through as 0 * NaN. Here its argument is chosen first.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
        eps_root: added inside the root of the second moment.
        threshold: the variance is taken as tractable from this length of moving average on.
        nesterov: Nesterov momentum.

    Returns:
        a transformation whose state is ``optax.ScaleByAdamState``.
    """
    longest = 2.0 / (1.0 - b2) - 1.0

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=zeros, nu=zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = jnp.asarray(optax.safe_increment(state.count))
        decay = b2**count
        length = longest - 2 * count * decay / (1 - decay)
        tractable = length >= threshold
        ratio = (length - 4.0) * (length - 2.0) * longest
        ratio = ratio / ((longest - 4.0) * (longest - 2.0) * length)
        rectify = jnp.sqrt(jnp.where(tractable, ratio, 1.0))
        mu_hat = _first_moment(updates, mu, b1, count, nesterov)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(
            lambda m, v: jnp.where(
                tractable, rectify.astype(m.dtype) * m / (jnp.sqrt(v + eps_root) + eps), m
            ),
            mu_hat,
            nu_hat,
        )
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _first_moment(updates: Any, mu: Any, b1: Any, count: jax.Array, nesterov: bool) -> Any:
    """The bias-corrected first moment, looked ahead by one step for Nesterov."""
    if not nesterov:
        return optax.tree.bias_correction(mu, b1, count)
    return jax.tree.map(
        lambda m, g: b1 * m + (1 - b1) * g,
        optax.tree.bias_correction(mu, b1, optax.safe_increment(count)),
        optax.tree.bias_correction(updates, b1, count),
    )


def scale_by_trust_ratio(
    min_norm: Number = 0.0,
    trust_coefficient: Number = 1.0,
    eps: Number = 0.0,
) -> optax.GradientTransformation:
    r"""``optax.scale_by_trust_ratio``, differentiable where a leaf or its update is all zero.

    .. math::
        u \leftarrow u \cdot c\, \|\theta\| / (\|u\| + \mathrm{eps}), \quad
        \text{or } u \text{ if either norm is zero}

    Args:
        min_norm: smallest value either norm may take.
        trust_coefficient: the factor c.
        eps: added to the denominator.

    Returns:
        a stateless transformation; its ``update`` needs ``params``.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("scale_by_trust_ratio: pass params to update, for their norms")

        def scale(u: jax.Array, p: jax.Array) -> jax.Array:
            param_norm = jnp.maximum(safe_norm(p), min_norm)
            update_norm = jnp.maximum(safe_norm(u), min_norm)
            zero = (param_norm == 0) | (update_norm == 0)
            ratio = trust_coefficient * param_norm / jnp.where(zero, 1.0, update_norm + eps)
            return u * jnp.where(zero, 1.0, ratio).astype(u.dtype)

        return jax.tree.map(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_block_rms(threshold: Number) -> optax.GradientTransformation:
    """``optax.clip_by_block_rms``, differentiable where an update is all zero.

    Args:
        threshold: largest root mean square of one leaf's update.

    Returns:
        a stateless transformation.
    """

    def clip(u: jax.Array) -> jax.Array:
        rms = safe_norm(u) / u.size**0.5
        return u / jnp.maximum(1.0, rms / threshold).astype(u.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def clip_by_global_norm(max_norm: Number) -> optax.GradientTransformation:
    """``optax.clip_by_global_norm``, differentiable where every gradient is zero.

    Args:
        max_norm: largest Euclidean norm of all leaves together.

    Returns:
        a stateless transformation.
    """

    def clip(updates: Any, params: Any) -> Any:
        del params
        norms = [safe_norm(u) for u in jax.tree.leaves(updates)]
        dtype = jnp.result_type(*norms)
        norm = safe_norm(jnp.stack([n.astype(dtype) for n in norms]))
        factor = jnp.where(norm < max_norm, 1.0, max_norm / jnp.where(norm == 0, 1.0, norm))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)

    return optax.stateless(clip)
