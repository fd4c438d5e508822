"""Fill the README's marked places from committed results: `python -m benchmarks.readme`.

A place is `<!-- NAME:begin -->...<!-- NAME:end -->`; without its results it stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jmeta.files import write_atomically
from jmeta.runtime.report import format_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"

# Candidates in the order of preference: the first file that exists is shown.
COST = ("second_order_cost-lm", "second_order_cost")
DEMO = ("fewshot_text-demo",)
OMNIGLOT = ("omniglot-5way",)
FIGURES = ("second_order_cost-lm.png", "second_order_cost*.png", "fewshot_text-demo*.png")
BAR_STEPS = 8  # inner steps of the cost table, where several were measured

# Metric of the benchmark -> heading; ratios are to the cheapest first order by that measure.
COST_COLUMNS = {
    "seconds x": "time",
    "temp_bytes x": "memory",
    "flops x": "FLOPs",
    "compile_seconds x": "compilation",
    "error": "error",
}


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """A committed result, and the command that made it.

    Args:
        name: of the file, without `.json`.
        folder: where results are.

    Returns:
        `{"rows", "summary", "command", "devices"}`; the last two from `NAME.run.json` (a copy of
        the run directory's `run.json`), None where there is none.
    """
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    beside = folder / f"{name}.run.json"
    run = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    return {"command": run.get("command"), "devices": run.get("devices")} | content


def found(names: tuple[str, ...], folder: Path = RESULTS) -> str | None:
    """The first of some results that is committed, or None."""
    return next((name for name in names if (folder / f"{name}.json").exists()), None)


def cost_table(result: dict[str, Any]) -> str:
    """Estimators against first order: time, memory, FLOPs, compilation; and the gradient's error.

    Args:
        result: of `benchmarks.second_order_cost`.

    Returns:
        A Markdown table with its setting and its command.
    """
    rows = one_setting(result["summary"], {"model": "lm", "preset": "lm", "steps": BAR_STEPS,
                                           "inner_steps": BAR_STEPS})  # fmt: skip
    methods = list(dict.fromkeys(row["method"] for row in rows))
    value = {(row["method"], row["metric"]): row["mean"] for row in rows}
    columns = [metric for metric in COST_COLUMNS if ("first_order", metric) in value]
    lines = [
        "| estimator | " + " | ".join(COST_COLUMNS[metric] for metric in columns) + " |",
        "| --- |" + " --: |" * len(columns),
    ]
    for method in methods:
        cells = [_cost_cell(metric, value.get((method, metric))) for metric in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    timed = [row["values"] for row in result["rows"] if row["metric"] == "seconds"]
    processes = len({row["seed"] for row in result["rows"] if row["metric"] == "seconds"})
    runs = f"Medians of {len(timed[0])} interleaved runs" if timed else ""
    over = f", mean of {processes} processes" if processes > 1 else ""
    parts = [runs + over, str(result["devices"] or "")]
    parts += [f"`{result['command']}`"] if result["command"] else []
    return "\n".join([*lines, "", "; ".join(part for part in parts if part) + "."])


def _cost_cell(metric: str, mean: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.0e}" if metric == "error" else f"{mean:.2f}"


def method_table(result: dict[str, Any], metric: str = "accuracy") -> str:
    """Methods with intervals and paired differences to the baseline.

    Args:
        result: of an experiment.
        metric: which metric.

    Returns:
        A Markdown table with its number of values and its command.
    """
    rows = [row for row in result["summary"] if row["metric"] == metric]
    baseline = next((row["baseline"] for row in rows if row["baseline"]), None)
    lines = [f"| method | {metric} | against {baseline}, paired | n |", "| --- | --: | --: | --: |"]
    for row in rows:
        difference = format_interval(row["paired_difference"], row["paired_ci95"], sign=True)
        mean = format_interval(row["mean"], row["ci95"])
        lines.append(f"| {row['method']} | {mean} | {difference} | {row['n']} |")
    return "\n".join([*lines, "", setting_line(result, rows)])


def omniglot_line(result: dict[str, Any]) -> str:
    """One sentence: Omniglot's accuracy with its interval, its CPU time and its command."""
    maml = {row["metric"]: row for row in result["summary"] if row["method"] == "maml"}
    accuracy, minutes = maml["accuracy"], maml.get("training CPU minutes")
    time = f", trained within {minutes['mean']:.0f} CPU minutes" if minutes else ""
    command = f": `{result['command']}`" if result["command"] else ""
    over = f"{accuracy['n']} {accuracy.get('over', 'values')}"
    value = format_interval(accuracy["mean"], accuracy["ci95"])
    ways, shots = accuracy.get("ways", 5), accuracy.get("shots", 1)
    return (
        f"Omniglot, {ways}-way {shots}-shot, evaluation characters, exact MAML{time}: "
        f"{value} (95 % interval over {over}; transductive batch statistics){command}."
    )


def setting_line(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What a table was measured on, as a sentence."""
    over = sorted({f"n = {row['n']} {row.get('over') or ''}".strip() for row in rows})
    parts = ["Intervals of 95 %" if any(row["ci95"] for row in rows) else "", *over]
    parts += [str(result["devices"])] if result["devices"] else []
    parts += [f"`{result['command']}`"] if result["command"] else []
    return "; ".join(part for part in parts if part) + "."


def one_setting(rows: list[dict[str, Any]], wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one setting: of each key that varies, the wanted value where it occurs."""
    for key, value in wanted.items():
        if any(row.get(key) == value for row in rows):
            rows = [row for row in rows if row.get(key, value) == value]
    return rows


def figure(folder: Path = RESULTS) -> str | None:
    """The first figure that is committed, as a Markdown image, or None."""
    for pattern in FIGURES:
        for path in sorted(folder.glob(pattern)):
            what = path.stem.replace("_", " ").replace("-", ", ")
            return f"![{what}](benchmarks/results/{path.name})"
    return None


def places(folder: Path = RESULTS) -> dict[str, str | None]:
    """What each marked place holds; None where its results are not there."""
    makers: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], str]]] = {
        "cost-table": (COST, cost_table),
        "demo-table": (DEMO, method_table),
        "omniglot-line": (OMNIGLOT, omniglot_line),
    }
    filled: dict[str, str | None] = {}
    for place, (names, make) in makers.items():
        name = found(names, folder)
        filled[place] = None if name is None else make(read(name, folder))
    return filled | {"figure": figure(folder)}


def fill(text: str, content: dict[str, str | None]) -> str:
    """The text with its marked places filled; a place without content stays as it is.

    Args:
        text: Markdown with a pair of marks for each place.
        content: place -> Markdown, or None.

    Returns:
        The text.

    Raises:
        ValueError: the text has no such place; it names the marks to write.
    """
    for place, inside in content.items():
        marks = f"<!-- {place}:begin -->", f"<!-- {place}:end -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(
                f"the page needs the place {marks[0]}...{marks[1]} exactly once: write these two "
                f"marks where what {place!r} says is to stand"
            )
        if inside is not None:
            filled = f"{marks[0]}\n{inside}\n{marks[1]}"
            text = pattern.sub(lambda _, filled=filled: filled, text)
    return text


def main() -> None:
    """Write the README."""
    write_atomically(README, fill(README.read_text(encoding="utf-8"), places()))


if __name__ == "__main__":
    main()
