"""The run directory of the task diversity experiment: rows, tables, figures, page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _task_diversity_grid as grid
from experiments._qa_data import SOURCES
from experiments._task_diversity_data import Encoded
from experiments._task_diversity_probe import share_closer
from jmeta.methods import DISTANCES, cross_diversity, distance_matrix, diversity
from jmeta.runtime import drawing, report
from jmeta.runtime.statistics import summarise

Figure = tuple[str, tuple[Path, Path]]
Vectors = Mapping[int, Mapping[str, np.ndarray]]

MAIN = "normalised cosine"
SHARE = "halves of a task closer than different tasks, share of pairs"
COEFFICIENT = "diversity coefficient"
NAIVE = "diversity coefficient, pairs taken as independent"
CROSS = "cross-diversity"
RHO = "rank correlation of accuracy with the diversity of the sources"
FAR = "rank correlation of accuracy with the sources' mean distance to the target"


def mean_matrix(vectors: Vectors, names: Sequence[str], distance: str) -> np.ndarray:
    """Distances between tasks, averaged over seeds."""
    found = [
        distance_matrix([each[name] for name in names], DISTANCES[distance])
        for each in vectors.values()
    ]
    return np.mean(found, 0)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one of them is constant."""
    from scipy.stats import rankdata

    x, y = rankdata(a), rankdata(b)
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def over_sources(
    values: Mapping[tuple[str, ...], tuple[float, float]],
) -> tuple[float, float | None, int]:
    """Spearman's correlation over subsets, its half width, and the number of sources.

    Subsets share sources, so that the interval is the jackknife's over sources: all subsets with
    one of them are left out at a time.

    Args:
        values: two numbers of each subset.

    Returns:
        The correlation, half of its 95 % interval (None where too few subsets remain), sources.
    """
    from scipy.special import stdtrit

    names = sorted({name for subset in values for name in subset})
    whole = spearman(*zip(*values.values(), strict=True))
    kept = [[v for subset, v in values.items() if name not in subset] for name in names]
    if min(map(len, kept)) < 3:
        return whole, None, len(names)
    without = np.array([spearman(*zip(*each, strict=True)) for each in kept])
    n = len(names)
    error = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    half = float(stdtrit(n - 1, 0.975)) * error
    return whole, half if math.isfinite(half) else None, n


def _by_hand(method: str, metric: str, mean: float, half: float | None, n: int, over: str,
             **settings: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "method": method, "metric": metric, "mean": mean if math.isfinite(mean) else None,
        "ci95": half, "n": n, "over": over, "baseline": None, "paired_difference": None,
        "paired_ci95": None, **settings,
    }  # fmt: skip


