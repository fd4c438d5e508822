"""Second order beside its peers: jmeta, JAX by hand, optax's recipe, torch.func, higher, torchopt.

The same arrays; first all gradients are compared in float64, then they are timed in turns, one
process to a framework, and the resident memory of each is read in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import peers_jax, peers_problems, peers_torch
from benchmarks.pieces import CostConfig, Rows, piece, show
from benchmarks.second_order_bars import number, verdict
from experiments._shared import record
from jmeta.cost import median, turn
from jmeta.runtime import config as configuration
from jmeta.runtime import figures, report, statistics

Kind = Literal["sinusoid", "omniglot", "decoder"]
Phase = Literal["agreement", "time", "memory"]

REFERENCE = "jmeta, unrolled"  # reverse mode over reverse mode, step by step
AGREE = 1e-8  # of the largest entry
PAUSE = 0.3  # seconds between turns, in which the threads of the last framework fall asleep
METRICS = ("median seconds", "peak bytes", "difference")
SINGLE = "float32 error"
# Of the best PyTorch row by each measure: time, and memory where it is held to.
BARS: dict[str, dict[str, tuple[float, float | None]]] = {
    "sinusoid": {"": (0.1, None)},  # the fastest exact row of jmeta
    "omniglot": {"": (1.0, None)},
    "decoder": {peers_jax.FAST: (0.95, 0.9), peers_jax.LEAN: (1.15, 0.25)},
}
FRAMEWORKS = {"jax": peers_jax.ROWS, "torch": peers_torch.ROWS}


@dataclasses.dataclass(frozen=True)
class Config(CostConfig):
    """Second order in jmeta, in JAX by hand and in PyTorch's libraries."""

    problems: tuple[Kind, ...] = ("sinusoid", "omniglot", "decoder")
    """Which problems are measured now; those kept in the run directory stay."""
    phases: tuple[Phase, ...] = ("agreement", "time", "memory")
    """What is measured now; likewise."""
    size: Literal["paper", "quick", "smoke"] = "paper"
    """How large the problems are."""
    repeats: int = 5
    """Timed turns of each row."""
    minutes: float = 60.0
    """No new turn begins after this many."""


PRESETS = {
    "paper": Config(),
    # Without the images: nine minutes of seventeen, most of them compilation.
    "quick": Config(problems=("sinusoid", "decoder"), size="quick", repeats=5),
    "smoke": Config(size="smoke", repeats=1),
}


class Worker:
    """A framework's process and the pipe to it; a class, since it lives between requests."""

    def __init__(self, framework: str, problem: Path) -> None:
        """Start it."""
        command = [sys.executable, "-m", "benchmarks.peers_worker", framework, str(problem)]
        root = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the process ended with {self.process.wait()}"}
        return json.loads(line)

    def end(self) -> None:
        """Close the pipe; the process ends by itself."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(problem: Path, *names: str) -> Iterator[list[Worker]]:
    """Processes of these frameworks."""
    started = [Worker(name, problem) for name in names]
    try:
        yield started
    finally:
        for worker in started:
            worker.end()


def missing(row: str) -> str | None:
    """Why a row cannot run here, or None."""
    if row in peers_jax.ROWS:
        return None
    for package in ("torch", peers_torch.NEEDS.get(row, "torch")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install -e '.[peers]'"
    return None


def runnable() -> list[tuple[str, str]]:
    """``(framework, row)`` of everything that can run."""
    pairs = [(framework, row) for framework, rows in FRAMEWORKS.items() for row in rows]
    return [(framework, row) for framework, row in pairs if missing(row) is None]


def agreement(problem: Path, kind: str) -> Rows:
    """The difference of every float64 gradient to the reference, over its largest entry.

    Of jmeta's exact rows the float32 gradient too, which is what is timed.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    single: dict[str, dict[str, np.ndarray]] = {}
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder, workers(problem, *FRAMEWORKS) as started:
        by_name = dict(zip(FRAMEWORKS, started, strict=True))
        for framework, row in runnable():
            file = Path(folder) / "gradient.npz"
            reply = by_name[framework].ask(do="gradient", row=row, file=str(file))
            if "error" in reply:
                rows.append(failed(kind, row, reply["error"]))
                continue
            with np.load(file) as arrays:
                found[row] = dict(arrays)
            if row in peers_jax.JMETA and row != peers_jax.FIRST_ORDER:
                ask = by_name[framework].ask
                reply = ask(do="gradient", row=row, file=str(file), dtype="float32")
                if "error" in reply:
                    rows.append(failed(kind, row, reply["error"]))
                    continue
                with np.load(file) as arrays:
                    single[row] = dict(arrays)
    reference = found[REFERENCE]
    largest = max(np.abs(g).max() for g in reference.values())

    def gap_of(grads: dict[str, np.ndarray]) -> float:
        gaps = [np.abs(grads[n] - g).max() for n, g in reference.items()]
        return float(np.max(gaps) / largest)  # NaN if any is

    rows += [measured(kind, row, SINGLE, gap_of(grads)) for row, grads in single.items()]
    for row, grads in found.items():
        gap = gap_of(grads)
        rows.append(measured(kind, row, "difference", gap))
        if not gap <= AGREE and row != peers_jax.FIRST_ORDER:
            why = f"its float64 gradient differs by {gap:.0e}"
            if row in peers_jax.ROWS:
                raise RuntimeError(f"{kind}: {row}: {why}")
            rows.append(failed(kind, row, why))
    return rows + [
        failed(kind, row, why) for row in peers_torch.ROWS if (why := missing(row)) is not None
    ]


