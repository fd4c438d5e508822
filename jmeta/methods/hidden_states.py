"""HSO: a language model that adapts what it remembers: cached hidden states follow the gradient.

The weights stay as they are. Each state has an optimizer of its own that moves with the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.optim_pieces import optax_promotion
from jmeta.core.types import Array, PyTree


class HiddenStates(NamedTuple):
    """The states of the last tokens, oldest first, each with its own optimizer's state.

    Attributes:
        states: what the model keeps of a token: a pytree of arrays ``[capacity, ...]``.
        present: ``[capacity]``, 1 where there is a state, 0 where there is none yet.
        position: int32 scalar, tokens read so far.
        opt_state: the optimizer's state of every hidden state, arrays ``[capacity, ...]``.
    """

    states: PyTree
    present: Array
    position: Array
    opt_state: PyTree


class HiddenStateOptimizer(NamedTuple):
    """A way to read a text, as two pure functions.

    Attributes:
        init: ``states -> cache``: an empty one; ``states`` are zeros ``[capacity, ...]``, whose
            shapes say what the model keeps of a token.
        step: ``(params, cache, inputs, targets) -> (losses, cache)``: score the window ``[window]``
            with the cache as it is, then adapt the cache to it.
    """

    init: Callable[[PyTree], HiddenStates]
    step: Callable[[PyTree, HiddenStates, Array, Array], tuple[Array, HiddenStates]]


WindowLosses: TypeAlias = Callable[
    [PyTree, HiddenStates, Array, Array, PyTree], tuple[Array, PyTree]
]


def hidden_states(
    window_losses: WindowLosses, optimizer: optax.GradientTransformation, *, steps: int = 1
) -> HiddenStateOptimizer:
    r"""Hidden-state optimisation: score a window, then move the states that it attended to.

    .. math::
        L(H, N) = -\sum_{i \in window} \log p_\theta(x_{i+1} \mid x_{\le i}; H, N), \qquad
        (H, N) \leftarrow (H, N) + \mathrm{optimizer}(\nabla_{H, N} L)

    ``H`` are the cached states and ``N`` those that the window makes itself. The losses returned
    are those before any step, so that nothing is scored by states that have seen it. Then ``N``
    joins the cache, the oldest states leave it, and moments and step counts move along: a state
    keeps the history of its own gradients.

    Args:
        window_losses: ``(params, cache, inputs, targets, shift) -> (losses [window], states)``: a
            model over one window, given the past. It reads ``cache.states``, ``cache.present`` and
            ``cache.position``; ``states`` are arrays ``[window, ...]`` to be kept, and ``shift``,
            of the same structure, is added to them where they are made, before they are attended
            to. ``jmeta.models.cached.token_losses`` is such a function.
        optimizer: of one state; the same for all. The paper's is ``optax.adam``. What it needs to
            know of other states, such as a global norm, it cannot: each is alone.
        steps: gradient steps on each window. For few-shot prompts, one window is the prompt, and
            several steps are taken on it.

    Returns:
        A ``HiddenStateOptimizer`` of one text; ``jax.vmap`` its ``step`` over texts.

    Raises:
        ValueError: a negative number of steps.

    Example:
        >>> def losses(params, cache, inputs, targets, shift):  # remembers what it read, as means
        ...     new = inputs.astype(float)[:, None] + shift
        ...     memory = (cache.states * cache.present[:, None]).sum() + new.sum()
        ...     return (params * memory - targets) ** 2, new
        >>> hso = hidden_states(losses, optax.sgd(0.01))
        >>> cache = hso.init(jnp.zeros((4, 1)))
        >>> first, cache = hso.step(0.5, cache, jnp.array([1, 2]), jnp.array([2.0, 2.0]))
        >>> first.tolist(), cache.present.tolist()
        ([0.25, 0.25], [0.0, 0.0, 1.0, 1.0])
        >>> (cache.states[:, 0] - jnp.array([0, 0, 1, 2])).round(2)  # more than was read
        Array([0.  , 0.  , 0.01, 0.01], dtype=float32)

    Source: Yoshida and Gimpel, "Reconsidering the Past: Optimizing Hidden States in Language
    Models" (2021).
    """
    if steps < 0:
        raise ValueError(f"the number of steps on a window is {steps}; it cannot be negative")
    # One optimizer for each state: moments, but step counts too, have an axis of states, so that
    # all of it can move, and a new state starts with the bias correction of a first step.
    alone = optax_promotion(optax.with_extra_args_support(optimizer))
    init_each, update_each = jax.vmap(alone.init), jax.vmap(alone.update)

    def init(states: PyTree) -> HiddenStates:
        first = jax.tree.leaves(states)[0]
        position = jnp.zeros((), jnp.int32)
        return HiddenStates(
            states, jnp.zeros(first.shape[0], first.dtype), position, init_each(states)
        )

    def step(
        params: PyTree, cache: HiddenStates, inputs: Array, targets: Array
    ) -> tuple[Array, HiddenStates]:
        def total(held: PyTree, shift: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
            losses, new = window_losses(params, cache._replace(states=held), inputs, targets, shift)
            return losses.sum(), (losses, new)

        def zeros(leaf: Array) -> Array:
            return jnp.zeros((inputs.shape[0], *leaf.shape[1:]), leaf.dtype)

        shift = jax.tree.map(zeros, cache.states)
        held, opt_held, opt_new = cache.states, cache.opt_state, init_each(shift)
        losses: Any = None
        new: Any = None
        if steps == 0:
            losses, new = total(held, shift)[1]
        for count in range(steps):
            slopes, (found, new) = jax.grad(total, argnums=(0, 1), has_aux=True)(held, shift)
            losses = found if count == 0 else losses
            moves, opt_held = update_each(slopes[0], opt_held, held)
            held = optax.apply_updates(held, moves)
            moves, opt_new = update_each(slopes[1], opt_new, new)
            shift = optax.apply_updates(shift, moves)
            new = optax.apply_updates(new, moves)
        states, opt_state = _slid((held, opt_held), (new, opt_new))
        present = _slid(cache.present, jnp.ones(inputs.shape[0], cache.present.dtype))
        return losses, HiddenStates(states, present, cache.position + inputs.shape[0], opt_state)

    return HiddenStateOptimizer(init, step)


def _slid(old: PyTree, new: PyTree) -> PyTree:
    """New entries at the end of the leading axis, as many of the oldest dropped."""

    def one(before: Array, after: Array) -> Array:
        return jnp.concatenate([before, after])[after.shape[0] :]

    return jax.tree.map(one, old, new)
