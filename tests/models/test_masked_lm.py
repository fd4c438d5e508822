"""The student and its teacher: a numpy forward, soft inputs and labels, [PAD], chunks, scales."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import quick_jit, random_params

from jmeta.models import heads, losses, masked_lm, soft_tokens, teacher_lm
from jmeta.testing import relative_error

NAMES = ("tokens", "mask", "labels", "weights")
SHAPE = masked_lm.config(vocab=11, width=8, layers=1, heads=2, max_len=6, ff=12)


def batch(seed=0, pads=2):
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(1, 11, (2, 2, 6))
    tokens[:, 6 - pads :] = 0
    mask = (tokens != 0).astype(float)
    return {k: jnp.asarray(v) for k, v in zip(NAMES, (tokens, mask, labels, mask), strict=True)}


def params(kind=masked_lm.init):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: kind(SHAPE, key), jax.random.key(1))
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape) + 0.1), shapes)


def distributions():
    return jnp.asarray(np.random.default_rng(3).dirichlet(np.ones(11), (2, 6)))


def forms(found):
    """The same tokens as ids, as a distribution, and as a mixture with another of no weight."""
    one_hot = lambda ids: jnp.asarray(np.eye(11)[np.asarray(ids)])  # noqa: E731
    mixed = {
        "ids": jnp.stack([found["tokens"], jnp.full_like(found["tokens"], 4)], -1),
        "shares": jnp.asarray(np.broadcast_to([1.0, 0.0], (2, 6, 2))),
    }
    return (
        found,
        {**found, "tokens": one_hot(found["tokens"]), "labels": one_hot(found["labels"])},
        {**found, "tokens": mixed},
    )


def test_one_hot_inputs_and_labels_are_ids_and_pads_change_nothing(x64):
    other = batch()
    other["labels"] = jnp.where(other["mask"] == 0, 7, other["labels"])
    short = {name: leaf[:, :4] for name, leaf in batch().items()}
    found = [*forms(batch()), other, short]

    def value_and_rows(p, b):
        return masked_lm.loss(SHAPE, p, b)[0], soft_tokens.embed(p["embed"]["tokens"], b["tokens"])

    values, rows = zip(
        *quick_jit(lambda p: [value_and_rows(p, b) for b in found])(params()), strict=True
    )
    np.testing.assert_allclose(values, values[0], rtol=1e-13)
    for each in rows[1:4]:
        np.testing.assert_array_equal(each, rows[0])


def test_no_input_reaches_the_row_of_pad(x64):
    found = batch(pads=0)
    soft = distributions()
    table = params()["embed"]["tokens"]

    def value(table, tokens):
        return (jnp.sin(soft_tokens.embed(table, tokens)) ** 2).sum()

    for tokens in (found["tokens"].at[0, 0].set(0), soft):
        slope = np.asarray(quick_jit(jax.grad(value))(table, tokens))
        assert (slope[0] == 0).all()
        assert np.abs(slope[1:]).max() > 0


def test_chunks_of_the_vocabulary_change_no_derivative(x64):
    """Value, gradient and Hessian-vector product, in chunks that divide the vocabulary or not."""
    rng = np.random.default_rng(4)
    at = {"states": rng.standard_normal((2, 6, 8)), "table": rng.standard_normal((11, 8))}
    at |= {"bias": rng.standard_normal(11), "soft": np.asarray(distributions())}

    def value(p, chunk):
        rows, picked = p["soft"] @ p["table"], p["soft"] @ p["bias"]
        bias, weights = (p["bias"], picked), batch()["mask"]
        return heads.token_loss(p["states"], p["table"], rows, weights, bias, chunk)[0]

    @quick_jit
    def all_of(at):
        along = jax.tree.map(jnp.cos, at)
        slopes = [jax.value_and_grad(lambda p, c=c: value(p, c)) for c in (None, 4, 11)]
        return [jax.jvp(slope, (at,), (along,)) for slope in slopes]

    whole, *chunks = all_of(jax.tree.map(jnp.asarray, at))
    for each in chunks:
        assert relative_error(each, whole) < 1e-12
    with pytest.raises(ValueError, match="chunks of 0"):
        heads.chunked_logsumexp(jnp.ones((2, 3)), jnp.ones((4, 3)), None, 0)


def test_labels_among_classes_are_scored_by_the_softmax_over_them(x64):
    found, classes = jax.tree.map(np.array, batch()), np.array([2, 7, 5])
    places = found["labels"] % 3
    found |= {"labels": classes[places], "classes": classes}
    plain = {name: found[name] for name in NAMES}
    every = quick_jit(lambda p: masked_lm.logits(SHAPE, p, plain))(params())
    scores = np.asarray(every)[..., classes]
    picked = np.take_along_axis(scores, places[..., None], -1)[..., 0]
    each = np.log(np.exp(scores).sum(-1)) - picked
    expected = (each * found["mask"]).sum() / found["mask"].sum()

    @functools.partial(quick_jit, static_argnums=1)
    def loss(found, chunk):
        return masked_lm.loss(SHAPE, params(), found, chunk=chunk)[0]

    for chunk in (None, 2):
        np.testing.assert_allclose(loss(found, chunk), expected, rtol=1e-12)
    found["labels"][0, 0] = 3  # one that is no class
    assert np.isnan(loss(found, None))
    found["weights"][0, 0] = 0
    assert np.isfinite(loss(found, None))


def test_a_distribution_that_is_not_multiplied_out_is_the_same(x64):
    rng = np.random.default_rng(5)
    at = {"states": rng.standard_normal((2, 6, 8)), "table": rng.standard_normal((11, 8))}
    at |= {"bias": rng.standard_normal(11), "rows": rng.standard_normal((11, 3))}

    def value(p, lazy):
        factors = {name: p[name] for name in ("states", "table", "bias")}
        scores = p["states"].reshape(12, 8) @ p["table"].T + p["bias"][None]
        dense = jax.nn.softmax(scores, axis=-1).reshape(2, 6, 11)
        found = soft_tokens.embed(p["rows"], factors if lazy else dense, 4)
        return (jnp.sin(found) ** 2).sum()

    @quick_jit
    def both(at):
        return [jax.value_and_grad(lambda p, lazy=lazy: value(p, lazy))(at) for lazy in (0, 1)]

    dense, lazy = both(jax.tree.map(jnp.asarray, at))
    assert relative_error(lazy, dense) < 1e-12


def test_initial_scales_are_those_of_the_paper():
    shape = masked_lm.config(vocab=500, width=64, layers=2, heads=4, max_len=16)
    draw = jax.jit(
        lambda key: (masked_lm.init(shape, key), teacher_lm.init_scorer(shape, key, 0.2))
    )
    body, scorer = draw(jax.random.key(0))
    assert (body["embed"]["tokens"][0] == 0).all()
    np.testing.assert_allclose(body["embed"]["tokens"].std(), 0.02, rtol=0.03)
    joint = body["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(jnp.abs(joint).max(), (6 / 256) ** 0.5, rtol=1e-3)
    np.testing.assert_allclose(joint.std(), (6 / 256) ** 0.5 / 3**0.5, rtol=0.03)
    np.testing.assert_allclose(body["blocks"]["mlp"]["up"]["kernel"].std(), 0.02, rtol=0.03)
    found = quick_jit(lambda p, t: teacher_lm.score(shape, p, {"tokens": t}))(
        scorer, jnp.arange(16)[None]
    )
    np.testing.assert_allclose(jax.nn.sigmoid(found), 0.2, atol=0.1)


def test_mistakes():
    found = batch()
    with pytest.raises(ValueError, match="all three are"):
        jax.eval_shape(
            lambda b: masked_lm.loss(SHAPE, params(), b), {**found, "weights": jnp.ones((2, 5))}
        )
    with pytest.raises(ValueError, match="9 tokens, but the model has max_len=6"):
        masked_lm.states(SHAPE, params(), {"tokens": jnp.ones((1, 9), int)})
    with pytest.raises(ValueError, match="no probability"):
        teacher_lm.init_scorer(SHAPE, jax.random.key(0), share=1.0)


def test_soft_cross_entropy_by_hand_and_against_the_hard_one(x64):
    logits = jnp.asarray(5 * np.random.default_rng(0).standard_normal((6, 4)))
    labels, mask = jnp.array([0, 3, 1, 1, 2, 0]), jnp.array([1.0, 0.5, 0, 1, 1, 0])
    bad = logits.at[2].set(jnp.nan).at[5].set(jnp.inf)
    one_hot = jnp.asarray(np.eye(4)[labels])

    @quick_jit
    def both(logits, bad):
        soft = [losses.soft_cross_entropy(each, one_hot, mask) for each in (logits, bad)]
        none = losses.soft_cross_entropy(logits, jnp.zeros((6, 4)))
        return losses.cross_entropy(logits, labels, mask), soft, none

    hard, soft, none = both(logits, bad)
    np.testing.assert_allclose(soft, [hard, hard], rtol=1e-13)
    assert none == 0
    # log 2 for the half, log 4 for the quarter, over a mass of three quarters
    target = jnp.array([[0.5, 0.25]])
    by_hand = (0.5 * np.log(4 / 3) + 0.25 * np.log(4)) / 0.75
    value = losses.soft_cross_entropy(jnp.log(jnp.array([[3.0, 1.0]])), target)
    np.testing.assert_allclose(value, by_hand, rtol=1e-13)


def by_hand(shape, params, tokens, length):
    """The scores of one text from the definition, in numpy, one head and one position at a time."""
    p = jax.tree.map(np.asarray, params)
    table, size = p["embed"]["tokens"], shape.width // shape.heads

    def norm(x, w):
        return (x - x.mean()) / math.sqrt(x.var() + shape.eps) * w["scale"] + w["bias"]

    def linear(x, w):
        return x @ w["kernel"] + w["bias"]

    def gelu(x):
        return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])

    states = [table[t] + p["embed"]["positions"][i] for i, t in enumerate(tokens)]
    for i in range(shape.layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        joint = [linear(norm(x, block["ln1"]), block["attn"]["qkv"]) for x in states]
        after = []
        for x, mine in zip(states, joint, strict=True):
            mixed = []
            for first in range(0, shape.width, size):
                own = slice(first, first + size)  # of the query; then the keys', then the values'
                q = mine[: shape.width][own]
                seen = joint[:length]  # what is padding is not attended to
                raw = [q @ y[shape.width : 2 * shape.width][own] / math.sqrt(size) for y in seen]
                shares = np.exp(raw) / np.exp(raw).sum()
                values = [y[2 * shape.width :][own] for y in seen]
                mixed.append(sum(s * v for s, v in zip(shares, values, strict=True)))
            y = x + linear(np.concatenate(mixed), block["attn"]["out"])
            hidden = gelu(linear(norm(y, block["ln2"]), block["mlp"]["up"]))
            after.append(y + linear(hidden, block["mlp"]["down"]))
        states = after
    head = p["head"]
    final = [gelu(linear(norm(x, p["ln_f"]), head["dense"])) for x in states]
    return np.array([table @ norm(x, head["ln"]) + head["bias"] for x in final])


def test_scores_equal_a_forward_pass_in_numpy(x64):
    shape = SHAPE._replace(layers=2, loop="scan")
    params, found = random_params(masked_lm, shape, spread=0.5), batch()
    scores = quick_jit(lambda p: masked_lm.logits(shape, p, found))(params)
    for i in range(2):
        expected = by_hand(shape, params, np.asarray(found["tokens"][i]), 4)
        np.testing.assert_allclose(scores[i, :4], expected[:4], rtol=1e-10, atol=1e-10)
    # the loss is that of these scores
    value = quick_jit(lambda p: masked_lm.loss(shape, p, found)[0])(params)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    picked = np.take_along_axis(np.asarray(log_p), np.asarray(found["labels"])[..., None], -1)
    np.testing.assert_allclose(value, -picked[:, :4].mean(), rtol=1e-10)
