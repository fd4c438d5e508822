"""What is wrong with a problem is said when it is built or first traced, in the user's words."""
# ruff: noqa: E731, RUF043

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas

import jmeta
from jmeta import Episode, NotDifferentiableError, Problem, Steps
from jmeta.runtime.evaluate import adapt

VECTOR = jnp.asarray([1.0, -2.0, 0.5])


def square(fast, meta, batch, key):
    return jnp.mean((fast["w"] - batch) ** 2), {}


def learned_start(loss):
    return Problem(loss, loss, lambda meta: optax.sgd(0.1))


META = {"w": VECTOR}
EPISODE = Episode(jnp.zeros(3), jnp.ones(3))
ESTIMATORS = {
    "unrolled": jmeta.unrolled,
    "mixed_mode": jmeta.mixed_mode,
    "first_order": jmeta.first_order,
    "forward": jmeta.forward,
    "reptile": jmeta.reptile,
    "implicit": lambda problem, steps: jmeta.implicit(jmeta.proximal(problem, 1.0), steps),
    "evolution": jmeta.evolution,
    "truncated": lambda problem, steps: jmeta.truncated(problem, steps, window=1),
}


def estimate(make, problem, steps=1, meta=META, episode=EPISODE, key=None):
    mg = make(problem, steps)
    run = jax.jit(lambda meta, episode: mg.estimate(meta, mg.init(meta, key), episode, key))
    return run(meta, episode)


# Losses of the wrong kind

WRONG = {
    "vector": (lambda f, m, b, k: (f["w"] - b, {}), r"{} returned a loss of shape \(3,\).*mean"),
    "integer": (lambda f, m, b, k: (jnp.argmax(f["w"]), {}), r"{} returned a loss of dtype int"),
    "bare": (lambda f, m, b, k: jnp.mean(f["w"]), r"{} returned \w*Tracer; .*pair \(loss, aux\)"),
    "triple": (lambda f, m, b, k: (1.0, {}, {}), r"{} returned tuple; .*pair \(loss, aux\)"),
    "none": (lambda f, m, b, k: None, r"{} returned NoneType; .*pair"),
}


@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loss_of_the_wrong_kind_is_named(name, wrong, which):
    loss, message = WRONG[wrong]
    problem = learned_start(square)._replace(**{which: loss})
    wrapped = which == "inner_loss" and name == "implicit"  # proximal would unpack the answer
    make = jmeta.implicit if wrapped else ESTIMATORS[name]
    with pytest.raises(TypeError, match=message.format(which)) as caught:
        estimate(make, problem, key=jax.random.key(0))
    assert not isinstance(caught.value, NotDifferentiableError)


# Not finite at step 0


def test_check_is_silent_about_a_sound_problem():
    problem = learned_start(square)
    assert jmeta.check(problem, META, EPISODE) is None
    steps = Episode(Steps(jnp.zeros((2, 3))))
    assert jmeta.check(problem, META, steps, jax.random.key(0)) is None


def test_check_names_what_is_not_finite():
    problem = learned_start(square)
    with pytest.raises(FloatingPointError, match=r"inner_loss is nan at step 0.*'w' of fast"):
        jmeta.check(problem, {"w": VECTOR.at[1].set(jnp.nan)}, EPISODE)
    with pytest.raises(FloatingPointError, match=r"inner_loss is inf at step 0.*of support"):
        jmeta.check(problem, META, Episode(jnp.full(3, jnp.inf), jnp.zeros(3)))
    with pytest.raises(FloatingPointError, match=r"outer_loss is nan at step 0.*of query"):
        jmeta.check(problem, META, Episode(jnp.zeros(3), jnp.full(3, jnp.nan)))

    def log(fast, meta, batch, key):
        return jnp.sum(jnp.log(fast["w"])), {}

    with pytest.raises(FloatingPointError, match="inner_loss is nan at step 0, before any update$"):
        jmeta.check(learned_start(log), META, EPISODE)

    def root(fast, meta, batch, key):
        return jnp.sum(fast["w"] ** 2) + jnp.linalg.norm(fast["b"]), {}

    with pytest.raises(FloatingPointError, match="inner gradient of 'b' is not finite at step 0"):
        jmeta.check(learned_start(root), {"w": VECTOR, "b": jnp.zeros(2)}, EPISODE)
    whole = problem._replace(init=lambda meta, key: {"w": jnp.arange(3)})
    with pytest.raises(TypeError, match="'w' of the fast weights has dtype int32"):
        jmeta.check(whole, META, EPISODE)


