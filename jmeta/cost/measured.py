"""What a meta-gradient costs here: time, memory, FLOPs, compile time and error of each estimator.

``table`` measures a problem of your own; ``markdown`` prints it against first order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jmeta.core.estimators import first_order, mixed_mode, reptile, unrolled
from jmeta.core.inner import Objective, final
from jmeta.core.types import Array, Episode, Key, MetaGradient, Problem, PyTree
from jmeta.cost.compiled import Program, compile_program

Name = TypeVar("Name")


class Cost(NamedTuple):
    """The cost of one estimator on one problem.

    Attributes:
        name: the estimator.
        seconds: of one meta-gradient, the median over interleaved repeats.
        repeats: seconds of each repeat.
        temp_bytes: memory for temporaries, in bytes.
        flops: of matmuls and convolutions.
        compile_seconds: of tracing, lowering and compiling.
        error: largest difference to the float64 reference over its largest entry, or None.
    """

    name: str
    seconds: float
    repeats: tuple[float, ...]
    temp_bytes: int
    flops: float
    compile_seconds: float
    error: float | None


def estimators(
    problem: Problem, steps: int, objective: Objective = final
) -> dict[str, MetaGradient]:
    """The estimators that a cost table compares by default.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        objective: where the outer loss is read.

    Returns:
        ``{name: MetaGradient}``; ``table`` leaves Reptile out where the fast weights are not all
        of meta.

    Example:
        >>> from jmeta.testing import quadratic
        >>> list(estimators(quadratic().problem, 3))[:3]
        ['first_order', 'mixed_mode', 'mixed_mode nested']
    """
    chosen = {
        "first_order": first_order(problem, steps, objective=objective),
        "mixed_mode": mixed_mode(problem, steps, objective=objective),
        "mixed_mode nested": mixed_mode(problem, steps, objective=objective, remat="nested"),
        "unrolled": unrolled(problem, steps, objective=objective),
        "unrolled step": unrolled(problem, steps, objective=objective, remat="step"),
    }
    if objective is final:
        chosen["reptile"] = reptile(problem, steps)
    return chosen


def compile_estimate(mg: MetaGradient, meta: PyTree, episode: Episode, key: Key = None) -> Program:
    """Compile one estimate, without running it.

    Args:
        mg: the estimator.
        meta: arrays, or ``jax.ShapeDtypeStruct``.
        episode: likewise.
        key: a random key, or None.

    Returns:
        A ``Program``.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic(dim=8)
        >>> program = compile_estimate(first_order(q.problem, 3), q.meta, q.episode)
        >>> program.flops  # four gradients of 288 each
        1152.0
    """

    def grads(meta: PyTree, episode: Episode) -> PyTree:
        return mg.estimate(meta, mg.init(meta, key), episode, key)[0]

    return compile_program(grads, meta, episode)


def double(tree: PyTree) -> PyTree:
    """Every floating-point leaf in float64; call it with 64-bit types enabled.

    Args:
        tree: a pytree of arrays.

    Returns:
        The same, wider.

    Example:
        >>> with jax.enable_x64(True):
        ...     print(double({"w": jnp.ones(1, jnp.float32)})["w"].dtype)
        float64
    """

    def widen(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def exact_reference(
    problem: Problem,
    steps: int,
    meta: PyTree,
    episode: Episode,
    *,
    key: Key = None,
    objective: Objective = final,
) -> PyTree:
    """The exact meta-gradient in float64, by reverse mode over reverse mode.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        meta: the meta-parameters.
        episode: one episode.
        key: a random key, or None.
        objective: where the outer loss is read.

    Returns:
        A pytree of float64 NumPy arrays like ``meta``.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> exact_reference(q.problem, 2, q.meta, q.episode).dtype
        dtype('float64')
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        mg = unrolled(problem, steps, objective=objective, remat="step")
        wide_meta, wide_episode = double(meta), double(episode)
        run = jax.jit(lambda m, e: mg.estimate(m, mg.init(m, key), e, key)[0])
        return jax.tree.map(jax.device_get, run(wide_meta, wide_episode))


def table(
    problem: Problem,
    steps: int,
    meta: PyTree,
    episode: Episode,
    *,
    chosen: Mapping[str, MetaGradient] | None = None,
    repeats: int = 5,
    key: Key = None,
    reference: PyTree | None = None,
    objective: Objective = final,
) -> list[Cost]:
    """Measure estimators on a problem, interleaved so that a busy machine disturbs all alike.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        meta: the meta-parameters.
        episode: one episode, or batched ones with estimators from ``over_tasks``.
        chosen: ``{name: MetaGradient}``; default ``estimators(problem, steps)``, Reptile only
            where the fast weights have the structure of meta.
        repeats: timed runs of each; one more warms up. 0 compiles without running.
        key: a random key, or None.
        reference: the exact gradient (``exact_reference``), to report errors against.
        objective: where the outer loss is read.

    Returns:
        One ``Cost`` for each estimator, in order.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> costs = table(q.problem, 3, q.meta, q.episode, repeats=1)
        >>> costs[0].name
        'first_order'
    """
    if chosen is None:
        chosen = estimators(problem, steps, objective)
        fast = jax.eval_shape(lambda m: problem.init(m, key), meta)
        if jax.tree.structure(fast) != jax.tree.structure(meta):  # Reptile would be undefined
            chosen.pop("reptile", None)
    programs = {name: compile_estimate(mg, meta, episode, key) for name, mg in chosen.items()}
    arguments = dict.fromkeys(chosen, (meta, episode))
    seconds, errors = interleave(programs, arguments, repeats, reference)
    return [
        Cost(
            name,
            median(seconds[name]),
            tuple(seconds[name]),
            program.temp_bytes,
            program.flops,
            program.trace_seconds + program.compile_seconds,
            errors[name],
        )
        for name, program in programs.items()
    ]


