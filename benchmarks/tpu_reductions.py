"""What the real TPU compiler makes of every estimator's reduction over tasks, without a TPU.

Tasks of a small regression over the 256 chips of v5e:16x16, with and without microbatches: what is
reduced once for an outer step, and what inside a loop.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jmeta
from benchmarks.pieces import Rows, WholeConfig, leave
from jmeta.core.types import Episode, MetaGradient, Problem, PyTree
from jmeta.cost import collectives, topology
from jmeta.runtime import config as configuration
from jmeta.runtime import parallel, statistics

TOPOLOGY, STEPS, EXAMPLES, WIDTH = "v5e:16x16", 5, 8, 6
SHAPES = {"up": (WIDTH, 7), "down": (7,)}


def loss(fast: PyTree, meta: PyTree, batch: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
    """Squared error of a tanh network, and a penalty that reads the meta-parameters."""
    error = jnp.tanh(batch["x"] @ fast["up"]) @ fast["down"] - batch["y"]
    return jnp.mean(error**2) + 0.05 * sum(jnp.sum(m**2) for m in jax.tree.leaves(meta)), {}


PROBLEM = Problem(loss, loss, lambda meta: optax.sgd(0.1))
ESTIMATORS: dict[str, Callable[[], MetaGradient]] = {
    "unrolled": lambda: jmeta.unrolled(PROBLEM, STEPS),
    "mixed_mode": lambda: jmeta.mixed_mode(PROBLEM, STEPS, remat="nested"),
    "first_order": lambda: jmeta.first_order(PROBLEM, STEPS),
    "reptile": lambda: jmeta.reptile(PROBLEM, STEPS),
    "truncated": lambda: jmeta.truncated(PROBLEM, STEPS, window=2),
    "implicit": lambda: jmeta.implicit(jmeta.proximal(PROBLEM, 0.5), STEPS, solver=jmeta.cg(3)),
    "forward": lambda: jmeta.forward(PROBLEM, STEPS),
    "evolution": lambda: jmeta.evolution(PROBLEM, STEPS, pairs=1),
    "persistent": lambda: jmeta.mixed_mode(PROBLEM, STEPS, persistent=True),
}


def compiled(name: str, tasks: int, microbatch: int | None, devices: list[Any]) -> str:
    """The program of one estimate on a data-parallel mesh of the devices, as text."""
    mg = jmeta.over_tasks(ESTIMATORS[name](), tasks=tasks, microbatch=microbatch)
    mesh = parallel.make_mesh(devices=devices)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = parallel.task_sharding(mesh)

    def on(layout: Any, tree: PyTree) -> PyTree:
        return parallel.abstract(tree, jax.tree.map(lambda _: layout, tree))

    one = {"x": (EXAMPLES, WIDTH), "y": (EXAMPLES,)}
    batch = {k: jax.ShapeDtypeStruct((tasks, *v), jnp.float32) for k, v in one.items()}
    meta = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in SHAPES.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        on(everywhere, meta),
        on(split, jax.eval_shape(mg.init, meta, key)),
        on(split, Episode(batch, batch)),
        on(everywhere, key),
    )
    with jax.set_mesh(mesh):
        program = jax.jit(mg.estimate, out_shardings=(everywhere, split, everywhere))
        return str(program.lower(*arguments).compile().as_text())


@dataclasses.dataclass(frozen=True)
class Config(WholeConfig):
    """Collectives of every estimator under the TPU compiler."""

    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    """Which are compiled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.estimators if name not in ESTIMATORS]:
            raise ValueError(
                f"no estimator {', '.join(unknown)}; known are {', '.join(ESTIMATORS)}"
            )


PRESETS = {"paper": Config(), "smoke": Config(estimators=("mixed_mode",))}


def measure(estimators: Sequence[str]) -> Rows:
    """What each estimator reduces, with one task a chip and with two that are accumulated."""
    devices = topology.devices(TOPOLOGY)
    rows: Rows = []
    for name in estimators:
        for each, microbatch in ((1, None), (2, 1)):
            found = collectives(compiled(name, each * len(devices), microbatch, devices))
            shared = {
                "method": name, "seed": 0, "tasks a chip": each, "microbatch": microbatch,
                "kinds": " ".join(sorted({one.kind for one in found})),
                "shapes": " ".join(sorted(shape for one in found for shape in one.shapes)),
            }  # fmt: skip
            values = {"collectives": len(found), "inside loops": sum(c.looped for c in found)}
            rows += [shared | {"metric": m, "value": value} for m, value in values.items()]
            print(f"{name}, {each} a chip: {values}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Compile in a process of its own: jax there believes that it is on a TPU VM."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    topology.require_libtpu()
    needed = topology.environment()
    if any(os.environ.get(name) != value for name, value in needed.items()):
        arguments = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "benchmarks.tpu_reductions", *arguments]
        sys.exit(subprocess.run(command, env=os.environ | needed, check=False).returncode)
    configuration.dump(config, config.out)
    rows = measure(config.estimators)
    leave(
        config, "Reductions over tasks under the TPU compiler",
        f"What {TOPOLOGY} reduces for an outer step, and where.",
        rows, statistics.summarise(rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
