"""Learned learning rates against closed forms: gradient descent on a quadratic is a product."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmeta.core import optim

T = 4
CURVATURE = {"w": np.array([[0.5, 1.5, 0.2], [1.0, 0.3, 0.8]]), "b": np.array([2.0, 0.7, 1.1])}
START = {"w": np.array([[1.0, -2.0, 0.5], [0.3, 1.2, -0.7]]), "b": np.array([0.4, -1.0, 2.0])}
TARGET = {"w": np.full((2, 3), 0.1), "b": np.full(3, -0.2)}


def outer(optimizer, steps=T):
    """0.5 |theta_T - target|^2 after T steps on 0.5 sum a theta^2."""
    fast = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(fast)
    for _ in range(steps):
        grads = jax.tree.map(lambda a, x: jnp.asarray(a) * x, CURVATURE, fast)
        update, state = optimizer.update(grads, state, fast)
        fast = optax.apply_updates(fast, update)
    return 0.5 * sum(jnp.sum((fast[k] - TARGET[k]) ** 2) for k in fast)


def slope(make, rates, steps=T):
    """The gradient of ``outer`` in the rates of an optimizer, as one program."""
    return jax.jit(jax.grad(lambda r: outer(make(r), steps)))(rates)


def closed_form(rates):
    """d outer / d rates[t], entry by entry; ``rates[k]`` is ``[T, *leaf.shape]``."""
    grads = {}
    for k, a in CURVATURE.items():
        factors = 1 - rates[k] * a[None]
        end = START[k] * np.prod(factors, axis=0)
        others = np.stack([np.prod(np.delete(factors, t, axis=0), axis=0) for t in range(T)])
        grads[k] = (end - TARGET[k])[None] * START[k][None] * -a[None] * others
    return grads


def spread(value):
    """Different rates for each step and parameter."""
    rng = np.random.default_rng(3)
    return {k: value + 0.05 * rng.standard_normal((T, *a.shape)) for k, a in CURVATURE.items()}


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-13)


def test_scalar_rate(x64):
    rates = {k: np.full((T, *a.shape), 0.3) for k, a in CURVATURE.items()}
    got = slope(optim.learned_sgd, np.float64(0.3))
    close(got, sum(g.sum() for g in closed_form(rates).values()))


def test_meta_sgd_rate_for_each_parameter(x64):
    rates = {k: r[0] for k, r in spread(0.3).items()}
    got = slope(optim.learned_sgd, rates)
    expected = closed_form({k: np.repeat(r[None], T, axis=0) for k, r in rates.items()})
    for k in rates:
        close(got[k], expected[k].sum(axis=0))


def test_rate_for_each_leaf_and_step(x64):
    by_step = {"w": np.linspace(0.1, 0.4, T), "b": np.linspace(0.5, 0.2, T)}
    got = slope(optim.per_step, by_step)
    wide = {
        k: r.reshape(T, *[1] * CURVATURE[k].ndim) + 0 * CURVATURE[k][None]
        for k, r in by_step.items()
    }
    expected = closed_form(wide)
    for k in by_step:
        close(got[k], expected[k].reshape(T, -1).sum(axis=1))


def test_stacked_leaves_are_chosen_by_path_globs():
    params = {"blocks": {"ln": jnp.ones((4, 3)), "mlp": {"up": jnp.ones((4, 3, 5))}}}
    for glob, shapes in (("blocks.*", [(4,), ()]), ("blocks.**", [(4,), (4,)])):
        rates = optim.init_rates(params, 0.1, per="layer", stacked=glob)
        assert [rate.shape for rate in jax.tree.leaves(rates)] == shapes


def test_rate_for_each_stacked_layer_and_step(x64):
    rows = 0.1 + np.arange(T * 2).reshape(T, 2) / 20
    got = slope(optim.per_step, {"w": rows, "b": np.full(T, 0.2)})
    wide = {"w": np.repeat(rows[:, :, None], 3, axis=2), "b": np.full((T, 3), 0.2)}
    close(got["w"], closed_form(wide)["w"].sum(axis=2))


def test_rate_for_each_parameter_and_step_with_central_differences(x64):
    rates = spread(0.3)
    value = jax.jit(lambda r: outer(optim.per_step(r)))
    got = slope(optim.per_step, rates)
    for k, expected in closed_form(rates).items():
        close(got[k], expected)

    def shift(s):
        moved = np.array(rates["b"])
        moved[1, 2] += s
        return {**rates, "b": moved}

    numeric = (float(value(shift(1e-6))) - float(value(shift(-1e-6)))) / 2e-6
    np.testing.assert_allclose(got["b"][1, 2], numeric, rtol=1e-7)


def test_steps_beyond_the_last_rate_use_the_last_and_add_to_its_gradient(x64):
    a = slope(optim.per_step, np.array([0.3, 0.1]))
    b = np.asarray(slope(optim.per_step, np.array([0.3, 0.1, 0.1, 0.1])))
    close(a, np.stack([b[0], b[1:].sum()]))


def test_per_step_inside_scan_and_vmap_equals_the_loop(x64):
    rates = np.array([[0.3, 0.2, 0.1], [0.1, 0.05, 0.4]])

    def scanned(rates):
        tx = optim.per_step(rates)
        fast = jax.tree.map(jnp.asarray, START)

        def step(carry, _):
            fast, state = carry
            grads = jax.tree.map(lambda a, x: jnp.asarray(a) * x, CURVATURE, fast)
            update, state = tx.update(grads, state, fast)
            return (optax.apply_updates(fast, update), state), None

        (fast, state), _ = jax.lax.scan(step, (fast, tx.init(fast)), None, length=3)
        return 0.5 * sum(jnp.sum((fast[k] - TARGET[k]) ** 2) for k in fast), state.count

    grads, counts = jax.jit(jax.vmap(jax.grad(scanned, has_aux=True)))(rates)
    loop = jax.jit(jax.grad(lambda r: outer(optim.per_step(r), 3)))
    for row, got in zip(rates, np.asarray(grads), strict=True):
        close(got, loop(row))
    np.testing.assert_array_equal(counts, [3, 3])
    assert counts.dtype == jnp.int32


def test_rates_on_top_of_another_direction(x64):
    tx = optax.chain(optax.trace(decay=0.9), optim.scale_by_tree(jnp.float64(0.1)), optax.scale(-1))
    close(jax.jit(lambda: outer(tx))(), jax.jit(lambda: outer(optax.sgd(0.1, momentum=0.9)))())


def test_a_prefix_stands_for_everything_below_it():
    params = {"body": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "head": jnp.ones(3)}
    tx = optim.learned_sgd({"body": jnp.float32(0.5), "head": jnp.float32(2.0)})
    update, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(update["body"]["w"], -0.5 * np.ones((2, 2)))
    np.testing.assert_array_equal(update["head"], -2.0 * np.ones(3))


def test_updates_keep_the_dtype_of_the_gradient():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    rates = optim.init_rates(params, 0.5, per="element")
    assert rates["w"].dtype == jnp.float32
    update, _ = optim.learned_sgd(rates).update(params, optax.EmptyState())
    assert update["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("per", ["leaf", "layer", "element"])
@pytest.mark.parametrize("steps", [None, 3])
def test_initial_rates_take_the_steps_of_sgd(per, steps, x64):
    params = jax.tree.map(jnp.asarray, START)
    rates = optim.init_rates(params, 0.2, steps=steps, per=per)
    tx = optim.learned_sgd(rates) if steps is None else optim.per_step(rates)
    close(outer(tx), outer(optax.sgd(0.2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.learned_sgd({"w": jnp.float32(1)}), "no learning rate for leaf 'b'"),
        (
            lambda: optim.learned_sgd({"w": jnp.ones(()), "b": jnp.ones(()), "c": jnp.ones(())}),
            "no leaf of the parameters: c",
        ),
        (
            lambda: optim.learned_sgd({"w": jnp.ones(3), "b": jnp.ones(())}),
            r"leaf 'w' has shape \(3,\)",
        ),
        (lambda: optim.per_step(jnp.float32(0.1)), r"'\.' is a scalar"),
        (lambda: optim.per_step({"w": jnp.ones(2), "b": jnp.ones(3)}), "same number of steps"),
        (lambda: optim.per_step({"w": jnp.ones((2, 3)), "b": jnp.ones(2)}), "leaf 'w'"),
    ],
)
def test_rates_that_do_not_fit_are_named_at_init(make, message):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=message):
        make().init(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "row"}, "per must be"),
        ({"steps": 0}, "at least 1"),
        ({"per": "layer", "stacked": "blocks.*"}, "matches none"),
    ],
)
def test_initial_rates_refuse_what_they_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        optim.init_rates({"w": jnp.ones(2)}, 0.1, **options)
