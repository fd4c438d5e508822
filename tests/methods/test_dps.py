"""Dynamic parameter selection: its masks, its stages, and what stays as it is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmeta import methods, optim


def weights(seed=0):
    rng = np.random.default_rng(seed)
    drawn = {
        "blocks": {"kernel": rng.normal(size=(2, 3, 5)), "bias": rng.normal(size=(2, 5))},
        "head": {"kernel": rng.normal(size=(5, 4)), "bias": np.ones(4)},
    }
    return jax.tree.map(jnp.asarray, drawn)


def gradients(step):
    return jax.tree.map(lambda w: np.asarray(w) * (1 + step), weights(100 + step))


@functools.cache
def compiled(rule):
    """Its start, and a step of it; shared by the tests of the plain optimizer."""

    def step(slopes, state, params):
        updates, state = rule.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(rule.init), jax.jit(step)


def run(rule, steps):
    """Parameters and states after each step, the start first."""
    init, step = compiled(rule)
    found = [(weights(), init(weights()))]
    for index in range(steps):
        params, state = found[-1]
        found.append(step(gradients(index), state, params))
    return jax.tree.map(read, found)


def read(leaf):
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


@functools.cache
def optimizer():
    return optim.adamw(0.05, weight_decay=0.1)


@pytest.mark.parametrize("make", [methods.dps, methods.dps_mix])
def test_masks_keep_the_largest_sums_of_each_matrix(x64, make):
    """Seven tenths of each layer's matrix, not of the stack; biases are no matrices."""
    period, drop = 3, 0.3
    found = run(make(optimizer(), period, drop=drop), period + 1)
    state = found[-1][1]
    scores = jax.tree.map(lambda *g: sum(x * x for x in g), *map(gradients, range(period)))
    if make is methods.dps_mix:
        kept = [state.columns for _, state in found[:period]]

        def mixed(*leaves):
            g, m = leaves[:period], leaves[period:]
            if not m[0].ndim:
                return g[0]
            total = sum((np.where(y, x, 0) / 0.7) ** 2 for x, y in zip(g, m, strict=True))
            return total / np.maximum(sum(np.asarray(y, int) for y in m), 1)

        scores = jax.tree.map(mixed, *map(gradients, range(period)), *kept)
    for name, layers in (("blocks", 2), ("head", 1)):
        mask = np.asarray(state.masks[name]["kernel"]).reshape(layers, -1)
        score = np.asarray(scores[name]["kernel"]).reshape(layers, -1)
        keep = math.ceil(0.7 * mask.shape[1])
        for row, values in zip(mask, score, strict=True):
            assert row.sum() == keep
            assert set(np.flatnonzero(row)) == set(np.argsort(-values, kind="stable")[:keep])
        assert state.masks[name]["bias"].shape == ()


def test_stage_one_is_the_plain_optimizer_and_stage_two_leaves_the_rest(x64):
    period = 2
    found, plain = run(methods.dps(optimizer(), period), 5), run(optimizer(), 5)
    for step in range(period + 1):
        jax.tree.map(np.testing.assert_array_equal, found[step][0], plain[step][0])
    before, after = found[period][0], found[2 * period][0]
    for name in ("blocks", "head"):
        mask = np.asarray(found[2 * period][1].masks[name]["kernel"])
        moved = before[name]["kernel"] != after[name]["kernel"]
        np.testing.assert_array_equal(moved, mask)  # neither momentum nor decay moves the others
        assert np.all(before[name]["bias"] != after[name]["bias"])
    # then the sums begin anew
    last = found[5][1].importance["head"]["kernel"]
    np.testing.assert_allclose(last, gradients(4)["head"]["kernel"] ** 2, rtol=1e-12)
    assert np.all(found[5][0]["head"]["kernel"] != found[4][0]["head"]["kernel"])


@pytest.mark.parametrize("make", [methods.dps, methods.dps_mix])
def test_without_a_share_to_drop_it_is_the_optimizer(x64, make):
    for (a, _), (b, _) in zip(run(make(optimizer(), 2, drop=0.0), 6), run(optimizer(), 6),
                              strict=True):  # fmt: skip
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-14), a, b)


