"""Data of continual pre-training: rows of text with a guide beside them, and tasks to fine-tune on.

Batches are functions of (seed, step), so that a run can go on where it stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import _meta_lm_data, _qa_data
from jmeta.core.types import Episode
from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir
from jmeta.tasks import glue, guides, inputs
from jmeta.tasks.bpe import cached_bpe
from jmeta.tasks.scores import Score
from jmeta.tasks.text import Example, TextTask
from jmeta.tasks.tokenizer import Vocabulary, cache_name, token_pieces, vocabulary

GUIDES = ("capitals", "rarity")
_VERSION = 1  # part of the cache key: raise it when rows are made otherwise
_CUT, _BATCH, _BASE, _TUNE = range(30, 34)  # streams of the generator
_TOKENIZER_TEXTS = 300


class Rows(NamedTuple):
    """Text cut into rows ``[CLS] ... [SEP]``.

    Attributes:
        tokens: int32 ``[rows, positions]``.
        guide: bool ``[rows, positions]``, what guided masking may hide.
    """

    tokens: np.ndarray
    guide: np.ndarray


class Downstream(NamedTuple):
    """A task to fine-tune on.

    Attributes:
        task: what it is called, and its classes.
        train: its rows, as ``inputs.batch`` makes them, and ``y``.
        dev: the rows that are scored, likewise.
        examples: the examples of ``dev``.
        trivial: what needs no network: a prediction for each example, the most frequent class or
            the mean score.
    """

    task: TextTask
    train: dict[str, np.ndarray]
    dev: dict[str, np.ndarray]
    examples: list[Example]
    trivial: list[Any]


class Data(NamedTuple):
    """Everything that is learned from and scored on.

    Attributes:
        words: the vocabulary.
        train: rows to pre-train on.
        held_out: rows on which objectives are measured.
        tasks: the tasks by name.
    """

    words: Vocabulary
    train: Rows
    held_out: Rows
    tasks: dict[str, Downstream]


def load(config: Any, words: Vocabulary | None) -> Data:
    """Read, tokenise and cut everything.

    Args:
        config: of the run.
        words: a checkpoint's vocabulary, or None: one is trained on the corpus.

    Raises:
        DataUnavailable: a corpus or a task is not to be had here; the message says what to do.
        ValueError: a corpus is too short, or a task is none.
    """
    train, held_out = _meta_lm_data.texts(config)
    words = own_vocabulary(train, config.vocab) if words is None else words
    cut = [_rows(config, texts, words) for texts in (train, held_out)]
    needed = max(config.batch, config.measured_rows + config.fresh_rows)
    if min(len(each.tokens) for each in cut) < needed:
        raise ValueError(
            f"the corpus has {len(cut[0].tokens)} rows of {config.positions} tokens to train on "
            f"and {len(cut[1].tokens)} held out; at least {needed} of each are needed"
        )
    if config.guide == "rarity":
        rare = guides.rare_tokens(cut[0].tokens, words.size)
        cut = [each._replace(guide=rare[each.tokens]) for each in cut]
    return Data(words, *cut, {name: _downstream(config, name, words) for name in config.tasks})


def own_vocabulary(texts: Sequence[str], size: int) -> Vocabulary:
    """A byte-level BPE of the corpus, with a [CLS] and a [SEP] of its own."""
    sample = list(texts[:_TOKENIZER_TEXTS])
    path = cache_dir() / f"continual-bpe-{cache_key(texts=sample, size=size)}.json"
    return vocabulary(cached_bpe(path, lambda: sample, size))


def _rows(config: Any, texts: Sequence[str], words: Vocabulary) -> Rows:
    before, _, after = inputs.frame(words)
    room = config.positions - len(before) - len(after)
    key = cache_key(
        version=_VERSION, texts=list(texts), tokenizer=cache_name(words), positions=config.positions
    )

    def make() -> dict[str, np.ndarray]:
        tokens, named = [], []
        for text in texts:
            lines = [line for line in re.split(r"\n+", text) if line.strip()]
            for line, pieces in zip(lines, token_pieces(words.tokenizer, lines), strict=True):
                tokens.append(pieces.ids)
                named.append(guides.capitalised(line, pieces))
        flat, marks = np.concatenate(tokens), np.concatenate(named)
        whole = len(flat) // room

        def framed(parts: np.ndarray, start: list[Any], end: list[Any], dtype: Any) -> np.ndarray:
            body = parts[: whole * room].reshape(whole, room)
            sides = [np.tile(np.asarray(side, dtype), (whole, 1)) for side in (start, end)]
            return np.concatenate([sides[0], body, sides[1]], axis=1).astype(dtype)

        none = [False] * len(before), [False] * len(after)
        return {
            "tokens": framed(flat, before, after, np.int32),
            "guide": framed(marks, *none, bool),
        }

    return Rows(**cached_arrays(cache_dir() / f"continual-rows-{key}.npz", make))


def batches(rows: Rows, size: int, seed: int, stream: int) -> Callable[[int], Episode]:
    """``step -> Episode(None, {"tokens", "guide"})``, rows of a batch apart."""

    def batch(step: int) -> Episode:
        rng = np.random.default_rng([seed, stream, step])
        at = rng.choice(len(rows.tokens), size, replace=False)
        return Episode(None, {"tokens": rows.tokens[at], "guide": rows.guide[at]})

    return batch


def base_batches(config: Any, data: Data) -> Callable[[int], Episode]:
    """Rows of the model's first training, the same for all seeds."""
    return batches(data.train, config.base_batch, 0, _BASE)


