"""Fill docs/scaling.md from committed plans, and draw them: `python -m benchmarks.scaling`.

Every figure of the page but the paper plan is one that the TPU compiler gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import readme
from benchmarks.tpu_plans import METHODS, STEPS, Plan, cells, key_of, read
from jmeta.cost.rows import Row, mesh_name, sent
from jmeta.cost.shapes import MODELS, Shape
from jmeta.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
PLANS = RESULTS / "tpu_plans" / "plans.json"
GIB = 2**30
TOKENS = 8 * 512  # of one task's batch


def found(path: Path = PLANS) -> list[Plan]:
    """The committed plans, in the order of the benchmark."""
    order = {(one.part, key_of(one)): place for place, one in enumerate(cells())}
    known = [plan for plan in read(path) if (plan.part, plan.key) in order]
    return sorted(known, key=lambda plan: order[plan.part, plan.key])


def topology_table(topology: str, rows: Sequence[Plan]) -> str:
    """Memory per chip of every model under every method; bold where it fits.

    Args:
        topology: such as `v5e:16x16`.
        rows: of `found`.

    Returns:
        A Markdown table.
    """
    wanted = [
        (one.candidate.options["model"], one.method)
        for one in cells()
        if one.part == "table" and one.topology == topology
    ]
    known = {(f.row.candidate.options["model"], f.method): f.row
             for f in rows if f.part == "table" and f.row.topology == topology}  # fmt: skip
    meshes = {one.candidate.options["model"]: one.candidate.mesh for one in cells()
              if one.part == "table" and one.topology == topology}  # fmt: skip
    lines = [
        "| model | mesh | " + " | ".join(METHODS) + " | sent |",
        "| --- | --- |" + " --: |" * (len(METHODS) + 1),
    ]
    for model, mesh in meshes.items():
        quiet = [known[model, m] for m in METHODS if (model, m) in known and known[model, m].fits]
        least = min(map(sent, quiet), default=None)
        figures = [memory_words(known.get((model, method))) for method in METHODS]
        words = "–" if least is None else f"{least / GIB:.2f}"
        lines.append(f"| {model} | {mesh_name(mesh)} | " + " | ".join(figures) + f" | {words} |")
    missing = sorted(
        {m for m, method in wanted if (m, method) not in known}, key=list(MODELS).index
    )
    usable = next((row.usable_bytes / GIB for row in known.values()), None)
    note = "GiB on each chip" + (f", of {usable:.2f} that a program may use" if usable else "")
    rest = (
        f"; not compiled in full: {', '.join(m for m in MODELS if m in missing)}" if missing else ""
    )
    return "\n".join([*lines, "", f"{note}{rest}."])


def memory_words(row: Row | None) -> str:
    """GiB: bold where it fits, `≥` where the compiler gave up, a dash where nobody asked it."""
    if row is None:
        return "–"
    if row.fits:
        return f"**{row.bytes / GIB:.2f}**"
    return ("" if row.temp_bytes else "≥ ") + f"{row.bytes / GIB:.1f}"


def traffic_table(rows: Sequence[Plan]) -> str:
    """What the gradient costs in communication on a data-parallel mesh, read from the HLO.

    Args:
        rows: of `found`.

    Returns:
        A Markdown table of bytes: of the meta-parameters, reduced in all, and inside loops.
    """
    lines = [
        "| estimator | tasks a chip | microbatch | meta-parameters | reduced | inside loops |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    devices = 256
    for each in (f for f in rows if f.part == "traffic"):
        row, c = each.row, each.row.candidate
        meta = weights(MODELS[c.options["model"]]) * 4
        ring = 2 * (devices - 1) / devices
        everything = sum(values[1] for values in row.traffic.values()) / ring
        inside = sum(values[2] for values in row.traffic.values()) / ring
        lines.append(
            f"| {c.estimator} | {(c.tasks or devices) // devices} | {c.microbatch or 'all'} "
            f"| {meta:,} B | {everything:,.0f} B | {inside:,.0f} B |"
        )
    return "\n".join(lines)


def fits_table(rows: Sequence[Plan]) -> str:
    """The plans that the bounds ask for."""
    lines = [
        "| model | topology | mesh | method | GiB | of | state | TFLOP | sent | fits |",
        "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --- |",
    ]
    for each in (f for f in rows if f.part == "fits"):
        row, c = each.row, each.row.candidate
        compiled = bool(row.temp_bytes)
        lines.append(
            f"| {c.options['model']} | {row.topology} | {mesh_name(c.mesh)} | {each.method} "
            f"| {memory_words(row)} | {row.usable_bytes / GIB:.2f} "
            f"| {f'{row.argument_bytes / GIB:.2f}' if compiled else ''} | {row.flops / 1e12:.1f} "
            f"| {f'{sent(row) / GIB:.2f}' if compiled else ''} | {'yes' if row.fits else 'no'} |"
        )
    return "\n".join(lines)


def weights(shape: Shape) -> int:
    """The number of weights of a transformer: embeddings, blocks, normalisations."""
    width = shape.width
    block = 12 * width * width + 4 * width
    return (shape.vocab + shape.max_len) * width + shape.layers * block + 2 * width


def paper(shape: Shape, fsdp: int, tensor: int, weight_bytes: int = 4) -> dict[str, float]:
    """GiB per chip of mixed mode with block rematerialisation, by arithmetic.

    Args:
        shape: of the model.
        fsdp: chips over which the training state lies.
        tensor: chips that share a task.
        weight_bytes: of one fast weight.

    Returns:
        Terms and `"total"`.
    """
    count = weights(shape)
    heads = max(shape.heads // tensor, 1)
    terms = {
        "state": 12 * count / (fsdp * tensor),
        # T stored, and beside them the current ones, a gradient, a cotangent and the sum.
        "fast weights": weight_bytes * count * (STEPS + 4) / tensor,
        # What enters each block, and its tangent; not split over tensor.
        "block inputs": 2 * 4 * TOKENS * shape.width * shape.layers,
        "one block": 6 * 4 * heads * 8 * 512**2 + 4 * 4 * TOKENS * 4 * shape.width / tensor,
        "logits": 4 * 4 * TOKENS * shape.vocab / tensor,
    }
    return {name: size / GIB for name, size in (terms | {"total": sum(terms.values())}).items()}


SEVEN_BILLION = Shape(32000, 4096, 34, 32, 4096, True)  # 6.99e9 weights
PAPER = (
    ("gpt2-124m", MODELS["gpt2-124m"], "v5e:16x16", 1, 1, 4),
    ("gpt2-774m", MODELS["gpt2-774m"], "v5e:4x4", 4, 4, 4),
    ("7B", SEVEN_BILLION, "v5p:4x4x4", 8, 8, 4),
    ("7B", SEVEN_BILLION, "v5e:16x16", 8, 32, 4),
    ("7B, bfloat16 fast weights", SEVEN_BILLION, "v5e:16x16", 16, 16, 2),
)


def paper_table(rows: Sequence[Plan]) -> str:
    """The arithmetic beside what was compiled of it."""
    compiled = {
        (f.row.candidate.options["model"], f.row.topology): f.row
        for f in rows if f.part == "fits" and f.method == "mixed mode"
    }  # fmt: skip
    terms = list(paper(SEVEN_BILLION, 1, 1))
    lines = [
        "| model | topology | fsdp x tensor | " + " | ".join(terms) + " | compiled |",
        "| --- | --- | --: |" + " --: |" * (len(terms) + 1),
    ]
    for name, shape, topology, fsdp, tensor, size in PAPER:
        made = paper(shape, fsdp, tensor, size)
        row = compiled.get((name, topology))
        beside = "not compiled" if row is None else f"{row.bytes / GIB:.2f}"
        lines.append(
            f"| {name} | {topology} | {fsdp} x {tensor} | "
            + " | ".join(f"{made[term]:.2f}" for term in terms)
            + f" | {beside} |"
        )
    return "\n".join(lines)


def places(rows: Sequence[Plan]) -> Mapping[str, str]:
    """What each marked place of the page holds."""
    made = {"fits": fits_table(rows), "traffic": traffic_table(rows), "paper": paper_table(rows)}
    for topology in ("v5e:2x4", "v5e:16x16", "v5p:4x4x4"):
        made[topology.replace(":", "-")] = topology_table(topology, rows)
    return made


def figure(rows: Sequence[Plan], path: Path) -> None:
    """Memory per chip by method, one panel for each topology of the table; filled where it fits."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    from jmeta.runtime.drawing import PALETTE, panels, save, style

    topologies, models = ("v5e:2x4", "v5e:16x16", "v5p:4x4x4"), [m for m in MODELS if m != "tiny"]
    with style():
        drawn, all_axes = panels(11, 3.6, len(topologies))
        for axes, topology in zip(all_axes, topologies, strict=True):
            known = [f for f in rows if f.part == "table" and f.row.topology == topology]
            for index, method in enumerate(METHODS):
                axes.plot([], [], "o", color=PALETTE[index], label=method)
                for row in (f.row for f in known if f.method == method):
                    place = models.index(row.candidate.options["model"]) + 0.16 * (index - 1.5)
                    filled = "full" if row.fits else "none"
                    axes.plot(row.bytes / GIB, place, "o", color=PALETTE[index], fillstyle=filled)
            if known:
                axes.axvline(known[0].row.usable_bytes / GIB, color="#555555", linewidth=1)
            axes.set_xscale("log")
            axes.set_xlim(4, 400)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(topology)
            axes.set_xlabel("GiB on each chip (line: what it offers)")
        all_axes[0].set_yticks(range(len(models)), models)
        all_axes[0].set_ylim(len(models) - 0.5, -0.5)
        drawn.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        save(drawn, path)


def main() -> None:
    """Write the page and the figure."""
    rows = found()
    text = readme.fill(PAGE.read_text(encoding="utf-8"), dict(places(rows)))
    write_atomically(PAGE, text)
    figure(rows, RESULTS / "tpu_plans.png")


if __name__ == "__main__":
    main()
