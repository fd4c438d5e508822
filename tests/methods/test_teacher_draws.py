"""What hard teachers draw: each step's coefficients, real draws, masks and auxiliary losses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import differences, flat, relative_error, softmax
from teacher_world import (
    BOTH,
    TIME,
    VOCAB,
    at,
    episodes,
    estimated,
    every_pseudo,
    loss,
    masked_pair,
    outcomes,
    probabilities,
    scored,
    start,
    stepped,
    student,
    teacher,
    teacher_params,
    text,
)

from jmeta import Episode, Steps, methods, optim
from jmeta.core.tree import at_least_float32
from jmeta.methods import hard_teacher
from jmeta.methods.relaxations import draw, log_probability

pytestmark = pytest.mark.usefixtures("x64")


def adamw():
    return optim.adamw(0.05, 0.9, 0.98, 1e-6, weight_decay=0.01)


def drawn_steps():
    """Two steps of two examples, each with scores of its own, one with a pad in each."""
    batch = text(1, 2, 2, seed=7)
    batch["mask"][0, :, 0, 1] = 0
    batch["place"] = np.arange(4).reshape(1, 2, 2)
    drawn = {n: text(1, 2, 2, seed=s)["tokens"] for n, s in (("inputs", 11), ("labels", 12))}
    return {**batch, "drawn": drawn}


@pytest.mark.parametrize(
    ("optimizer", "apart"),
    [(adamw(), True), (optax.sgd(0.3), True), (optax.sgd(0.3), False)],
    ids=["adamw", "sgd", "sgd, one batch for all"],
)
def test_exact_coefficient_of_each_of_two_steps_is_the_slope_of_its_weight(optimizer, apart):
    """Each place of a gradient is h (p - onehot), h the slope of the query loss in a weight."""
    batch = drawn_steps() if apart else at(drawn_steps(), np.s_[:, 0])
    data = episodes(micro=1, unlabelled=Steps(batch) if apart else batch)
    places = (4, TIME, VOCAB)
    meta = {n: np.sin(np.arange(24.0) + i).reshape(places) for i, n in enumerate(batch["drawn"])}
    network = lambda meta, batch, key: {n: meta[n][batch["place"]] for n in meta}  # noqa: E731
    mg = hard_teacher(student(optimizer), methods.inputs_and_labels(network), steps=2)
    grads, state, _ = estimated(mg, meta, data, jax.random.key(0))

    pseudo = {"tokens": batch["drawn"]["inputs"], "labels": batch["drawn"]["labels"]}
    pseudo |= {"mask": batch["mask"], "weights": batch["mask"]}

    @jax.jit
    def pre_trained(weights):
        """Its score and the student itself."""
        params, inner = start(), optimizer.init(start())
        for t in range(2):
            mine, now = (weights[t], at(pseudo, (0, t))) if apart else (weights, at(pseudo, 0))
            counts = now["mask"].sum(-1)

            def total(p, mine=mine, now=now, counts=counts):
                one = lambda b: loss(p, jax.tree.map(lambda x: x[None], b), None)[0]  # noqa: E731
                return jnp.sum(mine * counts * jax.vmap(one)(now)) / counts.sum()

            updates, inner = optimizer.update(jax.grad(total)(params), inner, params)
            params = optax.apply_updates(params, updates)
        return scored(params, at(data, 0)), params

    ones = np.ones((2, 2) if apart else 2)
    h = -differences(lambda w: pre_trained(w)[0], ones)
    assert relative_error(state.student.fast, pre_trained(ones)[1]) < 1e-12
    assert np.abs(h).min() > 1e-5
    for name, found in grads.items():
        often, mask = batch["drawn"][name][0], batch["mask"][0][..., None]
        place = meta[name][batch["place"][0]]
        each = softmax(place) - np.eye(VOCAB)[often]
        expected = np.zeros(places)
        expected[batch["place"][0]] = h[..., None, None] * each * mask
        assert relative_error(found, expected) < 1e-6


RATE = 3.0  # of a student whose loss depends on what it was taught
DRAWS = 40_000


@pytest.mark.parametrize("outcomes", [1, 2, 5, 9, 10, 30])
def test_draws_have_the_probabilities_of_their_scores(outcomes):
    """Pearson's statistic of 20,000 draws is what one expects of so many classes."""
    scores = 2 * np.random.default_rng(outcomes).normal(size=outcomes)
    places = np.broadcast_to(scores, (20_000, outcomes))
    drawn = jax.jit(draw)(places, jax.random.key(5))
    assert drawn.dtype == jnp.int32
    assert drawn.shape == (20_000,)
    found = np.bincount(drawn, minlength=outcomes)
    wanted = 20_000 * softmax(scores)
    assert found.size == outcomes
    statistic = ((found - wanted) ** 2 / wanted).sum()
    assert statistic < outcomes - 1 + 4 * np.sqrt(2 * (outcomes - 1)) + 1e-9


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_draws_are_never_outcomes_of_probability_zero(dtype, monkeypatch):
    """Not even by the least and the largest random number that there is."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 23)) * rng.choice([1, 30], size=(400, 1))
    scores[rng.random(scores.shape) < 0.6] = -1e30
    scores[:, 22] = np.where((scores[:, :22] < -1e29).all(1), 0, -np.inf)
    scores = jnp.asarray(scores, dtype)
    shares = lambda scores: jax.nn.softmax(scores.astype(at_least_float32(scores.dtype)))  # noqa: E731
    wide = np.asarray(jax.jit(shares)(scores))
    uniform = jax.random.uniform
    edges = {
        "random": uniform,
        "least": lambda key, shape, dtype: jnp.zeros(shape, dtype),
        "largest": lambda key, shape, dtype: jnp.full(shape, 1 - jnp.finfo(dtype).eps, dtype),
    }
    for edge in edges.values():
        monkeypatch.setattr(jax.random, "uniform", edge)
        drawn = np.asarray(jax.jit(lambda *given: draw(*given))(scores, jax.random.key(1)))
        assert (wide[np.arange(400), drawn] > 0).all()


def test_a_draw_takes_two_random_numbers_whatever_the_vocabulary():
    def bits(outcomes):
        program = jax.make_jaxpr(draw)(jnp.zeros((3, 7, outcomes)), jax.random.key(0))
        shapes = re.findall(r":(?:u32|u64)\[([\d,]*)\] = random_bits", str(program))
        return [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]

    assert bits(50) == bits(5000) == [2 * 3 * 7]


def test_the_gradient_of_a_log_probability_scatters_nothing():
    scores = {"inputs": np.ones((2, 3, 5))}
    drawn, counts = {"inputs": np.ones((2, 3), int)}, np.ones((2, 3))

    def total(scores):
        return log_probability(scores, drawn, counts).sum()

    assert "scatter" not in str(jax.make_jaxpr(jax.grad(total))(scores))
    one = np.eye(5)[1] - 0.2
    slope = jax.jit(jax.grad(total))(scores)["inputs"]
    np.testing.assert_allclose(slope, np.tile(one, (2, 3, 1)))


def test_log_probabilities_of_texts_of_other_lengths_by_hand(x64):
    rng = np.random.default_rng(4)
    scores = {"inputs": rng.standard_normal((3, 4, 5)), "labels": rng.standard_normal((3, 4, 2))}
    drawn = {name: rng.integers(each.shape[-1], size=(3, 4)) for name, each in scores.items()}
    counts = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], float)
    totals = np.zeros(3)
    for name, each in scores.items():
        for i, t in np.ndindex(3, 4):
            likely = np.exp(each[i, t]) / np.exp(each[i, t]).sum()
            totals[i] += counts[i, t] * np.log(likely[drawn[name][i, t]])
    for weighting, expected in (("sum", totals), ("mean", totals / [8, 4, 1])):
        found = log_probability(scores, drawn, jnp.asarray(counts), weighting)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_real_draws_have_the_enumerated_gradient_as_their_mean():
    """Both heads, two micro-batches and the mean of the other one as the baseline."""
    data, meta = episodes(examples=1), teacher_params(0.5)
    # One query, so that what is subtracted is much like what it is subtracted from.
    data = data._replace(query=jax.tree.map(lambda x: x[[0, 0]], data.query))
    made = student(optax.sgd(RATE))
    mg = hard_teacher(made, BOTH, coefficient="negative_loss", baseline=methods.leave_one_out())
    state, every = mg.init(meta, None), every_pseudo()

    def objective(meta):
        def one(episode):
            p = probabilities(meta, episode.support["tokens"][0], every)
            alone = lambda b: scored(stepped(at(b, None), jnp.ones(1), RATE), episode)  # noqa: E731
            return jnp.sum(p * jax.vmap(alone)(every))

        return jax.vmap(one)(data).mean()

    @jax.jit
    def both(meta):
        keys = jax.random.split(jax.random.key(0), DRAWS)
        drawn = jax.vmap(lambda key: mg.estimate(meta, state, data, key)[0])(keys)
        return drawn, jax.grad(objective)(meta)

    drawn, oracle = jax.tree.map(np.asarray, both(meta))
    for name, exact in oracle.items():
        error = drawn[name].std(0) / DRAWS**0.5
        assert (np.abs(drawn[name].mean(0) - exact) <= 4 * error).all()
        # an error of half the gradient is seen
        assert (np.abs(exact) / np.where(error == 0, 1, error)).max() > 15


def test_drawn_masks_have_the_gradient_of_their_enumeration():
    """All eight masks of three words, of which one is not to be masked."""
    odds = lambda meta, batch, key: meta[batch["tokens"]]  # noqa: E731
    meta = np.asarray([0.4, -0.7, 0.9])
    tokens, ordinary = np.asarray([[[0, 2, 1]]], np.int32), np.asarray([[[0.0, 1.0, 1.0]]])
    batch = {"tokens": tokens, "mask": np.ones((1, 1, 3)), "ordinary": ordinary}
    data = episodes(micro=1, unlabelled=batch)
    every = outcomes(3)
    every = every[(every < 2).all(-1)].astype(np.int32)
    rewriting = methods.masks_only(odds, mask_token=1)
    negative, exact = (
        hard_teacher(student(), rewriting, coefficient=kind) for kind in ("negative_loss", "exact")
    )

    def estimate(mg, masks):
        drawn = {"masked": masks[None, None]}
        whole = data._replace(support={**batch, "drawn": drawn})
        return mg.estimate(meta, mg.init(meta, None), whole, jax.random.key(0))[0]

    def likely(meta):
        p = jax.nn.sigmoid(meta[tokens[0, 0]])
        return jnp.prod(jnp.where(every == 1, p, 1 - p), axis=-1)

    def pre_trained(masks, weight):
        chosen = jnp.where(masks == 1, ordinary[0, 0], 0)
        written = {"tokens": jnp.where(chosen == 1, 1, tokens[0, 0]), "labels": tokens[0, 0]}
        written |= {"mask": jnp.ones(3), "weights": chosen}
        return scored(stepped(at(written, None), weight), at(data, 0))

    def worth(masks):
        return -jax.grad(lambda weight: pre_trained(masks, weight))(jnp.ones(1))[0]

    def counted(meta):
        p = jax.nn.log_sigmoid(jnp.stack([-meta[tokens[0, 0]], meta[tokens[0, 0]]]))
        return jnp.where(every == 1, p[1], p[0]) @ ordinary[0, 0]

    @jax.jit
    def all_of(meta):
        found = [jax.vmap(lambda z, mg=mg: estimate(mg, z))(every) for mg in (negative, exact)]
        losses = jax.vmap(lambda z: pre_trained(z, jnp.ones(1)))(every)
        h = jax.lax.stop_gradient(likely(meta)) * jax.vmap(worth)(every)
        oracles = (
            jax.grad(lambda m: jnp.sum(likely(m) * losses))(meta),
            jax.grad(lambda m: -jnp.sum(h * counted(m)))(meta),
        )
        return found, [jnp.einsum("i,ij->j", likely(meta), each) for each in found], oracles

    found, means, oracles = jax.tree.map(np.asarray, all_of(meta))
    for each, mean, oracle in zip(found, means, oracles, strict=True):
        assert relative_error(mean, oracle) < 1e-12
        assert (each[:, 0] == 0).all()  # what is not to be masked has no say
        np.testing.assert_array_equal(each[:4], each[4:])
        assert np.abs(oracle[1:]).min() > 1e-4


def test_auxiliary_losses_are_added_weighted_and_compared_for_several_steps():
    unlabelled = Steps(masked_pair(text(2, 2, 2)))
    data, meta, key = episodes(unlabelled=unlabelled), teacher_params(), jax.random.key(0)
    auxiliary = methods.mlm_auxiliary(methods.two_head_loss(teacher))
    # One micro-batch at a time: the same draws as all at once.
    options = {"auxiliary": auxiliary, "meta_weight": 3.0, "microbatch": 1}
    kind = "loss_difference"  # which is quick to compile

    def made(**options):
        return hard_teacher(student(), BOTH, steps=2, coefficient=kind, **options)

    alone, state, _ = estimated(made(), meta, data, key)
    grads, same, info = estimated(made(**options), meta, data, key)
    assert relative_error(same.student.fast, state.student.fast) < 1e-12

    def cross_entropy(scores, labels, counts):
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores, -1), labels[..., None], -1)[..., 0]
        return -(picked * counts).sum() / counts.sum()

    def by_hand(meta):
        total = 0.0
        for i, t in np.ndindex(2, 2):
            batch = at(unlabelled.batches, (i, t))
            pair, words, ones = batch["masked"], batch["tokens"], batch["mask"]
            written, answered = (words, ones), (pair["tokens"], pair["weights"])
            for read, counts in (written, answered):
                total += cross_entropy(meta["inputs"][read], pair["tokens"], ones) / 4
                total += cross_entropy(meta["labels"][read], words, counts) / 4
        return total

    value, helped = jax.jit(jax.value_and_grad(by_hand))(meta)
    alone, helped = jax.tree.map(np.asarray, (alone, helped))
    assert abs(float(info.diagnostics["auxiliary_loss"] - value)) < 1e-12
    assert relative_error(grads, jax.tree.map(lambda a, b: 3 * a + b, alone, helped)) < 1e-12
    a, b = flat(alone), flat(helped)
    norms = [np.linalg.norm(a), np.linalg.norm(b)]
    cosine = a @ b / (norms[0] * norms[1])
    numbers = [info.diagnostics[n] for n in ("meta_norm", "auxiliary_norm", "cosine")]
    np.testing.assert_allclose(numbers, [*norms, cosine], rtol=1e-12)


def test_labelled_auxiliary_is_the_teachers_own_loss_on_the_query():
    x = np.sin(np.arange(12.0)).reshape(1, 1, 4, 3)
    labels, meta = np.asarray([[[0, 1, 1, 0]]]), np.cos(np.arange(6.0)).reshape(3, 2)

    def classifier(params, batch, key):
        log_p = jax.nn.log_softmax(batch["x"] @ params, axis=-1)
        return -jnp.take_along_axis(log_p, batch["labels"][..., None], -1).mean(), {}

    learner = methods.Student(
        classifier, lambda key: jnp.zeros((3, 2)), optax.sgd(0.3), support_steps=0
    )
    batch = {"x": x[:, 0, :2] + 1, "drawn": {"labels": np.asarray([[1, 0]])}}
    data = Episode(batch, Episode(None, {"x": x, "labels": labels}))
    network = lambda meta, batch, key: batch["x"] @ meta  # noqa: E731
    auxiliary = methods.labelled_auxiliary(classifier)
    made = lambda **o: methods.meta_pseudo_labels(learner, network, **o)  # noqa: E731
    alone, _, _ = estimated(made(), meta, data, jax.random.key(0))
    grads, _, info = estimated(
        made(auxiliary=auxiliary, meta_weight=0.5), meta, data, jax.random.key(0)
    )
    # softmax regression: the mean of (p - onehot) x
    p = softmax(x[0, 0] @ meta)
    own = x[0, 0].T @ (p - np.eye(2)[labels[0, 0]]) / 4
    assert relative_error(grads, 0.5 * np.asarray(alone) + own) < 1e-12
    value = -np.log(p[np.arange(4), labels[0, 0]]).mean()
    assert abs(float(info.diagnostics["auxiliary_loss"]) - value) < 1e-12
