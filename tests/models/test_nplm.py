"""The concatenation layer and Transformer-N against loops by hand, in float64."""

import jax
import numpy as np
import pytest
from random_params import random_like

from jmeta.models import attention, blocks, nplm, transformer
from jmeta.testing import central_differences, relative_error

pytestmark = pytest.mark.usefixtures("x64")

CONFIG = transformer.TransformerConfig(
    vocab=11, width=4, layers=2, heads=2, max_len=12, loop="scan"
)
CONTEXT = nplm.Context(last=3, window=4, averages=2, middle=6)


init_layer, hidden, next_token_loss, concatenation = (
    jax.jit(f, static_argnums=(0, 1))
    for f in (nplm.init_layer, nplm.hidden, nplm.next_token_loss, nplm.concatenation)
)
concatenated = jax.jit(nplm.concatenated, static_argnums=0)


def drawn(context=CONTEXT, width=4):
    shapes = jax.eval_shape(lambda: nplm.init_layer(context, width, jax.random.key(0)))
    return random_like(shapes, spread=1.0)


def params_of(config=CONFIG):
    return random_like(jax.eval_shape(lambda: nplm.init(config, CONTEXT, jax.random.key(0))))


def tokens_of(*shape):
    return np.random.default_rng(3).integers(0, 11, shape)


def changed_at(tokens, place):
    changed = tokens.copy()
    changed[:, place] = (changed[:, place] + 1) % 11
    return changed


def layer_norm(x, weights):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.eps)
    return scaled * weights["scale"] + weights["bias"]


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def by_loops(context, layer, x):
    """Position by position, token by token."""
    x, a = np.asarray(x), np.asarray(layer["average"])
    rows = np.zeros((*x.shape[:2], (context.last + context.averages) * x.shape[2]))
    at = lambda b, i: x[b, i] if i >= 0 else np.zeros(x.shape[2])  # noqa: E731
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            parts = [at(b, t - back) for back in range(context.last)]
            for kernel in a:
                parts.append(sum(w * at(b, t - context.last - j) for j, w in enumerate(kernel)))
            rows[b, t] = np.concatenate(parts)
    return rows


@pytest.mark.parametrize(
    "context", [CONTEXT, nplm.Context(1), nplm.Context(15, 2, 1), nplm.Context(2, 30, 3)]
)
def test_concatenation_is_the_loop(context):
    layer, x = drawn(context), np.random.default_rng(2).normal(size=(2, 10, 4))
    found, expected = concatenated(context, layer, x), by_loops(context, layer, x)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    up, down = np.asarray(layer["up"]), np.asarray(layer["down"])
    whole = concatenation(CONFIG, context, layer, x)
    np.testing.assert_allclose(whole, gelu(expected @ up) @ down, rtol=1e-10, atol=1e-10)


def test_a_new_average_is_the_moving_average():
    layer = init_layer(CONTEXT, 4, jax.random.key(0))
    x = np.random.default_rng(2).normal(size=(1, 12, 4))
    averages = np.asarray(concatenated(CONTEXT, layer, x))[0, :, 12:]
    for t in range(7, 12):  # far enough in for a full window
        window = x[0, t - 6 : t - 2]
        np.testing.assert_allclose(averages[t, :4], window.mean(0), rtol=1e-10)
    np.testing.assert_array_equal(averages[:, :4], averages[:, 4:])


