"""What a teacher is told: the judge is the one that teachers follow; verdicts are counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import drawn

from experiments import _teacher_shared, two_moons, two_moons_judge
from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
from experiments._two_moons_gradients import COSINE, EXACT, FIRST, OVERFLOW, log_norm, slopes
from experiments.two_moons_judge import ACCURACY, LOSS, judged, labelled_episodes, said_by
from jmeta import methods
from jmeta.models import masked_lm
from jmeta.runtime.report import read_results
from jmeta.runtime.statistics import summarise

SMOKE = ["--preset", "smoke"]


@pytest.fixture(scope="module")
def data():
    return data_of.load(20, 40)


@pytest.fixture(scope="module")
def student(data):
    """Random weights of one student."""
    given = two_moons.PRESETS["smoke"]
    shapes = jax.eval_shape(
        lambda: jax.tree.map(lambda leaf: leaf[0], two_moons.fresh_students(given, data))
    )
    return drawn(shapes, spread=0.1)


@pytest.fixture(scope="module")
def scores(data):
    """What judges of a number of steps say of parameters: a program for each number."""

    @functools.cache
    def of(steps):
        judge = judged(two_moons.PRESETS["smoke"], data, (steps,))
        return jax.jit(jax.vmap(judge, in_axes=(None, 0, None)))

    return of


@pytest.mark.parametrize(("steps", "rate", "among"), [(1, 0.1, True), (2, 0.03, False)])
def test_a_judge_says_what_a_teacher_follows(data, student, scores, steps, rate, among):
    config = two_moons_judge.PRESETS["smoke"]
    given = two_moons.PRESETS["smoke"]
    episodes = labelled_episodes(config, data, 0, 10, 4, among=among)
    settings = two_moons.Config(
        inner_rate=rate, support_steps=steps, among_classes=among, mlm_task=()
    )
    shape = methods_of.network(given, data)
    loss = functools.partial(masked_lm.loss, shape)
    followed = methods.fine_tuned(_teacher_shared.student(settings, shape, loss))
    expected = jax.jit(followed)(student, (), episodes, None)[0]
    found = jax.tree.map(np.asarray, scores(steps)(student, episodes, np.float32(rate)))
    assert found[LOSS].shape == found[ACCURACY].shape == (config.draws, 1)
    np.testing.assert_allclose(found[LOSS].mean(), expected, rtol=1e-5)


def test_accuracy_is_that_of_the_label_with_the_greater_score(data, student, scores):
    config = two_moons_judge.PRESETS["smoke"]
    params = jax.tree.map(np.array, student)
    # Nothing but the bias of the head tells the two labels apart: all points are the first moon.
    first = data_of.label_tokens(data)[0]
    params["head"]["bias"][first] = 50.0
    episodes = labelled_episodes(config, data, 0, 10, 4, among=True)
    right = scores(1)(params, episodes, np.float32(0.0))[ACCURACY][:, 0]
    share = (episodes.query["labels"][:, :, 0] == first).mean(1)
    np.testing.assert_allclose(right, share)
    assert 0 < share.mean() < 1


def test_gradients_are_those_of_the_loss_and_of_the_last_weights(data, student):
    config, given = two_moons_judge.PRESETS["smoke"], two_moons.PRESETS["smoke"]
    episodes = labelled_episodes(config, data, 0, 10, 4, among=True)
    episode, rate = jax.tree.map(lambda leaf: leaf[0], episodes), 0.05
    found = jax.jit(slopes(given, data, (1, 2)))(student, episode, np.float32(rate))
    # Exact: through a loop written out. First order: the gradient where it ends.
    loss = functools.partial(masked_lm.loss, methods_of.network(given, data))
    gradient = jax.grad(lambda params, batch: loss(params, batch, None)[0])

    def step(params):
        grads = gradient(params, episode.support)
        shrink = jnp.minimum(1.0, 5.0 / optax.tree.norm(grads))
        return jax.tree.map(lambda p, g: p - rate * shrink * g, params, grads)

    def told(params, steps):
        for _ in range(steps):
            params = step(params)
        return loss(params, episode.query, None)[0]

    params = student
    for at in (0, 1):
        exact = jax.jit(jax.grad(told), static_argnums=1)(student, at + 1)
        params = jax.jit(step)(params)
        first = jax.jit(gradient)(params, episode.query)
        norms = [float(optax.tree.norm(tree)) for tree in (exact, first)]
        cosine = float(optax.tree.vdot(exact, first)) / norms[0] / norms[1]
        np.testing.assert_allclose(10 ** found[EXACT][at], norms[0], rtol=1e-3)
        np.testing.assert_allclose(10 ** found[FIRST][at], norms[1], rtol=1e-3)
        np.testing.assert_allclose(found[COSINE][at], cosine, rtol=1e-3)
        assert cosine < 0.9999  # they are told apart


def test_a_norm_whose_square_overflows_is_still_a_number():
    values = {"a": np.float32([3e30, 0.0]), "b": np.float32([4e30])}
    size, direction = log_norm(values)
    np.testing.assert_allclose(size, np.log10(5e30), rtol=1e-6)
    np.testing.assert_allclose(direction, [0.6, 0.0, 0.8], rtol=1e-6)
    for lost in (np.inf, np.nan):
        size, direction = log_norm({"a": np.float32([lost, 1.0])})
        assert size == np.float32(OVERFLOW)
        np.testing.assert_array_equal(direction, 0.0)
    size, direction = log_norm({"a": np.zeros(2, np.float32)})
    assert -38 < size < -37  # the smallest that float32 has
    np.testing.assert_array_equal(direction, 0.0)


def test_verdicts_are_counted_where_they_are_certain():
    rows = [
        {"method": method, "seed": seed, "metric": LOSS, "value": value, "rate": rate}
        for rate, values in enumerate([(1.0, 2.0), (1.0, 0.5), (1.0, 1.0)])
        for method, value in zip(("no pre-training", "mlm"), values, strict=True)
        for seed in range(3)
    ]
    rows[-1]["value"] = 1.3  # one seed of three: not certain
    said = said_by(summarise(rows, baseline="no pre-training"))
    assert said.startswith("Of 3 judges 1 have the lower loss for students without pre-training")
    assert "and 1 for those of MLM" in said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"support_steps": ()}, r"support_steps=\(\): choose more than 0"),
        ({"inner_rates": (0.1, 0.0)}, "inner_rates=.*: choose more than 0"),
        ({"draws": 0}, "draws=0"),
        ({"gradient_draws": -1}, "gradient_draws=-1: 0 or more"),
        ({"labels": (10,), "examples": (6,)}, "at most half of it"),
        ({"labels": (10,)}, "one number for each"),
        ({"samples": 1000}, "samples=1000 is no multiple"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        two_moons_judge.Config(**fields)


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_names_and_judges_again_without_training(tmp_path):
    out = tmp_path / "judge"
    two_moons_judge.main([*SMOKE, "--out", str(out)])
    found = read_results(out)
    assert {row["method"] for row in found["rows"]} == {"mlm", "no pre-training"}
    for name in (
        "report.html",
        "differences.png",
        "gradients.svg",
        "metrics.jsonl",
        "run.json",
        "config.yaml",
    ):
        assert (out / name).stat().st_size > 0
    # Other judges of the same students; one of them said the same before.
    two_moons_judge.main(
        [*SMOKE, "--support-steps", "1", "--draws", "3", "--resume", "--out", str(out)]
    )
    again = read_results(out)["rows"]

    def setting(row):
        return tuple(sorted((key, str(value)) for key, value in row.items() if key != "value"))

    # To rounding: a program of fewer steps is another program.
    before = {setting(row): row["value"] for row in found["rows"]}
    assert len(again) < len(before)
    for row in again:
        assert row["value"] == pytest.approx(before[setting(row)], rel=1e-5)
