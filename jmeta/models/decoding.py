"""Decoders that keep all keys and values, written in place: for generating, many texts at a time.

``cached`` reads one text with a past that slides, and hands out the states it keeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.types import Array
from jmeta.models import attention, block_config, blocks, heads, primitives
from jmeta.models.gpt2 import GPT2Config
from jmeta.models.transformer import TransformerConfig

Params = dict[str, Any]


class Cache(NamedTuple):
    """What a decoder remembers of a sequence; its size is fixed.

    Attributes:
        keys: for each layer ``[batch, heads, room, width / heads]``.
        values: the same.
        length: int32 scalar, tokens read.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array


def init_cache(
    config: TransformerConfig | GPT2Config, params: Params, batch: int, room: int | None = None
) -> Cache:
    """A cache that holds nothing yet.

    Args:
        config: the shape of the model.
        params: what ``init`` returned.
        batch: number of sequences.
        room: tokens it can hold; None: ``config.max_len``.

    Returns:
        A ``Cache`` of zeros, in the compute dtype.

    Raises:
        ValueError: the model is no causal decoder, or has fewer positions than the room.

    Example:
        >>> from jmeta.models import transformer
        >>> config = TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
        >>> init_cache(config, params, batch=3).keys[0].shape
        (3, 2, 5, 4)
    """
    if not getattr(config, "causal", True):
        raise ValueError("only a causal model can be read token by token: causal=True")
    room = config.max_len if room is None else room
    if not 0 < room <= config.max_len:
        raise ValueError(f"room for {room} tokens, but the model has {config.max_len} positions")
    dtype = config.dtype or params["embed"]["tokens"].dtype
    shape = (batch, config.heads, room, config.width // config.heads)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))
    return Cache(empty, empty, jnp.zeros((), jnp.int32))


def extend(
    config: TransformerConfig | GPT2Config, params: Params, cache: Cache, tokens: Array
) -> tuple[Array, Cache]:
    """Reads the next tokens of each sequence.

    Args:
        config: the shape of the model; dropout is off.
        params: what ``init`` returned.
        cache: what was read before.
        tokens: ``[batch, time]`` int.

    Returns:
        The final states ``[batch, time, width]``, normalised, and the cache after them. Tokens
        that the cache has no room for give NaN, and leave it of no use.

    Example:
        >>> from jmeta.models import transformer
        >>> config = TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
        >>> cache, run = init_cache(config, params, batch=1), jax.jit(extend, static_argnums=0)
        >>> first, cache = run(config, params, cache, jnp.array([[3, 4]]))
        >>> then, cache = run(config, params, cache, jnp.array([[5]]))
        >>> hidden = jax.jit(transformer.hidden, static_argnums=0)
        >>> whole = hidden(config, params, jnp.array([[3, 4, 5]]))
        >>> bool(jnp.allclose(then[0, 0], whole[0, 2], atol=1e-5)), int(cache.length)
        (True, 3)
    """
    block_config.check(config)
    time, room = tokens.shape[1], cache.keys[0].shape[2]
    rows = jnp.take(params["embed"]["tokens"], tokens, axis=0, mode="clip")
    places = cache.length + jnp.arange(time, dtype=jnp.int32)
    x = rows + jnp.take(params["embed"]["positions"], places, axis=0, mode="clip")[None]
    x = x.astype(config.dtype or x.dtype)
    allowed = jnp.arange(room, dtype=jnp.int32)[None, :] <= places[:, None]
    allowed = allowed[None, None]
    # Layers are looped over, each with arrays of its own: written in place inside a scan.
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        for stack in heads.stacks(params)
        for i in range(jax.tree.leaves(stack)[0].shape[0])
    ]
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(layers):
        normal = primitives.layer_norm(x, layer["ln1"], config.eps)
        q, k, v = attention.project(config, layer["attn"], normal)
        keys[i] = jax.lax.dynamic_update_slice_in_dim(keys[i], k, cache.length, axis=2)
        values[i] = jax.lax.dynamic_update_slice_in_dim(values[i], v, cache.length, axis=2)
        x = x + attention.mix(config, layer["attn"], q, keys[i], values[i], allowed)
        normal = primitives.layer_norm(x, layer["ln2"], config.eps)
        x = x + blocks.feed_forward(config, layer["mlp"], normal)
    states = primitives.layer_norm(x, params["ln_f"], config.eps)
    # Beyond its room the cache has lost what it held: no number would be right.
    states = jnp.where(cache.length + time > room, jnp.nan, states)
    return states, Cache(tuple(keys), tuple(values), cache.length + time)
