"""BAIT against dense matrices and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import softmax

from jmeta.methods import bait, point_factors


def points(count=9, classes=3, width=2, seed=0):
    rng = np.random.default_rng(seed)
    p = softmax(2 * rng.normal(size=(count, classes)))
    return jnp.asarray(rng.normal(size=(count, width))), jnp.asarray(p)


def trace(factors, chosen, budget, labelled=None, penalty=1.0):
    """The objective by dense inverses."""
    factors = np.asarray(factors)
    known = factors[:0] if labelled is None else np.asarray(labelled)
    gram = lambda v: np.einsum("nkd,nke->de", v, v)  # noqa: E731
    everything = np.concatenate([factors, known])
    m = penalty * np.eye(factors.shape[-1])
    m += budget / (len(known) + budget) * gram(factors[list(chosen)])
    if len(known):
        m += len(known) / (len(known) + budget) * gram(known) / len(known)
    return np.trace(np.linalg.inv(m) @ gram(everything)) / len(everything)


def test_factors_square_to_the_information_of_a_point(x64):
    h, p = map(np.asarray, points())
    factors = point_factors(h, p)
    kernel_grad = jax.jit(jax.grad(lambda w, h, y: -jax.nn.log_softmax(h @ w)[y]))
    factors = np.asarray(factors)
    for n in range(3):
        w = np.linalg.pinv(h[n][None]) @ np.log(p[n])[None]  # so that the scores are log p
        grads = [np.ravel(kernel_grad(w, h[n], c).T) for c in range(3)]
        expected = sum(p[n, c] * np.outer(g, g) for c, g in enumerate(grads))
        np.testing.assert_allclose(factors[n].T @ factors[n], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("known", [0, 4])
def test_every_step_is_the_best_of_all_and_the_traces_are_dense_ones(x64, known):
    factors = point_factors(*points())
    labelled = point_factors(*points(known, seed=1)) if known else None
    budget, forward = 3, 6
    found = bait(factors, budget, labelled=labelled, penalty=0.7, forward=forward)
    score = lambda s: trace(factors, s, budget, labelled, 0.7)  # noqa: E731
    chosen, traces = [], [score([])]
    for _ in range(forward):
        left = [i for i in range(9) if i not in chosen]
        chosen.append(min(left, key=lambda i: score([*chosen, i])))
        traces.append(score(chosen))
    for _ in range(forward - budget):
        drop = min(chosen, key=lambda i: score([j for j in chosen if j != i]))
        chosen.remove(drop)
        traces.append(score(chosen))
    assert found.chosen.tolist() == chosen
    np.testing.assert_allclose(found.objective, traces, rtol=1e-12)
    steps = np.diff(found.objective)
    assert np.all(steps[:forward] < 0)
    assert np.all(steps[forward:] > 0)
    # and it is near the best of all subsets
    best = min(score(s) for s in itertools.combinations(range(9), budget))
    ours = score(sorted(chosen))  # in their order, which decides how sums are rounded
    assert ours <= 1.02 * best


def test_the_span_of_the_rows_is_enough(x64):
    """Wide features: 300 entries of a factor, 18 rows."""
    h, p = points(count=6, width=100)
    factors = point_factors(h, p)
    found = bait(factors, 2)
    np.testing.assert_allclose(found.objective[-1], trace(factors, found.chosen, 2), rtol=1e-11)
    best = min(trace(factors, s, 2) for s in itertools.combinations(range(6), 2))
    assert float(found.objective[-1]) <= 1.02 * best


def test_without_going_back_it_is_greedy_and_duplicates_are_not_taken_twice(x64):
    wide = jnp.eye(5)[:, None] * 3.0
    factors = jnp.concatenate([wide, wide])  # every point is there twice
    found = bait(factors, 5, forward=5)
    assert sorted(np.asarray(found.chosen) % 5) == [0, 1, 2, 3, 4]
    assert found.objective.shape == (6,)


def test_what_cannot_be_is_refused():
    factors = point_factors(*points())
    for budget, forward in ((0, None), (10, None), (3, 2), (3, 12)):
        with pytest.raises(ValueError, match="a budget of"):
            bait(factors, budget, forward=forward)
