"""Slurm: an `sbatch` file, submitted and followed from a login node.

One task a node, SIGTERM before the time limit, requeued with --resume.
"""

import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jmeta.runtime.launch import code, steps
from jmeta.runtime.launch.inputs import (
    check_command,
    check_name,
    check_path,
    check_word,
    environment,
    exports,
    known_secrets,
    redactor,
)
from jmeta.runtime.launch.steps import CommandError, LaunchError, Say, Section, Step, Write

_ATTEMPTS = 5  # how often squeue may fail in a row, and an exit status may be late on a file server


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmPlace:
    """A job that was submitted from here."""

    name: str
    """Of the job."""
    out: Path | None = None
    """Run directory, on a file system that all nodes see; by default runs/NAME."""
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
    env_file: Path | None = None
    """File of NAME=VALUE lines for secrets; copied privately, never shown."""


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
      template: text with @DIRECTIVES@, @STAGE@, @BEFORE@, @COMMAND@ and @RESTARTS@.

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
    job = _job(config) if (stage / "job").exists() else "NUMBER"
    if verb == "delete":
        return [Section("cancel it", (cancel(job),))]
    heading = f"every {config.poll:g} s until the job has left the queue, with what is new in"
    return [Section(f"{heading} {stage.as_posix()}/logs/0.log", (queue(job),))]


def launch(config: Slurm, command: Sequence[str], template: str, say: Say, show: Say) -> None:
    """Submit a job and follow it to its end.

    Raises:
      LaunchError: it did not succeed; it is not in the queue any more.
      Interrupted: the user ended it; the same holds.
    """
    made, secrets = prepare(config, command, template)
    code.check_checkout(config.revision)
    code.check_out(out_of(config), config.resume)
    redact, stage, job = redactor(secrets), code.staging(out_of(config)), None
    over = False
    with steps.interrupts(say) as hold:
        try:
            for log in (stage / "logs").glob("*.log"):
                log.unlink()
            for step in made:
                steps.write(step) if isinstance(step, Write) else steps.run(step, redact)
            job = _submit(config, redact)
            steps.write(Write(stage / "job", job + "\n"))
            say(f"submitted as job {job}")
            if not config.detach:
                _watch(config, job, redact, say, show)
            over = True
        finally:
            hold()
            if job is not None and not over and not (stage / "exit").exists():
                _cancel(job, redact)
            if not (over and config.detach):
                (stage / "env.sh").unlink(missing_ok=True)


def follow(config: SlurmPlace, say: Say, show: Say) -> None:
    """Follow a job that was submitted from here. Interrupting this leaves the job alone."""
    with steps.interrupts(say):
        _watch(config, _job(config), redactor(known_secrets({})), say, show)


def delete(config: SlurmPlace, say: Say) -> None:
    """Cancel a job that was submitted from here."""
    job = _job(config)
    say(f"cancelling job {job}")
    _cancel(job, str)
    (code.staging(out_of(config)) / "env.sh").unlink(missing_ok=True)


def _job(config: SlurmPlace) -> str:
    check_name(config.name)
    file = code.staging(out_of(config)) / "job"
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise LaunchError(f"no job was submitted for {out_of(config)} from here") from error


def _submit(config: Slurm, redact: Callable[[str], str]) -> str:
    try:
        answer = steps.run(submit(config), redact)
    except CommandError as error:
        text = error.stderr.lower()
        if any(word in text for word in ("qos", "limit", "quota")):
            raise LaunchError(
                f"the cluster's limits forbid this job ({steps.last_line(error.stderr)})"
            ) from error
        raise
    number = answer.strip().partition(";")[0]  # --parsable: NUMBER or NUMBER;CLUSTER
    if not number.isdigit():
        raise LaunchError(f"sbatch answered {answer.strip()!r} instead of a job's number")
    return number


def _cancel(job: str, redact: Callable[[str], str]) -> None:
    try:
        steps.run(cancel(job), redact)
    except CommandError as error:
        if "invalid job id" not in error.stderr.lower():
            raise LaunchError(
                f"job {job} could not be cancelled and may run on: scancel {job}"
            ) from error


def _watch(config: SlurmPlace, job: str, redact: Callable[[str], str], say: Say, show: Say) -> None:
    stage, offset, state, failures = code.staging(out_of(config)), 0, "", 0
    for _ in steps.every(config.poll):
        try:
            now, failures = steps.run(queue(job), redact).strip(), 0
        except CommandError as error:
            failures += 1
            if "invalid job id" in error.stderr.lower():
                now = ""
            elif failures >= _ATTEMPTS:
                raise
            else:
                continue
        if now and now != state:
            say(f"job {job} is {now}")
            state = now
        offset = _show_log(stage / "logs" / "0.log", offset, not now, redact, show)
        if not now:
            break
    status = _exit_status(stage / "exit", config.poll)
    if status is None:
        raise LaunchError(
            f"job {job} ended without an exit status: it was cancelled, or its node failed; see "
            f"{stage / 'job.log'}"
        )
    if status != "0":
        raise LaunchError(f"the command failed with exit status {status}: see {stage / 'logs'}")
    say(f"the run is in {out_of(config)}")


def _show_log(file: Path, offset: int, last: bool, redact: Callable[[str], str], show: Say) -> int:
    if not file.exists():
        return offset
    with file.open("rb") as stream:
        stream.seek(offset)
        new = stream.read().decode(errors="surrogateescape")
    text = steps.whole_lines(new, last)
    if text:
        show(redact(steps.readable(text)))
    return offset + len(text.encode(errors="surrogateescape"))


def _exit_status(file: Path, poll: float) -> str | None:
    for _ in range(_ATTEMPTS):
        if file.exists():
            return file.read_text(encoding="utf-8").strip()
        time.sleep(poll)
    return None
