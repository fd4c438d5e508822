"""The Fisher information against closed forms and brute force, by taps and by whole gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import parameters, softmax

from jmeta import partition
from jmeta.core.tree import merge
from jmeta.methods.fisher import fisher, per_example, sampled, summed, tapped
from jmeta.models import bert, gpt2, taps, transformer
from jmeta.testing import equations

KEY = jax.random.key(0)


def whole(name, squares):
    return squares


def linear(fixed, kernel, x):
    return x @ kernel


def regression():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 3)), rng.normal(size=(3, 4))


def closed_form(x, kernel):
    p = softmax(x @ kernel)
    return (x * x).T @ (p * (1 - p)) / len(x)


def test_softmax_regression_has_a_closed_form(x64):
    x, kernel = regression()
    found = fisher(linear, (), kernel, x, KEY, labels=summed(), squares=per_example(whole))
    np.testing.assert_allclose(found, closed_form(x, kernel), rtol=1e-12)


def test_drawn_labels_agree_within_four_errors(x64):
    x, kernel = regression()
    squares = per_example(whole)
    once = jax.vmap(
        lambda key: fisher(linear, (), kernel, x, key, labels=sampled(2), squares=squares)
    )
    found = np.asarray(once(jax.random.split(KEY, 300)))
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(0) - closed_form(x, kernel)) < 4 * error)


@pytest.mark.parametrize("labels", [sampled(), summed()])
def test_batches_change_nothing_and_weights_leave_out(x64, labels):
    x, kernel = regression()
    given = functools.partial(
        fisher, linear, (), kernel, key=KEY, labels=labels, squares=per_example(whole)
    )
    expected = given(x[:7], batch_size=7)
    for size in (1, 3, 50):
        np.testing.assert_allclose(given(x[:7], batch_size=size), expected, rtol=1e-12)
    counts = np.asarray([1.0] * 7 + [0.0] * 5)
    np.testing.assert_allclose(given(x[:12], weights=counts, batch_size=5), expected, rtol=1e-12)


def test_several_labels_of_an_example_are_each_a_gradient(x64):
    """The Fisher information is over positions, each with the expectation over its own label."""
    rng = np.random.default_rng(1)
    tokens, kernel = rng.normal(size=(3, 4, 2)), rng.normal(size=(2, 3))

    def scores(fixed, kernel, x):  # every position sees the sum of those before it
        return jnp.cumsum(x, 1) @ kernel

    found = fisher(scores, (), kernel, tokens, KEY, labels=summed(), squares=per_example(whole))
    seen = np.cumsum(tokens, 1).reshape(-1, 2)
    np.testing.assert_allclose(found, closed_form(seen, kernel), rtol=1e-12)
    drawn = jax.vmap(
        lambda key: fisher(
            scores, (), kernel, tokens, key, labels=sampled(), squares=per_example(whole)
        )
    )(jax.random.split(KEY, 2000))
    error = np.asarray(drawn).std(0, ddof=1) / np.sqrt(2000)
    assert np.all(np.abs(np.asarray(drawn).mean(0) - found) < 4 * error)


def networks():
    sizes = {"vocab": 11, "width": 8, "layers": 2, "heads": 2, "max_len": 6}
    b = bert.BertConfig(**sizes, head="classify", labels=3, ff=12)
    g = gpt2.GPT2Config(**sizes, head="classify", labels=3, ff=12, loop="scan")
    t = transformer.TransformerConfig(**sizes, ff=12)
    tokens = lambda batch: (batch["tokens"], batch["mask"])  # noqa: E731
    return {
        "bert": (bert, b, functools.partial(bert.apply, b)),
        "bert, scanned": (
            bert,
            b,
            functools.partial(bert.apply, b._replace(loop="scan", remat="full")),
        ),
        "gpt2": (gpt2, g, functools.partial(gpt2.apply, g)),
        "transformer": (
            transformer,
            t,
            lambda p, batch: transformer.logits(t, p, *tokens(batch))[:, 0],
        ),
    }


@pytest.mark.parametrize(
    ("name", "time"),  # two positions: by Gram matrices; six: by one gradient at a time
    [
        pytest.param("bert", 2, marks=pytest.mark.slow),
        ("bert, scanned", 6),
        ("gpt2", 6),
        ("transformer", 2),
    ],
)
def test_taps_equal_whole_gradients(x64, name, time):
    model, config, apply = networks()[name]
    params = parameters(model, config)
    apply, rng = jax.jit(apply), np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 11, (5, time)), "mask": np.ones((5, time))}
    batch["mask"][1, 1:] = 0
    kernels, rest = partition(
        params, *(["blocks.attn.*", "blocks.mlp.*"] if name == "transformer"
                  else ["blocks.*.*.kernel"])
    )  # fmt: skip
    expected = fisher(
        lambda rest, kernels, b: apply(merge(rest, kernels), b), rest, kernels, batch, KEY,
        labels=summed(), squares=per_example(), batch_size=2,
    )  # fmt: skip
    made = taps.taps(params)
    found = fisher(
        lambda params, made, b: apply(taps.insert(params, made), b), params, made, batch, KEY,
        labels=summed(), squares=tapped, batch_size=2,
    )  # fmt: skip
    for part in ("attn", "mlp"):
        for layer, squares in found["blocks"][part].items():
            other = expected["blocks"][part][layer]
            other = other["kernel"] if isinstance(other, dict) else other
            assert squares.shape == (2, other.shape[-1])
            np.testing.assert_allclose(squares, other, rtol=1e-10, atol=1e-16)
    np.testing.assert_array_equal(apply(taps.insert(params, made), batch), apply(params, batch))


def test_rows_by_gram_matrix_by_gradient_and_of_one_position(x64):
    rng, row_squares = np.random.default_rng(0), jax.jit(taps.row_squares)
    for time, inputs, outputs in ((1, 5, 7), (2, 5, 7), (9, 5, 7)):
        x, dy = rng.normal(size=(4, time, inputs)), rng.normal(size=(4, time, outputs))
        expected = (np.einsum("bti,bto->bio", x, dy) ** 2).mean(1).sum(0)
        np.testing.assert_allclose(row_squares(x, dy), expected, rtol=1e-12)
    np.testing.assert_allclose(
        row_squares(x[:, 0], dy[:, 0]), row_squares(x[:, :1], dy[:, :1]), rtol=1e-12
    )
    half = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    assert row_squares(*half).dtype == jnp.float32


def test_no_weight_gradient_exists_and_memory_is_that_of_a_batch():
    config = bert.BertConfig(
        vocab=11, width=64, layers=2, heads=2, max_len=8, head="classify", ff=128
    )
    params = parameters(bert, config)
    made = taps.taps(params)

    def embed(params, made, inputs):
        scores = lambda p, m, b: bert.apply(config, taps.insert(p, m), b)  # noqa: E731
        return fisher(
            scores, params, made, inputs, KEY, labels=sampled(), squares=tapped, batch_size=4
        )

    def compiled(count):
        inputs = {"tokens": jnp.zeros((count, 8), jnp.int32)}
        return jax.jit(embed).lower(params, made, inputs).compile().memory_analysis()

    small, large = (compiled(count).temp_size_in_bytes for count in (8, 512))
    assert large - small < 16 * 512  # the examples' numbers, and nothing else

    inputs = {"tokens": jnp.zeros((8, 8), jnp.int32)}
    found = equations(jax.make_jaxpr(embed)(params, made, inputs))
    shapes = [e.outvars[0].aval.shape for e in found if e.primitive.name == "dot_general"]
    assert (4, 8, 8) in shapes  # Gram matrices
    kernels = {(64, 64), (64, 128), (128, 64)}
    assert not [shape for shape in shapes if shape[-2:] in kernels]


def test_what_cannot_be_is_refused():
    x, kernel = regression()
    options = {"labels": sampled(), "squares": per_example()}
    with pytest.raises(ValueError, match="scores are"):
        fisher(lambda f, w, x: (x @ w).sum(), (), kernel, x, KEY, **options)
    with pytest.raises(ValueError, match="weights have shape"):
        fisher(linear, (), kernel, x, KEY, weights=jnp.ones(3), **options)
    with pytest.raises(ValueError, match="no linear layer"):
        taps.taps({"w": jnp.ones((2, 2))}, "head.*")
    with pytest.raises(ValueError, match="draws"):
        sampled(0)
