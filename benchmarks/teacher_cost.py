"""What a teacher costs: its step against an MLM step of the same student, on the same batch.

Seconds (median of interleaved runs) with the FLOP ratio beside, and XLA's temporary memory of the
soft step, with and without arrays of ``[tokens, vocabulary]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jmeta
from benchmarks.pieces import WholeConfig, leave
from jmeta import cost, methods, optim
from jmeta.core.types import Episode, MetaGradient, PyTree
from jmeta.models import masked_lm, teacher_lm
from jmeta.runtime import config as configuration
from jmeta.runtime import statistics

MLM = "MLM"
BARS = {"soft": 7.5, "soft, auxiliary": 10.0, "input-only": 6.8}  # in either mode
WHOLE_GB = 1.17  # of a soft step that holds every array of [tokens, vocabulary]
CHUNKED = "soft, mixed mode, chunks, block remat"


@dataclasses.dataclass(frozen=True)
class Config(WholeConfig):
    """What a teacher costs against masked language modelling."""

    vocab: int = 30_000
    """Tokens of the vocabulary."""
    width: int = 256
    """Width of both networks."""
    layers: int = 6
    """Blocks of both networks."""
    heads: int = 4
    """Attention heads."""
    tokens: int = 128
    """Tokens of each text."""
    batch: int = 4
    """Texts of a batch: unlabelled, support and query alike."""
    chunk: int = 1000
    """Entries of the vocabulary scored at a time, where it is cut."""
    repeats: int = 7
    """Timed runs of each step, interleaved."""
    memory_only: bool = False
    """Compile for the memory figures, and run nothing."""


PRESETS = {
    "paper": Config(),
    "small": Config(vocab=8000, width=128, layers=4, tokens=64, repeats=15),
    "smoke": Config(vocab=50, width=16, layers=1, heads=2, tokens=8, batch=2, chunk=20, repeats=1),
}


class Cell(NamedTuple):
    """One outer step and what goes into it."""

    step: Callable[[Any, Any], Any]
    state: PyTree
    data: PyTree


def batch(config: Config, seed: int, lead: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """Random tokens, of which a share is asked for."""
    shape = (*lead, config.batch, config.tokens)
    keys = jax.random.split(jax.random.key(seed), 2)
    tokens = jax.random.randint(keys[0], shape, 3, config.vocab)
    hidden = jax.random.bernoulli(keys[1], 0.15, shape)
    return {
        "tokens": jnp.where(hidden, 1, tokens),
        "mask": jnp.ones(shape),
        "labels": jnp.where(hidden, tokens, 0),
        "weights": hidden.astype(jnp.float32),
    }


def networks(config: Config, **fields: Any) -> tuple[Any, methods.Student]:
    """The shape of both networks, and the student under AdamW."""
    chunk = fields.pop("chunk", None)
    shape = masked_lm.config(
        config.vocab, config.width, config.layers, config.heads, config.tokens, **fields
    )
    loss = functools.partial(masked_lm.loss, shape, chunk=chunk)
    return shape, methods.Student(
        loss, functools.partial(masked_lm.init, shape), optim.adamw(1e-3, 0.9, 0.98, 1e-6)
    )


def cell(config: Config, mg: MetaGradient, init: Callable[[Any], PyTree], data: PyTree) -> Cell:
    """A whole outer step: the meta-gradient, and AdamW of the teacher."""
    start, step = jmeta.meta_trainer(mg, optax.adamw(1e-3, 0.9, 0.98))
    state = jax.jit(lambda key: start(init(key), key))(jax.random.key(0))
    return Cell(step, state, data)


def cells(config: Config) -> dict[str, Cell]:
    """The steps that are timed."""
    shape, student = networks(config, loop="unroll")
    pair = batch(config, 0, (1,))
    text = {"tokens": jnp.where(pair["weights"] > 0, pair["labels"], pair["tokens"])}
    unlabelled = {**text, "mask": pair["mask"]}
    masked = {name: pair[name] for name in ("tokens", "labels", "weights")}
    tasks = Episode(batch(config, 1, (1, 1)), batch(config, 2, (1, 1)))
    plain = Episode(unlabelled, tasks)
    full = Episode({**unlabelled, "masked": masked}, tasks)
    teacher = methods.without(functools.partial(teacher_lm.write, shape), [masked_lm.PAD])
    auxiliary = methods.mlm_auxiliary(methods.two_head_loss(teacher))
    both, inputs = methods.inputs_and_labels(teacher), methods.inputs_only(teacher)
    soft = functools.partial(methods.soft_teacher, student)
    make = functools.partial(cell, config, init=functools.partial(teacher_lm.init_teacher, shape))
    reverse = jmeta.reverse_grad
    mlm = methods.plain_gradient(student.loss)
    plain_batch = jax.tree.map(lambda x: x[0], pair)
    return {
        MLM: cell(
            config, mlm, functools.partial(masked_lm.init, shape), Episode(None, plain_batch)
        ),
        "soft": make(soft(both, grad=reverse), data=plain),
        "soft, auxiliary": make(soft(both, grad=reverse, auxiliary=auxiliary), data=full),
        "input-only": make(soft(inputs, grad=reverse), data=plain),
        "soft, mixed mode": make(soft(both), data=plain),
        "soft, auxiliary, mixed mode": make(soft(both, auxiliary=auxiliary), data=full),
        "input-only, mixed mode": make(soft(inputs), data=plain),
    }


def memory_cells(config: Config) -> dict[str, tuple[Any, ...]]:
    """The soft steps whose memory is compared: a jitted estimate, and its arguments' shapes."""
    key = jax.random.key(0)
    tasks = Episode(batch(config, 1, (1, 1)), batch(config, 2, (1, 1)))
    unlabelled = {name: batch(config, 0, (1,))[name] for name in ("tokens", "mask")}
    data = Episode(unlabelled, tasks)

    def made(write: Any, relax: Any, grad: Any, **fields: Any) -> tuple[Any, ...]:
        shape, student = networks(config, **fields)
        rewriting = methods.inputs_and_labels(functools.partial(write, shape))
        mg = methods.soft_teacher(student, rewriting, relax=relax, grad=grad)
        meta = jax.eval_shape(functools.partial(teacher_lm.init_teacher, shape), key)
        state = jax.eval_shape(mg.init, meta, key)
        return jax.jit(lambda m, s, e: mg.estimate(m, s, e, None)), (meta, state, data)

    mixed, reverse = jmeta.mixed_mode_grad, jmeta.reverse_grad
    whole = (teacher_lm.write, methods.expected)
    cut = {"loop": "scan", "remat": "full", "chunk": config.chunk}
    return {
        "soft, reverse mode": made(*whole, reverse, loop="unroll"),
        "soft, mixed mode": made(*whole, mixed, loop="unroll"),
        "soft, mixed mode, chunked losses, block remat": made(*whole, mixed, **cut),
        CHUNKED: made(teacher_lm.write_factors, methods.unevaluated, mixed, **cut),
    }


