"""The safe inner optimizers take optax's own steps, and have the derivatives they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jmeta.core import optim

DIMS = {
    "stack": contrib.MuonDimensionNumbers(1, 2),
    "matrix": contrib.MuonDimensionNumbers(0, 1),
    "bias": None,
}
PAIRS = {
    "adam": (optax.adam, optim.adam, {}),
    "adam nesterov": (optax.adam, optim.adam, {"nesterov": True, "b1": 0.8, "b2": 0.99}),
    "nadam": (optax.nadam, optim.nadam, {}),
    "adamw": (optax.adamw, optim.adamw, {"weight_decay": 0.1}),
    "adamw mask": (
        optax.adamw,
        optim.adamw,
        {"mask": {"matrix": True, "stack": False, "bias": False}},
    ),
    "nadamw": (optax.nadamw, optim.nadamw, {}),
    "amsgrad": (optax.amsgrad, optim.amsgrad, {}),
    "radam": (optax.radam, optim.radam, {}),
    "radam nesterov": (optax.radam, optim.radam, {"nesterov": True, "threshold": 4.5}),
    "lamb": (optax.lamb, optim.lamb, {"weight_decay": 0.1}),
    "lars": (optax.lars, optim.lars, {"weight_decay": 0.1, "nesterov": True}),
    "adafactor": (optax.adafactor, optim.adafactor, {}),
    "adafactor factored": (
        optax.adafactor,
        optim.adafactor,
        {
            "min_dim_size_to_factor": 3,
            "momentum": 0.9,
            "weight_decay_rate": 1e-3,
            "dtype_momentum": jnp.float64,
        },
    ),
    "adafactor bare": (
        optax.adafactor,
        optim.adafactor,
        {"clipping_threshold": None, "multiply_by_parameter_scale": False},
    ),
    "adam stopped": (optax.adam, optim.adam_stopped, {}),
    "adam stopped nesterov": (optax.adam, optim.adam_stopped, {"nesterov": True}),
    "adamw stopped": (optax.adamw, optim.adamw_stopped, {"weight_decay": 0.1}),
    "muon": (contrib.muon, optim.muon, {}),
    "muon options": (
        contrib.muon,
        optim.muon,
        {
            "adaptive": True,
            "preconditioning": "aol",
            "nesterov": False,
            "consistent_rms": 0.2,
            "weight_decay": 0.1,
            "adam_learning_rate": 0.3,
        },
    ),
    "muon stacked": (contrib.muon, optim.muon, {"muon_weight_dimension_numbers": DIMS}),
    "clip_by_global_norm": (optax.clip_by_global_norm, optim.clip_by_global_norm, {}),
    "clip_by_block_rms": (optax.clip_by_block_rms, optim.clip_by_block_rms, {}),
}


def draw(rng):
    shapes = {"matrix": (4, 6), "stack": (2, 3, 5), "bias": (6,)}
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def first_update(tx, g):
    """One step from the initial state, as one program."""
    return jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g)


@pytest.mark.parametrize("name", PAIRS)
@jax.numpy_dtype_promotion("standard")
def test_steps_are_those_of_optax(name, x64):
    theirs, ours, options = PAIRS[name]
    rng = np.random.default_rng(0)
    params = draw(rng)
    pair = [theirs(0.01, **options), ours(0.01, **options)]
    states, updates = [tx.init(params) for tx in pair], [jax.jit(tx.update) for tx in pair]
    for _ in range(8):  # radam rectifies from the sixth
        grads = draw(rng)
        found = [
            update(grads, state, params) for update, state in zip(updates, states, strict=True)
        ]
        (expected, _), (got, _) = found
        states = [state for _, state in found]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
        params = optax.apply_updates(params, expected)


def test_default_eps_root_hardly_moves_a_step_and_the_advised_one_does():
    gradients = np.float32([5e-7, 1e-5, 1.0])
    with jax.numpy_dtype_promotion("standard"):
        exact = np.asarray(first_update(optax.adam(1.0), gradients))
    assert np.all(np.abs(np.asarray(first_update(optim.adam(1.0), gradients)) / exact - 1) < 2e-4)
    advised = first_update(optim.adam(1.0, eps_root=1e-8), gradients)
    assert abs(float(advised[1])) == pytest.approx(0.0995, rel=1e-2)


def test_derivative_of_the_first_step_is_the_closed_form(x64):
    # u = -lr g / (sqrt(g^2 + r) + e), so du/dg = -lr (r + e sqrt(.)) / (sqrt(.) (sqrt(.) + e)^2).
    lr, e, r = 0.3, 1e-8, 1e-16
    tx = optim.adam(lr)

    slope = jax.jit(jax.grad(lambda g: tx.update(g, tx.init(g))[0]))
    for g in (0.0, 1e-9, 1e-8, 1e-4, 2.0):
        root = np.sqrt(g**2 + r)
        expected = -lr * (r + e * root) / (root * (root + e) ** 2)
        np.testing.assert_allclose(slope(np.float64(g)), expected, rtol=1e-6)


def test_stopped_derivative_is_the_constant_denominator(x64):
    g = jnp.array([2.0, -1e-3, 0.0])
    tx = optim.adam_stopped(0.5)
    jacobian = jax.jit(jax.jacobian(lambda g: tx.update(g, tx.init(g))[0]))(g)
    np.testing.assert_allclose(
        jacobian, np.diag([-0.5 / (2.0 + 1e-8), -0.5 / (1e-3 + 1e-8), 0.0]), rtol=1e-9
    )


def test_a_learned_learning_rate_receives_its_gradient(x64):
    g = jnp.array([3.0, -2.0])
    for make in (optim.adam, optim.adamw, optim.radam, optim.adam_stopped):

        def moved(lr, make=make):
            return jnp.sum(make(lr).update(g, make(lr).init(g), 0 * g)[0])

        np.testing.assert_allclose(
            jax.jit(jax.grad(moved))(np.float64(0.1)), jax.jit(moved)(np.float64(1.0)), rtol=1e-12
        )


def test_float16_is_refused_by_name():
    params = {"dense": {"kernel": jnp.ones((2, 2), jnp.float16)}}
    for tx in (optim.adam(0.1), optim.lamb(0.1), optim.radam(0.1), optim.adam(0.1, eps_root=0.0)):
        with pytest.raises(ValueError, match=r"float16.*dense\.kernel"):
            tx.init(params)
    with pytest.raises(ValueError, match="adam_eps_root"):
        optim.muon(0.1).init({"bias": jnp.ones(2, jnp.float16)})
    optim.adam(0.1).init({"w": jnp.ones(2, jnp.bfloat16)})


def test_muon_leaves_other_layers_of_a_stack_alone_when_one_is_dead(x64):
    tx = optim.muon(0.1, muon_weight_dimension_numbers=DIMS)
    grads = draw(np.random.default_rng(0))
    one_dead = np.reshape([0.0, 1.0], (2, 1, 1)) * np.asarray(grads["stack"])
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads), grads)[0])
    whole, part = step(grads), step({**grads, "stack": jnp.asarray(one_dead)})
    np.testing.assert_array_equal(part["stack"][0], 0.0)
    np.testing.assert_allclose(part["stack"][1], whole["stack"][1], rtol=1e-12)


def test_muon_refuses_the_spectral_norm():
    with pytest.raises(ValueError, match="spectral"):
        optim.muon(0.1, preconditioning="spectral")
