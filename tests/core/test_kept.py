"""Which products a policy keeps: long ones, and of attention those that contract over time."""

import jax
import jax.numpy as jnp
import pytest

import jmeta
from jmeta.core.kept import linearised


def attention_loss(inputs):
    queries, keys, values = inputs
    scores = jnp.einsum("hqd,hkd->hqk", queries, keys)
    mixed = jnp.einsum("hqk,hkd->hqd", jax.nn.softmax(scores), values)
    return jnp.sum(jnp.sin(mixed))


def products(policy, heads=2, time=16, columns=4):
    """The products in the linearisation of attention's gradient, by the length they contract."""
    shape = jax.ShapeDtypeStruct((heads, time, columns), jnp.float64)
    inputs = (shape, shape, shape)

    def gradient(point):
        return jax.grad(attention_loss)(point), {}

    def tangents(inputs, directions):
        return linearised(gradient, inputs, policy)[1](directions)

    # The first pass computes each product once, whatever is kept; the rest are repetitions.
    program = str(jax.make_jaxpr(tangents)(inputs, inputs))
    return program.count("dot_general")


def test_attention_keeps_what_contracts_over_time_and_not_the_scores_of_all_pairs():
    nothing = products(lambda *_, **__: False)
    everything = products(lambda primitive, *_, **__: primitive.name == "dot_general")
    kept = products(jmeta.keep_products())
    assert kept == everything + 2, (nothing, kept, everything)
    assert nothing > kept
    # Where columns outnumber the tokens the scores are the small side.
    assert products(jmeta.keep_products(), time=4, columns=32) == everything


@pytest.mark.parametrize(("at_least", "same_as"), [(16, 1), (17, None)])
def test_a_product_with_a_batch_axis_is_kept_for_its_length_too(at_least, same_as):
    found = products(jmeta.keep_products(at_least))
    if same_as:
        assert found == products(jmeta.keep_products(same_as))
    else:
        assert found == products(lambda *_, **__: False)


def test_a_policy_that_keeps_products_of_no_entries_is_refused():
    with pytest.raises(ValueError, match="at least one entry"):
        jmeta.keep_products(0)
