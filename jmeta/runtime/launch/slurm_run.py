"""A Slurm job, carried out: submit, follow, cancel."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jmeta.runtime.launch import code, signals, steps
from jmeta.runtime.launch.inputs import environment, redactor
from jmeta.runtime.launch.slurm import (
    Slurm,
    SlurmPlace,
    cancel,
    job_of,
    out_of,
    prepare,
    queue,
    submit,
)
from jmeta.runtime.launch.steps import CommandError, LaunchError, Say, Write

_ATTEMPTS = 5  # how often squeue may fail in a row, and an exit status may be late on a file server


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
    with signals.interrupts(say) as hold:
        try:
            for log in (stage / "logs").glob("*.log"):
                log.unlink()
            for step in made:
                steps.write(step) if isinstance(step, Write) else steps.run(step, redact)
            with signals.uninterrupted():  # sbatch that is cut off may leave a job without a number
                job = _submit(config, redact)
            signals.raise_pending()
            steps.write(Write(stage / "job", job + "\n"))
            say(f"submitted as job {job}")
            if not config.detach:
                _watch(config, job, redact, say, show)
            over = True
        finally:
            hold()
            try:
                if job is not None and not over and not (stage / "exit").exists():
                    _cancel(job, redact)
            finally:
                if not (over and config.detach):
                    _forget(config)


def follow(config: SlurmPlace, say: Say, show: Say) -> None:
    """Follow a job that was submitted from here. Interrupting this leaves the job alone."""
    with signals.interrupts(say):
        secrets = environment((), config.env_file).secrets
        _watch(config, job_of(config), redactor(secrets), say, show)


def delete(config: SlurmPlace, say: Say) -> None:
    """Cancel a job that was submitted from here."""
    job = job_of(config)
    with signals.interrupts(say) as hold:
        hold()
        say(f"cancelling job {job}")
        _cancel(job, str)
        _forget(config)


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


def _forget(config: SlurmPlace) -> None:
    """Remove the variables of a job that has ended; one that is killed cannot do so itself."""
    (code.staging(out_of(config)) / "env.sh").unlink(missing_ok=True)


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
            _forget(config)
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
