"""One process of a small meta-training run, for the tests: ``python worker.py SPEC.json INDEX``."""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
import optax

import jmeta
from jmeta import Episode, Problem
from jmeta.models import mlp
from jmeta.runtime import checkpoint, distributed, parallel
from jmeta.runtime.fit import fit, from_function

TASKS, SIZES = 16, (4, 8, 1)
OUTER = {"sgd": lambda: optax.sgd(0.1), "adam": lambda: optax.adam(0.01)}


def loss(fast, meta, batch, key):
    """A regression with input noise from the key, so that a key that moves is seen."""
    x = batch["x"]
    x = x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
    return ((mlp.apply(fast, x, jax.numpy.tanh) - batch["y"]) ** 2).mean(), {}


def draw(step):
    """The global batch of a step; each task has a number of its own in ``id``."""
    rng = np.random.default_rng(step)
    kind = np.asarray(jax.numpy.zeros(())).dtype

    def data():
        x = rng.normal(size=(TASKS, 6, 4)).astype(kind)
        return {"x": x, "y": np.sin(x.sum(-1, keepdims=True))}

    number = np.arange(step * TASKS, (step + 1) * TASKS, dtype=np.int32)
    return Episode(data(), data() | {"id": number})


class Noted:
    """Batches that note the tasks they gave, by step."""

    def __init__(self, batches, given):
        self.batches, self.given = batches, given

    def __iter__(self):
        return self

    def __next__(self):
        step, batch = self.batches.state(), next(self.batches)
        self.given[step] = batch.query["id"].tolist()
        return batch

    def state(self):
        return self.batches.state()

    def restore(self, step):
        self.batches.restore(step)
        for later in [each for each in self.given if each >= step]:
            del self.given[later]  # fit looks at a batch before it begins


def bits(tree):
    """The bytes of a tree, in hexadecimal."""
    leaves = jax.tree.leaves(distributed.whole(tree))
    plain = [
        jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in leaves
    ]
    return b"".join(np.asarray(leaf).tobytes() for leaf in plain).hex()


def train(
    steps,
    outer="sgd",
    mesh=None,
    rules=False,
    act=None,
    source=draw,
    log_every=1,
    persistent=False,
    **options,
):
    """``fit`` on the regression; returns its result and the tasks this process was given."""
    given = {}
    problem = Problem(loss, loss, lambda meta: optax.sgd(0.1))
    mg = jmeta.mixed_mode(problem, 1, persistent=persistent)
    mg = jmeta.over_tasks(mg, tasks=TASKS if persistent else None)
    result = fit(
        mg,
        OUTER[outer](),
        mlp.init(jax.random.key(1), SIZES),
        Noted(from_function(source), given),
        steps=steps,
        mesh=mesh,
        rules=parallel.mlp(2) if rules else None,
        log_every=log_every,
        progress=False,
        on_step=act,
        **options,
    )
    return result, given


def acting(here, plan):
    """What a process does to itself at a step: ``{"process": 1, "step": 7, "signal": 9}``."""

    def act(step, state, info):
        if plan and here in plan["process"] and step == plan["step"]:
            jax.block_until_ready(state.meta)
            os.kill(os.getpid(), plan["signal"])

    return act


def vanishing(here, plan):
    """A data source that one process cannot read from some step on."""

    def source(step):
        if plan and here in plan["process"] and step >= plan["step"]:
            pathlib.Path("train.jsonl").resolve(strict=True)
        return draw(step)

    return source


def blinded(here, plan):
    """One process cannot read the arrays of a step's checkpoint, which the others can."""
    read = checkpoint._read

    def blind(manager, step, template):
        if here in plan["process"] and step == plan["step"]:
            raise OSError(5, "Input/output error")
        return read(manager, step, template)

    checkpoint._read = blind


def main(spec, here):
    """Do the runs of a specification one after the other, and write what they gave."""
    with distributed.session(
        f"localhost:{spec['port']}", spec["processes"], here, connect_seconds=60
    ):
        for number, run in enumerate(spec["runs"]):
            run = dict(run)
            run |= run.pop("only", {}).get(str(here), {})
            if "blind" in run:
                blinded(here, run.pop("blind"))
            jax.config.update("jax_enable_x64", run.pop("x64", False))
            act = acting(here, run.pop("act", None))
            source = vanishing(here, run.pop("vanish", None))
            config = run.pop("mesh", None)
            mesh = parallel.make_mesh(parallel.MeshConfig(**config)) if config else None
            done, given = train(act=act, source=source, mesh=mesh, rules=bool(mesh), **run)
            report = {
                "losses": [row["loss"] for row in done.history],
                "meta": bits(done.meta),
                "students": bits(done.state.estimator_state),
                "step": int(done.state.step),
                "interrupted": done.interrupted,
                "given": given,
            }
            path = pathlib.Path(spec["folder"]) / f"{number}.{here}.json"
            path.write_text(json.dumps(report))
            print("run", number, "at step", report["step"], flush=True)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()), int(sys.argv[2]))
