"""What a run of adaptive language models leaves: the table, three figures, and the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import _adaptive_lm_data as data_of
from experiments import _adaptive_lm_methods as methods_of
from experiments import _adaptive_lm_scoring as scoring
from experiments._adaptive_lm_data import Data, Rows
from experiments._adaptive_lm_methods import EXACT, FIRST, META, RMS, SGD, STATIC, UNIGRAM
from experiments._adaptive_lm_scoring import COST
from experiments._shared import write_metrics
from jmeta.core.types import PyTree
from jmeta.files import write_atomically
from jmeta.runtime import figures, report
from jmeta.runtime.statistics import mean_ci, summarise

PERPLEXITY, BY_DOCUMENT = "perplexity", "nats per token, mean of a document"
OF_DOCUMENTS = "perplexity, geometric mean of documents"
_BUCKETS = 8  # of positions and of frequencies


def slug(name: str) -> str:
    """A method's name as a file has it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def learned_settings(name: str, params: PyTree) -> dict[str, Any]:
    """The step sizes and rates that a method has learned."""
    if name in (FIRST, EXACT):
        return {f"step {k}": float(v) for k, v in params["block"]["steps"].items()}
    if name == META:
        rates = np.exp([methods_of.SPEED * float(x) for x in jax.tree.leaves(params["rates"])])
        return {"least rate": float(rates.min()), "largest rate": float(rates.max())}
    return {}


def costs_file(config: Any) -> Path:
    """Where measured costs are kept."""
    return config.out / "costs.json"


def timed(config: Any) -> set[str]:
    """The methods whose costs are kept."""
    if not costs_file(config).exists():
        return set()
    rows = json.loads(costs_file(config).read_text(encoding="utf-8"))
    return {row["method"] for row in rows}


def keep_costs(config: Any, rows: list[dict[str, Any]]) -> None:
    """Write measured costs."""
    write_atomically(costs_file(config), json.dumps(rows, indent=1) + "\n")


def write(config: Any, data: Data, file_of: Callable[[str, int], Path]) -> None:
    """Everything, from the kept losses."""
    found, settings = {}, {}
    for name in config.methods:
        for seed in config.seed_list:
            stored = scoring.kept(file_of(name, seed))
            if stored is None:
                raise RuntimeError(f"{name} of seed {seed} was not scored")
            found[name, seed], settings[name, seed] = stored
    trivial = data_of.unigram(data, data.test)
    for seed in config.seed_list:
        found[UNIGRAM, seed] = trivial
    names = [*config.methods, UNIGRAM]
    rows = rows_of(names, config.seed_list, found, data.test)
    rows += json.loads(costs_file(config).read_text(encoding="utf-8"))
    summary = summarise(rows, baseline=STATIC)
    summary += of_documents(summary)
    histories = {}
    for folder in sorted((config.out / "trained").iterdir()):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        histories[folder.name] = [json.loads(line) for line in lines]
    write_metrics(config.out, histories)
    write_atomically(
        config.out / "settings.json",
        json.dumps({f"{n}, seed {s}": each for (n, s), each in settings.items()}, indent=1) + "\n",
    )
    report.write_results(config.out, rows, summary)
    report.print_table(summary)
    report.write_report(
        config.out,
        "Language models that adapt as they read",
        f"A decoder of {config.layers} layers reads the first {config.length} tokens of "
        f"{len(data.test.tokens)} held-out documents, each with all of its past as context. What "
        "does adapting to the document add, and what does it cost?",
        config,
        summary,
        draw(config, data, names, found),
        notes(config, summary),
    )


def rows_of(
    names: list[str], seeds: tuple[int, ...], found: dict[Any, np.ndarray], test: Rows
) -> list[dict[str, Any]]:
    """Perplexity for each seed, and the loss of each document, its mean over seeds."""
    rows: list[dict[str, Any]] = []
    weights = test.mask[:, 1:]
    for name in names:
        documents = []
        for seed in seeds:
            each = np.where(weights > 0, found[name, seed], 0)
            value = float(np.exp((each * weights).sum() / weights.sum()))
            rows.append({"method": name, "seed": seed, "metric": PERPLEXITY, "value": value})
            documents.append((each * weights).sum(1) / weights.sum(1))
        values = np.mean(documents, axis=0).tolist()
        rows.append({"method": name, "seed": 0, "metric": BY_DOCUMENT, "values": values})
    return rows


