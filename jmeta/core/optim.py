r"""Inner optimizers that stay differentiable: drop-in for optax's, with finite second derivatives.

Backpropagating through an optax optimizer gives NaN wherever an inner gradient is exactly zero:
the outgoing weights of a dead unit, an embedding row that the support set never reads, a whole
layer that the loss does not touch. The chain rule meets :math:`\sqrt{v}'` at :math:`v = 0`, and
:math:`0 \cdot \infty` is not a number. The functions here have optax's names, arguments, states
(``muon`` has its own) and updates, and a finite derivative there. ``optax.sgd``, momentum
included, needs none of this.

What optax 0.2.8 does, in float32, three inner steps, where the inner gradient is zero
in some *entries* of a leaf (a dead unit, an unseen row), and in a *whole leaf*:

===============================================================  =========  ==========  ==========
optax                                                            entries    whole leaf  here
===============================================================  =========  ==========  ==========
adam, adamw, nadam, nadamw, amsgrad, radam, lamb, adafactor      NaN        NaN         same name
contrib.muon                                                     NaN [1]_   NaN         same name
lars, clip_by_global_norm [2]_, clip_by_block_rms                finite     NaN         same name
novograd                                                         finite     NaN         --
optimistic_adam_v2, rmsprop(eps_in_sqrt=False)                   NaN        NaN         -- [3]_
adaptive_grad_clip                                               NaN        NaN         --
contrib.ademamix, simplified_ademamix, adopt, madgrad, prodigy,  NaN        NaN         --
dadapt_adamw, schedule_free_adamw, dog, galore
contrib.dowg                                                     finite     NaN         --
sgd, momentum, nesterov, rmsprop, adagrad, adadelta, adamax,     finite     finite      not needed
adamaxw, adan, adabelief, optimistic_gradient_descent, sm3,
yogi, fromage, noisy_sgd, contrib.cocob, contrib.acprop
lion, signum, sign_sgd, rprop                                    finite     finite      [4]_
===============================================================  =========  ==========  ==========

.. [1] In the leaves it gives to Adam, those that are not matrices.
.. [2] When the gradient of every leaf is zero.
.. [3] Pass ``eps_root=1e-16`` to ``optimistic_adam_v2``; leave ``eps_in_sqrt`` at its default.
.. [4] Their update is a sign: its derivative is zero everywhere, so no meta-gradient flows through
   the inner *gradient*; the initialisation and the learning rate still receive theirs (``rprop``'s
   rate only adapts by comparisons). They are first order whatever the estimator.

**Which form.** ``eps_root=1e-16`` inside the root changes a step by less than 2e-4 of itself for
gradients above 5e-7; the often advised 1e-8 cuts the first step of a gradient of 1e-5 to 10 %.
The derivative at zero is then finite but large, up to :math:`\eta / (\sqrt{\mathrm{eps\_root}} +
\mathrm{eps})`, that is :math:`5 \cdot 10^7 \eta`. The ``*_stopped`` forms keep optax's update to
the last bit, treat the denominator as a constant and have derivative zero where it is zero; they
omit a true term of the meta-gradient. :func:`probe` measures the size for any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.learned_rates import (
    PerStepState,
    init_rates,
    learned_sgd,
    per_step,
    scale_by_step_tree,
    scale_by_tree,
)
from jmeta.core.muon import muon
from jmeta.core.optim_pieces import (
    EPS_ROOT,
    Number,
    clip_by_block_rms,
    clip_by_global_norm,
    drop_in,
    optax_promotion,
    scale_by_adam_stopped,
    scale_by_radam,
    scale_by_trust_ratio,
)
from jmeta.core.optim_probe import LeafProbe, ProbeReport, check, probe

__all__ = [
    "EPS_ROOT",
    "LeafProbe",
    "PerStepState",
    "ProbeReport",
    "adafactor",
    "adam",
    "adam_stopped",
    "adamw",
    "adamw_stopped",
    "amsgrad",
    "check",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "init_rates",
    "lamb",
    "lars",
    "learned_sgd",
    "muon",
    "nadam",
    "nadamw",
    "per_step",
    "probe",
    "radam",
    "scale_by_adam_stopped",
    "scale_by_radam",
    "scale_by_step_tree",
    "scale_by_tree",
    "scale_by_trust_ratio",
]

Rate: TypeAlias = optax.ScalarOrSchedule
Mask: TypeAlias = Any | Callable[[Any], Any] | None


def adam(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = EPS_ROOT,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose second derivative is finite where an inner gradient is zero.

    .. math::
        u = -\eta\, \hat m / (\sqrt{\hat v + \mathrm{eps\_root}} + \mathrm{eps})

    Args:
        learning_rate: a number, a (meta-learned) scalar array, or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
        eps_root: added inside the root; must be positive in the dtype of every leaf.
        mu_dtype: dtype of the first moment; the parameter's by default.
        nesterov: Nesterov momentum, see :func:`nadam`.

    Returns:
        an optax transformation with optax's own state.

    Raises:
        ValueError: at ``init``, if ``eps_root`` is zero in the dtype of a leaf (float16).

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def adapted(theta, optimizer):  # the inner loss does not depend on the second weight
        ...     grads = jax.grad(lambda t: jnp.sum((t * jnp.array([1.0, 0.0])) ** 2))(theta)
        ...     update, _ = optimizer.update(grads, optimizer.init(theta), theta)
        ...     return jnp.sum(theta + update)
        >>> theta = jnp.array([1.0, 1.0])
        >>> with jax.numpy_dtype_promotion("standard"):  # optax's needs it
        ...     theirs = jax.grad(adapted)(theta, optax.adam(0.1))
        >>> print(jax.grad(adapted)(theta, adam(0.1)), theirs)
        [1. 1.] [ 1. nan]

    Source: Kingma and Ba (2015), arXiv 1412.6980, algorithm 1; ``eps_root`` as in ``optax.adam``.
    """
    tx = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return drop_in(tx, eps_root)


