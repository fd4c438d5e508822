"""Language models that adapt: what each is trained on, and how it reads documents.

All read the same rows and return a loss for each token, given those before it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jmeta.core.types import Array, Key, PyTree
from jmeta.methods import fast_weights, hidden_states, knn_lm
from jmeta.methods.dynamic_evaluation import (
    dynamic_evaluation,
    rms_towards_start,
    sgd_towards_start,
)
from jmeta.methods.fast_weights import FastWeights
from jmeta.models import cached, decoding, gpt2, nplm, transformer
from jmeta.models.context_keys import hidden_and_keys
from jmeta.models.pretrained import from_pretrained

Losses: TypeAlias = Callable[[PyTree, PyTree], Array]

STATIC = "static"
SGD, RMS, META = (f"{kind} dynamic evaluation" for kind in ("SGD", "RMS", "meta-trained"))
BLOCK, FIRST, EXACT = "FWL slow block", "FWL first order", "FWL exact"
HSO, KNN, SHORT, NGRAM = "HSO", "kNN-LM", "kNN-LM with short keys", "Transformer-N"
METHODS = (STATIC, SGD, RMS, META, BLOCK, FIRST, EXACT, HSO, KNN, SHORT, NGRAM)
TRAINED = (STATIC, META, BLOCK, FIRST, EXACT, SHORT)  # further, from the shared decoder
UNIGRAM = "unigram"
SPEED = 10.0  # of learned rates against weights, under one Adam


class Body(NamedTuple):
    """A decoder as functions.

    Attributes:
        config: its shape.
        init: ``key -> params``; a checkpoint's whatever the key.
        states: ``(params, tokens [batch, time]) -> [batch, time, width]``.
        keys: the same states and, of the same shape, the keys under which contexts are stored.
    """

    config: Any
    init: Callable[[Array], PyTree]
    states: Callable[[PyTree, Array], Array]
    keys: Callable[[PyTree, Array], tuple[Array, Array]]


def make_body(config: Any, vocab: int) -> Body:
    """The decoder of an experiment: a small one, or a GPT-2 checkpoint.

    Raises:
        ValueError: the checkpoint is no GPT-2, too short, or of fewer tokens than its tokeniser.
    """
    if config.model == "decoder":
        shape = transformer.TransformerConfig(
            vocab=vocab, width=config.width, layers=config.layers, heads=config.heads,
            max_len=config.length,
        )  # fmt: skip
        return Body(
            shape,
            lambda key: transformer.init(shape, key),
            lambda params, tokens: transformer.hidden(shape, params, tokens),
            lambda params, tokens: hidden_and_keys(shape, params, tokens),
        )
    found = from_pretrained(config.model, head="causal_lm")
    read = found.config
    if not isinstance(read, gpt2.GPT2Config) or read.max_len < config.length:
        raise ValueError(f"{config.model} is no GPT-2 with {config.length} positions")
    if read.vocab < vocab:
        raise ValueError(
            f"the tokeniser of {config.model} has {vocab} tokens and its embedding {read.vocab}: "
            "they are of different models"
        )
    return Body(
        read,
        lambda key: found.params,
        lambda params, tokens: gpt2.hidden(read, params, {"tokens": tokens}),
        lambda params, tokens: hidden_and_keys(read, params, tokens),
    )


def table_of(params: PyTree) -> Array:
    """The unembedding, which is the embedding."""
    return params["embed"]["tokens"]


def cut(rows: Any) -> tuple[Array, Array, Array]:
    """Inputs, labels and weights, each ``[documents, length]``."""
    tokens, mask = jnp.asarray(rows.tokens), jnp.asarray(rows.mask)
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


def mean(losses: Losses) -> Any:
    """A training loss: the mean over all tokens of a batch."""

    def loss(params: PyTree, rows: Any, key: Key) -> tuple[Array, dict[str, Array]]:
        each, weights = losses(params, rows), rows.mask[:, 1:]
        return (each * weights).sum() / weights.sum(), {}

    return loss


def static(body: Body) -> Losses:
    """The decoder as it is."""

    def losses(params: PyTree, rows: Any) -> Array:
        inputs, labels, _ = cut(rows)
        return fast_weights.token_losses(body.states(params, inputs), table_of(params), labels)

    return losses


def with_block(body: Body, config: FastWeights | None) -> Losses:
    """The decoder and a block of fast weights, ``{"body", "block"}``; None: the block is slow."""

    def losses(params: PyTree, rows: Any) -> Array:
        inputs, labels, weights = cut(rows)
        states, table = body.states(params["body"], inputs), table_of(params["body"])
        if config is None:
            out = fast_weights.slow_features(FastWeights(), params["block"], states)
        else:
            out = fast_weights.features(config, params["block"], table, states, labels, weights)
        return fast_weights.token_losses(out, table, labels)

    return losses


def dynamic(body: Body, optimizer: Callable[[PyTree], Any], segment: int) -> Losses:
    """Dynamic evaluation: segments in turn, with the keys and values of those before."""

    def of_segment(params: PyTree, cache: Any, piece: Any) -> Any:
        inputs, labels, weights = piece
        states, cache = decoding.extend(body.config, params, cache, inputs[None])
        each = fast_weights.token_losses(states[0], table_of(params), labels)
        total = weights.sum()
        return (each * weights).sum() / jnp.where(total == 0, 1, total), (cache, each)

    def losses(meta: PyTree, rows: Any) -> Array:
        params = meta["start"]

        def document(*pieces: Array) -> Array:
            pieces = tuple(x.reshape(-1, segment) for x in pieces)
            cache = decoding.init_cache(body.config, params, 1, pieces[0].size)
            tx = optimizer(meta)
            return dynamic_evaluation(of_segment, tx, params, pieces, cache).aux.reshape(-1)

        return jax.vmap(document)(*cut(rows))

    return losses


def sgd(meta: PyTree) -> Any:
    """Plain dynamic evaluation; ``meta`` has ``rate`` and ``decay``."""
    return sgd_towards_start(meta["rate"], meta["decay"])


def rms(meta: PyTree) -> Any:
    """That of the paper; ``meta`` has ``statistics`` too."""
    return rms_towards_start(meta["rate"], meta["decay"], meta["statistics"])


def learned(meta: PyTree) -> Any:
    """Gradient descent at a learned rate for each leaf; ``rates`` are logarithms over ``SPEED``."""

    def step(grads: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(lambda g, rate: -jnp.exp(SPEED * rate) * g, grads, meta["rates"])

    return optax.stateless(step)


def hso(body: Body, segment: int) -> Losses:
    """Hidden-state optimisation with Adam; ``{"params", "rate"}``."""

    def losses(meta: PyTree, rows: Any) -> Array:
        def window(params: PyTree, past: Any, inputs: Array, targets: Any, shift: PyTree) -> Any:
            labels, weights = targets
            each, new = cached.token_losses(body.config, params, past, inputs, labels, shift)
            return each * weights, new

        reader = hidden_states(window, optax.adam(meta["rate"]))

        def document(*pieces: Array) -> Array:
            inputs, labels, weights = (x.reshape(-1, segment) for x in pieces)
            start = reader.init(cached.empty(body.config, inputs.size))

            def step(cache: Any, piece: Any) -> Any:
                inputs, labels, weights = piece
                targets: Any = labels, weights
                each, cache = reader.step(meta["params"], cache, inputs, targets)
                return cache, each

            return jax.lax.scan(step, start, (inputs, labels, weights))[1].reshape(-1)

        return jax.vmap(document)(*cut(rows))

    return losses


def looked_up(body: Body, k: int) -> Callable[[PyTree, Any, Any], tuple[Array, Any, Array]]:
    """What kNN-LM mixes: log-likelihoods of all labels, and the neighbours of their contexts."""

    def find(params: PyTree, store: Any, rows: Any) -> tuple[Array, Any, Array]:
        inputs, labels, _ = cut(rows)
        states, keys = body.keys(params, inputs)
        model = -fast_weights.token_losses(states, table_of(params), labels).reshape(-1)
        queries = keys.reshape(-1, keys.shape[-1])
        return model, knn_lm.nearest(store, queries, min(k, store.values.shape[0])), labels

    return find


def neighbours(body: Body, k: int) -> Losses:
    """kNN-LM; ``{"params", "store", "weight", "temperature"}``."""
    find = looked_up(body, k)

    def losses(meta: PyTree, rows: Any) -> Array:
        return blended(meta, *find(meta["params"], meta["store"], rows))

    return losses


def with_short_keys(body: Body, coefficient: float) -> Any:
    """A training loss for kNN-LM: that of the decoder, and a penalty on the length of its keys."""

    def loss(params: PyTree, rows: Any, key: Key) -> tuple[Array, dict[str, Array]]:
        inputs, labels, weights = cut(rows)
        states, keys = body.keys(params, inputs)
        each = fast_weights.token_losses(states, table_of(params), labels)
        penalty = knn_lm.activation_penalty(keys, weights, coefficient=coefficient)
        return (each * weights).sum() / weights.sum() + penalty, {"penalty": penalty}

    return loss


def blended(meta: PyTree, model: Array, found: Any, labels: Array) -> Array:
    """Losses of model and neighbours together, at a weight that may be traced."""
    scaled = found._replace(distances=found.distances / meta["temperature"])
    near = knn_lm.knn_log_likelihood(scaled, labels.reshape(-1), 1.0)
    weight = meta["weight"]
    mixed = jnp.logaddexp(model + jnp.log1p(-weight), near + jnp.log(weight))
    return -mixed.reshape(labels.shape)


def n_gram(config: Any, vocab: int) -> tuple[Callable[[Array], PyTree], Losses]:
    """Transformer-N: how it is drawn, and its losses."""
    shape = transformer.TransformerConfig(
        vocab=vocab, width=config.width, layers=config.layers, heads=config.heads,
        max_len=config.length,
    )  # fmt: skip
    context = nplm.Context(last=8, window=64, averages=1, middle=4 * config.width)

    def losses(params: PyTree, rows: Any) -> Array:
        inputs, labels, _ = cut(rows)
        states = nplm.hidden(shape, context, params, inputs)
        return fast_weights.token_losses(states, table_of(params), labels)

    return lambda key: nplm.init(shape, context, key), losses
