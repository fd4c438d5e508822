"""What committed results are there to show: a run that is published anew is held to it."""

import json

import pytest

from benchmarks import readme
from benchmarks import second_order_bars as judged


def committed(name):
    return json.loads((readme.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def summary_of(name, metric, **settings):
    """``{method: (mean, ci95)}`` of the committed rows with these settings."""
    wanted = {"metric": metric, **settings}
    rows = committed(name)["summary"]
    found = {
        row["method"]: (row["mean"], row["ci95"])
        for row in rows
        if all(row.get(key) == value for key, value in wanted.items())
    }
    assert found, f"{name} has no {metric} of {settings}"
    return found


def apart(greater, less):
    """Whether two intervals ``(mean, half width)`` do not touch, the first above."""
    return greater[0] - greater[1] > less[0] + less[1]


def test_what_second_order_takes_in_memory_and_to_compile():
    lines = judged.bars(committed("second_order_cost-lm")["rows"])
    missed = [line.partition(" (bar")[0].rpartition(" ")[0] for line in lines if "MISSED" in line]
    # Which docs/cost.md explains.
    assert missed == [
        "mixed_mode, block remat: time / unrolled without remat",
        "mixed_mode, block remat: time / first order",
        "mixed_mode, products kept: time / first order",
        "mixed_mode, products kept: time / unrolled without remat",
        "mixed_mode, block remat: memory / unrolled, layers looped",
        "mixed_mode, block remat: memory / unrolled, written out",
        "mixed_mode: compile time / first order, the least of any network",
        "unrolled, written out: time / first order",
        "mixed_mode, products kept: time / JAX, grad of a loop",
        "mixed_mode, nested: memory / JAX, grad of a loop",
        "mixed_mode, products kept: time / JAX, grad of a scan",
        "mixed_mode, nested: memory / JAX, grad of a scan",
    ]
    assert len(lines) >= 17


@pytest.mark.parametrize("shots", [5, 10])
def test_sinusoids_exact_maml_is_better_than_first_order_and_none(shots):
    found = summary_of("sinusoid-demo", "mse", shots=shots, test_steps=5)
    assert apart(found["fomaml"], found["maml"])
    assert apart(found["no meta-training"], found["maml"])


def test_the_demo_learns_and_compares_itself():
    found = summary_of("fewshot_text-demo", "accuracy")
    assert apart(found["maml"], found["no meta-training"])
    assert {"fomaml", "reptile", "anil", "transfer", "majority"} <= found.keys()
    [seconds] = [
        row["value"]
        for row in committed("fewshot_text-demo")["rows"]
        if (row["method"], row["metric"]) == ("the whole run", "phase wall seconds")
    ]
    assert seconds <= 300


def test_omniglot_reaches_95_per_cent():
    mean, _ = summary_of("omniglot-5way", "accuracy", ways=5, shots=1)["maml"]
    assert mean >= 0.95
