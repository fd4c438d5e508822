"""The four-block few-shot convolutional network (Vinyals et al. 2016, arXiv 1606.04080).

Normalisation uses the statistics of the batch it is given and keeps no running averages: results
are *transductive*. On a CPU a convolution is a matmul of patches, several times faster there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.types import Array

Params = dict[str, dict[str, Any]]
Convolve = Callable[[Array, Array], Array]


def init(
    key: Array,
    classes: int,
    channels: int = 1,
    filters: int = 64,
    size: int = 28,
    blocks: int = 4,
) -> Params:
    """Draws He-normal kernels, unit scales, zero biases, and a small linear head.

    Args:
        key: a PRNG key.
        classes: outputs of the head.
        channels: channels of the images.
        filters: filters of every block (64 in MAML on Omniglot, 32 on MiniImagenet).
        size: height and width of the images; every block halves it, rounding down.
        blocks: number of blocks.

    Returns:
        ``{"block0": {"kernel", "scale", "bias"}, ..., "head": {"kernel", "bias"}}``: kernels are
        ``[3, 3, channels, filters]`` and ``[features, classes]``, the rest vectors.

    Raises:
        ValueError: the images are too small for so many blocks.

    Example:
        >>> params = init(jax.random.key(0), classes=5, filters=8)
        >>> jax.jit(apply)(params, jnp.ones((2, 28, 28, 1))).shape
        (2, 5)
    """
    left = size >> blocks
    if left < 1:
        raise ValueError(f"images of size {size} vanish in {blocks} blocks, each halving them")
    keys = jax.random.split(key, blocks + 1)
    params = {}
    for i in range(blocks):
        fan_in = 9 * (channels if i == 0 else filters)
        kernel = jax.random.normal(keys[i], (3, 3, fan_in // 9, filters)) * (2 / fan_in) ** 0.5
        # The normalisation removes any bias of the convolution, which therefore has none.
        params[f"block{i}"] = {
            "kernel": kernel,
            "scale": jnp.ones(filters),
            "bias": jnp.zeros(filters),
        }
    width = left * left * filters
    head = jax.random.normal(keys[-1], (width, classes)) * width**-0.5
    return params | {"head": {"kernel": head, "bias": jnp.zeros(classes)}}


def apply(params: Params, x: Array, convolve: Convolve | None = None) -> Array:
    """Class scores; every example's depend on the whole batch, through its statistics.

    Args:
        params: what ``init`` returned.
        x: images ``[n, height, width, channels]``.
        convolve: ``conv_as_matmul`` or ``conv_native``; None: the former on a CPU, else the latter.

    Returns:
        Logits ``[n, classes]``.
    """
    return features(params, x, convolve) @ params["head"]["kernel"] + params["head"]["bias"][None]


def features(params: Params, x: Array, convolve: Convolve | None = None) -> Array:
    """What the head reads: the flattened output of the last block.

    Args:
        params: what ``init`` returned; the head is not used.
        x: images ``[n, height, width, channels]``.
        convolve: ``conv_as_matmul`` or ``conv_native``; None: the former on a CPU, else the latter.

    Returns:
        ``[n, features]``; with the default sizes ``features`` is ``filters``.
    """
    if convolve is None:
        convolve = conv_as_matmul if jax.default_backend() == "cpu" else conv_native
    for i in range(sum(name.startswith("block") for name in params)):
        block = params[f"block{i}"]
        x = batch_norm(convolve(x, block["kernel"]), block["scale"], block["bias"])
        # Pooling first is the same function, as both are monotone, and leaves ReLU a quarter.
        x = jax.nn.relu(max_pool(x))
    return x.reshape(x.shape[0], -1)


def conv_as_matmul(x: Array, kernel: Array) -> Array:
    """A 3x3 convolution, stride 1, zero padding: nine shifted copies side by side, one matmul.

    Args:
        x: ``[n, height, width, channels]``.
        kernel: ``[3, 3, channels, filters]``.

    Returns:
        ``[n, height, width, filters]``.
    """
    n, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, 9 * channels)
    return (patches @ kernel.reshape(9 * channels, -1)).reshape(n, height, width, -1)


def conv_native(x: Array, kernel: Array) -> Array:
    """The same convolution as `conv_as_matmul` by XLA's own operation, for GPU and TPU.

    Args:
        x: ``[n, height, width, channels]``.
        kernel: ``[3, 3, channels, filters]``.

    Returns:
        ``[n, height, width, filters]``.
    """
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(x: Array, scale: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Normalises every channel over the batch and its positions.

    Args:
        x: ``[n, height, width, channels]``.
        scale: ``[channels]``.
        bias: ``[channels]``.
        eps: added to the variance, inside the root, so that a constant channel has derivatives.

    Returns:
        The shape of ``x``.
    """
    centred = x - x.mean((0, 1, 2), keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean((0, 1, 2), keepdims=True) + eps)
    return centred * (inverse * scale[None, None, None]) + bias[None, None, None]


def max_pool(x: Array) -> Array:
    """Maximum over windows of 2x2, stride 2; an odd last row or column is dropped.

    The first of equal maxima takes the gradient. Written as selections between elements, whose
    second derivative costs what the first does (that of ``reduce_window`` is slow).

    Args:
        x: ``[n, height, width, channels]``.

    Returns:
        ``[n, height // 2, width // 2, channels]``.
    """
    n, height, width, channels = x.shape
    high, wide = height // 2, width // 2
    windows = x[:, : 2 * high, : 2 * wide].reshape(n, high, 2, wide, 2, channels)
    rows = _larger(windows[:, :, 0], windows[:, :, 1])
    return _larger(rows[:, :, :, 0], rows[:, :, :, 1])


def _larger(a: Array, b: Array) -> Array:
    return jnp.where(a >= b, a, b)
