"""Train a part of a model: heads, the last blocks, norms, biases, or whatever path globs pick.

What is frozen stays out of the tree that is differentiated, so it costs no gradient memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jmeta.core.tree import merge, partition
from jmeta.core.types import Array, Key, PyTree

Params = dict[str, Any]
Loss: TypeAlias = Callable[[PyTree, PyTree, Key], tuple[Array, PyTree]]

HEAD = ("head.**",)
TOP = ("top.**",)
NORMS = ("**.ln*.scale", "**.ln*.bias")
BIASES = ("**.bias",)


def split_top(params: Params, last: int = 1) -> Params:
    """Move the last blocks into a stack of their own, which can be trained by itself.

    The models run ``blocks`` and then ``top``; where only ``top`` is differentiated, no derivative
    goes through ``blocks``, scanned or not.

    Args:
        params: of a model whose blocks are stacked on a leading axis.
        last: how many blocks to move; at least one stays.

    Returns:
        The same parameters, with the last blocks under ``"top"``.

    Raises:
        ValueError: there are not that many blocks.

    Example:
        >>> params = split_top({"blocks": {"w": jnp.zeros((4, 2))}}, last=1)
        >>> params["blocks"]["w"].shape, params["top"]["w"].shape
        ((3, 2), (1, 2))
    """
    if "top" in params:
        raise ValueError("the top blocks stand apart already; join_top first")
    layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    if not 0 < last < layers:
        raise ValueError(f"last={last} of {layers} blocks; at least one moves and one stays")
    below = jax.tree.map(lambda leaf: leaf[: layers - last], params["blocks"])
    return {
        **params,
        "blocks": below,
        "top": jax.tree.map(lambda leaf: leaf[-last:], params["blocks"]),
    }


def join_top(params: Params) -> Params:
    """The inverse of ``split_top``, for writing a checkpoint.

    Args:
        params: what ``split_top`` returned, trained or not.

    Returns:
        All blocks in one stack.

    Example:
        >>> apart = {"blocks": {"w": jnp.zeros((3, 2))}, "top": {"w": jnp.ones((1, 2))}}
        >>> join_top(apart)["blocks"]["w"].sum(1).tolist()
        [0.0, 0.0, 0.0, 2.0]
    """
    rest = {name: value for name, value in params.items() if name != "top"}
    if "top" not in params:
        return rest
    joined = jax.tree.map(lambda *each: jnp.concatenate(each), params["blocks"], params["top"])
    return {**rest, "blocks": joined}


def trainable(loss: Loss, params: Params, *globs: str) -> tuple[Params, Loss]:
    """Split a model in what is trained and what is frozen.

    The result goes wherever a loss of all parameters does: ``learned_start(adapted, optimizer)``
    makes the trained part the meta-parameters and the fast weights of a ``Problem``, and
    ``learned_body(adapted, optimizer, adapt="head.**")`` lets only a part of it adapt.

    Args:
        loss: ``(params, batch, key) -> (loss, aux)`` of all parameters.
        params: all parameters.
        *globs: path globs of the leaves that are trained, such as ``*NORMS, *HEAD``.

    Returns:
        The leaves that are trained (None for the others), and a loss of those alone.

    Raises:
        ValueError: there is no glob, or one matches no leaf; the message names the closest paths.

    Example:
        >>> loss = lambda p, batch, key: (p["head"]["w"] * p["body"]["w"] * batch, {})
        >>> trained, adapted = trainable(loss, {"body": {"w": 2.0}, "head": {"w": 3.0}}, *HEAD)
        >>> trained
        {'body': {'w': None}, 'head': {'w': 3.0}}
        >>> float(jax.grad(lambda t: adapted(t, 5.0, None)[0])(trained)["head"]["w"])
        10.0
    """
    if not globs:
        raise ValueError("nothing is trained: name leaves by path globs, such as *NORMS, *HEAD")
    trained, frozen = partition(params, *globs)

    def adapted(trained: Params, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return loss(merge(trained, frozen), batch, key)

    return trained, adapted


def put(tree: Params, path: str, value: Any) -> None:
    """Set a place in nested dicts by its dotted path; missing dicts are made."""
    *parents, last = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value
