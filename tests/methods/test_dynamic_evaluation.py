"""Dynamic evaluation against loops written by hand, in float64; what it must never depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import differences, parameters, relative_error

import jmeta
from jmeta.core.types import Episode, Problem, Steps
from jmeta.methods.dynamic_evaluation import (
    dynamic_evaluation,
    gradient_statistics,
    plain,
    rms_towards_start,
    sgd_towards_start,
)
from jmeta.models import decoding, heads, transformer

pytestmark = pytest.mark.usefixtures("x64")

PARAMS = {"body": {"w": np.linspace(-1.0, 1.0, 6).reshape(2, 3)}, "head": np.linspace(0.5, -0.5, 3)}


@pytest.fixture
def params(x64):
    return jax.tree.map(jnp.asarray, PARAMS)


@pytest.fixture
def documents(x64):
    """Two documents of five segments of four points."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 2))
    return {"x": x, "y": np.sin(3 * x[..., 0])}


def network(params, batch):
    out = jnp.tanh(batch["x"] @ params["body"]["w"]) @ params["head"]
    return jnp.mean((out - batch["y"]) ** 2), {"first": out[0]}


slope = jax.jit(jax.value_and_grad(network, has_aux=True))


def one(documents, i=0):
    return jax.tree.map(lambda x: x[i], documents)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _evaluated(make, params, document, globs, *settings):
    return dynamic_evaluation(plain(network), make(*settings), params, document, (), *globs)


def evaluated(make, params, document, *settings, globs=()):
    return _evaluated(make, params, document, globs, *settings)


def test_scores_come_before_updates_and_match_a_loop(params, documents):
    document, rate, decay = one(documents), 0.3, 0.1
    found = jax.tree.map(np.asarray, evaluated(sgd_towards_start, params, document, rate, decay))
    here = PARAMS
    for s in range(5):
        segment = jax.tree.map(lambda x, s=s: x[s], document)
        (value, aux), grads = jax.tree.map(np.asarray, slope(here, segment))
        assert abs(found.losses[s] - value) < 1e-14
        assert abs(found.aux["first"][s] - aux["first"]) < 1e-14
        here = jax.tree.map(lambda p, g, s: p + decay * (s - p) - rate * g, here, grads, PARAMS)
    assert relative_error(found.params, here) < 1e-14


def test_a_step_size_made_of_the_segments_own_loss_is_told_it(params, documents):
    document, here = one(documents), PARAMS
    found = evaluated(optax.polyak_sgd, params, document, 10.0)
    for s in range(5):
        segment = jax.tree.map(lambda x, s=s: x[s], document)
        (value, _), grads = jax.tree.map(np.asarray, slope(here, segment))
        size = sum(np.sum(g**2) for g in jax.tree.leaves(grads))
        rate = np.minimum(value / size, 10.0)
        here = jax.tree.map(lambda p, g, rate=rate: p - rate * g, here, grads)
    assert relative_error(found.params, here) < 1e-12


def test_rms_matches_a_loop_in_numpy_with_no_entry_past_its_start(params, documents):
    document, rate, decay, eps = one(documents), 0.05, 0.6, 1e-3
    rng = np.random.default_rng(1)
    sizes = jax.tree.map(lambda x: rng.uniform(0, 1, x.shape) ** 3, PARAMS)
    found = evaluated(rms_towards_start, params, document, rate, decay, sizes, eps)
    mean = np.mean(np.concatenate([np.ravel(x) for x in jax.tree.leaves(sizes)]))
    here, clipped = PARAMS, False
    for s in range(5):
        (value, _), grads = slope(here, jax.tree.map(lambda x, s=s: x[s], document))
        assert abs(float(found.losses[s]) - float(value)) < 1e-13

        def update(p, g, start, size):
            ratio = np.minimum(size / mean, 1 / decay)
            return p + decay * ratio * (start - p) - rate * np.asarray(g) / (size + eps)

        here = jax.tree.map(update, here, grads, PARAMS, sizes)
        clipped |= any(bool((x / mean > 1 / decay).any()) for x in jax.tree.leaves(sizes))
    assert clipped  # the world has entries that would pass the start
    assert relative_error(found.params, here) < 1e-13


