"""What benchmarks share: pieces that are measured once and kept, and what all leave behind.

A piece is a list of rows in ``OUT/pieces/NAME.json``, so that a long benchmark runs in parts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmeta import cost
from jmeta.core.types import Episode, PyTree
from jmeta.files import write_atomically
from jmeta.runtime import report
from jmeta.runtime.config import RunConfig

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class CostConfig(RunConfig):
    """A benchmark in pieces, of what no seed changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds != 1 or self.first_seed:
            raise ValueError(
                "seeds and first_seed: what this benchmark measures does not depend on a seed; it "
                "repeats its measurements instead"
            )


@dataclasses.dataclass(frozen=True)
class WholeConfig(CostConfig):
    """The same in one piece."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume:
            raise ValueError("resume: this benchmark is one piece and keeps nothing to go on from")


def piece(out: Path, name: str, make: Callable[[], Rows], *, wanted: bool, resume: bool) -> Rows:
    """The rows of one piece: those kept, or measured now.

    Args:
        out: the run directory.
        name: of the piece.
        make: measures it.
        wanted: whether this call measures it; where not, only what is kept counts.
        resume: whether what is kept is taken instead of measuring again.

    Returns:
        Rows; none where the piece is not wanted and was never measured.
    """
    file = out / "pieces" / f"{name}.json"
    if file.exists() and (resume or not wanted):
        return json.loads(file.read_text(encoding="utf-8"))
    if not wanted:
        return []
    rows = make()
    write_atomically(file, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return rows


def keep_float32(dtype: str) -> None:
    """Make products of float32 exact to it on a GPU too, where jax would round them to TF32.

    Args:
        dtype: what the benchmark computes in; others are left as they are.
    """
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else None)


def at_rounded(
    gradient: Callable[[PyTree, Episode], PyTree],
    meta: PyTree,
    episode: Episode,
    seed: int = 0,
    trials: int = 3,
) -> float:
    """How much a float64 gradient changes where what it is of differs by float32's rounding.

    Args:
        gradient: ``(meta, episode) -> gradient``, in float64.
        meta: the meta-parameters, in float32.
        episode: likewise.
        seed: of the roundings.
        trials: random roundings, each entry by up to half of its last binary digit.

    Returns:
        The largest difference of the median trial, over the largest entry of the gradient: what a
        computation in float32, which rounds more than once, may be expected to lose.
    """
    rng, reference = np.random.default_rng(seed), gradient(meta, episode)

    def rounded(leaf: Any) -> np.ndarray:
        exact = np.asarray(leaf)
        if exact.dtype.kind != "f":
            return exact
        return exact.astype(float) * (1 + rng.uniform(-(2.0**-24), 2.0**-24, exact.shape))

    moved = [gradient(*jax.tree.map(rounded, (meta, episode))) for _ in range(trials)]
    return cost.median([cost.gradient_error(each, reference) for each in moved])


def show(out: Path, name: str, text: str, *notes: str) -> None:
    """Write a table as ``OUT/NAME.md``, and print it with what there is to say of it.

    Args:
        out: the run directory.
        name: of the benchmark.
        text: Markdown.
        *notes: sentences.
    """
    write_atomically(out / f"{name}.md", text + "\n")
    print(text, *notes, sep="\n")


def leave(
    config: RunConfig,
    title: str,
    said: str,
    rows: Rows,
    summary: Rows,
    *,
    notes: Sequence[str] = (),
    pictures: Mapping[str, Any] | None = None,
) -> None:
    """Write results and report into the run directory; print the table and what it says.

    Args:
        config: of the benchmark.
        title: of the report.
        said: what was measured, in a sentence.
        rows: everything.
        summary: what the table shows.
        notes: sentences, the bars among them.
        pictures: captions and figures.
    """
    out = Path(config.out)
    report.write_results(out, rows, summary)
    report.write_report(out, title, said, config, summary, pictures or {}, list(notes))
    report.print_table(summary)
    for note in notes:
        print(note)
