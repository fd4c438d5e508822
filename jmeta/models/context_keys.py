"""A decoder's final states and, of the same pass, the keys under which kNN-LM stores contexts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.types import Array
from jmeta.models import attention, block_config, blocks, primitives

Params = dict[str, Any]


def hidden_and_keys(
    config: Any, params: Params, tokens: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """The final hidden states and the inputs of the last block's feed-forward layer.

    Args:
        config: a ``TransformerConfig`` or ``GPT2Config``. Padding is on the right.
        params: what the model's ``init`` returned.
        tokens: ``[..., time]`` int.
        mask: ``[..., time]``, 1 for tokens, 0 for padding, which is then not attended to.

    Returns:
        Both ``[..., time, width]``: the states of ``transformer.hidden``, and the normalised
        residual stream that the last feed-forward layer reads.

    Raises:
        ValueError: the sequence is longer than ``config.max_len``, or shapes disagree.

    Example:
        >>> from jmeta.models import transformer
        >>> config = transformer.TransformerConfig(vocab=11, width=8, layers=2, heads=2, max_len=5)
        >>> params = transformer.init(config, jax.random.key(0))
        >>> states, keys = hidden_and_keys(config, params, jnp.zeros((3, 4), int))
        >>> bool((states == transformer.hidden(config, params, jnp.zeros((3, 4), int))).all())
        True

    Source: Khandelwal et al., "Generalization through Memorization: Nearest Neighbor Language
    Models" (2020), section 5: of all places in the model this one worked best.
    """
    block_config.check(config)
    block_config.check_length(tokens.shape, mask, config.max_len)
    lead, time = tokens.shape[:-1], tokens.shape[-1]
    flat = tokens.reshape(-1, time)
    x = jnp.take(params["embed"]["tokens"], flat, axis=0, mode="clip")
    x = x + jax.lax.slice_in_dim(params["embed"]["positions"], 0, time)[None]
    x = x.astype(x.dtype if config.dtype is None else config.dtype)
    allowed = attention.visible(getattr(config, "causal", True), mask, time)
    below = jax.tree.map(lambda leaf: leaf[:-1], params["blocks"])
    if config.layers > 1:
        config_below = config._replace(layers=config.layers - 1)
        x = blocks.over_layers(config_below, blocks.pre_norm, allowed, x, [below], None)
    last = jax.tree.map(lambda leaf: leaf[-1], params["blocks"])
    normal = primitives.layer_norm(x, last["ln1"], config.eps)
    x = x + attention.attend(config, last["attn"], normal, allowed)
    keys = primitives.layer_norm(x, last["ln2"], config.eps)
    x = x + blocks.feed_forward(config, last["mlp"], keys)
    states = primitives.layer_norm(x, params["ln_f"], config.eps)
    shape = (*lead, time, config.width)
    return states.reshape(shape), keys.reshape(shape)
