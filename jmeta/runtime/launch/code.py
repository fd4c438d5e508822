"""The code and the run directory on their way there and back: archives, folders, checks."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from jmeta.runtime.launch.inputs import check_word
from jmeta.runtime.launch.steps import LaunchError, Step


def staging(out: Path) -> Path:
    """The folder beside a run directory for what a launch keeps here: archives, scripts, logs.

    Example:
      >>> staging(Path("runs/a")).as_posix()
      'runs/a.launch'
    """
    return out.with_name(out.name + ".launch")


def archive(revision: str | None, file: Path) -> Step:
    """The step that packs the tracked files of a revision."""
    name = "HEAD" if revision is None else check_word(revision, "--revision", "A-Za-z0-9._/^~-")
    return Step(("git", "archive", "--format=tar.gz", f"--output={file.as_posix()}", name))


def check_checkout(revision: str | None) -> None:
    """See that the working directory is the root of a checkout whose HEAD is what would run.

    Args:
      revision: what the user asked for; None means HEAD, if nothing differs from it.

    Raises:
      LaunchError: it is not.
    """
    if not (Path("experiments").is_dir() and Path("setup.cfg").is_file()):
        raise LaunchError("launch from the root of the checkout: it is what is shipped")
    if revision is not None:
        return
    try:
        done = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LaunchError("git is not installed, or not on the PATH") from error
    if done.returncode:
        raise LaunchError("this folder is not a git checkout, and the code is shipped from one")
    changed = done.stdout.splitlines()
    if changed:
        raise LaunchError(
            f"{len(changed)} tracked files differ from HEAD and would stay behind: commit them, or "
            "say --revision HEAD to run the last commit as it is"
        )


def check_out(out: Path, resume: bool) -> None:
    """See that a run that comes back will not take the place of another.

    Raises:
      LaunchError: the folder holds something and the run does not go on from it, or the reverse.
    """
    filled = is_filled(out)
    if filled and not resume:
        raise LaunchError(f"{out} holds a run already: choose another --out, or --resume it")
    if resume and not filled:
        raise LaunchError(f"there is no run in {out} to --resume")


def is_filled(out: Path) -> bool:
    """Whether a folder holds something."""
    return out.is_dir() and any(out.iterdir())


def pack(out: Path, file: Path) -> Step:
    """The step that packs a run directory."""
    return Step(("tar", "-czf", file.as_posix(), "-C", out.as_posix(), "."))


def unpack(file: Path, out: Path) -> tuple[Step, ...]:
    """Steps that put a packed run directory in the place of the one that is there."""
    return replace(out, lambda new: Step(("tar", "-xzf", file.as_posix(), "-C", new)))


def replace(out: Path, fill: Callable[[str], Step]) -> tuple[Step, ...]:
    """Steps that replace a folder; the old one goes when the new one is whole.

    Args:
      out: the folder.
      fill: the step that fills a new folder of the given path.

    Returns:
      The steps.
    """
    new, old = (out.with_name(f"{out.name}.{what}").as_posix() for what in ("new", "old"))
    return (
        Step(("rm", "-rf", new, old)),
        Step(("mkdir", "-p", new, out.as_posix())),
        fill(new),
        Step(("mv", out.as_posix(), old)),
        Step(("mv", new, out.as_posix())),
        Step(("rm", "-rf", old)),
    )
