"""Figures in one house style, as PNG and SVG: curves with intervals, costs, differences.

The same numbers give the same bytes: no dates, no random ids.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jmeta.runtime.drawing import INK, PALETTE, canvas, look, panels, save, spread, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[ArrayLike, ArrayLike, ArrayLike | None]


def learning_curves(
    path: Path | str,
    curves: Mapping[str, Curve],
    *,
    xlabel: str = "meta-step",
    ylabel: str = "outer loss",
    title: str | None = None,
    log_y: bool = False,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Path, Path]:
    """Draw one line with its interval band per method over meta-training.

    Args:
      path: Where to; .png and .svg are written.
      curves: Method to (steps [n], mean [n], half width of the interval [n] or None).
      xlabel: Label of the horizontal axis.
      ylabel: Label of the vertical axis, with its unit.
      title: Title, if any.
      log_y: Logarithmic vertical axis.
      limits: What the metric cannot leave; an interval of few seeds is cut there.

    Returns:
      The paths of the PNG and the SVG.

    Raises:
      ValueError: If a curve's arrays differ in length; it names the method.
    """
    with style():
        figure, axes = canvas(7.0, 4.2)
        _draw(axes, curves, markers=False)
        if log_y:
            axes.set_yscale("log")
        _cut(axes, limits)
        return _finish(figure, axes, path, xlabel, ylabel, title)


def adaptation_curves(
    path: Path | str,
    curves: Mapping[str, Curve],
    ylabel: str,
    chance: float | None = None,
    *,
    xlabel: str = "inner steps on the support set",
    title: str | None = None,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Path, Path]:
    """Draw the query metric after 0, 1, 2, ... inner steps with interval bands.

    A method that does not adapt by steps (nearest neighbour, a linear probe) is given with one
    point and drawn as a horizontal line, dotted.

    Args:
      path: Where to; .png and .svg are written.
      curves: Method to (steps [n], mean [n], half width of the interval [n] or None).
      ylabel: Label of the vertical axis, e.g. "query accuracy".
      chance: Level of guessing, drawn as a grey line.
      xlabel: Label of the horizontal axis.
      title: Title, if any.
      limits: What the metric cannot leave; an interval of few seeds is cut there.

    Returns:
      The paths of the PNG and the SVG.

    Raises:
      ValueError: If a curve's arrays differ in length; it names the method.
    """
    with style():
        figure, axes = canvas(7.0, 4.2)
        _draw(axes, curves, markers=True)
        steps = sorted({int(s) for curve in curves.values() for s in np.atleast_1d(curve[0])})
        if len(steps) <= 12:
            axes.set_xticks(steps)
        if chance is not None:
            _level(axes, chance, "chance", color="#8a8a8a", linestyle=(0, (4, 3)), linewidth=1.2)
        _cut(axes, limits)
        return _finish(figure, axes, path, xlabel, ylabel, title)


def cost_figure(
    path: Path | str,
    rows: Sequence[Mapping[str, Any]],
    *,
    reference: str = "first_order",
    metrics: Mapping[str, str] | None = None,
    title: str | None = None,
) -> tuple[Path, Path]:
    """Draw time and memory of each method as bars, in multiples of a reference method.

    The axis is logarithmic where the ratios span more than a factor of 30.

    Args:
      path: Where to; .png and .svg are written.
      rows: Result rows or summary rows ("method", "metric", and "value" or "mean"), in one
        setting; repeated rows (seeds, runs) are reduced to their median.
      reference: The method whose cost is 1.
      metrics: Metric name to the title of its panel; by default {"seconds": "time per step",
        "temp_bytes": "temporary memory"}, those of them that the rows have.
      title: Title, if any.

    Returns:
      The paths of the PNG and the SVG.

    Raises:
      ValueError: If the reference or a metric is missing, or rows differ in a setting.
    """
    wanted = metrics or {"seconds": "time per step", "temp_bytes": "temporary memory"}
    costs = _costs(rows, wanted)
    shown = {metric: costs[metric] for metric in wanted if metrics or costs[metric]}
    if not shown:
        raise ValueError(f"no row has a metric of {list(wanted)}")
    for metric, by_method in shown.items():
        if not by_method.get(reference):
            raise ValueError(f"no {metric!r} above zero for the reference {reference!r}")
    methods = list(dict.fromkeys(method for by in shown.values() for method in by))
    with style():
        figure, all_axes = panels(4.3 * len(shown) + 0.8, 0.36 * len(methods) + 1.5, len(shown))
        for axes, (metric, by_method) in zip(all_axes, shown.items(), strict=True):
            ratios = [by_method.get(method, math.nan) / by_method[reference] for method in methods]
            _bars(axes, methods, ratios, reference)
            axes.set_title(wanted[metric], fontsize=10)
            axes.set_xlabel(f"× {reference}")
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
        return save(figure, path)


def forest(
    path: Path | str,
    summary: Sequence[Mapping[str, Any]],
    metric: str | None = None,
    *,
    xlabel: str | None = None,
    title: str | None = None,
) -> tuple[Path, Path]:
    """Draw each method's paired difference to the baseline with its 95 % interval.

    Args:
      path: Where to; .png and .svg are written.
      summary: Summary rows, as `jmeta.runtime.statistics.summarise` makes them.
      metric: Which metric to show; may be left out if there is only one.
      xlabel: Label of the axis; by default "METRIC: difference to BASELINE".
      title: Title, if any.

    Returns:
      The paths of the PNG and the SVG.

    Raises:
      ValueError: If there are several metrics and none is chosen, or no differences.
    """
    found = list(dict.fromkeys(row["metric"] for row in summary))
    if metric is None:
        if len(found) != 1:
            raise ValueError(f"choose one metric of {found}")
        metric = found[0]
    rows = [
        row
        for row in summary
        if row["metric"] == metric and row.get("paired_difference") is not None
    ]
    if not rows:
        raise ValueError(f"no paired difference for {metric!r}: summarise with a baseline")
    from jmeta.runtime.statistics import SUMMARY_KEYS

    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if key not in SUMMARY_KEYS]
    settings = [key for key in keys if len({str(row.get(key)) for row in rows}) > 1]
    baselines = list(dict.fromkeys(row["baseline"] for row in rows))
    labels = [
        ", ".join([row["method"], *(f"{key} {row[key]}" for key in settings if key in row)])
        for row in rows
    ]
    with style():
        figure, axes = canvas(6.6, 0.36 * len(rows) + 1.3)
        axes.axvline(0.0, color="#555555", linewidth=1.0)
        for place, row in enumerate(rows):
            low_or_high = row["paired_ci95"]
            clear = low_or_high is not None and abs(row["paired_difference"]) > low_or_high
            axes.errorbar(
                row["paired_difference"], place,
                xerr=low_or_high, fmt="o", capsize=3, elinewidth=1.6,
                color=PALETTE[0] if clear else "#777777",
                markerfacecolor=PALETTE[0] if clear else "white",
            )  # fmt: skip
        _rows_downwards(axes, labels)
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=5)  # beside long labels there is no room for more
        axes.set_xlabel(xlabel or f"{metric}: paired difference to {' / '.join(baselines)}")
        if title:
            axes.set_title(title)
        return save(figure, path)


def _draw(axes: "Axes", curves: Mapping[str, Curve], markers: bool) -> None:
    for index, (method, (steps, mean, half_width)) in enumerate(curves.items()):
        x, y = np.atleast_1d(steps), np.atleast_1d(np.asarray(mean, dtype=float))
        half = None if half_width is None else np.atleast_1d(np.asarray(half_width, dtype=float))
        if x.shape != y.shape or (half is not None and half.shape != y.shape):
            shapes = [x.shape, y.shape, None if half is None else half.shape]
            raise ValueError(f"{method!r}: steps, mean and half width have shapes {shapes}")
        how = look(index)
        if markers and x.size == 1:
            _level(axes, float(y[0]), method, color=how["color"], linestyle=(0, (1, 1.5)))
            if half is not None and np.isfinite(half[0]):
                low, high = y[0] - half[0], y[0] + half[0]
                axes.axhspan(low, high, color=how["color"], alpha=0.10, linewidth=0)
            continue
        axes.plot(x, y, label=method, marker="o" if markers else None, **how)
        if half is not None:
            axes.fill_between(x, y - half, y + half, color=how["color"], alpha=0.15, linewidth=0)


def _level(axes: "Axes", value: float, label: str, **look: Any) -> None:
    axes.axhline(value, label=label, **look)


def _cut(axes: "Axes", limits: tuple[float, float]) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, limits[0]), min(high, limits[1]))


def _finish(
    figure: "Figure", axes: "Axes", path: Path | str, xlabel: str, ylabel: str, title: str | None
) -> tuple[Path, Path]:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title)
    axes.margins(x=0.02)
    _label_ends(figure, axes)
    return save(figure, path)


def _label_ends(figure: "Figure", axes: "Axes") -> None:
    """Name each line at its right end, outside the data, moved apart where ends are close."""
    lines = [line for line in axes.get_lines() if np.isfinite(line.get_ydata()).any()]
    if not lines:
        return
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for line in lines:
        y = np.asarray(line.get_ydata(), dtype=float)
        x = np.asarray(line.get_xdata(), dtype=float)
        last = np.flatnonzero(np.isfinite(y))[-1]
        ends.append(to_axes.transform((x[last], y[last]))[1])
    height = axes.get_window_extent().height * 72 / figure.dpi
    places = spread(ends, 12.5 / height)
    for line, end, place in zip(lines, ends, places, strict=True):
        axes.annotate(
            str(line.get_label()),
            xy=(1.0, end), xytext=(1.055, place),
            xycoords="axes fraction", textcoords="axes fraction",
            va="center", ha="left", fontsize=9, color=line.get_color(), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.8,
                        "alpha": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def _costs(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    from jmeta.runtime.statistics import ROW_KEYS, SUMMARY_KEYS

    rows = [row for row in rows if row["metric"] in metrics]
    keys = dict.fromkeys(key for row in rows for key in row)
    for key in (key for key in keys if key not in ROW_KEYS and key not in SUMMARY_KEYS):
        found = list(dict.fromkeys(str(row.get(key)) for row in rows))
        if len(found) > 1:
            raise ValueError(
                f"a cost figure shows one setting; the rows differ in {key!r}: {found}"
            )
    samples: dict[str, dict[str, list[float]]] = {metric: {} for metric in metrics}
    for row in rows:
        value = row.get("value", row.get("mean"))
        if value is not None:
            samples[row["metric"]].setdefault(row["method"], []).append(float(value))
    return {
        metric: {method: statistics.median(found) for method, found in by_method.items()}
        for metric, by_method in samples.items()
    }


def _bars(axes: "Axes", methods: list[str], ratios: list[float], reference: str) -> None:
    finite = [ratio for ratio in ratios if math.isfinite(ratio) and ratio > 0]
    logarithmic = max(finite) / min(finite) > 30
    colors = ["#9a9a9a" if method == reference else PALETTE[0] for method in methods]
    places = range(len(methods))
    drawn = [ratio if math.isfinite(ratio) else 0.0 for ratio in ratios]
    if logarithmic:
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        axes.set_xscale("log")
        wide = max(finite) > 1e3 * min(finite)  # labels between decades would overlap
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(finite) / 2, max(finite) * 4)
    else:
        axes.set_xlim(0, max(finite) * 1.2)
    axes.barh(places, drawn, height=0.62, color=colors)
    axes.axvline(1.0, color="#555555", linewidth=1.0, zorder=3)
    for place, ratio in zip(places, ratios, strict=True):
        known = math.isfinite(ratio)
        axes.annotate(
            f"{ratio:.3g}×" if known else "not measured",
            xy=(ratio if known else axes.get_xlim()[0], place),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
            color=INK if known else "#777777",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    _rows_downwards(axes, methods)


def _rows_downwards(axes: "Axes", labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
