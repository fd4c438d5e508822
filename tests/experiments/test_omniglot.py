"""The Omniglot experiment: its network against lax.conv, its baselines, and a whole smoke run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _omniglot_model, omniglot
from jmeta.core.types import Episode
from jmeta.models import conv
from jmeta.runtime.report import read_results


def test_without_data_one_sentence_says_the_three_ways_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("JMETA_DATA", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as stopped:
        omniglot.main(["--preset", "smoke", "--out", str(tmp_path / "run")])
    message = str(stopped.value)
    assert "\n" not in message
    for way in ("omniglot28.npz", ".zip", "tfds"):
        assert way in message


def test_a_method_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"reptilian.*maml, fomaml"):
        omniglot.Config(methods=("reptilian",))
    with pytest.raises(ValueError, match=r"network strides.*stride and pool"):
        omniglot.Config(network="strides")


def test_strided_features_are_those_of_xla_convolutions():
    params = jax.jit(lambda key: conv.init(key, classes=5, filters=6))(jax.random.key(0))
    x = np.random.default_rng(1).normal(size=(4, 28, 28, 1)).astype(np.float32)

    @jax.jit
    def convolved(params, states):
        for i in range(4):
            block = params[f"block{i}"]
            y = jax.lax.conv_general_dilated(
                states, block["kernel"], (2, 2), ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            states = jax.nn.relu(conv.batch_norm(y, block["scale"], block["bias"]))
        return states

    expected = np.asarray(convolved(params, x))
    assert expected.shape == (4, 2, 2, 6)
    found = jax.jit(_omniglot_model.strided_features)(params, x)
    np.testing.assert_allclose(found, expected.mean((1, 2)), rtol=1e-5, atol=1e-5)


def test_the_nearest_drawing_by_cosine():
    def batch(x, y):
        return {"x": jnp.float32([x]), "y": jnp.int32([y])}

    # The second query is nearer to class 0 by distance and to class 1 by angle.
    support, query = batch([[1, 0], [0, 9]], [0, 1]), batch([[3, 1], [0.1, 0.5]], [0, 1])
    assert omniglot.nearest(lambda x: x, Episode(support, query)).tolist() == [1.0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import os

    if not os.environ.get("JMETA_DATA"):
        pytest.skip("JMETA_DATA is not set: this test reads Omniglot from that folder")
    out = tmp_path_factory.mktemp("runs") / "omniglot"
    omniglot.main(["--preset", "smoke", "--out", str(out)])
    return out


@pytest.mark.slow
def test_a_run_leaves_everything_the_contract_names(run):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html", "adaptation.png",
                 "learning.svg", "differences.png"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert "transductive" in (run / "report.html").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert {line["method"] for line in lines} == {"maml, seed 0", "fomaml, seed 0"}


@pytest.mark.slow
def test_results_pair_every_method_with_exact_maml_on_the_same_episodes(run):
    results = read_results(run)
    rows = {row["method"]: row for row in results["rows"] if row["metric"] == "accuracy"}
    assert list(rows) == ["maml", "fomaml", "no meta-training", "prototypes, random features",
                          "nearest neighbour, pixels"]  # fmt: skip
    assert {len(row["values"]) for row in rows.values()} == {6}
    for row in results["summary"]:
        if row["metric"] == "accuracy":
            assert row["mean"] == pytest.approx(np.mean(rows[row["method"]]["values"]))
            assert row["over"] == "episodes"
            if row["method"] != "maml":
                pairs = zip(rows[row["method"]]["values"], rows["maml"]["values"], strict=True)
                difference = np.mean([a - b for a, b in pairs])
                assert row["paired_difference"] == pytest.approx(difference, abs=1e-9)
    spent = [row for row in results["rows"] if row["metric"] == "training CPU minutes"]
    assert len(spent) == 2
    assert all(0 < row["value"] < 10 for row in spent)


@pytest.mark.slow
def test_the_pixel_baseline_against_numpy(run):
    config = omniglot.PRESETS["smoke"]
    test = omniglot.sample(config, omniglot.omniglot()["test"], 6, omniglot.TEST)
    scores = []
    for i in range(6):
        support, query = (np.asarray(part["x"][i]).reshape(-1, 784) for part in test)
        support = support / np.linalg.norm(support, axis=1, keepdims=True)
        chosen = np.asarray(test.support["y"][i])[(query @ support.T).argmax(1)]
        scores.append(np.mean(chosen == np.asarray(test.query["y"][i])))
    rows = read_results(run)["rows"]
    [row] = [row for row in rows if row["method"] == "nearest neighbour, pixels"]
    np.testing.assert_allclose(row["values"], scores, atol=1e-6)
