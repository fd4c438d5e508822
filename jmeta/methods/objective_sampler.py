"""MOMETAS: learn how often to train on each of several objectives; and what all such samplers are.

A sampler is three pure functions on one state; rules and bandits behind the same ones are in
``rule_samplers`` and ``bandits``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, PyTree
from jmeta.methods.baselines import Baseline, no_baseline

Reward: TypeAlias = Callable[[Array, Array], Array]
Credit: TypeAlias = Callable[[Array], Array]


class SamplerState(NamedTuple):
    """The state of any sampler.

    Attributes:
        step: int32, objectives drawn so far.
        counts: ``[objectives]``, how often each was drawn in this window.
        windows: int32, how often losses were measured.
        losses: ``[objectives]``, the last ones measured.
        memory: what the sampler itself keeps.
    """

    step: Array
    counts: Array
    windows: Array
    losses: Array
    memory: PyTree


class Window(NamedTuple):
    """What a sampler learns from.

    Attributes:
        counts: ``[objectives]``, how often each objective was drawn.
        probabilities: ``[objectives]``, with which they were drawn.
        before: ``[objectives]``, the losses when the window began.
        after: ``[objectives]``, the losses at its end.
    """

    counts: Array
    probabilities: Array
    before: Array
    after: Array


class Sampler(NamedTuple):
    """Decides which objective a training step takes.

    Attributes:
        objectives: how many there are.
        init: ``() -> SamplerState``.
        probabilities: ``(state) -> [objectives]``, of the next draw.
        update: ``(state, counts, losses) -> state`` at the end of a window: how often each
            objective was drawn, and its loss now. The first call only notes where losses start.
    """

    objectives: int
    init: Callable[[], SamplerState]
    probabilities: Callable[[SamplerState], Array]
    update: Callable[[SamplerState, Array, Array], SamplerState]


def sampler(
    objectives: int,
    memory: Callable[[], PyTree],
    probabilities: Callable[[SamplerState], Array],
    learn: Callable[[PyTree, Window], PyTree],
) -> Sampler:
    """A sampler from what is its own: a memory, its probabilities, and how it learns.

    Args:
        objectives: how many there are.
        memory: ``() -> memory``.
        probabilities: ``(state) -> [objectives]``.
        learn: ``(memory, window) -> memory``.

    Returns:
        A ``Sampler``.

    Raises:
        ValueError: there is no objective.

    Example:
        >>> always = sampler(2, lambda: (), lambda state: jnp.array([1.0, 0.0]), lambda m, w: m)
        >>> draw_objective(always, always.init(), jax.random.key(0))[0]
        Array(0, dtype=int32)
    """
    if objectives < 1:
        raise ValueError(f"a sampler of {objectives} objectives has nothing to draw")

    def init() -> SamplerState:
        # Two arrays: a state is donated, and one buffer cannot be twice.
        zeros, none = jnp.zeros(objectives), jnp.zeros(objectives)
        return SamplerState(
            jnp.zeros((), jnp.int32), zeros, jnp.zeros((), jnp.int32), none, memory()
        )

    def update(state: SamplerState, counts: Array, losses: Array) -> SamplerState:
        losses = losses.astype(state.losses.dtype)
        window = Window(counts, probabilities(state), state.losses, losses)
        learned = learn(state.memory, window)
        kept = jax.tree.map(
            lambda new, old: jnp.where(state.windows > 0, new, old), learned, state.memory
        )
        return SamplerState(
            state.step, jnp.zeros_like(state.counts), state.windows + 1, losses, kept
        )

    return Sampler(objectives, init, probabilities, update)


def draw_objective(sampler: Sampler, state: SamplerState, key: Array) -> tuple[Array, SamplerState]:
    r"""Draw an objective by the Gumbel-max trick, and count it.

    .. math:: a = \arg\max_k (\log p_k + g_k), \qquad g_k \sim \mathrm{Gumbel}(0, 1)

    With one key all devices and hosts draw the same.

    Args:
        sampler: any.
        state: its state.
        key: a random key, the same everywhere.

    Returns:
        The objective's number, int32, and the state.

    Example:
        >>> uniform = sampler(3, lambda: (), lambda state: jnp.ones(3) / 3, lambda m, w: m)
        >>> index, state = draw_objective(uniform, uniform.init(), jax.random.key(0))
        >>> int(state.step), int(state.counts[index])
        (1, 1)
    """
    index = jax.random.categorical(key, jnp.log(sampler.probabilities(state))).astype(jnp.int32)
    counts = state.counts.at[index].add(1)
    return index, state._replace(step=state.step + 1, counts=counts)


def relative_improvement(
    before: Array, after: Array, *, threshold: float = 1e-3, floor: float = -1.0
) -> Array:
    r"""How much of each loss has gone, where it is more than noise.

    .. math:: r_k = \max\left( \frac{l_k - l'_k + \epsilon}{l_k + \epsilon}
        \, [\, |l_k - l'_k| > \tau \,], \; r_{min} \right), \qquad \epsilon = 10^{-6}

    Args:
        before: ``[objectives]``, losses :math:`l`.
        after: ``[objectives]``, losses :math:`l'`.
        threshold: :math:`\tau`; a smaller change is none.
        floor: :math:`r_{min}`, of a loss that grew.

    Returns:
        ``[objectives]``.

    Example:
        >>> relative_improvement(jnp.array([2.0, 2.0, 1.0]), jnp.array([1.0, 1.9999, 9.0]))
        Array([ 0.50000024,  0.        , -1.        ], dtype=float32)

    Source: Wu et al., "Adaptive Sampling over Pre-training Objectives" (2022), the released code.
    """
    gone = before - after
    rewarded = jnp.where(jnp.abs(gone) > threshold, (gone + 1e-6) / (before + 1e-6), 0.0)
    return jnp.maximum(rewarded, floor)


def shared_credit(rewards: Array) -> Array:
    """Every draw of a window is credited with the sum of all rewards: MOMETAS as published.

    Example:
        >>> shared_credit(jnp.array([1.0, 2.0])).tolist()
        [3.0, 3.0]
    """
    return jnp.full_like(rewards, rewards.sum())


def own_credit(rewards: Array) -> Array:
    """A draw of an objective is credited with the improvement of that objective's loss alone.

    Example:
        >>> own_credit(jnp.array([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    return rewards


def floored(probabilities: Array, least: float) -> Array:
    r"""Probabilities of at least ``least``: :math:`(1 - K p_{min}) p + p_{min}`.

    Example:
        >>> floored(jnp.array([1.0, 0.0]), 0.125).tolist()
        [0.875, 0.125]
    """
    return (1 - len(probabilities) * least) * probabilities + least


def entropy_gradient(phi: Array) -> Array:
    r"""The gradient of the entropy of ``softmax(phi)``: :math:`-p_j (\log p_j + H(p))`.

    Example:
        >>> bool(jnp.abs(entropy_gradient(jnp.zeros(3))).max() < 1e-6)  # none is more uniform
        True
    """
    log_p = jax.nn.log_softmax(phi)
    p = jnp.exp(log_p)
    return -p * (log_p - (p * log_p).sum())


def mometas_gradient(
    phi: Array, counts: Array, credit: Array, entropy: float = 2.0, least: float = 0.0
) -> Array:
    r"""The gradient of MOMETAS' meta loss, in closed form.

    .. math:: J(\phi) = - \sum_t c_{a_t} \log q_{a_t} - \gamma H(p), \qquad
        p = \mathrm{softmax}(\phi), \quad q = (1 - K p_{min}) p + p_{min}

    .. math:: \frac{\partial J}{\partial \phi_j} = - \Big( c_j w_j - p_j \sum_k c_k w_k \Big)
        + \gamma p_j (\log p_j + H(p)), \qquad w_k = n_k (1 - K p_{min}) \frac{p_k}{q_k}

    As published, all credits are one reward R and there is no floor: then the first term is
    :math:`-R (n_j - N p_j)`.

    Args:
        phi: ``[objectives]``.
        counts: ``[objectives]``, the draws of the window :math:`n`.
        credit: ``[objectives]``, what a draw of each is credited with.
        entropy: :math:`\gamma`.
        least: :math:`p_{min}`.

    Returns:
        ``[objectives]``.

    Example:
        >>> counts, reward = jnp.array([3.0, 1.0]), jnp.array([0.5, 0.5])
        >>> mometas_gradient(jnp.zeros(2), counts, reward).tolist()  # -R (n_j - N p_j)
        [-0.5, 0.5]
    """
    p = jax.nn.softmax(phi)
    draws = counts * (1 - len(phi) * least) * p / floored(p, least)
    earned = credit * draws
    return -(earned - p * earned.sum()) - entropy * entropy_gradient(phi)


def mometas(
    objectives: int,
    *,
    rate: float = 0.1,
    entropy: float = 2.0,
    reward: Reward = relative_improvement,
    credit: Credit = shared_credit,
    baseline: Baseline | None = None,
    least: float = 0.0,
) -> Sampler:
    r"""MOMETAS: a softmax over objectives, moved by REINFORCE on the losses' relative improvement.

    .. math:: \phi \leftarrow \phi - \eta \nabla J(\phi), \qquad \phi_0 = 1

    The defaults are the published ones. What is worth changing: ``baseline=moving_average(0.1)``
    subtracts what windows earn anyway, without which the reward of a window moves whatever it
    happened to draw; ``credit=own_credit``; and losses measured by ``paired_losses``.

    Args:
        objectives: how many there are.
        rate: :math:`\eta`.
        entropy: the weight :math:`\gamma` of the entropy, which pulls to uniform.
        reward: ``(losses before, losses after) -> [objectives]``.
        credit: ``rewards -> [objectives]``: what a draw of each objective is credited with.
        baseline: subtracted from the credits; None: nothing.
        least: no probability is lower; at most ``1 / objectives``.

    Returns:
        A ``Sampler``; its memory is ``(phi, the baseline's state)``.

    Raises:
        ValueError: a floor that leaves no choice.

    Example:
        >>> learner = mometas(2, entropy=0.0)
        >>> state = learner.update(learner.init(), jnp.zeros(2), jnp.array([1.0, 1.0]))  # notes
        >>> state = learner.update(state, jnp.array([9.0, 1.0]), jnp.array([0.5, 1.0]))
        >>> [round(float(p), 2) for p in learner.probabilities(state)]  # drawing more of 0 paid
        [0.6, 0.4]

    Source: Wu et al., "Adaptive Sampling over Pre-training Objectives via Meta-learning", Findings
    of EMNLP (2022), and its released code.
    """
    if not 0 <= least * objectives <= 1:
        raise ValueError(f"least={least} leaves {objectives} objectives no probabilities")
    baseline = no_baseline() if baseline is None else baseline

    def learn(memory: tuple[Array, PyTree], window: Window) -> tuple[Array, PyTree]:
        phi, average = memory
        credits = credit(reward(window.before, window.after))
        expected, average = baseline.value(average, credits)
        step = mometas_gradient(phi, window.counts, credits - expected, entropy, least)
        return phi - rate * step, average

    return sampler(
        objectives,
        lambda: (jnp.ones(objectives), baseline.init()),
        lambda state: floored(jax.nn.softmax(state.memory[0]), least),
        learn,
    )
