"""Heads and losses that encoders and decoders share, under one masking rule: pads enter nothing.

A batch is a dict: ``tokens``, and as far as there ``mask``, ``segments``, ``positions`` and labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.tree import at_least_float32
from jmeta.core.types import Array, Key
from jmeta.models import attention, losses, primitives

Params = dict[str, Any]
Batch: TypeAlias = Mapping[str, Array]

NARROW = 32  # columns of a table up to which it is laid on its side
LEAST_NORM = 1e-12  # what sentence embeddings are divided by at least


def logsumexp(scores: Array) -> Array:
    """The log of the sum of exponentials over the last axis."""
    shift = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    return jnp.log(jnp.exp(scores - shift).sum(-1)) + shift[..., 0]


def unembed(flat: Array, table: Array) -> Array:
    """``[n, width]`` states to ``[n, vocab]`` scores, accumulated in at least float32."""
    table, width = _laid_out(table.astype(flat.dtype))
    return jax.lax.dot_general(
        flat,
        table,
        (((1,), (width,)), ((), ())),
        preferred_element_type=at_least_float32(flat.dtype),
    )


def mean_rows(shares: Array, table: Array) -> Array:
    """``[n, vocab]`` shares to the ``[n, width]`` sums of a table's rows that they weigh."""
    table, width = _laid_out(table)
    return jax.lax.dot_general(shares, table, (((1,), (1 - width,)), ((), ())))


def _laid_out(table: Array) -> tuple[Array, int]:
    """A table ``[vocab, width]`` and the axis of its width: a narrow one is laid on its side.

    The gradient of an upright table is a product with a result as narrow as the table, which XLA
    computes on a CPU several times slower than its transpose (``benchmarks/NOTES.md``). The
    barrier is there for XLA, which would put the table up again.
    """
    if table.shape[1] > NARROW:
        return table, 1
    return jax.lax.optimization_barrier(table.T), 0


def chunked_logsumexp(flat: Array, table: Array, bias: Array | None, chunk: int) -> Array:
    r"""``logsumexp`` of the scores of a whole vocabulary, of which one chunk exists at a time.

    .. math:: \log \sum_v e^{h_i \cdot E_v + c_v}
        = \log \sum_k \exp \log \sum_{v \in k} e^{h_i \cdot E_v + c_v}

    Each chunk is recomputed for a backward pass, of any order, so no pass holds ``[n, vocab]``.

    Args:
        flat: the states ``[n, width]``.
        table: the embedding, ``[vocab, width]``.
        bias: ``[vocab]``, or None.
        chunk: entries of the vocabulary at a time; the last chunk may be shorter.

    Returns:
        ``[n]``, at least float32.

    Raises:
        ValueError: a chunk without entries.

    Example:
        >>> states, table = jnp.ones((3, 2)), jnp.zeros((5, 2))
        >>> round(float(chunked_logsumexp(states, table, None, 2)[0]), 4)  # log 5
        1.6094
    """
    if chunk < 1:
        raise ValueError(f"a vocabulary cannot be cut into chunks of {chunk}")

    def of_chunk(flat: Array, part: tuple[Array, Array | None]) -> Array:
        rows, constants = part
        scores = unembed(flat, rows)
        return logsumexp(
            scores if constants is None else scores + constants.astype(scores.dtype)[None]
        )

    vocab = table.shape[0]
    whole = vocab - vocab % chunk
    parts = []
    if whole:
        cut = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), (table, bias))
        # Inside a scan nothing can be merged with the forward pass, so no barrier is needed.
        one = jax.checkpoint(of_chunk, prevent_cse=False)
        parts.append(jax.lax.scan(lambda _, part: (None, one(flat, part)), None, cut)[1])
    if whole < vocab:
        rest = jax.tree.map(lambda x: x[whole:], (table, bias))
        parts.append(jax.checkpoint(of_chunk)(flat, rest)[None])
    return logsumexp(jnp.concatenate(parts).T)


