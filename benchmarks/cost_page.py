"""Fill docs/cost.md from committed results: ``python -m benchmarks.cost_page``.

With ``--publish RUNS`` the results in ``RUNS/NAME`` are committed first, with their figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    auto,
    fast_weights_cost,
    minilm_maml,
    peers,
    readme,
    scaling_laws,
    second_order_bars,
    what_it_buys,
)
from jmeta.files import write_atomically

PAGE = readme.ROOT / "docs" / "cost.md"
TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "peers": peers.table,
    "auto": auto.table,
    "scaling_laws": scaling_laws.table,
    "what_it_buys": what_it_buys.table,
}


NETWORKS = "networks"  # a place of two results
BARS = "bars"  # a place of all results that are held to bars
JUDGED: dict[str, Callable[[Sequence[dict[str, Any]]], list[str]]] = {
    "second_order_cost-lm": lambda rows: [
        *second_order_bars.bars(rows),
        *second_order_bars.errors(rows),
    ],
    "second_order_cost-mlp": second_order_bars.errors,
    "second_order_cost-conv": second_order_bars.errors,
    "peers": peers.bars,
    "auto": auto.bars,
    "fast_weights_cost": fast_weights_cost.bars,
    "minilm_maml": minilm_maml.bars,
}
# Those that stand in the place itself, since they may not be there yet.
PICTURES = {
    "auto": "time and memory of what jmeta.auto chose",
    "scaling_laws": "time and memory against inner steps, parameters, tokens and tasks",
}


def places(folder: Path = readme.RESULTS) -> dict[str, str | None]:
    """What each marked place of the page holds: one for each result that is committed."""
    filled: dict[str, str | None] = {}
    for name, make in TABLES.items():
        if (folder / f"{name}.json").exists():
            result = readme.read(name, folder)
            blocks = [make(result["rows"]), made_by(result)]
            if name in PICTURES and (folder / f"{name}.png").exists():
                blocks.append(f"![{PICTURES[name]}](../benchmarks/results/{name}.png)")
            filled[name] = "\n\n".join(blocks)
    small = [name for name in second_order_bars.NETWORKS if (folder / f"{name}.json").exists()]
    if small:
        results = {name: readme.read(name, folder) for name in small}
        table = second_order_bars.networks({name: r["rows"] for name, r in results.items()})
        filled[NETWORKS] = "\n".join([table, "", *map(made_by, results.values())])
    if held := held_to(folder):
        filled[BARS] = held
    return filled


def held_to(folder: Path = readme.RESULTS) -> str:
    """What every committed result is held to: a list for each, those that are missed in bold."""
    blocks = []
    for name, bars in JUDGED.items():
        if (folder / f"{name}.json").exists():
            result = readme.read(name, folder)
            lines = sorted(bars(result["rows"]), key=lambda line: "MISSED" not in line)
            said = [f"- **{line}**" if "MISSED" in line else f"- {line}" for line in lines]
            blocks.append("\n".join([f"`{name}`: {made_by(result)}", "", *said]))
    return "\n\n".join(blocks)


def made_by(result: dict[str, Any]) -> str:
    """The device and the command of a result, as a sentence."""
    parts = [str(result["devices"] or ""), f"`{result['command']}`"]
    return "; ".join(filter(None, parts)) + "."


def publish(runs: Path, folder: Path = readme.RESULTS, page: Path = PAGE) -> list[str]:
    """Copy the results of runs into the folder of committed ones.

    Args:
        runs: a folder with a run directory for each benchmark.
        folder: where to.
        page: where their tables will stand.

    Returns:
        The names of the benchmarks that were found.

    Raises:
        ValueError: the page has no place for one of them; nothing is copied then.
    """
    found = [name for name in TABLES if (runs / name / "results.json").exists()]
    readme.fill(page.read_text(encoding="utf-8"), dict.fromkeys(found))
    for name in found:
        source = runs / name
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
    if argv and not (argv[0] == "--publish" and len(argv) == 2):
        raise SystemExit("usage: python -m benchmarks.cost_page [--publish RUNS]")
    try:
        if argv:
            print("published:", ", ".join(publish(Path(argv[1]))) or "nothing")
        text = readme.fill(PAGE.read_text(encoding="utf-8"), places())
    except ValueError as error:
        raise SystemExit(f"{PAGE.name}: {error}") from error
    write_atomically(PAGE, text)


if __name__ == "__main__":
    main(sys.argv[1:])
