"""kNN-LM: a language model that looks up what followed in similar contexts.

The search is exact, in blocks. A penalty on activations trains a model that knows what comes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.types import Array


class Datastore(NamedTuple):
    """What followed in every context that was read.

    Attributes:
        keys: ``[entries, width]``, the contexts as vectors.
        values: int32 ``[entries]``, the token that followed each.
        squares: ``[entries]``, the squared norm of each key.
    """

    keys: Array
    values: Array
    squares: Array


def datastore(keys: Array, values: Array) -> Datastore:
    """A datastore of contexts and what followed.

    Args:
        keys: ``[entries, width]``, such as the inputs of a model's last feed-forward layer
            (``jmeta.models.context_keys``) at every position of the training text.
        values: ``[entries]`` int, the next token of each.

    Returns:
        A ``Datastore``.

    Raises:
        ValueError: no entry, or not one value for each key.

    Example:
        >>> store = datastore(jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.array([7, 8]))
        >>> store.squares.tolist()
        [1.0, 4.0]
    """
    if keys.ndim != 2 or values.shape != keys.shape[:1]:
        raise ValueError(
            f"keys have shape {keys.shape} and values {values.shape}; it takes one value for each "
            "row of keys"
        )
    if not keys.shape[0]:
        raise ValueError("a datastore needs at least one context")
    return Datastore(keys, values.astype(jnp.int32), (keys * keys).sum(-1))


class Neighbours(NamedTuple):
    """What a search found, the nearest first; of equally near the one that was stored first.

    Attributes:
        distances: ``[queries, k]``, squared Euclidean distances.
        values: int32 ``[queries, k]``, the tokens that followed.
        entries: int32 ``[queries, k]``, their rows of the datastore.
    """

    distances: Array
    values: Array
    entries: Array


def nearest(store: Datastore, queries: Array, k: int, *, block: int = 8192) -> Neighbours:
    r"""The ``k`` nearest entries of every query, exactly.

    .. math:: d(q, k_i) = \lVert q \rVert^2 - 2 q \cdot k_i + \lVert k_i \rVert^2

    Distances to one block of entries exist at a time: ``[queries, block]``.

    Args:
        store: the datastore.
        queries: ``[queries, width]``.
        k: how many; at most the number of entries.
        block: entries that are compared at a time.

    Returns:
        ``Neighbours``.

    Raises:
        ValueError: ``k`` is not in 1..entries, or ``block`` is not positive.

    Example:
        >>> store = datastore(jnp.array([[0.0], [4.0], [5.0]]), jnp.array([7, 8, 9]))
        >>> found = nearest(store, jnp.array([[4.4]]), 2, block=2)
        >>> found.values.tolist(), [f"{each:.2f}" for each in found.distances[0]]
        ([[8, 9]], ['0.16', '0.36'])
    """
    entries = store.values.shape[0]
    if not 1 <= k <= entries:
        raise ValueError(f"k={k} neighbours of a datastore of {entries}: choose 1..{entries}")
    if block < 1:
        raise ValueError(f"block={block} entries at a time; it takes at least one")
    block = min(block, entries)
    count = -(-entries // block)

    def found_in(start: Array) -> tuple[Array, Array]:
        keys = jax.lax.dynamic_slice_in_dim(store.keys, start, block)
        squares = jax.lax.dynamic_slice_in_dim(store.squares, start, block)
        # |q|^2 is the same for all entries: it is added at the end.
        return squares[None] - 2 * (queries @ keys.T), start + jnp.arange(block, dtype=jnp.int32)

    def merge(best: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        # The last block begins early, so that it is full; what it repeats does not count twice.
        first = number * block
        near, places = found_in(jnp.minimum(first, entries - block))
        near = jnp.where((places < first)[None], jnp.inf, near)
        places = jnp.broadcast_to(places[None], near.shape)
        near, places = (jnp.concatenate(pair, 1) for pair in ((best[0], near), (best[1], places)))
        # top_k takes the first of equals, and what was found before stands before.
        score, index = jax.lax.top_k(-near, k)
        return (-score, jnp.take_along_axis(places, index, axis=1)), None

    shape = (queries.shape[0], k)
    none = (jnp.full(shape, jnp.inf, store.squares.dtype), jnp.zeros(shape, jnp.int32))
    (near, places), _ = jax.lax.scan(merge, none, jnp.arange(count, dtype=jnp.int32))
    distances = jnp.maximum(near + (queries * queries).sum(-1, keepdims=True), 0)
    return Neighbours(distances, store.values[places], places)


def _weights(distances: Array, temperature: float) -> Array:
    """Log weights of the neighbours, which sum to one."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; it is positive, and may be infinite")
    return jax.nn.log_softmax((distances.min(-1, keepdims=True) - distances) / temperature)


