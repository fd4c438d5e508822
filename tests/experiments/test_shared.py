"""What experiments share: a run folder belongs to one set of settings."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._shared import kept, least, record, train_method
from jmeta import methods
from jmeta.core.types import Episode
from jmeta.runtime import config as configuration
from jmeta.runtime import fit


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Settings of a run."""

    rate: float = 0.1
    """A number that changes results."""


def asked(out, *flags):
    return configuration.parse(Config, ["--out", str(out), *flags])


@pytest.mark.parametrize("work", ["maml-0/metrics.jsonl", "runs/a/scored.json", "grid-1.json"])
def test_a_run_does_not_go_on_under_other_settings(tmp_path, work):
    out = tmp_path / "run"
    record(asked(out), "seeds")
    record(asked(out, "--rate", "0.2"), "seeds")  # nothing was made yet
    (out / work).parent.mkdir(parents=True, exist_ok=True)
    (out / work).write_text("{}\n")
    before = (out / "config.yaml").read_bytes()
    for flags in (["--rate", "0.3"], ["--rate", "0.3", "--resume"]):
        with pytest.raises(SystemExit, match=r"other settings \(rate 0.2, now 0.3\): choose anoth"):
            record(asked(out, *flags), "seeds")
        assert (out / "config.yaml").read_bytes() == before
    with pytest.raises(SystemExit, match="seeds 1, now 2"):
        record(asked(out, "--rate", "0.2", "--seeds", "2"))
    record(asked(out, "--rate", "0.2", "--seeds", "2", "--resume"), "seeds")
    assert configuration.load(out / "config.yaml", Config).seeds == 2


def test_a_field_that_is_newer_than_a_run_had_its_default(tmp_path):
    record(asked(tmp_path))
    file = tmp_path / "config.yaml"
    file.write_text(
        "".join(line for line in file.read_text().splitlines(True) if "rate" not in line)
    )
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=r"rate 0\.1, now 0\.2"):
        record(asked(tmp_path, "--rate", "0.2"))
    record(asked(tmp_path, "--resume"))
    assert configuration.load(file, Config).rate == 0.1


def test_what_is_complete_is_not_asked_for_its_settings_again(tmp_path):
    """A first run that never reads a setting is told so; its continuation may have no need to."""
    with pytest.raises(configuration.ConfigError, match="--rate"):
        with configuration.track(asked(tmp_path, "--rate", "0.2")) as config:
            record(config)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with configuration.track(asked(tmp_path, "--rate", "0.2", "--resume")) as config:
        record(config)


def test_training_that_is_complete_costs_nothing_to_read_again(tmp_path):
    def train(steps, *, resume):
        mg = methods.plain_gradient(lambda params, batch, key: ((params - batch).sum() ** 2, {}))
        batches = fit.from_function(lambda step: Episode(None, np.zeros(1, np.float32)))
        start = jnp.ones(1)
        return train_method(
            "a", mg, optax.sgd(0.1), start, batches, tmp_path / "a", resume=resume, steps=steps
        )

    first, again, longer = (train(steps, resume=True) for steps in (2, 2, 3))
    assert 0 < first.cpu_seconds == again.cpu_seconds < longer.cpu_seconds
    with pytest.raises(SystemExit, match="holds a run already: add --resume"):
        train(3, resume=False)
    assert train(3, resume=True).cpu_seconds == longer.cpu_seconds


def test_a_setting_that_diverges_is_never_the_least():
    losses = [[0.5, np.nan], [np.nan, 2.0], [0.4, 3.0]]
    assert least((0.1, 1.0, 10.0), losses).tolist() == [10.0, 1.0]


def test_what_is_kept_is_read_only_where_the_run_is_resumed(tmp_path):
    again = asked(tmp_path, "--resume")
    file = tmp_path / "seed-0.json"
    assert kept(asked(tmp_path), file) is None
    file.write_text('{"accuracy": 0.5}')
    assert kept(again, file) == {"accuracy": 0.5}
    with pytest.raises(SystemExit, match=f"{tmp_path} holds a run already: add --resume"):
        kept(asked(tmp_path), file)
