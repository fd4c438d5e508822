"""Masks within a budget: the share is met, and the shift that meets it has exact derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import differences, relative_error
from teacher_world import VOCAB, episodes, estimated, loss, scored, start, student

from jmeta import methods
from jmeta.methods import within_budget

pytestmark = pytest.mark.usefixtures("x64")

ODDS = np.random.default_rng(0).normal(size=(3, 7))
COUNTS = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]], float)


def shares(odds, counts):
    with np.errstate(over="ignore"):
        p = 1 / (1 + np.exp(-np.asarray(odds, float)))
    return (p * counts).sum(-1) / counts.sum(-1)


met = jax.jit(within_budget, static_argnums=2)


@pytest.mark.parametrize("share", [0.001, 0.15, 0.5, 0.99])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0, 1e4])
def test_the_share_is_met(share, scale):
    found = np.asarray(met(scale * ODDS, COUNTS, share))
    np.testing.assert_allclose(shares(found, COUNTS), share, rtol=1e-9)
    moved = found - scale * ODDS
    np.testing.assert_allclose(moved - moved[:, :1], 0, atol=1e-11 * max(1, scale))
    # What is the same for all positions changes nothing.
    again = met(scale * ODDS + 3, COUNTS, share)
    np.testing.assert_allclose(again, found, rtol=1e-9, atol=1e-9)


def test_float32_and_examples_without_positions():
    odds = (30 * ODDS).astype(np.float32)
    found = met(odds, COUNTS, 0.15)
    assert found.dtype == np.float32
    np.testing.assert_allclose(shares(found, COUNTS), 0.15, rtol=1e-4)
    none = COUNTS * np.array([[1], [0], [1]])

    @jax.jit
    @jax.value_and_grad
    def loss(odds):
        return jnp.sin(within_budget(odds, none, 0.15)).sum()

    for values in (*loss(odds), loss(np.full_like(odds, 1e30))[1]):
        assert np.isfinite(values).all()


def test_derivatives_are_those_of_the_equation():
    def value(odds):
        return (jnp.sin(2 * within_budget(odds, COUNTS, 0.3)) * np.cos(ODDS)).sum()

    found = np.asarray(met(ODDS, COUNTS, 0.3))
    p = 1 / (1 + np.exp(-found))
    slope = COUNTS * p * (1 - p)
    outer = 2 * np.cos(2 * found) * np.cos(ODDS)
    closed = outer - outer.sum(-1, keepdims=True) * slope / slope.sum(-1, keepdims=True)
    towards = np.sin(5 * ODDS)

    def along(f):
        return lambda odds: (jax.grad(f)(odds) * towards).sum()

    # Of the first, the second and the third order.
    assert relative_error(jax.jit(jax.grad(value))(ODDS), closed) < 1e-12
    for f in (along(value), along(along(value))):
        with_slope = jax.jit(jax.value_and_grad(f))
        exact = np.asarray(with_slope(ODDS)[1])
        slopes = differences(lambda x, of=with_slope: of(x)[0], ODDS)
        assert relative_error(exact, slopes) < 1e-6
        forward = jax.jit(lambda x, f=f: jax.jvp(f, (x,), (towards,))[1])(ODDS)
        np.testing.assert_allclose(forward, (exact * towards).sum(), rtol=1e-10)


def test_the_search_for_the_shift_is_not_differentiated():
    value = lambda odds: jnp.sin(within_budget(odds, COUNTS, 0.3)).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(value))(ODDS).eqns
    loops = [str(e.params) for e in program
             if e.primitive.name in ("scan", "while")]  # fmt: skip
    assert len(loops) == 1
    assert "transpose" not in loops[0]
    kept = [v.aval.shape for e in program for v in e.outvars]
    assert not [shape for shape in kept if shape[:1] == (60,)]


def test_half_precision_is_met_as_well():
    odds = np.random.default_rng(1).normal(size=(2, 512)).astype(jnp.bfloat16)
    found = met(odds, np.ones((2, 512)), 0.15)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(shares(found, np.ones((2, 512))), 0.15, atol=3e-4)


def test_a_teacher_within_a_budget_follows_the_exact_gradient():
    def odds(meta, batch, key):
        return meta["odds"][batch["tokens"]] + meta["place"][None]

    meta = {"odds": np.linspace(-1.0, 1.0, VOCAB), "place": np.array([0.3, -0.4])}
    data = episodes()
    teacher = methods.masks_only(odds, mask_token=1, share=0.4)
    found = estimated(methods.soft_teacher(student(), teacher), meta, data)

    @jax.jit
    def value(meta):
        def one(episode):
            scores = teacher.scores(meta, episode.support, None)
            p = jax.nn.softmax(scores["masked"])[..., 1]
            tokens = episode.support["tokens"]
            mixed = (1 - p)[..., None] * jax.nn.one_hot(tokens, VOCAB)
            mixed = mixed + p[..., None] * jax.nn.one_hot(jnp.ones_like(tokens), VOCAB)
            pseudo = {**episode.support, "tokens": mixed, "labels": tokens, "weights": p}
            slope = jax.grad(lambda w: loss(w, pseudo, None)[0])(start())
            after = jax.tree.map(lambda w, g: w - 0.3 * g, start(), slope)
            return scored(after, episode)

        return jnp.mean(jax.vmap(one)(data))

    assert relative_error(found[0], differences(value, meta)) < 1e-6
    # Of a shift of all positions nothing is left.
    place = np.asarray(found[0]["place"])
    assert abs(place.sum()) < 1e-12 < np.abs(place).max()


def test_what_no_share_is():
    for share in (0.0, 1.0, -0.1, 15):
        with pytest.raises(ValueError, match="no share of positions between 0 and 1"):
            within_budget(ODDS, COUNTS, share)