def knn_log_likelihood(found: Neighbours, targets: Array, temperature: float) -> Array:
    r"""What the neighbours say of one token each.

    .. math:: \log p_{kNN}(y \mid q) = \log \sum_{i: v_i = y} e^{-d_i / \tau}
        - \log \sum_i e^{-d_i / \tau}

    Args:
        found: neighbours of n queries.
        targets: ``[queries]`` int.
        temperature: :math:`\tau`; towards 0 the nearest neighbour decides, at infinity each
            neighbour counts the same.

    Returns:
        ``[queries]``; minus infinity where no neighbour was followed by the target.

    Raises:
        ValueError: a temperature that is not positive.

    Example:
        >>> found = Neighbours(jnp.zeros((1, 4)), jnp.array([[3, 5, 5, 9]]), jnp.arange(4)[None])
        >>> print(jnp.exp(knn_log_likelihood(found, jnp.array([5]), 1.0)))
        [0.5]
    """
    weights = _weights(found.distances, temperature)
    right = found.values == targets[:, None].astype(found.values.dtype)
    return jax.nn.logsumexp(jnp.where(right, weights, -jnp.inf), axis=-1)


def knn_distribution(found: Neighbours, vocab: int, temperature: float) -> Array:
    """What the neighbours say of every token, as ``knn_log_likelihood`` of each.

    Args:
        found: neighbours of n queries.
        vocab: size of the vocabulary.
        temperature: as in ``knn_log_likelihood``.

    Returns:
        Probabilities ``[queries, vocab]``.

    Raises:
        ValueError: a temperature that is not positive.

    Example:
        >>> found = Neighbours(jnp.zeros((1, 4)), jnp.array([[0, 2, 2, 1]]), jnp.arange(4)[None])
        >>> knn_distribution(found, 4, 1.0).tolist()
        [[0.25, 0.25, 0.5, 0.0]]
    """
    weights = jnp.exp(_weights(found.distances, temperature))
    rows = jnp.arange(weights.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((weights.shape[0], vocab), weights.dtype).at[rows, found.values].add(weights)


def interpolate(model: Array, neighbours: Array, weight: float) -> Array:
    r"""The mixture of what the model and the neighbours say, in logarithms.

    .. math:: p = \lambda p_{kNN} + (1 - \lambda) p_{LM}

    Args:
        model: log-probabilities of the model, any shape.
        neighbours: those of the neighbours, the same shape.
        weight: :math:`\lambda`; 0 is the model alone, 1 the neighbours alone.

    Returns:
        Log-probabilities of that shape.

    Raises:
        ValueError: a weight outside [0, 1].

    Example:
        >>> mixed = interpolate(jnp.log(jnp.array([0.2])), jnp.array([-jnp.inf]), 0.25)
        >>> print(jnp.exp(mixed).round(3))
        [0.15]
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} is not in [0, 1]")
    if weight in (0, 1):
        return neighbours if weight else model
    return jnp.logaddexp(model + math.log1p(-weight), neighbours + math.log(weight))


def activation_penalty(keys: Array, weights: Array | None = None, *, coefficient: float) -> Array:
    r"""Squared length of the keys, to train a model with whose keys will be looked up.

    .. math:: R = c \, \frac{\sum_t w_t \lVert k_t \rVert^2}{\sum_t w_t}

    It is added to the language model's loss. Activations are held small, not weights, so that the
    distances between contexts are of one scale.

    Args:
        keys: ``[..., width]``, the activations that serve as keys.
        weights: ``[...]``, 1 for tokens and 0 for padding; None: every position counts.
        coefficient: ``c``.

    Returns:
        A scalar; 0 if the weights sum to zero.

    Raises:
        ValueError: weights of another shape.

    Example:
        >>> print(activation_penalty(jnp.array([[3.0, 4.0], [0.0, 1.0]]), coefficient=0.1))
        1.3000001
    """
    squares = (keys * keys).sum(-1)
    if weights is None:
        return coefficient * squares.mean()
    if weights.shape != squares.shape:
        raise ValueError(f"weights have shape {weights.shape}; the keys' is {keys.shape}")
    counts = weights.astype(squares.dtype)
    total = counts.sum()
    return coefficient * (squares * counts).sum() / jnp.where(total == 0, 1, total)
