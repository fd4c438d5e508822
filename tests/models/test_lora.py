"""Low-rank factors and partial training: the same mathematics, no gradient of what is frozen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import quick_jit, random_params

import jmeta
from jmeta.methods.anil import learned_body
from jmeta.methods.maml import learned_start
from jmeta.models import bert, gpt2, lora, partial, peft, tensorfile, transformer
from jmeta.testing import equations

# Sizes that no other array has, so that a shape tells whose gradient it is.
BERT = bert.BertConfig(
    vocab=31, width=12, layers=3, heads=2, max_len=7, ff=26, loop="scan", head="classify", labels=3
)
KERNELS = {(12, 12), (12, 26), (26, 12), (31, 12), (7, 12)}
BATCH = {
    "tokens": jnp.arange(10).reshape(2, 5) % 31,
    "mask": jnp.array([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "y": jnp.array([0, 2]),
}


apply = quick_jit(bert.apply, static_argnums=0)


def draw(config=BERT):
    return random_params(bert if isinstance(config, bert.BertConfig) else gpt2, config, 0.2)


def factors(params, rank=3, targets=()):
    shapes = jax.eval_shape(lambda: lora.init(params, jax.random.key(5), rank, targets))
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def loss(params, batch, key):
    return bert.loss(BERT, params, batch, key)


def close(a, b, tolerance=1e-10):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def products(function, *args):
    """Shapes, without axes of length one, of all that matmuls and scatters produce."""
    jaxpr = jax.make_jaxpr(function)(*args)
    return [
        tuple(n for n in out.aval.shape if n != 1)
        for equation in equations(jaxpr)
        if equation.primitive.name in ("dot_general", "scatter-add")
        for out in equation.outvars
    ]


def weight_gradients(function, *args):
    found = products(function, *args)
    return [shape for shape in found if shape in KERNELS or shape[::-1] in KERNELS]


def test_attached_equals_merged(x64):
    """Scores, and gradients by the factors of every layer."""
    params = draw()
    pair = factors(params, targets=("blocks.**",))
    assert jax.tree.structure(lora.merged(params, pair, 0.7)) == jax.tree.structure(params)

    def run(put):
        def scored(factors):
            value = lambda f: loss(put(params, f, 0.7), BATCH, None)[0]  # noqa: E731
            scores = bert.apply(BERT, put(params, factors, 0.7), BATCH)
            return jax.value_and_grad(value)(factors), scores

        return quick_jit(scored)(pair)

    close(run(lora.attach), run(lora.merged))


def test_fresh_factors_change_nothing_and_decoders_have_them_too(x64):
    params = draw()
    fresh = quick_jit(lora.init, static_argnums=2)(params, jax.random.key(0), 4)
    close(
        apply(BERT, params, BATCH),
        apply(BERT, lora.attach(params, fresh, 2.0), BATCH),
    )
    assert set(fresh["blocks"]["attn"]) == {"query", "value"}
    a = np.asarray(fresh["blocks"]["attn"]["query"]["a"])
    assert np.abs(a).max() <= 12**-0.5
    assert np.abs(a).max() > 0.9 * 12**-0.5
    config = transformer.TransformerConfig(
        vocab=13, width=8, layers=2, heads=2, max_len=6, loop="scan"
    )
    plain = random_params(transformer, config)
    pair = factors(plain, targets=("blocks.attn.*", "blocks.mlp.up"))
    assert set(pair["blocks"]["attn"]) == {"qkv", "out"}
    tokens = jnp.arange(6)[None]
    logits = quick_jit(transformer.logits, static_argnums=0)
    close(
        logits(config, lora.attach(plain, pair, 0.5), tokens),
        logits(config, lora.merged(plain, pair, 0.5), tokens),
    )


@pytest.mark.parametrize("loop", ["scan", pytest.param("unroll", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["lora", "norms and biases", "head", "top"])
def test_no_gradient_has_the_shape_of_a_frozen_kernel(loop, what):
    """First order, and exact second order through an inner loop."""
    config = BERT._replace(loop=loop)
    whole = lambda p, batch, key: bert.loss(config, p, batch, key)  # noqa: E731
    params = draw()
    if what == "lora":
        trained, rest = jmeta.partition(params, "head.out.**")
        tree, adapted = lora.trainable(whole, rest, factors(params), 0.5, trained)
    elif what == "norms and biases":
        tree, adapted = partial.trainable(whole, params, *partial.NORMS, *partial.BIASES)
    elif what == "head":
        tree, adapted = partial.trainable(whole, params, "head.out.**")
    else:
        tree, adapted = partial.trainable(whole, partial.split_top(params), "top.ln*.*")
    every = weight_gradients(jax.grad(lambda p: whole(p, BATCH, None)[0]), params)
    assert every  # so that the search would find some
    assert weight_gradients(jax.grad(lambda t: adapted(t, BATCH, None)[0]), tree) == []
    problem = learned_start(adapted, optax.sgd(0.1))
    mg = jmeta.mixed_mode(problem, steps=2)
    episode = jmeta.Episode(BATCH, BATCH)
    assert weight_gradients(lambda t: mg.estimate(t, (), episode, None)[0], tree) == []


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_the_last_block_is_trained_without_a_backward_pass_below_it(x64, loop):
    config = BERT._replace(loop=loop)
    whole = lambda p, batch, key: bert.loss(config, p, batch, key)  # noqa: E731
    params = draw(config)
    apart = partial.split_top(params)
    assert apart["top"]["ln1"]["scale"].shape == (1, 12)
    close(params, partial.join_top(apart), 0)
    tree, adapted = partial.trainable(whole, apart, *partial.TOP)
    part_loss = lambda t: adapted(t, BATCH, None)[0]  # noqa: E731
    whole_loss = lambda p: whole(p, BATCH, None)[0]  # noqa: E731
    # Traced once for the numbers and for the counts below.
    of_part, of_whole = (jax.jit(jax.value_and_grad(f)) for f in (part_loss, whole_loss))
    value, by_part = of_part(tree)
    same, by_whole = of_whole(params)
    close(value, same)
    close(by_part["top"], jax.tree.map(lambda leaf: np.asarray(leaf)[-1:], by_whole["blocks"]))
    # Forward two layers; forward and backward one: no other matmul.
    each = 6 + 2  # linear layers and attention of one block
    forward, both = products(part_loss, tree), products(of_part, tree)
    assert len(both) - len(forward) <= 2 * (each + 2)  # ... and the two layers of the head
    full = products(of_whole, params)
    bodies = 1 if loop == "scan" else config.layers
    assert len(full) - len(products(whole_loss, params)) >= 2 * each * bodies


@pytest.mark.slow
def test_what_is_frozen_costs_no_memory():
    """Temporary memory, as XLA plans it, of gradients and of meta-gradients step by step."""
    config = BERT._replace(width=64, ff=256, vocab=2000, layers=8)
    params = random_params(bert, config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    whole = lambda p, batch, key: bert.loss(config, p, batch, key)  # noqa: E731
    trained, rest = jmeta.partition(params, "head.out.**")
    tree, adapted = lora.trainable(whole, rest, factors(params), 1.0, trained)

    def temp(function, argument):
        return quick_jit(function).lower(argument).compile().memory_analysis().temp_size_in_bytes

    def estimate(loss, steps):
        mg = jmeta.mixed_mode(learned_start(loss, optax.sgd(0.1)), steps=steps)
        return lambda meta: mg.estimate(meta, (), jmeta.Episode(BATCH, BATCH), None)[0]

    assert temp(jax.grad(lambda t: adapted(t, BATCH, None)[0]), tree) < 0.5 * size
    low = [temp(estimate(adapted, steps), tree) for steps in (2, 6)]
    assert temp(estimate(whole, 6), params) > 6 * size  # the weights that each step started from
    assert low[1] - low[0] < 4 * 0.1 * size
    assert low[1] < 1.2 * size  # at most what is frozen itself: no gradient, no trajectory of it


def test_exact_meta_gradient_of_factors_and_head(x64):
    """Against reverse over reverse of the merged model, a tree of all parameters."""
    params = draw()
    trained, rest = jmeta.partition(params, "head.out.**")
    pair = factors(params)
    tree, adapted = lora.trainable(loss, rest, pair, 0.5, trained)
    episode = jmeta.Episode(BATCH, {**BATCH, "y": jnp.array([1, 1])})
    mg = jmeta.mixed_mode(learned_start(adapted, optax.sgd(0.3)), steps=2)
    grads, _, info = quick_jit(lambda t: mg.estimate(t, (), episode, None))(tree)

    def by_hand(tree):
        def whole(tree, batch):
            merged = lora.merged(jmeta.merge(tree["rest"], rest), tree["lora"], 0.5)
            return loss(merged, batch, None)[0]

        def step(fast, _):
            inner = jax.grad(whole)(fast, episode.support)
            return jax.tree.map(lambda w, g: w - 0.3 * g, fast, inner), None

        fast, _ = jax.lax.scan(step, tree, length=2)
        return whole(fast, episode.query)

    value, expected = quick_jit(jax.value_and_grad(by_hand))(tree)
    close(info.loss, value)
    close(grads, expected)


def test_a_part_adapts_and_a_larger_part_is_learned(x64):
    """ANIL on top of a frozen body: fast weights are the head, meta is the norms too."""
    tree, adapted = partial.trainable(loss, draw(), *partial.NORMS, *partial.HEAD)
    problem = learned_body(adapted, optax.sgd(0.1), adapt="head.**")
    fast = problem.init(tree, None)
    assert {n.split(".")[0] for n in jmeta.core.tree.names(fast)} == {"head"}
    mg = jmeta.mixed_mode(problem, steps=1)
    grads, *_ = quick_jit(mg.estimate)(tree, (), jmeta.Episode(BATCH, BATCH), None)
    assert jax.tree.structure(grads) == jax.tree.structure(tree)
    assert np.abs(grads["blocks"]["ln1"]["scale"]).max() > 1e-6


def test_mistakes_are_named():
    params = draw()
    with pytest.raises(ValueError, match=r"matches \['blocks.attn.qkv'\]; there are"):
        lora.init(params, jax.random.key(0), 2, ("blocks.attn.qkv",))
    with pytest.raises(ValueError, match="rank=0"):
        lora.init(params, jax.random.key(0), 0)
    pair = {"a": jnp.zeros((8, 1)), "b": jnp.zeros((1, 8))}
    with pytest.raises(ValueError, match=r"'blocks.attn.qkv', which the model does not have"):
        lora.attach(params, {"blocks": {"attn": {"qkv": pair}}}, 1.0)
    with pytest.raises(ValueError, match=r"'blocks.ln1', which is no linear layer"):
        lora.attach(params, {"blocks": {"ln1": pair}}, 1.0)
    with pytest.raises(
        ValueError, match=r"'blocks.ln3.\*' matches no leaf; the closest.*'blocks.ln"
    ):
        partial.trainable(loss, params, "blocks.ln3.*")
    with pytest.raises(ValueError, match="nothing is trained"):
        partial.trainable(loss, params)
    with pytest.raises(ValueError, match="last=3 of 3"):
        partial.split_top(params, 3)
    with pytest.raises(ValueError, match="apart already"):
        partial.split_top(partial.split_top(params))


GPT2 = gpt2.GPT2Config(
    vocab=13, width=8, layers=2, heads=2, max_len=6, ff=10, head="classify", labels=3
)


@pytest.mark.parametrize("config", [BERT, BERT._replace(head=None), GPT2], ids=["b", "body", "g"])
def test_adapters_come_back_as_they_were(tmp_path, config):
    params = draw(config)
    pair = factors(params, targets=("blocks.attn.*", "blocks.mlp.up"))
    head = None if config.head is None else {"out": params["head"]["out"]}
    again = peft.read(peft.write(tmp_path, config, pair, 0.25, head=head), config)
    close(again.factors, pair, 0)
    close(again.head, head or {}, 0)
    assert again.scale == 0.25
    stored = tensorfile.contents([tmp_path / "adapter_model.safetensors"])
    name = next(iter(n for n in stored if "layer.0" in n or ".h.0." in n))
    assert name.startswith("base_model.model.")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == 0.25 * 3
    assert settings["fan_in_fan_out"] == (config is GPT2)


def test_a_suffix_that_names_two_layers_becomes_a_pattern(tmp_path):
    import re

    pair = factors(draw(), targets=("blocks.mlp.down",))
    pattern = peft.read(peft.write(tmp_path, BERT, pair, 1.0), BERT).settings["target_modules"]
    assert re.fullmatch(pattern, "bert.encoder.layer.11.output.dense")
    assert not re.fullmatch(pattern, "bert.encoder.layer.11.attention.output.dense")


def test_a_trained_pooler_is_not_left_out_unsaid(tmp_path):
    params = draw()
    with pytest.raises(ValueError, match=r"head.dense.bias, head.dense.kernel with the head of"):
        peft.write(tmp_path, BERT, factors(params), 1.0, head=params["head"])
    assert not list(tmp_path.iterdir())


def test_wrong_adapters_are_refused(tmp_path):
    pair = factors(draw())
    folder = peft.write(tmp_path, BERT, pair, 1.0)
    with pytest.raises(ValueError, match=r"query.lora_A.weight' has shape .3, 12.*3, 16"):
        peft.read(folder, BERT._replace(width=16))
    with pytest.raises(ValueError, match=r"no tensor 'encoder.layer.3.attention"):
        peft.read(folder, BERT._replace(layers=4))
    with pytest.raises(ValueError, match=r"layer.2.*belongs to no layer of this bert with 2 l"):
        peft.read(folder, BERT._replace(layers=2))
    file = folder / "adapter_config.json"
    good = json.loads(file.read_text())
    for change, words in (
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"query": 4}}, "rank_pattern"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the model's own"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": None}, "lora_alpha=None"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=words):
            peft.read(folder, BERT)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is truncated or no JSON"):
        peft.read(folder, BERT)
    file.write_text(json.dumps(good | {"use_rslora": True}))
    np.testing.assert_allclose(peft.read(folder, BERT).scale, 3 / 3**0.5)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is not opened"):
        peft.read(folder, BERT)
