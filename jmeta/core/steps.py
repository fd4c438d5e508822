"""Scans over inner steps, with a choice of what their backward pass computes again.

From nothing (the memory of every activation) to nearly all (that of a few weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jmeta.core.trajectory import scan_from_carries
from jmeta.core.tree import names
from jmeta.core.types import PyTree

Remat: TypeAlias = Literal["none", "step", "nested", "rounded", "offload"]
Loop: TypeAlias = Literal["scan", "unroll"]


def scan_steps(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    length: int,
    remat: Remat = "none",
    weights: Callable[[PyTree], PyTree] | None = None,
    loop: Loop = "scan",
) -> tuple[PyTree, PyTree]:
    r"""``jax.lax.scan`` over inner steps, with a choice of what the backward pass recomputes.

    ``"none"`` stores every step's residuals; ``"step"`` stores the carries between steps and
    recomputes each step; ``"nested"`` stores the carry of every block of about :math:`\sqrt{T}`
    steps and recomputes those within a block at a time, so that memory grows as
    :math:`O(\sqrt T)` for less than one more forward pass. ``"rounded"`` is ``"step"`` with the
    weights among the carries kept as differences from the first ones, in half their precision:
    half the memory, and a derivative at weights that are off by :math:`2^{-11}` of their way.
    ``"offload"`` is ``"step"`` with the carries in the memory of the host, from where each comes
    back for its own step: exact, for a device that has a host beside it. On a CPU, where there is
    one memory, it is ``"step"`` with one more carry.

    Args:
        step: ``(carry, x) -> (carry, y)``.
        carry: the initial carry.
        xs: a pytree of arrays ``[length, ...]``.
        length: number of steps, at least one.
        remat: which of the five.
        weights: ``carry -> subtree``, what ``"rounded"`` rounds; None: nothing.
        loop: ``"scan"``, or ``"unroll"``: a program of its own for every step, which stacks and
            slices nothing and takes as many times as long to compile. With ``remat="none"`` alone:
            a compiler merges what is computed twice in one straight program.

    Returns:
        The last carry and the stacked outputs ``[length, ...]``.

    Raises:
        ValueError: an unknown ``remat`` or ``loop``, or ``"unroll"`` with a ``remat``.
        TypeError: the carry that a step returns differs from the one that it took.

    Example:
        >>> add = lambda carry, x: (carry + x, carry)
        >>> carry, ys = scan_steps(add, 0.0, jnp.arange(4.0), 4, "nested")
        >>> float(carry), ys.tolist()
        (6.0, [0.0, 0.0, 1.0, 3.0])
    """
    require_loop(loop, remat)
    # Outside a loop, what nobody reads of the only step's cotangents is not computed: those of a
    # student that lives on, for one.
    if remat == "none" and (length == 1 or loop == "unroll"):
        return _unrolled(step, carry, xs, length)
    if remat == "none":
        return jax.lax.scan(step, carry, xs, length=length)
    if remat == "rounded":
        return scan_from_carries(step, carry, xs, length, halved=weights)
    if remat == "offload":
        return scan_from_carries(step, carry, xs, length, offload=True)
    if remat == "step" or length < 4:
        return scan_from_carries(step, carry, xs, length)
    size = block_length(length)
    # Backwards the last steps come first, so that theirs are the carries to keep at once.
    count = (length - 1) // size
    whole = count * size

    def block(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return scan_from_carries(step, carry, xs, size, rerun=True)

    blocks = jax.tree.map(lambda x: x[:whole].reshape(count, size, *x.shape[1:]), xs)
    carry, ys = scan_from_carries(block, carry, blocks, count)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    carry, last = scan_from_carries(
        step, carry, jax.tree.map(lambda x: x[whole:], xs), length - whole
    )
    return carry, jax.tree.map(lambda y, end: jnp.concatenate([y, end]), ys, last)


def require_loop(loop: Loop, remat: Remat) -> None:
    """Refuse a way to run a loop that there is not.

    Raises:
        ValueError: an unknown ``remat`` or ``loop``, or ``"unroll"`` with a ``remat``.

    Example:
        >>> require_loop("unroll", "none"), require_loop("scan", "nested")
        (None, None)
    """
    if remat not in get_args(Remat):
        raise ValueError(f"remat is {remat!r}; choose one of {', '.join(get_args(Remat))}")
    if loop not in get_args(Loop):
        raise ValueError(f"loop is {loop!r}; choose one of {', '.join(get_args(Loop))}")
    if loop == "unroll" and remat != "none":
        raise ValueError(
            f'loop="unroll" keeps every step apart, and what remat={remat!r} computes again a '
            'compiler would merge with what was there: choose remat="none" or loop="scan"'
        )


def _unrolled(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], carry: PyTree, xs: PyTree, length: int
) -> tuple[PyTree, PyTree]:
    """One step after the other."""
    if found := {jnp.shape(x)[:1] for x in jax.tree.leaves(xs)} - {(length,)}:
        raise ValueError(f"{length} steps need inputs [{length}, ...]; found leading axes {found}")
    # As a function of its own, as a scan's body is, a step takes numpy's arrays too.
    step, ys = jax.jit(step), []
    for i in range(length):
        last, y = step(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        _require_same_types(carry, last)
        carry = last
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def _require_same_types(before: PyTree, after: PyTree) -> None:
    """Refuse a carry that a second step could not take, as a scan does."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise TypeError(
            f"a step takes the carry {jax.tree.structure(before)} and returns "
            f"{jax.tree.structure(after)}: they must have the same structure"
        )
    for name, *leaves in zip(
        names(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
        old, new = map(jax.typeof, leaves)
        # A weak type is that of a Python number, which becomes what the step makes of it.
        weak = getattr(old, "weak_type", False)
        if old.shape != new.shape or (old.dtype != new.dtype and not weak):
            raise TypeError(
                f"a step takes the leaf {name!r} of the carry as {old.str_short()} and returns it "
                f"as {new.str_short()}: they must be the same"
            )


def block_length(length: int) -> int:
    r"""The number of steps in one block of a nested scan.

    Args:
        length: number of steps in all.

    Returns:
        The divisor nearest to :math:`\sqrt{T}`, or :math:`\lfloor\sqrt T\rfloor` where every
        divisor is further from it than a factor of two.

    Example:
        >>> block_length(64), block_length(12), block_length(13)
        (8, 3, 3)
    """
    root = math.sqrt(length)
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    best = min(divisors, key=lambda d: abs(d - root))
    return best if root / 2 <= best <= root * 2 else math.isqrt(length)
