"""How methods are tuned on validation documents, scored on test documents, and timed.

Settings are chosen on validation documents alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _adaptive_lm_methods as methods_of
from experiments._adaptive_lm_data import Data, Rows, sampler
from experiments._adaptive_lm_methods import Body, Losses
from jmeta import cost
from jmeta.core.types import PyTree
from jmeta.files import write_atomically
from jmeta.methods import datastore
from jmeta.methods.dynamic_evaluation import gradient_statistics

SGD_RATES = (3e-3, 0.01, 0.03, 0.1, 0.3)
RMS_RATES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
DECAYS = (0.0, 0.02)
HSO_RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3)
KNN_WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4)
KNN_TEMPERATURES = (1.0, 3.0, 10.0, 30.0)
KNN_PAIRS = 32  # of keys, whose distance is the unit of temperatures
COST, MEMORY = "cost per token, static = 1", "temporary memory, MiB"
TIMED, REPEATS = 4, 5


def batches(rows: Rows, size: int) -> list[Rows]:
    """Documents, so many at a time; the last ones are filled up with the first."""
    filled = Rows(*(np.concatenate([x, np.repeat(x[:1], -len(x) % size, 0)]) for x in rows))
    return [
        Rows(*(x[first : first + size] for x in filled))
        for first in range(0, len(filled.tokens), size)
    ]


def in_batches(losses: Losses, params: PyTree, rows: Rows, batch: int) -> np.ndarray:
    """Losses of all documents, a few at a time, ``[documents, length]``."""
    parts = [np.asarray(losses(params, part)) for part in batches(rows, batch)]
    return np.concatenate(parts)[: len(rows.tokens)]


def mean_loss(each: np.ndarray, rows: Rows) -> float:
    """Nats per token over all documents."""
    weights = rows.mask[:, 1:]
    value = float((np.where(weights > 0, each, 0) * weights).sum() / weights.sum())
    return value if np.isfinite(value) else float("inf")


def chosen(
    scored: Callable[[PyTree], np.ndarray], options: Iterable[PyTree], rows: Rows
) -> tuple[PyTree, float]:
    """The option with the least validation loss, and that loss."""
    found = [(mean_loss(scored(each), rows), each) for each in options]
    best, option = min(found, key=lambda pair: pair[0])
    return option, best


def tune_dynamic(
    losses: Losses, start: PyTree, data: Data, config: Any, statistics: PyTree | None
) -> tuple[PyTree, dict[str, float]]:
    """Rate and decay of dynamic evaluation: the rate without a decay first, then the decay."""
    rates = SGD_RATES if statistics is None else RMS_RATES
    extra = {"start": start} if statistics is None else {"start": start, "statistics": statistics}
    rows = data.validation

    def option(rate: float, decay: float) -> PyTree:
        return {**extra, "rate": jnp.float32(rate), "decay": jnp.float32(decay)}

    def scored(each: PyTree) -> np.ndarray:
        return in_batches(losses, each, rows, config.score_batch)

    best, _ = chosen(scored, (option(rate, DECAYS[0]) for rate in rates), rows)
    rate = float(best["rate"])
    best, loss = chosen(scored, (option(rate, decay) for decay in DECAYS), rows)
    return best, {"rate": rate, "decay": float(best["decay"]), "validation": loss}


def statistics_of(body: Body, params: PyTree, data: Data, config: Any, seed: int) -> PyTree:
    """Root mean squared gradients over training batches of one segment's tokens each."""
    sample = sampler(data, config.segment, 1)
    loss = methods_of.mean(methods_of.static(body))
    batches = (sample(seed, 10**6 + step) for step in range(config.statistics_batches))
    return gradient_statistics(lambda p, rows: loss(p, rows, None), params, batches)


def tune_hso(losses: Losses, params: PyTree, data: Data, config: Any) -> Any:
    """Adam's rate of hidden-state optimisation."""
    rows = data.validation
    options = ({"params": params, "rate": jnp.float32(rate)} for rate in HSO_RATES)
    best, loss = chosen(
        lambda each: in_batches(losses, each, rows, config.score_batch), options, rows
    )
    return best, {"rate": float(best["rate"]), "validation": loss}


