"""The GPT-2 of the question-answering transfer experiment: its start, its training, its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmeta
from experiments import _qa_data as data
from jmeta.core import optim
from jmeta.core.tree import global_norm
from jmeta.core.types import Array, Key, MetaGradient, PyTree
from jmeta.models import gpt2
from jmeta.models.gpt2 import GPT2Config
from jmeta.runtime.evaluate import in_chunks
from jmeta.tasks.episodes import FewShot
from jmeta.tasks.prompts import Prompts
from jmeta.tasks.text import Example
from jmeta.tasks.tokenizer import Vocabulary

CHUNK = 64  # rows per compiled evaluation: one program for every number of rows


class Start(NamedTuple):
    """Where every method begins.

    Attributes:
        config: a language model.
        params: its parameters.
        words: its vocabulary.
    """

    config: GPT2Config
    params: PyTree
    words: Vocabulary


def pretrained(name: str) -> Start:
    """A GPT-2 checkpoint with its tokeniser, from a folder or from the hub.

    Raises:
        FileNotFoundError, DataUnavailable: there is no such checkpoint or tokeniser here.
        ValueError: it is no GPT-2, or its tokeniser has no end of text.
    """
    from jmeta.models.pretrained import from_pretrained
    from jmeta.tasks.tokenizer import load_tokenizer, vocabulary

    found = from_pretrained(name, head="causal_lm")
    if not isinstance(found.config, GPT2Config):
        raise ValueError(f"{name!r} is no GPT-2; this experiment needs a causal language model")
    return Start(found.config, found.params, vocabulary(load_tokenizer(name)))


def text_loss(config: GPT2Config):
    """The loss of a causal language model on the tokens that count: ``(params, batch, key)``."""

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return gpt2.loss(config, params, batch, key)[0], {}

    return loss


def class_loss(config: GPT2Config):
    """The loss of a classifier on top of the last token, and its accuracy."""

    def loss(params: PyTree, batch: PyTree, key: Key) -> tuple[Array, PyTree]:
        return gpt2.loss(config, params, batch, key)

    return loss


def classifier(start: Start, params: PyTree, key: Array) -> tuple[GPT2Config, PyTree]:
    """A language model's body with a new head for two classes."""
    config = start.config._replace(head="classify", labels=2)
    return config, {**params, "head": gpt2.init_head(config, key)}


def reptile(loss: Any, steps: int, rate: float) -> MetaGradient:
    """Reptile over tasks: each starts from the same weights, and the mean of the ends counts."""
    return jmeta.over_tasks(jmeta.methods.reptile(loss, steps=steps, optimizer=optim.adam(rate)))


def decayed(rate: float, steps: int) -> optax.Schedule:
    """A tenth of the steps to warm up, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps))


def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with clipped gradients, as everything here but Reptile's inner loop is trained."""
    return optax.chain(optax.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.01))


def restarted(rate: float, steps: int, stages: int) -> optax.Schedule:
    """``decayed`` once for each stage of a sequence."""
    each = steps // stages
    return optax.join_schedules(
        [decayed(rate, each)] * stages, [each * i for i in range(1, stages)]
    )


def make_answer_scores(config: GPT2Config):
    """``(params, prompts) -> {"loss", "token accuracy", "exact"}`` with gold answers fed in.

    An answer is exact where every one of its tokens, and the end, is the likeliest after the ones
    before: that is when greedy decoding would say the first gold answer, token for token.
    """

    @jax.jit
    def chunk(params: PyTree, batch: PyTree) -> Array:
        logits = gpt2.apply(config, params, {k: batch[k] for k in ("tokens", "mask")})[:, :-1]
        tokens, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
        picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        losses = jax.nn.logsumexp(logits, -1) - picked
        right = (logits.argmax(-1).astype(tokens.dtype) == tokens).astype(logits.dtype)
        wrong = ((1 - right) * weights).sum(-1)
        columns = ((losses * weights).sum(-1), (right * weights).sum(-1), weights.sum(-1), wrong)
        return jnp.stack([*columns[:3], (columns[3] == 0).astype(logits.dtype)], -1)

    def scores(params: PyTree, found: Prompts) -> dict[str, float]:
        part = lambda at: chunk(params, data.rows_of(found, at))  # noqa: E731
        rows = in_chunks(part, len(found.tokens), CHUNK)
        total = rows.sum(0)
        return {
            "loss": float(total[0] / total[2]),
            "token accuracy": float(total[1] / total[2]),
            "exact": float(rows[:, 3].mean()),
        }

    return scores


def make_class_hits(config: GPT2Config):
    """``(params, source) -> float [rows]``: 1 where the class is right."""

    @jax.jit
    def chunk(params: PyTree, batch: PyTree) -> Array:
        scores = gpt2.apply(config, params, {k: batch[k] for k in ("tokens", "mask")})
        return (scores.argmax(-1).astype(jnp.int32) == batch["y"]).astype(scores.dtype)

    def hits(params: PyTree, found: FewShot) -> np.ndarray:
        part = lambda at: chunk(params, data.classes_of(found, at))  # noqa: E731
        return in_chunks(part, len(found.y), CHUNK)

    return hits


def distance(a: PyTree, b: PyTree) -> float:
    """The Euclidean distance of two trees of weights over the length of the first."""
    gap = jax.tree.map(lambda x, y: x - y, a, b)
    return float(global_norm(gap) / global_norm(a))


def bag_of_words(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """Penalised logistic regression on which words occur: 1 where right, ``[test]``."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = CountVectorizer(token_pattern=r"\S+", binary=True)
    fitted = make_pipeline(words, LogisticRegression(max_iter=1000))
    fitted.fit([each.a for each in train], [each.label for each in train])
    predicted = fitted.predict([each.a for each in test])
    return (predicted == np.asarray([each.label for each in test])).astype(float)


def majority(train: Sequence[Example], test: Sequence[Example]) -> np.ndarray:
    """The most frequent class of training: 1 where right, ``[test]``."""
    common = np.bincount([int(each.label) for each in train]).argmax()
    return np.asarray([float(each.label == common) for each in test])
