"""Distances against SciPy, and the interval of the diversity coefficient against simulation."""

import numpy as np
import pytest
import scipy.integrate
import scipy.spatial.distance
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jmeta.methods import cross_diversity, diversity
from jmeta.methods import task_distances as t

RNG = np.random.default_rng(0)
A, B = RNG.lognormal(size=(2, 30))


def gaussians(a, b, between):
    """An integral over x for each row, of densities with these precisions."""

    def one(p, q):
        f, g = (scipy.stats.norm(scale=s**-0.5).pdf for s in (p, q))
        return scipy.integrate.quad(lambda x: between(f(x), g(x)), -30, 30, epsabs=1e-12)[0]

    return np.array([one(p, q) for p, q in zip(a, b, strict=True)])


def kl(f, g):
    return f * np.log(f / g) if f > 0 and g > 0 else 0.0


def test_distances_are_scipys():
    far = scipy.spatial.distance
    np.testing.assert_allclose(t.cosine(A, B), far.cosine(A, B), rtol=1e-12)
    shares = A / (A + B), B / (A + B)
    np.testing.assert_allclose(t.normalised_cosine(A, B), far.cosine(*shares), rtol=1e-12)
    near = A / (A + B + 1e-8), B / (A + B + 1e-8)
    np.testing.assert_allclose(t.normalised_cosine(A, B, 1e-8), far.cosine(*near), rtol=1e-12)
    np.testing.assert_allclose(t.correlation(A, B), far.correlation(1 / A, 1 / B), rtol=1e-12)
    bits = np.mean([scipy.stats.entropy([p, 1 - p]) for p in shares[0]])
    np.testing.assert_allclose(t.entropy(A, B), np.log(2) - bits, rtol=1e-10)


def test_divergences_are_integrals_of_gaussians():
    a, b = np.array([0.7, 1.3, 2.0]), np.array([1.1, 0.9, 2.0])
    larger = np.maximum(gaussians(a, b, kl), gaussians(b, a, kl)).sum()
    np.testing.assert_allclose(t.symmetric_kl(a, b), larger, rtol=1e-8)
    mean = 1 / ((1 / a + 1 / b) / 2)
    both = (gaussians(a, mean, kl) + gaussians(b, mean, kl)) / 2
    np.testing.assert_allclose(t.jensen_shannon(a, b), both.mean(), rtol=1e-8)


@pytest.mark.parametrize("name", t.DISTANCES)
@given(st.data())
def test_a_distance_is_one(name, data):
    entries = st.floats(1e-9, 1e9)
    a, b = (data.draw(arrays.arrays(np.float64, 4, elements=entries)) for _ in range(2))
    distance = t.DISTANCES[name]
    assert abs(distance(a, a)) < 1e-12
    assert distance(a, b) >= 0
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-9, atol=1e-12)
    if name == "cosine":
        np.testing.assert_allclose(distance(7 * a, b / 3), distance(a, b), rtol=1e-10, atol=1e-12)


def test_rounding_never_makes_a_distance_negative():
    tiny, near = np.full(4, 1e-9), np.array([1.0, 3.0, 7.0, 0.1])
    for distance in t.DISTANCES.values():
        assert distance(tiny, tiny) >= 0
        for step in (1e-16, 1e-15, 1e-12, 1e-9):
            assert distance(near, near * (1 + step)) >= 0


def test_matrices_and_what_is_refused():
    square = t.distance_matrix([A, B, A], t.cosine)
    assert square[0, 2] == 0
    np.testing.assert_array_equal(square, square.T)
    np.testing.assert_array_equal(t.distance_matrix([A], t.cosine, [A, B])[0], square[0, :2])
    with pytest.raises(ValueError, match="not above zero"):
        t.symmetric_kl([0.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="one length"):
        t.cosine([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="negative"):
        t.normalised_cosine([-1.0], [1.0])


def test_identical_tasks_have_none_and_orthogonal_ones_have_one():
    assert diversity(t.distance_matrix([A] * 4, t.cosine)).mean == 0
    found = diversity(t.distance_matrix(np.eye(5), t.normalised_cosine))
    assert (found.mean, found.standard_error, found.pairs) == (1.0, 0.0, 10)


def test_the_jackknife_by_hand_and_the_order_of_tasks():
    distances = t.distance_matrix(RNG.lognormal(size=(6, 9)), t.cosine)
    upper = lambda m: m[np.triu_indices(len(m), 1)].mean()  # noqa: E731
    without = [upper(np.delete(np.delete(distances, i, 0), i, 1)) for i in range(6)]
    error = np.sqrt(5 / 6 * ((without - np.mean(without)) ** 2).sum())
    found = diversity(distances)
    np.testing.assert_allclose(found[:2], (upper(distances), error), rtol=1e-12)
    order = RNG.permutation(6)
    np.testing.assert_allclose(diversity(distances[np.ix_(order, order)]), found, rtol=1e-9)
    table = t.distance_matrix(RNG.lognormal(size=(4, 9)), t.cosine, RNG.lognormal(size=(3, 9)))
    rows = [np.delete(table, i, 0).mean() for i in range(4)]
    columns = [np.delete(table, i, 1).mean() for i in range(3)]
    parts = [(n - 1) / n * ((x - np.mean(x)) ** 2).sum() for n, x in ((4, rows), (3, columns))]
    np.testing.assert_allclose(
        cross_diversity(table)[:2], (table.mean(), np.sqrt(sum(parts))), rtol=1e-12
    )


def cosines(a, b):
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return 1 - a @ np.swapaxes(b, -1, -2)


def test_the_interval_covers_and_that_of_independent_pairs_does_not():
    """4,000 sets of 20 tasks drawn independently."""
    rng = np.random.default_rng(1)
    tasks = rng.lognormal(size=(4000, 20, 10))
    found = [diversity(matrix) for matrix in cosines(tasks, tasks)]
    mean, error, half, _, naive = map(np.array, zip(*found, strict=True))
    assert 0.93 <= (np.abs(mean - mean.mean()) < half).mean() <= 0.97
    assert abs(np.sqrt((error**2).mean()) / mean.std() - 1) < 0.08
    assert np.sqrt((naive**2).mean()) < 0.5 * mean.std()
    assert (np.abs(mean - mean.mean()) < 1.96 * naive).mean() < 0.7


def test_so_does_that_of_two_sets():
    rng = np.random.default_rng(2)
    matrices = cosines(rng.lognormal(size=(4000, 20, 10)), rng.gamma(1.0, size=(4000, 15, 10)))
    mean, error, half, _, _ = map(
        np.array, zip(*map(cross_diversity, matrices), strict=True)
    )  # fmt: skip
    assert 0.93 <= (np.abs(mean - mean.mean()) < half).mean() <= 0.97
    assert abs(np.sqrt((error**2).mean()) / mean.std() - 1) < 0.08


def test_too_few_tasks_are_refused():
    with pytest.raises(ValueError, match="at least three"):
        diversity([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="square"):
        diversity([[0, 1, 2], [3, 0, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="at least two"):
        cross_diversity([[1.0, 2.0]])
