"""A TPU VM as the launcher sees it: its state, and commands on it that outlast a weak network.

A VM that was taken away is told apart from a command that failed.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jmeta.runtime.launch import steps, tpu_vm
from jmeta.runtime.launch.inputs import redactor
from jmeta.runtime.launch.steps import CommandError, LaunchError, Say, Step
from jmeta.runtime.launch.tpu_vm import Commands, TpuVm

GONE = ("PREEMPTED", "TERMINATED")
STOPPED = ("STOPPING", "STOPPED", "DELETING", "HIDING", "HIDDEN")


class Preempted(LaunchError):
    """The VM was taken away."""


class Host(NamedTuple):
    """What every part of a launch needs.

    Attributes:
      config: the launch.
      commands: its steps.
      run: runs a step; what it reports holds no secret.
      say: tells the user something, redacted.
      show: prints text of the run as it is, redacted.
      redact: blots secrets out of a text.
    """

    config: TpuVm
    commands: Commands
    run: Callable[[Step], str]
    say: Say
    show: Say
    redact: Callable[[str], str]


def host(config: TpuVm, command: Sequence[str], template: str, say: Say, show: Say) -> Host:
    """Check a configuration and bind its commands to the functions that run and report."""
    found, secrets = tpu_vm.commands(config, command, template)
    redact = redactor(secrets)
    return Host(
        config,
        found,
        lambda step: steps.run(step, redact),
        lambda text: say(redact(text)),
        lambda text: show(redact(text)),
        redact,
    )


def described_by(h: Host, step: Step) -> dict[str, Any] | None:
    """What gcloud says of a resource; None if it is not there."""
    try:
        # A run may take days, and one lost packet must not end it.
        return json.loads(_patiently(h, step, lambda error: why(h.config, error) == str(error)))
    except CommandError as error:
        if "NOT_FOUND" in error.stderr:
            return None
        raise LaunchError(why(h.config, error)) from error
    except json.JSONDecodeError as error:
        raise LaunchError(f"{steps.doing(step)} gave something other than JSON") from error


def queue_state(h: Host) -> str | None:
    """The state of the queued resource; None if it is not there."""
    assert h.commands.queue is not None
    described = described_by(h, h.commands.queue)
    return None if described is None else str(described.get("state", {}).get("state", "UNKNOWN"))


def _patiently(h: Host, step: Step, worth: Callable[[CommandError], bool]) -> str:
    """Run a step, and again while its failure is worth another attempt."""
    for _ in range(h.config.attempts - 1):
        try:
            return h.run(step)
        except CommandError as error:
            if "NOT_FOUND" in error.stderr or not worth(error):
                raise
            time.sleep(h.config.poll)
    return h.run(step)


def vm_state(h: Host) -> str | None:
    """The state of the VM; None if it is not there."""
    described = described_by(h, h.commands.describe)
    return None if described is None else str(described.get("state", "UNKNOWN"))


def why(config: TpuVm, error: CommandError) -> str:
    """What a failed creation means to its user."""
    text = error.stderr.lower()
    what = f"{config.type} in {config.zone}"
    if "quota" in text:
        return f"the quota for {what} is used up: ask for more, or choose another type or zone"
    if any(words in text for words in ("no more capacity", "stockout", "insufficient")):
        return f"there is no capacity for {what} now: try --queued, another zone, or later"
    if "active account" in text or "reauthentication" in text:
        return "gcloud is not logged in: run gcloud auth login"
    if "permission" in text:
        return f"this account may not create {what}: {steps.last_line(error.stderr)}"
    return str(error)


def remote(h: Host, step: Step, worth: Callable[[CommandError], bool] | None = None) -> str:
    """Run a step on the VM; if the VM was taken away, the error is `Preempted`.

    Args:
      h: the launch.
      step: what to run.
      worth: whether to try again after a failure; by default if there was no connection.

    Returns:
      What it wrote to standard output.
    """

    def again(error: CommandError) -> bool:
        check_there(h)
        return (worth or _is_connection)(error)

    try:
        return _patiently(h, step, again)
    except CommandError as error:
        check_there(h)
        if not _is_connection(error):
            raise
        raise LaunchError(
            f"{h.config.name} refuses connections ({h.config.attempts} attempts): see that ssh-add "
            "holds your key and that the firewall allows port 22"
        ) from error


def said_there(error: CommandError) -> str | None:
    """What the script on the first worker that failed says of it, if it came to run."""
    mark = "worker.sh: "
    lines = [line for line in error.stderr.splitlines() if line.startswith(mark)]
    return lines[0].removeprefix(mark).strip() if lines else None


def always(error: CommandError) -> bool:
    """For `remote`: looking does no harm, whatever went wrong."""
    del error
    return True


def _is_connection(error: CommandError) -> bool:
    if said_there(error) is not None:
        return False  # what it could not reach is another machine
    signs = ("return code [255]", "connection refused", "connection timed out", "connection reset")
    # A machine that is switched off does not refuse: its connections hang.
    return error.status in (255, steps.TIMED_OUT) or any(
        sign in error.stderr.lower() for sign in signs
    )


def check_there(h: Host) -> str:
    """The state of a VM that should be there.

    Raises:
      Preempted: it was taken away.
      LaunchError: somebody stopped or deleted it.
    """
    now = vm_state(h)
    if now in GONE or (now is None and h.config.spot):
        raise Preempted(f"{h.config.name} was preempted, more often than --restarts allows")
    if now is None or now in STOPPED:
        raise LaunchError(f"{h.config.name} is {now or 'gone'}: somebody stopped or deleted it")
    return now