def nadam(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = EPS_ROOT,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`adam` with Nesterov momentum (Dozat, 2016); arguments as there."""
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=True)


def adamw(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = EPS_ROOT,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """:func:`adam` with decoupled weight decay.

    Args:
        learning_rate: a number, a (meta-learned) scalar array, or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
        eps_root: added inside the root; must be positive in the dtype of every leaf.
        mu_dtype: dtype of the first moment; the parameter's by default.
        weight_decay: strength of the decay, multiplied by the learning rate.
        mask: which leaves decay: a pytree of booleans, a prefix of one, or a function giving it.
        nesterov: Nesterov momentum, see :func:`nadamw`.

    Returns:
        an optax transformation with optax's own state.

    Raises:
        ValueError: at ``init``, if ``eps_root`` is zero in the dtype of a leaf (float16).

    Source: Loshchilov and Hutter (2019), arXiv 1711.05101, algorithm 2.
    """
    tx = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
    return drop_in(tx, eps_root)


def nadamw(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = EPS_ROOT,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`adamw` with Nesterov momentum; arguments as there."""
    return adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=True)


def amsgrad(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = EPS_ROOT,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad, Adam with the running maximum of the second moment; arguments as :func:`adam`.

    Source: Reddi, Kale and Kumar (2018), "On the convergence of Adam and beyond", algorithm 2,
    with optax's bias corrections.
    """
    tx = optax.amsgrad(learning_rate, b1, b2, eps, eps_root, mu_dtype)
    return drop_in(tx, eps_root)


def radam(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = EPS_ROOT,
    threshold: Number = 5.0,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rectified Adam; see :func:`scale_by_radam` for why ``eps_root`` alone is not enough.

    Args:
        learning_rate: a number, a (meta-learned) scalar array, or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
        eps_root: added inside the root; must be positive in the dtype of every leaf.
        threshold: the variance is taken as tractable from this length of moving average on.
        nesterov: Nesterov momentum.

    Returns:
        an optax transformation with optax's own state.

    Raises:
        ValueError: at ``init``, if ``eps_root`` is zero in the dtype of a leaf (float16).

    Source: Liu et al. (2020), arXiv 1908.03265, algorithm 2.
    """
    tx = optax.chain(
        scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
    return drop_in(tx, eps_root)


def lamb(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    eps_root: Number = EPS_ROOT,
    weight_decay: Rate = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """LAMB: :func:`adamw` with one trust ratio per leaf; arguments as there.

    Source: You et al. (2020), arXiv 1904.00962, algorithm 2.
    """
    tx = optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root),
        optax.add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        optax.scale_by_learning_rate(learning_rate),
    )
    return drop_in(tx, eps_root)


def lars(
    learning_rate: Rate,
    weight_decay: Rate = 0.0,
    weight_decay_mask: Mask = True,
    trust_coefficient: Number = 0.001,
    eps: Number = 0.0,
    trust_ratio_mask: Mask = True,
    momentum: Number = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """LARS, momentum with one trust ratio per leaf; arguments as ``optax.lars``.

    Source: You, Gitman and Ginsburg (2017), arXiv 1708.03888, algorithm 1.
    """
    trust = scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
        optax.masked(trust, mask=trust_ratio_mask),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(decay=momentum, nesterov=nesterov),  # pyright: ignore[reportArgumentType]
    )
    return optax_promotion(tx)


def adafactor(
    learning_rate: Rate | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Number = 0.8,
    decay_offset: Number = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Number | None = 1.0,
    momentum: Number | None = None,
    dtype_momentum: jax.typing.DTypeLike = jnp.float32,
    weight_decay_rate: Rate | None = None,
    eps: Number = EPS_ROOT,
    factored: bool = True,
    weight_decay_mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor; arguments as ``optax.adafactor``, with ``eps`` 1e-16 in place of 1e-30.

    The derivative of :math:`v^{-1/2}` at 1e-30 is :math:`5 \cdot 10^{44}`, which float32 does not
    have; at 1e-16 it is :math:`5 \cdot 10^{23}`.

    Raises:
        ValueError: at ``init``, if ``eps`` is zero in the dtype of a leaf (float16).

    Source: Shazeer and Stern (2018), arXiv 1804.04235, algorithms 4 and 5.
    """
    steps = [
        optax.scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)
    ]
    if clipping_threshold is not None:
        steps.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        steps.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        steps.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        steps.append(optax.add_decayed_weights(weight_decay_rate, mask=weight_decay_mask))
    steps.append(optax.scale(-1))
    return drop_in(optax.chain(*steps), eps, name="eps")


def adam_stopped(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam with its denominator held constant in the meta-gradient: optax's update, bit for bit.

    Args:
        learning_rate: a number, a (meta-learned) scalar array, or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator.
        mu_dtype: dtype of the first moment; the parameter's by default.
        nesterov: Nesterov momentum.

    Returns:
        an optax transformation with optax's own state.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx, g = adam_stopped(0.5), jnp.array([2.0, 0.0])
        >>> step = lambda g: -tx.update(g, tx.init(g))[0]
        >>> slope = jax.grad(lambda g: step(g).sum())(g)  # 0.5 / |g|, and 0
        >>> print(step(g).round(3), slope.round(3))
        [0.5 0. ] [0.25 0.  ]

    Source: ``scale_by_adam_sg_denom`` of DiscoRL (google-deepmind/disco_rl).
    """
    tx = optax.chain(
        scale_by_adam_stopped(b1, b2, eps, mu_dtype, nesterov=nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax_promotion(tx)


def adamw_stopped(
    learning_rate: Rate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    mu_dtype: Any = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """:func:`adam_stopped` with decoupled weight decay; arguments as there and in :func:`adamw`."""
    tx = optax.chain(
        scale_by_adam_stopped(b1, b2, eps, mu_dtype, nesterov=nesterov),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax_promotion(tx)
