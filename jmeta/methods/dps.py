"""Dynamic parameter selection: fine-tuning where only the weights with large gradients move.

Two stages take turns: all weights learn and are judged, then a share of every matrix learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core.tree import at_least_float32, matches, path_name
from jmeta.core.types import Array, PyTree


class DPSState(NamedTuple):
    """State of ``dps``.

    Attributes:
        step: how many were taken.
        inner: the state of the optimizer.
        importance: sums of squared gradients of this cycle's first stage; 0 for what is no matrix.
        masks: what the second stage updates; True for what is no matrix.
    """

    step: Array
    inner: optax.OptState
    importance: PyTree
    masks: PyTree


class DPSMixState(NamedTuple):
    """State of ``dps_mix``.

    Attributes:
        step: how many were taken.
        inner: the state of the optimizer.
        importance: sums of squared gradients of this cycle's first stage; 0 for what is no matrix.
        masks: what the second stage updates; True for what is no matrix.
        weights: what is trained; the parameters are these mixed with ``origin``.
        origin: the weights that training started from.
        columns: inputs that the parameters take from ``weights``; True for what is no matrix.
        drawn: how often each input was taken in this cycle's first stage.
    """

    step: Array
    inner: optax.OptState
    importance: PyTree
    masks: PyTree
    weights: PyTree
    origin: PyTree
    columns: PyTree
    drawn: PyTree


def dps(
    optimizer: optax.GradientTransformation,
    period: int,
    *,
    drop: float = 0.3,
    stacked: Sequence[str] = ("blocks.**",),
) -> optax.GradientTransformation:
    r"""DPS-dense: an optimizer that spends every second stage on the important weights alone.

    .. math::
        F = \sum_{t \in I} g_t \odot g_t, \qquad
        M_W = [F_W \text{ is among the } \lceil (1 - p) n_W \rceil \text{ largest of } W]

    In stage I, ``period`` steps, all weights are updated as the optimizer says, and squared
    gradients are summed. In stage II, ``period`` steps, the optimizer is given
    :math:`g \odot M` and its update is cut to :math:`M` too, so that neither momentum nor weight
    decay moves a weight outside. Then the sums begin anew. Vectors, such as biases and
    normalisations, are always updated.

    Args:
        optimizer: what updates the weights.
        period: :math:`U`, steps of one stage; the paper takes 5 % of all steps.
        drop: :math:`p`, the share of each matrix that stage II leaves alone.
        stacked: path globs of leaves that hold one matrix for each entry of their leading axis.

    Returns:
        An optax transformation with ``DPSState``. Its update needs no parameters unless the
        optimizer's does.

    Raises:
        ValueError: a period below 1, or a share outside [0, 1).

    Example:
        >>> rule = dps(optax.sgd(1.0), period=1, drop=0.5)
        >>> w = jnp.array([[3.0, 1.0]])
        >>> state = rule.init(w)
        >>> _, state = rule.update(w, state)  # stage I: all learn
        >>> rule.update(w, state)[0].tolist()  # stage II: the half with the larger gradients
        [[-3.0, 0.0]]

    Source: Zhang et al., "Fine-Tuning Pre-Trained Language Models Effectively by Optimizing
    Subnetworks Adaptively" (2022), DPS-dense; their code scales the sums, which orders nothing
    differently, and masks gradients only.
    """
    _check(period, drop)

    def init(params: PyTree) -> DPSState:
        return DPSState(
            jnp.zeros((), jnp.int32),
            optimizer.init(params),
            _of_matrices(
                params, stacked, lambda w, _: jnp.zeros(w.shape, at_least_float32(w.dtype)), 0.0
            ),
            _of_matrices(params, stacked, lambda w, _: jnp.ones(w.shape, bool), True),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, DPSState]:
        first, place = _stage(state.step, period)
        masks = jax.lax.cond(
            place == period,
            lambda: _chosen(updates, state.importance, drop, stacked),
            lambda: state.masks,
        )
        grads = _where(masks, updates, first)
        importance = _summed(state.importance, grads, first, place)
        updates, inner = optimizer.update(grads, state.inner, params)
        return _where(masks, updates, first), DPSState(state.step + 1, inner, importance, masks)

    return optax.GradientTransformation(init, update)


def dps_mix(
    optimizer: optax.GradientTransformation,
    period: int,
    *,
    drop: float = 0.3,
    stacked: Sequence[str] = ("blocks.**",),
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""DPS-mix: stage I judges random sub-networks, the rest of which is as it was pre-trained.

    For every gradient of stage I each input of each matrix is kept with probability
    :math:`1 - p`, :math:`m \in \{0, 1\}`, and the gradient is taken at

    .. math:: \tilde W = \frac{(1 - m) W_0 + m W - p W_0}{1 - p},
        \qquad F = \sum_{t \in I} (g_t \odot m_t)^2

    A weight's score is :math:`F / c`, c the number of times its input was kept, times
    :math:`e^{-c/U}` where :math:`U \ge 50`. Stage II is that of ``dps``, at :math:`W` itself.

    As with ``optax.contrib.schedule_free``, the parameters of the training loop are where the
    next gradient is to be taken, :math:`\tilde W`; what is trained, :math:`W`, is
    ``optax.tree.get(state, "weights")``. Evaluate that.

    Args:
        optimizer: what updates :math:`W`.
        period: :math:`U`, steps of one stage.
        drop: :math:`p`, the share of inputs drawn from the start in stage I, and of each matrix
            that stage II leaves alone.
        stacked: path globs of leaves that hold one matrix for each entry of their leading axis.
        seed: of the draws.

    Returns:
        An optax transformation with ``DPSMixState``; its update needs the parameters.

    Raises:
        ValueError: a period below 1, a share outside [0, 1), or an update without parameters.

    Example:
        >>> rule = dps_mix(optax.sgd(1.0), period=1, drop=0.5)
        >>> w = jnp.ones((3, 2))
        >>> state = rule.init(w)
        >>> updates, state = rule.update(w, state, w)
        >>> state.drawn.ravel().tolist() == state.importance.any(1).tolist()
        True

    Source: as ``dps``; Lee et al., "Mixout" (2020), for :math:`\tilde W`.
    """
    _check(period, drop)

    def columns(params: PyTree, count: Array, mixed: Array) -> PyTree:
        """Which inputs the parameters take from the weights at a step; all of them in stage II."""
        key = jax.random.fold_in(jax.random.key(seed), count)

        def draw(w: Array, index: int) -> Array:
            shape = (*w.shape[:-1], 1)
            kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - drop, shape)
            return kept | ~mixed

        return _of_matrices(params, stacked, draw, True)

    def init(params: PyTree) -> DPSMixState:
        # The weights are their own origin, so that the parameters given are mixed already.
        return DPSMixState(
            jnp.zeros((), jnp.int32),
            optimizer.init(params),
            _of_matrices(
                params, stacked, lambda w, _: jnp.zeros(w.shape, at_least_float32(w.dtype)), 0.0
            ),
            _of_matrices(params, stacked, lambda w, _: jnp.ones(w.shape, bool), True),
            params,
            params,
            columns(params, jnp.zeros((), jnp.int32), jnp.ones((), bool)),
            _of_matrices(params, stacked, lambda w, _: jnp.zeros((*w.shape[:-1], 1), int), 0),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, DPSMixState]:
        if params is None:
            raise ValueError("dps_mix moves the parameters to where it wants a gradient: pass them")
        first, place = _stage(state.step, period)
        drawn = jax.tree.map(
            lambda n, m: jnp.where(first, jnp.where(place == 0, 0, n) + m.astype(n.dtype), n),
            state.drawn,
            state.columns,
        )
        masks = jax.lax.cond(
            place == period,
            lambda: _chosen(updates, _scores(state, period), drop, stacked),
            lambda: state.masks,
        )
        # The chain rule through the mixture; in stage II, where nothing is mixed, the mask.
        through = jax.tree.map(
            lambda g, m: jnp.where(first & _is_matrix(m), g * m.astype(g.dtype) / (1 - drop), g),
            updates, state.columns,
        )  # fmt: skip
        through = _where(masks, through, first)
        importance = _summed(state.importance, through, first, place)
        updates, inner = optimizer.update(through, state.inner, state.weights)
        weights = optax.apply_updates(state.weights, _where(masks, updates, first))
        count = state.step + 1
        mixed = _stage(count, period)[0]
        kept = columns(params, count, mixed)

        def move(w: Array, origin: Array, m: Array, now: Array) -> Array:
            if not _is_matrix(m):
                return w - now
            part = (jnp.where(m, w, origin) - drop * origin) / (1 - drop)
            return jnp.where(mixed, part.astype(w.dtype), w) - now

        moves = jax.tree.map(move, weights, state.origin, kept, params)
        return moves, DPSMixState(
            count, inner, importance, masks, weights, state.origin, kept, drawn
        )

    return optax.GradientTransformation(init, update)


