"""Make a run citable: its numbers, command, figures and a page of tables under benchmarks/results.

For example ``python -m benchmarks.publish runs/two_moons two_moons-paper --parts methods/*.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.readme import RESULTS
from jmeta.files import write_atomically
from jmeta.runtime import report

_VERSIONS = ("jax", "optax", "numpy")


def publish(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    /,
    said: str | None = None,
    parts: tuple[str, ...] = (),
    results: Path = RESULTS,
) -> Path:
    """Copy what is worth citing of a run directory, and write its page.

    Args:
        run: the run directory; it holds results.json and run.json.
        name: what the results are called, ``NAME`` or ``NAME-setting``.
        said: paragraphs for the page, between command and tables; by default those that the page
            has already.
        parts: patterns of files in the run directory that are kept under results/NAME, so that a
            later run goes on from them.
        results: the folder.

    Returns:
        The page, ``NAME.md``.

    Raises:
        ValueError: the run was made from files that no commit holds, or a pattern matches nothing.
    """
    content = report.read_results(run)
    made = json.loads((run / "run.json").read_text(encoding="utf-8"))
    if made["versions"].get("git_modified", True):
        raise ValueError(
            f"{run} was made from files that no commit holds: commit them, and run it again"
        )
    kept = {pattern: sorted(run.glob(pattern)) for pattern in parts}
    if nothing := [pattern for pattern, files in kept.items() if not files]:
        raise ValueError(f"nothing in {run} matches {', '.join(nothing)}")
    page = results / f"{name}.md"
    said = paragraphs(page) if said is None else said
    pictures = sorted(run.glob("*.png"))

    for source, copy in (("results.json", f"{name}.json"), ("run.json", f"{name}.run.json")):
        write_atomically(results / copy, (run / source).read_bytes())
    for picture in (*pictures, *sorted(run.glob("*.svg"))):
        write_atomically(results / f"{name}-{picture.name}", picture.read_bytes())
    for file in {file for files in kept.values() for file in files}:
        write_atomically(results / name / file.relative_to(run), file.read_bytes())
    return write_atomically(page, _page(name, made, said, content["summary"], pictures))


def paragraphs(page: Path) -> str:
    """What a page says between its command and its versions; nothing if it is not there."""
    if not page.exists():
        return ""
    blocks = page.read_text(encoding="utf-8").split("\n\n")
    command = next((at for at, block in enumerate(blocks) if block.startswith("    ")), None)
    versions = next((at for at, block in enumerate(blocks) if block.startswith("jax ")), None)
    if command is None or versions is None:
        raise ValueError(f"{page} names no command and versions: give what it says with --said")
    return "\n\n".join(blocks[command + 1 : versions])


def _page(
    name: str,
    made: dict[str, Any],
    said: str,
    summary: Sequence[dict[str, Any]],
    pictures: Sequence[Path],
) -> str:
    versions = made["versions"]
    used = [f"{package} {versions[package]}" for package in _VERSIONS]
    device = (made.get("devices") or "cpu").partition(" x ")[2].upper() or "CPU"
    blocks = [
        f"# {name}",
        f"    {made['command']}",
        said.strip(),
        ", ".join([*used, f"Python {versions['python']}", device]) + ".",
        report.markdown_table(summary),
        *(f"![{file.stem.replace('-', ' ')}]({name}-{file.name})" for file in pictures),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


if __name__ == "__main__":
    try:
        print(tyro.cli(publish))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
