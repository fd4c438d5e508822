"""What the rows of ``second_order_cost`` are held to, and the tables that they are shown in."""

from __future__ import annotations

import math
import statistics as median_of
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers_jax import PLAIN

JUDGED = ("mixed_mode, block remat", "unrolled", "mixed_mode, products kept", "mixed_mode, nested")
WRITTEN_OUT = "unrolled, written out"  # all kept, and nothing stacked: the least work there is
LOOPED = "unrolled, layers looped"
FIRST, PLAIN_MIXED = "first_order", "mixed_mode"  # both with layers looped, nothing recomputed
LORA_FIRST = "LoRA, first order"
LORA = ("LoRA, mixed_mode", "LoRA, mixed_mode, products kept")
# The float64 gradient where the weights differ by float32's rounding.
AT_ROUNDED = "float64 at rounded inputs"
# Not the exact gradient, and said to be none.
INEXACT = ("first_order", "reptile", "mixed_mode, rounded", "evolution", LORA_FIRST, AT_ROUNDED)
ERROR = 1e-5  # of the largest entry, in float32

LONG_SECONDS, LONG_FINITE = "seconds at 128 steps, once", "finite gradient at 128 steps"


def number(row: dict[str, Any]) -> float:
    """The value of a row; JSON has null for what is not a number."""
    return math.nan if row["value"] is None else row["value"]


def medians(rows: Sequence[dict[str, Any]], *more: str) -> dict[tuple[Any, ...], float]:
    """``{(method, metric, *settings): median over processes}``.

    Args:
        rows: of the benchmark.
        *more: settings that are part of the key.

    Returns:
        One number for each.
    """
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if "value" in row:
            key = (row["method"], row["metric"], *(row.get(name) for name in more))
            found.setdefault(key, []).append(number(row))
    return {key: median_of.median(values) for key, values in found.items()}


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bounds that the lm preset is held to, one sentence each.

    Args:
        rows: of the benchmark, at one number of inner steps.

    Returns:
        Sentences, each with its bar and whether it holds; none where rows that are judged were
        left out. Those against plain JAX and of LoRA only where a run has these rows.
    """
    value = medians(rows)
    names = {name for name, _ in value}
    if not names.issuperset(JUDGED):
        return []  # some were left out
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "value" in row:
            found.setdefault((row["method"], row["metric"]), []).append(number(row))
    chosen, full, fast, lean = JUDGED

    def over(method: str, metric: str, base: str = full) -> float:
        pairs = zip(found[method, metric], found[base, metric], strict=True)
        return median_of.median(a / b for a, b in pairs)

    lines = [
        (chosen, "memory / unrolled without remat", over(chosen, "temp_bytes"), 0.09),
        (chosen, "memory / first order", value[chosen, "temp_bytes x"], 3.7),
        (chosen, "time / unrolled without remat", over(chosen, "median seconds"), 0.6),
        (chosen, "time / first order", value[chosen, "seconds x"], 3.3),
        (chosen, "compile time / first order", value[chosen, "compile_seconds x"], 3.0),
        (fast, "time / first order", value[fast, "seconds x"], 2.9),
        (fast, "time / unrolled without remat", over(fast, "median seconds"), 0.45),
        (lean, "memory / first order", value[lean, "temp_bytes x"], 3.0),
        (lean, "memory / unrolled without remat", over(lean, "temp_bytes"), 0.06),
        (lean, "time / first order", value[lean, "seconds x"], 4.2),
    ]
    # Reverse mode is leaner where layers are looped, and leanest where steps are written out too.
    lines += [
        (chosen, f"memory / {other}", over(chosen, "temp_bytes", other), 0.09)
        for other in (LOOPED, WRITTEN_OUT)
        if other in names
    ]
    if PLAIN_MIXED in names and FIRST in names:
        same = over(PLAIN_MIXED, "compile_seconds", FIRST)
        lines += [
            (PLAIN_MIXED, "compile time / first order of the same network", same, 3.0),
            (PLAIN_MIXED, "compile time / first order, the least of any network",
             value[PLAIN_MIXED, "compile_seconds x"], 3.0),
        ]  # fmt: skip
    if WRITTEN_OUT in names:
        lines.append((WRITTEN_OUT, "time / first order", value[WRITTEN_OUT, "seconds x"], 2.9))
    for plain in PLAIN:
        if plain in names:
            lines += [
                (fast, f"time / {plain}", over(fast, "median seconds", plain), 0.45),
                (lean, f"memory / {plain}", over(lean, "temp_bytes", plain), 0.06),
            ]
    adapted = [name for name in LORA if name in names]
    if adapted and LORA_FIRST in names:
        ratios = {name: over(name, "median seconds", LORA_FIRST) for name in adapted}
        fastest = min(adapted, key=lambda name: ratios[name])
        lines.append((fastest, f"time / {LORA_FIRST}", ratios[fastest], 3.2))
    if (key := (chosen, "memory per step / fast weights")) in value:
        lines.append((chosen, "memory per added step / fast weights", value[key], 1.1))
        found_nested = value[lean, "memory / un-nested"]
        lines.append((lean, "memory at 64 steps / un-nested", found_nested, 0.4))
        longest = value[lean, "memory at 128 steps / at 8"]
        lines.append((lean, "memory at 128 steps / at 8", longest, 3.0))
    said = [
        f"{method}: {what} {got:.3f} (bar {bar}: {verdict(got <= bar)})"
        for method, what, got, bar in lines
    ]
    if (lean, LONG_FINITE) in value:
        finite = value[lean, LONG_FINITE] == 1
        said.append(
            f"{lean}: 128 steps ran in {value[lean, LONG_SECONDS]:.1f} s, the gradient is "
            f"{'finite' if finite else 'not finite'} (bar finite: {verdict(finite)})"
        )
    return said


def errors(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether every exact row's float32 gradient is that of float64, for each number of steps.

    Args:
        rows: of the benchmark, computed in float32.

    Returns:
        One sentence each: the largest error and whose it is, or every row that misses the bar.
    """
    found = medians([row for row in rows if row["metric"] == "error"], "model", "steps")
    lines = []
    for model, steps in dict.fromkeys(key[2:] for key in found):
        exact = {
            method: value
            for (method, _, *setting), value in found.items()
            if [model, steps] == setting and not method.startswith(INEXACT)
        }
        if not exact:
            continue
        # Not a number is an error without bound.
        worse = {method: value for method, value in exact.items() if not value <= ERROR}
        shown = worse or dict([max(exact.items(), key=lambda pair: pair[1])])
        named = "; ".join(f"{method} {value:.1e}" for method, value in shown.items())
        least = found.get((AT_ROUNDED, "error", model, steps))
        beside = (
            ""
            if least is None
            else f"; rounding weights and data alone moves the gradient by {least:.1e}"
        )
        lines.append(
            f"{model}, {steps} inner steps: float32 error against float64 of {len(exact)} exact "
            f"rows, {'over the bar' if worse else 'the largest'}: {named}{beside} "
            f"(bar {ERROR:.0e}: {verdict(not worse)})"
        )
    return lines


