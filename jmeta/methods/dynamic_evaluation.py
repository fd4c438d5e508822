"""Dynamic evaluation: a model goes on learning from a document while it is scored on it.

Each segment is scored first and learned from afterwards; every document starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.tree import merge, partition
from jmeta.core.types import Array, PyTree
from jmeta.core.updates import updated

SegmentLoss: TypeAlias = Callable[[PyTree, PyTree, PyTree], tuple[Array, tuple[PyTree, PyTree]]]


class Evaluated(NamedTuple):
    """What the evaluation of a document gives.

    Attributes:
        losses: ``[segments]``, each segment's loss before the model learned from it.
        aux: what the loss returned beside it, ``[segments, ...]``.
        params: the model after the last segment.
        carry: what the loss carried over from the last segment.
    """

    losses: Array
    aux: PyTree
    params: PyTree
    carry: PyTree


class _Start(NamedTuple):
    params: PyTree


def plain(loss: Callable[[PyTree, PyTree], tuple[Array, PyTree]]) -> SegmentLoss:
    """A loss of segments that carries nothing from one to the next.

    Args:
        loss: ``(params, segment) -> (loss, aux)``.

    Returns:
        ``(params, carry, segment) -> (loss, (carry, aux))``.
    """

    def segment_loss(params: PyTree, carry: PyTree, segment: PyTree):
        value, aux = loss(params, segment)
        return value, (carry, aux)

    return segment_loss


def dynamic_evaluation(
    loss: SegmentLoss,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    segments: PyTree,
    carry: PyTree = (),
    *globs: str,
) -> Evaluated:
    r"""Scores a document segment by segment, with a step of an optimizer after each.

    .. math:: \ell_s = L(\theta_{s-1}; x_s), \qquad
        \theta_s = \theta_{s-1} + \mathrm{optimizer}(\nabla L(\theta_{s-1}; x_s))

    Args:
        loss: ``(params, carry, segment) -> (loss, (carry, aux))``, the mean over the segment. A
            step takes what is carried as given; a derivative of the whole goes through it.
            ``plain`` makes one of a loss without a carry.
        optimizer: any optax optimizer, such as ``sgd_towards_start`` or ``rms_towards_start``.
        params: the model at the start of the document.
        segments: a pytree of arrays ``[segments, ...]``.
        carry: what the first segment gets: an empty cache, say.
        *globs: path globs of what learns, such as ``"blocks.mlp.**"``; none: everything.

    Returns:
        An ``Evaluated``. ``jax.vmap`` over documents gives each its own copy of what learns.

    Raises:
        ValueError: a glob matches nothing.

    Example:
        >>> loss = plain(lambda theta, x: ((theta - x) ** 2, {}))
        >>> found = dynamic_evaluation(loss, optax.sgd(0.25), jnp.zeros(()), jnp.array([4.0, 4.0]))
        >>> found.losses.tolist(), float(found.params)
        ([16.0, 4.0], 3.0)

    Source: Krause et al., "Dynamic Evaluation of Neural Sequence Models" (2018), section 3.
    """
    learning, fixed = partition(params, *(globs or ("**",)))

    def scored(learning: PyTree, carry: PyTree, segment: PyTree):
        return loss(merge(learning, fixed), carry, segment)

    def step(state: tuple[PyTree, PyTree, PyTree], segment: PyTree):
        learning, opt_state, carry = state
        (value, (carry, aux)), grads = jax.value_and_grad(scored, has_aux=True)(
            learning, carry, segment
        )
        updates, opt_state = updated(optimizer, grads, opt_state, learning, value)
        learning: Any = optax.apply_updates(learning, updates)
        return (learning, opt_state, carry), (value, aux)

    start = jax.tree.map(jnp.asarray, learning)
    state = (start, optimizer.init(start), carry)
    (learning, _, carry), (losses, aux) = jax.lax.scan(step, state, segments)
    return Evaluated(losses, aux, merge(learning, fixed), carry)


def sgd_towards_start(rate: float | Array, decay: float | Array = 0.0) -> Any:
    r"""Gradient descent that is drawn back to where the document began.

    .. math:: \theta \leftarrow \theta + \lambda (\theta_0 - \theta) - \eta g

    Args:
        rate: :math:`\eta`.
        decay: :math:`\lambda`, at most 1.

    Returns:
        An ``optax.GradientTransformation``; its state keeps the start.

    Raises:
        ValueError: a decay outside of [0, 1], which would go beyond the start.

    Example:
        >>> tx = sgd_towards_start(0.0, 0.5)
        >>> updates, _ = tx.update(jnp.ones(()), tx.init(jnp.asarray(2.0)), jnp.asarray(4.0))
        >>> float(updates)
        -1.0

    Source: Krause et al. (2018), equation 3, with the decay of equation 5.
    """
    _check_decay(decay)

    def direction(start: PyTree, grads: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda s, g, p: (decay * (s - p) - rate * g).astype(p.dtype), start, grads, params
        )

    return _from_start(direction)


def rms_towards_start(
    rate: float | Array,
    decay: float | Array,
    statistics: PyTree,
    eps: float = 2e-5,
) -> Any:
    r"""Dynamic evaluation's own rule: steps and decay by the size of the training gradients.

    .. math::
        \theta \leftarrow \theta + \lambda \rho (\theta_0 - \theta)
            - \eta \frac{g}{\sqrt{MS} + \epsilon}, \qquad
        \rho = \min\left(\frac{\sqrt{MS}}{\mathrm{mean} \sqrt{MS}}, \frac1\lambda\right)

    The mean is over all entries of what learns. With :math:`\rho \le 1 / \lambda` no entry goes
    beyond its start.

    Args:
        rate: :math:`\eta`.
        decay: :math:`\lambda`, at least 0.
        statistics: root mean squared gradients, of ``gradient_statistics``: a tree like that of the
            parameters, or one that holds more leaves.
        eps: added to them where they divide.

    Returns:
        An ``optax.GradientTransformation``; its state keeps the start.

    Raises:
        ValueError: a negative decay; when it starts, a parameter without statistics.

    Example:
        >>> tx = rms_towards_start(1.0, 0.5, jnp.array([1.0, 3.0]), eps=0.0)
        >>> start, here = jnp.zeros(2), jnp.array([1.0, 1.0])
        >>> updates, _ = tx.update(jnp.zeros(2), tx.init(start), here)
        >>> updates.tolist()  # of 1: half of the mean; of 3: three halves
        [-0.25, -0.75]

    Source: Krause et al. (2018), equations 4-6.
    """
    if isinstance(decay, float | int) and decay < 0:
        raise ValueError(f"decay={decay} leads away from the start: choose at least 0")

    def direction(start: PyTree, grads: PyTree, params: PyTree) -> PyTree:
        sizes = _matching(statistics, params)
        leaves = jax.tree.leaves(sizes)
        total = sum(jnp.sum(leaf) for leaf in leaves) / sum(leaf.size for leaf in leaves)

        def one(s: Array, g: Array, p: Array, size: Array) -> Array:
            # min(decay * ratio, 1) is decay * min(ratio, 1 / decay), and stands at decay 0 too.
            back = jnp.minimum(decay * size / jnp.where(total == 0, 1, total), 1)
            down = size + eps
            moved = jnp.where(down == 0, 0, rate * g / jnp.where(down == 0, 1, down))
            return (back * (s - p) - moved).astype(p.dtype)

        return jax.tree.map(one, start, grads, params, sizes)

    return _from_start(direction)


def gradient_statistics(
    loss: Callable[[PyTree, PyTree], tuple[Array, PyTree]],
    params: PyTree,
    batches: Iterable[PyTree],
) -> PyTree:
    r"""The root mean square of each parameter's gradient over batches of training data.

    .. math:: \sqrt{MS_j} = \sqrt{\frac1N \sum_{n=1}^N g_{nj}^2}

    Args:
        loss: ``(params, batch) -> (loss, aux)``, the mean over the batch.
        params: the trained model.
        batches: N training batches, of the shapes in which segments come.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: there is no batch.

    Example:
        >>> loss = lambda theta, x: (theta * x, {})
        >>> float(gradient_statistics(loss, jnp.zeros(()), [jnp.asarray(1.0), jnp.asarray(7.0)]))
        5.0

    Source: Krause et al. (2018), section 4.
    """

    @jax.jit
    def add(sums: PyTree, params: PyTree, batch: PyTree) -> PyTree:
        grads = jax.grad(loss, has_aux=True)(params, batch)[0]
        return jax.tree.map(lambda s, g: s + jnp.square(g), sums, grads)

    sums, count = jax.tree.map(jnp.zeros_like, params), 0
    for batch in batches:
        sums, count = add(sums, params, batch), count + 1
    if not count:
        raise ValueError("statistics of gradients need at least one batch of training data")
    return jax.tree.map(lambda s: jnp.sqrt(s / count), sums)


def _from_start(direction: Callable[[PyTree, PyTree, PyTree], PyTree]) -> Any:
    def init(params: PyTree) -> _Start:
        return _Start(params)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("a decay towards the start needs the parameters: update(g, s, params)")
        return direction(state.params, updates, params), state

    return optax.GradientTransformation(init, update)


def _check_decay(decay: float | Array) -> None:
    if isinstance(decay, float | int) and not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} is not in [0, 1]: beyond 1 a step passes the start")


def _matching(statistics: PyTree, params: PyTree) -> PyTree:
    """The statistics of the parameters that are there; ``None`` where another part holds them."""
    try:
        return jax.tree.map(
            lambda p, s: None if p is None else s,
            params,
            statistics,
            is_leaf=lambda leaf: leaf is None,
        )
    except ValueError as error:
        raise ValueError(
            "the gradient statistics do not hold a leaf for each parameter that learns; make them "
            "with gradient_statistics of the same model"
        ) from error
