"""The networks that learn Omniglot, and the problem that both estimators differentiate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jmeta
from jmeta import methods
from jmeta.core.types import Array, Key, Problem, PyTree
from jmeta.methods.maml import TaskLoss
from jmeta.models import conv, losses


def strided_features(params: PyTree, x: Array) -> Array:
    """The MAML paper's network for Omniglot: ``jmeta.models.conv`` with strides, not pooling.

    A quarter of the work, as every convolution gives only what its block keeps.

    Args:
        params: of ``conv.init``.
        x: images ``[n, 28, 28, 1]``.

    Returns:
        ``[n, filters]``, the mean over the last block's 2 x 2 positions.
    """
    for name in sorted(params.keys() - {"head"}):
        block = params[name]
        n, height, width, channels = x.shape
        high, wide = (height + 1) // 2, (width + 1) // 2
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [
            padded[:, i : i + 2 * high - 1 : 2, j : j + 2 * wide - 1 : 2]
            for i in range(3)
            for j in range(3)
        ]
        patches = jnp.concatenate(shifted, axis=-1).reshape(-1, 9 * channels)
        y = (patches @ block["kernel"].reshape(9 * channels, -1)).reshape(n, high, wide, -1)
        x = jax.nn.relu(conv.batch_norm(y, block["scale"], block["bias"]))
    return x.mean((1, 2))


FEATURES = {"stride": strided_features, "pool": conv.features}


def make_loss(network: str) -> TaskLoss:
    """Cross-entropy of a network, whose normalisation sees the whole batch."""

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        del key
        head = params["head"]
        logits = FEATURES[network](params, batch["x"]) @ head["kernel"] + head["bias"][None]
        value = losses.cross_entropy(logits, batch["y"], batch["mask"])
        return value, {"accuracy": losses.accuracy(logits, batch["y"], batch["mask"])}

    return loss


def make_problem(config: Any, key: Array) -> tuple[Problem, PyTree]:
    """The problem that both estimators differentiate, and where its meta-parameters start."""
    params = conv.init(key, config.ways, filters=config.filters)
    # Nothing is known of the labels' order, so the scores start almost equal.
    params["head"] = jax.tree.map(lambda leaf: 0.01 * leaf, params["head"])
    loss = make_loss(config.network)
    if not config.learned_rates:
        return methods.learned_start(loss, optax.sgd(config.inner_lr)), params
    rates = jmeta.optim.init_rates(params, config.inner_lr)
    return methods.learned_rates(loss), {"start": params, "rates": rates}
