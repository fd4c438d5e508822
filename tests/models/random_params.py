"""Parameters well away from the initial values, where gradients are small; nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# What is run once is not worth fast code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(model, config, spread=0.3, seed=0):
    """Of a model's structure: scales around one, everything else around zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = float(path[-1].key == "scale")
        return jnp.asarray(centre + spread * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)
