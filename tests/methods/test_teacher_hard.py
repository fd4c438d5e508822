"""Hard teachers against full enumeration of a world of three words, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import differences, relative_error
from teacher_world import (
    BOTH,
    VOCAB,
    at,
    episodes,
    estimated,
    every_pseudo,
    loss,
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
from jmeta.core.autodiff import mixed_mode_grad
from jmeta.methods import hard_teacher, students
from jmeta.methods.coefficients import coefficients
from jmeta.methods.relaxations import log_probability

pytestmark = pytest.mark.usefixtures("x64")

INPUTS = methods.inputs_only(teacher)


@pytest.mark.parametrize("kind", ["exact", "first_order"])
def test_expected_score_function_is_the_gradient_of_the_expected_step(kind):
    """E[h grad(-log T)] is the derivative of the score after the mean step, E inside."""
    # one half, one quarter, one quarter: each outcome as often as it is likely
    halves = np.log(np.asarray([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]))
    meta = {"inputs": halves, "labels": np.roll(halves, 1, axis=0)}
    tokens, data, every = np.asarray([0, 2]), at(episodes(micro=1), 0), every_pseudo()
    likely = jax.jit(lambda meta: probabilities(meta, tokens, every))(meta)
    often = np.rint(256 * np.asarray(likely)).astype(int)
    whole = jax.tree.map(lambda x: np.repeat(x, often, axis=0), every)
    assert len(whole["tokens"]) == 256
    made = student()
    first = students.record_from(made.optimizer, students.born(made, None), 1)
    value_of = coefficients(made, 1, kind, mixed_mode_grad)
    h = jax.jit(lambda b: value_of(first, Episode(b, data.query), None)[0])(whole)

    def surrogate(meta):
        return -jnp.sum(h * jnp.log(probabilities(meta, tokens, whole)))

    def expected(meta):
        params = stepped(every, probabilities(meta, tokens, every))
        if kind == "exact":
            return scored(params, data)
        v = jax.grad(first_order_score)(jax.lax.stop_gradient(params), data)
        return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (v, params)), strict=True))

    grads, oracle = jax.jit(lambda m: (jax.grad(surrogate)(m), jax.grad(expected)(m)))(meta)
    assert relative_error(grads, oracle) < 1e-12


def first_order_score(params, episode):
    """The query loss after fine-tuning, whose gradient has no Hessian."""

    def one(task):
        slope = jax.grad(lambda p: loss(p, task.support, None)[0])(params)
        slope = jax.lax.stop_gradient(slope)
        return loss(jax.tree.map(lambda p, g: p - 0.2 * g, params, slope), task.query, None)[0]

    return jnp.mean(jax.vmap(one)(episode.query))


BASELINES = {
    "none": methods.no_baseline(),
    "moving average": methods.moving_average(0.3),
    "leave one out": methods.leave_one_out(),
}


@functools.cache
def enumerated(exact):
    """Probabilities of the nine draws of two micro-batches, and the gradient of their mean."""
    data, meta, every = episodes(examples=1), teacher_params(), outcomes(2)

    def likely(meta, tokens):
        scores = {"inputs": jnp.broadcast_to(meta["inputs"][tokens], (9, 2, VOCAB))}
        drawn = {"inputs": jnp.asarray(every)}
        return jnp.exp(log_probability(scores, drawn, jnp.ones((9, 2))))

    def after(tokens, drawn, episode):
        ones = np.ones((1, 2))
        batch = {"tokens": drawn[None], "labels": tokens, "mask": ones, "weights": ones}
        return scored(stepped(batch, np.ones(1)), episode)

    def slope(tokens, drawn, episode):
        """What the score changes by with the weight of the drawn example."""
        ones = np.ones((1, 2))
        batch = {"tokens": drawn[None], "labels": tokens, "mask": ones, "weights": ones}
        return jax.grad(lambda weight: scored(stepped(batch, weight), episode))(jnp.ones(1))[0]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def objective(meta, data):
        def one(episode):
            tokens, of = episode.support["tokens"], slope if exact else after
            p = likely(meta, tokens[0])
            return jnp.sum(p * jax.vmap(lambda z: of(tokens, z, episode))(every)), p

        values, p = jax.vmap(one)(data)
        return values.mean(), p

    return jax.tree.map(np.asarray, objective(meta, data))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("negative_loss", "moving average"),
        ("loss_difference", "leave one out"),
        ("exact", "leave one out"),  # of Two Moons
        ("negative_loss", "none"),
        ("negative_loss", "leave one out"),
    ],
)
def test_estimate_is_unbiased_under_every_baseline(kind, name):
    """All 81 pairs of draws of two micro-batches, weighed by their probability."""
    data, meta = episodes(examples=1), teacher_params()
    mg = hard_teacher(student(), INPUTS, coefficient=kind, baseline=BASELINES[name])
    every = outcomes(2)
    state = mg.init(meta, None)
    if name == "moving average":  # whatever was seen before
        state = state._replace(baseline=(np.asarray(0.4), np.asarray(0.7)))

    def estimate(first, second):
        drawn = {"inputs": jnp.stack([first, second])[:, None]}
        batch = {**data.support, "drawn": drawn}
        grads, _, _ = mg.estimate(meta, state, data._replace(support=batch), jax.random.key(0))
        return grads

    oracle, (p, q) = enumerated(kind == "exact")
    grads = jax.jit(jax.vmap(jax.vmap(estimate, (None, 0)), (0, None)))(every, every)
    mean = jax.tree.map(lambda g: np.einsum("i,j,ij...->...", p, q, np.asarray(g)), grads)
    assert relative_error(mean["inputs"], oracle["inputs"]) < 1e-12
    assert (mean["labels"] == 0).all()


def drawn_episodes(micro=1):
    data = episodes(micro=micro)
    drawn = {n: text(micro, 2, seed=s)["tokens"] for n, s in (("inputs", 11), ("labels", 12))}
    pseudo = {"tokens": drawn["inputs"], "labels": drawn["labels"]}
    pseudo |= {"mask": np.ones((micro, 2, 2)), "weights": np.ones((micro, 2, 2))}
    return data._replace(support={**data.support, "drawn": drawn}), pseudo


def test_exact_coefficient_is_the_slope_of_an_examples_weight_under_adam():
    data, pseudo = drawn_episodes()
    optimizer = optim.adamw(0.05, 0.9, 0.98, 1e-6, weight_decay=0.01)
    made = student(optimizer)

    @jax.jit
    def value(weights):
        alone = lambda p, b: loss(p, jax.tree.map(lambda x: x[None], b), None)[0]  # noqa: E731
        each = lambda p: jax.vmap(lambda b: alone(p, b))(at(pseudo, 0))  # noqa: E731
        slope = jax.grad(lambda p: jnp.mean(weights * each(p)))(start())
        updates, _ = optimizer.update(slope, optimizer.init(start()), start())
        return scored(optax.apply_updates(start(), updates), at(data, 0))

    first = students.record_from(optimizer, students.born(made, None), 1)
    value_of = coefficients(made, 1, "exact", mixed_mode_grad)
    h = jax.jit(lambda b: value_of(first, Episode(b, at(data, 0).query), None)[0])(at(pseudo, 0))
    assert relative_error(-np.asarray(h), differences(value, np.ones(2))) < 1e-6


def test_published_cosine_weighs_the_mean_cross_entropy():
    data, pseudo = drawn_episodes()
    meta, single = teacher_params(), at(data, 0)
    mg = hard_teacher(student(), BOTH, coefficient="cosine", weighting="mean")
    grads, state, info = estimated(mg, meta, data, jax.random.key(0))

    @jax.jit
    def expected(meta):
        params = stepped(at(pseudo, 0), jnp.ones(2) / 2)
        v = jax.grad(first_order_score)(params, single)
        pairs = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (v, params)]
        delta = jnp.concatenate([x.ravel() for x in jax.tree.leaves(start())]) - pairs[1]
        h = jnp.vdot(pairs[0], delta) / jnp.linalg.norm(pairs[0]) / jnp.linalg.norm(delta)

        def cross_entropy(meta):
            scores = teacher(meta, single.support, None)
            log_p = jax.tree.map(lambda s: jax.nn.log_softmax(s, axis=-1), scores)
            drawn = single.support["drawn"]
            heads = [-jnp.take_along_axis(log_p[n], drawn[n][..., None], -1).mean() for n in drawn]
            return 0.5 * sum(heads)

        # a sum over the two texts, each a mean over its positions
        return h, jax.tree.map(lambda g: 2 * h * g, jax.grad(cross_entropy)(meta)), params

    h, oracle, params = expected(meta)
    assert abs(float(info.diagnostics["coefficient"]) - float(h)) < 1e-12
    assert relative_error(grads, oracle) < 1e-12
    assert relative_error(state.student.fast, params) < 1e-12


def test_several_steps_draw_for_each_and_move_the_student_as_often():
    data = episodes(unlabelled=Steps(text(2, 3, 2)))
    mg = hard_teacher(student(), BOTH, steps=3, baseline=methods.moving_average())
    grads, state, info = estimated(mg, teacher_params(), data, jax.random.key(0))
    assert int(state.student.step) == 3
    assert info.inner_losses.shape == (3,)
    assert np.abs(np.asarray(grads["labels"])).max() > 0
    total, weight = map(np.asarray, state.baseline)
    np.testing.assert_allclose(total / weight, info.diagnostics["coefficient"], rtol=1e-12)


def test_mistakes():
    with pytest.raises(ValueError, match="choose one of exact, first_order, cosine"):
        hard_teacher(student(), BOTH, coefficient="exct")  # pyright: ignore[reportArgumentType]
    mg = hard_teacher(student(), BOTH, baseline=methods.leave_one_out())
    with pytest.raises(ValueError, match=r"pass a jax\.random\.key"):
        estimated(mg, teacher_params(), episodes())
    with pytest.raises(ValueError, match="at least two of them"):
        jax.eval_shape(
            lambda m, e: mg.estimate(m, mg.init(m, None), e, jax.random.key(0)),
            teacher_params(),
            episodes(micro=1),
        )
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        methods.moving_average(0.0)


def classifier(params, batch, key):
    """A linear classifier, with labels that are classes or distributions over them."""
    log_p = jax.nn.log_softmax(batch["x"] @ params, axis=-1)
    target = batch["labels"]
    if jnp.issubdtype(target.dtype, jnp.integer):
        target = jax.nn.one_hot(target, 2, dtype=log_p.dtype)
    return -(target * log_p).sum(-1).mean(), {}


def drawn_mean(learner, network, meta, x, query, labels, draws=8000):
    """The mean over real draws under a moved baseline, what it is by enumeration, its error."""
    data = Episode(
        {"x": x[None]}, Episode(None, {"x": query[None, None], "labels": labels[None, None]})
    )
    learner = learner._replace(optimizer=optax.sgd(2.0))
    mg = methods.meta_pseudo_labels(learner, network, coefficient="negative_loss")
    state = mg.init(meta, None)._replace(baseline=(np.asarray(-0.6), np.asarray(0.7)))

    def objective(meta):
        log_p = jax.nn.log_softmax(x @ meta, axis=-1)
        params = learner.start(None)

        def worth(said):
            slope = jax.grad(lambda w: classifier(w, {"x": x, "labels": said}, None)[0])(params)
            asked = {"x": query, "labels": labels}
            value = classifier(params - 2.0 * slope, asked, None)[0]
            return jnp.exp(jnp.take_along_axis(log_p, said[:, None], -1).sum()) * value

        return jax.vmap(worth)(np.asarray(list(itertools.product(range(2), repeat=3)))).sum()

    @jax.jit
    def both(meta):
        keys = jax.random.split(jax.random.key(5), draws)
        each = jax.vmap(lambda key: mg.estimate(meta, state, data, key)[0])(keys)
        return each.mean(0), jax.grad(objective)(meta), each.std(0) / draws**0.5

    return map(np.asarray, both(meta))


def test_meta_pseudo_labels_has_its_closed_form():
    """h grad(-log T), h = eta <grad L(theta_1), grad of the pseudo-loss at theta_0>."""
    rng = np.random.default_rng(4)
    x, query = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    labels, drawn = np.asarray([0, 1, 1, 0]), np.asarray([1, 0, 0])
    params, meta = jnp.asarray(rng.normal(size=(2, 2))), rng.normal(size=(2, 2))
    learner = methods.Student(classifier, lambda key: params, optax.sgd(0.3), support_steps=0)
    network = lambda meta, batch, key: batch["x"] @ meta  # noqa: E731
    batch = {"x": x[None], "drawn": {"labels": drawn[None]}}
    labelled = {"x": query[None, None], "labels": labels[None, None]}
    data = Episode(batch, Episode(None, labelled))

    @jax.jit
    def expected(meta):
        alone = lambda w, x, y: classifier(w, {"x": x[None], "labels": y[None]}, None)[0]  # noqa: E731
        slopes = jax.vmap(jax.grad(alone), in_axes=(None, 0, 0))(params, x, drawn) / 3
        after = params - 0.3 * slopes.sum(0)
        score = lambda w: classifier(w, {"x": query, "labels": labels}, None)[0]  # noqa: E731
        h = 0.3 * jnp.einsum("ij,bij->b", jax.grad(score)(after), slopes)
        difference = score(params) - score(after)

        def minus_log(meta, h):
            log_p = jax.nn.log_softmax(x @ meta, axis=-1)
            return -jnp.sum(h * jnp.take_along_axis(log_p, drawn[:, None], -1)[:, 0])

        return jax.grad(minus_log)(meta, h), jax.grad(minus_log)(meta, difference)

    kinds = zip(("exact", "loss_difference"), expected(meta), strict=True)
    for kind, oracle in kinds:
        mg = methods.meta_pseudo_labels(learner, network, coefficient=kind)
        grads, _, _ = estimated(mg, meta, data, jax.random.key(0))
        assert (
            np.abs(np.asarray(oracle)).max() > 1e-3
        )  # the released code's term is identically zero
        assert relative_error(grads, oracle) < 1e-12

    mean, expected, error = drawn_mean(learner, network, meta, x, query, labels)
    assert (np.abs(mean - expected) <= 4 * error).all()
    assert (np.abs(expected) / error).max() > 15  # an error of half of it is seen

    with pytest.raises(ValueError, match="set 0, or use hard_teacher"):
        methods.meta_pseudo_labels(learner._replace(support_steps=1), network)
