"""Fast weight layers against explicit prefix gradients in float64; causality, streams, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.methods import fast_weights, fast_weights_stream
from jmeta.methods.fast_weights import FastWeights, init, init_memory, next_tokens
from jmeta.methods.fast_weights_block import unembedding_gradient
from jmeta.testing import central_differences, relative_error

pytestmark = pytest.mark.usefixtures("x64")

WIDTH, SIZE, VOCAB, TIME, BATCH = 5, 4, 11, 12, 2
features = jax.jit(fast_weights.features, static_argnums=0)
segment = jax.jit(fast_weights.segment, static_argnums=0)
PREFIX, CONSTANT = FastWeights(chunk=4), FastWeights(chunk=4, reference=7.0)


@pytest.fixture
def world(x64):
    """A block with biases and step sizes that matter, and documents with weights 0, 1 and more."""
    keys = iter(jax.random.split(jax.random.key(3), 12))
    params = init(WIDTH, SIZE, next(keys))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)
    params["steps"] = {"up": jnp.asarray(0.3), "down": jnp.asarray(0.2), "norm": jnp.asarray(0.5)}
    table = jax.random.normal(next(keys), (VOCAB, SIZE))
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(BATCH, TIME, WIDTH)))
    labels = jnp.asarray(rng.integers(0, VOCAB, (BATCH, TIME)))
    weights = jnp.asarray(rng.choice([0.0, 1.0, 2.5], (BATCH, TIME)))
    return params, table, states, labels, weights.at[:, -1].set(0)


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


def test_a_block_near_identity_begins_as_layer_norm_and_its_features_can_learn():
    params = fast_weights.init_near_identity(WIDTH, jax.random.key(0))
    states = 4 * jax.random.uniform(jax.random.key(1), (3, WIDTH), minval=-1, maxval=1)
    centred = states - states.mean(-1, keepdims=True)
    unit = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    slow = lambda params: fast_weights.slow_features(PREFIX, params, states)  # noqa: E731
    np.testing.assert_allclose(slow(params), unit, rtol=1e-12, atol=1e-12)
    grads = jax.grad(lambda params: jnp.sum(jnp.sin(slow(params))))(params)
    unread = grads["down"]["kernel"][2 * WIDTH :]
    assert float(jnp.abs(params["down"]["kernel"][2 * WIDTH :]).max()) == 0
    assert float(jnp.abs(unread).max(-1).min()) > 0


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


def fast_block(params, table, states, labels, weights, t, total=None, stop=lambda x: x):
    """At position t: the gradient of the past's loss, a step along it, the block again."""
    before = past(weights, t)
    if total is None:
        total = jnp.where(before.sum() == 0, 1, before.sum())
    grads = jax.grad(loss_sum)(params, table, states, labels, before, total)
    return block(stepped(params, stop(grads)), states[t])


@jax.jit
def by_explicit_gradients(params, table, states, labels, weights, total=None):
    """The same at every position of every document, ``[batch, time, size]``."""

    def document(states, labels, weights):
        return jax.vmap(lambda t: fast_block(params, table, states, labels, weights, t, total))(
            jnp.arange(len(labels))
        )

    return jax.vmap(document)(states, labels, weights)


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
def test_every_position_equals_the_block_after_an_explicit_step_on_all_before(world, config):
    expected = by_explicit_gradients(*world, config.reference)
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
    out, labels = jax.random.normal(jax.random.key(1), (3, 8, SIZE)), jnp.arange(24).reshape(3, 8)
    one = jax.grad(lambda h, y: -jax.nn.log_softmax(table @ h)[y])
    expected = jax.jit(jax.vmap(jax.vmap(one)))(out, labels % VOCAB)
    found = jax.jit(unembedding_gradient, static_argnums=3)(out, table, labels % VOCAB, scored)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