# Operations without a derivative


def looped(fast, meta, batch, key):
    def body(carry):
        return carry[0] + 1, carry[1] * 0.5

    _, w = jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, fast["w"]))
    return jnp.mean((w - batch) ** 2), {}


@jax.custom_vjp
def fused_attention(x):
    return jnp.sin(x)


def fused_forward(x):
    return jnp.sin(x), x


def fused_backward(x, bar):
    # A kernel's backward pass: opaque to JAX, as fused attention's is.
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (bar * jax.pure_callback(lambda x: np.cos(x), shape, x, vmap_method="sequential"),)


fused_attention.defvjp(fused_forward, fused_backward)


def fused(fast, meta, batch, key):
    return jnp.mean((fused_attention(fast["w"]) - batch) ** 2), {}


def host(fast, meta, batch, key):
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    w = jax.pure_callback(lambda x: np.asarray(x) ** 2, shape, fast["w"], vmap_method="sequential")
    return jnp.mean((w - batch) ** 2), {}


def kernel(x_ref, o_ref):
    o_ref[...] = jnp.sin(x_ref[...])


@jax.custom_vjp
def pallas_sine(x):
    return _pallas(kernel, x)


def _pallas(body, x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pallas.pallas_call(body, out_shape=shape, interpret=True)(x)


def cosine_kernel(x_ref, o_ref):
    o_ref[...] = jnp.cos(x_ref[...])


pallas_sine.defvjp(
    lambda x: (_pallas(kernel, x), x), lambda x, bar: (bar * _pallas(cosine_kernel, x),)
)


def flash(fast, meta, batch, key):
    return jnp.mean((pallas_sine(fast["w"]) - batch) ** 2), {}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_while_loop_in_the_inner_loss_is_named(name):
    with pytest.raises(NotDifferentiableError, match=r"not differentiated even once.*scan.*while"):
        estimate(ESTIMATORS[name], learned_start(looped), key=jax.random.key(0))


def test_a_while_loop_is_named_when_a_user_adapts():
    with pytest.raises(NotDifferentiableError, match=r"not differentiated even once.*scan.*while"):
        adapt(learned_start(looped), META, EPISODE.support, steps=1)


@pytest.mark.parametrize("name", ["unrolled", "mixed_mode", "forward", "implicit", "truncated"])
def test_a_kernel_without_a_second_derivative_is_named(name):
    problem = learned_start(fused)
    if name == "truncated":  # of which the start alone would give nothing to differentiate
        problem = problem._replace(
            inner_loss=lambda fast, meta, batch, key: fused(fast, meta, batch * meta["w"], key)
        )
    with pytest.raises(NotDifferentiableError, match=r"attention='xla'") as caught:
        estimate(ESTIMATORS[name], problem, steps=2)
    message = str(caught.value)
    assert "fused_attention (custom_vjp" in message
    assert "pure_callback" in message
    assert "inner_gradient" not in message  # jmeta's own rule is not to blame
    assert "jmeta.first_order" in message


def test_first_order_needs_no_second_derivative():
    sine = learned_start(lambda f, m, b, k: (jnp.mean((jnp.sin(f["w"]) - b) ** 2), {}))
    for name in ("first_order", "reptile"):
        for loss in (fused, flash):
            got = estimate(ESTIMATORS[name], learned_start(loss), steps=3)[0]
            expected = estimate(ESTIMATORS[name], sine, steps=3)[0]
            np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-5)


def test_first_order_scores_chunks_online_without_a_second_derivative():
    sine = learned_start(lambda f, m, b, k: (jnp.mean((jnp.sin(f["w"]) - b) ** 2), {}))
    episode = Episode(Steps(jnp.linspace(0.0, 1.0, 6).reshape(2, 3)))
    online = lambda problem, steps: jmeta.first_order(problem, steps, objective=jmeta.online)
    got = estimate(online, learned_start(fused), 2, episode=episode)[0]
    expected = estimate(online, sine, 2, episode=episode)[0]
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-5)


