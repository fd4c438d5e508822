"""The trainer against closed-form trajectories, and its errors at build time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmeta.core.types import Info, MetaGradient
from jmeta.runtime.train import meta_trainer, stages


def quadratic(scale=1.0, noise=0.0, dtype=None):
    """Plain gradient of scale/2 |w - target|^2, plus noise drawn from the step's key."""

    def estimate(meta, state, target, key):
        def loss(meta):
            return 0.5 * scale * jnp.sum((meta["w"] - target) ** 2)

        value, grads = jax.value_and_grad(loss)(meta)
        if noise:
            grads = {"w": grads["w"] + noise * jax.random.normal(key, grads["w"].shape)}
        if dtype is not None:
            grads = jax.tree.map(lambda grad: grad.astype(dtype), grads)
        return grads, state, Info(value, jnp.zeros(0), {}, optax.tree.norm(grads))

    return MetaGradient(init=lambda meta, key: (), estimate=estimate)


@pytest.mark.usefixtures("x64")
def test_sgd_on_a_quadratic_follows_the_closed_form():
    start, target, rate, steps = jnp.array([3.0, -2.0]), jnp.array([1.0, 0.5]), 0.1, 25
    init, step = meta_trainer(quadratic(scale=2.0), optax.sgd(rate))
    state, step = init({"w": start}, jax.random.key(0)), jax.jit(step, donate_argnums=0)
    for number in range(steps):
        state, info = step(state, target)
        away = (1 - 2.0 * rate) ** number * (start - target)
        np.testing.assert_allclose(info.loss, jnp.sum(away**2), rtol=1e-12)
    expected = target + (1 - 2.0 * rate) ** steps * (start - target)
    np.testing.assert_allclose(state.meta["w"], expected, rtol=1e-12)
    assert int(state.step) == steps


@pytest.mark.usefixtures("x64")
def test_adam_with_clipping_and_a_schedule_equals_optax_by_hand():
    outer = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(optax.cosine_decay_schedule(0.1, 20))
    )
    init, step = meta_trainer(quadratic(), outer)
    state, step = init({"w": jnp.array([3.0, -2.0])}, jax.random.key(0)), jax.jit(step)
    params, opt_state = {"w": jnp.array([3.0, -2.0])}, outer.init({"w": jnp.zeros(2)})
    for _ in range(10):
        state, _ = step(state, jnp.zeros(2))
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = outer.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.meta["w"], params["w"], rtol=1e-12)


def test_the_key_is_a_function_of_the_run_and_the_step():
    init, step = meta_trainer(quadratic(noise=1.0), optax.sgd(1.0))
    key = jax.random.key(7)
    state = init({"w": jnp.zeros(3)}, key)
    for number in range(3):
        before = state.meta["w"]
        state, _ = step(state, before)  # the target is the weight itself: only the noise moves it
        drawn = jax.random.normal(jax.random.fold_in(key, number), (3,))
        np.testing.assert_allclose(before - state.meta["w"], drawn, rtol=1e-5, atol=1e-6)


def test_estimator_state_is_carried():
    def estimate(meta, state, episode, key):
        grads = jax.tree.map(jnp.ones_like, meta)
        return grads, state + 1, Info(jnp.float32(0), jnp.zeros(0), {}, jnp.float32(1))

    counting = MetaGradient(init=lambda meta, key: jnp.int32(5), estimate=estimate)
    init, step = meta_trainer(counting, optax.sgd(1.0))
    state = init(jnp.float32(0.0), jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, None)
    assert int(state.estimator_state) == 8


