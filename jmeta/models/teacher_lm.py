"""Teachers that write for a masked language model: two heads on one body, or a score per position.

Same encoder as the student's; a head has a table of its own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key
from jmeta.models import attention, primitives
from jmeta.models.masked_lm import (
    Batch,
    Params,
    head_scores,
    head_states,
    init_body,
    init_head,
    states,
)
from jmeta.models.soft_tokens import PAD
from jmeta.models.transformer import TransformerConfig


def init_teacher(config: TransformerConfig, key: Array) -> Params:
    """Draws a teacher: an encoder and two heads, each with a table of its own.

    Args:
        config: the shape.
        key: a PRNG key.

    Returns:
        ``init_body``, and ``inputs`` and ``labels``: ``{"dense", "ln", "table" [vocab, width],
        "bias" [vocab]}``.

    Example:
        >>> from jmeta.models import masked_lm
        >>> shape = masked_lm.config(vocab=30000, width=256, layers=6, heads=4, max_len=128)
        >>> sizes = jax.eval_shape(lambda key: init_teacher(shape, key), jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(sizes))
        28004448
    """
    body, *rest = jax.random.split(key, 5)
    params = init_body(config, body)
    for name, head, table in (("inputs", *rest[:2]), ("labels", *rest[2:])):
        drawn = 0.02 * jax.random.normal(table, (config.vocab, config.width))
        params[name] = {**init_head(config, head), "table": drawn}
    return params


def init_scorer(config: TransformerConfig, key: Array, share: float = 0.15) -> Params:
    """Draws a teacher that says of each position how likely it is to be masked.

    Args:
        config: the shape.
        key: a PRNG key.
        share: the probability that all positions start near.

    Returns:
        ``init_body`` and ``score``: ``{"kernel" [width, 1], "bias" [1]}``.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} is no probability between 0 and 1")
    body, head = jax.random.split(key)
    score = {
        "kernel": 0.02 * jax.random.normal(head, (config.width, 1)),
        "bias": jnp.full((1,), math.log(share / (1 - share))),
    }
    return {**init_body(config, body), "score": score}


def write(
    config: TransformerConfig, params: Params, batch: Batch, key: Key = None
) -> dict[str, Array]:
    """The teacher's scores: what to put in place of each token, and what to label it.

    Args:
        config: the shape.
        params: of ``init_teacher``.
        batch: as ``states`` takes it.
        key: drives dropout; None is deterministic.

    Returns:
        ``inputs`` and ``labels``, both ``[..., time, vocab]``, at least float32.
    """
    body = states(config, params, batch, key)

    def scores(head: Params) -> Array:
        return head_scores(head_states(config, head, body), head["table"], head["bias"])

    return {"inputs": scores(params["inputs"]), "labels": scores(params["labels"])}


def write_factors(
    config: TransformerConfig, params: Params, batch: Batch, key: Key = None
) -> dict[str, Params]:
    """The teacher's distributions, not multiplied out: states and the table they are scored by.

    ``masked_lm.loss`` with ``chunk`` evaluates them a few tokens at a time, so that no pass of a
    soft teacher's gradient holds ``[tokens, vocab]`` entries; each pass computes them anew.

    Args:
        config: the shape.
        params: of ``init_teacher``.
        batch: as ``states`` takes it.
        key: drives dropout; None is deterministic.

    Returns:
        ``inputs`` and ``labels``, both ``{"states" [..., time, width], "table", "bias"}``, which
        stand for ``softmax(states @ table.T + bias)``. Of [PAD], which is no class, the
        probability is zero.
    """
    body = states(config, params, batch, key)

    def factors(head: Params) -> Params:
        bias = jnp.where(jnp.arange(config.vocab) == PAD, attention.MASKED, head["bias"])
        return {"states": head_states(config, head, body), "table": head["table"], "bias": bias}

    return {"inputs": factors(params["inputs"]), "labels": factors(params["labels"])}


def score(config: TransformerConfig, params: Params, batch: Batch, key: Key = None) -> Array:
    """The log-odds that each position is masked.

    Args:
        config: the shape.
        params: of ``init_scorer``.
        batch: as ``states`` takes it.
        key: drives dropout; None is deterministic.

    Returns:
        ``[..., time]``.
    """
    return primitives.linear(states(config, params, batch, key), params["score"])[..., 0]
