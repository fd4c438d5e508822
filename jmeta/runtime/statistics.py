"""Means with intervals, and paired differences to a named baseline.

Every number an experiment reports goes through here: rows, one per method, seed and metric,
become summary rows with a mean, a 95 % interval and the paired difference to a baseline.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

ROW_KEYS = ("method", "seed", "metric", "value", "values")
SUMMARY_KEYS = (
    "method",
    "metric",
    "mean",
    "ci95",
    "n",
    "over",
    "baseline",
    "paired_difference",
    "paired_ci95",
)


class Interval(NamedTuple):
    """A mean with its interval: `mean - half_width` to `mean + half_width`, from n values.

    `half_width` is None where one value, or a value that is not finite, leaves no interval.
    """

    mean: float
    half_width: float | None
    n: int


def mean_ci(values: ArrayLike, confidence: float = 0.95) -> Interval:
    r"""Mean and Student-t interval of independent values.

    $$\bar x \pm t_{(1+c)/2,\,n-1}\; s / \sqrt n$$ with s the sample standard deviation.

    Args:
      values: Numbers, shape [n].
      confidence: Probability c that the interval covers the true mean.

    Returns:
      `Interval(mean, half_width, n)`; the half width is None for n = 1 or non-finite values.

    Raises:
      ValueError: If there are no values, more than one axis, or confidence is outside (0, 1).

    Example:
      >>> mean, half_width, n = mean_ci([1.0, 2.0, 3.0])
      >>> round(mean, 3), round(half_width, 3), n
      (2.0, 2.484, 3)
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"mean_ci needs a non-empty list of numbers, got shape {x.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a probability between 0 and 1, got {confidence}")
    n = x.size
    if not np.all(np.isfinite(x)):
        return Interval(math.nan, None, n)
    mean = float(x.mean())
    if n == 1:
        return Interval(mean, None, 1)
    from scipy.special import stdtrit

    quantile = float(stdtrit(n - 1, (1 + confidence) / 2))
    return Interval(mean, quantile * float(x.std(ddof=1)) / math.sqrt(n), n)


