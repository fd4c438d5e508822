"""Fast weight layers against explicit prefix gradients in float64; causality, streams, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import differences, drawn, relative_error

from jmeta.methods import fast_weights, fast_weights_stream
from jmeta.methods.fast_weights import FastWeights, init, init_memory, next_tokens
from jmeta.methods.fast_weights_block import unembedding_gradient

pytestmark = pytest.mark.usefixtures("x64")

WIDTH, SIZE, VOCAB, TIME, BATCH = 5, 4, 11, 12, 2
features = jax.jit(fast_weights.features, static_argnums=0)
segment = jax.jit(fast_weights.segment, static_argnums=0)
slow_features = jax.jit(fast_weights.slow_features, static_argnums=0)
score_gradient = jax.jit(unembedding_gradient, static_argnums=3)
PREFIX, CONSTANT = FastWeights(chunk=4), FastWeights(chunk=4, reference=7.0)


@pytest.fixture
def world(x64):
    """A block with biases and step sizes that matter, and documents with weights 0, 1 and more."""
    params = drawn(jax.eval_shape(lambda: init(WIDTH, SIZE, jax.random.key(0))), 0.5, seed=3)
    params["steps"] = {"up": np.asarray(0.3), "down": np.asarray(0.2), "norm": np.asarray(0.5)}
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, SIZE))
    states = rng.normal(size=(BATCH, TIME, WIDTH))
    labels = rng.integers(0, VOCAB, (BATCH, TIME))
    weights = rng.choice([0.0, 1.0, 2.5], (BATCH, TIME))
    # What a test changes counts, and is not yet what it is changed to.
    weights[:, -1], weights[0, [3, 7]], labels[0, [3, 7]] = 0, 1, (5, 9)
    return params, table, states, labels, weights


def block(params, x):
    """The block of one position, written plainly."""
    hidden = jnp.maximum(x @ params["up"]["kernel"] + params["up"]["bias"], 0) ** 2
    out = hidden @ params["down"]["kernel"] + params["down"]["bias"]
    centred = out - out.mean()
    unit = centred / jnp.sqrt((centred**2).mean() + 1e-6)
    return unit * params["norm"]["scale"] + params["norm"]["bias"]


def loss_sum(params, table, states, labels, weights, total=1.0):
    scores = jax.vmap(lambda x: jax.nn.log_softmax(table @ block(params, x)))(states)
    return -(weights * scores[jnp.arange(len(labels)), labels]).sum() / total


@functools.partial(jax.value_and_grad, has_aux=True)
def wave(params, states):
    out = fast_weights.slow_features(PREFIX, params, states)
    return jnp.sum(jnp.sin(out)), out


def test_a_block_near_identity_begins_as_layer_norm_and_its_features_can_learn():
    states = np.random.default_rng(1).uniform(-4, 4, (3, WIDTH))

    @jax.jit
    def begun(key):
        params = fast_weights.init_near_identity(WIDTH, key)
        return params, wave(params, states)

    params, ((_, found), grads) = jax.tree.map(np.asarray, begun(jax.random.key(0)))
    centred = states - states.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, unit, rtol=1e-12, atol=1e-12)
    unread = grads["down"]["kernel"][2 * WIDTH :]
    assert np.abs(params["down"]["kernel"][2 * WIDTH :]).max() == 0
    assert np.abs(unread).max(-1).min() > 0


def stepped(params, grads):
    """One step on everything but the Dense biases, which are slow."""
    moved = {
        name: {"kernel": params[name]["kernel"] - params["steps"][name] * grads[name]["kernel"],
               "bias": params[name]["bias"]}
        for name in ("up", "down")
    }  # fmt: skip
    norm = jax.tree.map(lambda p, g: p - params["steps"]["norm"] * g, params["norm"], grads["norm"])
    return {**params, **moved, "norm": norm}


def past(weights, t):
    """The weights of the positions before t, and zero for all others."""
    return jnp.where(jnp.arange(weights.shape[-1]) < t, weights, 0)


def fast_block(params, table, states, labels, weights, t, total, first_order=False):
    """At position t: the gradient of the past's loss, a step along it, the block again."""
    before = past(weights, t)
    counted = jnp.where(before.sum() == 0, 1, before.sum())
    grads = jax.grad(loss_sum)(
        params, table, states, labels, before, jnp.where(total == 0, counted, total)
    )
    grads = jax.tree.map(lambda g: jnp.where(first_order, jax.lax.stop_gradient(g), g), grads)
    return block(stepped(params, grads), states[t])


