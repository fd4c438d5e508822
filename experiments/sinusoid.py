"""Sinusoids: the MAML paper's figure; exact MAML, first order, Reptile, joint training, none.

A 1-40-40-1 network fits sine waves of unknown amplitude and phase from a few points. All seeds of
a method are trained at once, stacked on a leading axis.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from experiments._shared import (
    command_line,
    learning_curve,
    least,
    record,
    require_positive,
    scored_row,
    train_method,
    write_metrics,
)
from jmeta import methods
from jmeta.core.types import Array, Episode, Info, Key, MetaGradient, Problem, PyTree
from jmeta.models import losses, mlp
from jmeta.runtime import config as configuration
from jmeta.runtime import distributed, drawing, figures, fit, report
from jmeta.runtime.evaluate import adaptation_values
from jmeta.runtime.statistics import mean_ci, summarise
from jmeta.tasks.sinusoid import sinusoids

SIZES = (1, 40, 40, 1)
STEPS = tuple(range(11))
RATES = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1)
SHOWN = (0, 1, 5, 10)
NONE = "no meta-training"
# Seeds of the tasks; training takes the run's own, which are small.
VALIDATION, TEST = 10**6, 10**6 + 1


@dataclasses.dataclass(frozen=True)
class Config(configuration.RunConfig):
    """Few-shot regression of sine waves, as in the MAML paper, section 5.1."""

    seeds: int = 5
    """Number of seeds, trained side by side; each has its own initialisation and tasks."""
    shots: int = 10
    """Support points of a task in training; as many query points."""
    test_shots: tuple[int, ...] = (5, 10)
    """Support points at test."""
    meta_batch: int = 25
    """Tasks per meta-step and seed; several processes and devices need a multiple of them."""
    meta_steps: int = 30_000
    """Meta-steps of each method."""
    inner_steps: int = 5
    """Inner steps in training; the test takes 0 to 10."""
    inner_lr: float = 0.01
    """Inner rate in training."""
    outer_lr: float = 1e-3
    """Adam's rate."""
    evaluate_every: int = 1000
    """Meta-steps between validations and checkpoints."""
    validation_tasks: int = 200
    """Tasks on which each method's rate at test is chosen."""
    test_tasks: int = 1000
    """Tasks of the final numbers, the same for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "shots", "test_shots", "meta_batch", "meta_steps", "inner_steps", "inner_lr",
            "evaluate_every", "validation_tasks", "test_tasks",
        )  # fmt: skip
        if self.inner_steps > STEPS[-1]:
            raise ValueError(
                f"inner_steps={self.inner_steps}: a network is looked at after up to {STEPS[-1]} "
                "steps, in training after as many as it is trained for: choose no more"
            )


PRESETS = {
    "demo": Config(seeds=3, meta_steps=3000, evaluate_every=250, test_tasks=600),
    "full": Config(),
    "smoke": Config(
        seeds=2, meta_batch=8, meta_steps=30, evaluate_every=10, test_shots=(10,),
        validation_tasks=20, test_tasks=50,
    ),
}  # fmt: skip


def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
    """Mean squared error of the network."""
    del key
    return losses.squared_error(mlp.apply(params, batch["x"]), batch["y"], batch["mask"]), {}


def problem_at(rate: float | Array) -> Problem:
    """A learned start from which gradient descent takes steps of a rate."""
    return methods.learned_start(loss, optax.sgd(rate))


def estimators(config: Config) -> dict[str, MetaGradient]:
    """What each method follows, for one task."""
    problem, steps = problem_at(config.inner_lr), config.inner_steps
    return {
        "maml": jmeta.mixed_mode(problem, steps),
        "fomaml": jmeta.first_order(problem, steps),
        "reptile": _on_all_points(jmeta.reptile(problem, steps)),
        "joint training": methods.plain_gradient(loss),  # one network for all tasks
    }


def _on_all_points(mg: MetaGradient) -> MetaGradient:
    """Reptile does not split a task: its inner loop gets the query's points too."""

    def estimate(meta: PyTree, state: PyTree, episode: Episode, key: Key):
        every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), episode.support, episode.query)
        return mg.estimate(meta, state, Episode(every, episode.query), key)

    return MetaGradient(mg.init, estimate)


