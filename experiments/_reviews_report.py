"""The run directory of the reviews experiment: rows, tables, the verdict, figures and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments._fewshot_report import Figure, learning, phase_rows, print_phases
from experiments._reviews_scoring import Scored
from experiments._shared import Trained, scored_row
from jmeta.runtime import figures, report
from jmeta.runtime.statistics import mean_ci, summarise
from jmeta.tasks import reviews

BASELINES = ("transfer", "no meta-training")
WAIT = "wait for data, share of the steps' time"
BAR = 0.05
"""The share of their time that steps may wait for data."""


class Seed(NamedTuple):
    """What one seed leaves.

    Attributes:
        seed: its number.
        scored: accuracies by method and number of support examples.
        runs: the trainings by method.
    """

    seed: int
    scored: dict[str, dict[int, Scored]]
    runs: dict[str, Trained]


def against(baseline: str) -> str:
    """The metric under which accuracies are compared with a baseline."""
    return "accuracy" if baseline == BASELINES[0] else f"accuracy against {baseline}"


def by_domain(found: Scored, column: int) -> dict[str, np.ndarray]:
    """Accuracies of each domain's episodes at one number of inner steps."""
    names = np.asarray(found.domains)
    return {name: found.values[names == name, column] for name in dict.fromkeys(found.domains)}


