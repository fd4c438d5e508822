"""The encoder of continual pre-training: its five objectives, where it starts, its fine-tuning."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _continual_data as data
from experiments._reviews_model import minilm_folder
from jmeta import methods
from jmeta.core import optim
from jmeta.core.tree import path_name
from jmeta.core.types import Array, PyTree
from jmeta.methods import Objective
from jmeta.models import bert, pretraining
from jmeta.models.bert import BertConfig
from jmeta.runtime.evaluate import in_chunks
from jmeta.tasks import detection, objectives, sentences
from jmeta.tasks.tokenizer import Vocabulary

NAMES = ("mlm", "emlm", "atd", "dtd", "cse")
HEADS = ("mlm", "added", "deleted", "sentence")
ADAMW = "AdamW"
CHUNK = 64  # rows per compiled evaluation: one program for every number of rows


class Start(NamedTuple):
    """Where continual pre-training begins.

    Attributes:
        config: the shape of the encoder.
        params: its parameters, with all heads.
        words: its vocabulary.
    """

    config: BertConfig
    params: PyTree
    words: Vocabulary


def pretrained(name: str, dropout: float) -> Start:
    """A checkpoint of BERT's kind with its tokeniser, and new heads where it has none.

    Raises:
        FileNotFoundError, DataUnavailable: there is no such checkpoint or tokeniser here.
        ValueError: it is no encoder.
    """
    from jmeta.models.pretrained import from_pretrained
    from jmeta.tasks.tokenizer import load_tokenizer, vocabulary

    folder = minilm_folder() if name == "minilm" else name
    found = from_pretrained(folder, head="masked_lm", key=jax.random.key(0))
    if not isinstance(found.config, BertConfig):
        raise ValueError(f"{name!r} is no encoder of BERT's kind")
    config = found.config._replace(dropout=dropout, attention_dropout=0.0)
    body = {part: found.params[part] for part in ("embed", "blocks")}
    heads = pretraining.init_heads(config, jax.random.key(0), HEADS)
    params = {**body, "heads": heads | {"mlm": found.params["head"]}}
    return Start(config, params, vocabulary(load_tokenizer(folder)))


def small(config: Any, words: Vocabulary) -> Start:
    """An encoder with random weights."""
    shape = BertConfig(
        vocab=words.size, width=config.width, layers=config.layers,
        heads=max(1, config.width // 32), max_len=max(config.positions, config.tune_positions),
        pad_id=words.pad, dropout=config.dropout,
    )  # fmt: skip
    return Start(shape, pretraining.init(shape, jax.random.key(0), HEADS), words)


def five(start: Start, positions: int) -> list[Objective]:
    """MLM, guided MLM, added and deleted tokens, sentence embeddings: those of the paper."""
    return objectives_of(start.config, objectives.words_of(start.words), positions)


def objectives_of(config: BertConfig, words: objectives.Words, positions: int) -> list[Objective]:
    """The five objectives of an encoder and a vocabulary."""
    # No row asks for more than this many of its tokens: the others are never scored.
    most = {share: math.ceil(share * positions) + 1 for share in (0.15, 0.5)}

    def hidden(share: float) -> Callable[..., Any]:
        return functools.partial(pretraining.masked_lm, config, most=most[share])

    def detect(name: str) -> Callable[..., Any]:
        return functools.partial(pretraining.detection, config, name)

    return [
        Objective(
            "mlm", lambda rows, key: objectives.mlm(rows["tokens"], key, words), hidden(0.15)
        ),
        Objective(
            "emlm",
            lambda rows, key: objectives.guided_mlm(rows["tokens"], rows["guide"], key, words),
            hidden(0.5),
        ),
        Objective(
            "atd",
            lambda rows, key: detection.added_tokens(rows["tokens"], key, words),
            detect("added"),
        ),
        Objective(
            "dtd",
            lambda rows, key: detection.deleted_tokens(rows["tokens"], key, words),
            detect("deleted"),
        ),
        Objective(
            "cse",
            lambda rows, key: sentences.twins(rows["tokens"], key, words),
            functools.partial(pretraining.contrast, config),
        ),
    ]


def schedule(rate: float, steps: int) -> optax.Schedule:
    """A linear warm-up over 6 % of the steps, then linearly to zero, as published."""
    warm = max(1, round(0.06 * steps))
    return optax.join_schedules(
        [optax.linear_schedule(0.0, rate, warm), optax.linear_schedule(rate, 0.0, steps - warm)],
        [warm],
    )


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients; no weight decay on biases and normalisations."""

    def decayed(params: PyTree) -> PyTree:
        def is_kernel(path: Any, leaf: Array) -> bool:
            del leaf
            return path_name(path).rpartition(".")[2] not in ("bias", "scale")

        return jax.tree_util.tree_map_with_path(is_kernel, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optim.adamw(schedule(rate, steps), weight_decay=0.01, mask=decayed),
    )


