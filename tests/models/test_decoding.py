"""Reading token by token or in parts gives the states of whole sequences, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from jmeta.models import decoding, gpt2, transformer

pytestmark = pytest.mark.usefixtures("x64")


extend = jax.jit(decoding.extend, static_argnums=0)


def model(kind):
    shape = {"vocab": 13, "width": 8, "layers": 2, "heads": 2, "max_len": 10}
    if kind == "gpt2":
        config = gpt2.GPT2Config(**shape)
        return config, random_params(gpt2, config)
    config = transformer.TransformerConfig(**shape)
    return config, random_params(transformer, config)


def tokens_of(*shape):
    return np.random.default_rng(2).integers(0, 13, shape)


@functools.partial(jax.jit, static_argnums=0)
def whole(config, params, tokens):
    if isinstance(config, gpt2.GPT2Config):
        return gpt2.hidden(config, params, {"tokens": tokens})
    return transformer.hidden(config, params, tokens)


@pytest.mark.parametrize("kind", ["transformer", "gpt2"])
@pytest.mark.parametrize("parts", [[1] * 7, [3, 1, 3], [7]])
def test_parts_of_a_sequence_give_its_states(kind, parts):
    config, params = model(kind)
    tokens = tokens_of(3, 7)
    cache, outs, first = decoding.init_cache(config, params, 3, room=8), [], 0
    for part in parts:
        out, cache = extend(config, params, cache, tokens[:, first : first + part])
        outs, first = [*outs, out], first + part
    expected = whole(config, params, tokens)
    np.testing.assert_allclose(np.concatenate(outs, 1), expected, rtol=1e-10, atol=1e-12)
    assert int(cache.length) == 7


def test_gradients_through_the_cache_are_those_of_the_whole():
    config, params = model("gpt2")
    tokens = tokens_of(1, 6)

    def by_parts(params):
        cache, total = decoding.init_cache(config, params, 1), 0.0
        for first in (0, 3):
            out, cache = decoding.extend(config, params, cache, tokens[:, first : first + 3])
            total = total + jnp.sin(out).sum()
        return total

    found = jax.jit(jax.grad(by_parts))(params)
    expected = jax.jit(jax.grad(lambda p: jnp.sin(whole(config, p, tokens)).sum()))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_beyond_its_room_a_cache_gives_no_number():
    config, params = model("transformer")
    tokens = np.ones((1, 3), np.int32)
    first, cache = extend(config, params, decoding.init_cache(config, params, 1, room=5), tokens)
    assert np.isfinite(first).all()
    assert np.isfinite(extend(config, params, cache, tokens[:, :2])[0]).all()
    assert np.isnan(extend(config, params, cache, tokens)[0]).all()


def test_what_cannot_be_read_token_by_token_is_refused():
    config, params = model("transformer")
    with pytest.raises(ValueError, match="causal=True"):
        decoding.init_cache(config._replace(causal=False), params, 1)
    with pytest.raises(ValueError, match="10 positions"):
        decoding.init_cache(config, params, 1, room=11)