def tune_knn(
    body: Body, params: PyTree, data: Data, config: Any, seed: int
) -> tuple[PyTree, dict[str, float]]:
    """Weight and temperature of kNN-LM, with a datastore of training text."""
    sample = sampler(data, config.length, config.score_batch)
    keys_of = jax.jit(lambda params, tokens: body.keys(params, tokens)[1])
    keys, values, entries, step = [], [], 0, 0
    while entries < config.datastore:
        rows = sample(seed, 2 * 10**6 + step)
        kept = rows.mask[:, 1:] > 0
        keys.append(np.asarray(keys_of(params, rows.tokens[:, :-1]))[kept])
        values.append(rows.tokens[:, 1:][kept])
        entries, step = entries + int(kept.sum()), step + 1
    found = np.concatenate(keys)[: config.datastore], np.concatenate(values)[: config.datastore]
    store = datastore(*map(jnp.asarray, found))
    # In units of the typical distance, so that one grid serves every model.
    near = jnp.asarray(found[0][: 2 * KNN_PAIRS])
    scale = float(jnp.square(near[:KNN_PAIRS] - near[KNN_PAIRS:]).sum(-1).mean()) / 30
    options = (
        {"params": params, "store": store, "weight": jnp.float32(weight),
         "temperature": jnp.float32(scale * heat)}
        for weight, heat in itertools.product(KNN_WEIGHTS, KNN_TEMPERATURES)
    )  # fmt: skip
    # The search is the same for all options.
    find = jax.jit(methods_of.looked_up(body, config.neighbours))
    parts = [find(params, store, part) for part in batches(data.validation, config.score_batch)]
    blend = jax.jit(methods_of.blended)

    def scored(option: PyTree) -> np.ndarray:
        mixed = {name: option[name] for name in ("weight", "temperature")}
        each = np.concatenate([np.asarray(blend(mixed, *part)) for part in parts])
        return each[: len(data.validation.tokens)]

    best, loss = chosen(scored, options, data.validation)
    kept = {name: float(best[name]) for name in ("weight", "temperature")}
    return best, {**kept, "validation": loss}


def keep(file: Path, each: np.ndarray, settings: dict[str, Any]) -> None:
    """Write a method's token losses of a seed, and what it was set to."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, losses=each.astype(np.float32), settings=json.dumps(settings))
    write_atomically(file, buffer.getvalue())


def kept(file: Path) -> tuple[np.ndarray, dict[str, Any]] | None:
    """What ``keep`` wrote, or None."""
    if not file.exists():
        return None
    with np.load(file) as stored:
        return stored["losses"], json.loads(str(stored["settings"]))


def untuned(config: Any, body: Body, name: str, start: PyTree, trained: PyTree) -> PyTree:
    """What a method reads with, of the right shapes: time and memory depend on nothing else."""
    if trained is not None:
        return trained
    rate = {"rate": jnp.float32(0.01), "decay": jnp.float32(0.01)}
    if name == methods_of.SGD:
        return {"start": start, **rate}
    if name == methods_of.RMS:
        return {"start": start, "statistics": jax.tree.map(jnp.abs, start), **rate}
    if name == methods_of.HSO:
        return {"params": start, "rate": rate["rate"]}
    entries, width = config.datastore, body.config.width
    keys = jax.random.normal(jax.random.key(0), (entries, width))
    return {"params": start, "store": datastore(keys, jnp.arange(entries) % 256),
            "weight": jnp.float32(0.1), "temperature": jnp.float32(1)}  # fmt: skip


def costs(readers: dict[str, tuple[Losses, PyTree]], data: Data) -> list[dict[str, Any]]:
    """Seconds per token and temporary memory of each method on a few documents, interleaved."""
    rows = Rows(*(x[:TIMED] for x in data.test))
    given = {name: (params, rows) for name, (_, params) in readers.items()}
    programs = {
        name: cost.compile_program(losses, *given[name]) for name, (losses, _) in readers.items()
    }
    seconds, _ = cost.interleave(programs, given, REPEATS)
    tokens, static = rows.mask[:, 1:].size, cost.median(seconds[methods_of.STATIC])
    made = []
    for name, program in programs.items():
        middle = cost.median(seconds[name])
        for metric, value in (
            (COST, middle / static),
            ("microseconds per token", 1e6 * middle / tokens),
            (MEMORY, program.temp_bytes / 2**20),
        ):
            made.append({"method": name, "seed": 0, "metric": metric, "value": value})
    return made