def test_a_callback_without_any_derivative_is_named():
    for name in ("unrolled", "mixed_mode", "first_order"):
        with pytest.raises(NotDifferentiableError, match="not differentiated even once.*callback"):
            estimate(ESTIMATORS[name], learned_start(host))
    # In the encoder nothing is differentiated, if nothing learned flows through it.
    encoded = learned_start(square)._replace(
        encode=lambda meta, batch, key: host_square(batch),
    )
    estimate(jmeta.mixed_mode, encoded)


def host_square(batch):
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    return jax.pure_callback(lambda x: np.asarray(x) ** 2, shape, batch, vmap_method="sequential")


def test_a_pallas_kernel_may_have_a_first_derivative_and_no_second():
    # In mixed mode a jvp of the backward kernel is enough, and Pallas has it; it must be right.
    sine = learned_start(lambda f, m, b, k: (jnp.mean((jnp.sin(f["w"]) - b) ** 2), {}))
    expected = estimate(jmeta.unrolled, sine, steps=2)[0]
    got = estimate(jmeta.mixed_mode, learned_start(flash), steps=2)[0]
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-5)
    with pytest.raises(NotDifferentiableError, match=r"pallas_sine \(custom_vjp"):
        estimate(jmeta.unrolled, learned_start(flash), steps=2)


# The user's own errors


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, NotImplementedError])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_errors_in_a_users_loss_pass_through_unchanged(name, kind):
    def typo(fast, meta, batch, key):
        raise kind("a typo of mine")

    for which in ("inner_loss", "outer_loss"):
        problem = learned_start(square)._replace(**{which: typo})
        with pytest.raises(kind, match="a typo of mine") as caught:
            estimate(ESTIMATORS[name], problem, key=jax.random.key(0))
        assert type(caught.value) is kind


def test_a_failing_optimizer_is_not_blamed_on_the_losses():
    def broken(updates, state, params=None):
        raise ValueError("my optimizer is broken")

    problem = learned_start(fused)._replace(
        optimizer=lambda meta: optax.GradientTransformation(lambda params: (), broken)
    )
    with pytest.raises(ValueError, match="my optimizer is broken") as caught:
        estimate(jmeta.first_order, problem)
    assert type(caught.value) is ValueError


# Problems an estimator cannot serve


def test_implicit_needs_an_inner_loss_that_reads_meta():
    with pytest.raises(ValueError, match=r"never reads meta.*proximal.*mixed_mode.*leaves: w"):
        estimate(jmeta.implicit, learned_start(square))

    def penalty(fast, meta, batch, key):  # meta in the loss, but not in its gradient
        return square(fast, meta, batch, key)[0] + jnp.sum(meta["w"] ** 2), {}

    with pytest.raises(ValueError, match="never reads meta"):
        estimate(jmeta.implicit, learned_start(penalty))
    estimate(jmeta.implicit, jmeta.proximal(learned_start(square), 0.5))


def test_reptile_needs_fast_weights_like_meta():
    head = learned_start(square)._replace(init=lambda meta, key: {"w": meta["head"]})
    with pytest.raises(ValueError, match=r"one structure.*jmeta\.first_order"):
        estimate(jmeta.reptile, head, meta={"head": VECTOR, "body": VECTOR})
    short = learned_start(lambda f, m, b, k: (jnp.sum(f["w"] ** 2), {}))._replace(
        init=lambda meta, key: {"w": meta["w"][:2]}
    )
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(2,\) and meta's has \(3,\)"):
        estimate(jmeta.reptile, short)


def test_truncated_needs_something_beyond_the_start_to_read_meta():
    with pytest.raises(ValueError, match=r"exactly zero; use mixed_mode or first_order"):
        estimate(ESTIMATORS["truncated"], learned_start(square), steps=3)
    with pytest.raises(ValueError, match="a window of 5 steps does not fit into 3"):
        jmeta.truncated(learned_start(square), 3, window=5)


def test_forward_refuses_many_meta_parameters_and_names_what_to_use():
    loss = lambda f, m, b, k: (jnp.mean(f["w"] ** 2), {})
    with pytest.raises(ValueError, match=r"each of the 10001 meta-parameters.*jmeta\.mixed_mode"):
        estimate(jmeta.forward, learned_start(loss), meta={"w": jnp.ones(10_001)})


