"""Fill docs/cost.md from committed results: ``python -m benchmarks.cost_page``.

With ``--publish RUNS`` the results in ``RUNS/NAME`` are committed first, with their figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import auto, peers, readme, scaling_laws, what_it_buys
from jmeta.files import write_atomically

PAGE = readme.ROOT / "docs" / "cost.md"
TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "peers": peers.table,
    "auto": auto.table,
    "scaling_laws": scaling_laws.table,
    "what_it_buys": what_it_buys.table,
}


def places(folder: Path = readme.RESULTS) -> dict[str, str | None]:
    """What each marked place of the page holds: one for each result that is committed."""
    filled: dict[str, str | None] = {}
    for name, make in TABLES.items():
        if (folder / f"{name}.json").exists():
            result = readme.read(name, folder)
            parts = [str(result["devices"] or ""), f"`{result['command']}`"]
            filled[name] = make(result["rows"]) + "\n\n" + "; ".join(filter(None, parts)) + "."
    return filled


def publish(runs: Path, folder: Path = readme.RESULTS) -> list[str]:
    """Copy the results of runs into the folder of committed ones.

    Args:
        runs: a folder with a run directory for each benchmark.
        folder: where to.

    Returns:
        The names of the benchmarks that were found.
    """
    found = []
    for name in TABLES:
        source = runs / name
        if not (source / "results.json").exists():
            continue
        found.append(name)
        write_atomically(folder / f"{name}.json", (source / "results.json").read_bytes())
        run = json.loads((source / "run.json").read_text(encoding="utf-8"))
        # A run in pieces is repeated by its preset, and by the problems that it has.
        rows = json.loads((source / "results.json").read_text(encoding="utf-8"))["rows"]
        problems = dict.fromkeys(row["problem"] for row in rows if "problem" in row)
        only = f" --problems {' '.join(problems)}" if name == "peers" else ""
        run["command"] = f"python -m benchmarks.{name} --preset {run['preset']}{only}"
        write_atomically(folder / f"{name}.run.json", json.dumps(run, indent=2) + "\n")
        for picture in [*source.glob(f"{name}*.png"), *source.glob(f"{name}*.svg")]:
            write_atomically(folder / picture.name, picture.read_bytes())
    return found


def main(argv: Sequence[str]) -> None:
    """Publish, if asked to, and write the page."""
    if argv[:1] == ["--publish"] and len(argv) == 2:
        print("published:", ", ".join(publish(Path(argv[1]))) or "nothing")
    elif argv:
        raise SystemExit("usage: python -m benchmarks.cost_page [--publish RUNS]")
    text = readme.fill(PAGE.read_text(encoding="utf-8"), places())
    write_atomically(PAGE, text)


if __name__ == "__main__":
    main(sys.argv[1:])
