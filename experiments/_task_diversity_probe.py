"""The probe of the task diversity experiment, and the embeddings it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _qa_data
from experiments._task_diversity_data import Encoded, halves
from jmeta.core.types import Array, PyTree
from jmeta.methods import Head, fisher, sampled, tapped, task2vec, with_head
from jmeta.models import bert, gpt2, heads, taps
from jmeta.tasks import prompts, questions
from jmeta.tasks.tokenizer import Vocabulary, load_tokenizer, vocabulary


class Probe(NamedTuple):
    """A fixed network.

    Attributes:
        name: what it is, for the metadata.
        config: its shape.
        params: its weights.
        words: its vocabulary.
        hidden: ``(params, batch) -> [examples, time, width]``.
    """

    name: str
    config: Any
    params: PyTree
    words: Vocabulary
    hidden: Callable[[PyTree, PyTree], Array]


def probe(name: str, config: Any, params: PyTree, words: Vocabulary) -> Probe:
    """A GPT-2 or BERT as a probe; whatever head it has is left out."""
    network: Any = gpt2 if isinstance(config, gpt2.GPT2Config) else bert
    config = config._replace(head=None)
    return Probe(name, config, params, words, functools.partial(network.hidden, config))


def pretrained(name: str) -> Probe:
    """A checkpoint: a folder with weights, ``config.json`` and tokeniser, or a name on the hub.

    Raises:
        FileNotFoundError, DataUnavailable: there is no such checkpoint or tokeniser here.
    """
    from jmeta.models.pretrained import from_pretrained

    found = from_pretrained(name, head="none")
    return probe(name, found.config, found.params, vocabulary(load_tokenizer(name)))


@functools.cache
def _pooled(hidden: Callable[[PyTree, PyTree], Array]) -> Callable[..., Array]:
    def features(params: PyTree, made: PyTree, batch: PyTree) -> Array:
        return heads.mean_pool(hidden(taps.insert(params, made), batch), batch["mask"])

    return features


@functools.cache
def _every(hidden: Callable[[PyTree, PyTree], Array]) -> Callable[..., Array]:
    """States that predict the next token."""

    def features(params: PyTree, made: PyTree, batch: PyTree) -> Array:
        return hidden(taps.insert(params, made), batch)[:, :-1]

    return features


def embed(
    found: Probe, x: PyTree, y: np.ndarray, key: Array, *, classes: int, draws: int
) -> np.ndarray:
    """Task2Vec of some examples of a task."""
    made = task2vec(
        _pooled(found.hidden), found.params, taps.taps(found.params), x, jnp.asarray(y), key,
        classes=classes, labels=sampled(draws),
    )  # fmt: skip
    return np.asarray(made.vector)


def embed_tasks(
    found: Probe, tasks: Sequence[Encoded], seed: int, *, size: int, classes: int, draws: int
) -> dict[str, np.ndarray]:
    """Embeddings of every task and of two disjoint halves of it.

    Args:
        found: the probe.
        tasks: the tasks.
        seed: of the examples and of the labels that are drawn.
        size: examples of a half.
        classes: of the head; at least as many as any task has.
        draws: labels drawn of each example.

    Returns:
        Vectors by ``"NAME"``, ``"NAME/first"`` and ``"NAME/second"``.
    """
    vectors = {}
    for number, task in enumerate(tasks):
        first, second = halves(task, size, seed)
        key = jax.random.fold_in(jax.random.key(seed), number)
        for i, (part, rows) in enumerate(
            (("", np.concatenate([first, second])), ("/first", first), ("/second", second))
        ):
            x = {name: leaf[rows] for name, leaf in task.x.items()}
            vectors[task.name + part] = embed(
                found, x, task.y[rows], jax.random.fold_in(key, i), classes=classes, draws=draws
            )
    return vectors


def embed_questions(
    found: Probe, seed: int, *, size: int, positions: int, draws: int
) -> dict[str, np.ndarray]:
    """Embeddings of question-answering sources, as what a language model learns from them.

    The Fisher information of the model's own next-token distribution, over the tokens of the
    answers, under its own unembedding.

    Args:
        found: a causal language model.
        seed: of the prompts and of the tokens that are drawn.
        size: prompts of each source; fewer where there are not as many.
        positions: tokens of a prompt.
        draws: tokens drawn at each position.

    Returns:
        Vectors by source.
    """
    shape = {"positions": positions, "stride": positions // 2, "longest_question": positions // 3}
    table = found.params["embed"]["tokens"]
    head = Head(table.T, jnp.zeros(table.shape[0], table.dtype))
    vectors = {}
    for name, known in _qa_data.SOURCES.items():
        asked = questions.read(known)
        order = np.random.default_rng([seed, 8]).permutation(len(asked))[:size]
        made = prompts.answered([asked[i] for i in order], found.words, **shape)
        batch = _qa_data.rows_of(made, np.arange(len(made.tokens)))
        rows = fisher(
            with_head(_every(found.hidden)), (found.params, head), taps.taps(found.params),
            {"tokens": batch["tokens"], "mask": batch["mask"]}, jax.random.key(seed),
            labels=sampled(draws), squares=tapped, weights=jnp.asarray(batch["weights"][:, 1:]),
        )  # fmt: skip
        vectors[name] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(rows)])
    return vectors


def share_closer(vectors: Mapping[str, np.ndarray], names: Sequence[str], distance: Any) -> float:
    """How often a half is closer to the other half of its task than to a half of another task."""
    first = [vectors[f"{name}/first"] for name in names]
    second = [vectors[f"{name}/second"] for name in names]
    own = np.array([distance(a, b) for a, b in zip(first, second, strict=True)])
    every = np.array([[distance(a, b) for b in first + second] for a in first + second])
    task = np.tile(np.arange(len(names)), 2)
    other = task[:, None] != task[None]
    return float((own[task][:, None] < every)[other].mean())
