"""Heads of self-supervised objectives: losses by hand, pads that add nothing, meaningful twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import log_softmax
from random_params import random_like

from jmeta.models import bert, pretraining

CONFIG = bert.BertConfig(vocab=23, width=8, layers=1, heads=2, max_len=9, dropout=0.2)
hidden = jax.jit(bert.hidden, static_argnums=0)
detection = jax.jit(pretraining.detection, static_argnums=(0, 1))
contrast = jax.jit(pretraining.contrast, static_argnums=0)


@pytest.fixture
def params(x64):
    return random_like(jax.eval_shape(lambda: pretraining.init(CONFIG, jax.random.key(0))), seed=1)


@pytest.fixture
def batch(x64):
    rng = np.random.default_rng(2)
    tokens = rng.integers(4, 23, (6, 9))
    mask = (np.arange(9)[None] < np.array([9, 4, 7, 9, 5, 6])[:, None]).astype(float)
    weights = mask * (rng.uniform(size=(6, 9)) < 0.4)
    return {
        "tokens": np.where(mask > 0, tokens, 0), "mask": mask, "labels": tokens,
        "weights": weights,
    }  # fmt: skip


def test_masked_lm_is_berts_and_scoring_only_what_is_asked_for_changes_nothing(params, batch):
    whole, info = jax.jit(pretraining.masked_lm, static_argnums=0)(CONFIG, params, batch)
    config = CONFIG._replace(head="masked_lm")
    given = {**params, "head": params["heads"]["mlm"]}
    other = jax.jit(bert.loss, static_argnums=0)(config, given, batch)[0]
    np.testing.assert_allclose(whole, other, rtol=1e-12)
    most = int(batch["weights"].sum(-1).max())
    assert most < 9
    both = [
        jax.jit(jax.grad(lambda p, m=m: pretraining.masked_lm(CONFIG, p, batch, most=m)[0]))(params)
        for m in (None, most)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *both)
    assert info["tokens"] == batch["weights"].sum()


def test_detection_is_the_mean_over_what_counts(params, batch):
    edited = {**batch, "labels": (batch["tokens"] % 3 == 0).astype(np.int32)}
    states, arrays = np.asarray(hidden(CONFIG, params, edited)), jax.tree.map(np.asarray, params)
    for name in ("added", "deleted"):
        value, info = detection(CONFIG, name, params, edited)
        head = arrays["heads"][name]["out"]
        log_p = log_softmax(states @ head["kernel"] + head["bias"])
        said = np.take_along_axis(log_p, edited["labels"][..., None], -1)[..., 0]
        weights = edited["weights"]
        np.testing.assert_allclose(value, -(said * weights).sum() / weights.sum(), rtol=1e-12)
        right = (log_p.argmax(-1) == edited["labels"]) * weights
        np.testing.assert_allclose(info["accuracy"], right.sum() / weights.sum(), rtol=1e-12)
    longer = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in edited.items()}
    roomy = CONFIG._replace(max_len=12)
    positions = arrays["embed"]["positions"]
    wide = {
        **params,
        "embed": {**params["embed"], "positions": np.pad(positions, ((0, 3), (0, 0)))},
    }
    padded = detection(roomy, "added", wide, longer)[0]
    np.testing.assert_allclose(padded, detection(CONFIG, "added", params, edited)[0])


def test_contrast_is_the_cross_entropy_to_the_twin_over_all_others(x64):
    vectors = np.random.default_rng(4).normal(size=(6, 5))
    near = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    total = 0.0
    for i in range(6):
        scores = {j: np.exp(near[i] @ near[j] / 0.05) for j in range(6) if j != i}
        total -= np.log(scores[i ^ 1] / sum(scores.values()))
    contrast_loss = jax.jit(pretraining.contrast_loss)
    np.testing.assert_allclose(contrast_loss(vectors)[0], total / 6, rtol=1e-10)
    for rows in (2, 4, 10):  # equal similarities: log(2B - 1)
        value = contrast_loss(jnp.ones((rows, 3)))[0]
        np.testing.assert_allclose(value, np.log(rows - 1), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="no pairs"):
        pretraining.contrast_loss(jnp.ones((3, 2)))


def test_twins_differ_in_evaluation_too_and_are_the_same_every_time(params, batch):
    twins = {
        **{name: np.repeat(batch[name][:3], 2, 0) for name in ("tokens", "mask")},
        "dropout": jax.random.key(5),
    }
    value, _ = contrast(CONFIG, params, twins)
    again, _ = contrast(CONFIG, params, twins, jax.random.key(9))
    assert value == again  # the key is the batch's own
    other, _ = contrast(CONFIG, params, {**twins, "dropout": jax.random.key(6)})
    assert value != other
    states = np.asarray(hidden(CONFIG, params, twins, twins["dropout"]))
    assert (np.abs(states[0::2] - states[1::2]).max((1, 2)) > 1e-3).all()
    assert value > 1e-3
    plain = CONFIG._replace(dropout=0.0)
    with pytest.raises(ValueError, match="give the config dropout"):
        pretraining.contrast(plain, params, twins)


def test_order_is_a_classifier_of_its_own(params, batch):
    pairs = {
        "tokens": batch["tokens"], "mask": batch["mask"], "y": np.arange(6) % 2,
        "segments": np.zeros((6, 9), int),
    }  # fmt: skip
    value, info = jax.jit(pretraining.order, static_argnums=0)(CONFIG, params, pairs)
    config = CONFIG._replace(head="classify", labels=2)
    apply, given = jax.jit(bert.apply, static_argnums=0), params["heads"]["order"]
    scores = np.asarray(apply(config, {**params, "head": given}, pairs))
    log_p = log_softmax(scores)
    np.testing.assert_allclose(value, -log_p[np.arange(6), pairs["y"]].mean(), rtol=1e-12)
    np.testing.assert_allclose(info["accuracy"], (scores.argmax(-1) == pairs["y"]).mean())


def test_a_head_is_the_same_whichever_others_there_are(x64):
    draw = lambda key: (  # noqa: E731
        pretraining.init_heads(CONFIG, key, ["deleted"]), pretraining.init_heads(CONFIG, key)
    )  # fmt: skip
    alone, every = jax.jit(draw)(jax.random.key(7))
    assert set(every) == set(pretraining.HEADS)
    np.testing.assert_array_equal(
        alone["deleted"]["out"]["kernel"], every["deleted"]["out"]["kernel"]
    )
    with pytest.raises(ValueError, match="no head 'mml'"):
        pretraining.init_heads(CONFIG, jax.random.key(7), ["mml"])
