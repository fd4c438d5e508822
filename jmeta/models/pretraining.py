"""An encoder with a head for each self-supervised objective, and their losses.

Batches are those of ``tasks.objectives``, ``tasks.detection`` and ``tasks.sentences``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array, Key
from jmeta.models import attention, bert, heads, losses, primitives
from jmeta.models.bert import BertConfig

Params = dict[str, Any]
Batch: TypeAlias = Mapping[str, Any]
Loss: TypeAlias = Callable[[Params, Batch, Key], tuple[Array, dict[str, Array]]]

TEMPERATURE = 0.05  # SimCSE's
HEADS = ("mlm", "added", "deleted", "sentence", "order")


def init(config: BertConfig, key: Array, names: Sequence[str] = HEADS) -> Params:
    """Draws an encoder with heads.

    Args:
        config: the shape of the encoder; what it says of its own head is not used.
        key: a PRNG key.
        names: which heads: ``"mlm"`` for scores of the vocabulary, ``"added"`` and ``"deleted"``
            for edits, ``"sentence"`` for embeddings, ``"order"`` for pairs.

    Returns:
        ``bert.init``'s ``embed`` and ``blocks``, and ``heads``, by name.

    Raises:
        ValueError: there is no such head.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=1, heads=2, max_len=5)
        >>> sorted(init(config, jax.random.key(0), ["mlm", "added"])["heads"])
        ['added', 'mlm']
    """
    body, head = jax.random.split(key)
    return {
        **bert.init(config._replace(head=None), body),
        "heads": init_heads(config, head, names),
    }


def init_heads(config: BertConfig, key: Array, names: Sequence[str] = HEADS) -> Params:
    """Draws heads for an encoder that there is already, such as a checkpoint.

    Args:
        config: the shape of the encoder.
        key: a PRNG key; each head's own is folded from its place in ``HEADS``, so that a head is
            the same whichever others there are.
        names: as in ``init``.

    Returns:
        The heads, by name.

    Raises:
        ValueError: there is no such head.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=1, heads=2, max_len=5)
        >>> init_heads(config, jax.random.key(0), ["added"])["added"]["out"]["kernel"].shape
        (8, 2)
    """
    if unknown := sorted(set(names) - set(HEADS)):
        raise ValueError(f"there is no head {unknown[0]!r}; choose of {HEADS}")
    made = {}
    for name in names:
        own = jax.random.fold_in(key, HEADS.index(name))
        if name == "mlm":
            made[name] = bert.init_head(config._replace(head="masked_lm"), own)
        elif name == "order":
            made[name] = bert.init_head(config._replace(head="classify", labels=2), own)
        else:
            kind, size = ("dense", config.width) if name == "sentence" else ("out", 2)
            kernel = 0.02 * jax.random.normal(own, (config.width, size))
            made[name] = {kind: {"kernel": kernel, "bias": jnp.zeros(size)}}
    return made


def masked_lm(
    config: BertConfig, params: Params, batch: Batch, key: Key = None, *, most: int | None = None
) -> tuple[Array, dict[str, Array]]:
    """The loss of ``objectives.mlm`` and ``objectives.guided_mlm``.

    Args:
        config: the shape of the encoder.
        params: of ``init``, with the head ``"mlm"``.
        batch: ``tokens``, ``mask``, ``labels``, ``weights``, ``[rows, time]``.
        key: drives dropout; None is deterministic.
        most: positions of a row that are scored, those of the largest weight; the others are
            never multiplied with the embedding. None: all. With as many as a row asks for at
            most, the loss is the same.

    Returns:
        The mean over what is asked for, and ``{"tokens": how much that is}``.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=1, heads=2, max_len=5)
        >>> tokens = jnp.array([[3, 4, 5, 0]])
        >>> batch = {"tokens": tokens, "labels": tokens, "weights": jnp.array([[0.0, 1, 0, 0]])}
        >>> score = jax.jit(lambda key, batch: masked_lm(config, init(config, key), batch, most=1))
        >>> round(float(score(jax.random.key(0), batch)[0]), 1)  # log 11 = 2.4
        2.4
    """
    states = bert.hidden(config, params, batch, key)
    labels, weights = heads.targets(batch)
    if most is not None and most < weights.shape[-1]:
        weights, places = jax.lax.top_k(weights, most)
        labels = jnp.take_along_axis(labels, places, -1)
        states = jnp.take_along_axis(states, places[..., None], -2)
    head, table = params["heads"]["mlm"], params["embed"]["tokens"]
    states = primitives.gelu(primitives.linear(states, head["dense"]), config.gelu)
    states = primitives.layer_norm(states, head["ln"], config.eps)
    rows = jnp.take(table, labels, axis=0, mode="clip")
    picked = jnp.take(head["bias"], labels, mode="clip")
    value, total = heads.token_loss(states, table, rows, weights, (head["bias"], picked))
    return value, {"tokens": total}


def detection(
    config: BertConfig, name: str, params: Params, batch: Batch, key: Key = None
) -> tuple[Array, dict[str, Array]]:
    """The loss of ``detection.added_tokens`` and ``detection.deleted_tokens``: edited, or not.

    Args:
        config: the shape of the encoder.
        name: of the head: ``"added"`` or ``"deleted"``.
        params: of ``init``, with that head.
        batch: ``tokens``, ``mask``, ``labels`` (0 or 1), ``weights``, ``[..., time]``.
        key: drives dropout; None is deterministic.

    Returns:
        The mean cross-entropy over what counts, and ``{"accuracy"}``.

    Example:
        >>> config = BertConfig(vocab=11, width=8, layers=1, heads=2, max_len=5)
        >>> tokens = jnp.array([[3, 4, 5]])
        >>> labels, weights = jnp.array([[0, 1, 0]]), jnp.ones((1, 3))
        >>> batch = {"tokens": tokens, "labels": labels, "weights": weights}
        >>> score = jax.jit(lambda key, batch: detection(config, "added", init(config, key), batch))
        >>> round(float(score(jax.random.key(0), batch)[0]), 1)  # log 2
        0.7
    """
    states = bert.hidden(config, params, batch, key)
    scores = primitives.linear(states, params["heads"][name]["out"])
    value = losses.cross_entropy(scores, batch["labels"], batch["weights"])
    return value, {"accuracy": losses.accuracy(scores, batch["labels"], batch["weights"])}


def contrast(
    config: BertConfig, params: Params, batch: Batch, key: Key = None
) -> tuple[Array, dict[str, Array]]:
    """The loss of ``sentences.twins``: which of the other rows is the same sentence.

    Args:
        config: the shape of the encoder, with dropout: it alone tells the twins apart.
        params: of ``init``, with the head ``"sentence"``.
        batch: ``tokens``, ``mask`` ``[rows, time]``, and ``dropout``, the key of its own that is
            used whether or not one is passed.
        key: not used.

    Returns:
        ``contrast_loss`` of the embeddings.

    Raises:
        ValueError: the config has no dropout, so that the two copies are equal.
    """
    del key
    if not (config.dropout or config.attention_dropout):
        raise ValueError(
            "contrastive sentence embedding tells two copies of a sentence apart by their dropout: "
            "give the config dropout or attention_dropout above 0"
        )
    states = bert.hidden(config, params, batch, batch["dropout"])
    first = primitives.linear(states[..., 0, :], params["heads"]["sentence"]["dense"])
    return contrast_loss(jnp.tanh(first))


def contrast_loss(
    vectors: Array, temperature: float = TEMPERATURE
) -> tuple[Array, dict[str, Array]]:
    r"""The cross-entropy of finding each row's twin among all other rows.

    .. math:: L = \frac1n \sum_i \left( \log \sum_{j \ne i} e^{\cos(v_i, v_j) / \tau}
        - \cos(v_i, v_{i'}) / \tau \right), \qquad i' = i \oplus 1

    Args:
        vectors: ``[rows, width]``; rows 2i and 2i + 1 belong together.
        temperature: :math:`\tau`.

    Returns:
        The mean, and ``{"accuracy"}``: how often the nearest other row is the twin.

    Raises:
        ValueError: an odd number of rows.

    Example:
        >>> round(float(contrast_loss(jnp.ones((6, 3)))[0]), 4)  # log 5: all are equally near
        1.6094

    Source: Gao et al., "SimCSE" (2021), equation 1.
    """
    if len(vectors) % 2:
        raise ValueError(f"{len(vectors)} rows are no pairs")
    near = heads.unit(vectors.astype(at_least_float32(vectors.dtype)))
    scores = near @ near.T / temperature
    scores = jnp.where(jnp.eye(len(vectors), dtype=bool), attention.MASKED, scores)
    twin = jnp.arange(len(vectors)) ^ 1
    return losses.cross_entropy(scores, twin), {"accuracy": losses.accuracy(scores, twin)}


def order(
    config: BertConfig, params: Params, batch: Batch, key: Key = None
) -> tuple[Array, dict[str, Array]]:
    """The loss of ``sentences.sentence_order``: were the two texts exchanged?

    Args:
        config: the shape of the encoder.
        params: of ``init``, with the head ``"order"``.
        batch: ``tokens``, ``mask``, ``segments`` ``[rows, time]``; ``y`` ``[rows]``.
        key: drives dropout; None is deterministic.

    Returns:
        The mean cross-entropy, and ``{"accuracy"}``.
    """
    classifier = config._replace(head="classify", labels=2)
    return bert.loss(classifier, {**params, "head": params["heads"]["order"]}, batch, key)
