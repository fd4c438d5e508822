"""Students over several outer steps, and teachers that draw what stays differentiable."""

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
    loss,
    scored,
    start,
    student,
    teacher_params,
    text,
)

from jmeta import Episode, methods, optim
from jmeta.methods import relaxations, soft_teacher

pytestmark = pytest.mark.usefixtures("x64")

RATE, DECAYS, EPS, ROOT, SHRINK = 0.05, (0.9, 0.98), 1e-6, 1e-12, 0.01


def adamw_step(params, moments, slope):
    """AdamW from its definition; moments are the two averages and the number of steps."""
    first, second, steps = moments
    steps, (a, b) = steps + 1, DECAYS
    first = jax.tree.map(lambda m, g: a * m + (1 - a) * g, first, slope)
    second = jax.tree.map(lambda v, g: b * v + (1 - b) * g**2, second, slope)

    def moved(p, m, v):
        direction = m / (1 - a**steps) / (jnp.sqrt(v / (1 - b**steps) + ROOT) + EPS)
        return p - RATE * (direction + SHRINK * p)

    return jax.tree.map(moved, params, first, second), (first, second, steps)


def test_the_second_meta_gradient_is_that_of_a_loop_with_the_moments_of_the_first():
    optimizer = optim.adamw(RATE, *DECAYS, EPS, ROOT, weight_decay=SHRINK)
    mg = soft_teacher(student(optimizer), BOTH)

    def pseudo_loss(params, meta, batch):
        p = {n: jax.nn.softmax(meta[n][batch["tokens"]], axis=-1) for n in meta}
        pseudo = {"tokens": p["inputs"], "labels": p["labels"], "mask": batch["mask"]}
        return loss(params, {**pseudo, "weights": batch["mask"]}, None)[0]

    @jax.jit
    def by_hand(meta, params, moments, data):
        def value(meta):
            total = 0.0
            for i in range(2):
                slope = jax.grad(pseudo_loss)(params, meta, at(data.support, i))
                total += scored(adamw_step(params, moments, slope)[0], at(data, i)) / 2
            return total

        slopes = [jax.grad(pseudo_loss)(params, meta, at(data.support, i)) for i in range(2)]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *slopes)
        return jax.grad(value)(meta), *adamw_step(params, moments, mean)

    estimate, meta = jax.jit(mg.estimate), teacher_params()
    zeros = jax.tree.map(jnp.zeros_like, start())
    state, params, moments = mg.init(meta, None), start(), (zeros, zeros, jnp.zeros(()))
    for seed in (0, 5):
        data = episodes(unlabelled=text(2, 2, seed=seed))
        grads, state, _ = estimate(meta, state, data, None)
        expected, params, moments = by_hand(meta, params, moments, data)
        assert relative_error(grads, expected) < 1e-10
        assert relative_error(state.student.fast, params) < 1e-10
        meta = jax.tree.map(lambda m, g: m - g / 10, meta, grads)
    assert int(state.student.step) == 2


def test_every_student_and_every_restart_is_drawn_anew():
    def quadratic(params, batch, key):
        return jnp.sum((params["w"][None] - batch["labels"]) ** 2), {}

    # A rate of zero: the parameters say from which start a student came.
    learner = methods.Student(
        quadratic,
        lambda key: {"w": jax.random.normal(key, (3,))},
        optax.sgd(0.0),
        support_steps=0,
    )
    one = soft_teacher(learner, methods.class_labels(lambda meta, batch, key: meta[None]))
    many = methods.population(methods.restarting(one, every=2), size=2)
    data = Episode({"x": jnp.ones((1, 1))}, Episode(None, {"labels": jnp.ones((1, 1, 1, 3))}))
    meta, estimate = jnp.ones(3), jax.jit(many.estimate)
    state = jax.jit(many.init)(meta, jax.random.key(0))
    starts, turns = np.asarray(state[0].student.fast["w"]), np.zeros(2, int)
    seen = [tuple(start) for start in starts]
    assert len(set(seen)) == 2
    for i in range(1, 10):
        ages = np.asarray(state[0].student.step)
        _, state, _ = estimate(meta, state, data, jax.random.key(i))
        (which,) = np.flatnonzero(np.asarray(state[0].student.step) != ages)
        now = np.asarray(state[0].student.fast["w"])
        changed = (now != starts).all(-1).tolist()
        over = turns[which] > 0 and turns[which] % 2 == 0
        assert changed == [over and which == j for j in range(2)]
        assert not over or tuple(now[which]) not in seen
        seen, starts = [*seen, *([tuple(now[which])] if over else [])], now
        turns[which] += 1
    assert len(seen) >= 4  # two at first, and as many who followed them


