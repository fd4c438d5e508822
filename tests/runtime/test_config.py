"""Presets, YAML and flags resolve as promised; mistakes are named; a dump reads back equal."""

import dataclasses
import enum
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jmeta.runtime import config as configuration
from jmeta.runtime.coerce import ConfigError, coerce, plain
from jmeta.runtime.config import RunConfig, dump, load, parse, track, unused_keys


class Schedule(enum.Enum):
    CONSTANT = "constant"
    COSINE = "cosine"


@dataclasses.dataclass(frozen=True)
class Inner:
    """The inner loop."""

    lr: float = 0.1
    steps: int = 5
    nesterov: bool = False


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Few-shot things.

    A second paragraph.
    """

    inner: Inner = Inner()
    inner_lr: float = 0.01
    method: Literal["maml", "fomaml"] = "maml"
    steps: tuple[int, ...] = (0, 1, 5)
    span: tuple[float, float] = (-5.0, 5.0)
    names: list[str] = dataclasses.field(default_factory=list)
    limit: int | None = None
    schedule: Schedule = Schedule.CONSTANT
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    tag: str = ""

    @property
    def total(self) -> float:
        return self.inner_lr * self.inner.steps


PRESETS = {"demo": Config(), "full": Config(seeds=5, inner=Inner(lr=0.5))}


def test_flags_override_the_file_overrides_the_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner:\n  steps: 7\nmethod: fomaml\nsteps: [3]\nspan: [1e-3, 2]\n")
    argv = ["--preset", "full", "--config", str(file), "--inner.steps", "9", "--limit", "4"]
    assert parse(PRESETS, argv) == Config(
        seeds=5,
        out=Path("runs/test_config-full"),
        inner=Inner(lr=0.5, steps=9),
        method="fomaml",
        steps=(3,),
        span=(0.001, 2.0),
        limit=4,
    )
    assert parse(PRESETS, []) == dataclasses.replace(Config(), out=Path("runs/test_config-demo"))
    assert parse(Config, ["--out", "here"]).out == Path("here")
    assert parse(Config, []).out == Path("runs/test_config")
    assert parse(Config(tag="x"), []).tag == "x"


def test_seed_list_and_its_check(capsys):
    assert Config(seeds=3, first_seed=4).seed_list == [4, 5, 6]
    with pytest.raises(SystemExit):
        parse(Config, ["--seeds", "0"])
    assert "at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--inner-lrr", "1"], "--inner-lr"),
        (["--inner.lrr", "1"], "--inner.lr"),
        (["--preset", "fulll"], "the presets are demo, full; did you mean full?"),
        (["--prest", "full"], "unrecognized option --prest; did you mean --preset?"),
        (["--confg=a"], "did you mean --config?"),
        (["--method", "mmal"], "'maml'"),
        (["--inner-lr", "fast"], "fast"),
        (["--config", "no/such.yaml"], "no/such.yaml: No such file"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_a_suggestion(argv, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(PRESETS, argv)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inner_lrr: 1", "unknown key inner_lrr; did you mean inner_lr?"),
        ("inner: {stepz: 1}\nmehtod: maml", "inner.stepz; did you mean inner.steps?"),
        ("inner: {stepz: 1}\nmehtod: maml", "mehtod; did you mean method?"),
        ("method: mmal", "method: expected one of 'maml', 'fomaml', got 'mmal'"),
        ("inner_lr: fast", "inner_lr: expected a number, got 'fast'"),
        ("seeds: 1.5", "seeds: expected a whole number, got 1.5"),
        ("seeds: true", "seeds: expected a whole number, got True"),
        ("steps: 3", "steps: expected a list, got 3"),
        ("steps: [1, x]", "steps[1]: expected a whole number, got 'x'"),
        ("span: [1]", "span: expected 2 items"),
        ("inner: 3", "expected the fields of Inner, got 3"),
        ("schedule: LINEAR", "one of 'CONSTANT', 'COSINE'"),
        ("weights: {a: b}", "weights.a: expected a number"),
        ("seeds: 0", "at least 1, got 0"),
        ("- 1", "must map field names to values"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_key(text, said, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        load(file, Config)
    with pytest.raises(SystemExit) as exit_:
        parse(PRESETS, ["--config", str(file)])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_help_tells_of_presets_and_fields(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(PRESETS, ["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for text in ("Few-shot things.", "demo, full", "--config FILE.yaml", "--inner.lr", "--seeds"):
        assert text in out
    assert "second paragraph" not in out


words = st.text(
    st.characters(exclude_categories=("Cs",)), max_size=8
)  # any text, control characters and lookalikes of numbers included
finite = st.floats(allow_nan=False)
configs = st.builds(
    Config,
    seeds=st.integers(1, 9),
    out=st.sampled_from([Path("runs/a b"), Path("x.y"), Path("ünï/ cödé")]),
    resume=st.booleans(),
    first_seed=st.integers(-(2**40), 2**40),
    inner=st.builds(Inner, lr=finite, steps=st.integers(), nesterov=st.booleans()),
    inner_lr=finite,
    method=st.sampled_from(["maml", "fomaml"]),
    steps=st.lists(st.integers(), max_size=4).map(tuple),
    span=st.tuples(finite, finite),
    names=st.lists(words | st.sampled_from(["1e-3", "no", "null", "1", "~", "- a"]), max_size=3),
    limit=st.none() | st.integers(),
    schedule=st.sampled_from(Schedule),
    weights=st.dictionaries(words, finite, max_size=3),
    tag=words,
)


@settings(max_examples=60, deadline=None)
@example(Config(tag="\x85 \u2028", names=["\ufeff", "é\x85"]))
@given(configs)
def test_a_dumped_config_reads_back_equal(config):
    # Asking git for its commit 120 times is not what is tested here.
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(configuration, "versions", dict),
    ):
        path = dump(config, folder)
        assert load(path, Config) == config
        assert parse(PRESETS, ["--config", str(path)]) == config
        again = dump(parse(PRESETS, ["--config", str(path), "--preset", "full"]), folder)
        assert load(again, Config) == config


def test_a_dumped_config_takes_overrides(tmp_path):
    config = Config(inner=Inner(lr=3.0), steps=(), names=["a"], out=Path("o"), weights={"a": 1.0})
    path = dump(config, tmp_path)
    changed = parse(PRESETS, ["--config", str(path), "--inner-lr", "0.5", "--inner.nesterov"])
    assert changed == dataclasses.replace(config, inner_lr=0.5, inner=Inner(lr=3.0, nesterov=True))


def test_the_run_record_says_how_to_repeat_it_and_nothing_about_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--preset", "full", "--out", str(tmp_path / "runs" / "a"), "--tag=/home/ada/x"]
    config = parse(PRESETS, argv)
    with track(config) as tracked:
        assert (tracked.out, tracked.tag) == (config.out, "/home/ada/x")
        dump(tracked, config.out)
    run = json.loads((tmp_path / "runs" / "a" / "run.json").read_text())
    assert run["command"].endswith("test_config --preset full --out runs/a --tag=x")
    assert run["command"].startswith("python -m ")
    assert (run["preset"], run["seeds"]) == ("full", [0, 1, 2, 3, 4])
    written = yaml.safe_load((tmp_path / "runs" / "a" / "config.yaml").read_text())
    assert written["out"] == "runs/a"  # below the working directory: relative
    dump(parse(PRESETS, ["--config", "runs/a/config.yaml", "--out", "runs/b"]), "runs/b")
    assert json.loads(Path("runs/b/run.json").read_text())["preset"] is None
    assert run["versions"]["git_commit"] is None
    import jax
    import numpy as np

    assert run["versions"]["jax"] == jax.__version__
    assert run["versions"]["numpy"] == np.__version__
    assert run["versions"]["python"] == sys.version.split()[0]
    assert set(run["versions"]) >= {"jaxlib", "optax", "flax", "jmeta"}
    text = (tmp_path / "runs" / "a" / "run.json").read_text()
    assert str(tmp_path) not in text
    assert "ada" not in text
    assert [p.name for p in sorted((tmp_path / "runs" / "a").iterdir())] == [
        "config.yaml",
        "run.json",
    ]


def test_the_commit_of_the_working_directory_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-q", "-m", "one")
    found = configuration.versions()
    assert (found["git_commit"], found["git_modified"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "f").write_text("2")
    assert configuration.versions()["git_modified"] is True


def test_a_field_that_was_set_and_never_read_is_an_error(tmp_path):
    argv = ["--inner-lr", "0.1", "--inner.no-nesterov", "--steps", "1", "2", "--weights.a", "1"]
    base = Config(weights={"a": 0.0})
    tracking = track(parse(base, argv))
    config = tracking.__enter__()
    assert unused_keys(config) == ["inner_lr", "inner.nesterov", "steps", "weights"]
    assert config.total == 0.1 * 5  # a property reads its fields
    assert config.inner.nesterov is False
    assert "steps" in repr(config)  # printing is no use
    assert isinstance(config, Config)
    assert unused_keys(config) == ["steps", "weights"]
    with pytest.raises(ConfigError, match=r"never read.*: --steps, --weights\."):
        tracking.__exit__(None, None, None)
    with track(parse(base, argv)) as config:
        _ = config.inner_lr, config.inner.nesterov, config.steps, config.weights
    with pytest.raises(ZeroDivisionError), track(parse(base, argv)):
        1 / 0  # noqa: B018
    file = tmp_path / "c.yaml"
    file.write_text("inner: {steps: 3}\ntag: x\n")
    with (
        pytest.raises(ConfigError, match="--tag"),
        track(parse(base, ["--config", str(file)])) as c,
    ):
        assert c.inner.steps == 3
    # Neither presets nor dumped files are what a user typed.
    path = dump(parse(base, ["--config", str(file)]), tmp_path)
    with track(parse(PRESETS, ["--preset", "full", "--config", str(path)])) as config:
        assert unused_keys(config) == []
    with pytest.raises(TypeError, match="with track"):
        unused_keys(base)


def test_presets_are_not_marked_by_parsing():
    parse(PRESETS, ["--tag", "a"])
    assert "_jmeta_provenance" not in vars(PRESETS["demo"])
    parse(PRESETS["demo"], [])
    assert "_jmeta_provenance" not in vars(PRESETS["demo"])


def test_classes_that_cannot_serve_are_refused():
    @dataclasses.dataclass
    class Thawed:
        x: int = 1

    @dataclasses.dataclass(frozen=True)
    class Clash:
        preset: int = 1

    for cls, said in ((Thawed, "frozen"), (Clash, "preset clashes")):
        with pytest.raises(TypeError, match=said):
            parse(cls, [])


def test_plain_names_the_field_that_yaml_cannot_hold():
    with pytest.raises(TypeError, match=r"config\.weights\.a: a complex"):
        plain(Config(weights={"a": 1j}))  # pyright: ignore
    assert yaml.safe_load(yaml.safe_dump(plain(Config())))["steps"] == [0, 1, 5]
    assert coerce(None, int | None, "x") is None
    assert coerce(2, float | str, "x") == 2.0
    assert coerce({"lr": 1}, Inner | None, "x") == Inner(lr=1.0)
