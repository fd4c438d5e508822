"""Replaced tokens, which alone are asked for: enumeration, central differences, and the budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_numbers import differences, relative_error
from teacher_world import (
    VOCAB,
    at,
    episodes,
    estimated,
    loss,
    outcomes,
    scored,
    start,
    stepped,
    student,
    teacher,
    teacher_params,
)

from jmeta import methods
from jmeta.methods import hard_teacher, relaxations, soft_teacher

pytestmark = pytest.mark.usefixtures("x64")

TOKENS = np.asarray([[[0, 2, 1]]], np.int32)
ORDINARY = np.asarray([[[0.0, 1.0, 1.0]]])
BATCH = {"tokens": TOKENS, "mask": np.ones((1, 1, 3)), "ordinary": ORDINARY}


def test_gradient_of_the_mean_is_that_of_the_hand_written_loop():
    """Softmax of scores whose own token is moved until two places of five are changed."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 2, 5)).astype(np.int32)
    data = episodes(unlabelled={"tokens": tokens, "mask": np.ones(tokens.shape)})
    meta = teacher_params()["inputs"]
    table = lambda meta, batch, key: {"inputs": meta[batch["tokens"]]}  # noqa: E731
    made = methods.replacements(table, share=0.4)
    found, _, info = estimated(soft_teacher(student(), made), meta, data)

    @jax.jit
    def value(meta):
        def one(episode):
            read = episode.support["tokens"]
            itself = jax.nn.one_hot(read, VOCAB)
            p = jax.nn.softmax(meta[read])
            odds = jnp.log((1 - (p * itself).sum(-1)) / (p * itself).sum(-1))
            changed = jax.nn.sigmoid(methods.within_budget(odds, jnp.ones(read.shape), 0.4))
            others = p * (1 - itself)
            others = others / others.sum(-1, keepdims=True) * changed[..., None]
            mixed = others + itself * (1 - changed[..., None])
            pseudo = {**episode.support, "tokens": mixed, "labels": read, "weights": changed}
            slope = jax.grad(lambda w: loss(w, pseudo, None)[0])(start())
            return scored(jax.tree.map(lambda w, g: w - 0.3 * g, start(), slope), episode)

        return jnp.mean(jax.vmap(one)(data))

    assert relative_error(found, differences(value, meta)) < 1e-6
    assert abs(float(info.loss - value(meta))) < 1e-12
    assert np.abs(np.asarray(found)).max() > 1e-4


def test_drawn_replacements_have_the_gradient_of_their_enumeration():
    """All nine ways to write two words of three, of which the first is not to be changed."""
    meta, data = teacher_params(), episodes(micro=1, unlabelled=BATCH)
    every = np.concatenate([np.zeros((9, 1), np.int32), outcomes(2)], axis=1)
    made = methods.replacements(teacher)
    negative, exact = (
        hard_teacher(student(), made, coefficient=kind) for kind in ("negative_loss", "exact")
    )

    def estimate(mg, written):
        whole = data._replace(support={**BATCH, "drawn": {"inputs": written[None, None]}})
        return mg.estimate(meta, mg.init(meta, None), whole, jax.random.key(0))[0]["inputs"]

    def log_p(table):
        each = jax.nn.log_softmax(table[TOKENS[0, 0]])
        return jax.vmap(lambda z: each[jnp.arange(3), z])(every) @ ORDINARY[0, 0]

    def pre_trained(written, weight):
        batch = {"tokens": written, "labels": TOKENS[0, 0], "mask": jnp.ones(3)}
        batch["weights"] = (written != TOKENS[0, 0]).astype(float)
        return scored(stepped(at(batch, None), weight), at(data, 0))

    def worth(written):
        return -jax.grad(lambda weight: pre_trained(written, weight))(jnp.ones(1))[0]

    @jax.jit
    def all_of(table):
        found = [jax.vmap(lambda z, mg=mg: estimate(mg, z))(every) for mg in (negative, exact)]
        losses = jax.vmap(lambda z: pre_trained(z, jnp.ones(1)))(every)
        p = jnp.exp(log_p(table))
        h = jax.lax.stop_gradient(p) * jax.vmap(worth)(every)
        oracles = (
            jax.grad(lambda t: jnp.sum(jnp.exp(log_p(t)) * losses))(table),
            jax.grad(lambda t: -jnp.sum(h * log_p(t)))(table),
        )
        return [jnp.einsum("i,i...->...", p, each) for each in found], oracles, losses

    means, oracles, losses = jax.tree.map(np.asarray, all_of(meta["inputs"]))
    for mean, oracle in zip(means, oracles, strict=True):
        assert relative_error(mean, oracle) < 1e-12
        assert (mean[0] == 0).all()  # what is not to be changed has no say
        assert np.abs(oracle[1:]).min() > 1e-5
    # Where nothing is changed nothing is asked for, and the student stays as it is.
    [same] = np.flatnonzero((every == TOKENS[0, 0]).all(-1))
    unmoved = jax.jit(lambda episode: scored(start(), episode))(at(data, 0))
    assert abs(float(losses[same] - unmoved)) < 1e-15


