"""A scan whose backward pass keeps the carries between its steps, and nothing else of them.

The first carry is the caller's own, as a rule the meta-parameters: it is not kept a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jmeta.core.tracing import dense, is_primal, variables_read
from jmeta.core.types import Array, PyTree

_Leaves = dict[int, Any]  # by position among the constants, the carry and the xs of one step


class _Packing(NamedTuple):
    """How a leaf of a carry is kept: ``pack(leaf, first)``, and ``unpack(packed, first)``."""

    pack: Callable[[Array, Array], Array]
    unpack: Callable[[Array, Array], Array]


# A float and the one of half its width; kept as its bits, or else a CPU would widen it again.
_HALF = {"float32": (jnp.float16, jnp.uint16), "float64": (jnp.float32, jnp.uint32)}


def _pack_difference(leaf: Array, first: Array) -> Array:
    if leaf.dtype.name not in _HALF:
        return leaf
    half, bits = _HALF[leaf.dtype.name]
    return jax.lax.bitcast_convert_type((leaf - first).astype(half), bits)


def _unpack_difference(packed: Array, first: Array) -> Array:
    if first.dtype.name not in _HALF:
        return packed
    half, _ = _HALF[first.dtype.name]
    return first + jax.lax.bitcast_convert_type(packed, half).astype(first.dtype)


_WHOLE = _Packing(lambda leaf, first: leaf, lambda packed, first: packed)
_DIFFERENCE = _Packing(_pack_difference, _unpack_difference)


def scan_from_carries(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    length: int,
    *,
    rerun: bool = False,
    halved: Callable[[PyTree], PyTree] | None = None,
    offload: bool = False,
) -> tuple[PyTree, PyTree]:
    r"""``jax.lax.scan`` that keeps :math:`T - 1` carries and reruns each step from its own.

    .. math::
        \bar c_t, \bar x_t, \bar k \mathrel{+}=
            \left(\frac{\partial (c_{t+1}, y_t)}{\partial (c_t, x_t, k)}\right)^{\!\top}
            (\bar c_{t+1}, \bar y_t), \qquad t = T-1, \dots, 0

    with the carries :math:`c_1, \dots, c_{T-1}` of the forward pass and :math:`k` all that the
    step closes over. ``jax.checkpoint`` on the step of a ``jax.lax.scan`` keeps :math:`T` carries,
    the first of them a copy of what the caller has.

    Args:
        step: ``(carry, x) -> (carry, y)``; it may close over traced values.
        carry: the initial carry.
        xs: a pytree of arrays ``[length, ...]``, or None.
        length: number of steps, at least one.
        rerun: whether a backward pass runs this scan again, as the step of another one. Nobody
            then reads what its last step returns, which is kept out of the loop and so dropped.
        halved: ``carry -> subtree`` of the leaves of which only the differences to the first carry
            are kept, in half their precision; None: none. Meant for weights: what begins at zero,
            as moments do, is all difference.
        offload: keep all T carries in the memory of the host, whole; neither ``rerun`` nor
            ``halved`` then. Each comes back for its step alone; what is no array of floats stays.

    Returns:
        The last carry and the stacked outputs ``[length, ...]``, to be differentiated in reverse
        mode.

    Example:
        >>> grow = lambda carry, x: (carry * x, carry)
        >>> xs = jnp.asarray([2.0, 3.0, 5.0])
        >>> last = lambda carry: scan_from_carries(grow, carry, xs, 3)[0]
        >>> float(last(7.0)), float(jax.grad(last)(7.0))
        (210.0, 30.0)
    """
    carry = jax.tree.map(jnp.asarray, carry)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(carry, first)
    carried, sliced = jax.tree.leaves(carry), jax.tree.leaves(xs)
    start = len(closed.consts)
    end = start + len(carried)

    def flat_step(leaves: _Leaves) -> tuple[list[Array], list[Array]]:
        arguments = [leaves[p] for p in range(start, end + len(sliced))]
        consts = [leaves[p] for p in range(start)]
        outs = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, consts))(*arguments)
        return outs[: end - start], outs[end - start :]

    inputs = dict(enumerate([*closed.consts, *carried, *sliced]))
    moving = {p: leaf for p, leaf in inputs.items() if _is_inexact(leaf)}
    static = {p: leaf for p, leaf in inputs.items() if p not in moving}
    numbers = jax.tree.unflatten(jax.tree.structure(carry), list(range(len(carried))))
    chosen = set() if halved is None else set(jax.tree.leaves(halved(numbers)))
    pack = [_DIFFERENCE if i in chosen else _WHOLE for i in range(len(carried))]
    last, ys = _scan(flat_step, range(start, end), length, rerun, offload, pack, moving, static)
    _, y_shapes = shapes
    return (
        jax.tree.unflatten(jax.tree.structure(carry), last),
        jax.tree.unflatten(jax.tree.structure(y_shapes), ys),
    )


def _scan(
    step: Callable[[_Leaves], tuple[list[Array], list[Array]]],
    carried: range,
    length: int,
    rerun: bool,
    offload: bool,
    packings: Sequence[_Packing],
    moving: _Leaves,
    static: _Leaves,
) -> tuple[list[Array], list[Array]]:
    """The scan over flat leaves, with its rule."""

    def at(leaves: _Leaves, sliced: _Leaves, carry: Sequence[Array]) -> _Leaves:
        """One step's inputs."""
        return leaves | sliced | dict(zip(carried, carry, strict=True))

    def split(leaves: _Leaves) -> tuple[_Leaves, _Leaves]:
        """What all steps share, and what each has its slice of."""
        shared = {p: leaf for p, leaf in leaves.items() if p < carried.stop}
        return shared, {p: leaf for p, leaf in leaves.items() if p >= carried.stop}

    @jax.custom_vjp
    def scan(moving: _Leaves, static: _Leaves):
        shared, xs = split(moving | static)
        start = [shared[p] for p in carried]
        body = lambda carry, x: step(at(shared, x, carry))  # noqa: E731
        return jax.lax.scan(body, start, xs, length=length)

    def forward(moving: _Leaves, static: _Leaves):
        perturbed = {p: leaf.value for p, leaf in moving.items() if leaf.perturbed}
        constant = {p: leaf.value for p, leaf in moving.items() if not leaf.perturbed}
        constant |= jax.tree.map(lambda leaf: leaf.value, static, is_leaf=is_primal)
        shared, xs = split(perturbed | constant)
        start = [shared[p] for p in carried]
        if rerun:

            def one(carry, x):
                carry, ys = step(at(shared, x, carry))
                return carry, (carry, ys)

            early, late = (jax.tree.map(lambda x, s=s: x[s], xs) for s in (slice(-1), -1))
            carry, (kept, ys) = jax.lax.scan(one, start, early, length=length - 1)
            last, y = step(at(shared, late, carry))
            ys = jax.tree.map(lambda ys, y: jnp.concatenate([ys, y[None]]), ys, y)
            return (last, ys), (perturbed, constant, kept)
        if offload:

            def sent(carry, x):
                after, ys = step(at(shared, x, carry))
                return after, (_moved(carry, to_host=True), ys)

            last, (kept, ys) = jax.lax.scan(sent, start, xs, length=length)
            return (last, ys), (perturbed, constant, kept)
        room = max(length - 1, 1)
        # Zeros made from the leaf vary over the devices of a shard_map as it does.
        zeros = [p.pack(*2 * [jnp.zeros_like(f)]) for p, f in zip(packings, start, strict=True)]
        kept = [jnp.broadcast_to(zero, (room, *zero.shape)) for zero in zeros]

        def body(state, x):
            carry, kept = state
            index, x = x
            # Step 0 writes where step 1 will: its carry is the caller's.
            packed = [p.pack(*each) for p, *each in zip(packings, carry, start, strict=True)]
            kept = [_put(k, leaf, index) for k, leaf in zip(kept, packed, strict=True)]
            carry, ys = step(at(shared, x, carry))
            return (carry, kept), ys

        (last, kept), ys = jax.lax.scan(body, (start, kept), (jnp.arange(length), xs))
        return (last, ys), (perturbed, constant, kept)

    def backward(residuals, cotangents):
        perturbed, constant, kept = residuals
        last_bar, ys_bar = cotangents
        shared, xs = split(perturbed | constant)
        start = [shared[p] for p in carried]
        differentiable = [p for p, leaf in zip(carried, start, strict=True) if _is_inexact(leaf)]
        scored = [i for i, bar in enumerate(ys_bar) if not isinstance(bar, SymbolicZero)]
        wanted = [p for p in perturbed if p not in carried]

        def pull(carry: Sequence[Array], x: _Leaves, carry_bar: list[Array], y_bar: list[Array]):
            """Cotangents of one step's carry, and of the other inputs that want one."""
            inputs = at(shared, x, carry)

            def outputs(leaves: _Leaves) -> tuple[list[Array], list[Array]]:
                carry, ys = step(inputs | leaves)
                moved = [carry[p - carried.start] for p in differentiable]
                return moved, [ys[i] for i in scored]

            chosen = {p: inputs[p] for p in (*differentiable, *wanted)}
            bars = jax.vjp(outputs, chosen)[1]((carry_bar, y_bar))[0]
            return [bars[p] for p in differentiable], {p: bars[p] for p in wanted}

        carry_bar = [dense(last_bar[p - carried.start], shared[p]) for p in differentiable]
        each = [ys_bar[i] for i in scored]
        slices = jax.tree.map(lambda leaf: leaf[0], (xs, each))
        # What a step reads without a derivative gets no accumulator, not even one of zeros.
        reached = _reached(pull, start, slices[0], carry_bar, slices[1])
        totals = {p: jnp.zeros_like(shared[p]) for p in reached if p < carried.start}

        def before(index: Array) -> list[Array]:
            """The carry that a step took: of the first step, the caller's."""
            return [
                jnp.where(index == 0, first, p.unpack(_get(k, index), first))
                for p, k, first in zip(packings, kept, start, strict=True)
            ]

        def body(state, slices):
            carry_bar, totals = state
            index, x, y_bar, own = slices
            carry = _moved(own, to_host=False) if offload else before(index)
            carry_bar, bars = pull(carry, x, carry_bar, y_bar)
            totals = {p: totals[p] + bars[p] for p in totals}
            return (carry_bar, totals), {p: bars[p] for p in reached if p not in totals}

        steps = (jnp.arange(length), xs, each, kept if offload else [])
        (carry_bar, totals), xs_bar = jax.lax.scan(body, (carry_bar, totals), steps, reverse=True)
        bars = dict(zip(differentiable, carry_bar, strict=True)) | totals | xs_bar
        moving_bar = {p: bars.get(p) for p in moving if p in perturbed}
        return moving_bar | {p: None for p in moving if p not in perturbed}, None

    scan.defvjp(forward, backward, symbolic_zeros=True)
    return scan(moving, static)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _moved(carry: Sequence[Array], *, to_host: bool) -> list[Array]:
    """The arrays of floats of a carry in the other memory; numbers and keys stay where they are."""
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    # With src, whose absence would leave the cotangent where it is.
    target, src = (host, device) if to_host else (device, host)
    return [
        jax.device_put(leaf, target, src=src) if leaf.ndim and _is_inexact(leaf) else leaf
        for leaf in carry
    ]


def _put(kept: Array, leaf: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(kept, leaf, jnp.maximum(index - 1, 0), 0)


def _get(kept: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(kept, jnp.maximum(index - 1, 0), 0, keepdims=False)


def _reached(pull: Callable, *arguments: Any) -> list[int]:
    """The inputs whose cotangent depends on the cotangents that come in."""
    traced, shapes = jax.make_jaxpr(pull, return_shape=True)(*arguments)
    cotangents = set(traced.jaxpr.invars[-len(jax.tree.leaves(arguments[2:])) :])
    _, bars = shapes
    outs = traced.jaxpr.outvars[-len(bars) :] if bars else []
    return [
        p
        for p, out in zip(bars, outs, strict=True)
        if cotangents & variables_read(traced.jaxpr, [out])
    ]
