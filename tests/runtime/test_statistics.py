"""Intervals against published t-quantiles, their coverage, and pairing worked out by hand."""

import math

import numpy as np
import pytest

from jmeta.runtime import statistics


@pytest.mark.parametrize(
    ("n", "confidence", "quantile"),
    # Student's table: degrees of freedom n - 1, two-sided.
    [(2, 0.95, 12.706), (3, 0.95, 4.303), (6, 0.95, 2.571), (11, 0.95, 2.228),
     (31, 0.95, 2.042), (6, 0.99, 4.032), (11, 0.90, 1.812), (1001, 0.95, 1.962)],
)  # fmt: skip
def test_mean_ci_uses_students_quantiles(n, confidence, quantile):
    x = np.random.default_rng(n).normal(3.0, 2.0, n)
    mean, half_width, count = statistics.mean_ci(x, confidence)
    assert (count, mean) == (n, pytest.approx(sum(x) / n))
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / (n - 1))
    assert half_width / (deviation / math.sqrt(n)) == pytest.approx(quantile, abs=6e-4)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        mean, half_width, _ = statistics.mean_ci(rng.normal(1.5, 3.0, 5))
        covered += abs(mean - 1.5) <= half_width
    assert 0.93 <= covered / 2000 <= 0.97


def test_pairing_removes_what_the_episodes_share():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 1.0, 400)
    a = difficulty + 0.1 + rng.normal(0, 0.05, 400)
    b = difficulty + rng.normal(0, 0.05, 400)
    difference = statistics.paired_ci(a, b)
    assert abs(difference.mean - 0.1) < difference.half_width * 1.5
    # sqrt(2) * 0.05 * 1.966 / 20, against sqrt(2) * 1.96 / 20 = 0.14 unpaired.
    assert difference.half_width == pytest.approx(0.00695, rel=0.1)
    with pytest.raises(ValueError, match="same seeds or episodes"):
        statistics.paired_ci([1.0, 2.0], [1.0])


def test_one_value_has_no_interval_and_a_diverged_one_no_mean():
    assert statistics.mean_ci([0.7]) == (0.7, None, 1)
    diverged = statistics.mean_ci([0.7, math.nan])
    assert math.isnan(diverged.mean)
    assert diverged.half_width is None
    for bad in ([], [[1.0]]):
        with pytest.raises(ValueError, match="non-empty"):
            statistics.mean_ci(bad)
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.mean_ci([1.0, 2.0], 95)


def row(method, seed, value=None, metric="accuracy", **settings):
    return {"method": method, "seed": seed, "metric": metric, "value": value} | settings


def test_several_seeds_are_paired_by_seed_whatever_their_order():
    rows = [row("a", s, v) for s, v in [(0, 0.5), (1, 0.7), (2, 0.6)]]
    rows += [row("b", s, v) for s, v in [(2, 0.5), (0, 0.4), (1, 0.6)]]
    a, b = statistics.summarise(rows, baseline="b")
    assert a == {
        "method": "a",
        "metric": "accuracy",
        "mean": pytest.approx(0.6),
        "ci95": pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5),
        "n": 3,
        "over": "seeds",
        "baseline": "b",
        "paired_difference": pytest.approx(0.1),
        "paired_ci95": pytest.approx(0.0, abs=1e-12),
    }
    assert (b["baseline"], b["paired_difference"], b["paired_ci95"]) == ("b", None, None)


def test_one_seed_uses_its_episodes_and_several_seeds_do_not():
    episodes = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 0.0, 1.0, 0.0]}
    rows = [row(m, 7, values=v) for m, v in episodes.items()]
    a, _ = statistics.summarise(rows, baseline="b")
    assert (a["mean"], a["n"], a["over"]) == (0.75, 4, "episodes")
    assert a["ci95"] == pytest.approx(3.18245 * 0.5 / 2, rel=1e-5)
    assert a["paired_difference"] == 0.5
    assert a["paired_ci95"] == pytest.approx(3.18245 * math.sqrt(1 / 3) / 2, rel=1e-5)
    rows += [row(m, 8, value=0.5, values=v) for m, v in episodes.items()]
    a, _ = statistics.summarise(rows, baseline="b")
    assert (a["mean"], a["n"], a["over"]) == (0.625, 2, "seeds")
    assert a["paired_difference"] == pytest.approx((0.5 + 0.0) / 2)


def test_one_seed_without_episodes_has_null_intervals():
    a, _ = statistics.summarise([row("a", 0, 0.75), row("b", 0, 0.5)], baseline="b")
    assert (a["ci95"], a["n"], a["paired_difference"], a["paired_ci95"]) == (None, 1, 0.25, None)


def test_settings_are_summarised_apart_and_the_baseline_fits_the_setting():
    rows = [row("maml", 0, 0.1 * k, steps=k, source="x") for k in (1, 5)]
    rows += [row("transfer", 0, 0.01 * k, steps=k, source="x") for k in (1, 5)]
    rows += [row("maml", 0, 0.9, steps=5, source="y"), row("maml", 0, 3.0, metric="seconds")]
    by_setting = {
        (s["method"], s.get("source"), s.get("steps")): s
        for s in statistics.summarise(rows, baseline="transfer")
    }
    assert by_setting["maml", "x", 1]["paired_difference"] == pytest.approx(0.09)
    assert by_setting["maml", "x", 5]["paired_difference"] == pytest.approx(0.45)
    assert by_setting["maml", "y", 5]["baseline"] is None
    assert by_setting["maml", None, None]["baseline"] is None
    rows = [r for r in rows if r["method"] == "maml"] + [row("majority", 0, 0.2, source="x")]
    for summary in statistics.summarise(rows, baseline="majority"):
        if summary["method"] == "maml" and summary.get("source") == "x":
            assert summary["paired_difference"] == pytest.approx(0.1 * summary["steps"] - 0.2)


def test_a_diverged_seed_is_never_dropped():
    rows = [row("a", 0, 0.5), row("a", 1, math.nan), row("b", 0, 0.5), row("b", 1, 0.5)]
    a, b = statistics.summarise(rows, baseline="b")
    assert (a["mean"], a["ci95"], a["n"], a["paired_difference"]) == (None, None, 2, None)
    assert b["mean"] == 0.5
    assert statistics.summarise([row("a", 0, None)])[0]["mean"] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", 0, 1.0), {"method": "a", "seed": 1, "value": 2}], r"rows\[1\] has no 'metric'"),
        ([{"method": "a", "seed": 1, "metric": "x"}], r"rows\[0\] has no 'value'"),
        ([row("a", 0, 1.0), row("a", 0, 2.0)], r"rows\[1\] repeats method 'a'"),
        ([row("transfr", 0, 1.0)], "Did you mean 'transfr'"),
        ([row("a", 0, 1.0), row("transfer", 1, 1.0)], r"'a' has seeds \[0\].*'transfer' has \[1\]"),
        ([row("a", 0, values=[1.0]), row("transfer", 0, values=[1.0, 2.0])], "same episodes"),
    ],
)
def test_errors_name_the_row_and_the_key(rows, message):
    with pytest.raises(ValueError, match=message):
        statistics.summarise(rows, baseline="transfer")
