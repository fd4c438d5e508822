"""A few random kills; ``benchmarks/kill_soak.py`` has fifty."""

import json
import sys

import numpy as np
import pytest

from benchmarks import kill_soak
from benchmarks.kill_soak import soak
from jmeta.runtime import report


@pytest.mark.slow
def test_kills_at_random_moments_cost_only_time(tmp_path):
    found = soak(tmp_path, kills=5, steps=150, rng=np.random.default_rng())
    assert found["completed_checkpoints_lost"] == 0, found
    assert found["examples_repeated"] == found["examples_skipped"] == 0, found
    assert found["same_examples_in_the_same_order"], found
    assert found["steps_that_saw_two_batches"] == 0, found
    assert found["final_state_equal_bit_for_bit"], found


def test_what_it_found_is_written_as_results_beside_their_command(tmp_path, monkeypatch):
    found = {"kills": 3, "steps": 72, "checkpoint_every": 4, "steps_done_again": 5,
             "completed_checkpoints_lost": 0, "final_state_equal_bit_for_bit": True}  # fmt: skip
    monkeypatch.setattr(kill_soak, "soak", lambda folder, kills, steps, rng: dict(found))
    given = ["--kills", "3", "--seed", "7", "--out"]
    for out, beside in (("soak.json", "soak.run.json"), ("run", "run/run.json")):
        monkeypatch.setattr(sys, "argv", ["kill_soak", *given, str(tmp_path / out)])
        kill_soak.main()
        run = json.loads((tmp_path / beside).read_text())
        assert run["command"].startswith("python -m benchmarks.kill_soak --kills 3 --seed 7 --out")
    results = report.read_results(tmp_path / "soak.json")
    values = {row["metric"]: row["value"] for row in results["rows"]}
    assert values.pop("seconds") >= 0
    assert values == {"steps done again": 5.0, "completed checkpoints lost": 0.0,
                      "final state equal bit for bit": 1.0}  # fmt: skip
    assert {(row["seed"], row["kills"], row["steps"]) for row in results["rows"]} == {(7, 3, 72)}
    assert {row["metric"]: row["mean"] for row in results["summary"]}.items() >= values.items()