def measure(config: Config) -> list[dict[str, Any]]:
    """Memory of the soft step, compiled only; then the time of all steps in turns."""
    rows = []
    for name, (step, arguments) in memory_cells(config).items():
        gigabytes = cost.compile_program(step, *arguments).temp_bytes / 1e9
        rows.append({"method": name, "seed": 0, "metric": "temporary GB", "value": gigabytes})
    if config.memory_only:
        return rows
    every = cells(config)
    programs = {
        name: cost.compile_program(jax.jit(c.step), c.state, c.data) for name, c in every.items()
    }
    arguments = {name: (c.state, c.data) for name, c in every.items()}
    seconds, _ = cost.interleave(programs, arguments, config.repeats)
    for name, program in programs.items():
        row = {"method": name, "seed": 0}
        rows.append(row | {"metric": "seconds", "values": list(seconds[name])})
        for metric, value in {
            "median seconds": cost.median(seconds[name]),
            "seconds x": cost.median(
                [a / b for a, b in zip(seconds[name], seconds[MLM], strict=True)]
            ),
            "flops": program.flops,
            "flops x": program.flops / programs[MLM].flops,
            "compile_seconds": program.compile_seconds,
        }.items():
            rows.append(row | {"metric": metric, "value": value})
    return rows


def bars(config: Config, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bounds that the benchmark is held to, one sentence each."""
    value = {(row["method"], row["metric"]): row["value"] for row in rows if "value" in row}
    lines = []
    for name, bar in {**BARS, **{f"{name}, mixed mode": bar for name, bar in BARS.items()}}.items():
        if (name, "seconds x") in value:
            ratio, floor = value[name, "seconds x"], value[name, "flops x"]
            held = "holds" if ratio <= bar else "MISSED"
            lines.append(
                f"{name}: {ratio:.2f} x the time of an MLM step (bar {bar}: {held}); "
                f"{floor:.2f} x its FLOPs"
            )
    if dataclasses.replace(config, out="", repeats=7) == dataclasses.replace(
        PRESETS["paper"], out="", memory_only=config.memory_only
    ):
        share = value[CHUNKED, "temporary GB"] / WHOLE_GB
        own = value[CHUNKED, "temporary GB"] / value["soft, mixed mode", "temporary GB"]
        held = "holds" if share <= 0.4 else "MISSED"
        lines.append(
            f"{CHUNKED}: {value[CHUNKED, 'temporary GB']:.3f} GB, {share:.2f} x {WHOLE_GB} GB "
            f"(bar 0.4: {held}), {own:.2f} x the same step without either"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    # A compile time that a cache has answered is not one.
    jax.config.update("jax_enable_compilation_cache", False)
    config = configuration.parse(PRESETS, argv, description=__doc__)
    configuration.dump(config, Path(config.out))
    rows = measure(config)
    summary = statistics.summarise(rows, baseline=None if config.memory_only else MLM)
    leave(
        config, "What a teacher costs",
        f"One outer step, {config.batch} x {config.tokens} tokens, vocabulary {config.vocab}.",
        rows, summary, notes=bars(config, rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
