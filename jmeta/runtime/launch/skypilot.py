"""SkyPilot: a task file that any of its clouds takes, for `sky jobs launch`.

Fields as in SkyPilot's YAML reference; a bucket holds the run directory across recoveries.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jmeta.runtime.launch import code, steps
from jmeta.runtime.launch.inputs import (
    check_command,
    check_name,
    check_path,
    check_word,
    environment,
)
from jmeta.runtime.launch.steps import LaunchError, Say, Section, Step, Write


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyPilot:
    """Write a task file for SkyPilot's managed jobs, which recover from preemptions."""

    name: str
    """Of the task; the run directory is NAME in the bucket."""
    accelerators: str
    """What each node has, such as tpu-v5litepod-16 or H100:8."""
    bucket: str
    """Bucket for run directories, such as gs://mine."""
    infra: str | None = None
    """Where, such as gcp/us-west4; by default wherever it is cheapest."""
    spot: bool = True
    """Spot machines."""
    restarts: int = 3
    """How often a run that fails by itself is tried again; preemptions do not count."""
    resume: bool = False
    """Go on from the run directory in the bucket."""
    out: Path | None = None
    """The task file; by default runs/NAME.launch/task.yaml."""
    env: tuple[str, ...] = ()
    """NAME=VALUE variables of the run; no secrets."""
    env_file: Path | None = None
    """File of NAME=VALUE lines; only the names are taken, `sky` reads the values from its own
    environment."""
    dry_run: bool = False
    """Print the file, write nothing."""


def task(config: SkyPilot, command: Sequence[str], template: Mapping[str, Any]) -> dict[str, Any]:
    """The task of a run.

    Args:
      config: the launch.
      command: module and arguments.
      template: what is the same for every run.

    Returns:
      The task as plain dicts and lists.

    Raises:
      LaunchError: a value cannot be used.
    """
    check_name(config.name)
    given = environment(config.env, config.env_file)
    command = check_command(command, given.secrets)
    if "://" not in check_word(config.bucket, "--bucket"):
        raise LaunchError(f"--bucket {config.bucket!r} is not an address such as gs://mine")
    if config.restarts < 0:
        raise LaunchError("--restarts is at least 0")
    check_word(config.accelerators, "--accelerators")
    extra = "tpu" if config.accelerators.lower().startswith("tpu") else "cuda"
    resources: dict[str, Any] = {
        "accelerators": config.accelerators,
        "use_spot": config.spot,
        "job_recovery": {
            "strategy": "EAGER_NEXT_REGION",
            "max_restarts_on_errors": config.restarts,
        },
    }
    if config.infra is not None:
        resources["infra"] = check_word(config.infra, "--infra", "A-Za-z0-9._/*-")
    run = f"/runs/{config.name}"
    arguments = shlex.join(["-u", "-m", *command, "--out", run, "--resume"])
    taken = shlex.quote(f"{run} holds a run already: choose another --name, or --resume it")
    lines = [
        # The task keeps its number when it is recovered: that is how its own run is known. All
        # machines of a slice say --resume, which begins where there is nothing to go on from.
        f"marker={run}.task",
        'if [ "$(cat "$marker" 2> /dev/null)" != "$SKYPILOT_TASK_ID" ]; then',
        *([] if config.resume else [f"    [ ! -e {run} ] || {{ echo {taken}; exit 1; }}"]),
        '    echo "$SKYPILOT_TASK_ID" > "$marker"',
        "fi",
        f"set -- {arguments}",
        'exec ~/venv/bin/python "$@"',
    ]
    filled = {
        **template,
        "name": config.name,
        "resources": resources,
        "file_mounts": {"/runs": {"source": config.bucket, "mode": "MOUNT"}},
        "setup": f"bash experiments/launch/worker.sh venv ~/venv '.[{extra}]'\n",
        "run": "\n".join(lines) + "\n",
    }
    if given.public:
        filled["envs"] = given.public
    if given.private:
        filled["secrets"] = dict.fromkeys(given.private)
    return filled


def plan(config: SkyPilot, command: Sequence[str], template: str) -> list[Section]:
    """The task file, and the command line that starts it."""
    import yaml

    file = check_path(config.out) if config.out else None
    file = file or code.staging(Path("runs") / config.name) / "task.yaml"
    filled = task(config, command, yaml.safe_load(template))
    secrets = [word for name in filled.get("secrets", {}) for word in ("--secret", name)]
    text = yaml.safe_dump(filled, sort_keys=False, width=10**6)
    start = ("sky", "jobs", "launch", f"--name={config.name}", *secrets, file.as_posix())
    return [
        Section("the task", (Step(("mkdir", "-p", file.parent.as_posix())), Write(file, text))),
        Section("to start it, from here, with any secrets in the environment", (Step(start),)),
    ]


def launch(config: SkyPilot, command: Sequence[str], template: str, say: Say) -> None:
    """Write the task file, and say how to start it."""
    made, start = plan(config, command, template)
    for step in made.steps:
        if isinstance(step, Write):
            steps.write(step)
            say(f"wrote {step.path}")
    say(f"to start it: {steps.render([start]).splitlines()[-1]}")