def over_seeds(mg: MetaGradient) -> MetaGradient:
    """Several runs at once: meta-parameters have a leading seed axis, episodes one behind tasks.

    Adam works entry by entry, so that each run is what it would be alone.
    """

    def estimate(meta: PyTree, state: PyTree, episodes: Episode, key: Key):
        del key  # nothing here is random
        each = jax.vmap(lambda m, e: mg.estimate(m, (), e, None), in_axes=(0, 1))
        grads, _, info = each(meta, episodes)
        return grads, state, Info(*jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), info))

    return MetaGradient(lambda meta, key: (), estimate)


def training_batches(config: Config) -> fit.Batches:
    """Batches of each seed's tasks, ``[tasks, seeds, points, 1]``: devices split the tasks."""
    sample = sinusoids(tasks=config.meta_batch, shots=config.shots, queries=config.shots)

    def batch(step: int) -> Episode:
        return jax.tree.map(lambda *leaf: np.stack(leaf, 1), *(sample(s, step) for s in seeds))

    seeds = config.seed_list
    return fit.from_function(batch)


def initial(config: Config) -> PyTree:
    """Each seed's initial parameters, stacked."""

    def one(key: Array) -> PyTree:
        # Uniform in +-1/sqrt(inputs), biases too, so that the kinks do not all lie at x = 0; the
        # usual He-normal kernels are six times wider in variance, and the inner loop diverges.
        params = mlp.init(key, SIZES)
        for name, layer in params.items():
            bound, key = layer["kernel"].shape[0] ** -0.5, jax.random.fold_in(key, 1)
            keys = dict(zip(layer, jax.random.split(key), strict=True))
            params[name] = {
                kind: jax.random.uniform(keys[kind], leaf.shape, minval=-bound, maxval=bound)
                for kind, leaf in layer.items()
            }
        return params

    return jax.vmap(one)(jnp.stack([jax.random.key(seed) for seed in config.seed_list]))


def tasks(count: int, shots: int, seed: int, queries: int = 100) -> Episode:
    """Held-out tasks."""
    return jax.tree.map(jnp.asarray, sinusoids(tasks=count, shots=shots, queries=queries)(seed, 0))


@jax.jit
def errors(meta: PyTree, rates: Array, episodes: Episode) -> Array:
    """Mean squared errors ``[seeds, tasks, steps]`` after ``STEPS``, at a rate for each seed."""

    def one(meta: PyTree, rate: Array, episode: Episode) -> Array:
        return adaptation_values(problem_at(rate), meta, episode, STEPS)["loss"]

    over_tasks = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(over_tasks, in_axes=(0, 0, None))(meta, rates, episodes)


def choose_rates(config: Config, meta: PyTree, shots: int) -> np.ndarray:
    """For each seed, the rate with the least error on validation tasks after 5 steps."""
    held_out = tasks(config.validation_tasks, shots, VALIDATION)
    tried = [
        np.asarray(errors(meta, jnp.full(config.seeds, rate), held_out))[:, :, 5].mean(1)
        for rate in RATES
    ]
    return least(RATES, tried).astype(np.float32)


def without_training(episodes: Episode) -> dict[str, np.ndarray]:
    """Errors ``[tasks]`` of two predictors that need no network."""
    support, query = (jax.tree.map(np.asarray, part) for part in episodes)
    near = np.abs(query["x"] - support["x"].transpose(0, 2, 1)).argmin(2)[:, :, None]
    predictions = {
        "nearest support point": np.take_along_axis(support["y"], near, axis=1),
        "mean of the support": support["y"].mean(1, keepdims=True),
    }
    return {k: ((p - query["y"]) ** 2).mean((1, 2)) for k, p in predictions.items()}


