"""CaMeLS' networks: the decoder that reads, and the model of its tokens' weights."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jmeta.core.types import Array, Key, Problem, PyTree
from jmeta.methods import init_weight_head, weight_head
from jmeta.methods.token_weights import given, token_weights, uniform
from jmeta.models import transformer

LEARNED, UNIFORM, NONE = "camels", "uniform", "not adapted"


def model_of(config: Any) -> transformer.TransformerConfig:
    """The decoder."""
    longest = max(config.length, config.question_length)
    return transformer.TransformerConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, heads=4, max_len=longest
    )


def problem_at(config: Any, base: PyTree, kind: str, rate: float | Array) -> Problem:
    """The problem of a kind of weights, at an inner rate."""
    model = model_of(config)

    def scores(params: PyTree, batch: PyTree, key: Key) -> Array:
        return transformer.logits(model, params, batch["tokens"])

    def learned(meta: PyTree, batch: PyTree, key: Key) -> Array:
        states = transformer.hidden(model, meta["body"], batch["tokens"])
        return weight_head(meta["head"], states, batch["mask"])

    weigh = {LEARNED: learned, UNIFORM: uniform}.get(kind, given)
    return token_weights(scores, weigh, base, optax.sgd(rate), locality=config.locality)


def first_weights(config: Any, base: PyTree, seed: int) -> PyTree:
    """The model of the weights before it has learned: the base's body, and a head of zeros."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return {"body": base, "head": init_weight_head(config.width, key)}
