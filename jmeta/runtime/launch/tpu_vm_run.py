"""A launch on a TPU VM, carried out: obtain, ship, start, follow, bring back, restart, delete.

Whatever happens, what this launch created is deleted, unless its user said otherwise.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import NoReturn

from jmeta.files import write_atomically
from jmeta.runtime.launch import code, signals, steps, tpu_vm
from jmeta.runtime.launch.inputs import private
from jmeta.runtime.launch.steps import CommandError, LaunchError, Step, Write
from jmeta.runtime.launch.tpu_vm_host import (
    GONE,
    STOPPED,
    Host,
    Preempted,
    always,
    check_there,
    queue_state,
    remote,
    vm_state,
    why,
)
from jmeta.runtime.launch.tpu_vm_ship import mount, ship

_QUEUE_FAILED = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
_DELETE_ATTEMPTS = 3


class AlreadyThere(LaunchError):
    """Somebody else created a VM of this name in the meantime: it is not ours to delete."""


def launch(h: Host) -> None:
    """Run a command on a TPU VM to its end, through preemptions.

    Args:
      h: what `host` gave.

    Raises:
      LaunchError: it did not succeed. What was created is deleted by then, or the message says so.
      Interrupted: the user ended it; the same holds.
    """
    config, out, shared = h.config, tpu_vm.out_of(h.config), tpu_vm.shared_of(h.config)
    code.check_checkout(config.revision)
    if not (shared and config.resume):  # whose run may be there alone
        code.check_out(out, config.resume)
    stage = code.staging(out)
    created = shipped = begun = success = False
    with private(stage / "env.sh"), signals.interrupts(h.say) as hold:
        try:
            for step in h.commands.stage:
                steps.write(step) if isinstance(step, Write) else h.run(step)
            if config.resume and code.is_filled(out):
                h.run(code.pack(out, stage / "run.tar.gz"))
            else:
                (stage / "run.tar.gz").unlink(missing_ok=True)
            missing = not _find(h)
            for attempt in range(config.restarts + 1):
                try:
                    if missing:
                        created = True
                        _create(h, patient=attempt > 0)
                    _wait_until_ready(h)
                    shipped = True
                    ship(h, config.resume or attempt > 0)
                    if shared is not None:
                        mount(h, shared, begun)
                    begun = True
                    remote(h, h.commands.resume if config.resume or attempt else h.commands.start)
                    h.say("the run has begun")
                    if not config.detach:
                        _follow(h)
                    break
                except Preempted:
                    if attempt == config.restarts:
                        raise
                    h.say(f"{config.name} was preempted: restart {attempt + 1}/{config.restarts}")
                    _delete(h)
                    missing = True
            success = True
        except AlreadyThere:
            created = False
            raise
        finally:
            hold()
            if not (success and config.detach):
                if shipped and not success:
                    h = _stopped(h)
                _finish(h, begun, created, success)


def follow(h: Host) -> None:
    """Follow a run that has begun, and bring it back. Interrupting this leaves the run alone."""
    with signals.interrupts(h.say):
        if vm_state(h) is None:
            raise LaunchError(f"there is no TPU VM {h.config.name} in {h.config.zone}")
        _follow(h)
        _fetch(h)


def fetch(h: Host) -> None:
    """Bring back the run directory of worker 0, and every worker's log."""
    with signals.interrupts(h.say):
        _fetch(h)


def _fetch(h: Host) -> None:
    stage = code.staging(tpu_vm.out_of(h.config))
    (stage / "logs").mkdir(parents=True, exist_ok=True)
    _bring(h)
    h.run(h.commands.logs)
    for file in (stage / "logs").glob("*.log"):
        text = file.read_text(encoding="utf-8", errors="replace")
        write_atomically(file, h.redact(text))
    h.say(f"the run is in {tpu_vm.out_of(h.config)}, its workers' logs are in {stage / 'logs'}")


def delete(h: Host) -> None:
    """Delete the VM, or the queued resource it belongs to."""
    with signals.interrupts(h.say) as hold:
        hold()
        _delete(h)


def _stopped(h: Host) -> Host:
    """Ask the run to end: it saves a checkpoint, which can then be brought back."""
    with contextlib.suppress(LaunchError):
        h.run(h.commands.stop)
    # One attempt from now on: the VM may not answer any more, and costs while it is waited for.
    return h._replace(config=dataclasses.replace(h.config, attempts=1))


def _finish(h: Host, begun: bool, created: bool, success: bool) -> None:
    config, shared, lost = h.config, tpu_vm.shared_of(h.config), None
    if begun:
        try:
            _fetch(h)
        except LaunchError as error:
            if success and shared is None:
                h.say(f"the VM is kept: its run could not be brought back ({error})")
                raise
            stays = "" if shared is None else f"; the run is in {shared.name}"
            h.say(f"nothing newer was brought back ({error}){stays}")
            lost = error if success else None
    if created and (config.delete == "always" or (config.delete == "success" and success)):
        _delete(h)
    elif created:
        h.say(f"{config.name} is kept, and costs; to delete it: {_line(h.commands.delete)}")
    if lost is not None:
        raise lost