def verdict(held: bool) -> str:
    """How a sentence says that a bar was kept to, or not."""
    return "holds" if held else "MISSED"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows of a run: time, memory and work, in multiples of the cheapest first order too.

    Args:
        rows: of the benchmark.

    Returns:
        A Markdown table; numbers are medians over processes.
    """
    value = medians(rows, "steps")
    lines = [
        "| steps | estimator | ms | x | temporary MiB | x | FLOPs x | compilation x | error |",
        "| --: | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for method, steps in dict.fromkeys((method, steps) for method, _, steps in value):
        got = {key[1]: n for key, n in value.items() if (key[0], key[2]) == (method, steps)}
        if "median seconds" not in got:
            continue  # what was compiled alone
        error = got.get("error")
        cells = [
            f"{1e3 * got['median seconds']:.3g}",
            f"{got['seconds x']:.2f}",
            f"{got['temp_bytes'] / 2**20:.3g}",
            *(f"{got[f'{name} x']:.2f}" for name in ("temp_bytes", "flops", "compile_seconds")),
            "" if error is None else f"{error:.0e}",
        ]
        lines.append(f"| {steps} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


NETWORKS = {
    "second_order_cost-mlp": "1-40-40-1 on ten points",
    "second_order_cost-conv": "four blocks of 32 filters, 5-way 1-shot, 5 queries",
}
_SHOWN = ("mixed_mode", "mixed_mode nested", "unrolled", "unrolled step")


def networks(results: dict[str, Sequence[dict[str, Any]]]) -> str:
    """Time and memory of two small networks in multiples of first order, and the largest error.

    Args:
        results: name of a result, of ``NETWORKS``, -> its rows.

    Returns:
        A Markdown table; numbers are medians over processes.
    """
    lines = [
        "| network | inner steps | " + " | ".join(_SHOWN) + " | error |",
        "| --- | --: |" + " --: |" * (len(_SHOWN) + 1),
    ]
    for name, rows in results.items():
        value = medians(rows, "steps")
        for steps in sorted({steps for *_, steps in value}):
            cells = [
                f"{value[method, 'seconds x', steps]:.1f}, "
                f"{value[method, 'temp_bytes x', steps]:.1f}"
                for method in _SHOWN
            ]
            error = float(np.max([value[method, "error", steps] for method in _SHOWN]))
            cells.append(f"{error:.0e}")
            lines.append(f"| {NETWORKS[name]} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
