"""A launch on Kubernetes, carried out: ship, create, follow, bring back, delete."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jmeta.runtime.launch import code, kubernetes, kubernetes_plan, signals, steps
from jmeta.runtime.launch.inputs import private, redactor
from jmeta.runtime.launch.kubernetes import Kubernetes
from jmeta.runtime.launch.kubernetes_plan import Commands
from jmeta.runtime.launch.signals import Interrupted
from jmeta.runtime.launch.steps import CommandError, LaunchError, Say, Step, Write

_ATTEMPTS = 5  # how often in a row the cluster may not answer


class Host(NamedTuple):
    """What every part of a launch needs.

    Attributes:
      config: the launch.
      commands: its steps.
      run: runs a step; what it reports holds no secret.
      say: tells the user something, redacted.
      show: prints text of the run as it is, redacted.
    """

    config: Kubernetes
    commands: Commands
    run: Callable[[Step], str]
    say: Say
    show: Say


def host(config: Kubernetes, command: Sequence[str], template: str, say: Say, show: Say) -> Host:
    """Check a configuration and bind its commands to the functions that run and report."""
    found, secrets = kubernetes_plan.commands(config, command, template)
    redact = redactor(secrets)
    return Host(
        config, found, lambda step: steps.run(step, redact),
        lambda text: say(redact(text)), lambda text: show(redact(text)),
    )  # fmt: skip


def launch(h: Host) -> None:
    """Run a command as a JobSet to its end.

    Raises:
      LaunchError: it did not succeed. What was created is deleted by then, or the message says so.
      Interrupted: the user ended it; the same holds.
    """
    config, c, out = h.config, h.commands, kubernetes.out_of(h.config)
    code.check_checkout(config.revision)
    if not config.resume:
        code.check_out(out, resume=False)
    created = begun = success = False
    with private(code.staging(out) / "secret.env"), signals.interrupts(h.say) as hold:
        try:
            for step in c.stage:
                steps.write(step) if isinstance(step, Write) else h.run(step)
            if _described(h, c.status) is not None:
                raise LaunchError(f"JobSet {config.name} is there already: delete or follow it")
            created = True
            h.say("shipping the code")
            for step in c.ship:
                said = h.run(step)
                if step == c.look:
                    _check_claim(config, filled=bool(said.strip()))
            if c.secret is not None:
                h.run(c.secret)
            _create(h)
            begun = True
            h.say(f"created JobSet {config.name}")
            if not config.detach:
                _follow(h)
            success = True
        finally:
            hold()
            if created and not (success and config.detach):
                _finish(h, begun, success)


def follow(h: Host) -> None:
    """Follow a run, and bring it back. Interrupting this leaves the run alone."""
    with signals.interrupts(h.say):
        if _described(h, h.commands.status) is None:
            raise LaunchError(f"there is no JobSet {h.config.name}")
        _follow(h)
        _bring(h)


def fetch(h: Host) -> None:
    """Bring back the run directory from the claim."""
    with signals.interrupts(h.say):
        _bring(h)


def delete(h: Host) -> None:
    """Delete the JobSet and its Secret; the claim keeps the run directory."""
    with signals.interrupts(h.say) as hold:
        hold()
        _delete(h)


def _check_claim(config: Kubernetes, filled: bool) -> None:
    # Started again by the cluster, a run goes on from what it finds: it must be its own.
    where = f"{kubernetes.RUNS}/{config.name} on the claim {config.claim}"
    if filled and not config.resume:
        raise LaunchError(f"{where} holds a run already: choose another --name, or --resume it")
    if config.resume and not filled:
        raise LaunchError(f"there is no run in {where} to --resume")


def _bring(h: Host) -> None:
    steps.write(h.commands.helper_file)
    try:
        for step in h.commands.place:
            h.run(step)
    except (LaunchError, Interrupted):
        h.run(h.commands.drop_helper)
        raise
    h.say(f"the run is in {kubernetes.out_of(h.config)}")


def _delete(h: Host) -> None:
    failed = None
    for step in h.commands.delete:
        try:
            h.run(step)
        except LaunchError as error:
            failed = failed or error
    if failed is not None:
        raise LaunchError(
            f"JobSet {h.config.name} could not be deleted and may run on ({failed})"
        ) from failed


def _finish(h: Host, begun: bool, success: bool) -> None:
    gone = h.config.delete == "always" or (h.config.delete == "success" and success)
    if begun:
        try:
            _bring(h)
        except LaunchError as error:
            h.say(f"the run stays on the claim {h.config.claim}: {error}")
            if gone:
                _delete(h)
            if success:
                raise
            return
    if gone or not begun:
        h.say(f"deleting JobSet {h.config.name}")
        _delete(h)
    else:
        line = steps.render([steps.Section("", h.commands.delete[:1])]).splitlines()[-1]
        h.say(
            f"JobSet {h.config.name} is kept, and runs on unless it has ended; to delete it: {line}"
        )


def _described(h: Host, step: Step) -> dict[str, Any] | None:
    try:
        return _json(h, step)
    except CommandError as error:
        if "not found" in error.stderr.lower() and "NotFound" in error.stderr:
            return None
        if "doesn't have a resource type" in error.stderr:
            raise LaunchError("this cluster has no JobSets: install jobset.sigs.k8s.io") from error
        raise


def _json(h: Host, step: Step) -> dict[str, Any]:
    try:
        return json.loads(h.run(step))
    except json.JSONDecodeError as error:
        raise LaunchError(f"{steps.doing(step)} gave something other than JSON") from error


def _create(h: Host) -> None:
    try:
        h.run(h.commands.create)
    except CommandError as error:
        if "exceeded quota" in error.stderr:
            raise LaunchError(
                f"the namespace's quota forbids this JobSet ({steps.last_line(error.stderr)})"
            ) from error
        raise


def _follow(h: Host) -> None:
    since, restarts, ran, failures = None, 0, False, 0
    for gone in steps.every(h.config.poll):
        try:
            described = _described(h, h.commands.status)
            pods = _json(h, h.commands.pods).get("items", [])
            failures = 0
        except CommandError:
            failures += 1
            if failures >= _ATTEMPTS:
                raise
            continue
        if described is None:
            raise LaunchError(f"JobSet {h.config.name} is gone: somebody deleted it")
        status = described.get("status", {})
        ran = ran or any(_phase(pod) not in ("Pending", "") for pod in pods)
        if ran:
            since = _show_log(h, since)
        if status.get("restarts", 0) > restarts:
            restarts = status["restarts"]
            h.say(f"the cluster restarted it: {restarts}/{h.config.restarts}")
        if _holds(status, "Completed"):
            return
        if _holds(status, "Failed"):
            raise LaunchError(_why_failed(h, pods, restarts))
        if not ran and gone >= h.config.wait:
            raise LaunchError(
                f"no process was running after {h.config.wait:g} s: {_why_pending(pods)}"
            )


def _holds(status: dict[str, Any], kind: str) -> bool:
    return any(
        condition.get("type") == kind and condition.get("status") == "True"
        for condition in status.get("conditions", [])
    )


def _phase(pod: dict[str, Any]) -> str:
    return pod.get("status", {}).get("phase", "")


def _show_log(h: Host, since: str | None) -> str | None:
    """Show what is new since a moment; each line comes with its time, to the nanosecond."""
    try:
        lines = h.run(kubernetes_plan.log(h.config, since)).splitlines()
    except CommandError:
        return since  # the process is being restarted
    for line in lines:
        moment, _, text = line.partition(" ")
        # --since-time counts whole seconds: some lines come twice.
        if since is None or moment > since:
            h.show(steps.readable(text) + "\n")
            since = moment
    return since


def _why_failed(h: Host, pods: list[dict[str, Any]], restarts: int) -> str:
    times = f" after {restarts} restarts" if restarts else ""
    for pod in pods:
        for state in pod.get("status", {}).get("containerStatuses", []):
            ended = state.get("state", {}).get("terminated", {})
            if ended.get("exitCode", 0) != 0:
                reason = ended.get("reason", "Error")
                return (
                    f"the command failed on {pod['metadata']['name']} with exit status "
                    f"{ended['exitCode']} ({reason}){times}"
                )
    return f"JobSet {h.config.name} failed{times}: its nodes were taken away or its pods deleted"


def _why_pending(pods: list[dict[str, Any]]) -> str:
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", []):
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                return steps.last_line(condition.get("message", "it is not scheduled"))
        for state in pod.get("status", {}).get("containerStatuses", []):
            waiting = state.get("state", {}).get("waiting", {})
            if waiting.get("reason"):
                return f"{waiting['reason']} ({steps.last_line(waiting.get('message', ''))})"
    return "its pods are not there yet"
