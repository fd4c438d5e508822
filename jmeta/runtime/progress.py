"""A progress bar in a terminal, plain lines elsewhere: the loss, the rate and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How ``fit`` shows where it is.

    Attributes:
        advance: ``(step) -> None``, after every step.
        report: ``(step, row) -> None``, with the numbers of a logged step.
        close: ``() -> None``.
    """

    advance: Callable[[int], None]
    report: Callable[[int, Mapping[str, Any]], None]
    close: Callable[[], None]


def open_progress(total: int, start: int, shown: bool, console: Any = None) -> Progress:
    """A bar if the console is a terminal, else one line for each report, else silence.

    Args:
        total: the number of steps at the end of the run.
        start: the number of steps done already.
        shown: False for silence.
        console: a ``rich.console.Console``; default: standard error.

    Returns:
        Three functions.
    """
    if not shown:
        return Progress(lambda step: None, lambda step, row: None, lambda: None)
    from rich.console import Console

    console = console or Console(stderr=True)
    if not console.is_terminal:
        stream = console.file

        def line(step: int, row: Mapping[str, Any]) -> None:
            print(
                f"step {step}/{total}  {describe_row(row, total - step)}", file=stream, flush=True
            )

        return Progress(lambda step: None, line, lambda: None)
    return _bar(total, start, console)


def describe_row(row: Mapping[str, Any], steps_left: int) -> str:
    """A logged row in words: ``loss 0.1234  12.3 steps/s  0:01:05 left``."""
    parts = [f"{key} {_short(value)}" for key, value in row.items() if _is_shown(key)]
    rate = row.get("steps_per_second")
    if rate:
        left = int(steps_left / rate)
        parts.append(f"{_short(rate)} steps/s")
        parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
    return "  ".join(parts)


def _is_shown(key: str) -> bool:
    return key == "loss" or key.startswith(("aux/", "eval/"))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _bar(total: int, start: int, console: Any) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("meta-training"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
        console=console,
        transient=False,
        redirect_stdout=sys.stdout.isatty(),
    )
    task = bar.add_task("", total=total, completed=start, words="compiling")
    bar.start()
    last = 0.0

    def advance(step: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1 or step == total:  # a fast step is cheaper than a redraw
            last = time.monotonic()
            bar.update(task, completed=step)

    def report(step: int, row: Mapping[str, Any]) -> None:
        bar.update(task, completed=step, words=describe_row(row, total - step))

    return Progress(advance, report, bar.stop)
