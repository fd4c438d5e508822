"""Numbers by numpy, for which nothing is compiled: parameters, errors, central differences."""

import jax
import numpy as np


def drawn(shapes, spread=0.3, seed=0):
    """Arrays of these shapes, far from initial values: scales around one, others around zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = float(path[-1].key == "scale")
        return (centre + spread * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def parameters(model, config, spread=0.3, seed=0):
    """What the model's ``init`` would return the shapes of."""
    return drawn(jax.eval_shape(lambda: model.init(config, jax.random.key(0))), spread, seed)


def log_softmax(scores, axis=-1):
    """Logarithms of shares."""
    scores = np.asarray(scores) - np.max(scores, axis, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis, keepdims=True))


def softmax(scores):
    """Over the last axis."""
    shares = np.exp(scores - np.max(scores, -1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def flat(tree):
    """All entries of a tree, one after the other."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def relative_error(got, expected):
    """The largest difference of two trees over the largest entry of the second."""

    def gap(g, e):
        assert np.shape(g) == np.shape(e), (np.shape(g), np.shape(e))
        return np.abs(np.asarray(g) - np.asarray(e)).max()

    gaps = jax.tree.map(gap, got, expected)
    sizes = [np.abs(np.asarray(e)).max() for e in jax.tree.leaves(expected)]
    return float(np.max(jax.tree.leaves(gaps))) / max(float(np.max(sizes)), 1e-300)


def differences(function, at, step=1e-5):
    """Central differences in float64 of a function that is compiled already, entry by entry."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, at))
    assert jax.config.jax_enable_x64
    assert all(leaf.dtype == np.float64 for leaf in leaves)

    def moved(which, index, by):
        changed = [np.copy(leaf) for leaf in leaves]
        changed[which][index] += by
        return float(function(jax.tree.unflatten(structure, changed)))

    slopes = [np.zeros_like(leaf) for leaf in leaves]
    for which, slope in enumerate(slopes):
        for index in np.ndindex(slope.shape):
            rise = moved(which, index, step) - moved(which, index, -step)
            slope[index] = rise / (2 * step)
    return jax.tree.unflatten(structure, slopes)