def evaluate(config: Config, trained: dict[str, PyTree]) -> list[dict[str, Any]]:
    """Rows for every method, seed, number of shots and of steps."""
    rows: list[dict[str, Any]] = []

    def add(method: str, seed: int, values: np.ndarray, **settings: Any) -> None:
        rows.append(scored_row(config, method, seed, "mse", values) | settings)

    for shots in config.test_shots:
        test = tasks(config.test_tasks, shots, TEST)
        for method, meta in trained.items():
            rates = choose_rates(config, meta, shots)
            values = np.asarray(errors(meta, jnp.asarray(rates), test))
            for (index, seed), steps in itertools.product(enumerate(config.seed_list), STEPS):
                add(method, seed, values[index, :, steps], shots=shots, test_steps=steps)
            for seed, rate in zip(config.seed_list, rates, strict=True):
                rate = float(f"{rate:.3g}")
                rows.append({"method": method, "seed": seed, "metric": "rate at test",
                             "value": rate, "shots": shots})  # fmt: skip
        for method, values in without_training(test).items():
            # Nothing in them depends on a seed: their interval is over tasks.
            rows.append({"method": method, "seed": config.first_seed, "metric": "mse",
                         "values": values.tolist(), "shots": shots})  # fmt: skip
    return rows


def draw_examples(config: Config, trained: dict[str, PyTree], shots: int) -> tuple[Path, Path]:
    """The paper's figure 2: two test tasks before and after adaptation, by two methods."""
    chosen = [method for method in ("maml", "joint training") if method in trained]
    episode, grid = tasks(2, shots, TEST + 1, 2000), np.linspace(-5, 5, 201, dtype=np.float32)
    wanted = ((0, "before", "#9a9a9a", ":"), (1, "1 step", drawing.PALETTE[1], "--"),
              (10, "10 steps", drawing.PALETTE[0], "-"))  # fmt: skip
    with drawing.style():
        figure, first = drawing.canvas(9.0, 5.0)
        first.remove()
        all_axes = figure.subplots(2, len(chosen), sharex=True, sharey="row", squeeze=False)
        for (row, column), axes in np.ndenumerate(all_axes):
            support, query = jax.tree.map(lambda leaf, row=row: leaf[row], tuple(episode))
            every_meta = trained[chosen[column]]
            rate = choose_rates(config, every_meta, shots)[0]
            meta = jax.tree.map(lambda leaf: leaf[0], every_meta)
            order = np.argsort(np.asarray(query["x"])[:, 0])
            truth = [np.asarray(query[name])[order, 0] for name in "xy"]
            axes.plot(*truth, color=drawing.INK, linewidth=1.2, label="true wave")
            for steps, label, color, line in wanted:
                fast = jmeta.adapt(problem_at(rate), meta, support, steps)
                y = np.asarray(mlp.apply(fast, jnp.asarray(grid)[:, None]))[:, 0]
                axes.plot(grid, y, color=color, linestyle=line, label=label)
            points = [np.asarray(support[name])[:, 0] for name in "xy"]
            axes.plot(*points, "^", color=drawing.PALETTE[2], markersize=6, label="support")
            axes.set_title(f"{chosen[column]}, K = {shots}, rate {rate:.3g}" if row == 0 else "")
            axes.set_xlabel("x" if row == 1 else "")
            axes.set_ylabel("y" if column == 0 else "")
        figure.legend(
            *all_axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False
        )
        return drawing.save(figure, config.out / "examples")


