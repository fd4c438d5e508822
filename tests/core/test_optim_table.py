"""Which inner optimizers give a finite meta-gradient: the truth, optimizer by optimizer.

A network with a dead ReLU unit, a gain on each unit and an embedding row that the support set
never reads ("entries"); the same with all units dead, so whole leaves have gradient zero ("leaf").
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jmeta.core import optim

SUPPORT = (np.array([0, 1, 2, 3, 0, 2]), np.array([0, 1, 2, 0, 1, 2]))
QUERY = (np.array([0, 1, 2, 3, 4, 4]), np.array([2, 1, 0, 2, 1, 0]))

# Sixty programs that each run twice: compile quickly rather than well.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def weights(dead, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):  # positive: a unit with positive weights is alive, one with negative dead
        return 0.5 + 0.5 * np.abs(rng.standard_normal(shape))

    kernel, unit = draw(4, 3), slice(None) if dead == "leaf" else 2
    kernel[:, unit] = -5.0
    params = {"embed": draw(5, 4), "kernel": kernel, "gain": np.ones(3)}
    return {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}


def loss(params, batch):
    # Squared errors and few leaves: of each operation sixty optimizers' gradients are traced.
    tokens, labels = batch
    hidden = jax.nn.relu(params["embed"][tokens] @ params["kernel"])
    return jnp.mean((hidden * params["gain"][None] - np.eye(3, dtype=np.float32)[labels]) ** 2)


def meta_gradients(optimizer, steps=3):
    """The meta-gradient for zero entries and for whole zero leaves, compiled once."""

    def outer(params):
        def step(carry, _):
            fast, state = carry
            value, grads = jax.value_and_grad(loss)(fast, SUPPORT)
            update, state = told.update(grads, state, fast, value=value)
            return (optax.apply_updates(fast, update), state), None

        (fast, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
        return loss(fast, QUERY)

    told = optax.with_extra_args_support(optimizer)
    gradient = jax.jit(jax.grad(outer), compiler_options=QUICK)
    return gradient(weights("entries")), gradient(weights("leaf"))


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# name: (optax's, finite with zero entries, finite with a zero leaf, jmeta's or None)
TABLE = {
    "sgd": (optax.sgd(0.1), True, True, None),
    "momentum": (optax.sgd(0.1, momentum=0.9), True, True, None),
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), True, True, None),
    "rmsprop": (optax.rmsprop(0.01), True, True, None),
    "rmsprop eps outside": (optax.rmsprop(0.01, eps_in_sqrt=False), False, False, None),
    "rmsprop centered": (optax.rmsprop(0.01, centered=True), True, True, None),
    "adagrad": (optax.adagrad(0.01), True, True, None),
    "adadelta": (optax.adadelta(0.01), True, True, None),
    "adam": (optax.adam(0.01), False, False, optim.adam(0.01)),
    "adamw": (optax.adamw(0.01), False, False, optim.adamw(0.01)),
    "adam stopped": (optax.adam(0.01), False, False, optim.adam_stopped(0.01)),
    "adamw stopped": (optax.adamw(0.01), False, False, optim.adamw_stopped(0.01)),
    "nadam": (optax.nadam(0.01), False, False, optim.nadam(0.01)),
    "nadamw": (optax.nadamw(0.01), False, False, optim.nadamw(0.01)),
    "amsgrad": (optax.amsgrad(0.01), False, False, optim.amsgrad(0.01)),
    "radam": (optax.radam(0.01), False, False, optim.radam(0.01)),
    "lamb": (optax.lamb(0.01), False, False, optim.lamb(0.01)),
    "adafactor": (optax.adafactor(0.01), False, False, optim.adafactor(0.01)),
    "adafactor factored": (
        optax.adafactor(0.01, min_dim_size_to_factor=2),
        False,
        False,
        optim.adafactor(0.01, min_dim_size_to_factor=2),
    ),
    "muon": (contrib.muon(0.01), False, False, optim.muon(0.01)),
    "lars": (optax.lars(0.01), True, False, optim.lars(0.01)),
    "adamax": (optax.adamax(0.01), True, True, None),
    "adamaxw": (optax.adamaxw(0.01), True, True, None),
    "adan": (optax.adan(0.01), True, True, None),
    "adabelief": (optax.adabelief(0.01), True, True, None),
    "novograd": (optax.novograd(0.01), True, False, None),
    "optimistic gradient": (optax.optimistic_gradient_descent(0.01), True, True, None),
    "optimistic adam": (
        optax.optimistic_adam_v2(0.01),
        False,
        False,
        optax.optimistic_adam_v2(0.01, eps_root=1e-16),
    ),
    "sm3": (optax.sm3(0.01), True, True, None),
    "yogi": (optax.yogi(0.01), True, True, None),
    "fromage": (optax.fromage(0.01), True, True, None),
    "noisy sgd": (optax.noisy_sgd(0.01, key=0), True, True, None),
    "lion": (optax.lion(0.01), True, True, None),
    "signum": (optax.signum(0.01), True, True, None),
    "sign sgd": (optax.sign_sgd(0.01), True, True, None),
    "rprop": (optax.rprop(0.01), True, True, None),
    "clip by global norm": (
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        True,
        False,
        optax.chain(optim.clip_by_global_norm(0.1), optax.sgd(0.1)),
    ),
    "clip by block rms": (
        optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
        True,
        False,
        optax.chain(optim.clip_by_block_rms(0.01), optax.sgd(0.1)),
    ),
    "adaptive clip": (
        optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
        False,
        False,
        None,
    ),
    "ademamix": (contrib.ademamix(0.01), False, False, None),
    "simplified ademamix": (contrib.simplified_ademamix(0.01), False, False, None),
    "adopt": (contrib.adopt(0.01), False, False, None),
    "madgrad": (contrib.madgrad(0.01), False, False, None),
    "prodigy": (contrib.prodigy(0.01), False, False, None),
    "dadapt adamw": (contrib.dadapt_adamw(0.01), False, False, None),
    "schedule free adamw": (contrib.schedule_free_adamw(0.01), False, False, None),
    "dog": (contrib.dog(0.01), False, False, None),
    "dowg": (contrib.dowg(0.01), True, False, None),
    "galore": (contrib.galore(0.01), False, False, None),
    "cocob": (contrib.cocob(), True, True, None),
    "acprop": (contrib.acprop(0.01), True, True, None),
    # These two ask for the loss.
    "polyak": (optax.polyak_sgd(), True, False, optax.polyak_sgd(eps=1e-6)),
    "reduce on plateau": (
        optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)),
        True,
        True,
        None,
    ),
}


# Always: those that jmeta has its own of. With -m slow: those that it leaves as they are, too.
@pytest.mark.parametrize(
    "name",
    [
        name if TABLE[name][3] is not None else pytest.param(name, marks=pytest.mark.slow)
        for name in TABLE
    ],
)
def test_what_optax_does_is_what_the_docstring_says(name):
    theirs, entries, leaf, _ = TABLE[name]
    # optax needs standard promotion, and some of optax.contrib a rank promotion too.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grads = meta_gradients(theirs)
    assert tuple(map(finite, grads)) == (entries, leaf)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[3] is not None])
def test_ours_is_finite_where_optax_is_not(name):
    with jax.numpy_dtype_promotion("standard" if name == "optimistic adam" else "strict"):
        some, whole = meta_gradients(TABLE[name][3])
    assert finite(some)
    assert finite(whole)
    # The meta-gradient is there, not zeroed along with the NaN; and with every unit dead the
    # query loss is constant, so its gradient is exactly zero.
    assert np.abs(some["embed"]).max() > 1e-3
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("name", ["lion", "signum", "sign sgd", "rprop"])
@jax.numpy_dtype_promotion("standard")
def test_sign_updates_are_first_order_whatever_is_asked(name):
    params = weights("entries")
    optimizer = TABLE[name][0]

    def first_order(params):
        def step(carry, _):
            fast, state = carry
            grads = jax.lax.stop_gradient(jax.grad(loss)(fast, SUPPORT))
            update, state = optimizer.update(grads, state, fast)
            return (optax.apply_updates(fast, update), state), None

        (fast, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)
        return loss(fast, QUERY)

    exact, cheap = (
        meta_gradients(optimizer)[0],
        jax.jit(jax.grad(first_order), compiler_options=QUICK)(params),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), exact, cheap)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "radam", "lamb", "adafactor", "muon", "lars"])
@jax.numpy_dtype_promotion("standard")
def test_the_meta_gradient_is_true_where_nothing_is_dead(name, x64):
    """A smooth network: against central differences through optax's own update."""
    rng = np.random.default_rng(1)
    params = {
        "kernel": jnp.asarray(rng.standard_normal((4, 3))),
        "gain": jnp.asarray(1 + rng.standard_normal(3)),
    }
    support, query = zip(
        rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 3)), strict=True
    )

    def smooth_loss(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["kernel"]) * params["gain"][None] - y) ** 2)

    def outer(params, optimizer, steps=7 if name == "radam" else 3):  # rectified from step 6 on
        def step(carry, _):
            fast, state = carry
            update, state = optimizer.update(jax.grad(smooth_loss)(fast, support), state, fast)
            return (optax.apply_updates(fast, update), state), None

        (fast, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
        return smooth_loss(fast, query)

    theirs, _, _, ours = TABLE[name]
    grads = jax.jit(jax.grad(lambda p: outer(p, ours)))(params)
    value = jax.jit(lambda p: outer(p, theirs))
    direction = {k: rng.standard_normal(leaf.shape) for k, leaf in params.items()}

    def shift(s):
        return {k: np.asarray(leaf) + s * direction[k] for k, leaf in params.items()}

    numeric = (float(value(shift(1e-5))) - float(value(shift(-1e-5)))) / 2e-5
    exact = sum(np.vdot(grads[k], direction[k]) for k in grads)
    np.testing.assert_allclose(exact, numeric, rtol=1e-5)