def token_loss(
    states: Array,
    table: Array,
    rows: Array,
    weights: Array,
    bias: tuple[Array, Array] | None,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    r"""Weighted mean negative log-likelihood of target tokens under a tied decoder.

    .. math::
        L = \frac{\sum_i w_i \left(\log \sum_v e^{h_i \cdot E_v + c_v} - h_i \cdot E_{y_i}
            - c_{y_i}\right)}{\sum_i w_i}

    Nothing but the scores has ``[n, vocab]`` entries: a target's score is the product of the
    state and its embedding row, never picked out of a log-softmax. Where a target is a distribution
    :math:`y` over the vocabulary, its row is :math:`y E`, and the loss the soft cross-entropy.

    Args:
        states: ``[..., width]``.
        table: the embedding ``E``, ``[vocab, width]``.
        rows: the targets' rows of it, ``[..., width]``.
        weights: ``[...]``; if they sum to zero, so does the loss.
        bias: the decoder's ``c``, ``[vocab]``, and its entries at the targets, ``[...]``.
        chunk: entries of the vocabulary that are scored at a time; None: all at once.

    Returns:
        The loss and the sum of the weights, both at least float32.
    """
    exact = at_least_float32(states.dtype)
    flat = states.reshape(-1, states.shape[-1])
    rows = rows.reshape(flat.shape).astype(states.dtype).astype(exact)
    picked = (flat.astype(exact) * rows).sum(-1)
    if bias is not None:
        picked = picked + bias[1].reshape(-1).astype(exact)
    if chunk is not None:
        partition = chunked_logsumexp(flat, table, None if bias is None else bias[0], chunk)
    else:
        scores = unembed(flat, table)
        partition = logsumexp(scores if bias is None else scores + bias[0].astype(exact)[None])
    losses = partition - picked
    counts = weights.reshape(-1).astype(exact)
    total = counts.sum()
    return (losses * counts).sum() / jnp.where(total == 0, 1, total), total


def next_token_loss(
    states: Array, table: Array, rows: Array, weights: Array
) -> tuple[Array, Array]:
    """``token_loss`` of every token given the state before it.

    Args:
        states: ``[..., time, width]``.
        table: the embedding, ``[vocab, width]``.
        rows: the tokens' rows of it, ``[..., time, width]``.
        weights: ``[..., time]``: of each token as a target; the first of a sequence is never one.

    Returns:
        The loss and the sum of the weights.
    """
    # The last position, without a target, is kept with weight zero: round shapes multiply faster.
    counts = jnp.concatenate([weights[..., 1:], jnp.zeros_like(weights[..., :1])], -1)
    return token_loss(states, table, jnp.roll(rows, -1, axis=-2), counts, None)


def mean_pool(states: Array, mask: Array | None) -> Array:
    """The mean of the states over tokens; zero for a sequence without any.

    Args:
        states: ``[..., time, width]``.
        mask: ``[..., time]``, 1 for tokens, 0 for padding; None: every position counts.

    Returns:
        ``[..., width]``, at least float32.
    """
    states = states.astype(at_least_float32(states.dtype))
    if mask is None:
        return states.mean(-2)
    # where, not multiplication: a sequence without tokens may hold anything at its positions.
    keep = (mask != 0)[..., None]
    total = jnp.where(keep, states, 0).sum(-2)
    return total / jnp.maximum(keep.sum(-2), 1).astype(states.dtype)


def unit(x: Array) -> Array:
    r"""Vectors of length one; what is shorter than 1e-12 is divided by that instead.

    .. math:: x / \max(\lVert x \rVert_2, 10^{-12})

    Args:
        x: ``[..., width]``.

    Returns:
        ``[..., width]``, with finite derivatives of every order at zero too.

    Example:
        >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    square = (x * x).sum(-1, keepdims=True)
    # Twice where: the branch that is not taken must not have an infinite derivative either.
    long = square > LEAST_NORM**2
    return x * jnp.where(long, jax.lax.rsqrt(jnp.where(long, square, 1)), 1 / LEAST_NORM)


def last_token(states: Array, mask: Array | None) -> Array:
    """The state of the last real token, whichever side the padding is on.

    Args:
        states: ``[..., time, width]``.
        mask: ``[..., time]``, 1 for tokens, 0 for padding; None: every position is a token.

    Returns:
        ``[..., width]``; of a sequence without tokens its first state.

    Example:
        >>> last_token(jnp.arange(3.0)[:, None], jnp.array([0, 1, 0])).tolist()
        [1.0]
    """
    if mask is None:
        return states[..., -1, :]
    place = jnp.arange(mask.shape[-1]).reshape((1,) * (mask.ndim - 1) + (-1,))
    last = jnp.where(mask != 0, place, 0).max(-1, keepdims=True)
    # A sum over a one-hot: its transpose is no scatter.
    chosen = (place == last)[..., None]
    return jnp.where(chosen, states, 0).sum(-2)


def span_scores(states: Array, layer: Params, mask: Array | None) -> Array:
    """Scores of every position as the start and as the end of an answer.

    Args:
        states: ``[..., time, width]``.
        layer: the linear layer, ``{"kernel" [width, 2], "bias" [2]}``.
        mask: ``[..., time]``, 1 for tokens, 0 for padding, which can be neither start nor end.

    Returns:
        ``[..., time, 2]``, at least float32.
    """
    scores = primitives.linear(states, layer)
    scores = scores.astype(at_least_float32(scores.dtype))
    return scores if mask is None else jnp.where((mask != 0)[..., None], scores, attention.MASKED)


def span_loss(scores: Array, start: Array, end: Array) -> Array:
    """The mean cross-entropy of start and end; a place outside of the window does not count.

    Args:
        scores: ``[..., time, 2]`` of ``span_scores``.
        start: ``[...]`` int, the answer's first token.
        end: ``[...]`` int, its last.

    Returns:
        A scalar.
    """
    time = scores.shape[-2]

    def half(scores: Array, place: Array) -> Array:
        inside = (place >= 0) & (place < time)
        return losses.cross_entropy(scores, place, inside)

    return (half(scores[..., 0], start) + half(scores[..., 1], end)) / 2


def class_loss(scores: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """The loss of a classification head on ``batch["y"]``, or of a regression with one output.

    Args:
        scores: ``[..., labels]``.
        batch: ``y`` ``[...]``: the class (below 0: hidden, does not count), or with one label a
            number; an example whose ``mask`` is all padding does not count.

    Returns:
        The loss, and ``{"accuracy"}``, or ``{}`` of a regression.
    """
    y = batch["y"]
    counts = jnp.ones(y.shape, bool) if batch.get("mask") is None else (batch["mask"] != 0).any(-1)
    if scores.shape[-1] == 1:
        return losses.squared_error(scores[..., 0], y.astype(scores.dtype), counts), {}
    counts = counts & (y >= 0)
    value = losses.cross_entropy(scores, y, counts)
    return value, {"accuracy": losses.accuracy(scores, y, counts)}


def targets(batch: Batch) -> tuple[Array, Array]:
    """What is to be predicted at each position, and how much it weighs.

    Args:
        batch: ``labels`` ``[..., time]`` int (below 0: none here; missing: the tokens), and
            ``weights`` (missing: 1); what has no label or is padding weighs nothing.

    Returns:
        ``labels`` and ``weights``, both ``[..., time]``.
    """
    labels = batch.get("labels")
    tokens, mask = batch["tokens"], batch.get("mask")
    labels = tokens if labels is None else labels
    counts = labels >= 0 if mask is None else (labels >= 0) & (mask != 0)
    weights = batch.get("weights")
    if weights is None:
        weights = counts.astype(jnp.float32)
    else:
        weights = jnp.where(counts, weights, jnp.zeros_like(weights))
    return jnp.where(labels >= 0, labels, 0), weights


def split(key: Key) -> tuple[Key, Key]:
    """One key for the body, one for the head; or none for either."""
    if key is None:
        return None, None
    body, head = jax.random.split(key)
    return body, head


def stacks(params: Params) -> list[Params]:
    """The stacks of blocks in the order they run: ``blocks``, then ``top`` if there is one."""
    return [params[name] for name in ("blocks", "top") if name in params]
