"""The parts that transformers share: attention, feed-forward, normalisation, loops over layers.

Every derivative of every order exists in all of them, unless a linear layer has a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jmeta.core.types import Array, Key
from jmeta.models import taps
from jmeta.models.dropout import dropout

Params = dict[str, Any]

SCAN_FROM = 8  # layers: from here the compile time of a Python loop costs more than it saves
MASKED = -1e30  # a score that softmax sends to exactly zero, finite so that no derivative is NaN

_CHOICES = {
    "loop": (None, "scan", "unroll"),
    "remat": ("none", "dots", "hidden", "full"),
    "attention": ("xla", "fused"),
    "gelu": ("tanh", "exact"),
}


class BlockConfig(Protocol):
    """What a config says about its blocks; ``TransformerConfig`` explains each field."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def loop(self) -> str | None: ...  # noqa: D102
    @property
    def remat(self) -> str: ...  # noqa: D102
    @property
    def attention(self) -> str: ...  # noqa: D102
    @property
    def gelu(self) -> str: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102
    @property
    def attention_dropout(self) -> float: ...  # noqa: D102
    @property
    def eps(self) -> float: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102


Block = Callable[[BlockConfig, "Array | None", Array, Params, Key], Array]


def check(config: BlockConfig) -> None:
    """Refuse a config with a field that has no meaning.

    Args:
        config: any config of blocks.

    Raises:
        ValueError: a choice that does not exist, heads that do not divide the width, or a rate
            outside [0, 1).
    """
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}; choose one of {allowed}")
    if config.width % config.heads:
        raise ValueError(f"width {config.width} is not a multiple of heads {config.heads}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is not in [0, 1)")
    if config.attention == "fused" and config.attention_dropout:
        raise ValueError('attention="fused" has no dropout inside; set attention_dropout=0')


def check_length(shape: tuple[int, ...], mask: Array | None, max_len: int) -> None:
    """Refuse a sequence longer than the model, or a mask of another shape.

    Args:
        shape: of the tokens, ``[..., time]``.
        mask: ``[..., time]`` or None.
        max_len: the longest sequence accepted.

    Raises:
        ValueError: either of them.
    """
    if shape[-1] > max_len:
        raise ValueError(f"{shape[-1]} tokens, but the model has max_len={max_len} positions")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}, tokens {shape}")


