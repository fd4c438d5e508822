"""What a run leaves behind: results.json, tables on the screen and in markdown, report.html.

Every table shows means with 95 % intervals, what n counts, and paired differences.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jmeta.files import write_atomically
from jmeta.runtime import html
from jmeta.runtime.statistics import ROW_KEYS, SUMMARY_KEYS

if TYPE_CHECKING:
    from rich.console import Console

_REQUIRED = ("method", "metric", "mean", "ci95", "n", "baseline", "paired_difference",
             "paired_ci95")  # fmt: skip


def write_results(
    out: Path | str, rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]
) -> Path:
    """Write results.json, atomically: {"rows": [...], "summary": [...]}.

    NumPy and JAX scalars become numbers; a number that is not finite becomes null. Values per
    episode keep nine digits, which is all of a float32.

    Args:
      out: The run directory (the file is results.json in it) or a path that ends in .json.
      rows: Dicts with "method", "seed", "metric", "value" or "values" (one per episode; their
        mean becomes the value) and settings.
      summary: Dicts as `jmeta.runtime.statistics.summarise` makes them.

    Returns:
      The path written.

    Raises:
      ValueError: If a row does not fit; it names the row and the key.
    """
    content = {
        "rows": [_with_value(_json(row, f"rows[{i}]")) for i, row in enumerate(rows)],
        "summary": [_json(row, f"summary[{i}]") for i, row in enumerate(summary)],
    }
    validate(content)
    return write_atomically(_results_path(out), _one_row_per_line(content))


def read_results(path: Path | str) -> dict[str, list[dict[str, Any]]]:
    """Read and check a results.json.

    Args:
      path: The run directory or the file.

    Returns:
      {"rows": [...], "summary": [...]}.

    Raises:
      ValueError: If the file does not fit the schema; it names the file, the row and the key.
    """
    path = _results_path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        validate(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def validate(content: Any) -> None:
    """Check the schema of results.

    Args:
      content: What a results.json holds.

    Raises:
      ValueError: At the first thing that does not fit, e.g. `rows[3]: "value" must be a number`.

    Example:
      >>> validate({"rows": [{"method": "maml", "seed": 0, "metric": "x"}], "summary": []})
      Traceback (most recent call last):
      ...
      ValueError: rows[0]: "value" is missing
    """
    if not isinstance(content, dict) or set(content) != {"rows", "summary"}:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'results hold exactly "rows" and "summary", got {found}')
    for part, required in (("rows", ROW_KEYS[:4]), ("summary", _REQUIRED)):
        if not isinstance(content[part], list):
            raise ValueError(f'"{part}" must be a list, got a {type(content[part]).__name__}')
        for index, row in enumerate(content[part]):
            _check_row(row, required, f"{part}[{index}]")


def print_table(summary: Sequence[Mapping[str, Any]], console: "Console | None" = None) -> None:
    """Print the summary on the screen, one table per metric.

    Args:
      summary: Summary rows.
      console: A rich console; by default one on standard output.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for table in tables(summary):
        drawn = Table(
            title=Text(table.title, style="bold"), title_justify="left", caption=table.note,
            caption_justify="left",
        )  # fmt: skip
        for index, name in enumerate(table.header):
            drawn.add_column(Text(name), justify="left" if index < table.text_columns else "right")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)


def markdown_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as markdown, one table per metric.

    Args:
      summary: Summary rows.

    Returns:
      Markdown text.

    Example:
      >>> print(markdown_table([dict(method="maml", metric="accuracy", mean=0.5, ci95=0.012, n=600,
      ...     over="episodes", baseline=None, paired_difference=None, paired_ci95=None)]))
      **accuracy**
      <BLANKLINE>
      | method | mean ± 95 % | n |
      | --- | ---: | ---: |
      | maml | 0.500 ± 0.012 | 600 episodes |
    """
    parts = []
    for table in tables(summary):
        marks = [
            "---" if index < table.text_columns else "---:" for index in range(len(table.header))
        ]
        lines = [f"**{table.title}**", "", *map(_markdown_row, (table.header, marks, *table.rows))]
        parts.append("\n".join(lines + (["", table.note] if table.note else [])))
    return "\n\n".join(parts)


def write_report(
    out: Path | str,
    title: str,
    intro: str,
    config: Any,
    summary: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[str, Path | str | tuple[Path, Path]]] | Mapping[str, Any] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write report.html: one file that needs no other and no network.

    Args:
      out: The run directory; its run.json, if any, supplies the command and versions.
      title: Title of the page.
      intro: What was asked and how; paragraphs are separated by blank lines.
      config: A configuration dataclass or a dict.
      summary: Summary rows.
      figures: (caption, path) pairs or a dict of them; a path is that of an SVG or PNG, or the
        pair that the functions of `jmeta.runtime.figures` return.
      notes: Remarks on what the numbers do and do not show, one paragraph each.

    Returns:
      The path of report.html.
    """
    from jmeta.runtime.coerce import plain

    out = Path(out)
    pairs = list(figures.items() if isinstance(figures, Mapping) else figures)
    body = [html.heading(title, 1), *map(html.paragraph, _paragraphs(intro))]
    body.append(html.heading("Results"))
    body += [html.table(t.title, t.header, t.rows, t.text_columns, t.note) for t in tables(summary)]
    if pairs:
        body += [html.heading("Figures"), *(html.figure(caption, path) for caption, path in pairs)]
    if notes:
        body += [html.heading("Notes"), *map(html.paragraph, notes)]
    run_file = out / "run.json"
    run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
    body.append(html.heading("How to repeat it"))
    if run.get("command"):
        body.append(html.code(run["command"]))
    values = plain(config) if dataclasses.is_dataclass(config) else dict(config or {})
    # The folder is where this page lies; its absolute name says nothing but the user's.
    shown = {key: value for key, value in _flat(values).items() if key != "out"}
    body.append(html.definitions("Configuration", shown))
    facts = {key: run[key] for key in ("seeds", "devices") if run.get(key) is not None}
    if run:
        body.append(html.definitions("Versions", facts | run.get("versions", {})))
    return write_atomically(out / "report.html", html.page(title, body))