def test_without_a_rate_it_is_the_static_model(params, documents):
    found = evaluated(sgd_towards_start, params, one(documents), 0.0, 0.5)
    static = jax.jit(jax.vmap(network, (None, 0)))(params, one(documents))[0]
    np.testing.assert_allclose(found.losses, static, rtol=1e-10, atol=1e-15)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_rms_with_sizes_of_one_and_no_decay_is_gradient_descent(params, documents):
    ones = jax.tree.map(np.ones_like, PARAMS)
    rms = evaluated(rms_towards_start, params, one(documents), 0.2, 0.0, ones, 0.0)
    plain_sgd = evaluated(optax.sgd, params, one(documents), 0.2)
    ours = evaluated(sgd_towards_start, params, one(documents), 0.2)
    assert relative_error(rms.params, plain_sgd.params) < 1e-15
    assert relative_error(ours.params, plain_sgd.params) < 1e-15


@pytest.mark.parametrize("rms", [False, True])
def test_the_decay_alone_leads_back_to_the_start(params, rms):
    sizes = jax.tree.map(lambda x: jnp.asarray(np.abs(x) + 0.2), PARAMS)
    tx = rms_towards_start(0.0, 0.4, sizes) if rms else sgd_towards_start(0.0, 0.4)

    def step(state, _):
        here, opt_state = state
        updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, here)
        here = optax.apply_updates(here, updates)
        return (here, opt_state), jax.tree.map(lambda a, b: jnp.abs(a - b).max(), here, params)

    away = jax.tree.map(lambda x: x + 1.0, PARAMS)
    begun = jax.tree.map(jnp.asarray, away), tx.init(params)
    _, gaps = jax.jit(lambda begun: jax.lax.scan(step, begun, None, 200))(begun)
    for gap in map(np.asarray, jax.tree.leaves(gaps)):
        assert gap[-1] < 1e-6
        assert (np.diff(gap) <= 1e-15).all()


def test_a_score_does_not_depend_on_what_comes_later(params, documents):
    document = one(documents)
    before = np.asarray(evaluated(sgd_towards_start, params, document, 0.5).losses)
    for s in range(5):
        changed = {**document, "y": np.copy(document["y"])}
        changed["y"][s] += 1.0
        after = np.asarray(evaluated(sgd_towards_start, params, changed, 0.5).losses)
        assert (before[:s] == after[:s]).all()
        assert (before[s:] != after[s:]).all()


