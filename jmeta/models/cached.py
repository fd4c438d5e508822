"""A decoder's forward pass over a window of tokens, given the keys and values of those before it.

For ``TransformerConfig`` and ``GPT2Config`` alike; one sequence, ``jax.vmap`` for more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmeta.core.types import Array, PyTree
from jmeta.models import attention, block_config, blocks, heads, primitives

Params = dict[str, Any]


class Past(NamedTuple):
    """What is kept of the tokens before a window; any tuple with these fields will do.

    Attributes:
        states: ``{"keys", "values"}``, both ``[capacity, layers, heads, width // heads]``, the
            oldest first.
        present: ``[capacity]``, 1 where there is a state, 0 where there is none yet.
        position: int32 scalar, the position of the window's first token.
    """

    states: dict[str, Array]
    present: Array
    position: Array


def empty(
    config: block_config.BlockConfig, capacity: int, dtype: Any = jnp.float32
) -> dict[str, Array]:
    """States of no tokens, for ``Past.states``.

    Args:
        config: a ``TransformerConfig`` or ``GPT2Config``.
        capacity: how many tokens are kept.
        dtype: of keys and values, that in which the model computes.

    Returns:
        ``{"keys", "values"}``, zeros ``[capacity, layers, heads, width // heads]``.

    Example:
        >>> from jmeta.models.transformer import TransformerConfig
        >>> config = TransformerConfig(vocab=11, width=8, layers=3, heads=2, max_len=5)
        >>> empty(config, 16)["keys"].shape
        (16, 3, 2, 4)
    """
    shape = (capacity, config.layers, config.heads, config.width // config.heads)
    return {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}


def none_yet(config: block_config.BlockConfig, capacity: int, dtype: Any = jnp.float32) -> Past:
    """The past at the start of a text.

    Args:
        config: a ``TransformerConfig`` or ``GPT2Config``.
        capacity: how many tokens are kept.
        dtype: of keys and values.

    Returns:
        A ``Past``.
    """
    states = empty(config, capacity, dtype)
    return Past(states, jnp.zeros(capacity, dtype), jnp.zeros((), jnp.int32))


def slide(past: Past, new: dict[str, Array]) -> Past:
    """The past after a window: its states come last, as many of the oldest go.

    Args:
        past: the past before it.
        new: the window's states, ``[window, layers, heads, width // heads]``.

    Returns:
        The past that the next window has.
    """
    window = new["keys"].shape[0]

    def moved(old: Array, fresh: Array) -> Array:
        return jnp.concatenate([old, fresh.astype(old.dtype)])[window:]

    states = jax.tree.map(moved, past.states, new)
    present = moved(past.present, jnp.ones(window, past.present.dtype))
    return Past(states, present, past.position + window)


def hidden(
    config: Any,
    params: Params,
    past: Past,
    tokens: Array,
    shift: PyTree = None,
) -> tuple[Array, dict[str, Array]]:
    """The final hidden states of a window, normalised, and its keys and values.

    A token attends to every state that is present and to the window up to itself, so that with
    room for all tokens this is the decoder on the whole text, and with less sliding attention.

    Args:
        config: a ``TransformerConfig`` (causal) or ``GPT2Config``. Where a position is beyond
            ``max_len`` the result is NaN.
        params: what the model's ``init`` returned.
        past: a ``Past``.
        tokens: ``[window]`` int.
        shift: what is added to the window's own keys and values before they are attended to; of
            the structure of the states that are returned. None: nothing.

    Returns:
        ``[window, width]`` in the compute dtype, and ``{"keys", "values"}``, each
        ``[window, layers, heads, width // heads]``, the shift included.

    Raises:
        ValueError: a model that is not causal.

    Example:
        >>> from jmeta.models import transformer
        >>> config = transformer.TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=9)
        >>> params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
        >>> tokens, past = jnp.arange(6), none_yet(config, 6)
        >>> read = jax.jit(hidden, static_argnums=0)
        >>> _, new = read(config, params, past, tokens[:4])
        >>> states, _ = read(config, params, slide(past, new), tokens[4:])
        >>> whole = jax.jit(transformer.hidden, static_argnums=0)(config, params, tokens)
        >>> bool(jnp.allclose(states, whole[4:], atol=1e-5))
        True
    """
    if not getattr(config, "causal", True):
        raise ValueError("a cache of the past needs causal=True: an encoder reads the future too")
    block_config.check(config)
    window = tokens.shape[0]
    place = past.position + jnp.arange(window, dtype=past.position.dtype)
    # NaN, not the last row over and over: a text longer than the model is a mistake to be seen.
    rows = jnp.take(params["embed"]["positions"], place, axis=0, mode="fill", fill_value=jnp.nan)
    x = jnp.take(params["embed"]["tokens"], tokens, axis=0, mode="clip") + rows
    x = x.astype(x.dtype if config.dtype is None else config.dtype)[None]

    before = jnp.broadcast_to((past.present != 0)[None], (window, past.present.shape[0]))
    own = jnp.tril(jnp.ones((window, window), bool))
    allowed = jnp.concatenate([before, own], axis=1)[None, None]

    def block(x: Array, each: tuple[Params, Any, Any]) -> tuple[Array, Any]:
        layer, old, added = each
        normal = primitives.layer_norm(x, layer["ln1"], config.eps)
        q, k, v = attention.project(config, layer["attn"], normal)
        new = {"keys": k[0], "values": v[0]}
        if added is not None:
            new = jax.tree.map(lambda a, b: a + b.astype(a.dtype), new, added)
        k, v = (
            jnp.concatenate([old[name].astype(x.dtype), new[name]], axis=1)[None]
            for name in ("keys", "values")
        )
        x = x + attention.mix(config, layer["attn"], q, k, v, allowed)
        normal = primitives.layer_norm(x, layer["ln2"], config.eps)
        return x + blocks.feed_forward(config, layer["mlp"], normal), new

    stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *heads.stacks(params))
    by_layer = jax.tree.map(lambda leaf: jnp.transpose(leaf, (1, 2, 0, 3)), (past.states, shift))
    unroll = config.layers if blocks.loop_kind(config) == "unroll" else 1
    x, new = jax.lax.scan(block, x, (stacked, *by_layer), unroll=unroll)
    new = jax.tree.map(lambda leaf: jnp.transpose(leaf, (2, 0, 1, 3)), new)
    return primitives.layer_norm(x, params["ln_f"], config.eps)[0], new


def token_losses(
    config: Any,
    params: Params,
    past: Past,
    inputs: Array,
    targets: Array,
    shift: PyTree = None,
) -> tuple[Array, dict[str, Array]]:
    """The negative log-likelihood of each target after its input, and the window's states.

    Args:
        config: as in ``hidden``; so are ``params``, ``past`` and ``shift``.
        params: what the model's ``init`` returned.
        past: a ``Past``.
        inputs: ``[window]`` int.
        targets: ``[window]`` int, the tokens one later.
        shift: what is added to the window's own keys and values.

    Returns:
        ``[window]``, at least float32, and the states.
    """
    states, new = hidden(config, params, past, inputs, shift)
    scores = heads.unembed(states, params["embed"]["tokens"])
    picked = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    return heads.logsumexp(scores) - picked, new
