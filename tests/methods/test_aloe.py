"""ALOE against enumeration: every state of a few positions, every trajectory between them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import softmax

from jmeta import optim
from jmeta.methods.aloe import (
    EditSampler,
    aloe,
    draw,
    edit_log_probs,
    gibbs,
    linear_autoregressive,
    log_marginal,
    site_scores,
)

N, V, LONGEST = 3, 2, 2
KEY = jax.random.key(0)
STATES = np.array(list(itertools.product(range(V), repeat=N)))
INDEX = {tuple(s): i for i, s in enumerate(STATES.tolist())}


def edits(params, x):
    """One hidden layer on the values."""
    hidden = jnp.tanh(params["in"][jnp.arange(N), x].sum(0))
    return hidden @ params["stop"], (hidden @ params["out"]).reshape(N, V)


@functools.cache
def editor():
    init, sample, log_prob = linear_autoregressive(N, V)
    return init, EditSampler(sample, log_prob, edits, N, V, LONGEST)


def world(scale=0.5):
    init, sampler = editor()
    rng = np.random.default_rng(0)
    shapes = {"in": (N, V, 6), "stop": (6,), "out": (6, N * V)}
    params = {k: scale * rng.normal(size=s) for k, s in shapes.items()}
    drawn = lambda p: np.asarray(p) + scale * rng.normal(size=p.shape)  # noqa: E731
    return sampler, jax.tree.map(jnp.asarray, {**params, **jax.tree.map(drawn, init())})


@functools.cache
def probabilities(sampler):
    """Of starts, and of edits, from every state."""
    start = lambda params, s: sampler.log_prob(params, s)  # noqa: E731
    each = lambda params, s: edit_log_probs(sampler, params, s)  # noqa: E731
    return [jax.jit(jax.vmap(of, (None, 0))) for of in (start, each)]


def marginal(sampler, params):
    """q by the transition matrix of edits: ``[states]``."""
    stop, move = np.zeros(len(STATES)), np.zeros((len(STATES),) * 2)
    starts, edited = probabilities(sampler)
    start = np.exp(starts(params, STATES))
    every = [np.exp(each) for each in edited(params, STATES)]
    for i, s in enumerate(STATES):
        a, b, changes = (each[i] for each in every)
        stop[i] = a
        for place, value in itertools.product(range(N), range(V)):
            t = s.copy()
            t[place] = value
            move[i, INDEX[tuple(t)]] += b * changes[place, value]
    found, now = np.zeros(len(STATES)), start
    for _ in range(LONGEST):
        found += now * stop
        now = now @ move
    return found + now


def model(energy):
    f = np.asarray(jax.jit(jax.vmap(energy))(STATES))
    p = np.exp(f - f.max())
    return p / p.sum()


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def pairs(params, x):
    """An Ising model of everybody with everybody."""
    spins = 2.0 * x.astype(params.dtype) - 1
    return (params * spins[:, None] * spins[None]).sum()


def counts(xs):
    return np.bincount([INDEX[tuple(x)] for x in np.asarray(xs).tolist()], minlength=len(STATES))


def test_samples_are_from_the_enumerated_distribution(x64):
    sampler, params = world()
    q = marginal(sampler, params)
    np.testing.assert_allclose(q.sum(), 1, rtol=1e-12)
    many = 20_000
    xs = jax.jit(jax.vmap(lambda k: draw(sampler, params, k)))(jax.random.split(KEY, many))
    error = np.sqrt(q * (1 - q) / many)
    assert np.all(np.abs(counts(xs) / many - q) < 4 * error)


def test_the_likelihood_is_unbiased_and_its_weights_sum_to_one(x64):
    sampler, params = world()
    q = marginal(sampler, params)

    def once(x, key):
        value, weights = log_marginal(sampler, params, x, key, count=3, rate=0.4)
        return jnp.exp(value), weights

    many, keys = jax.jit(jax.vmap(once, (None, 0))), jax.random.split(KEY, 4000)
    for i in (0, 3, 6):
        values, weights = map(np.asarray, many(STATES[i], keys))
        error = float(values.std(ddof=1)) / np.sqrt(4000)
        assert abs(float(values.mean()) - q[i]) < 4 * error
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)


def moved(array, at, by):
    array = np.copy(array)
    array[at] += by
    return array


def test_its_gradient_is_that_of_the_weighted_trajectories(x64):
    """With many trajectories, the gradient of the enumerated log-probability."""
    sampler, params = world()
    x = STATES[5]
    grad = jax.jit(jax.grad(lambda p: log_marginal(sampler, p, x, KEY, count=8000)[0]))(params)
    grad, params = jax.tree.map(np.asarray, (grad, params))
    h = 1e-5
    for name, at in (("stop", (0,)), ("bias", (1, 0)), ("out", (2, 3))):
        shifted = [
            np.log(marginal(sampler, {**params, name: moved(params[name], at, s * h)})[5])
            for s in (1, -1)
        ]
        exact = (shifted[0] - shifted[1]) / (2 * h)
        np.testing.assert_allclose(float(grad[name][at]), exact, atol=0.03)


def test_gibbs_leaves_the_model_as_it_is(x64):
    coupling = 0.4 * np.random.default_rng(1).normal(size=(N, N))
    energy = lambda x: pairs(jnp.asarray(coupling), x)  # noqa: E731
    p = model(energy)
    scores = jax.jit(jax.vmap(lambda s, place: site_scores(energy, s, place, V), (0, None)))
    for place in range(N):
        after = np.zeros(len(STATES))
        conditionals = softmax(np.asarray(scores(STATES, place)))
        for i, (s, conditional) in enumerate(zip(STATES, conditionals, strict=True)):
            for value in range(V):
                t = s.copy()
                t[place] = value
                after[INDEX[tuple(t)]] += p[i] * float(conditional[value])
        np.testing.assert_allclose(after, p, rtol=1e-10)
    run = jax.jit(jax.vmap(lambda x, k: gibbs(energy, x, k, values=V, sweeps=1)))
    many = 4000
    begin = STATES[np.random.default_rng(0).choice(len(STATES), many, p=p)]
    xs = run(begin, jax.random.split(KEY, many))
    assert np.mean(np.asarray(xs) != begin) > 0.1
    assert np.all(np.abs(counts(xs) / many - p) < 4 * np.sqrt(p * (1 - p) / many))


def test_the_sampler_approaches_the_model(x64):
    sampler, params = world(0.1)
    coupling = jnp.asarray(0.8 * np.random.default_rng(3).normal(size=(N, N)))
    p = model(lambda x: pairs(coupling, x))
    init, step = aloe(
        pairs, sampler, optax.set_to_zero(), optim.adam(0.03), samples=64, sweeps=2, trajectories=8
    )

    def one(state, key):
        return step(state, jnp.zeros((1, N), jnp.int32), key)

    state, info = jax.jit(lambda s, k: jax.lax.scan(one, s, k))(
        init(coupling, params), jax.random.split(KEY, 300)
    )
    before, after = kl(p, marginal(sampler, params)), kl(p, marginal(sampler, state.sampler))
    assert before > 0.2
    assert after < 0.05 * before
    assert float(info.effective.min()) > 1
    np.testing.assert_array_equal(state.energy, coupling)


@pytest.mark.slow
def test_the_model_approaches_the_data(x64):
    sampler, params = world(0.1)
    truth = model(lambda x: pairs(0.5 * jax.random.normal(jax.random.key(3), (N, N)), x))
    rows = np.random.default_rng(0).choice(len(STATES), 2000, p=truth)
    data = jnp.asarray(STATES[rows])
    init, step = aloe(pairs, sampler, optim.adam(0.03), optim.adam(0.03), samples=64)
    state, _ = jax.jit(lambda s, k: jax.lax.scan(lambda s, k: step(s, data, k), s, k))(
        init(jnp.zeros((N, N)), params), jax.random.split(KEY, 300)
    )
    q = model(lambda x: pairs(state.energy, x))
    assert kl(truth, q) < 0.1 * kl(truth, np.full(len(STATES), 1 / len(STATES)))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="samples=0"):
        aloe(pairs, world()[0], optax.sgd(1.0), optax.sgd(1.0), samples=0)