def _line(step: Step) -> str:
    return steps.render([steps.Section("", (step,))]).splitlines()[-1]


def _find(h: Host) -> bool:
    """Whether the VM, or the request for it, is there; the remains of a preempted one are not."""
    state = vm_state(h)
    if h.commands.queue is not None and state is None:
        state = queue_state(h)
    if state in (*GONE, *_QUEUE_FAILED):
        h.say(f"{h.config.name} is there, but {state}")
        _delete(h)
        return False
    return state is not None


def _create(h: Host, patient: bool) -> None:
    """Create the VM.

    Args:
      h: the launch.
      patient: keep trying while there is no capacity: after a preemption there often is none.
    """
    config = h.config
    assert h.commands.create is not None
    h.say(f"creating {config.name} ({config.type}, {config.zone})")
    for gone in steps.every(config.poll, config.wait):
        try:
            h.run(h.commands.create)
            return
        except CommandError as error:
            if "ALREADY_EXISTS" in error.stderr:
                raise AlreadyThere(f"somebody else just created {config.name}") from error
            reason = why(config, error)
            if not (patient and "no capacity" in reason) or gone >= config.wait:
                raise LaunchError(reason) from error


def _wait_until_ready(h: Host) -> None:
    deadline = time.monotonic() + h.config.wait
    if h.commands.queue is not None:
        _wait(h, deadline, lambda: queue_state(h), "ACTIVE", _QUEUE_FAILED)
    _wait(h, deadline, lambda: vm_state(h), "READY", STOPPED)


def _wait(
    h: Host, deadline: float, look: Callable[[], str | None], wanted: str, bad: tuple[str, ...]
) -> None:
    state = None
    for _ in steps.every(h.config.poll, deadline - time.monotonic()):
        state = look()
        if state == wanted:
            return
        if state in GONE:
            raise Preempted(f"{h.config.name} was preempted before it was ready")
        if state in bad:
            raise LaunchError(f"{h.config.name} is {state}, and will not become {wanted}")
    raise LaunchError(
        f"{h.config.name} was not {wanted} after {h.config.wait:g} s, but {state or 'not there'}: "
        "allow more with --wait, or try another zone"
    )


def _follow(h: Host) -> None:
    """Show the log and copy the run until every worker has ended.

    Raises:
      Preempted: the VM was taken away.
      LaunchError: a worker failed.
    """
    offset, copied = 0, time.monotonic()
    for _ in steps.every(h.config.poll):
        check_there(h)
        states = _workers(remote(h, h.commands.status, always))
        ended = bool(states) and all(state == "exited 0" for _, state in states)
        failed = [(name, state) for name, state in states if state not in ("running", "exited 0")]
        offset = _show_log(h, offset, last=ended or bool(failed))
        if failed:
            _fail(h, *failed[0])
        if ended:
            return
        if h.commands.mount is None and time.monotonic() - copied >= h.config.sync:
            try:
                _bring(h)
            except LaunchError as error:
                h.say(f"the run was not copied this time ({error})")
            copied = time.monotonic()


def _workers(text: str) -> list[tuple[str, str]]:
    rows = [line.split(maxsplit=2) for line in text.splitlines()]
    return [(row[1], row[2]) for row in rows if len(row) == 3 and row[0] == "worker"]


def _show_log(h: Host, offset: int, last: bool) -> int:
    text = steps.whole_lines(remote(h, tpu_vm.log(h.config, offset), always), last)
    if text:
        h.show(steps.readable(text))
    return offset + len(text.encode(errors="surrogateescape"))


def _fail(h: Host, worker: str, state: str) -> NoReturn:
    # Processes of a VM that is being taken away end first, and its state changes after.
    time.sleep(h.config.poll)
    check_there(h)
    stage = code.staging(tpu_vm.out_of(h.config))
    if state.startswith("exited"):
        status = state.removeprefix("exited").strip()
        raise LaunchError(
            f"the command failed on worker {worker} with exit status {status}: see {stage / 'logs'}"
        )
    raise LaunchError(
        f"the command vanished from worker {worker} ({state}): the machine was rebooted or out of "
        "memory; go on with --resume"
    )


def _bring(h: Host) -> None:
    for step in (h.commands.pack, h.commands.bring):
        remote(h, step)
    for step in h.commands.place:
        h.run(step)


def _delete(h: Host) -> None:
    h.say(f"deleting {h.config.name}")
    for attempt in range(_DELETE_ATTEMPTS):
        try:
            h.run(h.commands.delete)
            return
        except LaunchError as error:
            if isinstance(error, CommandError) and "NOT_FOUND" in error.stderr:
                return
            if attempt < _DELETE_ATTEMPTS - 1:
                time.sleep(h.config.poll)
    raise LaunchError(
        f"{h.config.name} could not be deleted and may cost money: run {_line(h.commands.delete)}"
    )
