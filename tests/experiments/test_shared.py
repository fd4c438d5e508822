"""What experiments share: a run folder belongs to one set of settings."""

import dataclasses
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._shared import command_line, kept, least, record, scored_row, train_method
from jmeta import methods
from jmeta.core.types import Episode
from jmeta.runtime import cache, fit, report
from jmeta.runtime import config as configuration


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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_method_ends_the_program_and_says_how_to_go_on(tmp_path, sent):
    def train(folder, *, at=None, resume=False):
        def tell(step, state, info):
            if step == at:
                signal.raise_signal(sent)

        mg = methods.plain_gradient(lambda params, batch, key: ((params - batch).sum() ** 2, {}))
        batches = fit.from_function(lambda step: Episode(None, np.full(1, step, np.float32)))
        return train_method(
            "a", mg, optax.sgd(0.1), jnp.ones(1), batches, tmp_path / folder, resume=resume,
            steps=5, on_step=tell,
        )  # fmt: skip

    with pytest.raises(SystemExit, match="stopped at meta-step 2 of a: go on with --resume"):
        train("cut", at=2)
    whole, resumed = train("whole"), train("cut", resume=True)
    np.testing.assert_array_equal(whole.meta, resumed.meta)
    assert [row["step"] for row in resumed.history] == [row["step"] for row in whole.history]


@dataclasses.dataclass(frozen=True)
class Tiny(configuration.RunConfig):
    """An experiment of three meta-steps."""

    rate: float = 0.1
    """Of SGD."""
    towards: tuple[float, ...] = (1.0,)
    """Where the data lie."""


def tiny(config):
    record(config)

    def loss(params, batch, key):
        return ((params - batch + jax.random.normal(key, params.shape)) ** 2).sum(), {}

    def draw(step):
        noise = np.random.default_rng((step, seed)).normal(size=len(config.towards))
        return Episode(None, np.float32(noise + config.towards))

    rows = []
    for seed in config.seed_list:
        trained = train_method(
            "a", methods.plain_gradient(loss), optax.sgd(config.rate),
            jnp.zeros(len(config.towards)), fit.from_function(draw), config.out / f"a-{seed}",
            resume=config.resume, steps=3, key=seed, log_every=1,
        )  # fmt: skip
        rows += [scored_row(config, "a", seed, "loss", row["loss"]) for row in trained.history]
        rows += [scored_row(config, "a", seed, "weight", w) for w in np.asarray(trained.meta)]
    report.write_results(config.out, rows, [])


def test_a_dumped_config_run_again_gives_the_same_numbers(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ["--rate", "0.3", "--towards", "2.0", "-1.0", "--seeds", "2", "--first-seed", "5"]
    command_line({"tiny": Tiny()}, tiny, [*asked, "--out", str(one)])
    command_line({"tiny": Tiny()}, tiny, ["--config", f"{one}/config.yaml", "--out", str(two)])
    rows = report.read_results(one)["rows"]
    assert {row["seed"] for row in rows} == {5, 6}
    assert len({row["value"] for row in rows}) == len(rows) == 2 * (3 + 2)
    assert (two / "results.json").read_bytes() == (one / "results.json").read_bytes()
    dumped = [(out / "config.yaml").read_text().splitlines() for out in (one, two)]
    assert [a for a, b in zip(*dumped, strict=True) if a != b] == [f"out: {one}"]


def test_an_experiment_keeps_its_compiled_programs(tmp_path, monkeypatch):
    settings: dict = {}
    monkeypatch.setattr(cache, "jax", SimpleNamespace(config=SimpleNamespace(
        update=settings.__setitem__)))  # fmt: skip
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path))
    for name in ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
                 "PERSISTENT_CACHE_ENABLE_XLA_CACHES"):  # fmt: skip
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    at_work = []

    def run(config):
        at_work.append((config.out, dict(settings)))

    given = ["--out", str(tmp_path / "run")]
    command_line({"": Config()}, run, given)
    [(_, found)] = at_work
    assert found["jax_compilation_cache_dir"] == str(tmp_path / "jax")
    assert found["jax_persistent_cache_min_compile_time_secs"] < 1
    settings.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")  # what the user says stands
    command_line({"": Config()}, run, given)
    assert "jax_compilation_cache_dir" not in at_work[1][1]


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
