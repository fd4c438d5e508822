"""Scans over inner steps: whatever is recomputed, values and gradients are those of a loop."""
# ruff: noqa: E731

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.core.steps import block_length, scan_steps
from jmeta.testing import relative_error

pytestmark = pytest.mark.usefixtures("x64")


def logistic(carry, x):
    carry = {"a": 3.0 * carry["a"] * (1 - carry["a"]) + 0.1 * x["u"], "n": carry["n"] + 1}
    return carry, (carry["a"] ** 2, {"n": carry["n"]})


WAYS = [{"remat": "step"}, {"remat": "nested"}, {"remat": "offload"}, {"loop": "unroll"}]


# At module level, so that the plain scan of a length is compiled once for all ways.
@functools.partial(jax.jit, static_argnums=2)
def run(a, u, way):
    length = u.size

    def value(a, u):
        start = {"a": a, "n": jnp.asarray(0)}
        carry, (ys, others) = scan_steps(logistic, start, {"u": u}, length, **dict(way))
        return carry["a"] + jnp.vdot(ys, jnp.arange(1.0, length + 1)), (ys, others["n"])

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(a, u)


@pytest.mark.parametrize("way", WAYS)
def test_remat_and_loop_change_neither_values_nor_gradients_at_any_length(way):
    for length in (1, 2, 5, 8, 13):
        u = np.linspace(0.0, 1.0, length)
        (plain, outputs), slopes = run(0.3, u, ())
        (again, other_outputs), other_slopes = run(0.3, u, tuple(way.items()))
        assert float(again) == pytest.approx(float(plain), rel=1e-13)
        np.testing.assert_allclose(other_outputs[0], outputs[0], rtol=1e-13)
        assert other_outputs[1].tolist() == list(range(1, length + 1))
        assert relative_error(other_slopes, slopes) < 1e-12


def test_a_scan_without_inputs_and_what_is_refused():
    count_up = lambda carry, _: (carry * 1.5, None)
    for remat in ("none", "step", "nested"):
        assert float(scan_steps(count_up, 1.0, None, 7, remat)[0]) == 1.5**7
    assert float(scan_steps(count_up, 1.0, None, 7, loop="unroll")[0]) == 1.5**7
    with pytest.raises(ValueError, match="loop is 'while'; choose one of scan, unroll"):
        scan_steps(count_up, 1.0, None, 7, loop="while")
    with pytest.raises(ValueError, match=r"7 steps need inputs \[7, ...\]"):
        scan_steps(count_up, 1.0, jnp.ones(6), 7, loop="unroll")
    with pytest.raises(ValueError, match="what remat='step' computes again a compiler would merge"):
        scan_steps(count_up, 1.0, None, 7, "step", loop="unroll")
    with pytest.raises(ValueError, match="remat is 'block'; choose one of none, step, nested"):
        scan_steps(count_up, 1.0, None, 7, "block")


def test_a_written_out_loop_stacks_and_slices_nothing_that_its_steps_keep():
    def value(a, loop):
        start = {"a": a, "n": jnp.asarray(0)}
        return scan_steps(logistic, start, {"u": jnp.ones(6)}, 6, loop=loop)[0]["a"]

    scanned, written = (
        str(jax.make_jaxpr(jax.grad(lambda a, loop=loop: value(a, loop)))(0.3))
        for loop in ("scan", "unroll")
    )
    assert "scan[" in scanned
    assert "scan[" not in written
    assert "while[" not in written


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(
    "changed",
    [
        lambda count: count.astype(jnp.float64),
        lambda count: jnp.stack([count, count]),
        lambda count: {"count": count},
    ],
)
def test_a_step_that_changes_its_carry_is_refused_at_any_length(length, changed):
    step = lambda carry, _: ({"a": 2 * carry["a"], "n": changed(carry["n"])}, None)
    with pytest.raises(TypeError, match=r"same|equal"):
        scan_steps(step, {"a": 1.0, "n": jnp.float32(0)}, None, length)
    number = scan_steps(lambda carry, _: (carry * jnp.float32(2), None), 1.0, None, length)[0]
    assert number.dtype == jnp.float32  # a Python number has no dtype to keep


def test_blocks_are_near_the_square_root():
    for length in range(1, 500):
        block = block_length(length)
        assert 1 <= block <= length
        # What nested checkpointing stores: a carry for each block but the last, and for each of
        # its steps.
        blocks = (length - 1) // block
        stored = blocks + length - blocks * block
        assert stored <= 2.6 * np.sqrt(length) + 1, length
