"""What a teacher is told: the judge is the one that teachers follow; verdicts are counted."""

import functools

import jax
import numpy as np
import pytest
from quick_numbers import drawn

from experiments import _teacher_shared, two_moons, two_moons_judge
from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
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
    for name in ("report.html", "differences.png", "metrics.jsonl", "run.json", "config.yaml"):
        assert (out / name).stat().st_size > 0
    # Other judges of the same students; one of them said the same before.
    two_moons_judge.main(
        [*SMOKE, "--support-steps", "1", "--draws", "3", "--resume", "--out", str(out)]
    )
    again = read_results(out)["rows"]
    before = {tuple(sorted(map(str, row.items()))) for row in found["rows"]}
    assert {tuple(sorted(map(str, row.items()))) for row in again} < before
