"""The cost of fast weights: what is timed scores as it should; bars are read off the runs."""

import json

import jax
import numpy as np

from benchmarks import fast_weights_cost as benchmark
from benchmarks.readme import RESULTS


def test_what_is_timed_scores_the_same_document_and_adapts_only_after_a_segment():
    config = benchmark.PRESETS["smoke"]
    evaluation = benchmark.programs(config)[benchmark.EVALUATION]
    losses = {
        name: np.asarray(jax.jit(run)(*given)).ravel() for name, (run, given) in evaluation.items()
    }
    static, dynamic = losses[benchmark.STATIC], losses[benchmark.DYNAMIC]
    first = config.segment
    np.testing.assert_allclose(dynamic[:first], static[:first], rtol=1e-5)
    assert np.abs(dynamic[first : 2 * first] - static[first : 2 * first]).max() > 1e-4
    assert len(losses[benchmark.FAST]) == len(static)


def test_the_committed_run_holds_the_bars_and_one_twice_as_slow_does_not():
    rows = json.loads((RESULTS / "fast_weights_cost.json").read_text(encoding="utf-8"))["rows"]
    lines = benchmark.bars(rows)
    assert len(lines) == len(benchmark.BARS)
    assert all("holds" in line for line in lines)
    slow = [
        {**row, "values": [2 * v for v in row["values"]]}
        if "values" in row and row["method"] == benchmark.FAST
        else row
        for row in rows
    ]
    assert any("MISSED" in line for line in benchmark.bars(slow))
