"""The transformer against a numpy forward, a naive loss, central differences and itself."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from jmeta.models import attention, primitives, transformer
from jmeta.models.dropout import dropout
from jmeta.testing import equations

hidden, logits, next_token_loss, init = (
    jax.jit(f, static_argnums=0)
    for f in (
        transformer.hidden,
        transformer.logits,
        transformer.next_token_loss,
        transformer.init,
    )
)

# Scanned, as it compiles faster; that the other loop is the same has a test of its own.
CONFIG = transformer.TransformerConfig(
    vocab=13, width=8, layers=2, heads=2, max_len=6, loop="scan"
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, mask):
    """States, scores and vectors from one program."""
    functions = (transformer.hidden, transformer.logits, transformer.pooled)
    return [f(config, params, tokens, mask) for f in functions]


def draw(config=CONFIG, batch=2, time=6):
    """Parameters well away from the initial values, where gradients are small, and tokens."""
    tokens = np.random.default_rng(1).integers(0, config.vocab, (batch, time))
    return random_params(transformer, config), jnp.asarray(tokens)


def close(a, b, tolerance=1e-10):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def numpy_hidden(config, params, tokens, mask=None):
    """The model from its definition, one head and one sequence at a time."""
    p = jax.tree.map(np.asarray, params)
    width, heads = config.width, config.heads
    per_head = width // heads

    def norm(x, w):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * w["scale"] + w["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    out = []
    for row, ids in enumerate(np.asarray(tokens)):
        x = p["embed"]["tokens"][ids] + p["embed"]["positions"][: len(ids)]
        for i in range(config.layers):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
            y = norm(x, block["ln1"]) @ block["attn"]["qkv"]
            mixed = np.zeros_like(x)
            for h in range(heads):
                cut = slice(h * per_head, (h + 1) * per_head)
                q, k, v = (y[:, j * width : (j + 1) * width][:, cut] for j in range(3))
                scores = q @ k.T / np.sqrt(per_head)
                for s, t in itertools.product(range(len(ids)), repeat=2):
                    future = config.causal and t > s
                    if future or (mask is not None and not mask[row][t]):
                        scores[s, t] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                mixed[:, cut] = weights / weights.sum(-1, keepdims=True) @ v
            x = x + mixed @ block["attn"]["out"]
            x = x + gelu(norm(x, block["ln2"]) @ block["mlp"]["up"]) @ block["mlp"]["down"]
        out.append(norm(x, p["ln_f"]))
    return np.stack(out)


@pytest.mark.parametrize("causal", [True, False])
def test_forward_equals_numpy(x64, causal):
    config = CONFIG._replace(causal=causal)
    params, tokens = draw(config, time=5)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = numpy_hidden(config, params, tokens, mask)
    actual, scores, vectors = map(np.asarray, forward(config, params, tokens, jnp.asarray(mask)))
    close(actual[0], expected[0])
    close(actual[1, :3], expected[1, :3])
    table = np.asarray(params["embed"]["tokens"])
    close(scores[0], expected[0] @ table.T)
    close(vectors, np.stack([expected[0].mean(0), expected[1, :3].mean(0)]))


@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention_is_the_same_function(causal):
    config = CONFIG._replace(causal=causal, layers=1, loop="unroll")
    params, tokens = draw(config, time=5)
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def loss(params, config):
        return (transformer.pooled(config, params, tokens, mask) ** 3).sum()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    close(grad(params, config), grad(params, config._replace(attention="fused")), 2e-4)


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_gelu_is_the_one_named(gelu):
    x = jnp.linspace(-4.0, 4.0, 33)
    exact = np.array([0.5 * v * (1 + math.erf(v / 2**0.5)) for v in np.asarray(x)])
    error = np.abs(np.asarray(primitives.gelu(x, gelu)) - exact).max()
    assert error < 1e-6 if gelu == "exact" else 1e-5 < error < 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(x64, causal):
    config = CONFIG._replace(causal=causal)
    if causal:  # the encoder is the case of a block above another's padding
        config = config._replace(layers=1, loop="unroll")
    params, tokens = draw(config, time=4)
    mask = jnp.ones((2, 4))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def both(params, tokens, mask):
        cubes = (transformer.pooled(config, params, tokens, mask) ** 3).sum()
        loss = transformer.next_token_loss(config, params, tokens, mask=mask)[0] if causal else 0.0
        return cubes + loss, (cubes, loss)

    padded, padded_mask = (
        jnp.asarray(np.pad(tokens, ((0, 0), (0, 2)), constant_values=7)),
        jnp.asarray(np.pad(mask, ((0, 0), (0, 2)))),
    )
    close(both(params, tokens, mask), both(params, padded, padded_mask))


def test_causal_positions_do_not_see_the_future_and_encoders_do(x64):
    params, tokens = draw()
    changed = np.array(tokens)
    changed[:, 4] = (changed[:, 4] + 1) % 13
    changed = jnp.asarray(changed)
    before, after = (np.asarray(hidden(CONFIG, params, t)) for t in (tokens, changed))
    assert (before[:, :4] == after[:, :4]).all()
    assert (np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-3).all()
    both = CONFIG._replace(causal=False)
    before, after = (np.asarray(hidden(both, params, t)) for t in (tokens, changed))
    assert (np.abs(before - after).max(-1) > 1e-5).all()


def test_loops_and_remats_agree(x64):
    """Values and gradients, dropout included; pairs that are not here, test_bert.py has."""
    config = CONFIG._replace(dropout=0.2, loop="unroll")
    params, tokens = draw(config)

    def loss(config, params):
        # No unembedding, which no loop is about, and bits that take less to compile.
        key = jax.random.key(5, impl="unsafe_rbg")
        return (transformer.hidden(config, params, tokens, key=key) ** 3).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    reference = run(config, params)
    pairs = (("scan", "dots"), ("scan", "hidden"), ("unroll", "full"))
    for loop, remat in pairs:
        close(reference, run(config._replace(loop=loop, remat=remat), params))


def test_loss_is_the_naive_formula(x64):
    params, tokens = draw()
    weights = jnp.asarray(np.random.default_rng(3).uniform(size=tokens.shape))

    def naive(params, weights):
        scores = jax.nn.log_softmax(transformer.logits(CONFIG, params, tokens)[:, :-1])
        picked = jnp.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0]
        return -(picked * weights[:, 1:]).sum() / weights[:, 1:].sum()

    def ours(params, weights):
        return transformer.next_token_loss(CONFIG, params, tokens, weights)[0]

    @jax.jit
    def run(weights):
        return [jax.value_and_grad(f, (0, 1))(params, weights) for f in (naive, ours)]

    both = run(weights)
    close(*both)
    close(np.asarray(both[1][1][1])[:, 0], np.zeros(2))  # the first token is nobody's target
    uniform = next_token_loss(CONFIG, params, tokens)
    close(uniform[0], run(jnp.ones(tokens.shape))[0][0])
    assert uniform[1]["tokens"] == 10
    value, (empty, _) = run(jnp.zeros(tokens.shape))[1]
    assert value == 0
    close(empty, jax.tree.map(np.zeros_like, params))


def test_leading_axes_are_batches(x64):
    params, tokens = draw(batch=4)

    @jax.jit
    def run(params, tokens):
        loss = transformer.next_token_loss(CONFIG, params, tokens)[0]
        return loss, transformer.logits(CONFIG, params, tokens)

    loss, scores = run(params, tokens)
    folded, shaped = run(params, jnp.asarray(np.reshape(tokens, (2, 2, 6))))
    close(folded, loss)
    close(shaped, np.reshape(scores, (2, 2, 6, 13)))
    close(run(params, jnp.asarray(np.asarray(tokens)[0]))[1], np.asarray(scores)[0])


def test_dropout_follows_the_key():
    config = CONFIG._replace(dropout=0.5)
    params, tokens = draw(config)

    def run(key):
        return np.asarray(hidden(config, params, tokens, key=key))

    plain = np.asarray(hidden(CONFIG, params, tokens))
    assert (run(None) == plain).all()
    assert (run(jax.random.key(1)) == run(jax.random.key(1))).all()
    assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 0.1
    # Inverted dropout: what is kept is scaled so that the mean stays.
    drop = jax.jit(dropout, static_argnums=1)
    dropped = np.asarray(drop(jnp.ones((200, 200)), 0.25, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    assert abs(dropped.mean() - 1) < 0.01


def test_bfloat16_is_close_and_keeps_float32_at_the_ends():
    params, tokens = draw()
    config = CONFIG._replace(dtype=jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def loss(params, config):
        return transformer.next_token_loss(config, params, tokens)[0]

    (low, grads), (high, exact) = loss(params, config), loss(params, CONFIG)
    assert low.dtype == jnp.float32
    assert abs(low - high) < 0.02 * high
    for function, dtype in ((hidden, jnp.bfloat16), (logits, jnp.float32)):
        made = jax.eval_shape(functools.partial(function, config), params, tokens)
        assert made.dtype == dtype
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("loop", "remat"), [pytest.param("unroll", "none", marks=pytest.mark.slow), ("scan", "dots")]
)
def test_hessian_vector_product_against_central_differences(x64, loop, remat):
    config = CONFIG._replace(layers=2, loop=loop, remat=remat)
    params, tokens = draw(config)
    v = jax.tree.map(lambda p: np.sin(np.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    grad = jax.grad(lambda p: transformer.next_token_loss(config, p, tokens)[0])

    def along(p):
        return sum(jax.tree.leaves(jax.tree.map(lambda g, u: (g * u).sum(), grad(p), v)))

    run = jax.jit(lambda p: (*jax.jvp(grad, (p,), (v,)), jax.grad(along)(p)))
    _, exact, reverse = run(params)
    h = 1e-5
    plus, minus = (
        run(jax.tree.map(lambda p, u, s=s: np.asarray(p) + s * h * u, params, v))[0]
        for s in (1, -1)
    )
    numeric = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / (2 * h), plus, minus)
    close(exact, numeric, 1e-6)
    close(exact, reverse)


def test_looping_never_scatters_into_the_stack():
    """The gradient of a looped stack is one concatenation per leaf: no scatter, no padding."""
    config = CONFIG._replace(loop="unroll", layers=3)
    params, tokens = draw(config)
    loss = lambda p: next_token_loss(config, p, tokens)[0]  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    stacks = {leaf.shape for leaf in jax.tree.leaves(params["blocks"])}
    made = {}
    for equation in equations(jaxpr):
        for out in equation.outvars:
            if out.aval.shape in stacks:
                made.setdefault(equation.primitive.name, 0)
                made[equation.primitive.name] += 1
    leaves = len(jax.tree.leaves(params["blocks"]))
    assert made.get("concatenate") == leaves, made
    assert not {"scatter-add", "scatter", "pad", "dynamic_update_slice", "add_any"} & set(made), (
        made
    )
    # Inputs and targets share one gather of the embedding, so their gradients share one scatter.
    names = [equation.primitive.name for equation in equations(jaxpr)]
    assert names.count("scatter-add") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"remat": "some"}, "remat='some'"),
        ({"loop": "map"}, "loop='map'"),
        ({"attention": "flash"}, "attention='flash'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_meaningless_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        init(CONFIG._replace(**change), jax.random.key(0))


def test_wrong_arguments_are_refused():
    params, tokens = draw()
    with pytest.raises(ValueError, match="max_len=6"):
        hidden(CONFIG, params, np.tile(tokens, (1, 2)))
    with pytest.raises(ValueError, match="causal=True"):
        next_token_loss(CONFIG._replace(causal=False), params, tokens)
    with pytest.raises(ValueError, match="weights have shape"):
        next_token_loss(CONFIG, params, tokens, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="mask has shape"):
        hidden(CONFIG, params, tokens, jnp.ones((2, 5)))


@pytest.mark.parametrize(
    ("capability", "dtype", "time", "per_head", "kernel"),
    [
        ("9.0", "bfloat16", 8, 64, "cudnn"),
        ("8.0", "float16", 8, 128, "cudnn"),
        ("10.0", "bfloat16", 8, 64, "cudnn"),
        ("7.5", "float16", 8, 64, "xla"),  # before flash attention
        ("gfx942", "bfloat16", 8, 64, "xla"),  # not NVIDIA's
        ("", "bfloat16", 8, 64, "xla"),  # no GPU
        ("9.0", "float32", 8, 64, "xla"),
        ("9.0", "bfloat16", 7, 64, "xla"),
        ("9.0", "bfloat16", 8, 20, "xla"),
        ("9.0", "bfloat16", 8, 256, "xla"),
    ],
)
def test_flash_attention_is_asked_for_where_it_exists(capability, dtype, time, per_head, kernel):
    q = jax.ShapeDtypeStruct((2, time, 2, per_head), dtype)
    assert attention.fused_kernel(capability, q, q) == kernel
