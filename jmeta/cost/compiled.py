"""A program and what it takes: time to compile, temporary memory, FLOPs of its matmuls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jmeta.core.tracing import scan_parts, variables_read
from jmeta.core.types import PyTree


class Program(NamedTuple):
    """One compiled program, as a rule a meta-gradient.

    Attributes:
        run: takes what it was compiled for, ``(meta, episode) -> grads``.
        temp_bytes: memory for temporaries that XLA has planned, in bytes.
        flops: floating-point operations of matmuls and convolutions, loops multiplied out.
        trace_seconds: time to trace and lower.
        compile_seconds: time to compile; 0 where a cache has answered.
    """

    run: Callable[..., PyTree]
    temp_bytes: int
    flops: float
    trace_seconds: float
    compile_seconds: float


def compile_program(function: Callable[..., PyTree], *arguments: Any) -> Program:
    """Compile any function for its arguments, without running it.

    Args:
        function: of pytrees of arrays; ``jax.jit`` of one keeps its options.
        *arguments: arrays, or ``jax.ShapeDtypeStruct``.

    Returns:
        A ``Program``, whose ``run`` takes such arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> program = compile_program(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 4)))
        >>> program.flops, program.run(jnp.ones((2, 3)), jnp.ones((3, 4)))[0, 0].item()
        (48.0, 3.0)
    """
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    begin = time.perf_counter()
    traced = jitted.trace(*arguments)
    lowered = traced.lower()
    between = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    planned = compiled.memory_analysis()
    temp = 0 if planned is None else planned.temp_size_in_bytes
    return Program(compiled, temp, flops(traced.jaxpr), between - begin, end - between)


def flops(jaxpr: Any) -> float:
    """Floating-point operations of the matmuls and convolutions in a jaxpr.

    Unlike XLA's own count it multiplies the body of a ``scan`` by its length. What no output needs
    does not count, as it is not run. The more expensive branch of a conditional counts; a ``while``
    of unknown length counts once.

    Args:
        jaxpr: open or closed.

    Returns:
        Multiplications and additions, two for each pair.

    Example:
        >>> import jax.numpy as jnp
        >>> f = lambda w: jax.lax.scan(lambda x, _: (w @ x, None), jnp.ones((4, 4)), length=10)[0]
        >>> flops(jax.make_jaxpr(f)(jnp.ones((4, 4))))  # 10 * 2 * 4 ** 3
        1280.0
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return _flops(jaxpr, jaxpr.outvars)


def _flops(jaxpr: Any, outputs: Sequence[Any]) -> float:
    """FLOPs of an open jaxpr, of which only some outputs are wanted."""
    total = 0.0
    live = variables_read(jaxpr, outputs)
    for eqn in jaxpr.eqns:
        wanted = [v in live for v in eqn.outvars]
        name = eqn.primitive.name
        if not any(wanted):
            continue
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inner = 1.0
            for axis in contract:
                inner *= shape[axis]
            total += 2.0 * inner * eqn.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / features
        elif name == "cond":
            total += max(_flops(b.jaxpr, b.jaxpr.outvars) for b in eqn.params["branches"])
        else:
            times = eqn.params["length"] if name == "scan" else 1
            carried = scan_parts(eqn)[1] if name == "scan" else 0
            for key, value in eqn.params.items():
                # The forward and backward rules of a custom derivative are not run beside it.
                if key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr") and value is not None:
                    body = getattr(value, "jaxpr", value)
                    outs = body.outvars
                    if len(outs) == len(wanted):  # what a loop carries it may need itself
                        pairs = enumerate(zip(outs, wanted, strict=True))
                        outs = [out for i, (out, want) in pairs if want or i < carried]
                    total += times * _flops(body, outs)
    return total