def timing(problem: Path, kind: str, repeats: int, minutes: float) -> Rows:
    """Seconds of every row, in turns; the first turn compiles and warms up."""
    end = time.monotonic() + 60 * minutes
    seconds: dict[str, list[float]] = {row: [] for _, row in runnable()}
    errors: dict[str, str] = {}
    with workers(problem, *FRAMEWORKS) as started:
        by_name = dict(zip(FRAMEWORKS, started, strict=True))
        for repeat in range(repeats + 1):
            if repeat > 1 and time.monotonic() > end:
                break
            for framework, row in turn(list(runnable()), repeat):
                if row in errors:
                    continue
                reply = by_name[framework].ask(do="time", row=row)
                if "error" in reply:
                    errors[row] = reply["error"]
                if repeat and "seconds" in reply:
                    seconds[row].append(reply["seconds"])
                time.sleep(PAUSE)
    # Who failed after some turns keeps their median, and says so beside it.
    rows: Rows = [
        measured(kind, row, f"ended after {n} turns: {why}", n)
        if (n := len(seconds[row]))
        else failed(kind, row, why)
        for row, why in errors.items()
    ]
    for row, values in seconds.items():
        if values:
            rows.append({"method": row, "seed": 0, "problem": kind, "metric": "seconds",
                         "values": values})  # fmt: skip
            rows.append(measured(kind, row, "median seconds", median(values)))
    return rows


def memory(problem: Path, kind: str, framework: str, row: str) -> Rows:
    """Peak resident memory of one row above what its process, a fresh one, held before."""
    with workers(problem, framework) as (worker,):
        reply = worker.ask(do="memory", row=row)
    if "error" in reply:
        return [failed(kind, row, reply["error"])]
    found = {"peak bytes": reply.get("peak"), "planned temporaries": reply.get("temp")}
    return [measured(kind, row, metric, v) for metric, v in found.items() if v is not None]


def measured(kind: str, row: str, metric: str, value: float) -> dict[str, Any]:
    """One result row."""
    return {"method": row, "seed": 0, "problem": kind, "metric": metric, "value": value}


def failed(kind: str, row: str, why: str) -> dict[str, Any]:
    """A row that says why there is none."""
    return measured(kind, row, f"cannot run: {why}", 1.0)


def run(config: Config) -> Rows:
    """Every wanted piece, and those that are kept."""
    rows: Rows = []
    for kind in ("sinusoid", "omniglot", "decoder"):
        with tempfile.TemporaryDirectory() as folder:
            problem = Path(folder) / "problem.npz"
            peers_problems.save(peers_problems.given(kind, config.size), problem)
            makers = {
                "agreement": lambda p=problem, k=kind: agreement(p, k),
                "time": lambda p=problem, k=kind: timing(p, k, config.repeats, config.minutes),
            }
            makers |= {
                f"memory-{row}": lambda p=problem, k=kind, f=framework, r=row: memory(p, k, f, r)
                for framework, row in runnable()
            }
            for part, make in makers.items():
                wanted = kind in config.problems and part.partition("-")[0] in config.phases
                name = f"{kind}-{part}".replace(" ", "_").replace(",", "")
                rows += piece(config.out, name, make, wanted=wanted, resume=config.resume)
    # A row that cannot run may say so in each phase, in the same words.
    return list({(r["problem"], r["method"], r["metric"]): r for r in rows}.values())


def numbers(rows: Sequence[dict[str, Any]]) -> tuple[dict[tuple[str, str, str], float], dict]:
    """``{(problem, row, metric): value}``, and ``{(problem, row): why}`` of what cannot run."""
    value = {(r["problem"], r["method"], r["metric"]): number(r) for r in rows if "value" in r}
    why = {(r["problem"], r["method"]): r["metric"].partition(": ")[2] for r in rows
           if r["metric"].startswith("cannot run")}  # fmt: skip
    return value, why


def best_peer(rows: Sequence[dict[str, Any]], kind: str, metric: str) -> float | None:
    """The least of the PyTorch rows that can run, or None where none was measured."""
    value, why = numbers(rows)
    return min(
        (value[kind, row, metric] for row in peers_torch.ROWS
         if (kind, row, metric) in value and (kind, row) not in why),
        default=None,
    )  # fmt: skip


