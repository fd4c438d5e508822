"""Fast weights behind real decoders: training, and generation at constant memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.methods import fast_weights
from jmeta.methods.fast_weights import FastWeights, init, next_tokens
from jmeta.methods.fast_weights_stream import decoder, generate, init_state
from jmeta.models import decoding, gpt2, transformer

CONFIG = FastWeights(chunk=4)
begun, of_gpt2 = (jax.jit(each.init, static_argnums=0) for each in (transformer, gpt2))


KINDS = ["transformer", "gpt2"]


def made(kind):
    """A body, its block with steps that matter, and its states of whole documents."""
    shape = {"vocab": 13, "width": 8, "layers": 2, "heads": 2, "max_len": 40}
    key = jax.random.key(0)
    if kind == "gpt2":
        config = gpt2.GPT2Config(**shape)
        body = of_gpt2(config, key)
        states = lambda body, tokens: gpt2.hidden(config, body, {"tokens": tokens})  # noqa: E731
    else:
        config = transformer.TransformerConfig(**shape)
        body = begun(config, key)
        states = functools.partial(transformer.hidden, config)
    body["embed"] = jax.tree.map(lambda x: jnp.asarray(20 * np.asarray(x)), body["embed"])
    return config, body, block(key), states


@jax.jit
def block(key):
    return init(8, 8, key, step_size=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_that_of_whole_documents(kind):
    config, body, learner, states = made(kind)
    table, prompt = body["embed"]["tokens"], jnp.array([[1, 2, 3], [4, 5, 6]])
    one = decoder(CONFIG, learner, table, functools.partial(_token, config, body))
    carry = decoding.init_cache(config, body, 2), init_state(learner, 2)
    written, carry = jax.jit(lambda carry: generate(one, carry, prompt, 20))(carry)
    tokens = jnp.concatenate([prompt, written], 1)
    labels, weights = next_tokens(tokens)

    @jax.jit
    def whole(tokens):
        seen = states(body, tokens)
        out = fast_weights.features(CONFIG, learner, table, seen, labels, weights)
        return (out @ table.T).argmax(-1)

    likely = whole(tokens)
    np.testing.assert_array_equal(likely[:, 2:-1], written)
    # From what is carried it goes on as if it had never stopped.
    again = jax.jit(lambda carry, prompt, count: generate(one, carry, prompt, count),
                    static_argnums=2)  # fmt: skip
    first, carry = again((decoding.init_cache(config, body, 2), init_state(learner, 2)), prompt, 8)
    rest, _ = again(carry, first[:, -1:], 12)
    np.testing.assert_array_equal(jnp.concatenate([first, rest], 1), written)


def _token(config, body, cache, tokens):
    states, cache = decoding.extend(config, body, cache, tokens[:, None])
    return states[:, 0], cache


def test_a_text_longer_than_the_cache_ends_in_no_token():
    shape = {"vocab": 13, "width": 8, "layers": 1, "heads": 2, "max_len": 6}
    config = transformer.TransformerConfig(**shape)
    body, learner = begun(config, jax.random.key(0)), block(jax.random.key(1))
    one = decoder(CONFIG, learner, body["embed"]["tokens"], functools.partial(_token, config, body))
    carry = decoding.init_cache(config, body, 1), init_state(learner, 1)
    prompt = np.array([[1, 2]], np.int32)
    written = np.asarray(jax.jit(lambda carry: generate(one, carry, prompt, 8)[0])(carry))
    assert (written[0, :5] >= 0).all()
    assert (written[0, 5:] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_what_is_written(kind):
    config, body, learner, _ = made(kind)
    one = decoder(CONFIG, learner, body["embed"]["tokens"], functools.partial(_token, config, body))
    carry = decoding.init_cache(config, body, 1), init_state(learner, 1)

    def temporaries(count):
        run = jax.jit(lambda carry, prompt: generate(one, carry, prompt, count)[0])
        compiled = run.lower(carry, jnp.ones((1, 3), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(400) - temporaries(100) <= 4 * 300 * 2  # the tokens, and no more


def test_draws_follow_the_scores():
    scores = jnp.log(jnp.array([0.1, 0.6, 0.3]))

    def one(carry, tokens):
        return jnp.broadcast_to(scores, (tokens.shape[0], 3)), carry

    prompt = jnp.zeros((1, 1), jnp.int32)
    run = jax.jit(lambda key, heat: generate(one, (), prompt, 20_000, key, heat)[0])
    for heat in (1.0, 0.5):
        share = np.bincount(run(jax.random.key(0), heat)[0], minlength=3) / 20_000
        expected = np.exp(np.asarray(scores) / heat)
        expected /= expected.sum()
        assert (np.abs(share - expected) < 4 * np.sqrt(expected / 20_000)).all()
    with pytest.raises(ValueError, match="at least one"):
        generate(one, (), jnp.zeros((1, 0), jnp.int32), 3)


@pytest.mark.slow
def test_exact_training_learns_to_use_what_it_has_read():
    """Documents over a random alphabet of their own: only fast weights can know it."""
    key = jax.random.key(1)
    size, vocab = 8, 16
    params = {"block": init(4, size, key, 0.1), "table": jax.random.normal(key, (vocab, size))}
    config = FastWeights(chunk=8, reference=8.0)

    def batch(key):
        alphabet = jax.vmap(lambda k: jax.random.permutation(k, vocab)[:2])(
            jax.random.split(key, 16)
        )
        which = jax.random.randint(key, (16, 24), 0, 2)
        return jnp.take_along_axis(alphabet, which, 1)

    def loss(params, tokens):
        labels, weights = next_tokens(tokens)
        states = jnp.ones((*tokens.shape, 4))
        block, table = params["block"], params["table"]
        return fast_weights.loss(config, block, table, states, labels, weights)[0]

    @jax.jit
    def train(params, key):
        def step(params, key):
            value, grads = jax.value_and_grad(loss)(params, batch(key))
            return jax.tree.map(lambda p, g: p - 0.1 * jnp.clip(g, -1, 1), params, grads), value

        return jax.lax.scan(step, params, jax.random.split(key, 300))

    _, losses = train(params, jax.random.key(2))
    # A block that does not adapt cannot do better than log 16, which is 2.8.
    assert float(losses[-20:].mean()) < 1.8