def document(params, table, states, labels, weights, total, first_order=False):
    """The same at every position of a document, ``[time, size]``."""
    one = lambda t: fast_block(  # noqa: E731
        params, table, states, labels, weights, t, total, first_order
    )
    return jax.vmap(one)(jnp.arange(len(labels)))


# Of every document; a total of 0 stands for the weight of the past: one program for both.
by_explicit_gradients = jax.jit(jax.vmap(document, (None, None, 0, 0, 0, None)))


def explicit_loss(params, table, states, labels, weights, total, first_order):
    """The mean loss of all documents after explicit steps."""
    docs = jax.vmap(document, (None, None, 0, 0, 0, None, None))
    scores = docs(params, table, states, labels, weights, total, first_order) @ table.T
    picked = jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], -1)[..., 0]
    return -(weights * picked).sum() / weights.sum()


def fast_loss(config, params, table, states, labels, weights):
    return fast_weights.loss(config, params, table, states, labels, weights)[0]


# Values, and gradients of the block, the unembedding and the body.
explicit_training = jax.jit(jax.value_and_grad(explicit_loss, (0, 1, 2)))
training = jax.jit(jax.value_and_grad(fast_loss, (1, 2, 3)), static_argnums=0)


@jax.jit
def explicit_step(params, table, states, labels, weights, total):
    grads = jax.grad(loss_sum)(params, table, states, labels, weights, total)
    return stepped(params, grads)


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
def test_every_position_equals_the_block_after_an_explicit_step_on_all_before(world, config):
    expected = by_explicit_gradients(*world, config.reference or 0.0)
    assert relative_error(features(config, *world), expected) < 1e-10


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 12, 50])
def test_chunks_decide_the_cost_and_never_the_numbers(world, chunk):
    whole = features(FastWeights(chunk=TIME), *world)
    np.testing.assert_allclose(
        features(FastWeights(chunk=chunk), *world), whole, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("scored", [1, 7, 24, 100])
def test_scoring_a_few_tokens_at_a_time_changes_nothing(world, scored):
    _, table, *_ = world
    out, labels = np.random.default_rng(1).normal(size=(3, 8, SIZE)), np.arange(24).reshape(3, 8)
    p = np.exp(out @ table.T)
    p /= p.sum(-1, keepdims=True)
    expected = (p - np.eye(VOCAB)[labels % VOCAB]) @ table
    found = score_gradient(out, table, labels % VOCAB, scored)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


def test_without_steps_it_is_the_slow_block(world):
    params, table, states, *rest = world
    still = {**params, "steps": jax.tree.map(np.zeros_like, params["steps"])}
    slow = np.asarray(slow_features(PREFIX, params, states))
    np.testing.assert_allclose(
        features(PREFIX, still, table, states, *rest), slow, rtol=1e-10, atol=1e-14
    )
    plain = jax.jit(block)(params, states[1, 3])
    np.testing.assert_allclose(slow[1, 3], plain, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
@pytest.mark.parametrize("what", ["states", "labels", "weights"])
def test_the_past_is_the_same_to_the_bit_whatever_comes_later(world, config, what):
    params, table, *inputs = world
    run = lambda *inputs: np.asarray(features(config, params, table, *inputs))  # noqa: E731
    at = {"states": 0, "labels": 1, "weights": 2}[what]
    for j in (3, 7, 11):
        changed = list(inputs)
        changed[at] = np.copy(inputs[at])
        changed[at][0, j] = 3
        before, after = run(*inputs), run(*changed)
        seen = j if what == "states" else j + 1  # a label is learned after its position
        assert (before[0, :seen] == after[0, :seen]).all()
        assert (before[1] == after[1]).all()
        if j < 11:
            assert (before[0, j + 1 :] != after[0, j + 1 :]).any()


def test_normalising_over_the_whole_batch_leaks_the_future_and_ours_does_not(world):
    params, table, states, labels, weights = world

    def published(weights):
        total = float(weights.sum())  # over every sequence and the future
        return np.asarray(by_explicit_gradients(params, table, states, labels, weights, total))

    later = np.copy(weights)
    later[0, 8] = 9.0
    assert np.abs(published(weights) - published(later))[0, 2:8].max() > 1e-2
    for config in (PREFIX, CONSTANT):
        ours = np.asarray(features(config, params, table, states, labels, weights))
        moved = np.asarray(features(config, params, table, states, labels, later))
        assert (ours[0, :9] == moved[0, :9]).all()


def test_a_document_does_not_depend_on_those_beside_it(world):
    params, table, *inputs = world
    alone = np.asarray(features(PREFIX, params, table, *(x[:1] for x in inputs)))
    together = np.asarray(features(PREFIX, *world))
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-10, atol=1e-13)


def test_what_stands_at_padding_never_matters(world):
    params, table, states, labels, weights = world
    weights[:, 9:] = 0
    parts = (x[:, :9].copy() for x in (states, labels, weights))  # it may still be running below
    short = features(PREFIX, params, table, *parts)
    states[:, 9:], labels[:, 9:] = np.nan, -5
    garbage = states, labels, weights
    out, memory = segment(PREFIX, params, table, init_memory(params, BATCH), *garbage)
    np.testing.assert_allclose(np.asarray(out)[:, :9], short, rtol=1e-10, atol=1e-14)
    assert all(np.isfinite(leaf).all() for leaf in memory)


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
def test_segments_carry_the_memory_over(world, config):
    params, table, *inputs = world
    memory, outs = init_memory(params, BATCH), []
    for first, last in ((0, 5), (5, 10), (10, 11), (11, 12)):
        part = (x[:, first:last] for x in inputs)
        out, memory = segment(config, params, table, memory, *part)
        outs.append(out)
    np.testing.assert_allclose(
        np.concatenate(outs, 1), features(config, *world), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
def test_decoding_token_by_token_gives_the_numbers_of_whole_documents(world, config):
    params, table, states, _, drawn = world
    tokens = np.random.default_rng(5).integers(0, VOCAB, (BATCH, TIME))
    labels, ones = map(np.asarray, next_tokens(tokens))
    step = jax.jit(functools.partial(fast_weights_stream.step, config, params, table))
    for weights in (None, drawn):
        each = ones if weights is None else weights
        whole = np.asarray(features(config, params, table, states, labels, each))
        stream = fast_weights_stream.init_state(params, BATCH)
        for t in range(TIME):
            given = None if weights is None else weights[:, t]
            out, stream = step(stream, tokens[:, t], states[:, t], given)
            np.testing.assert_allclose(out, whole[:, t], atol=1e-9, rtol=1e-9)


def test_with_chunks_it_is_gradient_descent_for_two_chunks_and_not_for_three(world):
    """Gradients are all taken at the slow weights; a real step moves where the next is taken."""
    params, table, states, labels, _ = world
    size, reference = 4, 7.0
    config = FastWeights(reference=reference)
    weights = np.ones(labels.shape)
    one = functools.partial(fast_weights.read, config, params)
    reading = jax.jit(jax.vmap(one, (None, 1), 1))
    each = jax.jit(jax.vmap(block, (None, 0)))
    memory, moving = init_memory(params, BATCH), [params] * BATCH
    for chunk in range(3):
        part = slice(chunk * size, (chunk + 1) * size)
        read = np.asarray(reading(memory, states[:, part]))
        for b in range(BATCH):
            expected = each(moving[b], states[b, part])
            error = relative_error(read[b], expected)
            assert error < 1e-12 if chunk < 2 else error > 1e-4, (chunk, error)
            data = states[b, part], labels[b, part], weights[b, part]
            moving[b] = explicit_step(moving[b], table, *data, reference)
        _, memory = segment(
            config, params, table, memory, states[:, part], labels[:, part], weights[:, part]
        )


@pytest.mark.parametrize("config", [PREFIX, CONSTANT._replace(scored=7)])
def test_the_training_gradient_is_that_of_explicit_steps(world, config):
    """Through what was learned too: of the block, its step sizes, the unembedding and the body."""
    value, found = training(config, *world)
    plain, expected = explicit_training(*world, config.reference or 0.0, False)
    assert float(abs(value - plain)) < 1e-12
    assert relative_error(found, expected) < 1e-10
    params, *rest = world

    def of_steps(steps):
        return training(config, {**params, "steps": steps}, *rest)[0]

    slopes = differences(of_steps, params["steps"])
    assert relative_error(found[0]["steps"], slopes) < 1e-6


def test_first_order_takes_the_steps_as_constants(world):
    value, found = training(PREFIX._replace(first_order=True), *world)
    exact_value, exact = training(PREFIX, *world)
    assert float(abs(value - exact_value)) < 1e-13
    assert relative_error(found[0], explicit_training(*world, 0.0, True)[1][0]) < 1e-10
    assert relative_error(found[0], exact[0]) > 1e-2


def test_without_steps_the_body_gets_the_ordinary_gradient(world):
    params, table, states, labels, weights = world
    still = {**params, "steps": jax.tree.map(np.zeros_like, params["steps"])}

    def slow(states):
        out = fast_weights.slow_features(PREFIX, params, states)
        each = fast_weights.token_losses(out, table, labels)
        return (each * weights).sum() / weights.sum()

    found = training(PREFIX, still, table, states, labels, weights)[1][2]
    assert relative_error(found, jax.jit(jax.grad(slow))(states)) < 1e-12


def test_no_one_hot_and_few_arrays_of_the_size_of_the_scores(world):
    """Evaluation holds [tokens, vocab] a few at a time with ``scored``, and never as booleans."""
    params, table, states, labels, weights = world
    config, vocab = FastWeights(scored=6), 997
    table = np.ones((vocab, SIZE))
    jaxpr = jax.make_jaxpr(functools.partial(fast_weights.features, config))(
        params, table, states, labels, weights
    )
    sizes = [
        eqn.outvars[0].aval for eqn in _equations(jaxpr.jaxpr) if vocab in eqn.outvars[0].aval.shape
    ]
    assert sizes
    assert all(aval.dtype == jnp.float64 and aval.size <= 6 * vocab for aval in sizes)
    train = jax.grad(lambda params, table: fast_weights.loss(
        config, params, table, states, labels, weights)[0], argnums=(0, 1))  # fmt: skip
    jaxpr = jax.make_jaxpr(train)(params, table)
    kinds = {
        out.aval.dtype
        for eqn in _equations(jaxpr.jaxpr)
        for out in eqn.outvars
        if vocab in out.aval.shape
    }
    assert kinds == {jnp.dtype("float64")}  # a one-hot begins as booleans or integers


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "jaxpr"):
                    yield from _equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_bfloat16_states_are_read_in_float32(world):
    with jax.enable_x64(False):
        single = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float32 if x.dtype == jnp.float64 else jnp.int32), world
        )
        params, table, states, *rest = single
        out = features(PREFIX, params, table, states.astype(jnp.bfloat16), *rest)
    assert out.dtype == jnp.float32
    expected = np.asarray(features(PREFIX, *world))
    assert np.abs(np.asarray(out) - expected).max() < 0.05 * np.abs(expected).max()


def test_wrong_shapes_are_named(world):
    params, table, states, labels, weights = world
    for bad, message in (
        ((params, table, states[..., :3], labels, weights), r"\[batch, time, 5\]"),
        ((params, table[:, :3], states, labels, weights), r"\[vocab, 4\]"),
        ((params, table, states, labels[:, :3], weights), "labels have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            features(PREFIX, *bad)
    with pytest.raises(ValueError, match="chunk=0"):
        features(FastWeights(chunk=0), *world)
    for reference in (0.0, -64.0, float("nan")):
        with pytest.raises(ValueError, match=r"reference=.* divides the gradients"):
            features(FastWeights(reference=reference), *world)
