"""Low-rank adaptation: factors beside a frozen model, applied without multiplying them out.

The factors are a tree of their own, so an inner loop can have them as its fast weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.tree import matches, merge, names
from jmeta.core.types import Array, Key, PyTree
from jmeta.models.partial import Loss, put

Params = dict[str, Any]

ATTENTION = ("**.query", "**.value", "**.qkv")
"""The layers that PEFT adapts by default: queries and values, which GPT-2 has in one kernel."""

_NO_KERNELS = {"bias", "scale", "tokens", "positions", "types"}


def init(params: Params, key: Array, rank: int, targets: tuple[str, ...] = ()) -> Params:
    r"""Draws factors whose product is zero.

    .. math:: W' = W + s A B, \qquad A_{ij} \sim U(\pm 1 / \sqrt{d_{in}}), \quad B = 0

    Args:
        params: the model; a linear layer is a kernel, or a dict with a ``kernel``.
        key: a PRNG key.
        rank: columns of A and rows of B.
        targets: path globs of linear layers, such as ``"blocks.mlp.*"``; empty: ``ATTENTION``.

    Returns:
        For every layer chosen ``{"a" [..., in, rank], "b" [..., rank, out]}`` at its path, in the
        kernel's dtype; leading axes are the kernel's.

    Raises:
        ValueError: no layer matches, or the rank is below one.

    Example:
        >>> params = {"blocks": {"attn": {"query": {"kernel": jnp.zeros((3, 8, 6))}}}}
        >>> jax.tree.map(jnp.shape, init(params, jax.random.key(0), rank=2))
        {'blocks': {'attn': {'query': {'a': (3, 8, 2), 'b': (3, 2, 6)}}}}

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022), section 4.1.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is below 1")
    kernels = {
        name.removesuffix(".kernel"): leaf
        for name, leaf in zip(names(params), jax.tree.leaves(params), strict=True)
        if name.endswith(".kernel") or (leaf.ndim >= 2 and name.split(".")[-1] not in _NO_KERNELS)
    }
    globs = targets or ATTENTION
    chosen = [path for path in kernels if any(matches(path, glob) for glob in globs)]
    # The default names layers of several models; what a user names must be there.
    unmatched = [g for g in targets if not any(matches(path, g) for path in kernels)]
    if unmatched or not chosen:
        raise ValueError(
            f"no linear layer matches {unmatched or list(globs)}; there are {sorted(kernels)}"
        )
    factors: Params = {}
    for path, each in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *lead, rows, columns = kernels[path].shape
        dtype = kernels[path].dtype
        a = jax.random.uniform(each, (*lead, rows, rank), dtype, -1, 1) * rows**-0.5
        put(factors, path, {"a": a, "b": jnp.zeros((*lead, rank, columns), dtype)})
    return factors


def attach(params: Params, factors: Params, scale: float) -> Params:
    """Put factors beside the kernels they belong to; the layers then add ``scale (x A) B``.

    Args:
        params: the model.
        factors: as ``init`` makes them.
        scale: what their product is multiplied by; PEFT's is ``lora_alpha / r``.

    Returns:
        Parameters for the model's functions. Differentiated in the factors alone, no gradient has
        a kernel's shape.

    Raises:
        ValueError: factors for a layer that the model does not have.

    Example:
        >>> layer = attach({"w": jnp.zeros((8, 6))}, {"w": {"a": 1.0, "b": 2.0}}, scale=0.5)["w"]
        >>> sorted(layer), layer["b"]
        (['a', 'b', 'kernel'], 1.0)
    """

    def beside(layer: Any, pair: Params, path: str) -> Params:
        whole = layer if isinstance(layer, dict) else {"kernel": layer}
        if "kernel" not in whole:
            raise ValueError(f"there are factors for {path!r}, which is no linear layer")
        return {**whole, "a": pair["a"], "b": scale * pair["b"]}

    return _changed(params, factors, beside)


def merged(params: Params, factors: Params, scale: float) -> Params:
    """The model with factors multiplied out, ``W + scale A B``: for writing and for inference.

    Args:
        params: the model.
        factors: as ``init`` makes them.
        scale: what their product is multiplied by.

    Returns:
        Parameters of the model's own structure.

    Raises:
        ValueError: factors for a layer that the model does not have.

    Example:
        >>> ones = {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}
        >>> merged({"w": jnp.zeros((3, 2))}, {"w": ones}, scale=0.5)["w"][0].tolist()
        [0.5, 0.5]
    """

    def together(layer: Any, pair: Params, path: str) -> Any:
        kernel = layer["kernel"] if isinstance(layer, dict) else layer
        kernel = kernel + (scale * (pair["a"] @ pair["b"])).astype(kernel.dtype)
        return {**layer, "kernel": kernel} if isinstance(layer, dict) else kernel

    return _changed(params, factors, together)


def trainable(
    loss: Loss, frozen: Params, factors: Params, scale: float, trained: Params | None = None
) -> tuple[Params, Loss]:
    """The counterpart of ``partial.trainable`` for factors, alone or with other leaves.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)`` of all parameters.
        frozen: all parameters, or those that ``partition`` left when it took ``trained``.
        factors: as ``init`` makes them.
        scale: what their product is multiplied by.
        trained: leaves that are trained beside the factors, such as a head, as ``partition``
            selected them.

    Returns:
        ``{"lora": factors, "rest": trained}`` and a loss of it.

    Example:
        >>> loss = lambda p, batch, key: ((batch @ p["w"]["a"] @ p["w"]["b"]).sum(), {})
        >>> tree, adapted = trainable(loss, {"w": jnp.zeros((3, 2))}, {"w": {
        ...     "a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}, scale=2.0)
        >>> float(adapted(tree, jnp.ones((1, 3)), None)[0])
        12.0
    """

    def adapted(tree: Params, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        whole = frozen if tree["rest"] is None else merge(tree["rest"], frozen)
        return loss(attach(whole, tree["lora"], scale), batch, key)

    return {"lora": factors, "rest": trained}, adapted


def is_pair(tree: Any) -> bool:
    """Whether a tree is the two factors of one layer."""
    return isinstance(tree, dict) and set(tree) == {"a", "b"}


def _changed(params: Any, factors: Any, change: Any, path: str = "") -> Any:
    if is_pair(factors):
        return change(params, factors, path)
    out = dict(params)
    for name, below in factors.items():
        here = f"{path}.{name}" if path else name
        if not isinstance(params, dict) or name not in params:
            raise ValueError(f"there are factors for {here!r}, which the model does not have")
        out[name] = _changed(params[name], below, change, here)
    return out