def _check(period: int, drop: float) -> None:
    if period < 1 or not 0 <= drop < 1:
        raise ValueError(
            f"stages of {period} steps that drop a share of {drop}: at least 1 step, and a share "
            "in [0, 1)"
        )


def _stage(count: Array, period: int) -> tuple[Array, Array]:
    """Whether a step is of stage I, and its place in the cycle of both stages."""
    place = count % (2 * period)
    return place < period, place


def _of_matrices(
    tree: PyTree, stacked: Sequence[str], make: Callable[[Array, int], Array], other: Any
) -> PyTree:
    """A leaf made of each matrix or stack of matrices and its number, a scalar for the rest."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return structure.unflatten(
        [
            make(leaf, i) if leaf.ndim - _is_stacked(path, stacked) >= 2 else jnp.asarray(other)
            for i, (path, leaf) in enumerate(leaves)
        ]
    )


def _is_stacked(path: tuple[Any, ...], stacked: Sequence[str]) -> bool:
    return any(matches(path_name(path), glob) for glob in stacked)


def _is_matrix(leaf: Array) -> bool:
    return leaf.ndim > 0


def _where(masks: PyTree, tree: PyTree, always: Array) -> PyTree:
    return jax.tree.map(lambda m, x: jnp.where(m | always, x, jnp.zeros_like(x)), masks, tree)


def _summed(importance: PyTree, grads: PyTree, first: Array, place: Array) -> PyTree:
    """Squared gradients of stage I so far."""

    def add(total: Array, g: Array) -> Array:
        if not _is_matrix(total):
            return total
        square = jnp.square(g.astype(total.dtype))
        return jnp.where(first, jnp.where(place == 0, 0, total) + square, total)

    return jax.tree.map(add, importance, grads)


def _scores(state: DPSMixState, period: int) -> PyTree:
    """Squared gradients per draw; often drawn ones count less in long stages, as published."""

    def score(total: Array, n: Array) -> Array:
        if not _is_matrix(total):
            return total
        times = n.astype(total.dtype)
        found = total / jnp.maximum(times, 1)
        return found * jnp.exp(-times / period) if period >= 50 else found

    return jax.tree.map(score, state.importance, state.drawn)


def _chosen(tree: PyTree, scores: PyTree, drop: float, stacked: Sequence[str]) -> PyTree:
    """The largest scores of each matrix: exactly that many, ties by their place."""

    def choose(path: tuple[Any, ...], leaf: Array, score: Array) -> Array:
        if not _is_matrix(score):
            return jnp.ones((), bool)
        rows = score.reshape(leaf.shape[0] if _is_stacked(path, stacked) else 1, -1)
        keep = math.ceil((1 - drop) * rows.shape[1] - 1e-9)  # 0.7 * 10 is no more than 7
        best = jnp.argsort(-rows, axis=1)[:, :keep]
        mask = jax.vmap(lambda row: jnp.zeros(rows.shape[1], bool).at[row].set(True))(best)
        return mask.reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(choose, tree, scores)