def test_mixed_weights_are_where_the_gradient_is_taken(x64):
    """The parameters are W with columns of the start; W follows the chain rule through them."""
    period, drop = 3, 0.4
    rule = methods.dps_mix(optax.sgd(0.1), period, drop=drop, seed=3)
    found = run(rule, 2 * period)
    origin = np.asarray(weights()["head"]["kernel"])
    kept = []
    for step in range(2 * period):
        params, state = found[step]
        w, m = state.weights["head"]["kernel"], state.columns["head"]["kernel"]
        mixing = step < period
        kept.append(np.asarray(m))
        assert m.shape == (5, 1)
        assert mixing or m.all()
        expected = (np.where(m, w, origin) - drop * origin) / (1 - drop) if mixing else w
        np.testing.assert_allclose(params["head"]["kernel"], expected, rtol=0, atol=1e-14)
        np.testing.assert_allclose(
            params["head"]["bias"], state.weights["head"]["bias"], rtol=0, atol=1e-14
        )
        g = gradients(step)["head"]["kernel"]
        mask = found[step + 1][1].masks["head"]["kernel"]
        through = np.where(m, g, 0) / (1 - drop) if mixing else np.where(mask, g, 0)
        after = found[step + 1][1].weights["head"]["kernel"]
        np.testing.assert_allclose(after, w - 0.1 * through, rtol=0, atol=1e-14)
    state = found[period][1]
    times = sum(k.astype(int) for k in kept[:period])
    np.testing.assert_array_equal(state.drawn["head"]["kernel"], times)
    assert {bool(k.all()) for k in kept[:period]} == {False}
    # outside the masks of stage II, the weights are those that it began with
    mask = np.asarray(found[-1][1].masks["head"]["kernel"])
    begun, ended = (np.asarray(found[i][1].weights["head"]["kernel"]) for i in (period, 2 * period))
    np.testing.assert_array_equal(begun != ended, mask)


def test_columns_are_drawn_at_their_rate(x64):
    rule = methods.dps_mix(optax.sgd(0.0), 10_000, drop=0.3)
    params = jnp.ones((200, 2))

    def step(carry, _):
        params, state = carry
        updates, state = rule.update(params, state, params)
        return (optax.apply_updates(params, updates), state), state.columns.mean()

    _, shares = jax.lax.scan(step, (params, rule.init(params)), None, length=100)
    error = np.sqrt(0.3 * 0.7 / (100 * 200))
    assert abs(float(shares.mean()) - 0.7) < 4 * error


def test_long_stages_discount_what_was_drawn_often(x64):
    rule = methods.dps_mix(optax.sgd(0.0), 50, drop=0.5)
    params = jnp.ones((4, 1))

    def step(carry, _):
        params, state = carry
        updates, state = rule.update(jnp.ones((4, 1)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.lax.scan(step, (params, rule.init(params)), None, length=51)
    # every input has the same gradient when it is kept, so the least often kept count more
    times = np.asarray(state.drawn).ravel()
    assert len(set(times)) > 1
    assert set(np.flatnonzero(np.asarray(state.masks).ravel())) == set(
        np.argsort(times, kind="stable")[:2]
    )


@functools.cache
def one_stage(drop):
    rule = methods.dps(optax.sgd(1.0), 1, drop=drop)
    return jax.jit(rule.init), jax.jit(rule.update)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.sampled_from([0.1, 0.3, 0.45, 0.99]), st.integers(0, 2**31))
def test_exactly_that_many_are_kept(rows, drop, seed):
    init, step = one_stage(drop)
    w = np.random.default_rng(seed).integers(0, 3, (rows, 7)).astype(np.float32)  # ties
    _, state = step(w, init(w))
    updates, state = step(w + 1, state)
    keep = math.ceil(round((1 - drop) * w.size, 6))
    assert np.asarray(state.masks).sum() == keep == (np.asarray(updates) != 0).sum()


def test_what_cannot_be_is_refused():
    for period, drop in ((0, 0.3), (5, 1.0), (5, -0.1)):
        with pytest.raises(ValueError, match="stages of"):
            methods.dps(optax.sgd(1.0), period, drop=drop)
    rule = methods.dps_mix(optax.sgd(1.0), 2)
    with pytest.raises(ValueError, match="pass them"):
        rule.update(jnp.ones((2, 2)), rule.init(jnp.ones((2, 2))))