def accumulate(dtype: Any) -> Any:
    """Float32 for anything narrower, else the dtype itself."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def linear(x: Array, layer: Array | Params) -> Array:
    r"""A linear layer as one matmul of matrices, in the dtype of ``x``.

    .. math:: y = x W + b + (x A) B

    Args:
        x: ``[..., in]``.
        layer: the kernel ``[in, out]``, or a dict of ``kernel`` and, as far as there, ``bias``
            ``[out]`` and the low-rank factors ``a`` ``[in, rank]`` and ``b`` ``[rank, out]``,
            which are never multiplied out: no gradient has the kernel's shape for their sake.
            ``squares`` ``[out]`` is a tap of ``jmeta.models.taps``: the first axis of ``x`` are
            then examples.

    Returns:
        ``[..., out]``.
    """
    parts = layer if isinstance(layer, dict) else {"kernel": layer}
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ parts["kernel"].astype(x.dtype)
    if "a" in parts:
        y = y + (flat @ parts["a"].astype(x.dtype)) @ parts["b"].astype(x.dtype)
    if "bias" in parts:
        y = y + parts["bias"].astype(x.dtype)[None]
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return taps.tap(x, y, parts["squares"]) if "squares" in parts else y


def layer_norm(x: Array, weights: Params, eps: float) -> Array:
    """Layer normalisation over the last axis, in at least float32.

    Args:
        x: ``[..., width]``.
        weights: ``{"scale", "bias"}``, both ``[width]``.
        eps: added to the variance.

    Returns:
        The shape and dtype of ``x``.
    """
    exact = x.astype(accumulate(x.dtype))
    centred = exact - exact.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    gain, bias = (
        weights[name].astype(exact.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        for name in ("scale", "bias")
    )
    return (centred * scale * gain + bias).astype(x.dtype)


def gelu(x: Array, kind: str) -> Array:
    """The Gaussian error linear unit, ``"exact"`` or by its ``"tanh"`` approximation."""
    return jax.nn.gelu(x, approximate=kind == "tanh")


def visible(causal: bool, mask: Array | None, time: int) -> Array | None:
    """Who attends to whom.

    Args:
        causal: whether a position sees only itself and the past.
        mask: ``[..., time]``, 1 for tokens, 0 for padding.
        time: length of the sequence.

    Returns:
        ``[batch or 1, 1, query, key]`` bool, or None for everybody.
    """
    allowed = None
    if causal:
        allowed = jnp.tril(jnp.ones((time, time), bool))[None, None]
    if mask is not None:
        present = (mask != 0).reshape(-1, 1, 1, time)
        allowed = present if allowed is None else present & allowed
    return allowed


def masked_softmax(scores: Array, allowed: Array | None) -> Array:
    """Softmax over the last axis; a row that may see nothing is spread evenly."""
    # The mask is added, not selected, and jax's softmax has a derivative in terms of its output:
    # of the [time, time] arrays only the probabilities are kept for a backward pass.
    if allowed is not None:
        scores = scores + jnp.where(allowed, 0.0, MASKED).astype(scores.dtype)
    return jax.nn.softmax(scores, axis=-1)


def attend(
    config: BlockConfig, weights: Params, x: Array, allowed: Array | None, key: Key = None
) -> Array:
    """Multi-head self-attention.

    Args:
        config: heads and how attention is computed.
        weights: ``out`` and either ``qkv``, whose columns are ordered query, key, value, or the
            three apart, as ``query``, ``key`` and ``value``; each a layer of ``linear``.
        x: ``[batch, time, width]``.
        allowed: what ``visible`` returned.
        key: drives the dropout of attention weights.

    Returns:
        ``[batch, time, width]``.
    """
    q, k, v = project(config, weights, x)
    return mix(config, weights, q, k, v, allowed, key)


def project(config: BlockConfig, weights: Params, x: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of every head.

    Args:
        config: its heads.
        weights: as in ``attend``.
        x: ``[batch, time, width]``.

    Returns:
        Three arrays ``[batch, heads, time, width // heads]``.
    """
    batch, time, width = x.shape
    per_head = width // config.heads
    if "qkv" in weights:
        joined = linear(x, weights["qkv"]).reshape(batch, time, 3, config.heads, per_head)
        q, k, v = jnp.transpose(joined, (2, 0, 3, 1, 4))
        return q, k, v
    q, k, v = (
        jnp.transpose(
            linear(x, weights[name]).reshape(batch, time, config.heads, per_head), (0, 2, 1, 3)
        )
        for name in ("query", "key", "value")
    )
    return q, k, v


def mix(
    config: BlockConfig,
    weights: Params,
    q: Array,
    k: Array,
    v: Array,
    allowed: Array | None,
    key: Key = None,
) -> Array:
    """Attention from queries to keys and values, which may be more than the queries.

    Args:
        config: how attention is computed.
        weights: its layer ``out``.
        q: ``[batch, heads, time, per_head]``.
        k: ``[batch, heads, keys, per_head]``.
        v: the same.
        allowed: ``[batch or 1, 1, time, keys]`` bool, or None for everybody.
        key: drives the dropout of attention weights.

    Returns:
        ``[batch, time, width]``.
    """
    batch, heads, time, per_head = q.shape
    if config.attention == "fused":
        q, k, v = (jnp.transpose(each, (0, 2, 1, 3)) for each in (q, k, v))
        capability = getattr(jax.devices()[0], "compute_capability", "")
        kernel = fused_kernel(capability, q, k)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation=kernel)
    else:
        q = q * per_head**-0.5
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=accumulate(q.dtype))
        probabilities = masked_softmax(scores, allowed).astype(q.dtype)
        probabilities = dropout(probabilities, config.attention_dropout, key)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", probabilities, v)
        mixed = jnp.transpose(mixed, (0, 2, 1, 3))
    return linear(mixed.reshape(batch, time, heads * per_head), weights["out"])


def fused_kernel(capability: str, q: Array, k: Array) -> Literal["cudnn", "xla"]:
    """What computes fused attention; jax does not choose by itself.

    Args:
        capability: of the device, such as ``"9.0"``; empty where it is no GPU, and a name where it
            is not NVIDIA's.
        q: queries ``[batch, time, heads, per_head]``.
        k: keys ``[batch, keys, heads, per_head]``.

    Returns:
        cuDNN's flash attention where it exists (8.0 and later) and takes these arrays: half
        precision, at most 128 columns a head in multiples of eight, even lengths; else XLA.
    """
    major = capability.partition(".")[0]
    exists = major.isdecimal() and int(major) >= 8
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if exists and half and even and fits else "xla"


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
