"""Products with tables and random bits of dropout: what they are, and what they cost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.models import heads
from jmeta.models.dropout import dropout

drop = jax.jit(dropout, static_argnums=1)


@pytest.mark.parametrize("width", [3, heads.NARROW, heads.NARROW + 1])
def test_products_with_a_table_are_plain_ones_at_every_order(x64, width):
    rng = np.random.default_rng(0)
    states, table, moved = (rng.normal(size=(n, width)) for n in (4, 9, 9))
    shares = rng.dirichlet(np.ones(9), 4)

    def ours(table):
        scores = heads.unembed(states, table)
        return jnp.sin(scores).sum() + (heads.mean_rows(shares, table) ** 3).sum()

    def plain(table):
        return jnp.sin(states @ table.T).sum() + ((shares @ table) ** 3).sum()

    def all_orders(f, table):
        gradient = jax.grad(f)
        product = jax.grad(lambda table: (gradient(table) * moved).sum())
        slope, forward = jax.jvp(gradient, (table,), (moved,))
        return f(table), slope, forward, product(table)

    both = (jax.jit(functools.partial(all_orders, f))(table) for f in (ours, plain))
    for mine, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_no_product_has_the_shape_of_a_narrow_table_which_is_slow_on_a_cpu():
    states, table, shares = jnp.ones((40, 8)), jnp.ones((90, 8)), jnp.ones((40, 90))

    def shapes(f, *args):
        text = jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=1)).lower(*args)
        return re.findall(r" = f32\[([\d,]+)\]\S* dot\(", text.compile().as_text())

    for f, args in ((heads.unembed, (states, table)), (heads.mean_rows, (shares, table))):
        found = shapes(f, *args)
        assert "8,90" in found
        assert "90,8" not in found


@pytest.mark.parametrize("shape", [(300, 34), (100, 33), (5000, 1)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(x64, shape, rate):
    x = 1 + np.random.default_rng(1).normal(size=shape) ** 2
    dropped = np.asarray(drop(x, rate, jax.random.key(0)))
    gone = dropped == 0
    spread = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(gone.mean() - rate) < 4 * spread
    np.testing.assert_allclose(dropped[~gone], x[~gone] / (1 - rate), rtol=1e-5)
    # Both halves of a word decide, each by itself.
    left, right = gone[:, : shape[1] // 2], gone[:, (shape[1] + 1) // 2 :]
    if left.size:
        agree = (left & right).mean()
        assert abs(agree - rate**2) < 4 * np.sqrt(rate**2 * (1 - rate**2) / left.size)


def test_dropout_divides_by_exactly_the_share_that_stays(x64):
    # 3 of 65,536ths are the nearest to this rate.
    kept = np.asarray(drop(jnp.ones((1000, 40)), 5e-5, jax.random.key(0)))
    np.testing.assert_allclose(kept[kept > 0], 1 / (1 - 3 / 2**16), rtol=1e-15)
    # What cannot be told from none, and from all but one, is.
    assert (np.asarray(drop(jnp.ones((9, 4)), 1e-7, jax.random.key(0))) == 1).all()
    assert np.isfinite(drop(jnp.ones((9, 4)), 1 - 1e-9, jax.random.key(0))).all()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=r"is not in \[0, 1\)"):
        dropout(jnp.ones((2, 2)), rate, jax.random.key(0))


def test_dropout_draws_half_a_word_for_an_entry():
    traced = jax.make_jaxpr(lambda k: dropout(jnp.ones((4, 34)), 0.1, k))(jax.random.key(0))
    found = re.findall(r"random_bits\[bit_width=32 shape=\(([\d, ]+)\)", str(traced))
    assert found == ["4, 17"]
