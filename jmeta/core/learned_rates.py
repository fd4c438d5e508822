r"""Learned learning rates: for each leaf, layer, parameter or inner step, as meta-parameters.

``Problem.optimizer`` is a function of meta, so a learned rate is an argument, not a mutation:
``optimizer=lambda meta: learned_sgd(meta["rates"])``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmeta.core.tree import at_least_float32, matches, path_name


class PerStepState(NamedTuple):
    """State of a per-step rate.

    Attributes:
        count: steps taken so far, int32.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def scale_by_tree(rates: Any) -> optax.GradientTransformation:
    r"""Multiplies each update by its own factor: :math:`u \leftarrow r \odot u`.

    For learned rates on top of another direction:
    ``optax.chain(optax.scale_by_adam(eps_root=1e-16), scale_by_tree(rates), optax.scale(-1.0))``.

    Args:
        rates: a scalar for all leaves, or a pytree with the structure of the parameters or a
            prefix of it (one entry then stands for everything below it). The shape of an entry is
            () for a leaf, a leading part of the leaf's shape (``[L]`` for layers stacked as
            ``[L, ...]``), the leaf's own shape (a rate for each parameter), or of the same rank
            with ones.

    Returns:
        a stateless transformation. Updates keep their dtype.

    Raises:
        ValueError: at ``init``, naming the leaf: no rate, a rate for nothing, a shape that does
            not fit.
    """

    def init(params: Any) -> optax.EmptyState:
        _spread(rates, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(jnp.multiply, _spread(rates, updates), updates), state

    return optax.GradientTransformation(init, update)


def learned_sgd(rates: Any) -> optax.GradientTransformation:
    r"""Gradient descent with learned rates: :math:`u = -r \odot g`.

    Args:
        rates: see :func:`scale_by_tree`. A scalar is MAML with a learned rate; one for each
            parameter is Meta-SGD.

    Returns:
        a stateless transformation.

    Raises:
        ValueError: see :func:`scale_by_tree`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
        >>> tx = learned_sgd({"w": jnp.array([0.1, 0.2]), "b": jnp.float32(1.0)})  # w: by row
        >>> update, _ = tx.update(params, tx.init(params))
        >>> print(update["w"])
        [[-0.1 -0.1 -0.1]
         [-0.2 -0.2 -0.2]]
        >>> learned_sgd({"w": jnp.float32(0.1)}).init(params)
        Traceback (most recent call last):
        ...
        ValueError: no learning rate for leaf 'b': there are rates for 'w'

    Source: Li et al. (2017), Meta-SGD, arXiv 1707.09835, equation 4.
    """
    positive = scale_by_tree(rates)
    return optax.GradientTransformation(positive.init, _descending(positive.update))


def scale_by_step_tree(rates: Any) -> optax.GradientTransformation:
    """:func:`scale_by_tree` with a rate for each step; see :func:`per_step` for the shapes."""
    for path, rate in jax.tree_util.tree_leaves_with_path(rates):
        if jnp.ndim(rate) == 0:
            raise ValueError(
                f"per-step rate {path_name(path)!r} is a scalar: it needs a leading [steps] axis "
                "(init_rates(params, value, steps=T)); for one rate at all steps use learned_sgd"
            )
    lengths = {
        path_name(path): jnp.shape(rate)[0]
        for path, rate in jax.tree_util.tree_leaves_with_path(rates)
    }
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"per-step rates must have the same number of steps >= 1: {lengths}")
    last = next(iter(lengths.values()), 1) - 1

    def at(step: jax.Array) -> Any:
        step = jnp.minimum(step, last)
        return jax.tree.map(lambda r: jax.lax.dynamic_index_in_dim(r, step, keepdims=False), rates)

    def init(params: Any) -> PerStepState:
        _spread(jax.tree.map(lambda r: r[0], rates), params)
        return PerStepState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        updates = jax.tree.map(jnp.multiply, _spread(at(state.count), updates), updates)
        return updates, PerStepState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


