"""Losses against numpy, scikit-learn, and the masking rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from jmeta.models import losses


def batch(n=7, classes=4):
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 5 * jax.random.normal(keys[0], (n, classes))
    labels = jax.random.randint(keys[1], (n,), 0, classes)
    return logits, labels, jax.random.uniform(keys[2], (n,))


def test_cross_entropy_and_accuracy_are_scikit_learns(x64):
    logits, labels, weights = batch()
    probabilities = np.asarray(jax.nn.softmax(logits))
    for mask in (None, weights):
        expected = metrics.log_loss(labels, probabilities, sample_weight=mask, labels=range(4))
        np.testing.assert_allclose(losses.cross_entropy(logits, labels, mask), expected, rtol=1e-10)
        expected = metrics.accuracy_score(labels, probabilities.argmax(-1), sample_weight=mask)
        np.testing.assert_allclose(losses.accuracy(logits, labels, mask), expected, rtol=1e-12)
    prediction = logits[:, 0]
    for mask in (None, weights):
        expected = metrics.mean_squared_error(logits[:, 1], prediction, sample_weight=mask)
        actual = losses.squared_error(prediction, logits[:, 1], mask)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_gradient_is_softmax_minus_one_hot(x64):
    logits, labels, weights = batch()
    grads = jax.grad(losses.cross_entropy)(logits, labels, weights)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 4)) * weights[:, None]
    np.testing.assert_allclose(grads, expected / weights.sum(), rtol=1e-10, atol=1e-12)


def test_huge_logits_stay_exact():
    logits = jnp.array([[1e4, 0.0], [0.0, 1e4]])
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([0, 0])), 5e3)


@pytest.mark.parametrize("f", [losses.cross_entropy, losses.accuracy])
def test_pads_add_nothing_whatever_they_hold(x64, f):
    logits, labels, _ = batch()
    padded = jnp.concatenate([logits, jnp.array([[jnp.nan, 0, 0, 0], [jnp.inf, 0, 0, 0]])])
    padded_labels = jnp.concatenate([labels, jnp.array([-1, 99])])
    mask = jnp.concatenate([jnp.ones(7), jnp.zeros(2)])
    np.testing.assert_allclose(f(padded, padded_labels, mask), f(logits, labels), rtol=1e-12)


def test_an_empty_mask_gives_zero_and_zero_gradient(x64):
    logits, labels, _ = batch()
    value, grads = jax.value_and_grad(losses.cross_entropy)(logits, labels, jnp.zeros(7))
    assert value == 0
    assert (grads == 0).all()
    assert losses.accuracy(logits, labels, jnp.zeros(7)) == 0
    value, grads = jax.value_and_grad(losses.squared_error)(logits, logits + 1, jnp.zeros((7, 4)))
    assert value == 0
    assert (grads == 0).all()


def test_mask_of_rows_averages_within_rows_first(x64):
    logits, _, _ = batch()
    mask = jnp.array([1, 0, 1, 1, 0, 0, 1])
    expected = (np.asarray(logits)[[0, 2, 3, 6]] ** 2).mean()
    actual = losses.squared_error(logits, jnp.zeros_like(logits), mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_low_precision_logits_are_accumulated_in_float32():
    logits = jnp.zeros((4096, 3), jnp.bfloat16)
    loss = losses.cross_entropy(logits, jnp.zeros(4096, jnp.int32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
    errors = losses.squared_error(jnp.ones(4096, jnp.bfloat16), jnp.zeros(4096, jnp.bfloat16))
    assert errors.dtype == jnp.float32
    assert errors == 1


def test_shapes_that_disagree_are_refused():
    logits, labels, _ = batch()
    with pytest.raises(ValueError, match="labels has shape"):
        losses.cross_entropy(logits, labels[:, None])
    with pytest.raises(ValueError, match="mask has shape"):
        losses.accuracy(logits, labels, jnp.ones(3))
    with pytest.raises(ValueError, match="target has shape"):
        losses.squared_error(labels.astype(float), labels[:3])
