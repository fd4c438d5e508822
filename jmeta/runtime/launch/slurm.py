"""Slurm: the configuration of a job, and the `sbatch` file and commands that follow from it.

One task a node, SIGTERM before the time limit, requeued with --resume.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jmeta.runtime.launch import code
from jmeta.runtime.launch.inputs import (
    check_command,
    check_name,
    check_path,
    check_word,
    environment,
    exports,
)
from jmeta.runtime.launch.steps import LaunchError, Section, Step, Write


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmPlace:
    """A job that was submitted from here."""

    name: str
    """Of the job."""
    out: Path | None = None
    """Run directory, on a file system that all nodes see; by default runs/NAME."""
    env_file: Path | None = None
    """File of NAME=VALUE lines for secrets; copied privately, never shown."""
    poll: float = 15.0
    """Seconds between two looks at the queue."""
    dry_run: bool = False
    """Print every command and file, run none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm(SlurmPlace):
    """Run an experiment as a Slurm job, one process on each node."""

    nodes: int = 1
    """Number of nodes."""
    gpus: int = 0
    """GPUs on each node."""
    cpus: int | None = None
    """CPU cores on each node; by default the cluster's choice."""
    time: str = "24:00:00"
    """Time limit of one turn; the job is queued again at its end."""
    notice: int = 300
    """Seconds before the time limit at which the run is told to save and end."""
    partition: str | None = None
    """Partition; by default the cluster's."""
    account: str | None = None
    """Account; by default the user's."""
    python: str = sys.executable
    """Interpreter with jmeta's dependencies, on a file system that all nodes see."""
    before: tuple[str, ...] = ()
    """Lines of shell to run first, such as 'module load cuda'."""
    restarts: int = 20
    """How often the job may be queued again."""
    detach: bool = False
    """Leave as soon as the job is submitted."""
    resume: bool = False
    """Go on from the run directory in --out."""
    revision: str | None = None
    """Commit whose files are run; by default HEAD, if nothing differs from it."""
    env: tuple[str, ...] = ()
    """NAME=VALUE variables of the run; no secrets."""


def out_of(config: SlurmPlace) -> Path:
    """The run directory."""
    return config.out or Path("runs") / config.name


def submit(config: SlurmPlace) -> Step:
    """The step that queues the job."""
    return Step(("sbatch", "--parsable", (code.staging(out_of(config)) / "job.sh").as_posix()))


def queue(job: str) -> Step:
    """The step that says the state of a job."""
    return Step(("squeue", f"--jobs={job}", "--noheader", "--format=%T"), 60.0)


def cancel(job: str) -> Step:
    """The step that ends a job."""
    return Step(("scancel", job), 60.0)


def script(config: Slurm, command: Sequence[str], template: str) -> str:
    """The sbatch file.

    Args:
      config: the launch.
      command: module and arguments, checked.
      template: text with @DIRECTIVES@, @STAGE@, @DEVICES@, @BEFORE@, @COMMAND@ and @RESTARTS@.

    Returns:
      The template with every value quoted for the place it stands in.
    """
    stage = code.staging(out_of(config))
    if re.search(r"[^\w./-]", stage.as_posix()):
        raise LaunchError(f"--out {out_of(config)}: #SBATCH lines take no blanks or quotes")
    asked = {
        "gpus-per-node": config.gpus or None,
        "cpus-per-task": config.cpus,
        "partition": config.partition,
        "account": config.account,
    }
    directives = [
        f"--job-name={config.name}",
        f"--nodes={config.nodes}",
        f"--ntasks={config.nodes}",
        "--ntasks-per-node=1",
        f"--time={check_word(config.time, '--time', '0-9:-')}",
        f"--signal=B:USR1@{config.notice}",
        "--requeue",
        "--open-mode=append",
        f"--output={stage.as_posix()}/job.log",
        *(f"--{k}={check_word(str(v), f'--{k}')}" for k, v in asked.items() if v is not None),
    ]
    out = os.path.relpath(out_of(config), stage / "code")
    resume = ["--resume"] if config.resume else []
    values = {
        "DIRECTIVES": "\n".join(f"#SBATCH {directive}" for directive in directives),
        "STAGE": shlex.quote(stage.as_posix()),
        # Under Slurm JAX takes one GPU for each process, unless it is told of all of them.
        "DEVICES": f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(config.gpus)))}"
        if config.gpus
        else ":",
        "BEFORE": "\n".join(config.before) or ":",
        "COMMAND": shlex.join([config.python, "-u", "-m", *command, "--out", out, *resume]),
        "RESTARTS": str(config.restarts),
    }
    # In one pass: a value may hold what looks like another's place.
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], template)


def prepare(
    config: Slurm, command: Sequence[str], template: str
) -> tuple[tuple[Step | Write, ...], dict[str, str]]:
    """Check a configuration; what to make before the job is submitted, and its secrets.

    Raises:
      LaunchError: a value cannot be used.
    """
    check_name(config.name)
    stage = code.staging(check_path(out_of(config)))
    if config.nodes < 1 or config.gpus < 0 or config.notice < 1 or config.restarts < 0:
        raise LaunchError("--nodes and --notice are at least 1, --gpus and --restarts at least 0")
    given = environment(config.env, config.env_file)
    command = check_command(command, given.secrets)
    variables = exports({**given.public, **given.private})
    copy, packed = (stage / "code").as_posix(), stage / "code.tar.gz"
    return (
        Step(("rm", "-rf", copy, (stage / "exit").as_posix())),
        Step(("mkdir", "-p", copy, (stage / "logs").as_posix())),
        code.archive(config.revision, packed),
        Step(("tar", "-xzf", packed.as_posix(), "-C", copy)),
        Write(stage / "env.sh", variables, tuple(given.private)),
        Write(stage / "job.sh", script(config, command, template)),
    ), given.secrets


def plan(config: Slurm, command: Sequence[str], template: str) -> list[Section]:
    """The whole life of a launch, in order, for `--dry-run`."""
    made, _ = prepare(config, command, template)
    stage = code.staging(out_of(config))
    sections = [
        Section("a copy of the code and the job's file, on the shared file system", made),
        Section("submit it; this prints the job's number", (submit(config),)),
    ]
    if config.detach:
        return sections
    return [
        *sections,
        Section(
            f"every {config.poll:g} s until the job has left the queue, with what is new in "
            f"{stage.as_posix()}/logs/0.log",
            (queue("NUMBER"),),
        ),
        Section("if this launcher is interrupted", (cancel("NUMBER"),)),
    ]


def plan_verb(verb: str, config: SlurmPlace) -> list[Section]:
    """What follow and delete do, for `--dry-run`."""
    stage = code.staging(check_path(out_of(config)))
    job = job_of(config) if (stage / "job").exists() else "NUMBER"
    if verb == "delete":
        return [Section("cancel it", (cancel(job),))]
    heading = f"every {config.poll:g} s until the job has left the queue, with what is new in"
    return [Section(f"{heading} {stage.as_posix()}/logs/0.log", (queue(job),))]


def job_of(config: SlurmPlace) -> str:
    """The number of the job that was submitted from here.

    Raises:
      LaunchError: none was.
    """
    check_name(config.name)
    file = code.staging(out_of(config)) / "job"
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise LaunchError(f"no job was submitted for {out_of(config)} from here") from error
