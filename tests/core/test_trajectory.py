"""The scan that keeps only carries: the gradients of a plain scan, for less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.core.tracing import scan_parts
from jmeta.core.trajectory import scan_from_carries
from jmeta.testing import equations, relative_error

WIDTH = 5


def world(steps: int):
    """A step with everything in it: a counter and a key carried, scored outputs, closures."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    return {
        "w": normal(WIDTH),
        "m": normal(WIDTH, WIDTH) / WIDTH,
        "unread": jnp.asarray(np.ones(WIDTH)),
        "xs": normal(steps, WIDTH),
        "labels": jnp.asarray(np.arange(steps)),
        "key": jax.random.key(0),
    }


def unrolled_value(scan, steps: int, parts: dict) -> jax.Array:
    """A scalar that depends on the last carry, on scored outputs, on xs and on a closure."""

    def step(carry, x):
        w, momentum, count, key = carry
        row, label = x
        # The bits of the key will do for noise: a normal draw takes a second to compile.
        bits = jax.random.key_data(jax.random.fold_in(key, count))
        noise = jnp.mean(bits.astype(w.dtype) / 2.0**31) - 1
        g = jnp.tanh(parts["m"] @ w + row) * (1 + label.astype(w.dtype)) + 0.1 * noise
        g = g + 0 * jax.lax.stop_gradient(parts["unread"])
        momentum = 0.9 * momentum + g
        loss = jnp.sum(g**2)
        return (w - 0.1 * momentum, momentum, count + 1, key), (loss, count)

    start = (parts["w"], jnp.zeros(WIDTH), jnp.zeros((), jnp.int32), parts["key"])
    (w, *_), (losses, counts) = scan(step, start, (parts["xs"], parts["labels"]), steps)
    return jnp.sum(jnp.sin(w)) + jnp.sum(losses * counts.astype(w.dtype))


def plain(step, carry, xs, length):
    return jax.lax.scan(step, carry, xs, length=length)


def floats(parts: dict) -> dict:
    return {name: leaf for name, leaf in parts.items() if name not in ("labels", "key")}


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(scan, steps: int, parts: dict):
    def value(chosen):
        return unrolled_value(scan, steps, parts | chosen)

    return jax.value_and_grad(value)(floats(parts))


offloaded = functools.partial(scan_from_carries, offload=True)
exact = pytest.mark.parametrize(
    "scan", [scan_from_carries, offloaded], ids=["on the device", "on the host"]
)


@exact
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_equals_a_plain_scan(x64, scan, steps):
    parts = world(steps)
    value, grads = gradient(scan, steps, parts)
    expected, reference = gradient(plain, steps, parts)
    assert value == expected
    assert relative_error(grads, reference) < 1e-13


def rounded(step, carry, xs, length):
    return scan_from_carries(step, carry, xs, length, halved=lambda carry: carry[0])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_rounded_weights_are_off_by_the_rounding(x64, steps):
    # In float64 differences are kept in float32: 2^-24 of the way from the start.
    parts = world(steps)
    value, grads = gradient(rounded, steps, parts)
    expected, reference = gradient(plain, steps, parts)
    assert value == expected
    error = relative_error(grads, reference)
    assert error < 1e-6
    if steps > 1:  # the first step starts from the caller's own weights, the others do not
        assert error > 1e-12


def test_rounded_differences_that_fit_are_not_rounded():
    # Every weight moves by a multiple of 2^-6: half precision holds the difference, and would not
    # hold the weight.
    step = lambda w, x: (w + x, jnp.sum(jnp.sin(w) * w))  # noqa: E731
    start = 1.0 + jnp.arange(4.0) / 7
    xs = jnp.asarray([[0.5, 1.0, 0.25, -1.0], [1 / 64, -0.5, 2.0, 0.0], [1.0, 1.0, 0.125, 3.0]])

    def slope(scan):
        return jax.jit(jax.grad(lambda w: jnp.sum(scan(step, w, xs, 3)[1])))(start)

    rounded = slope(lambda *args: scan_from_carries(*args, halved=lambda w: w))
    assert relative_error(rounded, slope(scan_from_carries)) < 1e-6
    one_step = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(w) * w)))
    halved = np.asarray(one_step(start.astype(jnp.float16)), np.float32)
    assert relative_error(halved, one_step(start)) > 1e-5


