"""What the tests of ``fit`` train: least squares with noise from the step's key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core.types import Info, MetaGradient
from jmeta.runtime.fit import from_function

OUTER = optax.adam(0.05)
START = {"w": np.array([2.0, -1.0, 0.5], np.float32), "b": np.float32(1.0)}
TIMES = ("seconds", "steps_per_second", "data_wait")


def estimate(meta, state, episode, key):
    """Least squares with noise from the step's key; ``state`` counts the calls."""

    def loss(meta):
        noise = 0.1 * jax.random.normal(key, episode["y"].shape)
        return jnp.mean((episode["x"] @ meta["w"] + meta["b"] - episode["y"] - noise) ** 2)

    value, grads = jax.value_and_grad(loss)(meta)
    info = Info(value, jnp.stack([value, value / 2]), {"error": value}, optax.tree.norm(grads))
    return grads, state + 1, info


MG = MetaGradient(init=lambda meta, key: jnp.int32(0), estimate=estimate)


def episode(step, rows=8):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}


def batches():
    return from_function(episode)


def bits(tree):
    leaves = jax.tree.leaves(tree)
    plain = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in leaves
    ]
    return [np.asarray(leaf).tobytes() for leaf in plain]


def untimed(rows):
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def distance(meta):
    return {"distance": jnp.linalg.norm(meta["w"] - 1.0), "zero": 0.0}
