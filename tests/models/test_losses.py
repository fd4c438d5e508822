"""Losses against numpy, scikit-learn, and the masking rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from jmeta.models import losses

cross_entropy, accuracy, squared_error = (
    jax.jit(f) for f in (losses.cross_entropy, losses.accuracy, losses.squared_error)
)


def batch(n=7, classes=4):
    rng = np.random.default_rng(0)
    logits, weights = 5 * rng.normal(size=(n, classes)), rng.uniform(size=n)
    labels = rng.integers(0, classes, n)
    return tuple(map(jnp.asarray, (logits, labels, weights)))


def softmax(logits):
    shares = np.exp(np.asarray(logits))
    return shares / shares.sum(-1, keepdims=True)


def test_cross_entropy_and_accuracy_are_scikit_learns(x64):
    logits, labels, weights = batch()
    probabilities = softmax(logits)
    for mask in (None, weights):
        expected = metrics.log_loss(labels, probabilities, sample_weight=mask, labels=range(4))
        np.testing.assert_allclose(cross_entropy(logits, labels, mask), expected, rtol=1e-10)
        expected = metrics.accuracy_score(labels, probabilities.argmax(-1), sample_weight=mask)
        np.testing.assert_allclose(accuracy(logits, labels, mask), expected, rtol=1e-12)
    prediction, target = np.asarray(logits)[:, 0], np.asarray(logits)[:, 1]
    for mask in (None, weights):
        expected = metrics.mean_squared_error(target, prediction, sample_weight=mask)
        actual = squared_error(prediction, target, mask)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_gradient_is_softmax_minus_one_hot(x64):
    logits, labels, weights = batch()
    grads = jax.jit(jax.grad(losses.cross_entropy))(logits, labels, weights)
    weights = np.asarray(weights)
    expected = (softmax(logits) - np.eye(4)[np.asarray(labels)]) * weights[:, None]
    np.testing.assert_allclose(grads, expected / weights.sum(), rtol=1e-10, atol=1e-12)


def test_huge_logits_stay_exact():
    logits = jnp.array([[1e4, 0.0], [0.0, 1e4]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 0])), 5e3)


@pytest.mark.parametrize("f", [cross_entropy, accuracy])
def test_pads_add_nothing_whatever_they_hold(x64, f):
    logits, labels, _ = batch()
    padded = np.concatenate([logits, [[np.nan, 0, 0, 0], [np.inf, 0, 0, 0]]])
    padded_labels, mask = np.concatenate([labels, [-1, 99]]), np.repeat([1.0, 0.0], (7, 2))
    np.testing.assert_allclose(f(padded, padded_labels, mask), f(logits, labels), rtol=1e-12)


def test_an_empty_mask_gives_zero_and_zero_gradient(x64):
    logits, labels, _ = batch()
    both = jax.jit(jax.value_and_grad(losses.cross_entropy))
    value, grads = both(logits, labels, np.zeros(7))
    assert value == 0
    assert (np.asarray(grads) == 0).all()
    assert accuracy(logits, labels, jnp.zeros(7)) == 0
    both = jax.jit(jax.value_and_grad(losses.squared_error))
    value, grads = both(logits, np.asarray(logits) + 1, np.zeros((7, 4)))
    assert value == 0
    assert (np.asarray(grads) == 0).all()


def test_mask_of_rows_averages_within_rows_first(x64):
    logits, _, _ = batch()
    mask = jnp.array([1, 0, 1, 1, 0, 0, 1])
    expected = (np.asarray(logits)[[0, 2, 3, 6]] ** 2).mean()
    actual = squared_error(logits, jnp.zeros_like(logits), mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_low_precision_logits_are_accumulated_in_float32():
    logits = jnp.zeros((4096, 3), jnp.bfloat16)
    loss = cross_entropy(logits, jnp.zeros(4096, jnp.int32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
    errors = squared_error(jnp.ones(4096, jnp.bfloat16), jnp.zeros(4096, jnp.bfloat16))
    assert errors.dtype == jnp.float32
    assert errors == 1


def test_shapes_that_disagree_are_refused():
    logits, labels, _ = batch()
    with pytest.raises(ValueError, match="labels has shape"):
        cross_entropy(logits, labels[:, None])
    with pytest.raises(ValueError, match="mask has shape"):
        accuracy(logits, labels, jnp.ones(3))
    with pytest.raises(ValueError, match="target has shape"):
        squared_error(labels.astype(float), labels[:3])
