"""The few-shot conv network: two spellings of convolution, pooling and normalisation by oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_like

from jmeta.models import conv


def close(a, b, tolerance=1e-10):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def params_of(**shape):
    return random_like(jax.eval_shape(lambda: conv.init(jax.random.key(0), **shape)))


def derivatives(f):
    """Value, gradient and Hessian-vector product of a scalar function, compiled."""

    def run(*args):
        directions = [jnp.cos(3 * arg) for arg in args]
        both = jax.value_and_grad(f, tuple(range(len(args))))
        # The derivative of a gradient brings value and gradient: traced and compiled once.
        (value, grads), (_, product) = jax.jvp(both, args, tuple(directions))
        return value, grads, product

    return jax.jit(run)


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (1, 1, 1, 2), (3, 7, 7, 1)])
def test_both_convolutions_agree_to_second_order(x64, shape):
    x, kernel = normal(*shape), normal(3, 3, shape[3], 4, seed=1)
    close(
        *(
            derivatives(lambda x, k, f=f: jnp.sin(f(x, k)).sum())(x, kernel)
            for f in (conv.conv_as_matmul, conv.conv_native)
        )
    )


def test_convolution_by_hand(x64):
    """One filter that reads the pixel above: the image moves down, zeros come in at the top."""
    x, kernel = np.arange(9.0).reshape(1, 3, 3, 1), np.zeros((3, 3, 1, 1))
    kernel[0, 1] = 1
    moved = [[0, 0, 0], [0, 1, 2], [3, 4, 5]]
    found = np.asarray(jax.jit(conv.conv_as_matmul)(x, kernel))
    close(found[0, :, :, 0], np.array(moved))


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_max_pool_is_reduce_window_to_second_order(x64, size):
    x = normal(2, *size, 3)

    def reference(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    close(*(derivatives(lambda x, f=f: (f(x) ** 3).sum())(x) for f in (conv.max_pool, reference)))


def test_equal_maxima_give_their_gradient_once(x64):
    grads = jax.jit(jax.grad(lambda x: conv.max_pool(x).sum()))(jnp.zeros((1, 2, 2, 1)))
    close(np.asarray(grads)[0, :, :, 0], np.array([[1.0, 0.0], [0.0, 0.0]]))


def test_batch_norm_is_numpy_and_survives_a_constant_channel(x64):
    x = np.random.default_rng(2).normal(size=(3, 4, 4, 2))
    x[..., 1] = 5.0
    scale, bias = np.array([2.0, 3.0]), np.array([0.5, -1.0])
    expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    close(jax.jit(conv.batch_norm)(x, scale, bias), expected * scale + bias)
    square = lambda x: (conv.batch_norm(x, scale, bias) ** 2).sum()  # noqa: E731
    second = jax.jit(jax.jacfwd(jax.jacrev(square)))(x)
    assert np.isfinite(second).all()


def numpy_features(params, x, blocks):
    """The network from its definition, one output pixel at a time."""
    for i in range(blocks):
        block = jax.tree.map(np.asarray, params[f"block{i}"])
        n, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = np.zeros((n, height, width, block["kernel"].shape[-1]))
        for r in range(height):
            for c in range(width):
                window = padded[:, r : r + 3, c : c + 3]
                y[:, r, c] = np.einsum("nijc,ijcf->nf", window, block["kernel"])
        y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
        y = np.maximum(y * block["scale"] + block["bias"], 0)
        high, wide = height // 2, width // 2
        y = y[:, : 2 * high, : 2 * wide].reshape(n, high, 2, wide, 2, -1)
        x = y.max((2, 4))
    return x.reshape(len(x), -1)


@pytest.mark.parametrize("filters", [32, 64])
def test_network_equals_numpy(x64, filters):
    params = params_of(classes=5, filters=filters)
    # Negative scales too: pooling before ReLU must not assume that they are positive.
    params["block1"]["scale"] = np.where(np.arange(filters) % 3 == 0, -1.0, 1.0)
    x = np.random.default_rng(4).uniform(size=(4, 28, 28, 1))
    expected = numpy_features(params, x, blocks=4)
    assert expected.shape == (4, filters)
    features, scores = jax.jit(lambda p, x: (conv.features(p, x), conv.apply(p, x)))(params, x)
    close(features, expected)
    head = jax.tree.map(np.asarray, params["head"])
    close(scores, expected @ head["kernel"] + head["bias"])


def test_spellings_agree_inside_an_inner_loop(x64, monkeypatch):
    """The exact meta-gradient after one step on a small network, by either convolution."""
    params = params_of(classes=2, channels=2, filters=4, size=9, blocks=2)
    x, y = np.random.default_rng(6).normal(size=(2, 6, 9, 9, 2)), np.eye(2)[np.arange(6) % 2]

    def loss(p, x, convolve):
        return -(jax.nn.log_softmax(conv.apply(p, x, convolve)) * y).sum()

    def after_a_step(p, convolve):
        grads = jax.grad(loss)(p, x[0], convolve)
        return loss(jax.tree.map(lambda a, g: a - 0.01 * g, p, grads), x[1], convolve)

    run = jax.jit(jax.value_and_grad(after_a_step), static_argnums=1)
    by = {f: run(params, f) for f in (conv.conv_as_matmul, conv.conv_native, None)}
    native = by[conv.conv_native]
    close(by[conv.conv_as_matmul], native, 1e-9)
    close(by[None], by[conv.conv_as_matmul], 0)  # by default: this is a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in str(jax.make_jaxpr(conv.features)(params, x[0]))
    h = 1e-5
    kernel = np.asarray(params["block0"]["kernel"])
    v = np.sin(np.arange(kernel.size, dtype=kernel.dtype)).reshape(kernel.shape)

    def shifted(step):
        moved = params | {"block0": params["block0"] | {"kernel": kernel + step * v}}
        return float(run(moved, conv.conv_native)[0])

    numeric = (shifted(h) - shifted(-h)) / (2 * h)
    close((np.asarray(native[1]["block0"]["kernel"]) * v).sum(), numeric, 1e-6)


def test_too_many_blocks_are_refused():
    with pytest.raises(ValueError, match="size 12 vanish in 4 blocks"):
        conv.init(jax.random.key(0), 5, size=12)
