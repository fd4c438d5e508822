"""Parameters well away from the initial values, where gradients are small; nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
from quick_numbers import drawn, parameters

# What is run once is not worth fast code.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_like(shapes, spread=0.3, seed=0):
    """Of this structure: scales around one, everything else around zero."""
    return jax.tree.map(jnp.asarray, drawn(shapes, spread, seed))


def random_params(model, config, spread=0.3, seed=0):
    """Of a model's structure, as `random_like` draws them."""
    return jax.tree.map(jnp.asarray, parameters(model, config, spread, seed))