def turn(names: Sequence[Name], number: int) -> list[Name]:
    r"""The order of one turn, so that none always runs in the caches that the same other leaves.

    Zigzags :math:`0, 1, -1, 2, -2, \dots` modulo ``n``, shifted from turn to turn: in ``n`` turns
    (twice as many where ``n`` is odd, each zigzag then followed by its reverse) everyone comes
    directly after every other equally often.

    Args:
        names: of what runs.
        number: of the turn, from zero.

    Returns:
        The names, in the order of this turn.

    Source: Williams, "Experimental designs balanced for the estimation of residual effects of
    treatments" (1949).

    Example:
        >>> turn("ab", 0), turn("ab", 1)
        (['a', 'b'], ['b', 'a'])
        >>> ["".join(turn("abcd", number)) for number in range(4)]
        ['abdc', 'bcad', 'cdba', 'dacb']
    """
    count = len(names)
    odd = count % 2
    shift = number // 2 if odd else number
    zigzag = [-(i // 2) if i % 2 == 0 else i // 2 + 1 for i in range(count)]
    order = [names[(place + shift) % count] for place in zigzag]
    return order[::-1] if odd and number % 2 else order


def interleave(
    programs: Mapping[str, Program],
    arguments: Mapping[str, tuple[PyTree, ...]],
    repeats: int,
    reference: PyTree | None = None,
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Run compiled programs in turns, so that a busy machine disturbs all alike.

    The orders are those of ``turn``.

    Args:
        programs: ``{name: Program}``.
        arguments: ``{name: (meta, episode)}``, or what else a program was compiled for.
        repeats: timed runs of each, after one that warms up; 0 runs nothing.
        reference: the exact gradient, or None.

    Returns:
        ``({name: seconds of each run}, {name: error or None})``.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> program = compile_estimate(first_order(q.problem, 3), q.meta, q.episode)
        >>> seconds, _ = interleave({"a": program}, {"a": (q.meta, q.episode)}, repeats=2)
        >>> len(seconds["a"])
        2
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    errors: dict[str, float | None] = dict.fromkeys(programs)
    for repeat in range(repeats + 1 if repeats else 0):
        for name in turn(list(programs), repeat):
            begin = time.perf_counter()
            grads = jax.block_until_ready(programs[name].run(*arguments[name]))
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
            elif reference is not None:
                errors[name] = gradient_error(grads, reference)
    return seconds, errors


def gradient_error(grads: PyTree, reference: PyTree) -> float:
    """The largest difference of two gradients over the largest entry of the second, in float64.

    Args:
        grads: a pytree of arrays.
        reference: a pytree of the same structure.

    Returns:
        A float.

    Example:
        >>> gradient_error(jnp.asarray([1.0, 2.5]), jnp.asarray([1.0, 2.0]))
        0.25
    """
    import numpy as np

    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(reference), strict=True))
    wide = [(np.asarray(g, np.float64), np.asarray(r, np.float64)) for g, r in pairs]
    gap = max(float(np.max(np.abs(g - r))) for g, r in wide)
    return gap / max(max(float(np.max(np.abs(r))) for _, r in wide), 1e-300)


def median(values: Sequence[float]) -> float:
    """The median, NaN for none.

    Args:
        values: numbers.

    Returns:
        Their median.

    Example:
        >>> median([3.0, 1.0, 2.0])
        2.0
    """
    import statistics

    return statistics.median(values) if values else float("nan")


def markdown(costs: Sequence[Cost], reference: str = "first_order") -> str:
    """A cost table in Markdown, with ratios to a reference estimator.

    Args:
        costs: as ``table`` gives them.
        reference: the name of the estimator that ratios refer to.

    Returns:
        Lines of text.

    Raises:
        ValueError: no cost has the reference's name.

    Example:
        >>> cost = Cost("first_order", 0.5, (0.5,), 2**20, 2e9, 1.0, 1e-7)
        >>> print(markdown([cost]))
        | estimator | seconds | x | temp MiB | x | GFLOP | compile s | error | n |
        | --- | --: | --: | --: | --: | --: | --: | --: | --: |
        | first_order | 0.500 | 1.00 | 1.0 | 1.00 | 2.00 | 1.0 | 1e-07 | 1 |
    """
    base = next((cost for cost in costs if cost.name == reference), None)
    if base is None:
        known = ", ".join(cost.name for cost in costs)
        raise ValueError(f"the reference {reference!r} is not among the estimators: {known}")
    lines = [
        "| estimator | seconds | x | temp MiB | x | GFLOP | compile s | error | n |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for cost in costs:
        error = "" if cost.error is None else f"{cost.error:.0e}"
        lines.append(
            f"| {cost.name} | {cost.seconds:.3f} | {cost.seconds / base.seconds:.2f} "
            f"| {cost.temp_bytes / 2**20:.1f} | {cost.temp_bytes / max(base.temp_bytes, 1):.2f} "
            f"| {cost.flops / 1e9:.2f} | {cost.compile_seconds:.1f} | {error} "
            f"| {len(cost.repeats)} |"
        )
    return "\n".join(lines)


def fast_bytes(problem: Problem, meta: PyTree, key: Key = None) -> int:
    """The size of a problem's fast weights: what every stored inner step costs at least.

    Args:
        problem: whose ``init`` is asked for shapes.
        meta: the meta-parameters.
        key: a random key, or None.

    Returns:
        Bytes.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic(dim=8)
        >>> fast_bytes(q.problem, q.meta)
        32
    """
    shapes: list[Array] = jax.tree.leaves(jax.eval_shape(lambda m: problem.init(m, key), meta))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