def test_gradient_through_gumbel_draws_is_that_of_central_differences():
    data, meta, key = episodes(), teacher_params(), jax.random.key(0)
    mg = soft_teacher(student(), BOTH, relax=relaxations.gumbel_softmax(0.7))
    state = mg.init(meta, None)
    estimate = jax.jit(lambda m, key: mg.estimate(m, state, data, key))
    grads, other = (estimate(meta, k)[0] for k in (key, jax.random.key(1)))
    slopes = differences(lambda m: estimate(m, key)[2].loss, meta)
    assert relative_error(grads, slopes) < 1e-6
    assert relative_error(other, grads) > 0.1  # the draws are those of the key


@pytest.mark.parametrize("kind", ["straight through", "hard Gumbel"])
def test_one_hot_draws_have_the_derivative_of_their_distribution(kind):
    """By hand: the slope in what was written, times the Jacobian of a softmax."""
    data, meta, key = episodes(micro=1), teacher_params(), jax.random.key(0)
    relax, heat = relaxations.straight_through, 1.0
    if kind == "hard Gumbel":
        relax, heat = relaxations.gumbel_softmax(0.7, hard=True), 0.7
    # One key for whatever is asked, so that the draws are known here.
    known = lambda scores, _: relax(scores, key)  # noqa: E731
    grads, after, info = estimated(soft_teacher(student(), BOTH, relax=known), meta, data)
    tokens = data.support["tokens"][0]

    @jax.jit
    def by_hand(meta):
        scores = {name: meta[name][tokens] for name in meta}
        noise = jax.random.gumbel(key, scores["inputs"].shape, scores["inputs"].dtype)
        chosen = {n: (s + noise).argmax(-1) for n, s in scores.items()}
        if kind == "straight through":
            chosen = {n: relaxations.draw(s, key) for n, s in scores.items()}
        drawn = {n: jax.nn.one_hot(each, VOCAB) for n, each in chosen.items()}

        def pre_trained(written):
            pseudo = {"tokens": written["inputs"], "labels": written["labels"]}
            ones = jnp.ones(tokens.shape)
            slope = jax.grad(lambda p: loss(p, {**pseudo, "mask": ones, "weights": ones}, None)[0])
            return jax.tree.map(lambda p, g: p - 0.3 * g, start(), slope(start()))

        value, slopes = jax.value_and_grad(lambda w: scored(pre_trained(w), at(data, 0)))(drawn)
        table = {}
        for name, g in slopes.items():
            shift = noise if kind == "hard Gumbel" else jnp.zeros_like(noise)
            p = jnp.exp((scores[name] + shift) / heat)
            p = p / p.sum(-1, keepdims=True)
            through = p * (g - (p * g).sum(-1, keepdims=True)) / heat
            table[name] = jnp.zeros((VOCAB, VOCAB)).at[tokens].add(through)
        return value, pre_trained(drawn), table

    value, params, expected = by_hand(meta)
    assert abs(float(info.loss - value)) < 1e-12
    assert relative_error(after.student.fast, params) < 1e-12
    assert relative_error(grads, expected) < 1e-12
