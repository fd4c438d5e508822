"""What a launch takes from its user, checked: names, the command, environment variables, secrets.

Nothing that reaches a shell, a label or a file name does so unquoted or unchecked.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jmeta.runtime.launch.steps import LaunchError

# TOKENIZERS_PARALLELISM is no secret, and set on many a machine.
_SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_REDACTED = "***"
# Shorter values would blot out ordinary words of a log. What the user gives as a secret, under the
# name of one, is taken more strictly.
_SHORTEST, _SHORTEST_NAMED = 8, 4


def check_name(value: str, flag: str = "--name") -> str:
    """A name that Google Cloud, Kubernetes and Slurm all accept.

    Raises:
      LaunchError: it is not one.

    Example:
      >>> check_name("reviews-1")
      'reviews-1'
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", value):
        raise LaunchError(
            f"{flag} {value!r} must be 1 to 40 lower-case letters, digits and hyphens, begin with "
            "a letter and not end with a hyphen"
        )
    return value


def check_word(value: str, flag: str, allowed: str = "A-Za-z0-9._:/@=-") -> str:
    """A value of an option of the clouds' tools: one word that cannot be taken for an option.

    Raises:
      LaunchError: it is empty, begins with a hyphen or holds other characters.
    """
    if not re.fullmatch(rf"[{allowed}]+", value) or value.startswith("-"):
        raise LaunchError(
            f"{flag} {value!r} may hold only letters, digits and some of . _ : / @ = -"
        )
    return value


def check_path(path: Path, flag: str = "--out") -> Path:
    """A path that no tool takes for an option, a remote host or two lines.

    Raises:
      LaunchError: one of them would.

    Example:
      >>> check_path(Path("runs/my run")).name
      'my run'
    """
    text = path.as_posix()
    if text.startswith("-") or re.search(r"[:,\x00-\x1f]", text) or path.name in ("", ".."):
        raise LaunchError(
            f"{flag} {text!r} must name a folder, hold no colon, comma or line break and not begin "
            "with a hyphen"
        )
    return path


def check_command(command: Sequence[str], secrets: Mapping[str, str]) -> tuple[str, ...]:
    """The module to run and its arguments, as given after `--`.

    Args:
      command: for example ``["experiments.reviews", "--preset", "full"]``.
      secrets: values that must not appear in it; everyone on a machine can read command lines.

    Returns:
      The command.

    Raises:
      LaunchError: there is none, it is not a module, or an argument cannot be passed on.

    Example:
      >>> check_command(["experiments.sinusoid", "--seeds", "3"], {})
      ('experiments.sinusoid', '--seeds', '3')
    """
    if not command:
        raise LaunchError("say what to run after --, for example: -- experiments.sinusoid")
    if not _MODULE.fullmatch(command[0]):
        raise LaunchError(
            f"the first word after -- is a module such as experiments.sinusoid, not {command[0]!r}"
        )
    for argument in command[1:]:
        if "\0" in argument:
            raise LaunchError("an argument of the command holds a NUL character")
        # Two writers of one folder, or a folder that is not brought back, lose a run.
        if argument.partition("=")[0] == "--out":
            raise LaunchError(
                "leave --out out of the command: the launcher sets it, and its own --out says "
                "where the run directory comes back to"
            )
        if argument == "--resume":
            raise LaunchError("leave --resume out of the command: give it before the --")
        for name, value in secrets.items():
            if value in argument:
                raise LaunchError(
                    f"an argument of the command holds the value of {name}: pass it with "
                    "--env-file, because command lines are public"
                )
    return tuple(command)


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is one.

    Example:
      >>> is_secret("HF_TOKEN"), is_secret("JAX_PLATFORMS")
      (True, False)
    """
    return _SECRET.search(name) is not None


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """Variables from `--env NAME=VALUE`.

    Raises:
      LaunchError: a pair is not one, or its name is that of a secret.

    Example:
      >>> parse_env(["JAX_DEBUG_NANS=1"])
      {'JAX_DEBUG_NANS': '1'}
    """
    found = {}
    for pair in pairs:
        name, value = _pair(pair, "--env")
        if is_secret(name):
            raise LaunchError(
                f"{name} looks like a secret: put it into a file and pass that with --env-file"
            )
        found[name] = value
    return found


def read_env_file(path: Path | None) -> dict[str, str]:
    """Variables from a file of NAME=VALUE lines; values are taken literally, # begins a comment.

    Raises:
      LaunchError: the file cannot be read or a line is not such a pair; no value is quoted.
    """
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LaunchError(f"--env-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LaunchError(f"--env-file {path} is not UTF-8 text") from error
    pairs = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return dict(_pair(pair, f"--env-file {path}") for pair in pairs)


def _pair(pair: str, where: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not _VARIABLE.fullmatch(name):
        # The text itself may be a secret.
        raise LaunchError(f"{where}: every entry is NAME=VALUE with a NAME of letters, digits, _")
    if any(character in value for character in "\0\n\r"):
        raise LaunchError(f"{where}: the value of {name} holds a line break")
    return name, value


class Environment(NamedTuple):
    """The variables of a run.

    Attributes:
      public: from --env.
      private: from --env-file: all of it is kept out of sight.
      secrets: the values that must never be shown, the launcher's own among them.
    """

    public: dict[str, str]
    private: dict[str, str]
    secrets: dict[str, str]


def environment(pairs: Sequence[str], file: Path | None) -> Environment:
    """The variables of a run, from --env and --env-file.

    Raises:
      LaunchError: an entry cannot be read, or a name stands in both.
    """
    public, private = parse_env(pairs), read_env_file(file)
    both = sorted(public.keys() & private.keys())
    if both:
        raise LaunchError(f"{both[0]} is both in --env and in --env-file")
    secrets = known_secrets(private)
    for name, value in public.items():
        for hidden in secrets.values():
            if hidden in value:
                raise LaunchError(f"--env {name} holds a secret: pass it with --env-file")
    return Environment(public, private, secrets)


def exports(variables: Mapping[str, str]) -> str:
    r"""A shell script that sets variables.

    Example:
      >>> exports({"A": "x y"})
      "export A='x y'\n"
    """
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def known_secrets(given: Mapping[str, str]) -> dict[str, str]:
    """Values that nothing may print: those of the env file, and the launcher's own secrets."""
    own = {name: value for name, value in os.environ.items() if is_secret(name)}
    likely = {
        name: value
        for name, value in {**own, **given}.items()
        if len(value) >= _SHORTEST and not os.path.exists(value)
    }
    named = {n: v for n, v in given.items() if is_secret(n) and len(v) >= _SHORTEST_NAMED}
    return {**likely, **named}


def redactor(secrets: Mapping[str, str]) -> Callable[[str], str]:
    """A function that blots secrets out of a text.

    Example:
      >>> redactor({"HF_TOKEN": "abcdef"})("login with abcdef failed")
      'login with *** failed'
    """
    values = sorted({value for value in secrets.values() if value}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, values)) or r"(?!)")
    return lambda text: pattern.sub(_REDACTED, text)


@contextlib.contextmanager
def private(path: Path) -> Iterator[None]:
    """Remove a file with secrets at the end, however that comes."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
