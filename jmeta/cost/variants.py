"""The exact estimators that ``jmeta.auto`` chooses among, and how one of them is compiled and read.

They give the same gradient: they differ in what is stored, what is recomputed, and how many tasks
are mapped together.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jmeta.core.checks import NotDifferentiableError
from jmeta.core.estimators import mixed_mode, unrolled
from jmeta.core.inner import Objective, final
from jmeta.core.kept import keep_products
from jmeta.core.over_tasks import over_tasks
from jmeta.core.steps import Remat
from jmeta.core.types import MetaGradient, Problem
from jmeta.cost import topology as machines
from jmeta.cost.compiled import flops

WITH_REMAT = {"mixed_mode": mixed_mode, "unrolled": unrolled}
# These keep what a remat would compute again.
KEEPING = {"mixed_mode, products kept": functools.partial(mixed_mode, keep=keep_products())}
WRITTEN_OUT = {
    f"{name}, written out": functools.partial(make, loop="unroll")
    for name, make in WITH_REMAT.items()
}
ESTIMATORS = WITH_REMAT | KEEPING | WRITTEN_OUT
REVERSE = ("unrolled", "unrolled, written out")  # the others differentiate a gradient forwards
MOST_STEPS = 8  # that are written out: compilation takes as many times as long
MICROBATCHES = 4  # how many sizes of a microbatch are tried at most


class Variant(NamedTuple):
    """One way to compute the exact meta-gradient; everything in it is a word or a number.

    Attributes:
        estimator: a name in ``ESTIMATORS``.
        remat: what the backward pass recomputes: ``none``, ``step`` or ``nested``.
        microbatch: how many tasks are mapped together; None where there is one episode.
    """

    estimator: str
    remat: Remat
    microbatch: int | None = None


class Trial(NamedTuple):
    """What one variant costs on one problem.

    Attributes:
        variant: what was compiled.
        bytes: arguments, temporaries and outputs of one estimate; what the compiler asked for, at
            the least, where the device has not that much.
        temp_bytes: temporaries.
        flops: of matmuls and convolutions.
        compile_seconds: to trace and compile.
        seconds: of each timed run; empty where it was not run.
        note: why it was not chosen, in words, or empty.
    """

    variant: Variant
    bytes: int
    temp_bytes: int
    flops: float
    compile_seconds: float
    seconds: tuple[float, ...] = ()
    note: str = ""


def describe(variant: Variant) -> str:
    """A variant in words.

    Example:
        >>> describe(Variant("mixed_mode", "step", 5))
        "mixed_mode, remat='step', microbatch=5"
    """
    more = "" if variant.microbatch is None else f", microbatch={variant.microbatch}"
    return f"{variant.estimator}, remat={variant.remat!r}{more}"


def variants(steps: int, microbatch: int | None = None) -> list[Variant]:
    """The variants of one microbatch that are not the same program, the leanest last.

    Args:
        steps: number of inner steps.
        microbatch: how many tasks are mapped together, or None.

    Returns:
        Variants.

    Example:
        >>> [v.remat for v in variants(1) if v.estimator == "mixed_mode"]
        ['none', 'step']
    """
    remats: tuple[Remat, ...] = ("none",)
    if steps > 0:
        remats = ("none", "step", "nested") if steps >= 4 else ("none", "step")
    plain = WITH_REMAT | KEEPING | (WRITTEN_OUT if 2 <= steps <= MOST_STEPS else {})
    return [
        Variant(name, remat, microbatch)
        for remat in remats
        for name in (plain if remat == "none" else WITH_REMAT)
    ]


def microbatches(tasks: int | None) -> list[int | None]:
    """The sizes of a microbatch worth trying, the largest first.

    Args:
        tasks: number of tasks, or None for one episode.

    Returns:
        All tasks, one, and divisors between, evenly spread by their logarithm.

    Example:
        >>> microbatches(25), microbatches(64), microbatches(None)
        ([25, 5, 1], [64, 16, 4, 1], [None])
    """
    if tasks is None:
        return [None]
    divisors = [d for d in range(1, tasks + 1) if tasks % d == 0]
    levels = min(MICROBATCHES, len(divisors))
    wanted = [tasks ** (level / max(levels - 1, 1)) for level in range(levels)]
    near: set[int | None] = {
        min(divisors, key=lambda d: abs(math.log(d / want))) for want in wanted
    }
    return sorted(near, key=lambda size: -(size or 0))


def build(
    problem: Problem,
    steps: int,
    variant: Variant,
    *,
    tasks: int | None = None,
    objective: Objective = final,
    persistent: bool = False,
) -> MetaGradient:
    """A variant as an estimator.

    Args:
        problem: what to differentiate.
        steps: number of inner steps.
        variant: which.
        tasks: number of episodes of one estimate; None: one episode, without a task axis.
        objective: where the outer loss is read.
        persistent: keep the inner loop's state from one estimate to the next.

    Returns:
        A ``MetaGradient``.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> mg = build(q.problem, 3, Variant("mixed_mode", "step"))
        >>> mg.estimate(q.meta, (), q.episode, None)[0].shape
        (5,)
    """
    made = ESTIMATORS[variant.estimator](
        problem, steps, objective=objective, persistent=persistent, remat=variant.remat
    )
    if tasks is None:
        return made
    return over_tasks(made, tasks, microbatch=variant.microbatch)


def compiled(
    mg: MetaGradient, variant: Variant, shapes: tuple[Any, ...], usable: int
) -> tuple[Trial, Callable[..., Any] | None]:
    """Compile one variant and read what it needs; nothing is run.

    Args:
        mg: of ``build``.
        variant: what it is.
        shapes: of ``(meta, state, episode, key)``.
        usable: bytes that it may use.

    Returns:
        A ``Trial`` without seconds, and the program where it fits, else None.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> which = Variant("mixed_mode", "none")
        >>> mg = build(q.problem, 3, which)
        >>> trial, run = compiled(mg, which, (q.meta, (), q.episode, None), usable=10)
        >>> run is None, trial.note
        (True, 'over the limit')
    """

    def grads_of(*arguments: Any) -> Any:
        return mg.estimate(*arguments)

    begin = time.perf_counter()
    try:
        traced = jax.jit(grads_of).trace(*shapes)
    except NotDifferentiableError as error:
        note = f"not differentiable this way: {str(error).splitlines()[0]}"
        return Trial(variant, 0, 0, math.nan, time.perf_counter() - begin, (), note), None
    work = flops(traced.jaxpr)
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = machines.exhausted(str(error))
        if needed is None:
            raise
        spent = time.perf_counter() - begin
        return Trial(variant, needed[0], 0, work, spent, (), "over the device's memory"), None
    spent = time.perf_counter() - begin
    memory = program.memory_analysis()
    if memory is None:
        raise ValueError(
            f"the compiler for {jax.default_backend()} does not say how much memory a program "
            "needs; choose an estimator by hand"
        )
    temp = memory.temp_size_in_bytes
    whole = temp + memory.argument_size_in_bytes + memory.output_size_in_bytes
    whole -= memory.alias_size_in_bytes
    fits = whole <= usable
    trial = Trial(variant, whole, temp, work, spent, (), "" if fits else "over the limit")
    return trial, program if fits else None