def test_what_is_drawn_is_what_the_student_reads_and_is_asked_for():
    made, key = methods.replacements(teacher, share=0.5), jax.random.key(2)
    batch = {name: np.repeat(leaf[0], 50, 0) for name, leaf in BATCH.items()}
    params = teacher_params()

    @jax.jit
    def written(params):
        scores = made.scores(params, batch, None)
        through = relaxations.of_heads(relaxations.straight_through, scores, key)
        drawn = relaxations.of_heads(relaxations.draw, scores, key)
        return scores, made.write(through, batch), made.write(drawn, batch)

    scores, through, drawn = written(params)
    hot = np.eye(VOCAB)[np.asarray(drawn["tokens"])]
    np.testing.assert_allclose(through["tokens"], hot, atol=1e-15)
    np.testing.assert_allclose(through["weights"], drawn["weights"], atol=1e-15)
    kept = np.asarray(drawn["tokens"]) == batch["tokens"]
    # Exactly: a rest of rounding would be all that a loss is divided by.
    assert (np.asarray(through["weights"])[kept] == 0).all()
    assert 0.2 < kept[:, 1:].mean() < 0.8
    assert kept[:, 0].all()
    np.testing.assert_array_equal(drawn["labels"], batch["tokens"])
    slope, soft = jax.jit(
        lambda params: (
            jax.grad(lambda m: written(m)[1]["weights"][:, 1].sum())(params)["inputs"],
            jax.grad(lambda m: jnp.sum(1 - jax.nn.softmax(made.scores(m, batch, None)["inputs"])
                                       [:, 1, 2]))(params)["inputs"],
        )
    )(params)  # fmt: skip
    assert relative_error(slope, soft) < 1e-12
    assert np.abs(np.asarray(soft)).max() > 1e-3
    assert scores["inputs"].shape == (50, 3, VOCAB)


def shares(scores):
    return jax.nn.softmax(scores["inputs"])


@pytest.mark.parametrize("share", [0.05, 0.15, 0.9])
def test_the_budget_moves_the_token_itself_alone(share):
    rng = np.random.default_rng(0)
    raw = 3 * rng.normal(size=(4, 6, 7))
    tokens = rng.integers(1, 7, (4, 6)).astype(np.int32)
    tokens[:, -1] = 0  # [PAD], which is never written
    ordinary = np.ones((4, 6))
    ordinary[:, 0] = ordinary[:, -1] = 0
    batch = {"tokens": tokens, "mask": np.ones((4, 6)), "ordinary": ordinary}
    network = methods.without(lambda meta, batch, key: {"inputs": meta}, [0])
    made = methods.replacements(network, share=share)
    p, free = (
        np.asarray(jax.jit(lambda raw, one=one: shares(one.scores(raw, batch, None)))(raw))
        for one in (made, methods.replacements(network))
    )
    itself = np.eye(7)[tokens]
    changed = 1 - (p * itself).sum(-1)
    np.testing.assert_allclose(changed[:, 1:-1].mean(-1), share, rtol=1e-9)
    np.testing.assert_array_equal(p[:, 0], itself[:, 0])
    np.testing.assert_array_equal(p[:, -1], itself[:, -1])
    assert (p[:, 1:-1, 0] == 0).all()
    # What it is changed to, if it is, is the teacher's as before; and so is the order of places.
    others = lambda q: (q * (1 - itself) / (q * (1 - itself)).sum(-1, keepdims=True))[:, 1:-1]  # noqa: E731
    with np.errstate(invalid="ignore"):  # of the places that may not be changed
        np.testing.assert_allclose(others(p), others(free), rtol=1e-9)
    before = 1 - (free * itself).sum(-1)
    np.testing.assert_array_equal(changed[:, 1:-1].argsort(), before[:, 1:-1].argsort())
    # Finite where a teacher is certain, in single precision.
    certain = (1e4 * raw).astype(np.float32)
    value = lambda raw: jnp.sin(made.scores(raw, batch, None)["inputs"])[:, 1:-1].sum()  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(value))(certain)).all()


def test_what_no_share_is_and_a_teacher_without_inputs():
    with pytest.raises(ValueError, match="no share of positions between 0 and 1"):
        methods.replacements(teacher, share=15).scores(teacher_params(), at(BATCH, 0), None)
    labels = methods.replacements(lambda meta, batch, key: {"labels": meta})
    with pytest.raises(ValueError, match=r"\['inputs'\] is missing"):
        labels.scores(teacher_params(), at(BATCH, 0), None)
