"""A few random kills; ``benchmarks/kill_soak.py`` has fifty."""

import json

import numpy as np
import pytest

from benchmarks import kill_soak
from benchmarks.kill_soak import soak
from jmeta.runtime import report


@pytest.mark.slow
def test_kills_at_random_moments_cost_only_time(tmp_path):
    found = soak(tmp_path, kills=5, steps=150, rng=np.random.default_rng())
    assert {row["metric"] for row in kill_soak.rows_of(found, 0)} >= kill_soak.WANTED.keys()
    assert found["completed_checkpoints_lost"] == 0, found
    assert found["examples_repeated"] == found["examples_skipped"] == 0, found
    assert found["same_examples_in_the_same_order"], found
    assert found["steps_that_saw_two_batches"] == 0, found
    assert found["final_state_equal_bit_for_bit"], found


FOUND = {"kills": 3, "steps": 72, "checkpoint_every": 4, "steps_done_again": 5,
         **{name.replace(" ", "_"): value for name, value in kill_soak.WANTED.items()}}  # fmt: skip


def soaked(found, out, monkeypatch):
    """The results of the command where every soak finds the same."""
    monkeypatch.setattr(kill_soak, "soak", lambda folder, kills, steps, rng: dict(found))
    kill_soak.main(["--kills", "3", "--seeds", "2", "--first-seed", "7", "--out", str(out)])
    return report.read_results(out)


def test_what_it_found_is_written_as_results_beside_their_command(tmp_path, monkeypatch, capsys):
    results = soaked(FOUND, tmp_path, monkeypatch)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"].startswith("python -m benchmarks.kill_soak --kills 3 --seeds 2")
    values = {row["metric"]: row["value"] for row in results["rows"] if row["seed"] == 8}
    assert values.pop("seconds") >= 0
    assert values == {"steps done again": 5.0, **kill_soak.WANTED}
    settings = {(row["seed"], row["kills"], row["steps"]) for row in results["rows"]}
    assert settings == {(7, 3, 72), (8, 3, 72)}
    assert {row["metric"]: row["mean"] for row in results["summary"]}.items() >= values.items()
    assert "Nothing was lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"completed_checkpoints_lost": 2}, "MISSED: completed checkpoints lost 2 (seed 7)"),
        ({"final_state_equal_bit_for_bit": False}, "MISSED: final state equal bit for bit 0"),
    ],
)
def test_what_was_lost_is_said(tmp_path, monkeypatch, capsys, changed, said):
    soaked(FOUND | changed, tmp_path, monkeypatch)
    assert said in capsys.readouterr().out


def test_what_is_not_counted_is_no_success():
    rows = [{"metric": name, "seed": 0, "value": value} for name, value in kill_soak.WANTED.items()]
    assert kill_soak.verdict(rows).startswith("Nothing was lost")
    assert kill_soak.verdict(rows[1:]) == "MISSED: completed checkpoints lost is not counted"


@pytest.mark.parametrize(
    ("given", "said"), [("--kills=0", "at least 1"), ("--resume", "one piece")]
)
def test_settings_that_cannot_be_are_refused(given, said, capsys):
    with pytest.raises(SystemExit):
        kill_soak.main([given])
    assert said in capsys.readouterr().err