def per_step(rates: Any) -> optax.GradientTransformation:
    r"""Gradient descent with a learned rate for each layer and step: :math:`u_t = -r_t \odot g_t`.

    Beyond the last rate the last one is used: adapting for longer than was meta-trained is
    ordinary at evaluation.

    Args:
        rates: as in :func:`scale_by_tree`, each array with a leading ``[steps]`` axis: ``[steps]``
            for a leaf, ``[steps, L]`` for layers stacked as ``[L, ...]``,
            ``[steps, *leaf.shape]`` for a rate for each parameter.

    Returns:
        a transformation whose state is :class:`PerStepState`.

    Raises:
        ValueError: for rates without a step axis or with different numbers of steps; at ``init``
            as :func:`scale_by_tree`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = per_step(jnp.array([0.5, 0.25]))
        >>> state, moves = tx.init(jnp.float32(1.0)), []
        >>> for _ in range(3):
        ...     update, state = tx.update(jnp.float32(1.0), state)
        ...     moves.append(float(update))
        >>> moves
        [-0.5, -0.25, -0.25]

    Source: Antoniou, Edwards and Storkey (2019), MAML++, arXiv 1810.09502, section 4, LSLR.
    """
    positive = scale_by_step_tree(rates)
    return optax.GradientTransformation(positive.init, _descending(positive.update))


def init_rates(
    params: Any,
    value: float,
    *,
    steps: int | None = None,
    per: Literal["leaf", "layer", "element"] = "leaf",
    stacked: str = "**",
) -> Any:
    """Rates that all start at ``value``: for :func:`learned_sgd`, with ``steps`` :func:`per_step`.

    Args:
        params: the fast weights.
        value: the first value of every rate.
        steps: number of inner steps, for a rate at each; None for one rate at all steps.
        per: "leaf": one rate for each leaf; "layer": one for each index of the leading axis of the
            stacked leaves, and one for each other leaf; "element": one for each parameter.
        stacked: for "layer", the path glob (``blocks.**``; ``*`` is one name, ``**`` any number)
            of the leaves that stack their layers on the leading axis. By default all of them.

    Returns:
        a pytree with the structure of ``params`` and shapes ``[steps?] + ()``, ``[L]`` or the
        leaf's; of the leaf's dtype, at least float32 (a bfloat16 rate could not be learned).

    Raises:
        ValueError: for another ``per``, ``steps < 1``, or a glob that matches no leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"blocks": {"w": jnp.ones((4, 8, 8))}, "head": jnp.ones((8, 2))}
        >>> rates = init_rates(params, 0.1, steps=5, per="layer", stacked="blocks.**")
        >>> jax.tree.map(jnp.shape, rates)
        {'blocks': {'w': (5, 4)}, 'head': (5,)}
    """
    if per not in ("leaf", "layer", "element"):
        raise ValueError(f"init_rates: per must be 'leaf', 'layer' or 'element', not {per!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"init_rates: steps must be at least 1, not {steps}")
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if per == "layer" and not any(matches(name, stacked) for name in names):
        raise ValueError(f"init_rates: stacked={stacked!r} matches none of the leaves {names}")

    def rate(path: Any, leaf: Any) -> jax.Array:
        shape = jnp.shape(leaf)
        if per == "leaf":
            shape = ()
        elif per == "layer":
            shape = shape[:1] if matches(path_name(path), stacked) else ()
        dtype = at_least_float32(jnp.result_type(leaf))
        return jnp.full(shape if steps is None else (steps, *shape), value, dtype)

    return jax.tree_util.tree_map_with_path(rate, params)


def _descending(scale: Any) -> Any:
    """The update of ``scale`` with its sign flipped: optax adds updates."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled, state = scale(updates, state, params)
        return jax.tree.map(jnp.negative, scaled), state

    return update


def _spread(rates: Any, params: Any) -> Any:
    """``rates`` with the structure of ``params``, in their dtypes, ready to be multiplied."""
    given = dict(jax.tree_util.tree_leaves_with_path(rates))
    used = set()

    def find(path: Any, leaf: Any) -> jax.Array:
        at = next((path[:n] for n in range(len(path) + 1) if path[:n] in given), None)
        if at is None:
            known = ", ".join(repr(path_name(p)) for p in given) or "nothing"
            raise ValueError(
                f"no learning rate for leaf {path_name(path)!r}: there are rates for {known}"
            )
        used.add(at)
        rate, shape = jnp.asarray(given[at]), jnp.shape(leaf)
        missing = len(shape) - rate.ndim
        fits = missing >= 0 and all(r in (s, 1) for r, s in zip(rate.shape, shape, strict=False))
        if not fits:
            raise ValueError(
                f"the learning rate of leaf {path_name(path)!r} has shape {rate.shape}, which is "
                f"not (), {shape}, nor a leading part of it"
            )
        return rate.reshape(rate.shape + (1,) * missing).astype(jnp.result_type(leaf))

    spread = jax.tree_util.tree_map_with_path(find, params)
    unused = [path_name(path) for path in given if path not in used]
    if unused:
        raise ValueError(f"learning rates for no leaf of the parameters: {', '.join(unused)}")
    return spread