def of_documents(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexities with intervals over documents: the exponential of their mean loss.

    Its interval is that of the mean loss times the perplexity (the delta method).
    """
    made = []
    for row in summary:
        if row["metric"] == BY_DOCUMENT:
            value = float(np.exp(row["mean"]))
            half = None if row["ci95"] is None else value * row["ci95"]
            nothing = {"baseline": None, "paired_difference": None, "paired_ci95": None}
            made.append({**row, "metric": OF_DOCUMENTS, "mean": value, "ci95": half, **nothing})
    return made


def draw(
    config: Any, data: Data, names: list[str], found: dict[Any, np.ndarray]
) -> list[tuple[str, tuple[Path, Path]]]:
    """Losses against the static model by position, by frequency in training, by repetition."""
    weights = data.test.mask[:, 1:] > 0
    place = np.broadcast_to(np.arange(config.length), weights.shape)
    buckets = min(_BUCKETS, config.length)
    by_place = place * buckets // config.length
    counts = data.counts[data.test.tokens[:, 1:]]
    edges = np.unique(np.quantile(counts[weights], np.linspace(0, 1, _BUCKETS + 1)[1:-1]))
    by_count = np.searchsorted(edges, counts, side="right")
    by_seen = np.minimum(np.ceil(np.log2(data_of.seen_before(data.test) + 1)).astype(int), 5)

    def middle(groups: np.ndarray, values: np.ndarray) -> dict[int, float]:
        return {int(g): float(np.median(values[weights & (groups == g)]))
                for g in np.unique(groups[weights])}  # fmt: skip

    made = []
    for stem, groups, values, xlabel, caption in (
        ("position", by_place, place, "position in the document (tokens)",
         "by position in the document"),
        ("frequency", by_count, np.log10(counts + 1.0), "log10 of 1 + count in the training text",
         "by the token's frequency in training, in groups of equal size"),
        ("repetition", by_seen, by_seen, "earlier occurrences in the document: log2 of 1 + number",
         "by how often the token has occurred in the document before, 0 to 16 and more"),
    ):  # fmt: skip
        at = middle(groups, values)
        curves: dict[str, figures.Curve] = {}
        for name in names:
            if name in (STATIC, UNIGRAM):
                continue
            gap = np.mean([found[name, s] - found[STATIC, s] for s in config.seed_list], axis=0)
            gaps = [mean_ci(by_document(gap, weights & (groups == g))) for g in at]
            half = [each.half_width or 0.0 for each in gaps]
            curves[name] = (list(at.values()), [each.mean for each in gaps], half)
        path = figures.learning_curves(
            config.out / stem, curves, xlabel=xlabel, ylabel="nats per token, less static's"
        )
        made.append((
            f"Loss against the static model {caption}; below zero is better. Means over documents "
            "that have such tokens, and over seeds; the bands are 95 % intervals over documents.",
            path,
        ))  # fmt: skip
    known = [name for name in names if name != UNIGRAM]  # whose distance would hide the others'
    # Of one seed, documents alone have an interval.
    metric, paired = (PERPLEXITY, "seed") if config.seeds > 1 else (BY_DOCUMENT, "document")
    rows = [
        row for row in rows_of(known, config.seed_list, found, data.test) if row["metric"] == metric
    ]
    path = figures.forest(config.out / "differences", summarise(rows, baseline=STATIC), metric)
    made.append((f"{metric.capitalize()} against the static model, paired by {paired}.", path))
    return made


def by_document(values: np.ndarray, taken: np.ndarray) -> list[float]:
    """The mean of what is taken of each document, of those that have any."""
    counts = taken.sum(1)
    sums = np.where(taken, values, 0).sum(1)
    return [float(total / n) for total, n in zip(sums, counts, strict=True) if n]


def notes(config: Any, summary: list[dict[str, Any]]) -> list[str]:
    """What the numbers do and do not show."""
    value = {(row["method"], row["metric"]): row for row in summary}
    said = [
        "The decoder was trained once for each seed. From it, every method that is trained "
        f"({', '.join(methods_of.TRAINED)}) took {config.extra_steps} further steps on the same "
        "batches, all weights included; static is that continuation too. The others read with "
        "static's weights. Transformer-N was trained from scratch for as many steps as both.",
        f"Rates of {SGD}, {RMS}, HSO and the settings of kNN-LM were chosen on validation "
        "documents; those of fast weights and of meta-trained dynamic evaluation were learned. The "
        "keys of kNN-LM are the inputs of the last feed-forward layer.",
        "Perplexity has its intervals over seeds; the geometric mean of documents' perplexities, "
        "over documents.",
        "Costs are medians of interleaved runs on four documents at once, in this process.",
    ]
    dynamic = [name for name in (SGD, RMS) if (name, PERPLEXITY) in value]
    if (EXACT, COST) in value and dynamic:
        best = min(dynamic, key=lambda name: value[name, PERPLEXITY]["mean"])
        gain = {
            name: np.log(value[STATIC, PERPLEXITY]["mean"] / value[name, PERPLEXITY]["mean"])
            for name in (best, EXACT)
        }
        cost = value[EXACT, COST]["mean"] / value[best, COST]["mean"]
        if gain[best] > 0:
            share = gain[EXACT] / gain[best]
            reached = "reaches" if share >= 0.8 and cost <= 0.6 else "does not reach"
            said.append(
                f"{EXACT} has {100 * share:.0f} % of the gain in nats of {best} at {cost:.2f} of "
                f"its cost in this run: it {reached} the aim of 80 % at 0.6."
            )
        else:
            said.append(
                f"{best}, the better dynamic evaluation, gains nothing over {STATIC} here "
                f"({gain[best]:+.3f} nats), so that there is no share of its gain to reach; "
                f"{EXACT} gains {gain[EXACT]:+.3f} at {cost:.2f} of its cost."
            )
    return said
