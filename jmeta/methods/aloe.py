"""ALOE: a discrete energy model, and a sampler of it that learns to edit its own proposals.

The sampler is fitted to its samples after Gibbs sweeps, by importance-weighted trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.types import Array, PyTree

Energy: TypeAlias = Callable[[PyTree, Array], Array]
"""``(params, x [positions]) -> scalar``: f, with the model exp(f) / Z."""


class EditSampler(NamedTuple):
    """Where samples begin, and how they are edited.

    Attributes:
        sample: ``(params, key) -> x``, int ``[positions]``.
        log_prob: ``(params, x) -> scalar``, of a beginning.
        edits: ``(params, x) -> (stop, scores)``: the log-odds of stopping at x, and scores
            ``[positions, values]`` of what to write where; the present values are left out.
        positions: length of x.
        values: number of values at a position.
        longest: edits at most.
    """

    sample: Callable[[PyTree, Array], Array]
    log_prob: Callable[[PyTree, Array], Array]
    edits: Callable[[PyTree, Array], tuple[Array, Array]]
    positions: int
    values: int
    longest: int


class ALOEState(NamedTuple):
    """State of ``aloe``: parameters of both, and of their optimizers."""

    energy: PyTree
    sampler: PyTree
    energy_optimizer: optax.OptState
    sampler_optimizer: optax.OptState


class ALOEInfo(NamedTuple):
    """What a step saw.

    Attributes:
        gap: mean energy of the data minus that of the samples.
        log_likelihood: the sampler's, of refined samples, as estimated.
        effective: effective number of trajectories, of those drawn.
    """

    gap: Array
    log_likelihood: Array
    effective: Array


def linear_autoregressive(
    positions: int, values: int
) -> tuple[
    Callable[[], PyTree], Callable[[PyTree, Array], Array], Callable[[PyTree, Array], Array]
]:
    r"""A base distribution: each value given those before it, by a linear softmax.

    .. math:: \log q_0(x) = \sum_i \log \mathrm{softmax}\Big(b_i + \sum_{j<i} W_{ij, x_j}\Big)_{x_i}

    Args:
        positions: length of x.
        values: number of values.

    Returns:
        ``(init, sample, log_prob)``; ``init()`` is uniform.

    Example:
        >>> init, sample, log_prob = linear_autoregressive(3, 2)
        >>> round(float(log_prob(init(), jnp.array([0, 1, 1]))), 4)  # -3 log 2
        -2.0794
    """
    before = jnp.tril(jnp.ones((positions, positions), bool), -1)

    def init() -> PyTree:
        return {
            "bias": jnp.zeros((positions, values)),
            "kernel": jnp.zeros((positions, positions, values, values)),
        }

    def scores(params: PyTree, x: Array) -> Array:
        picked = jnp.take_along_axis(params["kernel"], x[None, :, None, None], axis=2)[:, :, 0]
        return params["bias"] + jnp.where(before[..., None], picked, 0).sum(1)

    def sample(params: PyTree, key: Array) -> Array:
        def one(x: Array, i: Array) -> tuple[Array, None]:
            drawn = jax.random.categorical(jax.random.fold_in(key, i), scores(params, x)[i])
            return x.at[i].set(drawn.astype(x.dtype)), None

        start = jnp.zeros(positions, jnp.int32)
        return jax.lax.scan(one, start, jnp.arange(positions))[0]

    def log_prob(params: PyTree, x: Array) -> Array:
        logs = jax.nn.log_softmax(scores(params, x))
        return jnp.take_along_axis(logs, x[:, None], 1).sum()

    return init, sample, log_prob


def edit_log_probs(sampler: EditSampler, params: PyTree, x: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities of stopping, of going on, and of each edit once it goes on.

    Args:
        sampler: the sampler.
        params: its parameters.
        x: int ``[positions]``.

    Returns:
        ``(stop, go, edits [positions, values])``; an edit to the present value has none.

    Example:
        >>> base = linear_autoregressive(2, 2)
        >>> flat = lambda params, x: (jnp.asarray(0.0), jnp.zeros((2, 2)))
        >>> sampler = EditSampler(*base[1:], flat, 2, 2, 1)
        >>> probs = jax.jit(lambda x: edit_log_probs(sampler, {}, x))
        >>> stop, go, edits = probs(jnp.zeros(2, int))
        >>> jnp.exp(edits).round(2).tolist()
        [[0.0, 0.5], [0.0, 0.5]]
    """
    stop, scores = sampler.edits(params, x)
    present = jax.nn.one_hot(x, sampler.values, dtype=bool)
    scores = jnp.where(present, -jnp.inf, scores)
    edits = jax.nn.log_softmax(scores.reshape(-1)).reshape(scores.shape)
    return jax.nn.log_sigmoid(stop), jax.nn.log_sigmoid(-stop), edits


