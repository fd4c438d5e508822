"""How a code model may use the rest of a file: what is meta-trained, and what only reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmeta import methods
from jmeta.core.types import Array, Episode, Key, MetaGradient, PyTree
from jmeta.methods.dynamic_evaluation import plain
from jmeta.models import transformer
from jmeta.runtime.evaluate import adapt
from jmeta.tasks import files

NONE, EXACT, FIRST = "no adaptation", "tssa, exact", "tssa, first order"
JOINT = "trained on holes, no adaptation"
TUNED = "steps on the support, not meta-trained"
LOSS = "loss of the hole, nats per token"
MAIN = "shared"  # what is trained with, and what the verdicts and the figure are of
SUPPORTS: dict[str, tuple[Any, Any]] = {
    "rare": ("rare", "both"),
    "shared": ("shared", "both"),
    "uniform": ("uniform", "both"),
    "shared, before the hole": ("shared", "before"),
}
"""How support windows are chosen at test, and on which side of the hole they lie."""


def model_of(config: Any) -> transformer.TransformerConfig:
    """The decoder; it has room for the support in front of the context."""
    return transformer.TransformerConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=4,
        max_len=(config.support + 1) * config.window,
    )  # fmt: skip


def make_loss(config: Any) -> Callable[[PyTree, PyTree, Key], tuple[Array, PyTree]]:
    """The language model's loss of tokens by their weights."""
    model = model_of(config)

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return transformer.next_token_loss(model, params, batch["tokens"], batch["weights"])

    return loss


def holes(config: Any, source: files.Files, kind: str, tasks: int, long: bool) -> Any:
    """A sampler of holes with one kind of support; ``long``: with much of what comes before."""
    choose, side = SUPPORTS[kind]
    return files.holes(
        source, window=config.window, count=config.support, tasks=tasks, size=config.hole,
        choose=choose, side=side,
        long_context=(1 + config.before) * config.window if long else None,
    )  # fmt: skip


def estimators(config: Any) -> dict[str, MetaGradient]:
    """What is meta-trained, for one hole."""
    loss, inner = make_loss(config), optax.sgd(config.inner_lr)
    return {
        EXACT: methods.tssa(loss, steps=config.support, optimizer=inner),
        FIRST: methods.first_order_tssa(loss, steps=config.support, optimizer=inner),
        JOINT: methods.first_order_tssa(loss, steps=0, optimizer=inner),
    }


Values = Callable[[PyTree, Any, Episode], Array]


def readers(config: Any) -> dict[str, Values]:
    """``(params, rate, episodes) -> losses [holes]`` for every way to read the rest of a file."""
    loss, window = make_loss(config), config.window
    whole = (config.support + 1) * window

    def at_hole(params: PyTree, query: PyTree) -> Array:
        return loss(params, query, None)[0]

    def longer(query: PyTree, front: Array) -> PyTree:
        tokens = jnp.concatenate([front, query["tokens"]])
        return {"tokens": tokens, "weights": jnp.pad(query["weights"], (len(front), 0))}

    def not_adapted(params: PyTree, rate: Array, episode: Episode) -> Array:
        return at_hole(params, episode.query)

    def adapted(params: PyTree, rate: Array, episode: Episode) -> Array:
        problem = methods.learned_start(loss, optax.sgd(rate))
        return at_hole(adapt(problem, params, episode.support, config.support), episode.query)

    def attention_before(params: PyTree, rate: Array, episode: Episode) -> Array:
        return at_hole(params, longer(episode.query, episode.query["before"][-whole:-window]))

    def attention_support(params: PyTree, rate: Array, episode: Episode) -> Array:
        front = episode.support.batches["tokens"].reshape(-1)
        return at_hole(params, longer(episode.query, front))

    def dynamic(segments: int) -> Values:
        def value(params: PyTree, rate: Array, episode: Episode) -> Array:
            read = episode.query["before"][-(1 + segments) * window : -window]
            rows = read.reshape(segments, window)
            found = methods.dynamic_evaluation(
                plain(lambda p, row: loss(p, row, None)),
                methods.sgd_towards_start(rate, config.decay), params,
                {"tokens": rows, "weights": jnp.ones(rows.shape)},
            )  # fmt: skip
            return at_hole(found.params, episode.query)

        return value

    def over_holes(one: Values) -> Values:
        def each(params: PyTree, rate: Array, episodes: Episode) -> Array:
            return jax.lax.map(lambda episode: one(params, rate, episode), episodes)

        return jax.jit(each)

    found = {
        NONE: not_adapted,
        TUNED: adapted,
        f"attention to the {whole - window} tokens before": attention_before,
        "attention to the support": attention_support,
        f"dynamic evaluation, {config.support} steps": dynamic(config.support),
        f"dynamic evaluation, {config.before} steps": dynamic(config.before),
    }
    return {name: over_holes(one) for name, one in found.items()}