def test_what_halves_do_not_hold_is_kept_whole(x64):
    # Counters, keys and half precision itself among the weights.
    parts = world(5)
    everything = lambda *args: scan_from_carries(*args, halved=lambda carry: carry)  # noqa: E731
    _, grads = gradient(everything, 5, parts)
    assert relative_error(grads, gradient(plain, 5, parts)[1]) < 1e-6


@exact
def test_under_vmap(x64, scan):
    parts = world(3)
    stretch = jnp.asarray([1.0, 0.5, -2.0])

    def through(scan):
        one = lambda s: gradient(scan, 3, parts | {"w": s * parts["w"]})[1]  # noqa: E731
        return jax.jit(jax.vmap(one))(stretch)

    assert relative_error(through(scan), through(plain)) < 1e-13


@exact
def test_differentiates_twice(x64, scan):
    parts = world(3)

    def curvature(scan):
        def slope(w):
            return jnp.sum(jnp.cos(gradient(scan, 3, parts | {"w": w})[1]["w"]))

        return jax.jit(jax.grad(slope))(parts["w"])

    assert relative_error(curvature(scan), curvature(plain)) < 1e-12


def test_offloaded_carries_are_on_the_host_and_come_back_one_at_a_time():
    parts, steps = world(4), 4
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda chosen: unrolled_value(offloaded, steps, parts | chosen))
    )(floats(parts))
    scans = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]
    forwards = next(eqn for eqn in scans if not eqn.params["reverse"])
    backwards = next(eqn for eqn in scans if eqn.params["reverse"])

    def carries(variables):
        found = [v.aval for v in variables if v.aval.shape == (steps, WIDTH)]
        return [aval.memory_space == jax.memory.Space.Host for aval in found]

    # The weights and the momentum, one carry a step, and the rows of xs beside them.
    assert carries(forwards.outvars) == [True, True]
    assert sorted(carries(backwards.invars)) == [False, True, True]
    returned = [eqn for eqn in equations(backwards.params["jaxpr"])
                if eqn.primitive.name == "device_put"]  # fmt: skip
    assert [eqn.outvars[0].aval.shape for eqn in returned] == [(WIDTH,), (WIDTH,)]


def test_without_xs_and_with_python_numbers():
    last = lambda w: scan_from_carries(lambda c, _: (c * w, None), 1.0, None, 4)[0]  # noqa: E731
    assert float(last(3.0)) == 81.0
    assert float(jax.grad(last)(3.0)) == 108.0


def memory(scan, steps: int, width: int) -> int:
    def value(w, meta):
        def step(w, _):
            return w - 0.1 * jnp.sin(w * meta), None

        return jnp.sum(scan(step, w, None, steps)[0])

    shape = jax.ShapeDtypeStruct((width,), jnp.float32)
    compiled = jax.jit(jax.grad(value, argnums=1)).lower(shape, shape).compile()
    planned = compiled.memory_analysis()
    assert planned is not None
    return planned.temp_size_in_bytes


def test_keeps_one_carry_less_than_a_rematerialised_scan():
    def rematerialised(step, carry, xs, length):
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, xs, length=length)

    width, steps = 1 << 16, 8
    ours, theirs = (memory(scan, steps, width) for scan in (scan_from_carries, rematerialised))
    assert ours <= theirs - 0.9 * 4 * width


def test_what_a_step_reads_without_a_derivative_has_no_accumulator():
    parts = world(3)

    def value(w, unread):
        return unrolled_value(scan_from_carries, 3, parts | {"w": w, "unread": unread})

    jaxpr = jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(parts["w"], parts["unread"])
    backwards = next(eqn for eqn in equations(jaxpr) if eqn.params.get("reverse"))
    assert scan_parts(backwards)[1] == 2  # the cotangents of w and of the momentum
    zero = jax.jit(jax.grad(value, argnums=1))(parts["w"], parts["unread"])
    np.testing.assert_array_equal(zero, np.zeros(WIDTH, np.float32))
