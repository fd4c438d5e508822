"""Fast weights while decoding: a state of constant size that learns each token once it is known.

The numbers are those of whole documents read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, Key
from jmeta.methods.fast_weights import FastWeights, Memory, Params, init_memory, learn, read

Carry = TypeVar("Carry")


class Stream(NamedTuple):
    """Where a decoder stands in each document.

    Attributes:
        memory: what the block has learned.
        state: ``[batch, width]``, the body's last state, whose label is not known yet.
        weight: ``[batch]``, how much that label will count; 0 at the beginning.
    """

    memory: Memory
    state: Array
    weight: Array


def init_state(params: Params, batch: int) -> Stream:
    """A stream that has read nothing.

    Args:
        params: of ``fast_weights.init``.
        batch: number of documents.

    Returns:
        Zeros.

    Example:
        >>> from jmeta.methods import fast_weights
        >>> init_state(fast_weights.init(6, 4, jax.random.key(0)), 3).state.shape
        (3, 6)
    """
    memory = init_memory(params, batch)
    width = params["up"]["kernel"].shape[0]
    return Stream(
        memory, jnp.zeros((batch, width), memory.up.dtype), jnp.zeros(batch, memory.up.dtype)
    )


def step(
    config: FastWeights,
    params: Params,
    table: Array,
    stream: Stream,
    tokens: Array,
    states: Array,
    weights: Array | None = None,
) -> tuple[Array, Stream]:
    """Reads one token of each document: learns it, then says what follows it.

    Args:
        config: how the block is computed.
        params: of ``fast_weights.init``.
        table: the unembedding ``[vocab, size]``.
        stream: where the documents stand.
        tokens: ``[batch]`` int, the tokens read: the labels of the states before.
        states: ``[batch, width]``, the body's states at these tokens.
        weights: ``[batch]``: of the labels of these states, which are learned by the next call;
            None: 1.

    Returns:
        Features ``[batch, size]``, which ``table`` turns into scores of the next token; and the
        stream after it.

    Example:
        >>> from jmeta.methods import fast_weights
        >>> block = fast_weights.init(6, 4, jax.random.key(0))
        >>> stream = init_state(block, 1)
        >>> for token in (3, 5):
        ...     out, stream = step(FastWeights(), block, jnp.ones((9, 4)), stream,
        ...                        jnp.array([token]), jnp.ones((1, 6)))
        >>> stream.memory.weight.tolist()  # one label is known: what followed the first token
        [1.0]
    """
    memory = learn(config, params, table, stream.memory, stream.state, tokens, stream.weight)
    states = states.astype(memory.up.dtype)
    weights = jnp.ones_like(stream.weight) if weights is None else weights
    out = read(config, params, memory, states)
    return out, Stream(memory, states, weights.astype(stream.weight.dtype))


def decoder(
    config: FastWeights,
    params: Params,
    table: Array,
    body: Callable[[Any, Array], tuple[Array, Any]],
) -> Callable[[tuple[Any, Stream], Array], tuple[Array, tuple[Any, Stream]]]:
    """A step of ``generate`` from the step of a body.

    Args:
        config: how the block is computed.
        params: of ``fast_weights.init``.
        table: the unembedding ``[vocab, size]``.
        body: ``(cache, tokens [batch]) -> (states [batch, width], cache)``.

    Returns:
        ``((cache, stream), tokens) -> (scores [batch, vocab], (cache, stream))``.
    """

    def one(carry: tuple[Any, Stream], tokens: Array) -> tuple[Array, tuple[Any, Stream]]:
        cache, stream = carry
        states, cache = body(cache, tokens)
        out, stream = step(config, params, table, stream, tokens, states)
        return out @ table.astype(out.dtype).T, (cache, stream)

    return one


def generate(
    step: Callable[[Carry, Array], tuple[Array, Carry]],
    carry: Carry,
    prompt: Array,
    count: int,
    key: Key = None,
    temperature: float | Array = 1.0,
) -> tuple[Array, Carry]:
    """Continues texts: one scan over what is read and one over what is written.

    Memory does not grow with ``count``, but for the tokens.

    Args:
        step: ``(carry, tokens [batch]) -> (scores [batch, vocab], carry)``, of ``decoder``, or of
            a body without fast weights.
        carry: where it starts.
        prompt: ``[batch, time]`` int, at least one token.
        count: number of tokens to write.
        key: drives the draws; None: the most likely token each time.
        temperature: what scores are divided by before a draw.

    Returns:
        The tokens ``[batch, count]``, -1 where a score is NaN, as beyond the room of a body's
        cache; and the carry, with which another call goes on from the last of them as its prompt.

    Raises:
        ValueError: an empty prompt.

    Example:
        >>> succeeding = lambda carry, tokens: (jax.nn.one_hot(tokens + 1, 9), carry)
        >>> generate(succeeding, (), jnp.array([[3]]), 4)[0].tolist()
        [[4, 5, 6, 7]]
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"the prompt has shape {prompt.shape}; it needs [batch, at least one]")

    def reading(carry: Carry, tokens: Array) -> tuple[Carry, None]:
        return step(carry, tokens)[1], None

    def writing(state: tuple[Carry, Array], number: Array) -> tuple[tuple[Carry, Array], Array]:
        scores, carry = step(*state)
        if key is None:
            tokens = scores.argmax(-1)
        else:
            each = jax.random.fold_in(key, number)
            tokens = jax.random.categorical(each, scores / temperature)
        tokens = jnp.where(jnp.isnan(scores).any(-1), -1, tokens).astype(prompt.dtype)
        return (carry, tokens), tokens

    carry = jax.lax.scan(reading, carry, prompt[:, :-1].T)[0]
    (carry, _), written = jax.lax.scan(writing, (carry, prompt[:, -1]), jnp.arange(count))
    return written.T, carry
