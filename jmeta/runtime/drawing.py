"""The house style of figures, and saving them so that the same numbers give the same bytes."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jmeta.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision, the faint yellow left out and sky
# blue and orange last; line styles repeat them for more than seven methods.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
INK, FAINT = "#222222", "#dddddd"

STYLE: dict[str, Any] = {
    # DejaVu comes with matplotlib; a reader of the SVG without it has Verdana, of the same width.
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "jmeta",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The house style, for figures of one's own.

    Example:
      >>> with style():
      ...     pass  # fig = matplotlib.figure.Figure(); ...; save(fig, "figure")
    """
    import matplotlib

    # The user's own matplotlibrc must not change a figure; the backend is not ours to set.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context(cast(Any, {**defaults, **STYLE})):
        yield


def save(figure: "Figure", path: Path | str) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG, atomically and without dates.

    Args:
      figure: A matplotlib figure.
      path: Where to; the suffix is replaced by .png and .svg.

    Returns:
      The two paths.
    """
    written = []
    for suffix, metadata in (
        (".png", {"Software": None}),
        (".svg", {"Date": None, "Creator": None}),
    ):
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=suffix[1:], metadata=metadata, bbox_inches="tight", pad_inches=0.1
        )
        written.append(write_atomically(_with_suffix(Path(path), suffix), buffer.getvalue()))
    return written[0], written[1]


def canvas(width: float, height: float) -> tuple["Figure", Any]:
    """A figure of a size in inches, and its axes."""
    figure, (axes,) = panels(width, height, 1)
    return figure, axes


def panels(width: float, height: float, columns: int) -> tuple["Figure", Any]:
    """A figure of a size in inches, and its axes in a row: an array, also of one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no global state, no window, no interpreter-wide backend.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def look(index: int) -> dict[str, Any]:
    """Colour and line style of the index-th method."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": _DASHES[index // len(PALETTE) % len(_DASHES)],
    }


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move values apart to at least `gap`, each cluster around the mean of its values.

    Args:
      values: Places on a line, in any order.
      gap: Least distance between two of them.

    Returns:
      The new places, in the given order; already distant ones stay.

    Example:
      >>> spread([0.0, 1.0, 1.0], 0.5)
      [0.0, 0.75, 1.25]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    clusters: list[list[int]] = []
    for index in order:
        clusters.append([index])
        # Pool neighbours until no two clusters overlap.
        while len(clusters) > 1:
            left, right = clusters[-2:]
            apart = _centre(values, right) - _centre(values, left)
            if apart >= gap * (len(left) + len(right)) / 2 - 1e-12:
                break
            clusters[-2:] = [left + right]
    places = [0.0] * len(values)
    for cluster in clusters:
        start = _centre(values, cluster) - gap * (len(cluster) - 1) / 2
        for rank, index in enumerate(cluster):
            places[index] = start + gap * rank
    return places


def _centre(values: Sequence[float], cluster: Sequence[int]) -> float:
    return sum(values[index] for index in cluster) / len(cluster)


def _with_suffix(path: Path, suffix: str) -> Path:
    stem = path.name.removesuffix(".png").removesuffix(".svg")
    return path.with_name(stem + suffix)
