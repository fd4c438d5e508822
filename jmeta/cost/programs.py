"""The real sharded meta step of one candidate, compiled; nothing is run and no weight exists."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jmeta.core.estimators import mixed_mode
from jmeta.core.over_tasks import over_tasks
from jmeta.core.types import MetaGradient
from jmeta.cost import topology as machines
from jmeta.cost.compiled import flops
from jmeta.cost.hlo import collectives
from jmeta.cost.measured import estimators
from jmeta.cost.rows import Candidate, Row, traffic
from jmeta.cost.shapes import Setting

OUTER = {"adam": lambda: optax.adam(1e-3), "adamw": lambda: optax.adamw(1e-3),
         "sgd": lambda: optax.sgd(1e-3)}  # fmt: skip


def compile_row(
    given: Setting,
    candidate: Candidate,
    *,
    steps: int,
    topology: str = "local",
    usable: int | None = None,
    keep: Callable[[str], Any] | None = None,
) -> Row:
    """Compile one candidate in this process.

    Args:
        given: the problem, by shape.
        candidate: how it would run.
        steps: inner steps.
        topology: for what.
        usable: bytes of a device; None: what the compiler or runtime says.
        keep: called with the program's HLO text.

    Returns:
        A ``Row``; a program that does not fit is one too.

    Raises:
        ValueError: a mesh, a number of tasks or rules that do not fit one another.

    Example:
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> given = Setting(q.problem, q.meta, q.episode)
        >>> row = compile_row(given, Candidate("first_order", {"tasks": -1}), steps=3)
        >>> row.fits
        True
    """
    from jmeta.runtime import parallel
    from jmeta.runtime.train import meta_trainer

    found = machines.devices(topology)
    usable = machines.usable_bytes(found[0], topology) if usable is None else usable
    mesh = parallel.make_mesh(parallel.MeshConfig(**candidate.mesh), found)
    count = len(found) if candidate.tasks is None else candidate.tasks
    parts = mesh.shape["tasks"] * mesh.shape["fsdp"]
    if count < 1 or count % parts:
        raise ValueError(
            f"{count} tasks cannot be split evenly over the tasks={mesh.shape['tasks']} x "
            f"fsdp={mesh.shape['fsdp']} devices of the mesh; ask for a multiple of {parts}"
        )
    rules = parallel.REPLICATED if given.rules is None else given.rules
    single = _estimator(given, candidate, steps)
    mg = over_tasks(single, microbatch=candidate.microbatch)
    outer = OUTER[candidate.outer]()
    meta = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given.meta)
    state = jax.eval_shape(meta_trainer(mg, outer).init, meta, jax.random.key(0))
    episodes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), given.episode
    )
    begin = time.perf_counter()
    step: Any = parallel.sharded_step(mg, outer, mesh, state, rules)
    traced = step.trace(
        parallel.abstract(state, parallel.state_shardings(mesh, state, rules)),
        parallel.abstract(episodes, parallel.task_sharding(mesh)),
    )
    work = flops(traced.jaxpr) / len(found)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = machines.exhausted(str(error))
        if needed is None:
            raise
        seconds, usable = time.perf_counter() - begin, min(usable, needed[1])
        note = f"does not fit: needs {needed[0] / 2**30:.1f} GiB of {usable / 2**30:.2f}"
        return Row(
            candidate, topology, needed[0], 0, 0, usable, False, work, {}, seconds, note
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    text = compiled.as_text() or ""
    if keep is not None:
        keep(text)
    memory = compiled.memory_analysis()
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = arguments + temp + memory.output_size_in_bytes - memory.alias_size_in_bytes
    note = "" if total <= usable else (
        f"does not fit: needs {total / 2**30:.1f} GiB of {usable / 2**30:.2f}"
    )  # fmt: skip
    return Row(
        candidate, topology, total, arguments, temp, usable, total <= usable, work,
        traffic(collectives(text)), seconds, note, memory.host_temp_size_in_bytes,
    )  # fmt: skip


def _estimator(given: Setting, candidate: Candidate, steps: int) -> MetaGradient:
    """The estimators of a cost table, and the one that is only of use beside an accelerator."""
    if candidate.estimator == "mixed_mode offload":
        return mixed_mode(given.problem, steps, remat="offload")
    return estimators(given.problem, steps)[candidate.estimator]


def made(reference: str, options: Mapping[str, Any]) -> Setting:
    """Call the function that a reference names.

    Args:
        reference: ``module:function``.
        options: its keyword arguments.

    Returns:
        A ``Setting``.

    Raises:
        ValueError: no such module or function, or it returns something else.

    Example:
        >>> made("jmeta.cost.shapes:setting", {"model": "tiny", "tokens": 16}).episode.query.shape
        (8, 16)
    """
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{reference!r} cannot be imported: {error}") from error
    answer = function(**options)
    if not isinstance(answer, tuple) or not 3 <= len(answer) <= 4:
        raise ValueError(
            f"{reference!r} returned {type(answer).__name__}; it must return (problem, meta, "
            "episode) or a jmeta.cost.Setting"
        )
    return Setting(*answer)