def test_evolution_needs_a_key():
    with pytest.raises(ValueError, match=r"pass a jax\.random\.key"):
        estimate(jmeta.evolution, learned_start(square))


UNROLLED = ["unrolled", "mixed_mode", "first_order", "forward", "evolution"]


@pytest.mark.parametrize("name", UNROLLED)
def test_online_needs_steps_and_enough_of_them(name):
    make = lambda p, s: ESTIMATORS[name](p, s, **{"objective": jmeta.online})
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"online.*must be jmeta\.Steps"):
        estimate(make, learned_start(square), key=key)
    few = Episode(Steps(jnp.zeros((2, 3))))
    with pytest.raises(ValueError, match="3 inner steps are asked for.*Steps of 2 batches"):
        estimate(make, learned_start(square), steps=3, episode=few, key=key)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "truncated"])
def test_too_few_steps_and_steps_that_disagree(name):
    few = Episode(Steps(jnp.zeros((2, 3))), jnp.ones(3))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="3 inner steps are asked for.*Steps of 2 batches"):
        estimate(ESTIMATORS[name], learned_start(square), steps=3, episode=few, key=key)
    both = Episode(Steps({"x": jnp.zeros((2, 3)), "y": jnp.zeros((3, 3))}), jnp.ones(3))
    loss = lambda f, m, b, k: square(f, m, b["x"] if isinstance(b, dict) else b, k)
    with pytest.raises(ValueError, match="every leaf of Steps needs the same leading axis"):
        estimate(ESTIMATORS[name], learned_start(loss), steps=2, episode=both, key=key)


def test_objectives_that_do_not_fit():
    problem = learned_start(square)
    with pytest.raises(ValueError, match=r"weights of shape \(2,\) for 3 inner steps"):
        jmeta.unrolled(problem, 3, objective=jmeta.multi_step([0.5, 0.5]))
    with pytest.raises(ValueError, match="online objective reads the loss at each step"):
        jmeta.unrolled(problem, 0, objective=jmeta.online)
    with pytest.raises(ValueError, match="number of inner steps is -1"):
        jmeta.unrolled(problem, -1)
    with pytest.raises(ValueError, match="scores the query; this episode has none"):
        estimate(jmeta.mixed_mode, problem, episode=Episode(jnp.zeros(3)))


@pytest.mark.parametrize("steps_marked", [False, True])
@pytest.mark.parametrize("name", ["unrolled", "mixed_mode", "first_order", "forward", "implicit"])
def test_zero_inner_steps_are_the_plain_gradient(name, steps_marked):
    episode = Episode(Steps(jnp.zeros((2, 3))), jnp.ones(3)) if steps_marked else EPISODE
    grads, _, info = estimate(ESTIMATORS[name], learned_start(square), steps=0, episode=episode)
    np.testing.assert_allclose(grads["w"], 2 / 3 * (VECTOR - 1.0), rtol=1e-6)
    assert info.inner_losses.shape == (0,)
    assert float(info.loss) == pytest.approx(float(jnp.mean((VECTOR - 1.0) ** 2)))


def test_reptile_with_zero_steps_moves_nothing():
    grads, _, _ = estimate(jmeta.reptile, learned_start(square), steps=0)
    assert grads["w"].tolist() == [0.0, 0.0, 0.0]


def test_an_encoder_sees_batches_and_nothing_else():
    # Reptile and adapt score no query, so no encoder may be asked to encode a missing one.
    encoded = learned_start(square)._replace(encode=lambda m, batch, key: 2.0 * batch["x"])
    data = {"x": jnp.ones(3)}
    plain = learned_start(lambda f, m, b, k: square(f, m, 2.0 * b["x"], k))
    for query in (None, data):
        episode = Episode(data, query)
        got, _, info = estimate(jmeta.reptile, encoded, 2, episode=episode)
        expected, _, same = estimate(jmeta.reptile, plain, 2, episode=episode)
        np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-6)
        assert float(info.loss) == pytest.approx(float(same.loss))
    np.testing.assert_allclose(
        jmeta.adapt(encoded, META, data, 2)["w"], jmeta.adapt(plain, META, data, 2)["w"], rtol=1e-6
    )
