"""Task2Vec's variational estimate: how much noise the rows of a network bear, per unit of loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core import optim
from jmeta.core.tree import path_name
from jmeta.core.types import Array, PyTree

Loss: TypeAlias = Callable[[PyTree, PyTree, PyTree], Array]
"""``(fixed, weights, batch) -> mean cross-entropy``."""


def row_of(name: str, leaf: Array) -> tuple[int, ...]:
    """The shape of a leaf's variances: one for each output of a kernel, one for each bias."""
    vector = leaf.ndim < 2 or name.rpartition(".")[2] in ("bias", "scale")
    return leaf.shape if vector else (*leaf.shape[:-2], 1, leaf.shape[-1])


@functools.partial(jax.jit, static_argnames=("loss", "steps", "batch_size", "pairs"))
def variational_precision(
    loss: Loss, fixed: PyTree, weights: PyTree, inputs: PyTree, key: Array, *,
    beta: float = 1e-7, prior: float = 1.0, initial: float = 1e-6, rate: float = 1e-2,
    steps: int = 2000, batch_size: int = 32, pairs: int = 1,
) -> PyTree:  # fmt: skip
    r"""Precisions of the widest noise that a network's weights bear, one for each output row.

    .. math:: \min_\Lambda \mathbb{E}_{w \sim N(\hat w, \Lambda)} [L(w)]
        + \beta \, KL(N(0, \Lambda) \,\|\, N(0, \lambda^2 I))

    Where the loss is quadratic with Hessian H, the minimum is, for weights of one row,

    .. math:: \frac{1}{\Lambda} = \frac{1}{\beta n} \sum_{i=1}^n H_{ii} + \frac{1}{\lambda^2}

    so that :math:`\beta / \Lambda` stands beside the rows of ``fisher``; it is robust where the
    loss is not smooth. The weights are never changed.

    Args:
        loss: ``(fixed, weights, batch) -> mean cross-entropy`` of the task's labels.
        fixed: what has no noise, passed on.
        weights: :math:`\hat w`.
        inputs: a pytree of ``[examples, ...]``, labels included.
        key: of noise and batches.
        beta: the price of information.
        prior: :math:`\lambda^2`.
        initial: variances at the start.
        rate: Adam's, on log-variances; it falls to zero along a cosine.
        steps: of Adam.
        batch_size: examples of a step.
        pairs: antithetic pairs of noise in a step.

    Returns:
        A pytree of :math:`1 / \Lambda`: kernels ``[..., in, out]`` have ``[..., out]``.

    Example:
        >>> quadratic = lambda fixed, w, batch: 0.5 * (w**2).sum() * 3.0
        >>> found = variational_precision(quadratic, (), jnp.zeros(2), jnp.zeros((1, 1)),
        ...     jax.random.key(0), beta=1.0, initial=0.1, rate=0.05)
        >>> bool(jnp.allclose(found, 4.0, rtol=0.1))  # 3 / 1 + 1 / 1
        True

    Source: Achille et al., "Task2Vec" (2019), section 3.1; one variance for each row here.
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    size = min(batch_size, count)
    begin = jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.full(row_of(path_name(path), w), jnp.log(initial), w.dtype), weights
    )

    def noisy(logs: PyTree, noise: PyTree, sign: float) -> PyTree:
        return jax.tree.map(
            lambda w, log, e: w + sign * jnp.broadcast_to(jnp.exp(log / 2), w.shape) * e,
            weights, logs, noise,
        )  # fmt: skip

    def information(logs: PyTree) -> Array:
        each = jax.tree.map(
            lambda w, log: w.size / log.size * (jnp.exp(log) / prior - log).sum(), weights, logs
        )
        return 0.5 * jnp.stack(jax.tree.leaves(each)).sum()

    def objective(logs: PyTree, key: Array) -> Array:
        rows, noise_key = jax.random.split(key)
        take = jax.random.choice(rows, count, (size,), replace=False)
        batch = jax.tree.map(lambda x: x[take], inputs)

        def pair(key: Array) -> Array:
            noise = optax.tree.random_like(key, weights, jax.random.normal)
            # Both signs of the same noise: what is odd in it cancels.
            plus, minus = (loss(fixed, noisy(logs, noise, s), batch) for s in (1.0, -1.0))
            return (plus + minus) / 2

        keys = jax.random.split(noise_key, pairs)
        return jax.lax.map(pair, keys).mean() + beta * information(logs)

    # Gradients are of the size of beta: nothing is added to their root mean square.
    rule = optim.adam(optax.cosine_decay_schedule(rate, steps), eps=1e-16, eps_root=1e-30)

    def step(carry: tuple[PyTree, PyTree], number: Array) -> tuple[tuple[PyTree, PyTree], None]:
        logs, state = carry
        grads = jax.grad(objective)(logs, jax.random.fold_in(key, number))
        updates, state = rule.update(grads, state, logs)
        return (optax.apply_updates(logs, updates), state), None

    (logs, _), _ = jax.lax.scan(step, (begin, rule.init(begin)), jnp.arange(steps))

    def precision(w: Array, log: Array) -> Array:
        found = jnp.exp(-log)
        return found.squeeze(-2) if found.shape != w.shape and w.ndim >= 2 else found

    return jax.tree.map(precision, weights, logs)