def test_without_steps_it_is_the_slow_block(world):
    params, table, states, *rest = world
    still = {**params, "steps": jax.tree.map(jnp.zeros_like, params["steps"])}
    slow = fast_weights.slow_features(PREFIX, params, states)
    np.testing.assert_allclose(
        features(PREFIX, still, table, states, *rest), slow, rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(slow[1, 3], block(params, states[1, 3]), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
@pytest.mark.parametrize("what", ["states", "labels", "weights"])
def test_the_past_is_the_same_to_the_bit_whatever_comes_later(world, config, what):
    params, table, *inputs = world
    run = functools.partial(features, config, params, table)
    at = {"states": 0, "labels": 1, "weights": 2}[what]
    for j in (3, 7, 11):
        changed = list(inputs)
        changed[at] = changed[at].at[0, j].set(3)
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
        return by_explicit_gradients(params, table, states, labels, weights, total)

    later = weights.at[0, 8].set(9.0)
    assert np.abs(published(weights) - published(later))[0, 2:8].max() > 1e-2
    for config in (PREFIX, CONSTANT):
        ours = features(config, params, table, states, labels, weights)
        moved = features(config, params, table, states, labels, later)
        assert (ours[0, :9] == moved[0, :9]).all()


def test_a_document_does_not_depend_on_those_beside_it(world):
    params, table, *inputs = world
    alone = features(PREFIX, params, table, *(x[:1] for x in inputs))
    together = features(PREFIX, *world)
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-10, atol=1e-13)


def test_what_stands_at_padding_never_matters(world):
    params, table, states, labels, weights = world
    weights = weights.at[:, 9:].set(0)
    short = features(PREFIX, params, table, states[:, :9], labels[:, :9], weights[:, :9])
    garbage = states.at[:, 9:].set(jnp.nan), labels.at[:, 9:].set(-5)
    out, memory = segment(PREFIX, params, table, init_memory(params, BATCH), *garbage, weights)
    np.testing.assert_allclose(out[:, :9], short, rtol=1e-10, atol=1e-14)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in memory)


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
def test_segments_carry_the_memory_over(world, config):
    params, table, *inputs = world
    memory, outs = init_memory(params, BATCH), []
    for first, last in ((0, 5), (5, 6), (6, 12)):
        part = (x[:, first:last] for x in inputs)
        out, memory = segment(config, params, table, memory, *part)
        outs.append(out)
    np.testing.assert_allclose(
        jnp.concatenate(outs, 1), features(config, *world), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("config", [PREFIX, CONSTANT])
def test_decoding_token_by_token_gives_the_numbers_of_whole_documents(world, config):
    params, table, states, _, drawn = world
    tokens = jax.random.randint(jax.random.key(5), (BATCH, TIME), 0, VOCAB)
    labels, ones = next_tokens(tokens)
    step = jax.jit(functools.partial(fast_weights_stream.step, config, params, table))
    for weights in (None, drawn):
        each = ones if weights is None else weights
        whole = features(config, params, table, states, labels, each)
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
    weights, slope = jnp.ones_like(labels, states.dtype), jax.jit(jax.grad(loss_sum))
    one = functools.partial(fast_weights.read, config, params)
    reading = jax.jit(jax.vmap(one, (None, 1), 1))
    each = jax.jit(jax.vmap(block, (None, 0)))
    memory, moving = init_memory(params, BATCH), [params] * BATCH
    for chunk in range(3):
        part = slice(chunk * size, (chunk + 1) * size)
        read = reading(memory, states[:, part])
        for b in range(BATCH):
            expected = each(moving[b], states[b, part])
            error = relative_error(read[b], expected)
            assert error < 1e-12 if chunk < 2 else error > 1e-4, (chunk, error)
            data = states[b, part], labels[b, part], weights[b, part]
            moving[b] = stepped(moving[b], slope(moving[b], table, *data, reference))
        _, memory = segment(
            config, params, table, memory, states[:, part], labels[:, part], weights[:, part]
        )


@pytest.mark.parametrize("config", [PREFIX, CONSTANT._replace(scored=7)])
def test_the_training_gradient_is_that_of_explicit_steps(world, config):
    """Through what was learned too: of the block, its step sizes, the unembedding and the body."""
    params, table, states, labels, weights = world
    one = (states[:1, :6], labels[:1, :6], weights[:1, :6].at[0, 2].set(1.0))

    def by_hand(params, table, states):
        labels, weights = (x[0] for x in one[1:])
        out = jax.vmap(
            lambda t: fast_block(params, table, states[0], labels, weights, t, config.reference)
        )(jnp.arange(6))
        picked = jax.nn.log_softmax(out @ table.T)[jnp.arange(6), labels]
        return -(weights * picked).sum() / weights.sum()

    def ours(params, table, states):
        return fast_weights.loss(config, params, table, states, *one[1:])[0]

    inputs = params, table, one[0]
    value, found = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(*inputs)
    plain, expected = jax.jit(jax.value_and_grad(by_hand, (0, 1, 2)))(*inputs)
    assert float(abs(value - plain)) < 1e-12
    assert relative_error(found, expected) < 1e-10

    def of_steps(steps):
        return ours({**params, "steps": steps}, table, one[0])

    slopes = central_differences(of_steps, params["steps"])
    assert relative_error(found[0]["steps"], slopes) < 1e-6


def test_first_order_takes_the_steps_as_constants(world):
    params, table, states, labels, weights = world
    first = PREFIX._replace(first_order=True)

    def ours(params, config):
        return fast_weights.loss(config, params, table, states, labels, weights)[0]

    def by_hand(params):
        def document(states, labels, weights):
            out = jax.vmap(
                lambda t: fast_block(
                    params, table, states, labels, weights, t, stop=jax.lax.stop_gradient
                )
            )(jnp.arange(TIME))
            picked = jax.nn.log_softmax(out @ table.T)[jnp.arange(TIME), labels]
            return -(weights * picked).sum()

        return jax.vmap(document)(states, labels, weights).sum() / weights.sum()

    gradient = jax.jit(jax.value_and_grad(ours), static_argnums=1)
    value, found = gradient(params, first)
    exact_value, exact = gradient(params, PREFIX)
    assert float(abs(value - exact_value)) < 1e-13
    assert relative_error(found, jax.jit(jax.grad(by_hand))(params)) < 1e-10
    assert relative_error(found, exact) > 1e-2


def test_without_steps_the_body_gets_the_ordinary_gradient(world):
    params, table, states, labels, weights = world
    still = {**params, "steps": jax.tree.map(jnp.zeros_like, params["steps"])}

    def fast(states):
        return fast_weights.loss(PREFIX, still, table, states, labels, weights)[0]

    def slow(states):
        out = fast_weights.slow_features(PREFIX, params, states)
        each = fast_weights.token_losses(out, table, labels)
        return (each * weights).sum() / weights.sum()

    found, expected = (jax.jit(jax.grad(each))(states) for each in (fast, slow))
    assert relative_error(found, expected) < 1e-12


def test_no_one_hot_and_few_arrays_of_the_size_of_the_scores(world):
    """Evaluation holds [tokens, vocab] a few at a time with ``scored``, and never as booleans."""
    params, table, states, labels, weights = world
    config, vocab = FastWeights(scored=6), 997
    table = jnp.ones((vocab, SIZE))
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
