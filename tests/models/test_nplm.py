"""The concatenation layer and Transformer-N against loops by hand, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.models import attention, blocks, nplm, primitives, transformer
from jmeta.testing import central_differences, relative_error

pytestmark = pytest.mark.usefixtures("x64")

CONFIG = transformer.TransformerConfig(
    vocab=11, width=4, layers=2, heads=2, max_len=12, loop="scan"
)
CONTEXT = nplm.Context(last=3, window=4, averages=2, middle=6)


def drawn(context=CONTEXT, width=4):
    layer = nplm.init_layer(context, width, jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), layer["average"].shape)
    return {**layer, "average": layer["average"] + noise}


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
    layer, x = drawn(context), jax.random.normal(jax.random.key(2), (2, 10, 4))
    found = nplm.concatenated(context, layer, x)
    np.testing.assert_allclose(found, by_loops(context, layer, x), rtol=1e-10, atol=1e-10)
    up, down = np.asarray(layer["up"]), np.asarray(layer["down"])
    z = by_loops(context, layer, x) @ up
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    whole = nplm.concatenation(CONFIG, context, layer, x)
    np.testing.assert_allclose(whole, gelu @ down, rtol=1e-10, atol=1e-10)


def test_a_new_average_is_the_moving_average():
    layer = nplm.init_layer(CONTEXT, 4, jax.random.key(0))
    x = jax.random.normal(jax.random.key(2), (1, 12, 4))
    averages = np.asarray(nplm.concatenated(CONTEXT, layer, x))[0, :, 12:]
    for t in range(7, 12):  # far enough in for a full window
        window = np.asarray(x[0, t - 6 : t - 2])
        np.testing.assert_allclose(averages[t, :4], window.mean(0), rtol=1e-10)
    np.testing.assert_array_equal(averages[:, :4], averages[:, 4:])


def test_transformer_n_is_its_definition():
    init = jax.jit(nplm.init, static_argnums=(0, 1))
    hidden = jax.jit(nplm.hidden, static_argnums=(0, 1))
    params = init(CONFIG, CONTEXT, jax.random.key(0))
    params["first"]["concat"] = drawn()
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 11)
    first = params["first"]
    x = params["embed"]["tokens"][tokens] + params["embed"]["positions"][None, :9]
    normal = primitives.layer_norm(x, first["ln1"], CONFIG.eps)
    joined = jnp.asarray(by_loops(CONTEXT, first["concat"], normal)) @ first["concat"]["up"]
    x = x + primitives.gelu(joined, "tanh") @ first["concat"]["down"]
    normal = primitives.layer_norm(x, first["ln2"], CONFIG.eps)
    x = x + primitives.gelu(normal @ first["mlp"]["up"], "tanh") @ first["mlp"]["down"]
    last = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x = blocks.pre_norm(CONFIG, attention.visible(True, None, 9), x, last, None)
    expected = primitives.layer_norm(x, params["ln_f"], CONFIG.eps)
    found = hidden(CONFIG, CONTEXT, params, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    weights = jax.random.uniform(jax.random.key(4), tokens.shape)
    scores = jax.nn.log_softmax(found @ params["embed"]["tokens"].T)[:, :-1]
    picked = jnp.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0]
    naive = -(picked * weights[:, 1:]).sum() / weights[:, 1:].sum()
    scored = jax.jit(nplm.next_token_loss, static_argnums=(0, 1))
    loss, aux = scored(CONFIG, CONTEXT, params, tokens, weights)
    np.testing.assert_allclose(loss, naive, rtol=1e-10)
    np.testing.assert_allclose(aux["tokens"], weights[:, 1:].sum(), rtol=1e-10)
    one = CONFIG._replace(layers=1)
    small = init(one, CONTEXT, jax.random.key(0))
    assert hidden(one, CONTEXT, small, tokens).shape == (2, 9, 4)


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_nplm_is_its_definition_and_sees_no_further_than_its_context(loop):
    config = CONFIG._replace(layers=3, loop=loop)
    params = nplm.init(config, CONTEXT, jax.random.key(0))
    params["first"]["concat"] = drawn()
    plain = nplm.without_attention(params)
    tokens = jax.random.randint(jax.random.key(3), (2, 12), 0, 11)
    run = jax.jit(lambda t: nplm.hidden(config, CONTEXT, plain, t))
    # The first layer is Transformer-N's; above it, each position by itself.
    first = params["first"]
    x = params["embed"]["tokens"][tokens] + params["embed"]["positions"][None, :12]
    normal = primitives.layer_norm(x, first["ln1"], config.eps)
    x = x + nplm.concatenation(config, CONTEXT, first["concat"], normal)
    for layer in (first, *(jax.tree.map(lambda l, i=i: l[i], plain["blocks"]) for i in (0, 1))):
        normal = primitives.layer_norm(x, layer["ln2"], config.eps)
        x = x + primitives.gelu(normal @ layer["mlp"]["up"], "tanh") @ layer["mlp"]["down"]
    expected = primitives.layer_norm(x, params["ln_f"], config.eps)
    np.testing.assert_allclose(run(tokens), expected, rtol=1e-10, atol=1e-10)
    # What is older than the last tokens and the window before them changes nothing.
    reach = CONTEXT.last + CONTEXT.window
    changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % 11)
    before, after = run(tokens), run(changed)
    np.testing.assert_array_equal(before[:, reach:], after[:, reach:])
    assert np.abs(before - after)[:, :reach].max() > 1e-8
    noisy = config._replace(dropout=0.3)
    one, two = (nplm.hidden(noisy, CONTEXT, plain, tokens, jax.random.key(k)) for k in (0, 1))
    assert np.abs(one - two).max() > 1e-3


def test_gradients_are_central_differences():
    params = nplm.init(CONFIG, CONTEXT, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 11)
    loss = jax.jit(
        lambda p: nplm.next_token_loss(CONFIG, CONTEXT, {**params, "first": p}, tokens)[0]
    )
    slope = jax.grad(loss)(params["first"])
    assert relative_error(slope, central_differences(loss, params["first"])) < 1e-6
    assert float(jnp.abs(slope["concat"]["average"]).max()) > 0


def test_no_position_sees_the_future_and_padding_on_the_right_is_nothing():
    params = nplm.init(CONFIG, CONTEXT, jax.random.key(0))
    params["first"]["concat"] = drawn()
    tokens = jax.random.randint(jax.random.key(3), (1, 10), 0, 11)
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % 11)
    run = jax.jit(lambda t: nplm.hidden(CONFIG, CONTEXT, params, t))
    before, after = run(tokens), run(changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[:, 6:].max(-1) > 1e-8).all()
    np.testing.assert_allclose(run(tokens[:, :7]), before[:, :7], rtol=1e-10, atol=1e-10)
    noisy = CONFIG._replace(dropout=0.3)
    one, two = (nplm.hidden(noisy, CONTEXT, params, tokens, jax.random.key(k)) for k in (0, 1))
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


def test_an_encoder_is_refused():
    params = nplm.init(CONFIG, CONTEXT, jax.random.key(0))
    with pytest.raises(ValueError, match="causal=True"):
        nplm.hidden(CONFIG._replace(causal=False), CONTEXT, params, jnp.zeros((1, 3), int))