def draw(sampler: EditSampler, params: PyTree, key: Array) -> Array:
    """A sample: a beginning, and edits until it stops.

    Args:
        sampler: the sampler.
        params: its parameters.
        key: a PRNG key.

    Returns:
        int ``[positions]``.
    """
    first, rest = jax.random.split(key)

    def one(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        x, done = carry
        keys = jax.random.split(key)
        stop, _, edits = edit_log_probs(sampler, params, x)
        done = done | jax.random.bernoulli(keys[0], jnp.exp(stop))
        chosen = jax.random.categorical(keys[1], edits.reshape(-1))
        edited = x.at[chosen // sampler.values].set((chosen % sampler.values).astype(x.dtype))
        return (jnp.where(done, x, edited), done), None

    start = (sampler.sample(params, first), jnp.zeros((), bool))
    (x, _), _ = jax.lax.scan(one, start, jax.random.split(rest, sampler.longest))
    return x


def log_marginal(
    sampler: EditSampler, params: PyTree, x: Array, key: Array, *, count: int, rate: float = 0.5
) -> tuple[Array, Array]:
    r"""The sampler's log-probability of x, by trajectories that end in it.

    .. math:: \log q(x) \approx \log \frac{1}{K} \sum_{i=1}^K \frac{q(\tau_i)}{r(\tau_i)},
        \qquad w_i \propto \frac{q(\tau_i)}{r(\tau_i)}, \quad \sum_i w_i = 1

    A trajectory is drawn backwards: a geometric number of uniformly random changes of x. The
    gradient of the estimate is :math:`\sum_i w_i \nabla \log q(\tau_i)`.

    Args:
        sampler: the sampler.
        params: its parameters.
        x: int ``[positions]``.
        key: a PRNG key.
        count: K.
        rate: the geometric's: of one more change.

    Returns:
        The estimate, whose exponential is unbiased, and the weights ``[count]``.

    Example:
        >>> init, sample, log_prob = linear_autoregressive(2, 2)
        >>> flat = lambda params, x: (jnp.asarray(0.0), jnp.zeros((2, 2)))
        >>> sampler, x = EditSampler(sample, log_prob, flat, 2, 2, 1), jnp.zeros(2, int)
        >>> estimate = jax.jit(lambda x, key: log_marginal(sampler, init(), x, key, count=4))
        >>> value, w = estimate(x, jax.random.key(0))
        >>> w.shape, round(float(w.sum()), 6)
        ((4,), 1.0)

    Source: Dai et al., "Learning Discrete Energy-based Models via Auxiliary-variable Local
    Exploration" (2020), section 3.2.
    """
    lengths = rate ** jnp.arange(sampler.longest + 1, dtype=float)
    log_length = jnp.log(lengths / lengths.sum())
    per_change = -jnp.log(sampler.positions * (sampler.values - 1.0))

    def one(key: Array) -> Array:
        k_key, c_key = jax.random.split(key)
        k = jax.random.categorical(k_key, log_length)
        # Forced to stop after the last edit there may be.
        end = jnp.where(k < sampler.longest, edit_log_probs(sampler, params, x)[0], 0)

        def back(carry: tuple[Array, Array], each: tuple[Array, Array]):
            state, total = carry
            number, key = each
            keys = jax.random.split(key)
            place = jax.random.randint(keys[0], (), 0, sampler.positions)
            shift = jax.random.randint(keys[1], (), 1, sampler.values, x.dtype)
            before = state.at[place].set((state[place] + shift) % sampler.values)
            _, go, edits = edit_log_probs(sampler, params, before)
            taken = number < k
            total = total + jnp.where(taken, go + edits[place, state[place]], 0)
            return (jnp.where(taken, before, state), total), None

        numbers = jnp.arange(sampler.longest)
        keys = jax.random.split(c_key, sampler.longest)
        (begin, total), _ = jax.lax.scan(back, (x, end), (numbers, keys))
        forwards = total + sampler.log_prob(params, begin)
        return forwards - log_length[k] - k.astype(forwards.dtype) * per_change

    logs = jax.lax.map(one, jax.random.split(key, count))
    return jax.nn.logsumexp(logs) - jnp.log(float(count)), jax.nn.softmax(logs)


def site_scores(energy: Callable[[Array], Array], x: Array, place: Array, values: int) -> Array:
    """Energies of all values at one position, the others as they are.

    Args:
        energy: ``x -> scalar``.
        x: int ``[positions]``.
        place: the position.
        values: number of values.

    Returns:
        ``[values]``; their softmax is the model's conditional distribution.
    """
    every = jax.vmap(lambda value: x.at[place].set(value.astype(x.dtype)))(jnp.arange(values))
    return jax.vmap(energy)(every)


def gibbs(
    energy: Callable[[Array], Array], x: Array, key: Array, *, values: int, sweeps: int
) -> Array:
    """Gibbs sampling: every position in turn, from its conditional distribution.

    Args:
        energy: ``x -> scalar``.
        x: int ``[positions]``.
        key: a PRNG key.
        values: number of values.
        sweeps: over all positions.

    Returns:
        int ``[positions]``.
    """

    def one(x: Array, number: Array) -> tuple[Array, None]:
        place = number % x.shape[0]
        scores = site_scores(energy, x, place, values)
        drawn = jax.random.categorical(jax.random.fold_in(key, number), scores)
        return x.at[place].set(drawn.astype(x.dtype)), None

    return jax.lax.scan(one, x, jnp.arange(sweeps * x.shape[0]))[0]


def aloe(
    energy: Energy,
    sampler: EditSampler,
    energy_optimizer: optax.GradientTransformation,
    sampler_optimizer: optax.GradientTransformation,
    *,
    samples: int,
    sweeps: int = 1,
    trajectories: int = 16,
    rate: float = 0.5,
) -> tuple[
    Callable[[PyTree, PyTree], ALOEState],
    Callable[[ALOEState, Array, Array], tuple[ALOEState, ALOEInfo]],
]:
    r"""Train an energy model and its sampler together.

    .. math:: \nabla_f \left(\mathbb{E}_{data} f(x) - \mathbb{E}_{x^-} f(x^-)\right), \qquad
        \nabla_q \mathbb{E}_{x^-} \log q(x^-), \qquad x^- = \mathrm{Gibbs}_f(x), \; x \sim q

    With ``optax.set_to_zero()`` as its optimizer the energy stays, and its sampler alone learns.

    Args:
        energy: f.
        sampler: q.
        energy_optimizer: minimises minus the first.
        sampler_optimizer: minimises minus the second.
        samples: drawn in a step.
        sweeps: of Gibbs sampling that refine them.
        trajectories: K, for the likelihood of each.
        rate: of one more change in a trajectory.

    Returns:
        ``init(energy params, sampler params) -> state`` and
        ``step(state, data [n, positions], key) -> (state, info)``.

    Raises:
        ValueError: no samples, sweeps or trajectories.

    Example:
        >>> base, sample, log_prob = linear_autoregressive(2, 2)
        >>> edits = lambda params, x: (params["stop"], params["scores"])
        >>> sampler = EditSampler(sample, log_prob, edits, 2, 2, 1)
        >>> field = lambda params, x: (params * x).sum()
        >>> init, step = aloe(field, sampler, optax.adam(0.1), optax.adam(0.1), samples=8)
        >>> params = {**base(), "stop": jnp.zeros(()), "scores": jnp.zeros((2, 2))}
        >>> data, step = jnp.ones((4, 2), int), jax.jit(step)
        >>> state, info = step(init(jnp.zeros(2), params), data, jax.random.key(0))
        >>> bool(jnp.all(state.energy > 0))  # the data are ones
        True

    Source: Dai et al., "Learning Discrete Energy-based Models via Auxiliary-variable Local
    Exploration" (2020). The probability of stopping is that of the state it stops in.
    """
    if min(samples, sweeps, trajectories) < 1:
        raise ValueError(f"samples={samples}, sweeps={sweeps}, trajectories={trajectories}: each 1")

    def init(energy_params: PyTree, sampler_params: PyTree) -> ALOEState:
        return ALOEState(
            energy_params, sampler_params, energy_optimizer.init(energy_params),
            sampler_optimizer.init(sampler_params),
        )  # fmt: skip

    def step(state: ALOEState, data: Array, key: Array) -> tuple[ALOEState, ALOEInfo]:
        keys = jax.random.split(key, 3)

        def refined(first: Array, second: Array) -> Array:
            begin = draw(sampler, state.sampler, first)
            field = lambda x: energy(state.energy, x)  # noqa: E731
            return gibbs(field, begin, second, values=sampler.values, sweeps=sweeps)

        each = [jax.random.split(k, samples) for k in keys]
        negative = jax.lax.stop_gradient(jax.vmap(refined)(each[0], each[1]))

        def contrast(params: PyTree) -> Array:
            f = jax.vmap(lambda x: energy(params, x))
            return f(negative).mean() - f(data).mean()

        def likelihood(params: PyTree) -> tuple[Array, Array]:
            def one(x: Array, key: Array) -> tuple[Array, Array]:
                return log_marginal(sampler, params, x, key, count=trajectories, rate=rate)

            values, weights = jax.vmap(one)(negative, each[2])
            return -values.mean(), (1 / jnp.square(weights).sum(-1)).mean()

        gap, energy_grads = jax.value_and_grad(contrast)(state.energy)
        (loss, effective), grads = jax.value_and_grad(likelihood, has_aux=True)(state.sampler)
        moved, energy_state = energy_optimizer.update(
            energy_grads, state.energy_optimizer, state.energy
        )
        edited, sampler_state = sampler_optimizer.update(
            grads, state.sampler_optimizer, state.sampler
        )
        new = ALOEState(
            optax.apply_updates(state.energy, moved), optax.apply_updates(state.sampler, edited),
            energy_state, sampler_state,
        )  # fmt: skip
        return new, ALOEInfo(-gap, -loss, effective)

    return init, step
