"""The multilayer perceptron against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_like

from jmeta.models import mlp


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_forward_is_numpy(x64, activation):
    params = random_like(jax.eval_shape(lambda: mlp.init(jax.random.key(0), [3, 5, 4, 2])), 1.0)
    x = np.random.default_rng(1).normal(size=(2, 6, 3))
    expected = x
    for i in range(3):
        layer = jax.tree.map(np.asarray, params[f"layer{i}"])
        expected = expected @ layer["kernel"] + layer["bias"]
        if i < 2:
            expected = np.maximum(expected, 0) if activation is jax.nn.relu else np.tanh(expected)
    actual = jax.jit(mlp.apply, static_argnums=2)(params, x, activation)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_initial_variance_is_he():
    params = mlp.init(jax.random.key(0), [200, 300, 1])
    assert abs(params["layer0"]["kernel"].var() / (2 / 200) - 1) < 0.05
    assert (params["layer0"]["bias"] == 0).all()


def test_one_size_is_refused():
    with pytest.raises(ValueError, match="an input width and an output width"):
        mlp.init(jax.random.key(0), [3])
