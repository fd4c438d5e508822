"""The benchmarks of docs/cost.md one after the other: ``python -m benchmarks.suite``.

Each writes JSON, table and figure into a folder of its own; one that fails does not stop the rest.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.pieces import CostConfig, Rows
from jmeta.files import write_atomically
from jmeta.runtime import config as configuration
from jmeta.runtime import report, statistics

# The preset of each benchmark under each preset of the suite.
PARTS = {
    "second_order_cost": {"paper": "lm", "quick": "mlp", "smoke": "smoke"},
    "peers": {"paper": "paper", "quick": "quick", "smoke": "smoke"},
    "auto": {"paper": "paper", "quick": "quick", "smoke": "smoke"},
    "scaling_laws": {"paper": "paper", "quick": "quick", "smoke": "smoke"},
    "what_it_buys": {"paper": "paper", "quick": "quick", "smoke": "smoke"},
}

WHOLE = ("second_order_cost",)  # keeps nothing to go on from


@dataclasses.dataclass(frozen=True)
class Config(CostConfig):
    """The benchmarks of second order's cost: ``PARTS``."""

    size: Literal["paper", "quick", "smoke"] = "quick"
    """Which preset of each."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Which benchmarks."""


PRESETS = {"quick": Config(), "paper": Config(size="paper"), "smoke": Config(size="smoke")}


def run(config: Config) -> Rows:
    """Run each part in a process of its own, and note how long it took and how it ended."""
    if unknown := set(config.parts) - set(PARTS):
        raise SystemExit(f"no benchmark {', '.join(unknown)}; known are {', '.join(PARTS)}")
    rows: Rows = []
    for name in config.parts:
        folder = Path(config.out) / name
        command = [sys.executable, "-m", f"benchmarks.{name}", "--preset",
                   PARTS[name][config.size], "--out", str(folder)]  # fmt: skip
        if config.resume and name not in WHOLE:
            command.append("--resume")
        print("$", " ".join(["python", *command[1:]]), flush=True)
        begin = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        row = {"method": name, "seed": 0}
        rows.append(row | {"metric": "seconds", "value": time.perf_counter() - begin})
        rows.append(row | {"metric": "exit status", "value": float(code)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the suite; the exit status says whether all parts ended well."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    out = Path(config.out)
    configuration.dump(config, out)
    rows = run(config)
    summary = statistics.summarise(rows)
    report.write_results(out, rows, summary)
    parts = [path for name in config.parts for path in sorted((out / name).glob("*.md"))]
    whole = "\n\n".join(f"## {p.parent.name}\n\n{p.read_text(encoding='utf-8')}" for p in parts)
    write_atomically(out / "suite.md", whole)
    report.print_table(summary)
    if any(row["metric"] == "exit status" and row["value"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
