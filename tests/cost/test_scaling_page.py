"""docs/scaling.md says what the committed plans say, and its arithmetic counts real weights."""

import json

import jax
import pytest

from benchmarks import readme, scaling, tpu_plans, tpu_reductions
from jmeta.cost.shapes import MODELS, setting


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
    rows = json.loads((scaling.PLANS.parent / "tpu_reductions.json").read_text())["rows"]
    asked = [(name, microbatch) for name in tpu_reductions.ESTIMATORS for microbatch in (None, 1)]
    assert [(row["estimator"], row["microbatch"]) for row in rows] == asked
    gradient = {f"f32[{','.join(map(str, shape))}]" for shape in tpu_reductions.SHAPES.values()}
    for row in rows:
        assert row["kinds"] == ["all-reduce"]
        assert row["collectives"] == 1
        assert row["inside loops"] == 0
        arrays = [shape for shape in row["shapes"] if shape != "f32[]"]
        assert sorted(arrays) == sorted([*gradient, f"f32[{tpu_reductions.STEPS}]"])


@pytest.mark.parametrize("model", [name for name, shape in MODELS.items() if shape.causal])
def test_the_arithmetic_counts_the_weights_there_are(model):
    leaves = jax.tree.leaves(setting(model, tokens=64).meta)
    assert scaling.weights(MODELS[model]) == sum(leaf.size for leaf in leaves)


def test_every_cell_is_asked_for_once():
    keys = [(cell.part, tpu_plans.key_of(cell)) for cell in tpu_plans.cells()]
    assert len(set(keys)) == len(keys)