def draw_figures(
    config: Config,
    summary: list[dict[str, Any]],
    histories: dict[str, list[dict[str, Any]]],
    trained: dict[str, PyTree],
) -> list[tuple[str, tuple[Path, Path]]]:
    """Examples, adaptation curves for each number of shots, learning curves, differences."""
    unit = "seeds" if config.seeds > 1 else "tasks"
    shots = config.test_shots[-1]
    made = [
        (
            "Two test waves: the network before adaptation, after 1 and after 10 steps on the "
            "support points (first seed).",
            draw_examples(config, trained, shots),
        )
    ]
    for k in config.test_shots:
        rows = [row for row in summary if row["metric"] == "mse" and row["shots"] == k]
        curves: dict[str, figures.Curve] = {}
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            steps = [row.get("test_steps", 0) for row in mine]
            half = [row["ci95"] or 0.0 for row in mine]
            curves[method] = (steps, [row["mean"] for row in mine], half)
        made.append(
            (
                f"Squared error after inner steps on {k} points, with 95 % intervals over {unit}. "
                "Dotted: predictors without a network.",
                figures.adaptation_curves(
                    config.out / f"adaptation-k{k}", curves, "query mean squared error",
                    title=f"Sine waves from {k} points",
                ),
            )
        )  # fmt: skip
    names = [f"mse_seed{seed}" for seed in config.seed_list]
    made.append(
        (
            f"Validation error after {config.inner_steps} steps of rate {config.inner_lr} during "
            "meta-training.",
            figures.learning_curves(
                config.out / "learning",
                {m: learning_curve(history, names, mean_ci) for m, history in histories.items()},
                ylabel=f"validation error after {config.inner_steps} steps", log_y=True,
            ),
        )
    )  # fmt: skip
    at_five = [
        {key: item for key, item in row.items() if key != "test_steps"}
        for row in summary
        if row["metric"] == "mse" and row["shots"] == shots and row.get("test_steps", 5) == 5
    ]
    made.append(
        (
            f"Differences to exact MAML after 5 steps on {shots} points; filled where the 95 % "
            "interval excludes zero.",
            figures.forest(config.out / "differences", at_five, "mse"),
        )
    )
    return made


def train(
    config: Config, name: str, mg: MetaGradient, measure: Callable[[PyTree], np.ndarray]
) -> tuple[PyTree, list[dict[str, Any]]]:
    """Meta-train all seeds of a method."""

    def validate(meta: PyTree) -> dict[str, float]:
        scores = measure(meta)
        each = {f"mse_seed{s}": float(v) for s, v in zip(config.seed_list, scores, strict=True)}
        return {"mse": float(scores.mean())} | each

    done = train_method(
        name,
        over_seeds(jmeta.over_tasks(mg)),
        optax.adam(config.outer_lr),
        initial(config),
        training_batches(config),
        config.out / name.replace(" ", "-"),
        resume=config.resume,
        steps=config.meta_steps,
        evaluate=validate,
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.evaluate_every,
        keep=1,
        log_every=config.evaluate_every,
    )
    return done.meta, done.history


def run(config: Config) -> None:
    """Train, evaluate, and write the run directory."""
    record(config)
    held_out = tasks(config.validation_tasks, config.shots, VALIDATION)
    rates = jnp.full(config.seeds, config.inner_lr)

    def measure(meta: PyTree) -> np.ndarray:
        return np.asarray(errors(meta, rates, held_out))[:, :, config.inner_steps].mean(1)

    trained, histories = {}, {}
    for name, mg in estimators(config).items():
        trained[name], histories[name] = train(config, name, mg, measure)
    if not distributed.is_writer():
        return  # the first tells what all have done
    trained[NONE] = initial(config)
    write_metrics(config.out, histories)
    settings = {"inner_steps": config.inner_steps, "meta_steps": config.meta_steps}
    rows = [row | settings for row in evaluate(config, trained)]
    summary = summarise(rows, baseline="maml")
    report.write_results(config.out, rows, summary)
    shown = [row for row in summary if row.get("test_steps", 5) in SHOWN]
    report.print_table(shown)
    report.write_report(
        config.out,
        "Sine waves from a few points",
        "What does meta-learning add to fine-tuning, and exact second order to first order? A "
        "network of 1-40-40-1 units is meta-trained on sine waves of random amplitude and phase, "
        "and adapts to a new one from a few points by gradient descent.",
        config,
        shown,
        draw_figures(config, summary, histories, trained),
        [
            "Every method's inner rate at test, that of the networks without meta-training too, "
            f"was chosen of {list(RATES)} for the least error after 5 steps on validation tasks.",
            "All methods take the same number of meta-steps on the same tasks. Reptile adapts to "
            "support and query points together in training, as it needs no split; joint training "
            "fits one network to the query points of all tasks.",
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command_line(PRESETS, run, argv)


if __name__ == "__main__":
    main()
