"""Blocks of transformers, before and after normalisation, and the loop over layers.

Every derivative of every order exists in all of them, unless a linear layer has a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jmeta.core.types import Array, Key
from jmeta.models.attention import attend
from jmeta.models.block_config import BlockConfig
from jmeta.models.dropout import dropout
from jmeta.models.primitives import Params, gelu, layer_norm, linear

SCAN_FROM = 8  # layers: from here the compile time of a Python loop costs more than it saves

Block = Callable[[BlockConfig, "Array | None", Array, Params, Key], Array]


def feed_forward(config: BlockConfig, weights: Params, x: Array) -> Array:
    """The two-layer network of a block, ``{"up", "down"}``."""
    hidden = checkpoint_name(linear(x, weights["up"]), "hidden")
    return linear(gelu(hidden, config.gelu), weights["down"])


def pre_norm(
    config: BlockConfig, allowed: Array | None, x: Array, layer: Params, key: Key
) -> Array:
    """One block of a decoder: ``x + attention(ln1(x))``, then ``x + mlp(ln2(x))``."""

    def attention(x: Array, layer: Params, key: Key) -> Array:
        inner, outer = _attention_keys(config, key)
        normal = layer_norm(x, layer["ln1"], config.eps)
        branch = attend(config, layer["attn"], normal, allowed, inner)
        return x + dropout(branch, config.dropout, outer)

    return _branches(config, (attention, _pre_norm_mlp(config)), x, layer, key)


def _pre_norm_mlp(config: BlockConfig) -> Callable[[Array, Params, Key], Array]:
    def mlp(x: Array, layer: Params, key: Key) -> Array:
        branch = feed_forward(config, layer["mlp"], layer_norm(x, layer["ln2"], config.eps))
        return x + dropout(branch, config.dropout, key)

    return mlp


def feed_forward_alone(
    config: BlockConfig, allowed: Array | None, x: Array, layer: Params, key: Key
) -> Array:
    """One block without attention: ``x + mlp(ln2(x))``, each position by itself."""
    del allowed
    return _branches(config, (_pre_norm_mlp(config),), x, layer, key)


def post_norm(
    config: BlockConfig, allowed: Array | None, x: Array, layer: Params, key: Key
) -> Array:
    """One block of BERT: ``ln1(x + attention(x))``, then ``ln2(x + mlp(x))``."""

    def attention(x: Array, layer: Params, key: Key) -> Array:
        inner, outer = _attention_keys(config, key)
        branch = attend(config, layer["attn"], x, allowed, inner)
        return layer_norm(x + dropout(branch, config.dropout, outer), layer["ln1"], config.eps)

    def mlp(x: Array, layer: Params, key: Key) -> Array:
        branch = feed_forward(config, layer["mlp"], x)
        return layer_norm(x + dropout(branch, config.dropout, key), layer["ln2"], config.eps)

    return _branches(config, (attention, mlp), x, layer, key)


def over_layers(
    config: BlockConfig,
    block: Block,
    allowed: Array | None,
    x: Array,
    stacks: Sequence[Params],
    key: Key,
) -> Array:
    """Run all blocks, looped over or scanned.

    Args:
        config: how the loop and its memory are arranged.
        block: ``pre_norm``, ``post_norm`` or ``feed_forward_alone``.
        allowed: what ``visible`` returned.
        x: ``[batch, time, width]``.
        stacks: blocks stacked on a leading axis, one stack after the other. Where a lower one is
            frozen, no derivative goes through it.
        key: drives dropout; the layers' keys do not depend on how they are stacked.

    Returns:
        ``[batch, time, width]``.

    Raises:
        ValueError: the stacks do not hold ``config.layers`` layers.
    """
    sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in stacks]
    if sum(sizes) != config.layers:
        raise ValueError(f"the parameters hold {sizes} layers, the config says {config.layers}")
    keys = None if key is None else jax.random.split(key, config.layers)
    done = 0
    for stack, size in zip(stacks, sizes, strict=True):
        mine = None if keys is None else keys[done : done + size]
        x = _over_stack(config, block, allowed, x, stack, mine)
        done += size
    return x


def loop_kind(config: BlockConfig) -> str:
    """``"scan"`` or ``"unroll"``: what the config says, or else by depth."""
    return config.loop or ("unroll" if config.layers < SCAN_FROM else "scan")


def _over_stack(
    config: BlockConfig, block: Block, allowed: Array | None, x: Array, stack: Params, keys: Any
) -> Array:
    if loop_kind(config) == "scan":

        def body(x: Array, each: tuple[Params, Any]) -> tuple[Array, None]:
            return block(config, allowed, x, *each), None

        return jax.lax.scan(body, x, (stack, keys))[0]
    # split, not indexing: its transpose is one concatenation, while the transpose of each x[i] is
    # a scatter or a pad into zeros of the size of the whole stack, summed over the layers.
    pieces = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * leaf.shape[0]), stack)
    for i in range(jax.tree.leaves(stack)[0].shape[0]):
        layer = jax.tree.map(lambda _, split, i=i: split[i].squeeze(0), stack, pieces)
        x = block(config, allowed, x, layer, None if keys is None else keys[i])
    return x


def _branches(
    config: BlockConfig, branches: Sequence[Callable], x: Array, layer: Params, key: Key
) -> Array:
    keys = [None] * len(branches) if key is None else jax.random.split(key, len(branches))
    # Each branch by itself: the temporaries of one are gone before the other's are recomputed.
    for branch, each in zip(branches, keys, strict=True):
        x = _rematerialised(branch, config)(x, layer, each)
    return x


def _rematerialised(branch: Callable, config: BlockConfig) -> Callable:
    if config.remat == "none":
        return branch
    policy = {
        "hidden": jax.checkpoint_policies.save_only_these_names("hidden"),
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }.get(config.remat)
    # Inside a scan nothing can be merged with the forward pass, so no barrier is needed.
    return jax.checkpoint(branch, policy=policy, prevent_cse=loop_kind(config) != "scan")


def _attention_keys(config: BlockConfig, key: Key) -> tuple[Key, Key]:
    if key is None or config.attention_dropout == 0:
        return None, key
    inner, outer = jax.random.split(key)
    return inner, outer
