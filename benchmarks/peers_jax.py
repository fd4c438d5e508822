"""Meta-gradients of ``benchmarks.peers`` in JAX: by jmeta, and as one writes them by hand.

``build`` gives a compiled function without arguments that returns the meta-gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from benchmarks.peers_problems import Given
from jmeta.core.types import Array, Episode, MetaGradient, PyTree
from jmeta.methods.maml import learned_start
from jmeta.models import conv, losses, mlp, transformer

Loss = Callable[[PyTree, Any], Array]

FIRST_ORDER = "jmeta, first order"  # for reference: all other rows are exact
FAST, LEAN = "jmeta, fast", "jmeta, lean"  # mixed mode that keeps products, that keeps little
WRITTEN_OUT = "jmeta, unrolled, written out"  # without a scan, as by hand
JMETA = (FIRST_ORDER, "jmeta, mixed_mode", "jmeta, unrolled", WRITTEN_OUT, FAST, LEAN)
PLAIN = LOOP, SCAN = "JAX, grad of a loop", "JAX, grad of a scan"
BY_HAND = (*PLAIN, "optax's recipe")
ROWS = (*JMETA, *BY_HAND)


def build(made: Given, row: str, dtype: str) -> Callable[[], dict[str, np.ndarray]]:
    """Compile one row.

    Args:
        made: the problem.
        row: one of ``ROWS``.
        dtype: ``float32`` or ``float64`` (with 64-bit types enabled).

    Returns:
        A function that runs one meta-gradient to its end; it has ``.temp_bytes``.
    """
    params = nested({name: jnp.asarray(a, dtype) for name, a in made.params.items()})
    support, query = (
        {name: jnp.asarray(a, dtype if a.dtype.kind == "f" else None) for name, a in part.items()}
        for part in (made.support, made.query)
    )
    alone = made.tasks == 1  # nobody maps over one task
    if alone:
        support, query = (jax.tree.map(lambda x: x[0], part) for part in (support, query))
    loss = loss_of(made, row == LEAN)
    make = _by_jmeta if row in JMETA else _by_hand
    grads = make(made, row, loss, alone)
    program = jax.jit(grads).lower(params, support, query).compile()
    memory = program.memory_analysis()

    def run() -> PyTree:
        return jax.block_until_ready(program(params, support, query))

    run.temp_bytes = None if memory is None else memory.temp_size_in_bytes  # pyright: ignore
    return run


def loss_of(made: Given, lean: bool) -> Loss:
    """The loss of a batch; ``lean`` recomputes the decoder's blocks, layer by layer."""
    if made.kind == "sinusoid":
        return lambda p, batch: losses.squared_error(mlp.apply(p, batch["x"]), batch["y"])
    if made.kind == "omniglot":
        return lambda p, batch: losses.cross_entropy(conv.apply(p, batch["x"]), batch["y"])
    vocab, width = made.params["embed/tokens"].shape
    config = transformer.TransformerConfig(
        vocab=vocab,
        width=width,
        layers=len(made.params["blocks/attn/qkv"]),
        heads=made.heads,
        max_len=len(made.params["embed/positions"]),
        loop="scan" if lean else "unroll",
        remat="dots" if lean else "none",
    )
    return lambda p, batch: transformer.next_token_loss(config, p, batch["x"])[0]


def _by_jmeta(made: Given, row: str, loss: Loss, alone: bool) -> Callable[..., PyTree]:
    problem = learned_start(
        lambda params, batch, key: (loss(params, batch), {}), optax.sgd(made.rate)
    )
    mg: MetaGradient = {
        FIRST_ORDER: lambda: jmeta.first_order(problem, made.steps),
        "jmeta, mixed_mode": lambda: jmeta.mixed_mode(problem, made.steps, remat="step"),
        "jmeta, unrolled": lambda: jmeta.unrolled(problem, made.steps),
        WRITTEN_OUT: lambda: jmeta.unrolled(problem, made.steps, loop="unroll"),
        FAST: lambda: jmeta.mixed_mode(problem, made.steps, keep=jmeta.keep_products()),
        LEAN: lambda: jmeta.mixed_mode(problem, made.steps, remat="step"),
    }[row]()
    if not alone:
        mg = jmeta.over_tasks(mg, microbatch=1 if row == LEAN else None)
    return lambda params, support, query: mg.estimate(params, (), Episode(support, query), None)[0]


def trained(
    row: str, loss: Loss, rate: float, params: PyTree, support: PyTree, steps: int, *,
    each: bool = False,
) -> PyTree:  # fmt: skip
    """Parameters after some steps of SGD, in plain JAX.

    Args:
        row: of ``PLAIN``: a Python loop, or a scan.
        loss: ``(params, batch) -> loss``.
        rate: of every step.
        params: where it starts.
        support: one batch, or with ``each`` one for every step, along a leading axis.
        steps: how many.
        each: whether every step has a batch of its own.

    Returns:
        Parameters.
    """

    def descend(params: PyTree, batch: PyTree) -> PyTree:
        grads = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads)

    if row == SCAN:
        step = lambda p, batch: (descend(p, batch if each else support), None)  # noqa: E731
        return jax.lax.scan(step, params, support if each else None, length=steps)[0]
    for i in range(steps):
        batch = jax.tree.map(lambda x, i=i: x[i], support) if each else support
        params = descend(params, batch)
    return params


def _by_hand(made: Given, row: str, loss: Loss, alone: bool) -> Callable[..., PyTree]:
    """As one writes it without a library: ``jax.grad`` of a function that trains."""

    def outer(params: PyTree, support: PyTree, query: PyTree) -> Array:
        if row in PLAIN:
            params = trained(row, loss, made.rate, params, support, made.steps)
        else:  # optax's example of meta-learning: its update inside what is differentiated
            optimizer = optax.sgd(made.rate)
            state = optimizer.init(params)
            for _ in range(made.steps):
                updates, state = optimizer.update(jax.grad(loss)(params, support), state, params)
                params = optax.apply_updates(params, updates)
        return loss(params, query)

    def mean(params: PyTree, support: PyTree, query: PyTree) -> Array:
        if alone:
            return outer(params, support, query)
        return jax.vmap(outer, in_axes=(None, 0, 0))(params, support, query).mean()

    return jax.grad(mean)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a/b": x}`` as ``{"a": {"b": x}}``."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf
    return tree


def flat(tree: PyTree) -> dict[str, np.ndarray]:
    """A gradient by flat names, as NumPy."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in leaves}
