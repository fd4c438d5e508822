"""Linen, NNX and Equinox modules inside a second-order loop, against the same plain network."""

import functools
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jmeta
from jmeta.core import inner
from jmeta.models import adapters
from jmeta.testing import central_differences, relative_error

WIDTHS = (3, 8, 2)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic=True):
        x = jnp.tanh(linen.Dense(8, name="first", param_dtype=x.dtype)(x))
        x = linen.Dropout(0.5)(x, deterministic=deterministic)
        return linen.Dense(2, name="second", param_dtype=x.dtype)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs, dtype):
        self.first = nnx.Linear(3, 8, rngs=rngs, param_dtype=dtype)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs, param_dtype=dtype)

    def __call__(self, x):
        return self.second(self.dropout(jnp.tanh(self.first(x))))


class EquinoxNet(equinox.Module):
    first: equinox.nn.Linear
    dropout: equinox.nn.Dropout
    second: equinox.nn.Linear
    note: Any = "not an array"

    def __call__(self, x, key=None):
        return self.second(self.dropout(jnp.tanh(self.first(x)), key=key))


def build(kind):
    """``(params, apply, plain)``, where plain(params) are the weights of the plain network."""
    return _built(kind, jax.config.jax_enable_x64)


@functools.cache
def _built(kind, x64):
    x = jnp.ones((1, 3), jnp.float64 if x64 else jnp.float32)
    # Each drawn by one program: operation by operation the libraries' initial values take longer.
    if kind == "linen":
        variables = jax.jit(LinenNet().init)(jax.random.key(0), x)
        params, apply = adapters.from_linen(LinenNet(), variables)
    elif kind == "nnx":
        params, apply = adapters.from_nnx(nnx.jit(lambda: NnxNet(nnx.Rngs(0), x.dtype))())
    else:

        @jax.jit
        def layers(key):
            return [
                equinox.nn.Linear(i, o, key=k, dtype=x.dtype)
                for i, o, k in zip(WIDTHS[:-1], WIDTHS[1:], jax.random.split(key), strict=True)
            ]

        first, second = layers(jax.random.key(0))
        net = EquinoxNet(first, equinox.nn.Dropout(0.5), second)
        params, apply = adapters.from_equinox(net)

    def plain(params):
        if kind == "equinox":
            both = (params.first, params.second)
            pairs = [(jnp.asarray(np.transpose(layer.weight)), layer.bias) for layer in both]
        else:
            pairs = [(params[k]["kernel"], params[k]["bias"]) for k in ("first", "second")]
        return pairs

    return params, apply, plain


def plain_apply(pairs, x, key):
    (w1, b1), (w2, b2) = pairs
    return jnp.tanh(x @ w1 + b1[None]) @ w2 + b2[None]


@functools.lru_cache
def after_two_steps(apply):
    """The meta-gradient of a loss after two SGD steps in a scan, one key per step; compiled."""

    def loss(params, key):
        x, y = data()
        return ((apply(params, x, key) - y) ** 2).mean()

    def outer(params, key):
        keys = None if key is None else jax.random.split(key, 2)

        def step(p, k):
            return jax.tree.map(lambda a, g: a - 0.3 * g, p, jax.grad(loss)(p, k)), None

        params, _ = jax.lax.scan(step, params, keys, length=2)
        return loss(params, None)

    return jax.jit(jax.value_and_grad(outer))


def data():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_second_order_is_the_plain_networks(x64, kind):
    params, apply, plain = build(kind)
    value, grads = after_two_steps(apply)(params, None)
    expected = after_two_steps(plain_apply)(plain(params), None)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        plain(grads),
        expected[1],
    )
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == 3 * 8 + 8 + 8 * 2 + 2
    assert all(leaf.dtype == jnp.float64 for leaf in leaves)


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_dropout_is_the_keys_and_only_the_keys(x64, kind):
    params, apply, _ = build(kind)
    x, _ = data()
    run = after_two_steps(apply)
    one, again, other, none = (
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(run(params, key)[1])])
        for key in (*(jax.random.key(k) for k in (1, 1, 2)), None)
    )
    assert (one == again).all()
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - none).max() > 1e-3

    # The mask itself: with distinct keys, some hidden unit is dropped in one run and not the other.
    @jax.jit
    def outputs(seeds):
        drawn = jax.lax.map(lambda seed: apply(params, x, jax.random.key(seed)), seeds)
        return drawn, apply(params, x)

    drawn, silent = map(np.asarray, outputs(np.arange(200)))
    # Inverted dropout before a linear layer is unbiased, so the mean approaches the plain output.
    np.testing.assert_allclose(drawn.mean(0), silent, atol=0.35)
    assert drawn.std(0).min() > 0.01


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_estimators_differentiate_through_dropout(x64, kind):
    params, apply, _ = build(kind)
    x, y = data()

    def loss(params, meta, batch, key):
        return ((apply(params, batch[0], key) - batch[1]) ** 2).mean(), {}

    problem = jmeta.Problem(loss, loss, lambda meta: optax.sgd(0.3))
    few = tuple(jnp.asarray(np.asarray(leaf)[:3]) for leaf in (x, y))
    episode, key = jmeta.Episode((x, y), few), jax.random.key(5)
    forward = inner.inner_loop(problem, 2)

    def value(params):
        first, then = inner.keys(key, 2)
        return forward(params, inner.start(problem, params, first), episode, then)[0]

    def gradient(make):
        mg = make(problem, 2)
        return jax.jit(lambda params, key: mg.estimate(params, (), episode, key)[0])

    exact, mixed = gradient(jmeta.unrolled), gradient(jmeta.mixed_mode)
    expected = exact(params, key)
    assert relative_error(expected, central_differences(value, params)) < 1e-7
    assert relative_error(mixed(params, key), expected) < 1e-10
    assert relative_error(mixed(params, jax.random.key(6)), expected) > 1e-2  # dropout was on


def test_frozen_collections_are_read():
    """Linen's and NNX's running averages are used as they were, and never updated."""
    x, _ = data()

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=True, param_dtype=x.dtype)(x)

    variables = jax.jit(Normed().init)(jax.random.key(0), x)
    stats = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 4.0)}
    variables = {"params": variables["params"], "batch_stats": {"BatchNorm_0": stats}}
    params, apply = adapters.from_linen(Normed(), variables)
    np.testing.assert_allclose(apply(params, x), (x - 2) / np.sqrt(4 + 1e-5), rtol=1e-5, atol=1e-6)

    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0), param_dtype=x.dtype)
    model.mean[...] = jnp.full(3, 2.0, model.mean.dtype)
    params, apply = adapters.from_nnx(model)
    before = apply(params, x)
    apply(params, x, jax.random.key(0))  # training mode: batch statistics, whose update is dropped
    np.testing.assert_allclose(before, (x - 2) / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(apply(params, x), before)
