"""Hostile words, bad input and secrets, on their way to a TPU VM."""

import pytest
from launch_world import (
    COMMAND,
    HOSTILE,
    PLACE,
    SECRET,
    TPU,
    assert_failed,
    kept,
)


def test_hostile_arguments_reach_the_program_of_a_tpu_vm_verbatim(world):
    command = ["--", "experiments.reviews", *HOSTILE]
    assert world.run(TPU, command=command)[0] == 0
    assert world.arguments() == ["experiments.reviews", *HOSTILE, "--out", "../run"]
    assert not list(world.fake.rglob("pwned"))


BAD = {
    "name": (["--name", "a; rm -rf ~"], COMMAND, "--name"),
    "option as name": (["--name=--help"], COMMAND, "--name"),
    "zone": (["--zone", "$(id)"], COMMAND, "--zone"),
    "type": (["--type", "v5litepod-16 --spot"], COMMAND, "--type"),
    "several workers": (["--type", "v6e-32"], COMMAND, "has 8 workers"),
    "storage": (["--storage", "s3://mine"], COMMAND, "must be gs://BUCKET/FOLDER or nfs://"),
    "storage that leaves": (["--storage", "gs://mine/../a"], COMMAND, "--storage"),
    "storage as option": (["--storage", "gs://mine/--help"], COMMAND, "--storage"),
    "storage as shell": (["--storage", "gs://mine/$(id)"], COMMAND, "--storage"),
    "share as shell": (["--storage", "nfs://host;id/a"], COMMAND, "--storage"),
    "no share": (["--storage", "nfs://host"], COMMAND, "--storage"),
    "unknown type": (["--type", "v9-8"], COMMAND, "--version"),
    "project": (["--project", "a b"], COMMAND, "--project"),
    "out": (["--out", "host:path"], COMMAND, "--out"),
    "nothing to run": ([], [], "after --"),
    "a path": ([], ["--", "./evil.py"], "is a module"),
    "nul": ([], ["--", "experiments.reviews", "a\0b"], "NUL"),
    "out in the command": ([], [*COMMAND, "--out=x"], "leave --out out"),
    "resume in the command": ([], [*COMMAND, "--resume"], "--resume"),
    "secret variable": (["--env", "HF_TOKEN=abcdefgh"], COMMAND, "--env-file"),
    "no variable": (["--env", "x y=1"], COMMAND, "NAME=VALUE"),
    "no file": (["--env-file", "missing.env"], COMMAND, "missing.env"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_happens(world, what):
    options, command, said = BAD[what]
    code, _, err = world.run(TPU, *options, command=command)
    assert code == 2
    assert err.count("\n") == 1
    assert said in err
    assert world.calls() == []


@pytest.mark.parametrize("fails", [False, True])
def test_secrets_reach_the_run_and_nobody_else(world, secrets, fails):
    ending = f'echo "$QUOTED_SECRET" > "$FAKE/quoted"; echo {SECRET} >&2; exit {3 * fails}'
    world.program('echo "$HF_TOKEN $GREETING" > "$FAKE/seen"\n' + ending)
    _, shown, _ = world.run(TPU, *secrets, "--dry-run")
    assert "of mode 600, holds HF_TOKEN, QUOTED_SECRET" in shown
    status, out, err = world.run(TPU, *secrets)
    assert status == fails
    assert (world.fake / "seen").read_text() == f"{SECRET} hello world\n"
    assert (world.fake / "quoted").read_text() == "it's $(id) #1\n"
    assert "token ***" in out
    assert not list(world.fake.rglob("env.*"))
    for text in [shown, out, err, *kept(world)]:
        assert SECRET not in text
        assert "$(id) #1" not in text


def test_a_secret_in_the_error_of_a_tool_is_blotted_out(world, secrets):
    world.cue({"on": "install", "stderr": f"ERROR: cannot log in with {SECRET}"})
    assert_failed(world, world.run(TPU, *secrets), "cannot log in with ***")


def test_a_secret_on_the_command_line_is_refused(world, secrets):
    code, _, err = world.run(TPU, *secrets, command=[*COMMAND, f"--token={SECRET}"])
    assert code == 2
    assert "HF_TOKEN" in err
    assert SECRET not in err


def test_all_that_the_file_holds_is_kept_out_of_sight_and_later_too(world, tmp_path):
    file = tmp_path / "mine.env"
    file.write_text(f"DATABASE=postgres://me:{SECRET}@host\n")
    argv = [*TPU, "--env-file", str(file)]
    world.program('echo "at $DATABASE"')
    assert world.run(argv, "--detach")[0] == 0
    _, out, _ = world.run(["follow", *PLACE, "--env-file", str(file)])
    assert "at ***" in out
    for text in [out, *kept(world)]:
        assert SECRET not in text


def test_the_launchers_own_secrets_are_blotted_out(world, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    world.cue({"on": "create", "stderr": f"ERROR: {SECRET}"})
    assert_failed(world, world.run(TPU), "***")