def test_transformer_n_is_its_definition():
    params, tokens = params_of(), tokens_of(2, 9)
    arrays = jax.tree.map(np.asarray, params)
    first, embed = arrays["first"], arrays["embed"]
    x = embed["tokens"][tokens] + embed["positions"][None, :9]
    joined = by_loops(CONTEXT, first["concat"], layer_norm(x, first["ln1"]))
    x = x + gelu(joined @ first["concat"]["up"]) @ first["concat"]["down"]
    x = x + gelu(layer_norm(x, first["ln2"]) @ first["mlp"]["up"]) @ first["mlp"]["down"]
    last = jax.tree.map(lambda leaf: leaf[0], arrays["blocks"])
    run = jax.jit(
        lambda x: blocks.pre_norm(CONFIG, attention.visible(True, None, 9), x, last, None)
    )
    expected = layer_norm(np.asarray(run(x)), arrays["ln_f"])
    found = np.asarray(hidden(CONFIG, CONTEXT, params, tokens))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    weights = np.random.default_rng(4).uniform(size=tokens.shape)
    scores = (found @ embed["tokens"].T)[:, :-1]
    scores = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    picked = np.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0]
    naive = -(picked * weights[:, 1:]).sum() / weights[:, 1:].sum()
    loss, aux = next_token_loss(CONFIG, CONTEXT, params, tokens, weights)
    np.testing.assert_allclose(loss, naive, rtol=1e-10)
    np.testing.assert_allclose(aux["tokens"], weights[:, 1:].sum(), rtol=1e-10)
    one = CONFIG._replace(layers=1)
    assert hidden(one, CONTEXT, params_of(one), tokens).shape == (2, 9, 4)


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_nplm_is_its_definition_and_sees_no_further_than_its_context(loop):
    config = CONFIG._replace(layers=3, loop=loop)
    params, tokens = params_of(config), tokens_of(2, 12)
    plain = nplm.without_attention(params)
    # The first layer is Transformer-N's; above it, each position by itself.
    arrays = jax.tree.map(np.asarray, params)  # not of plain, which only leaves things out
    first, embed = arrays["first"], arrays["embed"]
    x = embed["tokens"][tokens] + embed["positions"][None, :12]
    joined = by_loops(CONTEXT, first["concat"], layer_norm(x, first["ln1"]))
    x = x + gelu(joined @ first["concat"]["up"]) @ first["concat"]["down"]
    for layer in (first, *(jax.tree.map(lambda l, i=i: l[i], arrays["blocks"]) for i in (0, 1))):
        x = x + gelu(layer_norm(x, layer["ln2"]) @ layer["mlp"]["up"]) @ layer["mlp"]["down"]
    before = np.asarray(hidden(config, CONTEXT, plain, tokens))
    np.testing.assert_allclose(before, layer_norm(x, arrays["ln_f"]), rtol=1e-10, atol=1e-10)
    # What is older than the last tokens and the window before them changes nothing.
    reach = CONTEXT.last + CONTEXT.window
    after = np.asarray(hidden(config, CONTEXT, plain, changed_at(tokens, 0)))
    np.testing.assert_array_equal(before[:, reach:], after[:, reach:])
    assert np.abs(before - after)[:, :reach].max() > 1e-8
    noisy = config._replace(dropout=0.3)
    one, two = (
        np.asarray(hidden(noisy, CONTEXT, plain, tokens, jax.random.key(k))) for k in (0, 1)
    )
    assert np.abs(one - two).max() > 1e-3


def test_gradients_are_central_differences():
    params, tokens = params_of(), tokens_of(2, 9)

    def loss(first):
        return nplm.next_token_loss(CONFIG, CONTEXT, {**params, "first": first}, tokens)[0]

    slope = jax.jit(jax.grad(loss))(params["first"])
    assert relative_error(slope, central_differences(loss, params["first"])) < 1e-6
    assert np.abs(slope["concat"]["average"]).max() > 0


def test_no_position_sees_the_future_and_padding_on_the_right_is_nothing():
    params, tokens = params_of(), tokens_of(2, 9)
    run = lambda t: np.asarray(hidden(CONFIG, CONTEXT, params, t))  # noqa: E731
    before, after = run(tokens), run(changed_at(tokens, 6))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[:, 6:].max(-1) > 1e-8).all()
    np.testing.assert_allclose(run(tokens[:, :7]), before[:, :7], rtol=1e-10, atol=1e-10)
    noisy = CONFIG._replace(dropout=0.3)
    one, two = (
        np.asarray(hidden(noisy, CONTEXT, params, tokens, jax.random.key(k))) for k in (0, 1)
    )
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (nplm.Context(0), "last=0"),
        (nplm.Context(2, 5, 0), "give both, or neither"),
        (nplm.Context(2, 0, 1), "give both, or neither"),
        (nplm.Context(2, -1, 1), "not negative"),
    ],
)
def test_a_context_without_a_meaning_is_refused(context, words):
    with pytest.raises(ValueError, match=words):
        nplm.init(CONFIG, context, jax.random.key(0))


def test_a_new_model_knows_nothing():
    new = jax.jit(nplm.init, static_argnums=(0, 1))(CONFIG, CONTEXT, jax.random.key(0))
    loss, _ = next_token_loss(CONFIG, CONTEXT, new, tokens_of(2, 9))
    np.testing.assert_allclose(loss, np.log(11), atol=0.05)
    assert all(np.ptp(leaf) > 0 for leaf in jax.tree.leaves(new["first"]["mlp"]))


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="causal=True"):
        nplm.hidden(CONFIG._replace(causal=False), CONTEXT, params_of(), tokens_of(1, 3))
