"""Kill a training run again and again at random moments, and count what is lost: nothing may be.

Each life is a process that ends by SIGKILL, most of them around a save; the next resumes. The
result is compared with a run that nobody disturbed.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.pieces import leave
from jmeta.runtime import config as configuration
from jmeta.runtime.statistics import summarise

EVERY = 4  # steps between checkpoints
TASKS = 4
LONGEST = 24  # steps of a life, at most
EXAMPLES, GIVEN = "examples.jsonl", "given.jsonl"  # cut back on resuming; every line ever written
WANTED = {  # of a run to which kills cost only time
    "completed checkpoints lost": 0, "examples repeated": 0, "examples skipped": 0,
    "same examples in the same order": 1, "steps that saw two batches": 0,
    "final state equal bit for bit": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Kill a run at random moments, resume it, and compare it with one that nobody disturbed."""

    kills: int = 50
    """How many of its lives end by SIGKILL; a seed chooses the moments."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kills < 1:
            raise ValueError(f"kills={self.kills}: choose at least 1")
        if self.resume:
            raise ValueError("resume: a soak is one piece and keeps nothing to go on from")


PRESETS = {"full": Config(), "quick": Config(kills=5)}


def examples(step: int) -> np.ndarray:
    """The numbers of the examples of a step: each is used once in a run."""
    return np.arange(step * TASKS, (step + 1) * TASKS, dtype=np.int32)


def live(out: str, steps: int, parent: Connection) -> None:
    """One life: go on to ``steps`` from what is in ``out``, telling each step."""
    import jax
    import jax.numpy as jnp
    import optax

    import jmeta
    from jmeta import Episode, Problem
    from jmeta.runtime.cache import use_compilation_cache
    from jmeta.runtime.fit import fit, from_function
    from jmeta.runtime.metrics import cut_back

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    use_compilation_cache()
    folder = Path(out)

    def loss(fast: Any, meta: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        return jnp.mean((jnp.tanh(batch["x"] @ fast["w"]) + noise - batch["y"]) ** 2), {}

    def draw(step: int) -> Episode:
        number = examples(step)
        x = np.stack([np.random.default_rng(n).normal(size=(5, 8)) for n in number])
        data = {"x": x.astype(np.float32), "y": np.sin(x.sum(-1)).astype(np.float32)}
        return Episode(data, data | {"id": number})

    class Noted:
        """Batches that write down what they gave, and on resuming take back what was lost."""

        def __init__(self) -> None:
            self._batches = from_function(draw)
            self._log = open(folder / EXAMPLES, "a")  # noqa: SIM115  (ends with the process)
            self._all = open(folder / GIVEN, "a")  # noqa: SIM115

        def __iter__(self) -> Noted:
            return self

        def __next__(self) -> Episode:
            batch = next(self._batches)
            row = {"step": self._batches.state(), "examples": batch.query["id"].tolist()}
            for file in (self._log, self._all):
                file.write(json.dumps(row) + "\n")
                file.flush()
            return batch

        def state(self) -> int:
            return self._batches.state()

        def restore(self, step: int) -> None:
            self._log.close()
            cut_back(folder / EXAMPLES, step)
            self._log = open(folder / EXAMPLES, "a")  # noqa: SIM115
            self._batches.restore(step)

    folder.mkdir(parents=True, exist_ok=True)
    if not any((folder / "checkpoints").glob("[0-9]*")):  # killed before its first checkpoint
        (folder / EXAMPLES).unlink(missing_ok=True)
    mg = jmeta.over_tasks(jmeta.mixed_mode(Problem(loss, loss, lambda meta: optax.sgd(0.1)), 2))
    result = fit(
        mg,
        optax.adam(0.01),
        {"w": np.linspace(-1, 1, 8, dtype=np.float32)},
        Noted(),
        steps=steps,
        key=3,
        out=folder,
        checkpoint_every=EVERY,
        log_every=2,
        resume=True,
        progress=False,
        on_step=lambda step, state, info: parent.send(step),
    )
    key_free = result.state._replace(key=jax.random.key_data(result.state.key))
    parent.send(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(key_free)).hex())
    parent.close()


def completed(out: Path) -> set[int]:
    """The checkpoints in a run directory that are whole: their folders have their final names."""
    return {int(each.name) for each in (out / "checkpoints").glob("[0-9]*") if each.name.isdigit()}


def soak(
    folder: Path, kills: int, steps: int, rng: np.random.Generator, patience: float = 120
) -> dict[str, Any]:
    """Run once undisturbed and once with kills, and compare.

    Args:
        folder: for both run directories.
        kills: how many.
        steps: outer steps of each run; enough that the kills end before.
        rng: chooses the moments.
        patience: seconds that a life may take for a step.

    Returns:
        Counts of what was lost, repeated and skipped, and whether the final states are equal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jmeta", "jmeta.runtime.fit", "orbax.checkpoint", "optax"])

    def life(out: Path, longest: int | None) -> tuple[list[int], str | None]:
        """The steps a life told, and its final state if nobody killed it after ``longest``."""
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=live, args=(str(out), steps, theirs))
        process.start()
        theirs.close()
        told: list[int] = []
        try:
            while ours.poll(patience):
                heard = ours.recv()
                if isinstance(heard, str):
                    process.join(patience)
                    return told, heard
                told.append(heard)
                if longest is not None and len(told) >= longest:
                    time.sleep(float(rng.uniform(0, 0.05)))
                    break
            else:
                raise TimeoutError(f"a life said nothing for {patience} s after {told[-1:]}")
        except EOFError:
            raise RuntimeError(f"a life ended by itself after {told[-1:]}") from None
        finally:
            process.kill()
            process.join(patience)
        return told, None

    _, expected = life(folder / "undisturbed", None)
    out, lost, unfinished, redone, known = folder / "killed", 0, 0, 0, 0
    for _ in range(kills):
        told, state = life(out, int(rng.integers(1, LONGEST + 1)))
        if state is not None:
            raise ValueError(f"the run ended before {kills} kills: give it more than {steps} steps")
        lost += told[0] <= known  # began before a checkpoint that was whole
        known = max(completed(out), default=0)
        redone += max(told[-1] - known, 0)
        unfinished += any((out / "checkpoints").glob("*tmp*"))
    told, state = life(out, None)
    lost += told[0] <= known

    def rows(run: str, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / run / name).read_text().splitlines()]

    used = [number for row in rows("killed", EXAMPLES) for number in row["examples"]]
    wanted = [number for step in range(steps) for number in examples(step).tolist()]
    by_step: dict[int, set[tuple[int, ...]]] = {}
    for row in rows("killed", GIVEN):
        by_step.setdefault(row["step"], set()).add(tuple(row["examples"]))
    return {
        "kills": kills,
        "steps": steps,
        "checkpoint_every": EVERY,
        "kills_that_left_an_unfinished_save": unfinished,
        "steps_done_again": redone,
        "completed_checkpoints_lost": lost,
        "examples_repeated": len(used) - len(set(used)),
        "examples_skipped": len(set(wanted) - set(used)),
        "same_examples_in_the_same_order": used == wanted
        and rows("killed", EXAMPLES) == rows("undisturbed", EXAMPLES),
        "steps_that_saw_two_batches": sum(len(each) > 1 for each in by_step.values()),
        "final_state_equal_bit_for_bit": state == expected,
    }


