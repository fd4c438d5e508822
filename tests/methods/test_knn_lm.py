"""kNN-LM against brute force in numpy, its limits, and the keys it stores, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import parameters

from jmeta.methods import knn_lm
from jmeta.models import context_keys, gpt2, transformer
from jmeta.models.heads import token_loss

hidden_and_keys = jax.jit(context_keys.hidden_and_keys, static_argnums=0)
nearest = jax.jit(knn_lm.nearest, static_argnums=2, static_argnames="block")
log_likelihood = jax.jit(knn_lm.knn_log_likelihood, static_argnums=2)
distribution = jax.jit(knn_lm.knn_distribution, static_argnums=(1, 2))
interpolate = jax.jit(knn_lm.interpolate, static_argnums=2)

pytestmark = pytest.mark.usefixtures("x64")


def world(entries=23, width=3, queries=5, vocab=7):
    rng = np.random.default_rng(0)
    keys, asked = rng.normal(size=(entries, width)), rng.normal(size=(queries, width))
    keys[9] = keys[4] = keys[20]  # the same context three times
    asked[0] = keys[4]
    values = rng.integers(0, vocab, entries)
    return knn_lm.datastore(jnp.asarray(keys), jnp.asarray(values)), asked, keys, values


def brute(keys, asked, k):
    distances = ((asked[:, None] - keys[None]) ** 2).sum(-1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


@pytest.mark.parametrize("block", [1, 4, 8, 23, 100])
@pytest.mark.parametrize("k", [1, 5, 23])
def test_search_is_brute_force(block, k):
    store, asked, keys, values = world()
    found = jax.tree.map(np.asarray, nearest(store, asked, k, block=block))
    distances, order = brute(keys, asked, k)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-10, atol=1e-10)
    if k > 2:  # duplicates: all three, in the order they were stored
        assert found.entries[0, :3].tolist() == [4, 9, 20]
    # Apart from the copies, whose distances are rounded alike, the order is unique.
    np.testing.assert_array_equal(found.entries, order)
    np.testing.assert_array_equal(found.values, values[order])


def test_probabilities_are_those_of_the_formula():
    store, asked, keys, values = world()
    found = nearest(store, asked, 8, block=5)
    distances, order = brute(keys, asked, 8)
    weights = np.exp(-distances / 0.7)
    weights /= weights.sum(1, keepdims=True)
    expected = np.zeros((5, 7))
    for q in range(5):
        for weight, entry in zip(weights[q], order[q], strict=True):
            expected[q, values[entry]] += weight
    np.testing.assert_allclose(distribution(found, 7, 0.7), expected, rtol=1e-10, atol=1e-12)
    for token in range(7):
        said = log_likelihood(found, np.full(5, token), 0.7)
        np.testing.assert_allclose(np.exp(said), expected[:, token], rtol=1e-10, atol=1e-12)
    model = np.full((5, 7), 1 / 7)
    with np.errstate(divide="ignore"):
        mixed = interpolate(np.log(model), np.log(expected), 0.25)
    np.testing.assert_allclose(
        np.exp(mixed), 0.25 * expected + 0.75 * model, rtol=1e-10, atol=1e-12
    )


def test_limits():
    store, asked, _, values = world()
    found = nearest(store, asked, 23, block=6)
    targets = np.asarray([2, 0, 1, 6, 3])
    model = np.log(np.asarray([0.1, 0.2, 0.3, 0.1, 0.3]))
    said = log_likelihood(found, targets, 1.0)
    np.testing.assert_array_equal(interpolate(model, said, 0.0), model)
    np.testing.assert_array_equal(interpolate(model, said, 1.0), said)
    unigram = np.bincount(values, minlength=7) / 23
    for temperature in (1e12, np.inf):
        everywhere = distribution(found, 7, temperature)
        np.testing.assert_allclose(everywhere, np.tile(unigram, (5, 1)), rtol=1e-10, atol=1e-10)
    first = np.asarray(distribution(found, 7, 1e-9))
    np.testing.assert_allclose(
        first[1:], np.eye(7)[np.asarray(found.values)[1:, 0]], rtol=1e-10, atol=1e-12
    )
    copies = np.bincount(values[[4, 9, 20]], minlength=7) / 3  # equally near: they share
    np.testing.assert_allclose(first[0], copies, rtol=1e-10, atol=1e-12)
    absent = nearest(store, asked, 1)
    other = (np.asarray(absent.values)[:, 0] + 1) % 7
    said = log_likelihood(absent, other, 1.0)
    assert (np.asarray(said) == -np.inf).all()
    np.testing.assert_allclose(
        interpolate(model, said, 0.25), model + np.log(0.75), rtol=1e-10, atol=1e-12
    )


def test_penalty_has_its_closed_form():
    keys = np.random.default_rng(0).normal(size=(2, 3, 4))
    slope = jax.jit(jax.grad(lambda x: knn_lm.activation_penalty(x, coefficient=0.3)))(keys)
    np.testing.assert_allclose(slope, 2 * 0.3 * keys / 6, rtol=1e-10, atol=1e-12)
    weights = np.asarray([[1.0, 1, 0], [1, 0, 0]])

    @jax.jit
    def weighted(keys, weights):
        penalty = lambda x: knn_lm.activation_penalty(x, weights, coefficient=0.3)  # noqa: E731
        return jax.value_and_grad(penalty)(keys)

    slope = weighted(keys, weights)[1]
    np.testing.assert_allclose(
        slope, 2 * 0.3 * keys * weights[..., None] / 3, rtol=1e-10, atol=1e-12
    )
    assert weighted(keys, 0 * weights)[0] == 0


@pytest.mark.parametrize("kind", ["decoder", "gpt2"])
@pytest.mark.parametrize("layers", [1, 3])
def test_keys_are_what_the_last_feed_forward_layer_reads(kind, layers):
    """Whatever is put there moves the states as the rest of the last block says."""
    shape = {"vocab": 11, "width": 8, "layers": layers, "heads": 2, "max_len": 6, "loop": "scan"}
    tokens = np.random.default_rng(3).integers(0, 11, (2, 5))
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if kind == "decoder":
        config = transformer.TransformerConfig(**shape)
        params = parameters(transformer, config, spread=0.1)
        whole = jax.jit(transformer.hidden, static_argnums=0)(config, params, tokens, mask)
    else:
        config = gpt2.GPT2Config(**shape)
        params = parameters(gpt2, config, spread=0.1)
        batch = {"tokens": tokens, "mask": mask}
        whole = jax.jit(gpt2.hidden, static_argnums=0)(config, params, batch)
    states, keys, whole = map(np.asarray, (*hidden_and_keys(config, params, tokens, mask), whole))
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(states[real], whole[real], rtol=1e-10, atol=1e-10)
    # The last feed-forward layer without its output leaves the residual stream x; with it, x + f.
    off = jax.tree.map(np.copy, params["blocks"]["mlp"])
    for leaf in jax.tree.leaves(off):
        leaf[-1] = 0
    without = {**params, "blocks": {**params["blocks"], "mlp": off}}
    unit = {"scale": np.ones(8), "bias": np.zeros(8)}
    bare, _ = hidden_and_keys(config, {**without, "ln_f": unit}, tokens, mask)
    last = jax.tree.map(lambda x: np.asarray(x[-1]), params["blocks"])
    np.testing.assert_allclose(
        keys[real],
        (np.asarray(bare) * last["ln2"]["scale"] + last["ln2"]["bias"])[real],
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.slow
def test_a_model_that_has_read_a_text_finds_it_again():
    """From end to end: the text itself as the query, whose nearest neighbour is itself."""
    config = transformer.TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=12)
    params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(3), (12,), 0, 11)
    states, keys = hidden_and_keys(config, params, tokens)
    store = knn_lm.datastore(keys[:-1], tokens[1:])
    found = knn_lm.nearest(store, keys[:-1], 1)
    np.testing.assert_array_equal(found.values[:, 0], tokens[1:])
    said = knn_lm.knn_log_likelihood(found, tokens[1:], 1.0)
    np.testing.assert_allclose(said, 0, rtol=1e-10, atol=1e-12)
    table = params["embed"]["tokens"]
    loss = jax.jit(lambda *args: token_loss(*args, None)[0])
    model = loss(states[:-1], table, table[tokens[1:]], jnp.ones(11))
    mixed = knn_lm.interpolate(jnp.full(11, -model), said, 0.5)
    assert -mixed.mean() < model


def test_what_has_no_meaning_is_refused():
    store, asked, keys, _ = world()
    asked = jnp.asarray(asked)
    with pytest.raises(ValueError, match=r"k=24 neighbours of a datastore of 23"):
        knn_lm.nearest(store, asked, 24)
    with pytest.raises(ValueError, match="block=0"):
        knn_lm.nearest(store, asked, 2, block=0)
    with pytest.raises(ValueError, match="one value for each"):
        knn_lm.datastore(jnp.asarray(keys), jnp.zeros(3, int))
    with pytest.raises(ValueError, match="at least one context"):
        knn_lm.datastore(jnp.zeros((0, 3)), jnp.zeros(0, int))
    with pytest.raises(ValueError, match="temperature=0"):
        knn_lm.knn_log_likelihood(knn_lm.nearest(store, asked, 2), jnp.zeros(5, int), 0)
    with pytest.raises(ValueError, match="weight=2"):
        knn_lm.interpolate(jnp.zeros(1), jnp.zeros(1), 2)