def ratios(rows: Sequence[dict[str, Any]]) -> Rows:
    """What jmeta is held to, as rows: time and memory over the best PyTorch row's.

    Args:
        rows: of ``run``, or of a committed result.

    Returns:
        Rows with their ``bar``: ratios of what was measured in both frameworks, and the float32
        errors there are.
    """
    value, why = numbers(rows)
    exact = [row for row in peers_jax.JMETA if row != peers_jax.FIRST_ORDER]
    found: Rows = []
    for kind, judged in BARS.items():
        timed = {row: value[kind, row, "median seconds"] for row in exact
                 if (kind, row, "median seconds") in value and (kind, row) not in why}  # fmt: skip
        for named, (time_bar, memory_bar) in judged.items():
            row = named or min(timed, key=lambda each: timed[each], default="")
            if row not in timed:
                continue
            for metric, name, bar in (
                ("median seconds", "time / best peer", time_bar),
                ("peak bytes", "memory / best peer", memory_bar),
            ):
                least, got = best_peer(rows, kind, metric), value.get((kind, row, metric))
                if bar is not None and least and got is not None:
                    found.append(measured(kind, row, name, got / least) | {"bar": bar})
        for row in exact:
            if (kind, row, SINGLE) in value:
                found.append(measured(kind, row, SINGLE, value[kind, row, SINGLE]) | {"bar": 1e-5})
    return found


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is held to, a sentence for each bar.

    Args:
        rows: of ``run``, or of a committed result.

    Returns:
        Sentences.
    """
    return [
        f"{row['problem']}: {row['method']}: {row['metric']} {row['value']:.3g} "
        f"(bar {row['bar']:g}: {verdict(row['value'] <= row['bar'])})"
        for row in ratios(rows)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Time and memory of every row, in multiples of the best PyTorch peer's.

    Args:
        rows: of ``run``, or of a committed result.

    Returns:
        A Markdown table; float32 errors are a column of it where a result has them.
    """
    value, why = numbers(rows)
    kinds = list(dict.fromkeys(row["problem"] for row in rows))
    single = any(metric == SINGLE for *_, metric in value)
    lines = [
        "| problem | method | ms | x | MiB | x | float64 difference |"
        + (" float32 error |" if single else ""),
        "| --- | --- | --: | --: | --: | --: | --: |" + (" --: |" if single else ""),
    ]
    for kind in kinds:
        for row in (*peers_jax.ROWS, *peers_torch.ROWS):
            if (kind, row) in why:
                more = " |" if single else ""
                lines.append(f"| {kind} | {row} | {why[kind, row]} | | | | |{more}")
                continue
            if not any((kind, row, metric) in value for metric in METRICS):
                continue  # what a result has not got
            cells = []
            for metric, unit in (("median seconds", 1e-3), ("peak bytes", 2**20)):
                got = value.get((kind, row, metric))
                least = best_peer(rows, kind, metric)
                cells.append("" if got is None else f"{got / unit:.3g}")
                cells.append("" if got is None or not least else f"{got / least:.2f}")
            for metric in ("difference", SINGLE) if single else ("difference",):
                gap = value.get((kind, row, metric))
                cells.append("" if gap is None else f"{gap:.0e}")
            lines.append(f"| {kind} | {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(config: Config, rows: Rows) -> None:
    """Results, a figure for each problem, and the report."""
    # The bars are those of the problems' full size.
    notes = bars(rows) if config.size == "paper" else []
    judged = ratios(rows) if config.size == "paper" else []
    kept = [*rows, *(row for row in judged if row["metric"] != SINGLE)]
    summary = statistics.summarise(kept)
    report.write_results(config.out, kept, summary)
    pictures = {}
    for kind in dict.fromkeys(row["problem"] for row in rows):
        shown = [r for r in rows if r["problem"] == kind
                 and r["metric"] in ("median seconds", "peak bytes")]  # fmt: skip
        have = {r["method"] for r in shown}
        reference = next((r for r in ("torch.autograd", REFERENCE) if r in have), None)
        metrics = {r["metric"] for r in shown if r["method"] == reference and r["value"] > 0}
        titles = {"median seconds": "time", "peak bytes": "resident memory"}
        if reference is not None and metrics:
            pictures[kind] = figures.cost_figure(
                config.out / f"peers-{kind}",
                [r for r in shown if r["value"] > 0],
                reference=reference,
                metrics={name: title for name, title in titles.items() if name in metrics},
                title=kind,
            )
    show(config.out, "peers", "\n\n".join([table(rows), *notes]))
    report.write_report(
        config.out,
        "Second order beside its peers",
        "The same arrays in every framework; ratios are to the best PyTorch peer.",
        config,
        summary,
        pictures,
        notes,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    record(config, "problems", "phases")
    config = dataclasses.replace(config, out=Path(config.out))
    write(config, run(config))


if __name__ == "__main__":
    main()