def paired_ci(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of a - b and its Student-t interval, where a[i] and b[i] share a seed or episode.

    Args:
      a: Numbers, shape [n].
      b: Numbers, shape [n], in the same order.
      confidence: Probability that the interval covers the true difference.

    Returns:
      `Interval(mean difference, half_width, n)`.

    Raises:
      ValueError: If the shapes differ.

    Example:
      >>> paired_ci([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
      Interval(mean=0.5, half_width=0.0, n=3)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(
            f"paired values come from the same seeds or episodes, got shapes {x.shape} and "
            f"{y.shape}"
        )
    return mean_ci(x - y, confidence)


def summarise(
    rows: Iterable[Mapping[str, Any]], baseline: str | None = None
) -> list[dict[str, Any]]:
    """Reduce result rows to one summary row per method, metric and setting.

    With several seeds the interval is Student t over the seeds' values. With one seed it is over
    the episodes in `"values"`, if the row carries them; otherwise there is no interval (None).
    Differences are paired in the same way: by seed, or by position within the one seed.

    Args:
      rows: Dicts with "method", "seed", "metric" and "value" (a number) or "values" (a list of
        numbers, one per episode; "value" is then their mean if it is missing). All other keys are
        settings, and each combination of settings is summarised apart.
      baseline: Method that the others are compared to. It is looked up in the same settings, else
        in the most specific of its settings that the row agrees with (so a baseline without
        inner steps serves every number of steps).

    Returns:
      Dicts with "method", "metric", "mean", "ci95" (half width), "n", "over" ("seeds" or
      "episodes"), "baseline", "paired_difference", "paired_ci95" and the settings, in the order
      in which the methods first appear. Missing numbers are None, and so is the mean of a method
      with a value that is not finite: a diverged seed is never dropped.

    Raises:
      ValueError: If a row is incomplete or repeated, the baseline does not exist, or the
        baseline was run on other seeds or episodes.

    Example:
      >>> rows = [dict(method=m, seed=s, metric="accuracy", value=v + s / 10)
      ...         for m, v in [("maml", 0.5), ("none", 0.25)] for s in range(3)]
      >>> maml = summarise(rows, baseline="none")[0]
      >>> round(maml["mean"], 3), round(maml["ci95"], 3), maml["n"], maml["paired_difference"]
      (0.6, 0.248, 3, 0.25)
    """
    groups: dict[tuple[str, str, str], _Group] = {}
    for index, row in enumerate(rows):
        _add(groups, index, row)
    methods = dict.fromkeys(group.method for group in groups.values())
    if baseline is not None and methods and baseline not in methods:
        close = difflib.get_close_matches(baseline, methods, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"no row has the baseline method {baseline!r}, only {list(methods)}.{hint}"
        )
    references = [group for group in groups.values() if group.method == baseline]
    return [_summary(group, references) for group in groups.values()]


class _Group(NamedTuple):
    method: str
    metric: str
    settings: dict[str, Any]
    by_seed: dict[Any, tuple[float, list[float] | None]]


def _add(groups: dict[tuple[str, str, str], _Group], index: int, row: Mapping[str, Any]) -> None:
    missing = [key for key in ("method", "seed", "metric") if key not in row]
    if row.get("value") is None and row.get("values") is None and "value" not in row:
        missing.append("value")
    if missing:
        raise ValueError(f"rows[{index}] has no {missing[0]!r}: {dict(row)}")
    values = None if row.get("values") is None else _floats(row["values"])
    if row.get("value") is not None:
        value = float(row["value"])
    elif values:
        value = float(np.mean(values))
    else:
        value = math.nan
    settings = {key: item for key, item in row.items() if key not in ROW_KEYS}
    key = (row["method"], row["metric"], json.dumps(settings, sort_keys=True, default=str))
    group = groups.setdefault(key, _Group(row["method"], row["metric"], settings, {}))
    if row["seed"] in group.by_seed:
        raise ValueError(
            f"rows[{index}] repeats method {row['method']!r}, metric {row['metric']!r}, seed "
            f"{row['seed']} with settings {settings}: the runs differ in something the row does "
            "not say; add it as a setting"
        )
    group.by_seed[row["seed"]] = (value, values)


def _floats(values: Sequence[Any]) -> list[float]:
    return [math.nan if item is None else float(item) for item in values]


def _summary(group: _Group, references: list[_Group]) -> dict[str, Any]:
    values, over = _sample(group)
    interval = mean_ci(values)
    summary = {
        "method": group.method,
        "metric": group.metric,
        "mean": _finite(interval.mean),
        "ci95": interval.half_width,
        "n": interval.n,
        "over": over,
        "baseline": None,
        "paired_difference": None,
        "paired_ci95": None,
    }
    reference = _reference(group, references)
    if reference is not None:
        summary["baseline"] = reference.method
        if reference is not group:
            difference = _difference(group, reference)
            summary["paired_difference"] = _finite(difference.mean)
            summary["paired_ci95"] = difference.half_width
    return summary | group.settings


def _sample(group: _Group) -> tuple[list[float], str]:
    """The values whose interval is reported, and what they are values over."""
    if len(group.by_seed) == 1:
        [(value, values)] = group.by_seed.values()
        if values:
            return values, "episodes"
        return [value], "seeds"
    return [value for value, _ in group.by_seed.values()], "seeds"


def _reference(group: _Group, references: list[_Group]) -> _Group | None:
    fitting = [
        other
        for other in references
        if other.metric == group.metric
        and all(key in group.settings and group.settings[key] == item
                for key, item in other.settings.items())
    ]  # fmt: skip
    return max(fitting, key=lambda other: len(other.settings), default=None)


def _difference(group: _Group, reference: _Group) -> Interval:
    if set(group.by_seed) != set(reference.by_seed):
        raise ValueError(
            f"{group.method!r} has seeds {sorted(group.by_seed)} for {group.metric!r} and the "
            f"baseline {reference.method!r} has {sorted(reference.by_seed)}: differences are "
            "paired, so run both on the same seeds"
        )
    a, over = _sample(group)
    b, over_reference = _sample(reference)
    if over == over_reference == "episodes":
        if len(a) != len(b):
            raise ValueError(
                f"{group.method!r} has {len(a)} episodes for {group.metric!r} and the baseline "
                f"{reference.method!r} has {len(b)}: differences are paired, so evaluate both on "
                "the same episodes"
            )
        return paired_ci(a, b)
    seeds = list(group.by_seed)
    return paired_ci(
        [group.by_seed[seed][0] for seed in seeds], [reference.by_seed[seed][0] for seed in seeds]
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
