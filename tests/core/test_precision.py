"""bfloat16: computing in it with float32 masters, and weights that are kept in it."""
# ruff: noqa: E731

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import parameters

import jmeta
from jmeta import Episode, Problem, Steps
from jmeta.models import transformer

BF16 = jnp.bfloat16
# bfloat16 keeps 8 bits: one rounding is 2**-9 = 0.2 %. A few dozen of them in a row, partly
# cancelling, give about 1 %; the same sums in another order differ as much between the two modes.
AGAINST_FLOAT32 = 0.06
BETWEEN_MODES = 0.04


def distance(got, expected):
    """Relative distance of two gradients as vectors."""
    flat = lambda tree: np.concatenate(
        [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    )
    return np.linalg.norm(flat(got) - flat(expected)) / np.linalg.norm(flat(expected))


def language_model(dtype):
    config = transformer.TransformerConfig(
        vocab=13, width=16, layers=1, heads=2, max_len=8, dtype=dtype
    )

    def loss(fast, meta, batch, key):
        return transformer.next_token_loss(config, fast, batch, key)

    return config, Problem(loss, loss, lambda meta: optax.sgd(0.1))


def run(mg, meta, episode, key=None):
    return jax.jit(lambda m, e: mg.estimate(m, mg.init(m, key), e, key))(meta, episode)


def tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, 13, (*shape, 8), np.int32)


def test_bfloat16_compute_gives_float32_meta_gradients_of_both_modes():
    config, half = language_model(BF16)
    _, full = language_model(None)

    # Larger than the initial weights, so that curvature matters.
    meta = parameters(transformer, config, spread=0.15)
    episode = Episode(tokens(1, 2, 4), tokens(2, 2, 4))
    wrap = lambda mg: jmeta.over_tasks(mg, microbatch=1)
    exact = run(wrap(jmeta.unrolled(full, 3)), meta, episode)[0]
    reverse = run(wrap(jmeta.unrolled(half, 3)), meta, episode)[0]
    mixed = run(wrap(jmeta.mixed_mode(half, 3)), meta, episode)[0]
    first = run(wrap(jmeta.first_order(full, 3)), meta, episode)[0]
    for grads in (reverse, mixed):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
        assert distance(grads, exact) < AGAINST_FLOAT32
    assert distance(mixed, reverse) < BETWEEN_MODES
    assert distance(mixed, exact) > 1e-5  # it was computed in bfloat16
    # The tolerance tells second order from first.
    assert distance(first, exact) > 2 * AGAINST_FLOAT32


def linear(fast, meta, batch, key):
    return jnp.mean(((fast["w"] - batch) ** 2).astype(jnp.float32)), {}


