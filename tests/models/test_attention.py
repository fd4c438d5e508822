"""Heads that mix as in NumPy; those of few tokens and columns by sums, the others by products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.models import attention
from jmeta.models.transformer import TransformerConfig
from jmeta.testing import equations, relative_error

TINY, LARGER = (4, 4), (5, 8)  # tokens and columns of a head: 64 and 200 multiply-adds


def given(time, per_head):
    """Queries, keys and values of two heads for three sequences, a kernel, and who sees whom."""
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=(3, 2, time, per_head))) for _ in range(3)]
    kernel = jnp.asarray(rng.normal(size=(2 * per_head, 2 * per_head)))
    mask = jnp.ones((3, time)).at[1, 2].set(0)
    config = TransformerConfig(vocab=5, width=2 * per_head, layers=1, heads=2, max_len=time)

    def mix(q, k, v):
        return attention.mix(config, {"out": kernel}, q, k, v, attention.visible(True, mask, time))

    return mix, heads, kernel, mask


@pytest.mark.parametrize("size", [TINY, LARGER])
def test_heads_mix_as_in_numpy(x64, size):
    mix, heads, kernel, mask = given(*size)
    q, k, v = map(np.asarray, heads)
    allowed = np.tril(np.ones((size[0], size[0])))[None, None] * np.asarray(mask)[:, None, None]
    weights = np.exp(np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(size[1])) * allowed
    mixed = np.einsum("bhqk,bhkd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    expected = mixed.reshape(3, size[0], -1) @ np.asarray(kernel)
    np.testing.assert_allclose(mix(*heads), expected, rtol=1e-10)


def test_sums_have_the_derivatives_of_products(x64, monkeypatch):
    mix, heads, _, _ = given(*TINY)

    def twice(*heads):
        grad = jax.grad(lambda h: jnp.sum(jnp.sin(mix(*h))))
        return jax.jvp(grad, (heads,), (jax.tree.map(jnp.cos, heads),))

    by_sums = twice(*heads)
    monkeypatch.setattr(attention, "_TINY", 0)
    assert relative_error(by_sums, twice(*heads)) < 1e-12


def test_tiny_heads_take_no_product_for_each():
    def products(size):
        mix, heads, _, _ = given(*size)
        found = [
            e for e in equations(jax.make_jaxpr(mix)(*heads)) if e.primitive.name == "dot_general"
        ]
        return len(found)

    assert products(TINY) == 1  # the layer after them
    assert products(LARGER) == 3


@pytest.mark.parametrize("size", [TINY, LARGER])
def test_half_precision_stays_half(size):
    mix, heads, _, _ = given(*size)
    half = [head.astype(jnp.bfloat16) for head in heads]
    assert mix(*half).dtype == jnp.bfloat16
    assert relative_error(mix(*half).astype(jnp.float32), mix(*heads)) < 0.05
