"""What experiments share: a run folder belongs to one set of settings."""

import dataclasses

import pytest

from experiments._shared import record
from jmeta.runtime import config as configuration


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Settings of a run."""

    rate: float = 0.1
    """A number that changes results."""


def asked(out, *flags):
    return configuration.parse(Config, ["--out", str(out), *flags])


@pytest.mark.parametrize("kept", ["maml-0/metrics.jsonl", "runs/a/scored.json", "grid-1.json"])
def test_a_run_does_not_go_on_under_other_settings(tmp_path, kept):
    out = tmp_path / "run"
    record(asked(out), "seeds")
    record(asked(out, "--rate", "0.2"), "seeds")  # nothing was made yet
    (out / kept).parent.mkdir(parents=True, exist_ok=True)
    (out / kept).write_text("{}\n")
    before = (out / "config.yaml").read_bytes()
    for flags in (["--rate", "0.3"], ["--rate", "0.3", "--resume"]):
        with pytest.raises(SystemExit, match=r"other settings \(rate 0.2, now 0.3\): choose anoth"):
            record(asked(out, *flags), "seeds")
        assert (out / "config.yaml").read_bytes() == before
    with pytest.raises(SystemExit, match="seeds 1, now 2"):
        record(asked(out, "--rate", "0.2", "--seeds", "2"))
    record(asked(out, "--rate", "0.2", "--seeds", "2", "--resume"), "seeds")
    assert configuration.load(out / "config.yaml", Config).seeds == 2


def test_what_is_complete_is_not_asked_for_its_settings_again(tmp_path):
    """A first run that never reads a setting is told so; its continuation may have no need to."""
    with pytest.raises(configuration.ConfigError, match="--rate"):
        with configuration.track(asked(tmp_path, "--rate", "0.2")) as config:
            record(config)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with configuration.track(asked(tmp_path, "--rate", "0.2", "--resume")) as config:
        record(config)
