"""Exp3 and UCB as samplers of objectives: what a window earns is shared by what it drew.

With windows of one draw they are the published algorithms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmeta.core.types import Array
from jmeta.methods.objective_sampler import (
    Reward,
    Sampler,
    SamplerState,
    Window,
    floored,
    relative_improvement,
    sampler,
)


def gain(window: Window, reward: Reward, low: float, high: float) -> Array:
    """The sum of a window's rewards, from ``low`` to ``high``, as a number in [0, 1]."""
    total = reward(window.before, window.after).sum()
    return jnp.clip((total - low) / (high - low), 0, 1)


def exp3(
    objectives: int,
    *,
    explore: float = 0.1,
    low: float = -1.0,
    high: float = 1.0,
    reward: Reward = relative_improvement,
) -> Sampler:
    r"""Exp3: exponential weights on gains divided by the probability of having seen them.

    .. math:: p_j = (1 - \gamma) \frac{w_j}{\sum_k w_k} + \frac{\gamma}{K}, \qquad
        w_j \leftarrow w_j \exp\left( \frac{\gamma}{K} \hat x_j \right), \qquad
        \hat x_j = \frac{n_j}{N} \frac{x}{p_j}

    where x in [0, 1] is what the window earned, and :math:`n_j` of its N draws were of j.

    Args:
        objectives: how many there are, K.
        explore: :math:`\gamma`, in (0, 1].
        low: the sum of rewards that is no gain.
        high: the sum of rewards that is a gain of 1.
        reward: ``(losses before, losses after) -> [objectives]``.

    Returns:
        A ``Sampler``; its memory is ``log w``.

    Raises:
        ValueError: ``explore`` is no share, or there is nothing between ``low`` and ``high``.

    Example:
        >>> learner = exp3(2, explore=0.5, low=0.0)
        >>> state = learner.update(learner.init(), jnp.zeros(2), jnp.ones(2))
        >>> state = learner.update(state, jnp.array([1.0, 0.0]), jnp.array([0.5, 1.0]))
        >>> state.memory.round(3).tolist()  # 0.5 / 2 * 0.5 / 0.5
        [0.25, 0.0]

    Source: Auer et al., "The Nonstochastic Multiarmed Bandit Problem" (2002), section 3.
    """
    if not 0 < explore <= 1:
        raise ValueError(f"explore={explore} is no share of draws above 0")
    _check(low, high)

    def learn(memory: Array, window: Window) -> Array:
        share = window.counts / jnp.maximum(window.counts.sum(), 1)
        seen = share / window.probabilities * gain(window, reward, low, high)
        return memory + explore / objectives * seen

    def probabilities(state: SamplerState) -> Array:
        return floored(jax.nn.softmax(state.memory), explore / objectives)

    return sampler(objectives, lambda: jnp.zeros(objectives), probabilities, learn)


def ucb(
    objectives: int,
    *,
    width: float = 1.0,
    low: float = -1.0,
    high: float = 1.0,
    reward: Reward = relative_improvement,
) -> Sampler:
    r"""UCB: the objective whose gain may be the largest, given how often it was tried.

    .. math:: a = \arg\max_j \left( \bar x_j + c \sqrt{\frac{2 \ln T}{T_j}} \right)

    Args:
        objectives: how many there are.
        width: :math:`c`; 1 is UCB1.
        low: as in ``exp3``.
        high: as in ``exp3``.
        reward: as in ``exp3``.

    Returns:
        A ``Sampler``; each draw is certain, and the same through a window. Its memory is
        ``(T_j, sum of gains)``, counted in windows.

    Raises:
        ValueError: a width below zero, or nothing between ``low`` and ``high``.

    Example:
        >>> learner = ucb(2)
        >>> learner.probabilities(learner.init()).tolist()  # what was never tried comes first
        [1.0, 0.0]

    Source: Auer et al., "Finite-time Analysis of the Multiarmed Bandit Problem" (2002), figure 1.
    """
    if width < 0:
        raise ValueError(f"width={width} is no width of a confidence interval")
    _check(low, high)

    def learn(memory: tuple[Array, Array], window: Window) -> tuple[Array, Array]:
        share = window.counts / jnp.maximum(window.counts.sum(), 1)
        return memory[0] + share, memory[1] + share * gain(window, reward, low, high)

    def probabilities(state: SamplerState) -> Array:
        tried, gains = state.memory
        safe = jnp.where(tried > 0, tried, 1)
        bonus = width * jnp.sqrt(2 * jnp.log(jnp.maximum(tried.sum(), 1)) / safe)
        bound = jnp.where(tried > 0, gains / safe + bonus, jnp.inf)
        return jax.nn.one_hot(bound.argmax(), objectives, dtype=bound.dtype)

    return sampler(
        objectives, lambda: (jnp.zeros(objectives), jnp.zeros(objectives)), probabilities, learn
    )


def _check(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"low={low} and high={high}: a gain needs low < high")