LINEAR = Problem(linear, linear, lambda meta: optax.sgd(0.1))
MAKERS = {
    "unrolled": jmeta.unrolled,
    "mixed_mode": jmeta.mixed_mode,
    "first_order": jmeta.first_order,
    "forward": jmeta.forward,
    "reptile": jmeta.reptile,
    "implicit": lambda problem, steps: jmeta.implicit(
        jmeta.proximal(problem, 1.0), steps, solver=jmeta.identity(0.5)
    ),
    "evolution": lambda problem, steps: jmeta.evolution(problem, steps, pairs=512),
    "pes": lambda problem, steps: jmeta.evolution(problem, steps, pairs=512, persistent=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_weights_kept_in_bfloat16_keep_their_dtype(name):
    run_at = lambda dtype: run(
        MAKERS[name](LINEAR, 2),
        {"w": np.linspace(-1.0, 1.0, 8).astype(dtype)},
        Episode(np.zeros(8, dtype), np.ones(8, dtype)),
        jax.random.key(0),
    )
    grads, _, info = run_at(BF16)
    assert grads["w"].dtype == BF16
    assert info.loss.dtype == jnp.float32
    if name not in ("evolution", "pes"):  # other random numbers in another dtype
        # Reptile subtracts weights near one that are rounded to 2**-9: 4 % of a step of 0.05.
        bound = 0.06 if name == "reptile" else 0.02
        assert distance(grads, run_at(jnp.float32)[0]) < bound


def test_a_loss_that_is_bfloat16_itself_is_legal():
    loss = lambda f, m, b, k: (jnp.mean((f["w"].astype(BF16) - b.astype(BF16)) ** 2), {})
    inner = lambda f, m, b, k: (loss(f, m, b, k)[0] + jnp.sum(m["w"] * f["w"]).astype(BF16), {})
    problem = Problem(inner, loss, lambda meta: optax.sgd(0.1))
    meta = {"w": jnp.linspace(-1.0, 1.0, 8)}
    episode = Episode(jnp.zeros(8), jnp.ones(8))
    makers = list(MAKERS.values())
    for make in makers:
        for steps in (0, 2):
            grads, _, info = run(make(problem, steps), meta, episode, jax.random.key(0))
            assert grads["w"].dtype == jnp.float32
            assert info.loss.dtype == BF16


@pytest.mark.parametrize("name", ["unrolled", "mixed_mode", "forward", "evolution"])
def test_meta_of_two_dtypes_keeps_both(name):
    def loss(f, m, b, k):
        value = jnp.mean((f["w"].astype(jnp.float32) - b) ** 2)
        return value * jnp.sum(m["scale"]), {}

    problem = Problem(loss, loss, lambda m: optax.sgd(0.1), init=lambda m, key: {"w": m["w"]})
    meta = {"w": jnp.linspace(-1.0, 1.0, 8).astype(BF16), "scale": jnp.ones(2)}
    mg = MAKERS[name](problem, 2)
    grads = run(mg, meta, Episode(jnp.zeros(8), jnp.ones(8)), jax.random.key(0))[0]
    assert (grads["w"].dtype, grads["scale"].dtype) == (BF16, jnp.float32)


@pytest.mark.parametrize("microbatch", [None, 1])
def test_bfloat16_meta_gradients_are_summed_in_float32(microbatch):
    # 256 + 1 + 1 + ... is 256 in bfloat16, whatever follows.
    targets = np.asarray([256.0, *[1.0] * 255], np.float32)
    loss = lambda f, m, b, k: (f.astype(jnp.float32) * b, {})
    mg = jmeta.over_tasks(
        jmeta.unrolled(Problem(loss, loss, lambda m: optax.sgd(0.1)), 0), microbatch=microbatch
    )
    grads = run(mg, jnp.ones((), BF16), Episode(targets, targets))[0]
    assert grads.dtype == BF16
    assert float(grads) == float(jnp.asarray(511 / 256, BF16))


def test_float32_losses_run_while_64_bit_types_are_enabled():
    # Empty losses of a loop without steps must not bring float64 in.
    with jax.enable_x64(True):
        meta = {"w": jnp.ones(3, jnp.float32)}
        loss = lambda f, m, b, k: (jnp.sum((f["w"] * m["w"] - b) ** 2), {})
        problem = Problem(loss, loss, lambda m: optax.sgd(0.1))
        chunk = jnp.zeros(3, jnp.float32)
        episode = Episode(Steps(jnp.stack([chunk] * 2)), chunk)
        mg = jmeta.truncated(problem, 2, window=2)
        grads, _, info = jax.jit(mg.estimate)(meta, (), episode, None)
    assert grads["w"].dtype == info.inner_losses.dtype == jnp.float32


def test_a_learned_rate_is_not_rounded_to_the_narrower_of_two_dtypes():
    # 0.1 is 0.1001 in bfloat16: the float32 leaf must not see that.
    def loss(f, m, b, k):
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(f)), {}

    problem = Problem(
        loss, loss, lambda m: optax.sgd(m["rate"]), init=lambda m, key: {"a": m["a"], "b": m["b"]}
    )
    meta = {"a": jnp.ones(2, BF16), "b": jnp.ones(2), "rate": jnp.asarray(0.1)}
    grads = run(jmeta.mixed_mode(problem, 1), meta, Episode(jnp.zeros(1), jnp.zeros(1)))[0]
    np.testing.assert_allclose(grads["b"], 2 * 0.8**2, rtol=1e-6)
