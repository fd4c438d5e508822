"""Steps of a launch: command lines and files, printed for a dry run or carried out.

Both come from the same list, so that what `--dry-run` shows is what happens.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jmeta.files import write_atomically
from jmeta.runtime.launch.signals import raise_pending, uninterrupted

Say = Callable[[str], None]

_GRACE = 5.0  # seconds between asking a child process to end and making it
_HEREDOC = "END_OF_FILE"


class LaunchError(Exception):
    """Why a launch ended, in one sentence for its user."""


TIMED_OUT = 124  # the status that timeout(1) gives


class CommandError(LaunchError):
    """A command line ended with a status other than zero, or took too long.

    Attributes:
      status: its exit status, or ``TIMED_OUT``.
      stderr: what it wrote to standard error.
    """

    def __init__(self, message: str, status: int, stderr: str):
        super().__init__(message)
        self.status, self.stderr = status, stderr


class Step(NamedTuple):
    """A command line.

    Attributes:
      argv: the program and its arguments; no shell reads them.
      timeout: seconds after which it is ended.
    """

    argv: tuple[str, ...]
    timeout: float = 600.0


class Write(NamedTuple):
    """A file to write.

    Attributes:
      path: where.
      text: what it holds.
      secret: names of the secrets in it; such a file is readable by its owner alone, never shown.
    """

    path: Path
    text: str
    secret: tuple[str, ...] = ()


class Section(NamedTuple):
    """Steps that belong together.

    Attributes:
      heading: when they happen, and how often.
      steps: in order.
    """

    heading: str
    steps: tuple[Step | Write, ...]


def render(sections: Sequence[Section]) -> str:
    r"""A plan as text that a shell reads: headings as comments, every argument quoted.

    Args:
      sections: the plan.

    Returns:
      Lines of shell, the last with a newline.

    Example:
      >>> print(render([Section("say it", (Step(("echo", "$(date); a b")),))]), end="")
      # say it
      echo '$(date); a b'
    """
    parts = []
    for section in sections:
        lines = [f"# {line}" for line in section.heading.splitlines()]
        parts.append("\n".join([*lines, *map(_shown, section.steps)]) + "\n")
    return "\n".join(parts)


def _shown(step: Step | Write) -> str:
    if isinstance(step, Step):
        return shlex.join(step.argv)
    path = shlex.quote(step.path.as_posix())
    if step.secret:
        return f"# {path}, of mode 600, holds {', '.join(step.secret)}"
    if not step.text:
        return f": > {path}"
    mark = _HEREDOC
    while mark in step.text:
        mark += "_"
    return f"cat > {path} <<'{mark}'\n{step.text.rstrip()}\n{mark}"


def write(step: Write) -> None:
    """Write the file of a step; a secret one is private from the moment it exists."""
    if not step.secret:
        write_atomically(step.path, step.text)
        return
    step.path.parent.mkdir(parents=True, exist_ok=True)
    step.path.unlink(missing_ok=True)
    descriptor = os.open(step.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(step.text)


def run(step: Step, redact: Callable[[str], str] = str) -> str:
    r"""Run a command line to its end.

    It gets no terminal and a process group of its own. Whatever ends the wait (a time limit, a
    signal) ends the whole group too, so that no child outlives its launcher.

    Args:
      step: what to run.
      redact: applied to all that is reported of it.

    Returns:
      What it wrote to standard output; bytes that are not UTF-8 are escaped as surrogates.

    Raises:
      CommandError: it took too long, or failed; the message then ends with the last line of its
        standard error.
      LaunchError: the program is not there.

    Example:
      >>> run(Step(("echo", "$HOME")))
      '$HOME\n'
    """
    program = step.argv[0]
    try:
        with uninterrupted():
            child = subprocess.Popen(
                step.argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
    except FileNotFoundError as error:
        raise LaunchError(f"{program} is not installed, or not on the PATH") from error
    except OSError as error:
        raise LaunchError(f"{program} could not be started: {error.strerror}") from error
    try:
        raise_pending()
        written = child.communicate(timeout=step.timeout)
    except subprocess.TimeoutExpired as error:
        said = f"{doing(step)} took longer than {step.timeout:g} s"
        raise CommandError(said, TIMED_OUT, "") from error
    finally:
        _end(child)
    out, err = (text.decode(errors="surrogateescape") for text in written)
    if child.returncode:
        said = redact(last_line(err) or last_line(out) or f"exit status {child.returncode}")
        raise CommandError(f"{doing(step)} failed: {said}", child.returncode, redact(err))
    return out


def _end(child: subprocess.Popen[bytes]) -> None:
    # The group may outlive its first process: a wrapper that died before its children.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def doing(step: Step) -> str:
    """The words of a command line before its first option or path, to name it in a sentence.

    Example:
      >>> doing(Step(("gcloud", "compute", "tpus", "tpu-vm", "ssh", "n", "--zone=z")))
      'gcloud compute tpus tpu-vm ssh'
    """
    words = []
    for word in step.argv:
        if not re.fullmatch(r"[a-z][a-z-]*", word) or len(words) == 5:
            break
        words.append(word)
    return " ".join(words) or Path(step.argv[0]).name


def last_line(text: str) -> str:
    """The last line that is not blank, as part of a sentence: no newline, no full stop.

    Example:
      >>> last_line("ERROR: (gcloud.x) no more capacity. ")
      '(gcloud.x) no more capacity'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR:").strip().rstrip(".") if lines else ""


def readable(text: str) -> str:
    """Text with the bytes that are not UTF-8 replaced, so that any terminal takes it."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def whole_lines(text: str, last: bool) -> str:
    r"""The part of a growing text that can be shown: up to a line's end, so no character is cut.

    Args:
      text: what is new.
      last: nothing more will come.

    Example:
      >>> whole_lines("step 1\nste", last=False)
      'step 1\n'
    """
    return text if last else text[: text.rfind("\n") + 1]


def every(seconds: float, limit: float | None = None) -> Iterator[float]:
    """Yield the seconds gone by, at once and then after each pause, until a limit.

    Example:
      >>> len(list(every(0.01, limit=0.0)))
      1
    """
    begun = time.monotonic()
    while True:
        gone = time.monotonic() - begun
        yield gone
        if limit is not None and gone >= limit:
            return
        time.sleep(seconds)
