"""GPT-2's own rules: padding on either side, the token that classifies, and the plain decoder.

That its numbers are those of transformers is the business of tests/parity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import log_softmax
from random_params import quick_jit, random_params

from jmeta.models import gpt2, heads, transformer

hidden, apply, loss = (quick_jit(f, static_argnums=0) for f in (gpt2.hidden, gpt2.apply, gpt2.loss))

CONFIG = gpt2.GPT2Config(
    vocab=13, width=8, layers=2, heads=2, max_len=6, ff=10, loop="scan", labels=3
)
BATCH = {
    "tokens": np.array([[3, 4, 5, 6], [7, 8, 9, 10]]),
    "mask": np.ones((2, 4), np.float32),
    "y": np.array([2, 0]),
    "start": np.array([1, 0]),
    "end": np.array([2, 3]),
}


def draw(config):
    return random_params(gpt2, config)


def batch(**changes):
    return jax.tree.map(jnp.asarray, {**BATCH, **changes})


def padded(left):
    side = (2, 0) if left else (0, 2)
    return batch(
        tokens=np.pad(BATCH["tokens"], ((0, 0), side), constant_values=11),
        mask=np.pad(BATCH["mask"], ((0, 0), side)),
        start=BATCH["start"] + 2 * left,
        end=BATCH["end"] + 2 * left,
    )


def close(a, b, tolerance=1e-10):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


@pytest.mark.parametrize("head", ["causal_lm", "classify", "spans"])
def test_padding_on_either_side_changes_neither_loss_nor_gradient(x64, head):
    config = CONFIG._replace(head=head)
    if head != "causal_lm":  # which has a block above another's padding
        config = config._replace(layers=1, loop="unroll")
    params = draw(config)
    run = quick_jit(jax.value_and_grad(lambda p, b: gpt2.loss(config, p, b)[0]))
    plain = run(params, batch())
    for left in (False, True):
        close(plain, run(params, padded(left)))


def test_the_last_real_token_classifies(x64):
    config = CONFIG._replace(head="classify")
    params = draw(config)
    kernel = np.asarray(params["head"]["out"]["kernel"])
    for left in (False, True):
        made = padded(left)
        states = np.asarray(hidden(config, params, made))
        last = 5 if left else 3
        close(apply(config, params, made), states[:, last] @ kernel)
    mask = jnp.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    states = jnp.arange(10.0).reshape(2, 5, 1)
    assert heads.last_token(states, mask)[:, 0].tolist() == [3.0, 5.0]
    assert heads.last_token(states, None)[:, 0].tolist() == [4.0, 9.0]


def test_positions_can_be_given(x64):
    params = draw(CONFIG)
    made = padded(left=True)
    given = hidden(CONFIG, params, {**made, "positions": gpt2.positions(made["mask"])})
    given = np.asarray(given)
    close(np.asarray(hidden(CONFIG, params, made))[:, 2:], given[:, 2:])
    plain = {**made, "positions": jnp.asarray(np.tile(np.arange(6), (2, 1)))}
    moved = np.asarray(hidden(CONFIG, params, plain))
    assert (np.abs(moved - given)[:, 2:].max(-1) > 1e-4).all()


def test_without_biases_it_is_the_plain_decoder(x64):
    config = CONFIG._replace(head="causal_lm")
    params = draw(config)
    plain = transformer.TransformerConfig(
        vocab=13, width=8, layers=2, heads=2, max_len=6, ff=10, loop="scan"
    )
    logits, next_token_loss = (
        quick_jit(f, static_argnums=0) for f in (transformer.logits, transformer.next_token_loss)
    )
    kernels = jax.tree.map(
        lambda leaf: leaf["kernel"],
        {name: params["blocks"][name] for name in ("attn", "mlp")},
        is_leaf=lambda leaf: "kernel" in leaf,
    )
    same = {**params, "blocks": {**params["blocks"], **kernels}}
    biased = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.zeros_like(leaf)
            if path[-1].key == "bias" and path[1].key in ("attn", "mlp")
            else leaf
        ),
        params,
    )
    tokens = jnp.asarray(BATCH["tokens"])
    close(
        apply(config, biased, {"tokens": tokens}),
        logits(plain, same, tokens),
    )
    close(
        loss(config, biased, {"tokens": tokens}),
        next_token_loss(plain, same, tokens),
    )


def test_loss_is_the_naive_formula(x64):
    config = CONFIG._replace(head="causal_lm")
    params = draw(config)
    labels = np.array([[1, 2, -100, 4], [1, 2, 3, -100]])
    weights = np.array([[9.0, 1, 9, 2], [9, 0, 4, 9]])
    scores = log_softmax(apply(config, params, batch()))
    value, aux = loss(config, params, batch(labels=labels, weights=weights))
    picked = -(scores[0, 0, 2] + 2 * scores[0, 2, 4] + 4 * scores[1, 1, 3])
    close(value, picked / 7)
    assert aux["tokens"] == 7


def test_dropout_and_remat(x64):
    """The same masks whatever the loop, and none without a key."""
    config = CONFIG._replace(dropout=0.2, attention_dropout=0.2)
    params = draw(config)
    key = jax.random.key(3, impl="unsafe_rbg")  # its bits take less to compile

    @functools.partial(quick_jit, static_argnums=0)
    def run(config, params, key):
        cubes = lambda p: (gpt2.hidden(config, p, batch(), key) ** 3).sum()  # noqa: E731
        return jax.value_and_grad(cubes)(params)

    reference = run(config, params, key)
    close(reference, run(config._replace(loop="unroll", remat="full"), params, key))
    silent = run(config, params, None)
    close(silent, run(config._replace(dropout=0.0, attention_dropout=0.0), params, None))
    assert abs(silent[0] - reference[0]) > 1e-4


def test_wrong_arguments_are_refused():
    params = draw(CONFIG)
    with pytest.raises(ValueError, match="max_len=6"):
        hidden(CONFIG, params, {"tokens": jnp.zeros((2, 7), int)})
    with pytest.raises(ValueError, match="head='masked_lm'"):
        gpt2.init(CONFIG._replace(head="masked_lm"), jax.random.key(0))
    with pytest.raises(ValueError, match="no head"):
        loss(CONFIG, params, batch())