def rows_of(
    config: Any, each: Seed, sizes: Mapping[str, int], counts: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Result rows of one seed, the best first; domains weigh alike, as all have as many episodes.

    Args:
        config: of the run.
        each: what the seed left.
        sizes: reviews at hand by domain.
        counts: gradient evaluations by method.

    Returns:
        Rows.
    """
    rows: list[dict[str, Any]] = []

    def add(method: str, metric: str, values: Any, **settings: Any) -> None:
        rows.append(scored_row(config, method, each.seed, metric, values) | settings)

    for shots in config.test_shots:
        found = {name: at[shots] for name, at in each.scored.items()}
        means = {name: one.values[:, one.chosen].mean() for name, one in found.items()}
        for name in sorted(found, key=lambda name: -means[name]):
            one = found[name]
            values = one.values[:, one.chosen]
            for baseline in BASELINES:
                add(name, against(baseline), values, support=shots)
            for domain, part in by_domain(one, one.chosen).items():
                add(
                    name, "accuracy by domain", part,
                    domain=domain, reviews=sizes[domain], support=shots,
                )  # fmt: skip
            if one.rate is not None:
                for at, steps in enumerate(config.adapt_steps):
                    add(
                        name, "accuracy by inner steps", one.values[:, at],
                        support=shots, inner_steps=steps,
                    )  # fmt: skip
                add(name, "inner steps at test", config.adapt_steps[one.chosen], support=shots)
                add(name, "inner rate at test", one.rate, support=shots)
    for name, run in each.runs.items():
        add(name, "gradient evaluations", counts[name])
        add(name, "training CPU seconds", run.cpu_seconds)
        add(name, "training wall seconds", run.history[-1]["seconds"])
        add(name, "best look at step", run.step)
        waits = waits_of(run)
        add(name, WAIT, np.mean(waits))
        add(name, f"{WAIT}: longest", max(waits))
    settings = {"source": config.source, "model": config.model}
    return [row | settings for row in rows]


def waits_of(run: Trained) -> list[float]:
    """The waits of a training, without the first row, whose steps hold the compilation."""
    found = [row["data_wait"] for row in run.history if "data_wait" in row]
    return found[1:] or found


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracies against both baselines; the rest without one."""
    second = against(BASELINES[1])
    compared = [row for row in rows if row["metric"].startswith("accuracy")]
    first = [row for row in compared if row["metric"] != second]
    other = [row for row in compared if row["metric"] == second]
    rest = [row for row in rows if not row["metric"].startswith("accuracy")]
    return (
        summarise(first, baseline=BASELINES[0])
        + summarise(other, baseline=BASELINES[1])
        + summarise(rest)
    )


def verdicts(summary: Sequence[Mapping[str, Any]], learners: Sequence[str]) -> list[str]:
    """Whether the best meta-learner beats the baselines, in a plain sentence for each support.

    The best is picked by the very numbers it is then judged by, which favours it.
    """
    said = []
    supports = dict.fromkeys(r["support"] for r in summary if r["metric"] == "accuracy")
    for support in supports:
        parts = []
        best = ""
        for baseline in BASELINES:
            rows = {
                row["method"]: row
                for row in summary
                if row["metric"] == against(baseline) and row["support"] == support
            }
            best = max(learners, key=lambda name, rows=rows: rows[name]["mean"])
            gap, half = (rows[best][k] for k in ("paired_difference", "paired_ci95"))
            word = "is not told apart from"
            if half is not None and abs(gap) > half:
                word = "beats" if gap > 0 else "is worse than"
            number = report.format_interval(100 * gap, half and 100 * half, sign=True)
            parts.append(f"{word} {baseline} ({number} points)")
        mean = next(
            row["mean"] for row in summary
            if (row["method"], row["metric"], row["support"]) == (best, "accuracy", support)
        )  # fmt: skip
        said.append(
            f"With {support} support examples the best meta-learner, {best} ({100 * mean:.1f} %), "
            f"{' and '.join(parts)}."
        )
    return said


def wait_verdict(seeds: Sequence[Seed]) -> str:
    """Whether the steps had to wait for data."""
    waits = {
        f"{name}, seed {each.seed}": waits_of(run)
        for each in seeds
        for name, run in each.runs.items()
    }
    worst = max(waits, key=lambda name: np.mean(waits[name]))
    longest = max(waits, key=lambda name: max(waits[name]))
    share = float(np.mean(waits[worst]))
    word = "No training's steps" if share <= BAR else "Some trainings' steps"
    return (
        f"{word} waited for data more than {100 * BAR:g} % of their time: the worst waited "
        f"{100 * share:.2f} % ({worst}); the longest wait in a stretch between two rows of metrics "
        f"was {100 * max(waits[longest]):.2f} % ({longest}). The first stretch, which holds the "
        "compilation, is left out, and evaluations are not steps' time."
    )


def adaptation(config: Any, seeds: Sequence[Seed], shots: int) -> Figure:
    """Accuracy against inner steps at one number of support examples."""
    drawn: dict[str, figures.Curve] = {}
    for name, at in seeds[0].scored.items():
        values = at[shots].values
        if len(seeds) > 1:
            # Each seed at the rate it chose.
            values = np.stack([each.scored[name][shots].values.mean(0) for each in seeds])
        points = [mean_ci(column) for column in values.T]
        half = np.array([point.half_width or 0.0 for point in points])
        steps = config.adapt_steps if at[shots].rate is not None else (0,)
        if name != "transfer, not adapted":  # it is where transfer begins
            drawn[name] = (steps, [point.mean for point in points], half)
    over = "seeds" if len(seeds) > 1 else "episodes"
    return (
        f"Query accuracy on unseen domains after inner steps on {shots} support reviews, each "
        "method at the inner rate chosen on validation domains; bands are 95 % intervals over "
        f"{over}. What takes no steps is dotted.",
        figures.adaptation_curves(
            config.out / f"adaptation-{shots}", drawn, "query accuracy",
            title=f"{config.source}, {config.model}, {shots} support reviews",
        ),
    )  # fmt: skip


def differences(
    config: Any, summary: Sequence[Mapping[str, Any]], shots: int, baseline: str
) -> Figure:
    """Paired differences to a baseline."""
    metric = against(baseline)
    shown = [
        row for row in summary
        if row["metric"] == metric and row["support"] == shots and row["method"] != "majority"
    ]  # fmt: skip
    return (
        f"Accuracy minus that of {baseline} on the same episodes of {shots} support reviews, with "
        "95 % intervals; filled where the interval excludes zero.",
        figures.forest(
            config.out / f"differences-{shots}-{baseline.split()[0]}", shown,
            xlabel=f"accuracy minus that of {baseline}",
        ),
    )  # fmt: skip


def write(
    config: Any,
    seeds: Sequence[Seed],
    sources: Mapping[str, Any],
    counts: Mapping[str, int],
    phases: Mapping[str, tuple[float, float]],
    total: tuple[float, float],
) -> None:
    """Write results.json, figures and report.html; print the tables.

    Args:
        config: of the run.
        seeds: what each seed left.
        sources: the reviews by split.
        counts: gradient evaluations by method.
        phases: wall and CPU seconds by phase, over all seeds.
        total: wall and CPU seconds of the run.
    """
    sizes = {
        name: sum(both)
        for source in sources.values()
        for name, both in reviews.sizes(source.encoded).items()
    }
    rows = [row for each in seeds for row in rows_of(config, each, sizes, counts)]
    spent = {**phases, "the whole run": total}
    rows += phase_rows(spent, seeds[0].seed)
    summary = summary_of(rows)
    trained: Any = seeds  # all that the figure reads is each seed's runs
    said = [*verdicts(summary, _learners(counts)), wait_verdict(seeds)]
    made = [
        *(adaptation(config, seeds, shots) for shots in config.test_shots),
        *(
            differences(config, summary, shots, baseline)
            for shots in config.test_shots for baseline in BASELINES
        ),
        learning(config, trained),
    ]  # fmt: skip
    report.write_results(config.out, rows, summary)
    shown = [row for row in summary if row["metric"] != "accuracy by inner steps"]
    report.print_table([row for row in shown if row["metric"] in map(against, BASELINES)])
    print("\n".join(said))
    print_phases(spent)
    report.write_report(
        config.out, f"Few-shot domain adaptation of sentiment: {config.source}, {config.model}",
        _INTRO, config, shown, made, [*said, *_notes(config, seeds, sources, sizes)],
    )  # fmt: skip
    print(f"report: {config.out / 'report.html'}")


def _learners(counts: Mapping[str, int]) -> list[str]:
    return [name for name in counts if name not in BASELINES]


_INTRO = """Can a sentiment classifier that has seen reviews of many product domains adapt to a
domain with a handful of reviews, and does meta-learning help? A task is a domain; its support and
its query are disjoint reviews of it, and the two labels mean the same everywhere.

An encoder is frozen below its last block and run once over all reviews. The block, read at its
first position, and a two-layer head whose output starts at zero are what is learned. Exact MAML
(mixed mode), first-order MAML and Reptile adapt block and head; ANIL adapts the head and
meta-learns the block; LoRA-MAML meta-learns low-rank factors of the block, and the head, and adapts
both.

Transfer trains block and head on all training domains at once, for exactly as many gradient
evaluations as exact MAML, and is then fine-tuned on the support as the others are. "No
meta-training" fine-tunes the pretrained block and a fresh head in the same way."""


def _notes(
    config: Any, seeds: Sequence[Seed], sources: Mapping[str, Any], sizes: Mapping[str, int]
) -> list[str]:
    over = "seeds" if len(seeds) > 1 else "the episodes of the one seed"
    parts = [
        f"{split}: " + ", ".join(f"{name} {sizes[name]:,}" for name in source.encoded.names)
        for split, source in sources.items()
    ]
    cut = sum(source.encoded.cut for source in sources.values())
    total = sum(len(source.encoded.labels) for source in sources.values())
    short = [
        f"with {shots} support and {queries} query reviews: "
        + ", ".join(f"{d} has {sizes[d]}, needs {shots + queries}"
                    for d in config.test_domains if sizes[d] < shots + queries)
        for shots, queries in zip(config.test_shots, config.test_queries, strict=True)
        if any(sizes[d] < shots + queries for d in config.test_domains)
    ]  # fmt: skip
    notes = [
        f"Reviews at hand: {'; '.join(parts)}. {cut:,} of {total:,} are longer than "
        f"{config.positions} tokens and lost their end.",
        f"Intervals are 95 % t-intervals over {over}. Every seed draws its own episodes and its "
        "own training data; a domain's reviews are the same for all, so that the intervals do not "
        "cover the choice of the few reviews at hand. All methods of a seed see the same episodes.",
        "All choices were made on validation domains, by the same grid for all methods: the best "
        f"of {config.evaluations} looks while a method trains, and the inner rate and the number "
        "of steps at test. The best meta-learner of the sentences above is picked by its mean on "
        "the test domains, which favours it.",
        "A gradient evaluation is a forward and a backward pass over one review. An inner step "
        "takes one per support review, its exact derivative counts as two more, the query takes "
        "one per review.",
        "Seconds are those of this machine; CPU seconds count all cores.",
    ]
    if short:
        notes.insert(
            1, f"Too small {'; '.join(short)}. There larger domains left out of training stand in."
        )
    if config.source == "synthetic":
        notes.insert(
            0, "These reviews are made up of a few words, and the encoder is random: the numbers "
            "show that everything runs, and nothing about sentiment. The real experiment is "
            "--preset full, with the data in $JMETA_DATA/amazon.",
        )  # fmt: skip
    return notes
