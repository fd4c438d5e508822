"""A world for the launcher: programs on the PATH that only pretend, and a checkout to ship."""

import contextlib
import os
import shlex
import subprocess
import sys

import pytest
from launch_world import FAKES, PYTHON, SECRET, World


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "experiments").mkdir()
    (folder / "setup.cfg").write_text("")
    (folder / "experiments" / "reviews.py").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def world(repo, tmp_path, monkeypatch, capsys):
    programs = tmp_path / "bin"
    remote = tmp_path / "fake" / "remote"
    programs.mkdir()
    remote.mkdir(parents=True)

    def install(folder, name, text):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    here = ("gcloud", "kubectl", "sbatch", "squeue", "scancel", "scontrol", "srun")
    there = ("gcsfuse", "sudo", "mountpoint", "mount.nfs", "curl", "lsb_release")
    for folder, name in [(programs, name) for name in here] + [(remote, name) for name in there]:
        line = f'exec {sys.executable} -I -S {shlex.quote(str(FAKES))} {name} "$@"'
        install(folder, name, f"#!/bin/sh\n{line}\n")
    (tmp_path / "fake" / "buckets" / "mine").mkdir(parents=True)
    install(programs, "python", PYTHON)
    install(remote, "python3.13", PYTHON)
    install(remote, "hostname", '#!/bin/sh\necho "host-${HOME##*/}"\n')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path / "fake"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(repo)
    world = World(repo, tmp_path / "back" / "n", tmp_path / "fake", capsys)
    world.program('echo saved > "$out/ckpt"; echo began')
    yield world
    for file in (tmp_path / "fake").glob("*/jmeta-*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(file.read_text()), 9)


@pytest.fixture
def secrets(tmp_path):
    file = tmp_path / "secrets.env"
    file.write_text(f"# mine\nHF_TOKEN={SECRET}\n\nQUOTED_SECRET=it's $(id) #1\n")
    return ["--env-file", str(file), "--env", "GREETING=hello world"]
