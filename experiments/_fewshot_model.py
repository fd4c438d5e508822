"""The network of the few-shot text experiment: a frozen body, and a top whose weights are fast.

A wide and deep averaging network: weighted token counts, and a learned embedding of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta.core.types import Array, Episode, Key, Problem, PyTree
from jmeta.methods.anil import learned_body
from jmeta.methods.maml import learned_start
from jmeta.models import losses
from jmeta.runtime.evaluate import in_chunks
from jmeta.tasks.episodes import FewShot

SCALE, DEEP_SCALE = 4.0, 1.2
"""Lengths of the two feature vectors before training: a head of zeros learns at a rate that grows
with their squares."""


def bags(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """Square roots of token counts.

    Args:
        tokens: int ``[n, length]``, 0 pads.
        vocab: size of the vocabulary.

    Returns:
        float32 ``[n, vocab]``; the pad counts nothing.

    Example:
        >>> bags(np.array([[1, 2, 1, 1, 1, 0]]), 4)
        array([[0., 2., 1., 0.]], dtype=float32)
    """
    counts = np.zeros((len(tokens), vocab), np.float32)
    np.add.at(counts, (np.arange(len(tokens))[:, None], tokens), 1.0)
    counts[:, 0] = 0
    return np.sqrt(counts)


def inverse_document_frequency(counts: np.ndarray) -> np.ndarray:
    """The log of one over the share of passages that hold each token.

    Args:
        counts: ``[n, vocab]``, of the training classes alone.

    Returns:
        float32 ``[vocab]``, at least 0.05.
    """
    holding = (counts > 0).sum(0)
    return np.log(len(counts) / (1 + holding)).clip(0.05).astype(np.float32)


def init(key: Array, vocab: int, width: int, classes: int) -> dict[str, Any]:
    """Random weights: token weights equal, embeddings Gaussian, a head of zeros.

    Args:
        key: a PRNG key.
        vocab: size of the vocabulary.
        width: of the embedding.
        classes: rows of the head.

    Returns:
        ``{"body": {"gate" [vocab], "embed" [vocab, width]}, "adapter": {...}, "head": {...}}``.
    """
    keys = jax.random.split(key, 3)

    def normal(key: Array, *shape: int, std: float = 1.0) -> Array:
        return std * width**-0.5 * jax.random.normal(key, shape)

    return {
        "body": {"gate": jnp.zeros(vocab), "embed": normal(keys[0], vocab, width)},
        "adapter": {
            "scale": jnp.log(jnp.asarray([SCALE, DEEP_SCALE])),
            "up": normal(keys[1], width, width),
            "bias": jnp.zeros(width),
            "down": normal(keys[2], width, width, std=0.3),
        },
        "head": zero_head(vocab + width, classes),
    }


def zero_head(features: int, classes: int) -> dict[str, Array]:
    """A head that prefers no class: labels of an episode are in random order."""
    return {"kernel": jnp.zeros((features, classes)), "bias": jnp.zeros(classes)}


def encode(body: PyTree, counts: Array) -> dict[str, Array]:
    """What never adapts: weighted counts of unit length, and their embedding.

    Args:
        body: ``{"gate", "embed"}``.
        counts: ``[n, vocab]``, as ``bags`` makes them.

    Returns:
        ``{"lexical" [n, vocab], "deep" [n, width]}``.
    """
    lexical = _unit(counts * jnp.exp(body["gate"])[None])
    return {"lexical": lexical, "deep": lexical @ body["embed"]}


def features(adapter: PyTree, x: dict[str, Array]) -> Array:
    """The adapter: a residual layer on the embedding, and the lengths of both feature vectors.

    Args:
        adapter: as ``init`` makes it.
        x: what ``encode`` returned.

    Returns:
        ``[n, vocab + width]``.
    """
    scale = jnp.exp(adapter["scale"])
    return jnp.concatenate([scale[0] * x["lexical"], scale[1] * _adapted(adapter, x)], -1)


def _adapted(adapter: PyTree, x: dict[str, Array]) -> Array:
    hidden = jax.nn.gelu(x["deep"] @ adapter["up"] + adapter["bias"][None])
    return _unit(x["deep"] + hidden @ adapter["down"])


def _logits(params: PyTree, x: dict[str, Array]) -> Array:
    """``features @ kernel + bias`` without the wide features in memory once more."""
    scale, kernel = jnp.exp(params["adapter"]["scale"]), params["head"]["kernel"]
    vocab = x["lexical"].shape[1]
    lexical = scale[0] * (x["lexical"] @ kernel[:vocab])
    deep = scale[1] * (_adapted(params["adapter"], x) @ kernel[vocab:])
    return lexical + deep + params["head"]["bias"][None]


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def top_loss(dropout: float):
    """The loss of adapter and head on encoded passages, for inner loops and joint training.

    Args:
        dropout: share of the encoded features that is dropped where a key is given.

    Returns:
        ``(params, batch, key) -> (loss, {"accuracy"})``.
    """

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        x = _dropped(batch["x"], dropout, key)
        logits = _logits(params, x)
        value = losses.cross_entropy(logits, batch["y"], batch["mask"])
        return value, {"accuracy": losses.accuracy(logits, batch["y"], batch["mask"])}

    return loss


def whole_loss(dropout: float):
    """The loss of the whole network on token counts; tokens are dropped where a key is given."""
    top = top_loss(0.0)

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        x = encode(params["body"], _dropped(batch["x"], dropout, key))
        return top(params, {**batch, "x": x}, None)

    return loss


def _dropped(x: PyTree, rate: float, key: Key) -> PyTree:
    if key is None or rate == 0:
        return x
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    kept = [
        jnp.where(jax.random.bernoulli(k, 1 - rate, leaf.shape), leaf, 0)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def full_problem(rate: float | Array, dropout: float = 0.0) -> Problem:
    """MAML's problem: adapter and head are the fast weights; meta is their start."""
    return learned_start(top_loss(dropout), optax.sgd(rate))


def head_problem(rate: float | Array, dropout: float = 0.0) -> Problem:
    """ANIL's problem: the head alone adapts, the adapter is meta-learned and runs once."""

    def encoded(meta: PyTree, batch: PyTree, key: Key) -> PyTree:
        x = _dropped(batch["x"], dropout, key)
        return {**batch, "x": features(meta["adapter"], x)}

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        logits = batch["x"] @ params["head"]["kernel"] + params["head"]["bias"][None]
        value = losses.cross_entropy(logits, batch["y"], batch["mask"])
        return value, {"accuracy": losses.accuracy(logits, batch["y"], batch["mask"])}

    return learned_body(loss, optax.sgd(rate), adapt="head.**", features=encoded)


def encode_source(body: PyTree, source: FewShot, vocab: int) -> FewShot:
    """A source whose passages went through the body, once for the whole run.

    Args:
        body: as trained.
        source: tokens.
        vocab: size of the vocabulary.

    Returns:
        A source with ``x = {"lexical", "deep"}``.
    """
    counts, run = bags(source.x, vocab), jax.jit(encode)
    return source._replace(x=in_chunks(lambda rows: run(body, counts[rows]), len(counts), 1024))


def batches(source: FewShot, size: int):
    """Shuffled examples for joint training, as ``(seed, step) -> Episode`` with a query alone."""

    def sample(seed: int, step: int) -> Episode:
        rows = np.random.default_rng([seed, step]).integers(0, len(source.y), size)
        x = jax.tree.map(lambda leaf: np.take(leaf, rows, axis=0), source.x)
        y = source.y[rows].astype(np.int32)
        return Episode((), {"x": x, "y": y, "mask": np.ones(size, np.float32)})

    return sample
