"""What a run was: its command without anyone's folders, versions, devices, git commit."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def versions() -> dict[str, Any]:
    """Versions of what decides a result, and the git commit of the working directory, if any."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("jmeta", "jax", "jaxlib", "optax", "flax", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["libtpu"] = importlib.metadata.version("libtpu")  # the compiler, where there is one
    commit = _git("rev-parse", "HEAD")
    found["git_commit"] = commit or None
    if commit:
        found["git_modified"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return found


def portable(argument: str) -> str:
    """An argument without the user's folders: relative if below the working directory, else bare.

    Example:
      >>> portable("--out=/home/someone/runs/a"), portable("0.1")
      ('--out=a', '0.1')
    """
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", "")
    path = Path(value if equals else argument)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(Path.cwd())
    short = path.relative_to(Path.cwd()).as_posix() if inside else path.name
    return flag + equals + short


def program_of(module: str) -> str:
    """The dotted module that the user ran: the dataclass's own, unless that is `__main__`."""
    if module != "__main__":
        return module
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        return spec.name.removesuffix(".__main__")
    return Path(sys.argv[0]).name or "python"


def command_of(program: str, arguments: list[str]) -> str:
    """The command that repeats a run, e.g. `python -m experiments.sinusoid --seeds 5`."""
    start = ["python", program] if program.endswith(".py") else ["python", "-m", program]
    return shlex.join([*start, *map(portable, arguments)])


def devices() -> str | None:
    """Number and kind of the devices in use; None if JAX was not imported."""
    if "jax" not in sys.modules:
        return None
    import jax

    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind}"


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