class Rule(NamedTuple):
    """How a task is fine-tuned.

    Attributes:
        optimizer: AdamW -> the transformation.
        weights: ``(params, state) -> params``, what is scored.
    """

    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    weights: Callable[[PyTree, PyTree], PyTree]


PLAIN = Rule(lambda optimizer: optimizer, lambda params, state: params)


def tuner(config: BertConfig, rule: Rule, adam: Any) -> Callable[..., PyTree]:
    """``(params, batches [steps, size, ...], key) -> params``: a whole fine-tuning in a program."""
    optimizer = rule.optimizer(adam)

    @jax.jit
    def tune(params: PyTree, batches: PyTree, key: Array) -> PyTree:
        def step(carry: Any, batch: PyTree) -> tuple[Any, None]:
            params, state, count = carry
            own = jax.random.fold_in(key, count)
            grads = jax.grad(lambda p: bert.loss(config, p, batch, own)[0])(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, count + 1), None

        first = (params, optimizer.init(params), jnp.zeros((), jnp.int32))
        params, state, _ = jax.lax.scan(step, first, batches)[0]
        return rule.weights(params, state)

    return tune


def scorer(config: BertConfig) -> Callable[[PyTree, dict[str, np.ndarray]], np.ndarray]:
    """``(params, rows) -> scores [rows, labels]``, in equal chunks."""
    apply = jax.jit(lambda params, batch: bert.apply(config, params, batch))

    def scores(params: PyTree, rows: dict[str, np.ndarray]) -> np.ndarray:
        part = lambda at: apply(params, {k: rows[k][at] for k in _READ})  # noqa: E731
        return in_chunks(part, len(rows["y"]), CHUNK)

    return scores


_READ = ("tokens", "mask", "segments")


class Tuning(NamedTuple):
    """Fine-tuning compiled once for each number of outputs.

    Attributes:
        tune: outputs -> ``tuner``.
        scores: outputs -> ``scorer``.
        shape: outputs -> the config with its head.
    """

    tune: dict[int, Callable[..., PyTree]]
    scores: dict[int, Callable[..., np.ndarray]]
    shape: dict[int, BertConfig]


def outputs(found: data.Downstream) -> int:
    """How many outputs a task's head has."""
    return 1 if found.task.kind == "score" else len(found.task.classes)


def tuning(
    config: Any, start: Start, tasks: dict[str, data.Downstream], rule: Rule = PLAIN
) -> Tuning:
    """Programs for all tasks."""
    sizes = {outputs(found) for found in tasks.values()}
    adam = adamw(config.tune_lr, config.tune_steps)
    shape = {n: start.config._replace(head="classify", labels=n) for n in sizes}
    return Tuning(
        {n: tuner(each, rule, adam) for n, each in shape.items()},
        {n: scorer(each) for n, each in shape.items()},
        shape,
    )


def fine_tuned(
    config: Any, programs: Tuning, params: PyTree, found: data.Downstream, seed: int
) -> float:
    """The score of a task after fine-tuning on it; head, batches and dropout are a seed's own."""
    n, key = outputs(found), jax.random.fold_in(jax.random.key(seed), found.task.number)
    shape = programs.shape[n]
    body = {part: params[part] for part in ("embed", "blocks")}
    whole = {**body, "head": bert.init_head(shape, key)}
    batches = data.tuning_batches(found, config.tune_steps, config.tune_batch, seed)
    if n == 1:  # scores from 0 to 5, learned as numbers around zero
        batches = {**batches, "y": (batches["y"] - 2.5) / 2.5}
    tuned = programs.tune[n](whole, batches, key)
    scores = programs.scores[n](tuned, found.dev)
    if n == 1:
        return data.score(found, np.clip(scores[:, 0] * 2.5 + 2.5, 0, 5).tolist())
    return data.score(found, scores.argmax(-1).tolist())


def rules(config: Any) -> dict[str, Rule]:
    """AdamW, and dynamic parameter selection around it: stages of 5 % of all steps, as published.

    Raises:
        ValueError: there is no such rule.
    """
    period = max(1, round(0.05 * config.tune_steps))
    known = {
        ADAMW: PLAIN,
        "DPS-dense": Rule(lambda adam: methods.dps(adam, period), PLAIN.weights),
        "DPS-mix": Rule(
            lambda adam: methods.dps_mix(adam, period),
            lambda params, state: optax.tree.get(state, "weights"),
        ),
    }
    wanted = dict.fromkeys((ADAMW, *config.rules))
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"there is no rule {unknown[0]!r} to fine-tune by; choose of {[*known]}")
    return {name: known[name] for name in wanted}
