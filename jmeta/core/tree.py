"""Partition a pytree by path globs and merge it again; everything else is ``optax.tree``.

A path joins dict keys, attribute names and indices with dots: ``blocks.mlp.up.kernel``.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core.types import PyTree


def path_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a key path.

    Args:
        path: a key path, as ``jax.tree_util.tree_flatten_with_path`` gives it.

    Returns:
        The names of its entries joined with dots; ``"."`` for the root.

    Example:
        >>> [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": [1, {"b": 2}]})]
        ['a.0', 'a.1.b']
    """
    return jax.tree_util.keystr(path, simple=True, separator=".") or "."


def names(tree: PyTree) -> list[str]:
    """The dotted names of a tree's leaves, in the order of ``jax.tree.leaves``.

    Args:
        tree: any pytree.

    Returns:
        One name for each leaf.

    Example:
        >>> names({"head": {"kernel": 0.0, "bias": 0.0}})
        ['head.bias', 'head.kernel']
    """
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@functools.lru_cache(maxsize=1024)
def _compiled(glob: str) -> re.Pattern[str]:
    # Every part carries the dot before it, so that ``**`` can stand for no part at all.
    parts = []
    for part in glob.split("."):
        if part == "**":
            parts.append(r"(\.[^.]+)*")
        else:
            parts.append(r"\." + re.escape(part).replace(r"\*", "[^.]*").replace(r"\?", "[^.]"))
    return re.compile("".join(parts))


def matches(name: str, glob: str) -> bool:
    """Whether a dotted name matches a path glob.

    ``*`` stands for any part of one name, ``?`` for one character of it, ``**`` for any number of
    whole names, none included.

    Args:
        name: a dotted path such as ``"blocks.mlp.up.kernel"``.
        glob: a pattern such as ``"blocks.*.up.**"``.

    Returns:
        True where the whole name matches.

    Example:
        >>> matches("blocks.mlp.up.kernel", "blocks.mlp.**"), matches("blocks.ln", "blocks.mlp.**")
        (True, False)
    """
    dotted = "" if name == "." and glob != "." else "." + name  # a bare leaf has no parts
    return _compiled(glob).fullmatch(dotted) is not None


def select(tree: PyTree, keep: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Split a tree in two by a predicate on the names of its leaves.

    Args:
        tree: any pytree.
        keep: a function of a dotted name.

    Returns:
        ``(kept, rest)``: two trees of the same containers, with ``None`` (an empty subtree to JAX)
        where the other one holds the leaf.

    Example:
        >>> select({"a": 1, "b": 2}, lambda name: name == "a")
        ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    mask = [keep(path_name(path)) for path, _ in leaves]
    kept = [leaf if m else None for m, (_, leaf) in zip(mask, leaves, strict=True)]
    rest = [None if m else leaf for m, (_, leaf) in zip(mask, leaves, strict=True)]
    return jax.tree.unflatten(structure, kept), jax.tree.unflatten(structure, rest)


def partition(tree: PyTree, *globs: str) -> tuple[PyTree, PyTree]:
    """Split a tree into the leaves that match a path glob and the rest.

    Args:
        tree: any pytree.
        *globs: path globs; a leaf is selected where any of them matches its dotted name.

    Returns:
        ``(selected, rest)``; ``merge`` puts them together again.

    Raises:
        ValueError: a glob matches no leaf; the message names the closest paths.

    Example:
        >>> params = {"body": {"w": 1.0}, "head": {"w": 2.0, "b": 3.0}}
        >>> head, body = partition(params, "head.**")
        >>> head
        {'body': {'w': None}, 'head': {'b': 3.0, 'w': 2.0}}
        >>> merge(head, body) == params
        True
    """
    every = names(tree)
    for glob in globs:
        if not any(matches(name, glob) for name in every):
            close = difflib.get_close_matches(glob, every, n=3, cutoff=0.0)
            raise ValueError(
                f"the path glob {glob!r} matches no leaf; the closest of the {len(every)} paths "
                f"are {', '.join(map(repr, close)) or 'none: the tree is empty'}"
            )
    return select(tree, lambda name: any(matches(name, glob) for glob in globs))


def merge(*trees: PyTree) -> PyTree:
    """Put together what ``partition`` took apart.

    Args:
        *trees: trees of the same containers; at each place at most one holds a leaf.

    Returns:
        The tree of all leaves.

    Raises:
        ValueError: two trees hold a leaf at the same place.

    Example:
        >>> merge({"a": 1, "b": None}, {"a": None, "b": 2})
        {'a': 1, 'b': 2}
    """

    def only(path: tuple[Any, ...], *leaves: Any) -> Any:
        present = [leaf for leaf in leaves if leaf is not None]
        if len(present) > 1:
            raise ValueError(f"{path_name(path)!r} is held by {len(present)} of the trees to merge")
        return present[0] if present else None

    return jax.tree_util.tree_map_with_path(only, *trees, is_leaf=lambda leaf: leaf is None)


def require_inexact(tree: PyTree, what: str = "meta") -> None:
    """Check that every leaf can be differentiated.

    Args:
        tree: a pytree of arrays.
        what: what the tree is, for the message.

    Raises:
        TypeError: a leaf is an integer, a boolean or a random key; the message names it and says
            what to do instead.

    Example:
        >>> require_inexact({"w": jnp.ones(2)})
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf) if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"the leaf {path_name(path)!r} of {what} has dtype {dtype}, which has no gradient; "
                f"keep it out of {what} (close over it in the loss, or split it off with "
                "jmeta.partition), or make it a float"
            )


def global_norm(tree: PyTree) -> jax.Array:
    r"""The Euclidean norm of all leaves together, summed in at least float32.

    .. math:: \sqrt{\sum_i \lVert x_i \rVert^2}

    Args:
        tree: a pytree of floating-point arrays, of one dtype or several.

    Returns:
        A scalar.

    Example:
        >>> float(global_norm({"a": jnp.asarray(3.0), "b": jnp.asarray([4.0], jnp.bfloat16)}))
        5.0
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtypes = [jnp.dtype(jnp.float32), *(leaf.dtype for leaf in leaves)]
    dtype = max(dtypes, key=lambda d: d.itemsize)
    squares = [jnp.sum(jnp.square(jnp.abs(leaf.astype(dtype)))) for leaf in leaves]
    return jnp.sqrt(sum(squares, jnp.zeros((), dtype)))


def at_least_float32(dtype: Any) -> Any:
    """The dtype of sums and statistics of an array: float32 for anything narrower, else its own.

    Args:
        dtype: a floating-point dtype.

    Returns:
        A floating-point dtype.

    Example:
        >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.dtype("float64"))
        (dtype('float32'), dtype('float64'))
    """
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")
