"""The scan that keeps only carries: the gradients of a plain scan, for less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.core.trajectory import scan_from_carries
from jmeta.testing import relative_error

WIDTH = 5


def world(steps: int):
    """A step with everything in it: a counter and a key carried, scored outputs, closures."""
    keys = jax.random.split(jax.random.key(0), 4)
    normal = jax.random.normal
    return {
        "w": normal(keys[0], (WIDTH,)),
        "m": normal(keys[1], (WIDTH, WIDTH)) / WIDTH,
        "unread": jnp.ones((WIDTH,)),
        "xs": normal(keys[2], (steps, WIDTH)),
        "labels": jnp.arange(steps),
        "key": keys[3],
    }


def unrolled_value(scan, steps: int, parts: dict) -> jax.Array:
    """A scalar that depends on the last carry, on scored outputs, on xs and on a closure."""

    def step(carry, x):
        w, momentum, count, key = carry
        row, label = x
        noise = jax.random.normal(jax.random.fold_in(key, count), (WIDTH,))
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


def gradient(scan, steps: int, parts: dict):
    floats = {name: leaf for name, leaf in parts.items() if name not in ("labels", "key")}

    def value(floats):
        return unrolled_value(scan, steps, parts | floats)

    return jax.value_and_grad(value)(floats)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_equals_a_plain_scan(x64, steps):
    parts = world(steps)
    value, grads = gradient(scan_from_carries, steps, parts)
    expected, reference = gradient(plain, steps, parts)
    assert value == expected
    assert relative_error(grads, reference) < 1e-13


def test_under_vmap(x64):
    parts = world(3)
    stretch = jnp.asarray([1.0, 0.5, -2.0])

    def through(scan):
        return jax.vmap(lambda s: gradient(scan, 3, parts | {"w": s * parts["w"]})[1])(stretch)

    assert relative_error(through(scan_from_carries), through(plain)) < 1e-13


def test_differentiates_twice(x64):
    parts = world(3)

    def curvature(scan):
        def slope(w):
            return jnp.sum(jnp.cos(gradient(scan, 3, parts | {"w": w})[1]["w"]))

        return jax.grad(slope)(parts["w"])

    assert relative_error(curvature(scan_from_carries), curvature(plain)) < 1e-12


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

    text = str(jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(parts["w"], parts["unread"]))
    backwards = next(part for part in text.split("scan[")[1:] if "reverse=True" in part)
    carried = int(backwards.split("num_carry=")[1].split()[0])
    assert carried == 2  # the cotangents of w and of the momentum
    zero = jax.grad(value, argnums=1)(parts["w"], parts["unread"])
    np.testing.assert_array_equal(zero, np.zeros(WIDTH, np.float32))
