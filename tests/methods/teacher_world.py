"""A world of three words and two positions: small enough to enumerate, with a student of 21."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmeta import Episode
from jmeta.methods import Student, inputs_and_labels
from jmeta.methods.relaxations import log_probability

VOCAB, TIME, WIDTH = 3, 2, 3


def rows(table, tokens):
    if isinstance(tokens, dict):
        return jnp.einsum("...k,...kd->...d", tokens["shares"], table[tokens["ids"]])
    if jnp.issubdtype(tokens.dtype, jnp.integer):
        return table[tokens]
    return tokens @ table


def loss(params, batch, key):
    """Cross-entropy of every position, which sees itself and the mean of the others."""
    del key
    x = rows(params["embed"], batch["tokens"])
    mask = batch["mask"][..., None]
    mean = (x * mask).sum(-2, keepdims=True) / mask.sum(-2, keepdims=True)
    scores = jnp.tanh(x + 0.5 * mean) @ params["out"]
    log_p = jax.nn.log_softmax(scores, axis=-1)
    target = batch["labels"]
    if jnp.issubdtype(target.dtype, jnp.integer):
        target = jax.nn.one_hot(target, VOCAB, dtype=log_p.dtype)
    weights = batch["weights"]
    total = weights.sum()
    each = -(target * log_p).sum(-1)
    return (each * weights).sum() / jnp.where(total == 0, 1, total), {"tokens": total}


def start(key=None):
    del key
    grid = np.linspace(-1.0, 1.0, VOCAB * WIDTH).reshape(VOCAB, WIDTH)
    return {"embed": jnp.asarray(np.sin(3 * grid)), "out": jnp.asarray(np.cos(2 * grid.T))}


@functools.cache  # and so are estimators of it, and their programs
def student(optimizer=None, **fields):
    return Student(loss, start, optimizer or optax.sgd(0.3), optax.sgd(0.2), **fields)


def teacher(meta, batch, key):
    """A table of scores for each token, one for each head."""
    del key
    return {name: meta[name][batch["tokens"]] for name in meta}


SCORES = {
    "inputs": [[-0.952, -0.425, -0.001], [-0.619, 0.702, -0.904], [0.847, 1.393, 0.194]],
    "labels": [[-0.247, -0.235, -0.611], [-0.574, 0.028, -1.055], [-0.333, 0.167, -0.907]],
}


def teacher_params(scale=1.0):
    return {name: scale * np.asarray(table) for name, table in SCORES.items()}


BOTH = inputs_and_labels(teacher)


def text(*lead, seed=0, time=TIME):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (*lead, time)).astype(np.int32)
    return {"tokens": tokens, "mask": np.ones(tokens.shape)}


def labelled(*lead, seed=0):
    labels = text(*lead, seed=seed + 100)["tokens"]
    weights = np.random.default_rng(seed + 200).random(labels.shape) + 0.1
    return {**text(*lead, seed=seed), "labels": labels, "weights": weights}


def episodes(micro=2, tasks=2, examples=2, unlabelled=None):
    """Micro-batches of texts, each with labelled tasks of its own."""
    found = text(micro, examples) if unlabelled is None else unlabelled
    tasks_of = (labelled(micro, tasks, examples, seed=s) for s in (1, 2))
    return Episode(found, Episode(*tasks_of))


def outcomes(places):
    """Every way to fill so many places, ``[3 ** places, places]``."""
    return np.asarray(list(itertools.product(range(VOCAB), repeat=places)), np.int32)


def scored(params, episode, rate=0.2, steps=1):
    """The query loss after fine-tuning by hand, the mean over tasks."""

    def one(task):
        adapted = params
        for _ in range(steps):
            slope = jax.grad(lambda p: loss(p, task.support, None)[0])(adapted)
            adapted = jax.tree.map(lambda p, g: p - rate * g, adapted, slope)
        return loss(adapted, task.query, None)[0]

    return jnp.mean(jax.vmap(one)(episode.query))


def at(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


@functools.cache
def compiled(mg):
    """An estimate from a new student; once for every estimator and shape of its episodes."""
    return jax.jit(lambda meta, data, key: mg.estimate(meta, mg.init(meta, key), data, key))


def estimated(mg, meta, data, key=None):
    """Gradient, state and info of one jitted estimate from a new student."""
    return compiled(mg)(meta, data, key)


def every_pseudo():
    """All 81 pseudo-examples of one text of two words: tokens and labels."""
    drawn = outcomes(4)
    ones = np.ones((81, 2))
    return {"tokens": drawn[:, :2], "labels": drawn[:, 2:], "mask": ones, "weights": ones}


def stepped(batch, weights, rate=0.3):
    """The student after a step on examples that weigh as much, by hand."""
    alone = lambda p, b: loss(p, jax.tree.map(lambda x: x[None], b), None)[0]  # noqa: E731
    slope = jax.grad(lambda p: jnp.sum(weights * jax.vmap(lambda b: alone(p, b))(batch)))(start())
    return jax.tree.map(lambda p, g: p - rate * g, start(), slope)


def probabilities(meta, tokens, batch):
    scores = teacher(meta, {"tokens": jnp.broadcast_to(tokens, batch["tokens"].shape)}, None)
    drawn = {"inputs": batch["tokens"], "labels": batch["labels"]}
    return jnp.exp(log_probability(scores, drawn, batch["mask"]))


def masked_pair(batch):
    """A corruption of a batch of texts, with word 1 for [MASK]."""
    hidden = np.random.default_rng(9).random(batch["tokens"].shape) < 0.5
    hidden[..., 0] = True
    tokens = np.where(hidden, 1, batch["tokens"])
    pair = {"tokens": tokens, "labels": batch["tokens"], "weights": hidden.astype(float)}
    return {**batch, "masked": pair}
