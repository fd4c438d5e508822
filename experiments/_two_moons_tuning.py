"""Fine-tuning on labelled points and the decision over the whole plane, the same for every method.

All candidates (checkpoints, rates and seeds) are fine-tuned together, for as many steps of as many
examples whatever the method and the number of labels; validation points choose among them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _two_moons_data as data_of
from experiments._two_moons_data import Data, Labelled
from experiments._two_moons_methods import network, optimizer
from jmeta.core.types import Array, PyTree
from jmeta.models import masked_lm
from jmeta.tasks.text import class_scores
from jmeta.tasks.two_moons import GRID

CHECKPOINTS = ("latest", "best")
WARMUP = 10
_TOGETHER = 1024  # cells of the plane scored at a time


class Tuned(NamedTuple):
    """What fine-tuning on one number of labels gave.

    Attributes:
        margins: float ``[seeds, 64, 64]``, by x and y: above zero where the second moon is said.
        test: the test accuracy of each seed.
        validation: the validation accuracy of each seed.
        checkpoint: which checkpoint was chosen, for all seeds.
        rate: which rate.
        candidates: of every checkpoint and rate ``{"checkpoint", "rate", "accuracy",
            "validation"}``: the test accuracy of each seed and the mean validation accuracy.
    """

    margins: np.ndarray
    test: np.ndarray
    validation: np.ndarray
    checkpoint: str
    rate: float
    candidates: list[dict[str, Any]]


def fine_tuner(config: Any, data: Data) -> Callable[[PyTree, PyTree], Array]:
    """The program that fine-tunes all candidates and asks them about every cell.

    Args:
        config: the experiment's configuration.
        data: the data.

    Returns:
        ``(students [checkpoints, seeds, ...], batches [seeds, steps, examples, 4]) -> margins
        [checkpoints, rates, seeds, 4096]``.
    """
    shape = network(config, data)
    loss = functools.partial(masked_lm.loss, shape)
    plane = data_of.moon_batch(data, data.cells, np.zeros(len(data.cells), np.int64))
    plane = {k: jnp.asarray(plane[k]) for k in ("tokens", "mask")}
    parts = jax.tree.map(lambda x: x.reshape(-1, _TOGETHER, *x.shape[1:]), plane)

    def one(params: PyTree, rate: Array, batches: PyTree, key: Array) -> Array:
        tuning = optimizer(rate, WARMUP)

        def step(carry: tuple[PyTree, PyTree], each: tuple[PyTree, Array]):
            params, state = carry
            batch, number = each
            grads = jax.grad(loss, has_aux=True)(params, batch, jax.random.fold_in(key, number))[0]
            updates, state = tuning.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = jnp.arange(jax.tree.leaves(batches)[0].shape[0])
        (params, _), _ = jax.lax.scan(step, (params, tuning.init(params)), (batches, steps))

        def margin(part: PyTree) -> Array:
            scores = masked_lm.logits(shape, params, part)
            first, second = jnp.moveaxis(
                class_scores(scores, part["mask"], data_of.label_tokens(data)), -1, 0
            )
            return second - first

        return jax.lax.map(margin, parts).reshape(-1)

    over_seeds = jax.vmap(one, in_axes=(0, None, 0, 0))
    over_rates = jax.vmap(over_seeds, in_axes=(None, 0, None, None))
    over_checkpoints = jax.vmap(over_rates, in_axes=(0, None, None, None))
    rates = jnp.asarray(config.finetune_rates, jnp.float32)
    keys = jnp.stack([jax.random.key(seed) for seed in config.seed_list])
    return jax.jit(lambda students, batches: over_checkpoints(students, rates, batches, keys))


def fine_tune(
    config: Any, data: Data, program: Callable[..., Array], students: Sequence[PyTree], n: int
) -> Tuned:
    """Fine-tune a method's students on n labels, and choose checkpoint and rate on n others.

    The choice is one for all seeds: the greatest validation accuracy, of equal ones the least
    validation loss.

    Args:
        config: the experiment's configuration.
        data: the data.
        program: of ``fine_tuner``.
        students: one tree for each of ``CHECKPOINTS``, or one for all.
        n: how many labelled points.

    Returns:
        A ``Tuned``.
    """
    batches, held_out = [], []
    for seed in config.seed_list:
        points = data_of.labelled(n, seed, fresh=config.fresh_labels)
        rows = data_of.fine_tuning_rows(n, seed, config.finetune_steps, config.finetune_batch)
        batches.append(data_of.moon_batch(data, points.cells[rows], points.labels[rows]))
        held_out.append(data_of.labelled(n, seed, fresh=config.fresh_labels, validation=True))
    # As numpy: what was trained is bound to its device and what was not is not, and a program is
    # compiled for each.
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *students)
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    margins = np.asarray(program(stacked, batches), np.float64)
    margins = margins.reshape(*margins.shape[:3], GRID, GRID)
    right, loss = judged(margins, held_out)
    loss = loss.mean(-1)
    # NaN, of a rate that diverges, comes last.
    order = {at: (np.isnan(loss[at]), -right[at].mean(), loss[at]) for at in np.ndindex(loss.shape)}
    best = min(order, key=lambda at: order[at])
    test, _ = judged(margins, [data.test] * len(held_out))
    candidates = [
        {"checkpoint": CHECKPOINTS[at[0]], "rate": config.finetune_rates[at[1]],
         "accuracy": test[at].tolist(), "validation": float(right[at].mean())}
        for at in order
    ]  # fmt: skip
    return Tuned(
        margins[best], test[best], right[best], CHECKPOINTS[best[0]],
        config.finetune_rates[best[1]], candidates,
    )  # fmt: skip


def luckiest(tuned: Tuned) -> list[float]:
    """Each seed's test accuracy at the checkpoint and rate that are best on test points.

    An upper bound of what any choice could have given, for all seeds alike.
    """
    return max((each["accuracy"] for each in tuned.candidates), key=np.mean)


def judged(margins: np.ndarray, points: Sequence[Labelled]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and logistic loss on each seed's points.

    Args:
        margins: ``[..., seeds, 64, 64]``.
        points: of each seed.

    Returns:
        Both ``[..., seeds]``.
    """
    right, losses = [], []
    for at, (cells, labels) in enumerate(points):
        found = margins[..., at, cells[:, 0], cells[:, 1]]
        # One that has diverged is right about nothing.
        right.append((np.where(labels == 1, found > 0, found <= 0)).mean(-1))
        with np.errstate(invalid="ignore"):  # NaN, of a rate that diverges, stays NaN
            losses.append(np.logaddexp(0, np.where(labels == 1, -found, found)).mean(-1))
    return np.stack(right, -1), np.stack(losses, -1)