def test_documents_side_by_side_are_each_what_they_are_alone(params, documents):
    together = jax.jit(
        jax.vmap(
            lambda document: dynamic_evaluation(plain(network), optax.adam(0.1), params, document)
        )
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam does not bear the strict one.
        found = jax.tree.map(np.asarray, together(documents))
        for i in range(2):
            alone = evaluated(optax.adam, params, one(documents, i), 0.1)
            np.testing.assert_allclose(found.losses[i], alone.losses, rtol=1e-10, atol=1e-13)
            for a, b in zip(*map(jax.tree.leaves, (found.params, alone.params)), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-10, atol=1e-13)


def test_only_what_the_globs_name_learns(params, documents):
    found = jax.tree.map(
        np.asarray, evaluated(sgd_towards_start, params, one(documents), 0.3, globs=("head",))
    )
    assert (found.params["body"]["w"] == PARAMS["body"]["w"]).all()
    assert (found.params["head"] != PARAMS["head"]).all()
    sizes = jax.tree.map(np.ones_like, PARAMS)
    rms = evaluated(
        rms_towards_start, params, one(documents), 0.3, 0.0, sizes, 0.0, globs=("head",)
    )
    assert relative_error(rms.params, found.params) < 1e-14
    with pytest.raises(ValueError, match="matches no leaf"):
        evaluated(sgd_towards_start, params, one(documents), 0.3, globs=("tail",))


def test_what_learns_needs_statistics_and_a_decay_has_a_range(params):
    tx = rms_towards_start(0.1, 0.1, {"head": params["head"]})
    with pytest.raises(ValueError, match="gradient statistics"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"decay=1.5 is not in \[0, 1\]"):
        sgd_towards_start(0.1, 1.5)
    with pytest.raises(ValueError, match=r"decay=-0\.1 leads away from the start"):
        rms_towards_start(0.1, -0.1, params)
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_statistics(network, params, [])


def test_statistics_are_root_mean_squares_over_batches(params, documents):
    batches = [jax.tree.map(lambda x, s=s: x[0, s], documents) for s in range(5)]
    found = gradient_statistics(network, params, batches)
    each = [slope(params, batch)[1] for batch in batches]
    expected = jax.tree.map(lambda *g: np.sqrt(np.mean(np.square(np.stack(g)), 0)), *each)
    assert relative_error(found, expected) < 1e-14


def test_meta_training_it_is_the_online_objective(params, documents):
    """The start and a rate for each part are learned through the updates, exactly."""
    meta = {"start": params, "rates": {"body": np.asarray(0.3), "head": np.asarray(0.1)}}

    def loss(fast, meta, batch, key):
        return network(fast, batch)

    def optimizer(meta):
        rates = meta["rates"]
        tx = {name: optax.sgd(rate) for name, rate in rates.items()}
        return optax.transforms.partition(tx, {"body": "body", "head": "head"})

    problem = Problem(loss, loss, optimizer, init=lambda meta, key: meta["start"])
    episode = Episode(Steps(one(documents)))
    mg = jmeta.mixed_mode(problem, steps=5, objective=jmeta.online)
    grads, _, info = jax.jit(lambda meta: mg.estimate(meta, (), episode, None))(meta)

    @jax.jit
    def scored(meta):
        return dynamic_evaluation(
            plain(network), optimizer(meta), meta["start"], one(documents)
        ).losses

    assert relative_error(info.inner_losses, scored(meta)) < 1e-13
    slopes = differences(lambda meta: np.asarray(scored(meta)).mean(), meta)
    assert relative_error(grads, slopes) < 1e-8


def test_a_meta_gradient_goes_through_what_is_carried_and_a_step_does_not():
    """A carry that the parameters make: steps take it as given, the derivative of all does not."""

    def loss(theta, carry, x):
        return (theta * carry - x) ** 2, (carry + jnp.tanh(theta), {})

    def scored(theta):
        x = jnp.array([4.0, 1.0, 2.0])
        return dynamic_evaluation(loss, optax.sgd(0.1), theta, x, jnp.ones(())).losses.sum()

    def by_hand(theta):
        carry, total = 1.0, 0.0
        for x in (4.0, 1.0, 2.0):
            slope = 2 * carry * (theta * carry - x)
            total, carry = total + (theta * carry - x) ** 2, carry + jnp.tanh(theta)
            theta = theta - 0.1 * slope
        return total

    start = np.asarray(0.7)
    ours, plainly = (jax.jit(jax.value_and_grad(each)) for each in (scored, by_hand))
    (value, slope), (expected, its_slope) = ours(start), plainly(start)
    assert float(value) == pytest.approx(float(expected), rel=1e-13)
    assert float(slope) == pytest.approx(float(its_slope), rel=1e-12)
    assert relative_error(slope, differences(lambda theta: ours(theta)[0], start)) < 1e-8


def test_a_decoder_with_its_cache_carried_over():
    """Without learning, segments with the cache are the document as a whole."""
    config = transformer.TransformerConfig(vocab=13, width=8, layers=2, heads=2, max_len=12)
    with jax.enable_x64(True):
        params = parameters(transformer, config)
        tokens = np.random.default_rng(1).integers(0, 13, 13)
        segments = {"tokens": tokens[:12].reshape(3, 4), "labels": tokens[1:].reshape(3, 4)}

        def loss(params, cache, segment):
            states, cache = decoding.extend(config, params, cache, segment["tokens"][None])
            rows = params["embed"]["tokens"][segment["labels"]][None]
            value, _ = heads.token_loss(
                states, params["embed"]["tokens"], rows, np.ones((1, 4)), None
            )
            return value, (cache, {})

        @jax.jit
        def run(rate):
            cache = decoding.init_cache(config, params, 1)
            return dynamic_evaluation(loss, optax.sgd(rate), params, segments, cache)

        found = np.asarray(run(0.0).losses)
        scores = np.asarray(jax.jit(lambda p: transformer.logits(config, p, tokens[:12]))(params))
        scores = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        expected = -scores[np.arange(12), tokens[1:]].reshape(3, 4).mean(1)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        moved = run(0.1)
        assert int(moved.carry.length) == 12
        losses = np.asarray(moved.losses)
        assert float(losses[0]) == pytest.approx(float(found[0]), abs=1e-13)
        assert (losses[1:] != found[1:]).all()
