"""What the tests of the launcher share: a checkout, fake programs, and what to look for."""

import ast
import contextlib
import os
import pathlib
import time
from typing import NamedTuple

import pytest

from experiments.launch import __main__ as cli

FAKES = pathlib.Path(__file__).with_name("launch_fakes.py")
GOLDEN = pathlib.Path(__file__).with_name("golden")
SECRET = "s3cr3t-value-of-a-token"
COMMAND = ["--", "experiments.reviews", "--preset", "full"]
PLACE = ["tpu-vm", "--name", "n", "--zone", "us-west4-a"]
TPU = [*PLACE, "--type", "v5litepod-8"]  # one worker
POD = [*PLACE, "--type", "v5litepod-16", "--storage", "gs://mine/runs"]  # four, here two
SLURM = ["slurm", "--name", "n", "--python", "python"]
K8S = ["kubernetes", "--name", "n", "--claim", "runs", "--image", "registry/jmeta:1"]
SKY = ["skypilot", "--name", "n", "--bucket", "gs://mine", "--accelerators", "tpu-v5litepod-16"]

# What a worker runs instead of an experiment: it notes its arguments, says a line, and goes on as
# the file `program` says.
PYTHON = """#!/bin/bash
[ "$1" = -u ] && shift
case "$1" in
    -c) exit 0 ;;
    -m) shift ;;
esac
case "$1" in
    venv) mkdir -p "$2/bin"; cp "$0" "$2/bin/python"; exit ;;
    pip) exit ;;
esac
printf '%s\\0' "$@" > "$FAKE/arguments"
echo "token ${HF_TOKEN:-none}"
WAIT="eval while :; do sleep 0.1; done"
. "$FAKE/program"
"""
# Starts, saves something and waits; a second start finds what was saved.
SAVES_AND_WAITS = """
case "$*" in
    *--resume*) [ "$(cat "$out/ckpt")" = saved ] || exit 9; echo went on; exit 0 ;;
esac
echo saved > "$out/ckpt"
echo began
touch "$FAKE/began"
$WAIT
"""


class World(NamedTuple):
    """A checkout, a folder for what comes back, and the fakes' folder."""

    repo: pathlib.Path
    out: pathlib.Path
    fake: pathlib.Path
    capsys: pytest.CaptureFixture[str]

    def program(self, text):
        (self.fake / "program").write_text(
            f"out=${{@: -1}}; [ $out = --resume ] && out=../run\n{text}"
        )

    def cue(self, *cues):
        (self.fake / "cues").write_text(repr(list(cues)))

    def stored(self):
        """The run directory on the storage of POD."""
        return self.fake / "buckets" / "mine" / "runs" / "n"

    def state(self, **values):
        for name, value in values.items():
            (self.fake / name).write_text(repr(value))

    def run(self, argv, *options, command=COMMAND):
        """The exit status, and what went to stdout and stderr."""
        verb = argv[0] in cli.VERBS
        full = [*argv, "--out", str(self.out), "--poll", "0.01", *options]
        status = cli.main([*full] if verb else [*full, "--revision", "HEAD", *command])
        written = self.capsys.readouterr()
        return status, written.out, written.err

    def calls(self, *words):
        """The recorded calls that hold all of some words."""
        file = self.fake / "calls"
        calls = (
            [ast.literal_eval(line) for line in file.read_text().splitlines()]
            if file.exists()
            else []
        )
        return [call for call in calls if set(words) <= set(call)]

    def arguments(self):
        """What the last started program got."""
        return (self.fake / "arguments").read_bytes().decode().split("\0")[:-1]


def processes(world):
    """Command lines of what still runs with this test's fakes in its environment."""
    mark, found = f"FAKE={world.fake}".encode(), []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes())
    return [line for line in found if line]


def assert_nothing_runs(world):
    for _ in range(100):
        if not processes(world):
            return
        time.sleep(0.02)
    raise AssertionError(processes(world))


def assert_failed(world, result, *words, status=1):
    code, _, err = result
    assert code == status
    assert err.count("\n") == 1
    assert err.startswith("launch: ")
    for word in words:
        assert word in err
    assert_nothing_runs(world)


HOSTILE = [
    "plain", "two words", "it's", '"quoted"', "; rm -rf ~", "$(touch pwned)", "`id`", "a\nb", "*",
    "", "\\", "~", "$HOME", "é☃", "-x", "--flag=a b", "&& false", "| cat", "> file", "#", "!",
    "{a,b}", "\t", "$$(HOME)", "@STAGE@", "END_OF_FILE", "a\u2028b",
]  # fmt: skip


def expanded(text):
    """What Kubernetes makes of an argument that names no variable it knows."""
    return text.replace("$$", "\0").replace("\0", "$")


def kept(world):
    """All that was printed or recorded, and all files outside the fakes' folder."""
    texts = [(world.fake / "calls").read_text()]
    return texts + [
        file.read_text(errors="replace") for file in world.out.parent.rglob("*") if file.is_file()
    ]