def embedding_rows(
    tasks: Sequence[Encoded], vectors: Vectors
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows by seed, and summary rows with jackknife intervals over tasks."""
    names, rows, summary = [task.name for task in tasks], [], []
    families: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        families.setdefault(task.family, []).append(i)
    for distance, function in DISTANCES.items():
        for seed, each in vectors.items():
            row = {"method": distance, "seed": seed, "tasks": len(names)}
            matrix = distance_matrix([each[name] for name in names], function)
            rows += [
                row | {"metric": SHARE, "value": share_closer(each, names, function)},
                row | {"metric": COEFFICIENT, "value": diversity(matrix).mean},
            ]
        matrix = mean_matrix(vectors, names, distance)
        found = diversity(matrix)
        summary += [
            _by_hand(distance, COEFFICIENT, found.mean, found.half_width, len(names), "tasks"),
            _by_hand(distance, NAIVE, found.mean, 1.96 * found.naive_error, found.pairs, "pairs"),
        ]
    matrix = mean_matrix(vectors, names, MAIN)
    large = [family for family, members in families.items() if len(members) >= 3]
    for i, a in enumerate(large):
        own = diversity(matrix[np.ix_(families[a], families[a])])
        size = len(families[a])
        summary.append(_by_hand(a, "diversity within", own.mean, own.half_width, size, "tasks"))
        for b in large[:i]:
            cross = cross_diversity(matrix[np.ix_(families[a], families[b])])
            both = size + len(families[b])
            summary.append(
                _by_hand(f"{b} and {a}", CROSS, cross.mean, cross.half_width, both, "tasks")
            )
    shares = summarise([row for row in rows if row["metric"] == SHARE])
    return rows, shares + summary


def grid_rows(
    tasks: Sequence[Encoded], vectors: Vectors, accuracies: Mapping[int, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracies of every subset, and their rank correlations with distances."""
    if not accuracies:
        return [], []
    sources, target = grid.chosen(tasks)
    names, rows = list(sources), []
    order = [*names, target.name]
    mean = mean_matrix(vectors, order, MAIN)
    metric = f"accuracy on {target.name}"

    def places(matrix: np.ndarray, subset: tuple[str, ...]) -> tuple[float, float]:
        at = [order.index(name) for name in subset]
        inside = matrix[np.ix_(at, at)]
        return float(inside.sum() / (len(at) * (len(at) - 1))), float(matrix[at, -1].mean())

    for seed, found in accuracies.items():
        rows.append({"method": grid.NONE, "seed": seed, "metric": metric,
                     "value": found[grid.NONE][""]})  # fmt: skip
        each = distance_matrix([vectors[seed][name] for name in order], DISTANCES[MAIN])
        for method in grid.METHODS:
            points = []
            for subset in grid.subsets(names):
                value = found[method][" + ".join(subset)]
                points.append((*places(each, subset), value))
                rows.append({"method": method, "seed": seed, "metric": metric, "value": value,
                             "sources": " + ".join(subset),
                             "diversity": round(places(mean, subset)[0], 4)})  # fmt: skip
            inside, far, values = zip(*points, strict=True)
            rows.append({"method": method, "seed": seed, "metric": RHO,
                         "value": spearman(inside, values)})  # fmt: skip
            rows.append({"method": method, "seed": seed, "metric": FAR,
                         "value": spearman(far, values)})  # fmt: skip
            overall = float(np.mean(values))
            rows.append({"method": method, "seed": seed, "metric": f"{metric}, mean over subsets",
                         "value": overall})  # fmt: skip
        rows.append({"method": grid.NONE, "seed": seed, "metric": f"{metric}, mean over subsets",
                     "value": found[grid.NONE][""]})  # fmt: skip
    means = f"{metric}, mean over subsets"
    summary = summarise([row for row in rows if row["metric"] == means], baseline="transfer")
    for method in grid.METHODS:
        accuracy = {
            subset: float(np.mean([f[method][" + ".join(subset)] for f in accuracies.values()]))
            for subset in grid.subsets(names)
        }
        for index, name in enumerate((RHO, FAR)):
            rho, half, n = over_sources(
                {s: (places(mean, s)[index], value) for s, value in accuracy.items()}
            )
            summary.append(_by_hand(method, name, rho, half, n, "sources"))
    summary += summarise([row for row in rows if row["metric"] in (metric, RHO, FAR)])
    return rows, summary


def question_rows(
    vectors: Vectors, published: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, tuple[float, float]]]]:
    """The committed grid from question answering: correlations by seed, and points to draw."""
    if not published or not all(set(SOURCES) <= set(each) for each in vectors.values()):
        return [], {}
    names = list(SOURCES)
    matrix = mean_matrix(vectors, names, MAIN)
    rows, points = [], {}
    for kind, subsets in published.items():
        several = {k: v for k, v in subsets.items() if "+" in k}
        place = {}
        for key in several:
            at = [names.index(name) for name in key.split("+")]
            place[key] = float(matrix[np.ix_(at, at)].sum() / (len(at) * (len(at) - 1)))
        points[kind] = {k: (place[k], float(np.mean(list(v.values())))) for k, v in several.items()}
        for seed in next(iter(several.values())):
            rows.append({
                "method": f"{kind}, question answering", "seed": seed, "metric": RHO,
                "value": spearman(list(place.values()), [v[seed] for v in several.values()]),
                "subsets": len(several),
            })  # fmt: skip
    return rows, points