def rows_of(found: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """What ``soak`` found as result rows; of yes and no, 1 is yes."""
    settings = {name: found[name] for name in ("kills", "steps", "checkpoint_every")}
    return [
        {"method": "killed and resumed", "seed": seed, "metric": name.replace("_", " "),
         "value": float(value), **settings}
        for name, value in found.items()
        if name not in settings
    ]  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether nothing was lost, by the rows of all seeds."""
    bad = [
        f"{row['metric']} {row['value']:.0f} (seed {row['seed']})"
        for row in rows
        if row["metric"] in WANTED and row["value"] != WANTED[row["metric"]]
    ]
    bad += [f"{name} is not counted" for name in WANTED.keys() - {row["metric"] for row in rows}]
    return f"MISSED: {', '.join(bad)}" if bad else "Nothing was lost, repeated or skipped."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    config = configuration.parse(PRESETS, argv, description=__doc__)
    rows: list[dict[str, Any]] = []
    for seed in tqdm(config.seed_list, desc="soaks", unit="soak"):
        begun, rng = time.monotonic(), np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as folder:
            found = soak(Path(folder), config.kills, config.kills * LONGEST, rng)
        rows += rows_of(found | {"seconds": time.monotonic() - begun}, seed)
    # Not before: it asks what devices there are, and a GPU or TPU is the lives' to hold.
    configuration.dump(config, Path(config.out))
    leave(
        config, "A run that is killed again and again",
        f"A run is killed {config.kills} times at random moments, resumed each time, and compared "
        "with one that nobody disturbed.",
        rows, summarise(rows), notes=[verdict(rows)],
    )  # fmt: skip


if __name__ == "__main__":
    main()
