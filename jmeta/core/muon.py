"""Muon as an inner optimizer: orthogonalised momentum with a finite derivative at a zero matrix.

Newton-Schulz divides by the norm of the momentum, whose derivative at zero does not exist.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jmeta.core.optim_pieces import EPS_ROOT, Number, drop_in, optax_promotion

_MATRIX = optax.contrib.MuonDimensionNumbers(0, 1)
_STANDARD = (3.4445, -4.7750, 2.0315)


class MuonMomentum(NamedTuple):
    """State of the orthogonalised momentum.

    Attributes:
        count: steps taken, int32.
        mu: the momentum, shaped as the matrices.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any


def muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Any = _STANDARD,
    ns_steps: int = 5,
    beta: Number = 0.95,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: Number = 0.9,
    adam_b2: Number = 0.999,
    adam_eps_root: Number = EPS_ROOT,
    adam_weight_decay: Number = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon, with AdamW for what is not a matrix; arguments as ``optax.contrib.muon``.

    A matrix whose momentum is exactly zero gets a zero update and a zero derivative.

    Args:
        learning_rate: a number, a (meta-learned) scalar array, or a schedule.
        ns_coeffs: ``(3,)`` or ``(n, 3)`` coefficients of the Newton-Schulz polynomial.
        ns_steps: Newton-Schulz steps.
        beta: decay of the momentum.
        eps: added to the norm that Newton-Schulz divides by, and to Adam's denominator.
        weight_decay: decay of the matrices, multiplied by the learning rate.
        weight_decay_mask: which leaves decay; see :func:`jmeta.core.optim.adamw`.
        mu_dtype: dtype of the momentum; the parameter's by default.
        nesterov: Nesterov momentum, in both parts.
        adaptive: scale each update by the dual norm of the momentum.
        preconditioning: "frobenius", "aol" or "schatten"; "spectral" has no safe derivative
            where singular values coincide and is refused.
        adam_b1: decay of Adam's first moment.
        adam_b2: decay of Adam's second moment.
        adam_eps_root: added inside the root of Adam's second moment; positive.
        adam_weight_decay: decay of the leaves given to Adam.
        adam_learning_rate: their learning rate; ``learning_rate`` by default.
        muon_weight_dimension_numbers: a pytree (or prefix, or function of the parameters) of
            ``optax.contrib.MuonDimensionNumbers``, None for a leaf that goes to Adam. By default
            the two-dimensional leaves are the matrices. Layers stacked as ``[L, in, out]`` need
            ``MuonDimensionNumbers(1, 2)``.
        consistent_rms: scale by ``sqrt(max(fan_in, fan_out))`` times this (0.2 matches AdamW) in
            place of ``sqrt(max(1, fan_out / fan_in))``.

    Returns:
        an optax transformation.

    Raises:
        ValueError: for "spectral"; at ``init``, if ``adam_eps_root`` is zero in a leaf's dtype.

    Source: Jordan (2024), github.com/KellerJordan/Muon; Liu et al. (2025), arXiv 2502.16982.
    """
    if preconditioning == "spectral":
        raise ValueError(
            "muon: preconditioning='spectral' differentiates a singular value, which has no "
            "derivative where two coincide; use 'frobenius', 'aol' or 'schatten'"
        )

    def dimensions(params: Any) -> Any:
        given = muon_weight_dimension_numbers
        if given is None:
            return jax.tree.map(lambda x: _MATRIX if x.ndim == 2 else None, params)
        given = given(params) if callable(given) else given
        # A prefix of the parameters: each entry stands for everything below it.
        return jax.tree.map(
            lambda d, below: jax.tree.map(lambda _: d, below), given, params, is_leaf=_is_spec
        )

    def labels(params: Any) -> Any:
        return jax.tree.map(
            lambda d: "adam" if d is None else "muon", dimensions(params), is_leaf=_is_spec
        )

    def orthogonalise(x: jax.Array, spec: Any) -> jax.Array:
        zero = ~jnp.any(x != 0, axis=_axes(x, spec), keepdims=True)
        inner = optax.contrib.scale_by_muon(
            ns_coeffs,
            ns_steps,
            beta=0.0,  # the momentum is ours: this is Newton-Schulz alone
            eps=eps,
            nesterov=False,
            adaptive=adaptive,
            preconditioning=preconditioning,  # pyright: ignore[reportArgumentType]
            weight_dimension_numbers=spec,
        )
        # Ones stand in for a zero matrix before the norm, not after: see safe_norm.
        x = jnp.where(zero, jnp.ones_like(x), x)
        direction: Any = inner.update(x, inner.init(x))[0]
        fan_in, fan_out = (math.prod(x.shape[a] for a in axes) for axes in _sides(x, spec))
        if consistent_rms is None:
            scale = math.sqrt(max(1.0, fan_out / fan_in))
        else:
            scale = math.sqrt(max(fan_in, fan_out)) * consistent_rms
        return jnp.where(zero, jnp.zeros_like(x), scale * direction)

    def init(params: Any) -> MuonMomentum:
        zeros = optax.tree.zeros_like(params, dtype=mu_dtype)
        return MuonMomentum(jnp.zeros([], jnp.int32), zeros)

    def update(updates: Any, state: MuonMomentum, params: Any = None) -> tuple[Any, Any]:
        del params
        mu: Any = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = jnp.asarray(optax.safe_increment(state.count))
        if nesterov:
            mu_hat: Any = jax.tree.map(
                lambda m, g: beta * m + (1 - beta) * g,
                optax.tree.bias_correction(mu, beta, optax.safe_increment(count)),
                optax.tree.bias_correction(updates, beta, count),
            )
        else:
            mu_hat = optax.tree.bias_correction(mu, beta, count)
        direction = jax.tree.map(orthogonalise, mu_hat, dimensions(mu_hat))
        return direction, MuonMomentum(count, optax.tree.cast(mu, mu_dtype))

    matrices = optax.chain(
        optax.GradientTransformation(init, update),  # pyright: ignore[reportArgumentType]
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        adam_weight_decay,
        nesterov=nesterov,
    )
    others = drop_in(others, adam_eps_root, name="adam_eps_root")
    return optax_promotion(optax.partition({"muon": matrices, "adam": others}, labels))


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


def _sides(x: jax.Array, spec: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input axes and the output axes of a matrix leaf."""
    sides = ((a,) if isinstance(a, int) else tuple(a) for a in spec)
    reduction, output = (tuple(a % x.ndim for a in axes) for axes in sides)
    return reduction, output


def _axes(x: jax.Array, spec: Any) -> tuple[int, ...]:
    """The axes of one matrix; the others count matrices."""
    reduction, output = _sides(x, spec)
    return reduction + output