def test_bfloat16_gradients_are_applied_to_float32_masters():
    # 1 + 1e-4 is not representable in bfloat16: an update in that dtype would be lost.
    def estimate(meta, state, episode, key):
        grads = {"w": jnp.full((2,), -1e-4, jnp.bfloat16)}
        return grads, state, Info(jnp.float32(0), jnp.zeros(0), {}, jnp.float32(1))

    mg = MetaGradient(init=lambda meta, key: (), estimate=estimate)
    init, step = meta_trainer(mg, optax.sgd(1.0))
    state = init({"w": jnp.ones(2)}, jax.random.key(0))
    for _ in range(100):
        state, _ = jax.jit(step)(state, None)
    assert state.meta["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.meta["w"], 1.01, rtol=1e-4)


def test_an_optimizer_that_wants_the_loss_gets_it():
    outer = optax.chain(
        optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    )
    init, step = meta_trainer(quadratic(), outer)
    state = init({"w": jnp.ones(2)}, jax.random.key(0))
    for _ in range(4):
        state, _ = step(state, jnp.zeros(2))
    assert float(state.opt_state[1].scale) < 1.0


def test_stages_switch_the_estimate_at_their_outer_step():
    init, step = meta_trainer(stages([(0, quadratic(1.0)), (3, quadratic(2.0))]), optax.sgd(0.25))
    state = init({"w": jnp.float32(1.0)}, jax.random.key(0))
    for _ in range(5):
        state, _ = step(state, jnp.float32(0.0))
    np.testing.assert_allclose(state.meta["w"], 0.75**3 * 0.5**2, rtol=1e-6)


def test_stages_inside_jit_say_to_call_them_as_they_are():
    init, step = meta_trainer(stages([(0, quadratic())]), optax.sgd(0.1))
    state = init({"w": jnp.float32(1.0)}, jax.random.key(0))
    with pytest.raises(TypeError, match="call step as it is"):
        jax.jit(step)(state, jnp.float32(0.0))


@pytest.mark.parametrize("starts", [[], [1], [0, 5, 5], [0, 5, 3]])
def test_stages_must_ascend_from_zero(starts):
    with pytest.raises(ValueError, match=r"outer step 0|ascending"):
        stages([(start, quadratic()) for start in starts])


def test_stages_with_different_states_are_refused():
    other = MetaGradient(init=lambda meta, key: jnp.zeros(3), estimate=quadratic().estimate)
    init, _ = meta_trainer(stages([(0, quadratic()), (10, other)]), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"starts at step 10 .*float32\[3\]"):
        init({"w": jnp.float32(1.0)}, jax.random.key(0))


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (jnp.arange(3), r"int32\[3\]"),
        (np.zeros(2, bool), r"bool\[2\]"),
        (4, r"int32\[\]"),
        (jax.random.key(0), r"key<fry>\[\]"),
    ],
)
def test_a_leaf_without_a_gradient_is_named_at_init(leaf, kind):
    init, _ = meta_trainer(quadratic(), optax.sgd(0.1))
    with pytest.raises(TypeError, match=rf"'vocab\.ids' is {kind}.*Take it out of meta"):
        init({"w": jnp.ones(2), "vocab": {"ids": leaf}}, jax.random.key(0))


@pytest.mark.parametrize(
    "outer",
    [optax.sgd(0.1), optax.contrib.schedule_free_sgd(0.1)],  # the second keeps meta in its state
    ids=["sgd", "schedule_free"],
)
def test_donating_the_state_leaves_the_users_own_arrays_alone(outer):
    mine, key = {"w": jnp.ones(3)}, jax.random.key(3)
    init, step = meta_trainer(quadratic(), outer)
    jax.jit(step, donate_argnums=0)(init(mine, key), jnp.zeros(3))
    np.testing.assert_array_equal(mine["w"], 1.0)
    np.testing.assert_array_equal(jax.random.key_data(key), [0, 3])


def test_a_step_compiles_once_even_from_python_numbers():
    init, step = meta_trainer(quadratic(), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    traced = []

    def counted(state, episodes):
        traced.append(1)
        return step(state, episodes)

    compiled = jax.jit(counted)
    state = init({"w": 1.0}, jax.random.key(0))
    for _ in range(3):
        state, _ = compiled(state, jnp.float32(0.0))
    assert len(traced) == 1
    np.testing.assert_allclose(state.meta["w"], 0.9**3, rtol=1e-6)
