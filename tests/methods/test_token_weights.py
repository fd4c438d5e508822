"""CaMeLS against closed forms, central differences and a toy it must solve, in float64."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import differences, parameters, relative_error

import jmeta
from jmeta import Episode, Steps
from jmeta.models import transformer

camels = importlib.import_module("jmeta.methods.token_weights")  # its namesake is a function
pytestmark = pytest.mark.usefixtures("x64")

LM = transformer.TransformerConfig(vocab=11, width=8, layers=1, heads=2, max_len=8)
RATE = 0.3


def scores(params, batch, key):
    return transformer.logits(LM, params, batch["tokens"], batch["mask"], key)


@functools.partial(jax.jit, static_argnames="normalise")
def weigh(meta, batch, key, normalise=False):
    states = transformer.hidden(LM, meta["body"], batch["tokens"], batch["mask"], key)
    return camels.weight_head(meta["head"], states, batch["mask"], normalise=normalise)


hidden = jax.jit(transformer.hidden, static_argnums=0)


def first_meta(new=False):
    rng = np.random.default_rng(6)
    if new:
        head = jax.jit(lambda key: camels.init_weight_head(8, key, 6))(jax.random.key(5))
    else:
        head = {
            "up": {"kernel": rng.normal(size=(8, 6)) / 8**0.5, "bias": rng.normal(size=6)},
            "down": {"kernel": rng.normal(size=(6, 1)), "bias": rng.normal(size=1)},
        }
    return {"body": parameters(transformer, LM, spread=0.2, seed=4), "head": head}


@pytest.fixture
def base():
    return parameters(transformer, LM)


def text(*shape, seed=2, pads=2):
    tokens, mask = np.random.default_rng(seed).integers(0, 11, shape), np.ones(shape)
    mask[..., -1, shape[-1] - pads :] = 0
    return {"tokens": tokens, "mask": mask}


def query(seed=9):
    asked = text(2, 6, seed=seed)
    answers = np.zeros((2, 6))
    answers[:, 2:4] = 1
    return {"questions": {**asked, "answers": answers}, "locality": text(2, 6, seed=seed + 1)}


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def test_new_weights_are_a_third_of_log_two_and_pads_have_none():
    batch = text(2, 6)
    weights = weigh(first_meta(new=True), batch, None)
    assert abs(camels.FIRST_WEIGHT - np.log(2) / 3) < 1e-16
    np.testing.assert_allclose(weights, camels.FIRST_WEIGHT * batch["mask"], rtol=1e-14)
    normal = np.asarray(weigh(first_meta(), batch, None, normalise=True))
    np.testing.assert_allclose(normal.sum(1), batch["mask"].sum(1), rtol=1e-12)
    nothing = weigh(first_meta(), {**batch, "mask": 0 * batch["mask"]}, None, normalise=True)
    np.testing.assert_array_equal(nothing, np.zeros((2, 6)))


def test_head_is_its_formula_and_reads_no_later_token():
    meta, batch = first_meta(), text(2, 6, pads=0)
    head, states = meta["head"], np.asarray(hidden(LM, meta["body"], batch["tokens"]))
    z = states @ head["up"]["kernel"] + head["up"]["bias"]
    z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    z = (z @ head["down"]["kernel"] + head["down"]["bias"])[..., 0]
    before = np.asarray(weigh(meta, batch, None))
    np.testing.assert_allclose(before, np.log1p(np.exp(3 * z)) / 3, rtol=1e-10)
    tokens = np.copy(batch["tokens"])
    tokens[:, 4] = (tokens[:, 4] + 1) % 11
    after = np.asarray(weigh(meta, {**batch, "tokens": tokens}, None))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:] > 1e-8).all()


def test_weights_of_one_are_ordinary_fine_tuning(base):
    documents = text(3, 2, 6)
    problem = camels.token_weights(scores, camels.uniform, base, optax.sgd(RATE))
    expected = base

    @jax.jit
    def step(params, batch):
        loss = lambda p: transformer.next_token_loss(  # noqa: E731
            LM, p, batch["tokens"], mask=batch["mask"]
        )[0]
        return jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params))

    for i in range(3):
        expected = step(expected, at(documents, i))
    from jmeta.runtime.evaluate import adapt

    found = jax.jit(lambda batches: adapt(problem, (), Steps(batches), 3))(documents)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_slope_of_a_weight_is_minus_the_product_of_gradients(base):
    document = text(2, 6)
    problem = camels.token_weights(scores, weigh, base, optax.sgd(RATE))
    meta, episode = first_meta(), Episode(document, query())
    found = jax.jit(lambda m, e: camels.weight_slopes(problem, 1, m, e))(meta, episode)

    def each(params):
        return camels.token_losses(scores(params, document, None), document["tokens"])

    @jax.jit
    def by_hand(base):
        weights = weigh(meta, document, None)
        counted = camels.predicted(document["mask"]).astype(weights.dtype)
        count = counted.sum()
        slope = jax.grad(lambda p: (each(p) * weights * counted).sum() / count)(base)
        theta = jax.tree.map(lambda p, g: p - RATE * g, base, slope)
        outer = jax.grad(lambda p: problem.outer_loss(p, meta, episode.query, None)[0])(theta)
        # Of the gradient of each token's loss with that direction.
        product = jax.jvp(each, (base,), (outer,))[1]
        return -RATE / count * product * counted

    expected = by_hand(jax.tree.map(jnp.asarray, base))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
    assert np.abs(np.asarray(found)).max() > 1e-6


def test_meta_gradient_is_central_differences_and_modes_agree(base):
    documents, meta = text(2, 1, 6), first_meta()
    problem = camels.token_weights(scores, weigh, base, optax.sgd(RATE))
    episode = Episode(Steps(documents), query())
    estimate = lambda mg: jax.jit(lambda m: mg.estimate(m, (), episode, None))(meta)  # noqa: E731
    exact, _, info = estimate(jmeta.unrolled(problem, 2))
    mixed = estimate(jmeta.mixed_mode(problem, 2))[0]
    assert relative_error(mixed, exact) < 1e-10

    def by_hand(head):
        mine = {**meta, "head": head}

        def step(params, batch):
            weights = weigh(mine, batch, None)

            def loss(p):
                losses = camels.token_losses(scores(p, batch, None), batch["tokens"])
                real = batch["mask"][:, 1:]
                return (losses[:, 1:] * weights[:, 1:] * real).sum() / real.sum()

            return jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params)), None

        params, _ = jax.lax.scan(step, jax.tree.map(jnp.asarray, base), documents)
        asked, other = episode.query["questions"], episode.query["locality"]
        losses = camels.token_losses(scores(params, asked, None), asked["tokens"])
        chosen = asked["answers"] * asked["mask"]
        answers = (losses * chosen).sum() / chosen.sum()
        old, new = (jax.nn.log_softmax(scores(p, other, None)) for p in (base, params))
        moved = ((jnp.exp(old) * (old - new)).sum(-1) * other["mask"]).sum() / other["mask"].sum()
        return answers + 0.1 * moved

    value = jax.jit(by_hand)
    np.testing.assert_allclose(info.loss, value(meta["head"]), rtol=1e-10)
    assert relative_error(exact["head"], differences(value, meta["head"])) < 1e-6
    # First order takes the inner gradient as a constant, and the weights act through nothing else.
    first = estimate(jmeta.first_order(problem, 2))[0]
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(first))


def test_locality_is_zero_where_nothing_moved_and_never_below(base):
    meta, episode = first_meta(), Episode(text(2, 6), query())

    @jax.jit
    def read(base, rate):
        problem = camels.token_weights(scores, weigh, base, optax.sgd(rate), locality=1.0)
        return jmeta.first_order(problem, 1).estimate(meta, (), episode, None)[2].aux

    for rate in (0.0, 0.01, RATE):
        moved = float(read(base, rate)["divergence"])
        assert moved == 0 if rate == 0 else moved > 1e-8
    old = np.random.default_rng(0).normal(size=(2, 4, 7))
    new = np.roll(old, 1, axis=-1)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (old, new))
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]])
    expected = ((p * np.log(p / q)).sum(-1) * mask).sum() / mask.sum()
    found = jax.jit(camels.divergence)(old, new, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_model_that_goes_on_is_held_against_the_original(base):
    """Of a persistent model the divergence is that from the base, not from where it last stood."""
    meta, episode = first_meta(), Episode(text(2, 6), query())
    problem = camels.token_weights(scores, weigh, base, optax.sgd(RATE), locality=1.0)
    mg = jmeta.first_order(problem, 1, persistent=True)
    step = jax.jit(lambda state: mg.estimate(meta, state, episode, None)[1:])
    state, asked = mg.init(meta, None), episode.query["locality"]
    of = jax.jit(lambda params: jax.nn.log_softmax(scores(params, asked, None)))

    def divergence(start, end):
        old, new = np.asarray(of(start)), np.asarray(of(end))
        each = (np.exp(old) * (old - new)).sum(-1) * asked["mask"]
        return float(each.sum() / asked["mask"].sum())

    for _ in range(3):
        before = state.fast
        state, info = step(state)
    found = float(info.aux["divergence"])
    assert found == pytest.approx(divergence(base, state.fast), rel=1e-10)
    assert found > 2 * divergence(before, state.fast)


def test_padding_and_batch_mates_of_padding_change_nothing(base):
    meta, document, asked = first_meta(), text(2, 6), query()
    pad = lambda b: jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 2))), b)  # noqa: E731
    longer = Episode(pad(document), {name: pad(part) for name, part in asked.items()})
    mg = jmeta.mixed_mode(camels.token_weights(scores, weigh, base, optax.sgd(RATE)), 1)
    estimate = jax.jit(lambda m, e: mg.estimate(m, (), e, None))
    one, two = (estimate(meta, e) for e in (Episode(document, asked), longer))
    np.testing.assert_allclose(one[2].loss, two[2].loss, rtol=1e-10)
    assert relative_error(two[0]["head"], one[0]["head"]) < 1e-9


def test_tokens_that_answer_end_with_more_weight():
    """Documents of noise and facts: the fact's value is asked for, and it alone should weigh."""
    vocab, words = 12, jnp.arange(12)

    def bigram(params, batch, key):
        return params[batch["tokens"]]

    def of_word(meta, batch, key):
        return jax.nn.softplus(3 * meta[batch["tokens"]]) / 3

    rng = np.random.default_rng(0)
    problem = camels.token_weights(bigram, of_word, jnp.zeros((vocab, vocab)), optax.sgd(2.0))
    mg, meta = jmeta.mixed_mode(problem, 1), jnp.zeros(vocab)
    outer = optax.sgd(1.0)

    @jax.jit
    def step(meta, episode):
        slope = mg.estimate(meta, (), episode, None)[0]
        return optax.apply_updates(meta, outer.update(slope, outer.init(meta))[0])

    for _ in range(150):  # subjects 0..3, values 4..7, noise 8..11
        subject, value = rng.integers(0, 4), rng.integers(4, 8)
        noise = rng.integers(8, 12, 6)
        read = np.concatenate([noise[:3], [subject, value], noise[3:]])
        document = {"tokens": read[None], "mask": np.ones((1, 8))}
        asked = {
            "tokens": np.asarray([[subject, value]]), "mask": np.ones((1, 2)),
            "answers": np.asarray([[0, 1]]),
        }  # fmt: skip
        other = {"tokens": noise[None], "mask": np.ones((1, 6))}
        meta = step(meta, Episode(document, {"questions": asked, "locality": other}))
    weights = np.asarray(of_word(meta, {"tokens": words}, None))
    assert weights[4:8].min() > 2 * camels.FIRST_WEIGHT
    assert weights[8:].max() < camels.FIRST_WEIGHT
    assert weights[4:8].min() > 3 * weights[8:].max()


def test_what_has_no_meaning_is_refused(base):
    with pytest.raises(ValueError, match="locality=-1"):
        camels.token_weights(scores, weigh, base, optax.sgd(0.1), locality=-1)
    with pytest.raises(ValueError, match="mask has shape"):
        camels.weight_head(first_meta()["head"], jnp.zeros((2, 3, 8)), jnp.ones((2, 4)))
    from jmeta.methods import learned_start

    problem = learned_start(lambda p, b, k: (p["x"], {}), optax.sgd(0.1))
    with pytest.raises(ValueError, match="no weights"):
        camels.weight_slopes(problem, 1, {"x": jnp.ones(())}, Episode(text(2, 6), query()))
