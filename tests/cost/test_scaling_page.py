"""docs/scaling.md says what the committed plans say, and its arithmetic counts real weights."""

import math

import jax
import pytest

from benchmarks import readme, scaling, tpu_plans, tpu_reductions
from jmeta.cost.rows import Row
from jmeta.cost.shapes import MODELS, setting
from jmeta.runtime import report


def test_the_page_holds_the_committed_plans():
    text = scaling.PAGE.read_text(encoding="utf-8")
    filled = readme.fill(text, dict(scaling.places(scaling.found())))
    assert text == filled, "run: python -m benchmarks.scaling"


def test_the_bounds_hold_in_the_committed_plans():
    plans = scaling.found()
    fits = {
        (f.row.candidate.options["model"], f.row.topology, f.method): f.row.fits
        for f in plans if f.part == "fits"
    }  # fmt: skip
    for model, topology in (("gpt2-124m", "v5e:16x16"), ("gpt2-774m", "v5e:4x4")):
        assert not fits[model, topology, "naive"]
        assert fits[model, topology, "mixed mode"] or fits[model, topology, "nested"]
    for f in (f for f in plans if f.part == "traffic"):
        meta = 4 * scaling.weights(MODELS[f.row.candidate.options["model"]])
        reduced = sum(v[1] for v in f.row.traffic.values()) / (2 * 255 / 256)
        assert meta <= reduced <= meta + 1024
        assert sum(v[2] for v in f.row.traffic.values()) == 0


def test_every_estimator_reduces_once_in_the_committed_programs():
    rows = report.read_results(scaling.RESULTS / "tpu_reductions.json")["rows"]
    metrics = {"collectives": 1, "inside loops": 0}
    asked = [
        (name, microbatch, metric, value)
        for name in tpu_reductions.ESTIMATORS
        for microbatch in (None, 1)
        for metric, value in metrics.items()
    ]
    assert [(r["method"], r["microbatch"], r["metric"], r["value"]) for r in rows] == asked
    gradient = {f"f32[{','.join(map(str, shape))}]" for shape in tpu_reductions.SHAPES.values()}
    for row in rows:
        assert row["kinds"] == "all-reduce"
        arrays = [shape for shape in row["shapes"].split() if shape != "f32[]"]
        assert sorted(arrays) == sorted([*gradient, f"f32[{tpu_reductions.STEPS}]"])


def test_the_committed_numbers_are_those_of_the_plans():
    plans = tpu_plans.read(scaling.PLANS)
    rows = [row for plan in plans for row in tpu_plans.rows_of(plan)]
    assert report.read_results(scaling.RESULTS / "tpu_plans.json")["rows"] == rows


def test_plans_survive_a_file_and_what_was_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    asked = []

    def compiler(reference, candidate, *, steps, topology):
        asked.append(candidate)
        flops = math.nan if candidate.tasks == 512 else 2e12  # one has no answer
        traffic = {"all-reduce": [1, 2.0**30, 0.0]}
        return Row(candidate, topology, 3 * 2**30, 2**30, 2**31, 2**34, True, flops, traffic, 1.0)

    monkeypatch.setattr(tpu_plans, "in_a_child", compiler)
    monkeypatch.setattr(tpu_plans, "require_libtpu", lambda: None)
    arguments = ["--preset", "smoke", "--out", str(tmp_path)]
    tpu_plans.main(arguments)
    assert [candidate.tasks for candidate in asked] == [256, 512]
    rows = report.read_results(tmp_path)["rows"]
    assert {row["metric"]: row["value"] for row in rows} == {
        "GiB": 3.0, "TFLOP": 2.0, "GiB sent": 1.0
    }  # fmt: skip
    kept = tpu_plans.read(tmp_path / "plans.json")
    assert [plan.row.candidate.tasks for plan in kept] == [256]
    tpu_plans.main([*arguments, "--resume"])
    assert [candidate.tasks for candidate in asked] == [256, 512, 512]
    assert tpu_plans.read(tmp_path / "plans.json") == kept
    with pytest.raises(SystemExit, match="2"):
        tpu_plans.main([*arguments, "--parts", "tables"])


@pytest.mark.parametrize("model", [name for name, shape in MODELS.items() if shape.causal])
def test_the_arithmetic_counts_the_weights_there_are(model):
    leaves = jax.tree.leaves(setting(model, tokens=64).meta)
    assert scaling.weights(MODELS[model]) == sum(leaf.size for leaf in leaves)


def test_every_cell_is_asked_for_once():
    keys = [(cell.part, tpu_plans.key_of(cell)) for cell in tpu_plans.cells()]
    assert len(set(keys)) == len(keys)