def draw_tree(config: Any, tasks: Sequence[Encoded], vectors: Vectors) -> Figure:
    """The clustered matrix of distances, and the tree beside it."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    names = [task.name for task in tasks]
    matrix = mean_matrix(vectors, names, MAIN)
    tree = linkage(squareform(matrix, checks=False), method="complete", optimal_ordering=True)
    with drawing.style():
        figure, first = drawing.canvas(10.5, 7.6)
        first.remove()
        left, right = figure.subplots(1, 2, width_ratios=[1, 3.2])
        drawn = dendrogram(
            tree, orientation="left", ax=left, labels=names, no_labels=True,
            link_color_func=lambda _: drawing.INK,
        )  # fmt: skip
        order = drawn["leaves"]
        left.grid(visible=False)
        left.set_xlabel("distance, complete linkage")
        left.spines["left"].set_visible(False)
        shown = right.imshow(matrix[np.ix_(order, order)], cmap="viridis", aspect="auto",
                             origin="lower")  # fmt: skip
        right.grid(visible=False)
        right.set_yticks(range(len(names)), [names[i] for i in order], fontsize=8)
        right.set_xticks(range(len(names)), [names[i] for i in order], fontsize=8, rotation=90)
        figure.colorbar(shown, ax=right, label=f"{MAIN} distance", shrink=0.8)
        made = drawing.save(figure, config.out / "distances")
    return ("Distances between tasks, averaged over seeds, in the order of the tree.", made)


def draw_halves(config: Any, tasks: Sequence[Encoded], vectors: Vectors) -> Figure:
    """For each task, the distance of its halves beside those to all other tasks."""
    names, function = [task.name for task in tasks], DISTANCES[MAIN]
    each = next(iter(vectors.values()))
    own = [function(each[f"{n}/first"], each[f"{n}/second"]) for n in names]
    order = np.argsort(own)
    with drawing.style():
        figure, axes = drawing.canvas(9.0, 5.2)
        for place, i in enumerate(order):
            others = [
                function(each[f"{names[i]}/first"], each[f"{names[j]}/second"])
                for j in range(len(names)) if j != i
            ]  # fmt: skip
            axes.plot([place] * len(others), others, "_", color="#999999", markersize=7,
                      label="to a half of another task" if place == 0 else None)  # fmt: skip
        axes.plot(range(len(order)), [own[i] for i in order], "o", color=drawing.PALETTE[1],
                  label="between halves of the task")  # fmt: skip
        axes.set_xticks(range(len(order)), [names[i] for i in order], rotation=90, fontsize=8)
        axes.set_ylabel(f"{MAIN} distance")
        axes.legend(frameon=False)
        made = drawing.save(figure, config.out / "halves")
    return ("Halves of a task against halves of others (first seed).", made)


def draw_grid(
    config: Any, summary: Sequence[Mapping[str, Any]],
    points: Mapping[str, Mapping[str, tuple[float, float]]],
) -> Figure:  # fmt: skip
    """Accuracy against the diversity of the sources; the committed grid beside it."""
    mine = [row for row in summary if "sources" in row]
    columns = bool(mine) + bool(points)
    with drawing.style():
        figure, first = drawing.canvas(5.2 * columns, 4.2)
        first.remove()
        every = list(np.ravel(figure.subplots(1, columns, squeeze=False)))
        if mine:
            axes = every.pop(0)
            for i, method in enumerate(grid.METHODS):
                rows = [row for row in mine if row["method"] == method]
                axes.errorbar(
                    [row["diversity"] for row in rows], [row["mean"] for row in rows],
                    yerr=[row["ci95"] or 0.0 for row in rows], fmt="osD"[i], capsize=2,
                    elinewidth=0.8, color=drawing.PALETTE[i], label=method, alpha=0.8,
                )  # fmt: skip
            [none] = [r for r in summary
                      if r["method"] == grid.NONE and r["metric"] == mine[0]["metric"]]  # fmt: skip
            axes.axhline(none["mean"], color="#555555", linewidth=1.2, label=grid.NONE)
            axes.set_xlabel("diversity of three sources")
            axes.set_ylabel(mine[0]["metric"])
            axes.legend(frameon=False)
        if points:
            axes = every.pop(0)
            for i, (kind, found) in enumerate(points.items()):
                axes.plot(*zip(*found.values(), strict=True), "osD"[i], color=drawing.PALETTE[i],
                          label=kind)  # fmt: skip
            axes.set_xlabel("diversity of question-answering sources")
            axes.set_ylabel("accuracy on SST-2 (committed grid)")
            axes.legend(frameon=False)
        made = drawing.save(figure, config.out / "transfer")
    return ("Accuracy after transfer against the diversity of the sources.", made)


def verdict(summary: Sequence[Mapping[str, Any]]) -> str:
    """Which rank correlations have an interval that excludes zero, in a sentence."""
    rows = [r for r in summary if r["metric"] in (RHO, FAR) and r["over"] == "sources"]
    clear = [r for r in rows if r["ci95"] is not None and abs(r["mean"] or 0) > r["ci95"]]
    if not rows:
        return "No transfer grid was run."
    if not clear:
        return (
            "Over sources, no rank correlation of accuracy with diversity or distance has an "
            "interval that excludes zero: on this grid diversity does not say how well transfer "
            "works, by any of the three methods."
        )
    said = "; ".join(f"{r['method']}: {r['metric']} {r['mean']:+.2f} ± {r['ci95']:.2f}"
                     for r in clear)  # fmt: skip
    return f"With an interval over sources that excludes zero: {said}. The others have none."


def write(
    config: Any, tasks: Sequence[Encoded], vectors: Vectors, accuracies: Mapping[int, Any],
    published: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write results.json, figures and report.html; print the tables."""
    rows, summary = embedding_rows(tasks, vectors)
    more, about = grid_rows(tasks, vectors, accuracies)
    asked, points = question_rows(vectors, published)
    summary = [*summary, *about, *summarise(asked)]
    report.write_results(config.out, [*rows, *more, *asked], summary)
    shown = [row for row in summary if "sources" not in row]
    report.print_table(shown)
    made = [draw_tree(config, tasks, vectors), draw_halves(config, tasks, vectors)]
    if about or points:
        made.append(draw_grid(config, summary, points))
    notes = [
        verdict(summary),
        "Intervals of the diversity coefficient are the jackknife's over tasks: pairs share tasks, "
        "and an interval that takes them as independent is several times too narrow. Those of rank "
        "correlations leave out one source at a time, where enough subsets remain; the grid from "
        "question answering has four subsets of several sources, too few for that, and its "
        "intervals are over seeds alone. Other intervals are Student's over seeds.",
        "The probe is one for all seeds and is never changed; the small one was trained as a "
        "language model on the tasks' texts too, without labels. Labels of the Fisher information "
        "are drawn from the probe. Tasks keep their most frequent classes.",
    ]
    report.write_report(
        config.out, "How diverse are these tasks?", _INTRO, config, shown, made, notes
    )


_INTRO = """A task is embedded as the Fisher information of a fixed network whose head was fitted to
it, one mean square for every output unit. Distances between the embeddings give a tree of tasks and
a coefficient of their diversity.

Does it say how well a network transfers? From every three of six tasks the network learns in
sequence, by Reptile or by exact MAML, from as many rows each; then it is fine-tuned on a
seventh."""
