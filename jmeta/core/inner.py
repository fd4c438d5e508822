"""The inner loop: T optimizer steps on the fast weights, and where along it the outer loss is read.

All estimators that unroll share this loop; they differ in how its gradients are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.autodiff import GradTransform, is_mixed_mode, reverse_grad
from jmeta.core.scaling import common_factor, scaled
from jmeta.core.steps import Loop, Remat, require_loop, scan_steps
from jmeta.core.types import Array, Episode, Key, LossFn, Problem, PyTree, Steps, no_encoding
from jmeta.core.updates import updated


class InnerState(NamedTuple):
    """What an inner loop carries, and what a persistent estimator keeps between outer steps.

    Attributes:
        fast: the fast weights.
        opt_state: the inner optimizer's state.
        step: int32 scalar, inner steps taken so far.
    """

    fast: PyTree
    opt_state: PyTree
    step: Array


class Objective(NamedTuple):
    """Where along the inner loop the outer loss is read.

    Attributes:
        name: ``final``, ``multi_step`` or ``online``.
        weights: ``[steps]``, for ``multi_step``: the weight of the outer loss after each step.
    """

    name: str
    weights: Any = None


final = Objective("final")
online = Objective("online")
unscored = Objective("unscored")  # adapts, and reads no outer loss and no query


def multi_step(weights: Sequence[float] | Array) -> Objective:
    r"""The weighted sum of the outer loss after every inner step.

    .. math:: \sum_{t=1}^{T} w_t \, L_{out}(\theta_t)

    Args:
        weights: ``[steps]``, one for each of the steps 1..T.

    Returns:
        An objective for any unrolled estimator.

    Example:
        >>> multi_step([0.5, 0.5]).weights.tolist()
        [0.5, 0.5]

    Source: Antoniou et al., "How to train your MAML" (2019), equation 4.
    """
    return Objective("multi_step", jnp.asarray(weights))


InnerLoop: TypeAlias = Callable[
    [PyTree, InnerState, Episode, Key], tuple[Array, tuple[InnerState, Array, PyTree]]
]


def keys(key: Key, count: int) -> Sequence[Key]:
    """Split a key that may be ``None`` (deterministic) into ``count``.

    Args:
        key: a random key, or None.
        count: how many.

    Returns:
        ``count`` keys, or as many Nones.

    Example:
        >>> keys(None, 2)
        [None, None]
    """
    return [None] * count if key is None else list(jax.random.split(key, count))


def fold(key: Key, number: int | Array) -> Key:
    """``jax.random.fold_in`` for a key that may be ``None``.

    Args:
        key: a random key, or None.
        number: an integer scalar.

    Returns:
        The folded key, or None.

    Example:
        >>> fold(None, 3) is None
        True
    """
    return None if key is None else jax.random.fold_in(key, number)


def start(problem: Problem, meta: PyTree, key: Key) -> InnerState:
    """The state before the first inner step.

    Args:
        problem: whose ``init`` and ``optimizer`` are used.
        meta: the meta-parameters.
        key: a random key, or None.

    Returns:
        Fast weights, a fresh optimizer state and step 0.

    Example:
        >>> problem = Problem(None, None, lambda meta: optax.sgd(0.1))
        >>> start(problem, {"w": jnp.ones(2)}, None).fast
        {'w': Array([1., 1.], dtype=float32)}
    """
    fast = jax.tree.map(jnp.asarray, problem.init(meta, key))
    return InnerState(fast, problem.optimizer(meta).init(fast), jnp.zeros((), jnp.int32))


def checked(loss: LossFn, name: str) -> LossFn:
    """A loss whose answer is checked while it is traced, and whose aux carries no gradient.

    Args:
        loss: ``(fast, meta, batch, key) -> (loss, aux)``.
        name: ``inner_loss`` or ``outer_loss``, for the message.

    Returns:
        The same loss.

    Raises:
        TypeError: the answer is not a pair, or the loss is not a floating-point scalar.

    Example:
        >>> checked(lambda fast, meta, batch, key: (jnp.ones(3), {}), "inner_loss")(0, 0, 0, None)
        Traceback (most recent call last):
        ...
        TypeError: inner_loss returned a loss of shape (3,); a scalar is needed: take its mean
    """

    def checked_loss(fast: PyTree, meta: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        answer = loss(fast, meta, batch, key)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise TypeError(
                f"{name} returned {type(answer).__name__}; it must return the pair (loss, aux), "
                "with aux a dict of metrics ({} if there are none)"
            )
        value, aux = jnp.asarray(answer[0]), answer[1]
        if value.shape:
            raise TypeError(
                f"{name} returned a loss of shape {value.shape}; a scalar is needed: take its mean"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} returned a loss of dtype {value.dtype}; make it a float")
        return value, jax.lax.stop_gradient(aux)

    return checked_loss


def encode_episode(problem: Problem, meta: PyTree, episode: Episode, key: Key) -> Episode:
    """Apply ``problem.encode`` to support and query, once each; over ``Steps`` by ``vmap``.

    Args:
        problem: whose ``encode`` is used.
        meta: the meta-parameters.
        episode: one episode.
        key: a random key, or None.

    Returns:
        The encoded episode.

    Example:
        >>> problem = Problem(None, None, None, encode=lambda meta, x, key: meta * x)
        >>> encode_episode(problem, 2.0, Episode(Steps(jnp.ones(3)), 1.0), None).query
        2.0
    """
    support_key, query_key = keys(key, 2)
    support = encode_batch(problem, meta, episode.support, support_key)
    if episode.query is None:
        return Episode(support)
    return Episode(support, encode_batch(problem, meta, episode.query, query_key))


def encode_batch(problem: Problem, meta: PyTree, batch: PyTree, key: Key) -> PyTree:
    """Apply ``problem.encode`` to one batch, or to each batch of ``Steps`` by ``vmap``.

    Args:
        problem: whose ``encode`` is used.
        meta: the meta-parameters.
        batch: one batch, or ``Steps``.
        key: a random key, or None.

    Returns:
        The encoded batch, or ``Steps`` of encoded batches.

    Example:
        >>> problem = Problem(None, None, None, encode=lambda meta, x, key: meta * x)
        >>> encode_batch(problem, 2.0, Steps(jnp.ones(3)), None).batches.tolist()
        [2.0, 2.0, 2.0]
    """
    if not isinstance(batch, Steps) or problem.encode is no_encoding:
        return batch if problem.encode is no_encoding else problem.encode(meta, batch, key)
    if key is None:
        return Steps(jax.vmap(lambda b: problem.encode(meta, b, None))(batch.batches))
    each = jax.random.split(key, _step_count(batch))
    return Steps(jax.vmap(lambda b, k: problem.encode(meta, b, k))(batch.batches, each))


def _step_count(support: Steps) -> int:
    count = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(support.batches)}
    if len(count) != 1 or count == {()}:
        raise ValueError(
            "every leaf of Steps needs the same leading axis, one batch per inner step; found "
            f"leading axes {sorted(count)}"
        )
    return count.pop()[0]


def step_batches(support: PyTree, steps: int, objective: Objective) -> Steps | None:
    """The batches of the first ``steps`` inner steps, or None where one batch serves them all.

    Args:
        support: an episode's support.
        steps: number of inner steps.
        objective: where the outer loss is read.

    Returns:
        ``Steps`` with leading axis ``steps``, or None.

    Raises:
        ValueError: ``online`` without ``Steps``, or fewer batches than steps.

    Example:
        >>> step_batches(Steps(jnp.arange(5)), 3, final).batches.tolist()
        [0, 1, 2]
    """
    if not isinstance(support, Steps):
        if objective.name == "online":
            raise ValueError(
                "the online objective scores each chunk before it learns from it, so the support "
                "must be jmeta.Steps(chunks) with a leading axis of one chunk per inner step"
            )
        return None
    count = _step_count(support)
    if count < steps:
        raise ValueError(
            f"{steps} inner steps are asked for, but the support has Steps of {count} batches"
        )
    return Steps(jax.tree.map(lambda leaf: leaf[:steps], support.batches))


def inner_loop(
    problem: Problem,
    steps: int,
    *,
    objective: Objective = final,
    remat: Remat = "none",
    grad: GradTransform = reverse_grad,
    loop: Loop = "scan",
) -> InnerLoop:
    r"""Build the inner loop of a problem: ``T`` steps, and the outer loss along them.

    Args:
        problem: the losses, the optimizer and the encoder.
        steps: number of inner steps ``T``; 0 is legal and scores the start.
        objective: ``final`` (on the query, after the last step), ``multi_step(weights)`` (on the
            query, after every step), or ``online`` (on each step's batch, before the update).
        remat: what the backward pass recomputes, see ``scan_steps``.
        grad: how inner gradients are differentiated: ``reverse_grad``, ``stopped_grad`` or
            ``mixed_mode_grad``.
        loop: ``"scan"`` or ``"unroll"``, see ``scan_steps``.

    Returns:
        ``run(meta, state, episode, key) -> (loss, (state, inner_losses[T], aux))``, pure and
        differentiable in ``meta``. ``state`` comes from ``start``.

    Raises:
        ValueError: a negative number of steps; multi-step weights of another length; a ``loop``
            and a ``remat`` that do not go together; see also ``step_batches``.

    Example:
        >>> loss = lambda fast, meta, batch, key: ((fast - batch) ** 2, {})
        >>> problem = Problem(loss, loss, lambda meta: optax.sgd(0.5))
        >>> run = inner_loop(problem, steps=1)
        >>> first = start(problem, 3.0, None)
        >>> value, (state, losses, aux) = run(3.0, first, Episode(1.0, 2.0), None)
        >>> float(state.fast), losses.tolist(), float(value)
        (1.0, [4.0], 1.0)
    """
    require_loop(loop, remat)
    if steps < 0:
        raise ValueError(f"the number of inner steps is {steps}; it cannot be negative")
    if objective.name == "multi_step" and objective.weights.shape != (steps,):
        raise ValueError(
            f"multi_step has weights of shape {objective.weights.shape} for {steps} inner steps; "
            "it needs one weight for each of the steps 1..T"
        )
    if objective.name in ("multi_step", "online") and steps == 0:
        raise ValueError(
            f"the {objective.name} objective reads the loss at each step; it needs one"
        )
    shared = problem.outer_loss is problem.inner_loss
    inner_grad = grad(checked(problem.inner_loss, "inner_loss"))
    outer_loss = checked(problem.outer_loss, "outer_loss")
    # Only mixed mode gains from a scalar rate inside the loss, and ``online`` scores the loss.
    movable = is_mixed_mode(grad) and objective.name != "online"
    scaled_grad = grad(scaled(checked(problem.inner_loss, "inner_loss")))

    def run(meta: PyTree, state: InnerState, episode: Episode, key: Key):
        _require_varying(meta, state.fast, (episode, key))
        encode_key, inner_key, outer_key = keys(key, 3)
        if objective.name == "unscored":
            episode = Episode(episode.support)
        episode = encode_episode(problem, meta, episode, encode_key)
        batches = step_batches(episode.support, steps, objective)
        optimizer = problem.optimizer(meta)
        if objective.name in ("final", "multi_step") and episode.query is None:
            raise ValueError(
                f"the {objective.name} objective scores the query; this episode has none"
            )

        def step(state: InnerState, batch: Steps | None):
            data = episode.support if batch is None else batch.batches
            loss_key = fold(inner_key, state.step)
            scaling = common_factor(optimizer, state.opt_state, state.fast) if movable else None
            if scaling is None:
                loss, aux, grads = inner_grad(state.fast, meta, data, loss_key)
                updates, opt_state = updated(optimizer, grads, state.opt_state, state.fast, loss)
            else:
                factor, opt_state = scaling
                _, loss, updates = scaled_grad(state.fast, (meta, factor), data, loss_key)
                aux = None
            score = None
            if objective.name == "online":
                score = (loss, aux) if shared else outer_loss(state.fast, meta, data, loss_key)
            fast = optax.apply_updates(state.fast, updates)
            state = InnerState(fast, opt_state, state.step + 1)
            if objective.name == "multi_step":
                score = outer_loss(fast, meta, episode.query, fold(outer_key, state.step))
            return state, (jax.lax.stop_gradient(loss), score)

        scores: Any = None
        if steps == 0:
            losses = jnp.zeros((0,))
        else:
            state, (losses, scores) = scan_steps(
                step, state, batches, steps, remat, weights=lambda state: state.fast, loop=loop
            )
        if objective.name == "unscored":
            loss, aux = jnp.zeros(()), {}
        elif objective.name == "final":
            loss, aux = outer_loss(state.fast, meta, episode.query, fold(outer_key, state.step))
        elif objective.name == "multi_step":
            values, auxs = scores
            loss = jnp.sum(objective.weights.astype(values.dtype) * values)
            aux = jax.tree.map(lambda a: a[-1], auxs)
        else:
            values, auxs = scores
            loss, aux = jnp.mean(values), jax.tree.map(lambda a: jnp.mean(a, axis=0), auxs)
        return loss, (state, losses, aux)

    return run


def _require_varying(meta: PyTree, fast: PyTree, data: PyTree) -> None:
    """Refuse to differentiate weights that ``shard_map`` holds equal on all devices.

    The gradient of such weights is summed over the devices by jax, at every inner step.
    """
    axes = frozenset().union(*map(_varying, jax.tree.leaves((meta, fast, data))))
    for leaf in jax.tree.leaves((meta, fast)):
        if equal := axes - _varying(leaf):
            names = ", ".join(sorted(equal))
            raise ValueError(
                f"inside jax.shard_map the data differ along the mesh axis {names} and the "
                "weights do not, so jax would sum the gradient of every inner step over the "
                "devices, and each task would learn from the others' data. Make the weights "
                f"varying first: meta = jax.lax.pcast(meta, {names!r}, to='varying'); or use "
                "jax.jit with NamedSharding (jmeta.runtime.parallel) instead of shard_map"
            )


def _varying(leaf: Any) -> frozenset[str]:
    """The mesh axes along which an array inside ``shard_map`` differs, where jax tracks them."""
    kind: Any = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):  # the name before: vma
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())