class Table(NamedTuple):
    """A table of text: title, header, rows, how many columns hold text, and a note below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text_columns: int
    note: str


def tables(summary: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Lay out summary rows as one table per metric, with settings that vary as columns."""
    return [
        _table(metric, [row for row in summary if row["metric"] == metric])
        for metric in dict.fromkeys(row["metric"] for row in summary)
    ]


def _table(metric: str, rows: list[Mapping[str, Any]]) -> Table:
    settings = [key for key in dict.fromkeys(k for r in rows for k in r) if key not in SUMMARY_KEYS]
    fixed = [key for key in settings if len({json.dumps(r.get(key)) for r in rows}) == 1]
    varying = [key for key in settings if key not in fixed]
    baselines = list(dict.fromkeys(r["baseline"] for r in rows if r["baseline"] is not None))
    header = ["method", *varying, "mean ± 95 %", "n"]
    header += [f"difference to {' / '.join(baselines)} ± 95 %"] if baselines else []
    body = []
    for row in rows:
        cells = [row["method"], *("" if row.get(k) is None else str(row[k]) for k in varying)]
        cells += [format_interval(row["mean"], row["ci95"]), _count(row)]
        if baselines:
            itself = row["baseline"] == row["method"]
            difference = format_interval(row["paired_difference"], row["paired_ci95"], sign=True)
            cells.append("(baseline)" if itself else difference)
        body.append(cells)
    title = metric + (f" ({', '.join(f'{k} {rows[0][k]}' for k in fixed)})" if fixed else "")
    note = "Differences are paired by seed, or by episode within one seed." if baselines else ""
    return Table(title, header, body, 1 + len(varying), note)


def _count(row: Mapping[str, Any]) -> str:
    unit = row.get("over") or ""
    return f"{row['n']} {unit.removesuffix('s') if row['n'] == 1 else unit}".strip()


def format_interval(mean: float | None, half_width: float | None, sign: bool = False) -> str:
    """A mean and its interval with the digits that the interval supports.

    Example:
      >>> format_interval(0.56249, 0.01234), format_interval(0.05, None, sign=True)
      ('0.562 ± 0.012', '+0.0500')
      >>> format_interval(None, None), format_interval(123456.7, 2345.6)
      ('–', '123500 ± 2300')
      >>> format_interval(0.997, 1.5e-16)  # equal values, whose interval is rounding
      '0.997 ± 0.000'
    """
    if mean is None or not math.isfinite(mean):
        return "–"
    if half_width and half_width < 1e-12 * abs(mean):
        half_width = 0.0
    plus = "+" if sign else ""
    scale = half_width if half_width else abs(mean)
    digits = 2 if half_width else 3
    if scale == 0:
        return f"{mean:{plus}g}" + ("" if half_width is None else " ± 0")
    decimals = digits - 1 - math.floor(math.log10(scale))
    if decimals > 8:
        return f"{mean:{plus}.{digits}g}" + (f" ± {half_width:.1e}" if half_width else "")
    places = max(decimals, 0)
    text = f"{round(mean, decimals):{plus}.{places}f}"
    if half_width is None:
        return text
    return f"{text} ± {round(half_width, decimals):.{places}f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _results_path(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "results.json"


def _one_row_per_line(content: Mapping[str, Sequence[Any]]) -> str:
    """JSON whose diffs can be read: a line per row."""
    parts = []
    for key, rows in content.items():
        lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
        parts.append(f'"{key}": [\n{lines}\n]' if rows else f'"{key}": []')
    return "{" + ",\n".join(parts) + "}\n"


def _json(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item, f'{where}: "{key}"') for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy and JAX scalars and arrays
        return _json(value.tolist(), where)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _with_value(row: dict[str, Any]) -> dict[str, Any]:
    values = row.get("values")
    if not isinstance(values, list) or not values:
        return row
    if "value" not in row:
        finite = all(type(value) in (int, float) for value in values)
        row = {**row, "value": sum(values) / len(values) if finite else None}
    short = [float(f"{value:.9g}") if type(value) is float else value for value in values]
    return {**row, "values": short}


def _check_row(row: Any, required: Sequence[str], where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {row!r}")
    for key in required:
        if key not in row:
            raise ValueError(f'{where}: "{key}" is missing')
    for key, value in row.items():
        if key in ("method", "metric"):
            _check(isinstance(value, str) and value != "", "text", value, where, key)
        elif key == "seed":
            _check(type(value) is int, "a whole number", value, where, key)
        elif key == "n":
            _check(type(value) is int and value >= 1, "a whole number >= 1", value, where, key)
        elif key == "values":
            fits = isinstance(value, list) and all(map(_number_or_null, value))
            _check(fits, "a list of numbers", value, where, key)
        elif key in ("value", "mean", "ci95", "paired_difference", "paired_ci95"):
            _check(_number_or_null(value), "a number or null", value, where, key)
            negative = key in ("ci95", "paired_ci95") and value is not None and value < 0
            _check(not negative, "a half width >= 0", value, where, key)
        elif key == "baseline":
            _check(value is None or isinstance(value, str), "text or null", value, where, key)


def _check(fits: bool, expected: str, value: Any, where: str, key: str) -> None:
    if not fits:
        raise ValueError(f'{where}: "{key}" must be {expected}, got {value!r}')


def _number_or_null(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
