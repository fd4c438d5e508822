"""The adaptation curve: one loop, the same numbers as adapting anew for every point."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jmeta
from jmeta import Episode, Problem, Steps
from jmeta.cost import flops
from jmeta.runtime.evaluate import adaptation_values


def loss(fast, meta, batch, key):
    noise = 0.0 if key is None else 0.1 * jax.random.normal(key, ())
    gap = fast - batch
    return 0.5 * jnp.sum(gap**2) + noise, {"size": jnp.linalg.norm(gap), "gap": gap, "loss": 7.0}


PROBLEM = Problem(loss, loss, lambda meta: optax.sgd(0.3, momentum=0.5))
META = jnp.linspace(0.0, 1.0, 3)
TARGETS = jax.random.normal(jax.random.key(0), (2, 5, 3))
EPISODES = Episode(*TARGETS)
POINTS = (0, 1, 4)


@pytest.mark.parametrize("stepwise", [False, True])
def test_the_curve_equals_separate_adaptations(stepwise):
    episodes = EPISODES
    if stepwise:
        episodes = Episode(Steps(jax.random.normal(jax.random.key(1), (5, 4, 3))), TARGETS[1])
    curve = jmeta.evaluate(PROBLEM, META, episodes, POINTS, batch=2)  # 5 = 2 + 2 + 1
    assert curve.values["loss"].shape == (5, 3)
    assert set(curve.values) == {"loss", "size"}  # scalars alone, and the outer loss wins its name
    for i in range(5):
        support = jax.tree.map(lambda x, i=i: x[i], episodes.support)
        for j, steps in enumerate(POINTS):
            fast = jmeta.adapt(PROBLEM, META, support, steps)
            gap = np.asarray(fast - TARGETS[1, i], np.float64)
            assert curve.values["loss"][i, j] == pytest.approx(0.5 * gap @ gap, rel=1e-5)
            assert curve.values["size"][i, j] == pytest.approx(np.linalg.norm(gap), rel=1e-5)


def test_every_step_is_taken_once_and_the_query_read_once_a_point():
    def loss(fast, meta, batch, key):
        return jnp.mean((jnp.tanh(batch @ fast["w"]) @ fast["v"]) ** 2), {}

    problem = Problem(loss, loss, lambda meta: optax.sgd(0.1))
    meta = {"w": jnp.ones((4, 5)), "v": jnp.ones((5, 2))}
    episode, points = Episode(jnp.ones((6, 4)), jnp.ones((3, 4))), (0, 2, 3, 9)

    def operations(function, *arguments):
        return flops(jax.make_jaxpr(function)(*arguments))

    def step(meta, batch):
        return jax.grad(lambda fast: loss(fast, None, batch, None)[0])(meta)

    one_step = operations(step, meta, episode.support)
    one_score = operations(lambda m, b: loss(m, None, b, None)[0], meta, episode.query)
    whole = operations(lambda m, e: adaptation_values(problem, m, e, points), meta, episode)
    assert one_score > 0
    assert whole == 9 * one_step + 4 * one_score


def test_mean_and_interval_are_students():
    curve = jmeta.evaluate(PROBLEM, META, EPISODES, POINTS)
    values = curve.values["loss"]
    low, high = stats.t.interval(0.95, 4, values.mean(axis=0), stats.sem(values))
    np.testing.assert_allclose(curve.mean["loss"], values.mean(axis=0))
    np.testing.assert_allclose(curve.mean["loss"] - curve.ci95["loss"], low)
    np.testing.assert_allclose(curve.mean["loss"] + curve.ci95["loss"], high)


def test_an_episode_draws_the_same_noise_in_any_batch():
    key = jax.random.key(3)
    whole = jmeta.evaluate(PROBLEM, META, EPISODES, POINTS, key=key)
    parts = jmeta.evaluate(PROBLEM, META, EPISODES, POINTS, key=key, batch=2)
    np.testing.assert_allclose(parts.values["loss"], whole.values["loss"], rtol=1e-5)
    other = jmeta.evaluate(PROBLEM, META, EPISODES, POINTS, key=jax.random.key(4))
    assert np.abs(other.values["loss"] - whole.values["loss"]).min() > 1e-5


def test_errors_say_what_is_wrong():
    for steps in ((), (1, 1), (5, 0), (-1, 2)):
        with pytest.raises(ValueError, match="steps must increase from 0 or more"):
            jmeta.evaluate(PROBLEM, META, EPISODES, steps)
    with pytest.raises(ValueError, match="there are no episodes"):
        jmeta.evaluate(PROBLEM, META, Episode(TARGETS[0, :0], TARGETS[1, :0]))
    with pytest.raises(ValueError, match="this episode has none"):
        jmeta.evaluate(PROBLEM, META, Episode(TARGETS[0]))
    with pytest.raises(ValueError, match="4 inner steps are asked for, but Steps has fewer"):
        jmeta.evaluate(PROBLEM, META, Episode(Steps(TARGETS[0][:, None]), TARGETS[1]), POINTS)