def continual_batches(config: Any, data: Data, seed: int) -> Callable[[int], Episode]:
    """Rows of continual pre-training, of a seed the same under every sampler."""
    return batches(data.train, config.batch, seed, _BATCH)


def held_out(rows: Rows, low: int, high: int) -> dict[str, np.ndarray]:
    """Some rows, spread over all of them."""
    order = np.random.default_rng([0, _CUT]).permutation(len(rows.tokens))[low:high]
    return {"tokens": rows.tokens[order], "guide": rows.guide[order]}


def tuning_batches(found: Downstream, steps: int, size: int, seed: int) -> dict[str, np.ndarray]:
    """All batches of a fine-tuning, ``[steps, size, ...]``; epochs in random order."""
    rng = np.random.default_rng([seed, _TUNE, len(found.train["y"])])
    count, wanted = len(found.train["y"]), steps * size
    order = np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]
    return {
        name: leaf[order].reshape(steps, size, *leaf.shape[1:])
        for name, leaf in found.train.items()
    }


def _downstream(config: Any, name: str, words: Vocabulary) -> Downstream:
    train, dev = _examples(config, name)
    task = glue.TASKS[name] if name in glue.TASKS else _meta_lm_data.TASKS[name]
    if task.kind == "spans":
        raise ValueError(f"{name} asks for spans; this experiment fine-tunes classes and scores")
    order = np.random.default_rng([0, _CUT, len(train)]).permutation(len(train))
    train = [train[i] for i in order[: config.tune_steps * config.tune_batch]]
    y = np.asarray([each.label for each in train], np.float64)
    common = float(y.mean()) if task.kind == "score" else int(np.bincount(y.astype(int)).argmax())
    rows = [_encoded(config, task, each, words) for each in (train, dev)]
    return Downstream(task, rows[0], rows[1], dev, [common] * len(dev))


def _encoded(
    config: Any, task: TextTask, examples: Sequence[Example], words: Vocabulary
) -> dict[str, np.ndarray]:
    found = inputs.encode([(e.a, e.b) for e in examples], words, positions=config.tune_positions)
    dtype = np.float32 if task.kind == "score" else np.int32
    y = np.asarray([example.label for example in examples], dtype)
    return inputs.batch(found, np.arange(len(examples))) | {"y": y}


def _examples(config: Any, name: str) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to score; of SST-2, whose dev set may be missing, held out here."""
    if name == "SST-2":
        rows = glue.read(name)
        held, left = _qa_data.held_out(rows, config.scored or 2000, 0)
        return [rows[i] for i in left], [rows[i] for i in held]
    if name in glue.TASKS:
        return glue.read(name), glue.read(name, "dev")[: config.scored or None]
    found = [_meta_lm_data.read_examples(name, split) for split in ("train", "val")]
    return found[0], found[1][: config.scored or None]


def score(found: Downstream, predicted: Sequence[Any]) -> float:
    """The mean of a task's official metrics, in per cent."""
    make: Callable[..., Score] = _meta_lm_data.score
    if found.task.name in glue.TASKS:
        official = glue.score(found.task.name, predicted, found.examples)
    else:
        official = make(found.task, predicted, found.examples)
    return float(np.mean(list(official.metrics.values())))
