"""How a model that has read a stream answers, and what the weights of its tokens look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _camels_data as reading
from experiments._camels_model import LEARNED, NONE, UNIFORM, model_of, problem_at
from jmeta.core.types import Array, Episode, PyTree
from jmeta.methods import weight_slopes
from jmeta.methods.token_weights import FIRST_WEIGHT
from jmeta.models import transformer
from jmeta.runtime.evaluate import adapt
from jmeta.tasks.bpe import SEP
from jmeta.tasks.scores import exact_match, token_f1

LOSS, MOVED = "loss of the answer, nats per token", "divergence elsewhere, nats per token"
EXACT, F1 = "exact match, %", "F1, %"

Read = Callable[[PyTree, PyTree, Any, Episode], dict[str, Array]]


def make_read(config: Any, kind: str) -> Read:
    """``(meta, base, rate, episode) -> {LOSS, MOVED, "said": tokens}`` after one stream."""
    model = model_of(config)

    def answered(params: PyTree, asked: PyTree) -> Array:
        """Greedy answers ``[stream, longest_answer]``."""
        prompts = (asked["mask"] - asked["answers"]).sum(-1).astype(jnp.int32)
        rows = jnp.where(asked["answers"] + (1 - asked["mask"]) > 0, 0, asked["tokens"])
        at = jnp.arange(rows.shape[0])

        def step(rows: Array, i: Array) -> tuple[Array, Array]:
            last = prompts + i - 1
            states = transformer.hidden(model, params, rows)[at, last]
            said = (states @ params["embed"]["tokens"].T).argmax(-1).astype(rows.dtype)
            return rows.at[at, last + 1].set(said, mode="drop"), said

        _, said = jax.lax.scan(step, rows, jnp.arange(config.longest_answer, dtype=jnp.int32))
        return said.T

    @jax.jit
    def read(meta: PyTree, base: PyTree, rate: Array, episode: Episode) -> dict[str, Array]:
        problem = problem_at(config, base, kind, rate)
        steps = 0 if kind == NONE else config.stream
        params = adapt(problem, meta, episode.support, steps) if steps else base
        _, aux = problem.outer_loss(params, meta, episode.query, None)
        said = answered(params, episode.query["questions"])
        return {LOSS: aux["answers"], MOVED: aux["divergence"], "said": said}

    return read


def score(
    config: Any, data: reading.Data, read: Read, kind: str, meta: PyTree, base: PyTree,
    rate: float, part: str, count: int, seed: int,
) -> dict[str, list[float]]:  # fmt: skip
    """Scores ``[streams]`` of a method at a rate."""
    found: dict[str, list[float]] = {name: [] for name in (LOSS, MOVED, EXACT, F1)}
    golds = data.parts[part].golds
    for rows, kept in zip(*reading.streams(config, data, part, count, seed), strict=True):
        rule = kind if kind in reading.RULES else None
        episode = reading.episode(data, part, rows, kept, rule)
        each = read(meta, base, jnp.float32(rate), episode)
        found[LOSS].append(float(each[LOSS]))
        found[MOVED].append(float(each[MOVED]))
        answers = [decoded(data, ids) for ids in np.asarray(each["said"])]
        for metric, measure in ((EXACT, exact_match), (F1, token_f1)):
            best = [
                max(measure(said, gold) for gold in golds[row])
                for said, row in zip(answers, rows, strict=True)
            ]
            found[metric].append(100 * float(np.mean(best)))
    return found


def decoded(data: reading.Data, ids: np.ndarray) -> str:
    """What was said before the separator."""
    stop = np.flatnonzero(ids == SEP)
    kept = ids[: stop[0]] if len(stop) else ids
    return data.words.tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()


def weights_by_kind(config: Any, data: reading.Data, learned: PyTree) -> dict[str, dict]:
    """What tokens of each kind weigh on test documents, where a document's mean is 1."""
    part = data.parts["test"]
    problem = problem_at(config, {}, LEARNED, 0.0)
    batch = reading.text(part.documents)
    mine = np.asarray(problem.encode(learned, batch, None)["weights"])
    found = {}
    for name, weights in ((LEARNED, mine), *part.rules.items()):
        real = part.kinds > 0
        mean = np.where(real, weights, 0).sum(1, keepdims=True) / real.sum(1, keepdims=True)
        relative = weights / np.where(mean == 0, 1, mean)
        found[name] = {
            label: float(relative[part.kinds == kind].mean())
            for kind, label in reading.KINDS.items()
        }
    return found


def alignment(config: Any, data: reading.Data, base: PyTree, seed: int) -> dict[str, float]:
    """By kind of token, the mean slope of the outer loss in its weight, where learning begins."""
    problem = problem_at(config, base, UNIFORM, config.inner_lr * FIRST_WEIGHT)
    slopes = jax.jit(lambda episode: weight_slopes(problem, config.stream, (), episode))
    found: dict[str, list[np.ndarray]] = {label: [] for label in reading.KINDS.values()}
    part, count = data.parts["validation"], min(config.validation_streams, 10)
    for rows, kept in zip(*reading.streams(config, data, "validation", count, seed), strict=True):
        each = np.asarray(slopes(reading.episode(data, "validation", rows, kept)))[:, 0]
        for kind, label in reading.KINDS.items():
            found[label].append(each[part.kinds[rows] == kind])
    return {label: float(np.concatenate(values).mean()) for label, values in found.items()}
