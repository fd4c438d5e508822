"""Data of the text experiment: an unlabelled corpus, its vocabulary, and labelled tasks.

Episodes are functions of (seed, step), so that a run can go on where it stopped.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jmeta.core.types import Episode, Steps
from jmeta.data.cache import cache_key, cached_text
from jmeta.data.sources import DataUnavailable, from_datasets
from jmeta.files import cache_dir
from jmeta.tasks import feeding, mlm, superglue
from jmeta.tasks.corpora import name_pattern, stdlib_modules
from jmeta.tasks.corruption import Objective, masked_lm, unlabelled
from jmeta.tasks.episodes import task_generator
from jmeta.tasks.scores import Score, accuracy
from jmeta.tasks.text import Encoded, Example, TextTask, encode
from jmeta.tasks.tokenizer import Unified, train_unified, unified

Batch: TypeAlias = dict[str, Any]
Sample: TypeAlias = Callable[[int, int], Episode]

SUPERGLUE, EMBEDDED = tuple(superglue.TASKS), ("Package", "Same_module")
_PACKAGES = ("asyncio", "email", "unittest")
_OWN = {
    "Package": TextTask("Package", 10, _PACKAGES, ("sep", "cls", "mask")),
    "Same_module": TextTask("Same_module", 11, ("False", "True"), ("sep", "cls")),
}
TASKS = superglue.TASKS | _OWN
_PASSAGE = 200  # characters
_HELD_OUT = 5  # every fifth module of the library is for validation
_TOKENIZER_TEXTS = 20_000
# Streams of the generator, beside those of ``tasks.feeding``.
_TEXT, _LABELLED, _VALIDATION, _TASK_ROWS = range(20, 24)
_KEPT = ("tokens", "mask", "labels", "weights")


class Downstream(NamedTuple):
    """A labelled task.

    Attributes:
        task: what it is called and how its labels are written.
        train: its training examples, as windows.
        val: the examples that are scored, as texts and as windows.
        hidden: the examples of the test split, or None.
        common: the class most frequent in training; of spans None.
    """

    task: TextTask
    train: Encoded
    val: tuple[list[Example], Encoded]
    hidden: tuple[list[Example], Encoded] | None
    common: int | None


class Data(NamedTuple):
    """Everything that is learned from and scored on.

    Attributes:
        words: the vocabulary.
        corpus: the unlabelled text.
        validation: corrupted windows of held-out text, ``[windows, positions]``.
        tasks: the labelled tasks by name.
    """

    words: Unified
    corpus: mlm.Corpus
    validation: Batch
    tasks: dict[str, Downstream]


def load(config: Any) -> Data:
    """Read, tokenise and encode everything; what is missing or wrong is said here.

    Raises:
        DataUnavailable: a corpus or a task is not to be had here.
        ValueError: a task has no labels, or too few examples.
    """
    train, held_out = texts(config)
    words = vocabulary(train, config.vocab)
    corpus, validation = mlm.corpus(train, words), mlm.corpus(held_out, words)
    tasks = {name: _downstream(config, name, words) for name in config.tasks}
    rng, count = task_generator(0, 0, 0, _VALIDATION), config.validation_windows
    # A window at a time: of a short corpus some texts come several times.
    draw = mlm.masked(validation, words, config.positions).draw
    rows = [draw(rng, 1) for _ in range(count)]
    windows = {name: np.concatenate([row[name] for row in rows]) for name in _KEPT}
    return Data(words, corpus, windows, tasks)


def texts(config: Any) -> tuple[list[str], list[str]]:
    """The texts to pre-train on and those held out.

    Raises:
        DataUnavailable: the corpus is not to be had here; the message says what to do.
        ValueError: it has fewer texts than are held out.
    """
    most = config.corpus_texts or None
    if config.corpus == "embedded":
        return list(_library("train").values())[:most], list(_library("val").values())[:most]
    if config.corpus == "wikitext2":
        return wikitext2("train")[:most], wikitext2("valid")
    split = f"train[:{most}]" if most else "train"
    found = from_datasets(
        config.corpus, split=split, config=config.corpus_config or None, columns=["text"]
    )["text"]
    count = config.held_out_texts
    if len(found) <= count:
        raise ValueError(
            f"{config.corpus} has {len(found)} texts, and {count} are held out: lower "
            "held_out_texts"
        )
    return list(found[:-count]), list(found[-count:])


@functools.lru_cache(maxsize=2)
def _library(split: str) -> dict[str, str]:
    """The standard library's modules, name to text; every fifth is for validation."""
    texts = {
        name: path.read_text(encoding="utf-8", errors="replace")
        for i, (name, path) in enumerate(stdlib_modules().items())
        if (i % _HELD_OUT == 0) == (split == "val")
    }
    return {name: text for name, text in texts.items() if text.strip()}


def wikitext2(split: str) -> list[str]:
    """The articles of WikiText-2; a line `` = Title = `` begins one."""
    folder = os.environ.get("JMETA_DATA")
    path = Path(folder or "", "lm", f"wikitext2_{split}.txt.gz")
    if not folder or not path.exists():
        raise DataUnavailable(
            f"corpus wikitext2 is read from $JMETA_DATA/lm/wikitext2_{split}.txt.gz, and "
            + (f"{path} is not there" if folder else "JMETA_DATA is not set")
            + "; --corpus embedded needs no data"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        whole = file.read()
    articles = re.split(r"^ = (?=[^=\n]+ = $)", whole, flags=re.MULTILINE)
    return [article.strip() for article in articles if article.strip()]


def vocabulary(corpus: Sequence[str], size: int) -> Unified:
    """A byte-level BPE of the corpus with the special tokens of the unified format."""
    from tokenizers import Tokenizer

    sample = list(corpus[:_TOKENIZER_TEXTS])
    path = cache_dir() / f"meta-lm-bpe-{cache_key(texts=sample, size=size)}.json"
    return unified(
        cached_text(path, Tokenizer.from_str, lambda: train_unified(sample, size).to_str())
    )


def _downstream(config: Any, name: str, words: Unified) -> Downstream:
    task = TASKS[name]
    train = read_examples(name, "train")
    val = _first(read_examples(name, "val"), config.scored_examples)
    if config.train_examples:
        # Spread over the split: some are sorted by what they are about.
        order = task_generator(0, 0, 0, _TASK_ROWS).permutation(len(train))
        train = [train[i] for i in sorted(order[: config.train_examples])]
    for each, split in ((train, "train"), (val, "val")):
        if any(example.label == -1 for example in each):
            raise ValueError(
                f"{name} has no labels in its {split} split: it can be neither learned nor scored"
            )

    def encoded(examples: list[Example]) -> Encoded:
        return encode(
            task, examples, words, positions=config.positions, stride=config.positions // 2
        )

    hidden = read_examples(name, "test") if config.submit else None
    common = None
    if task.kind == "classes":
        common = int(np.bincount([int(each.label) for each in train]).argmax())
    return Downstream(
        task,
        encoded(train),
        (val, encoded(val)),
        None if hidden is None else (hidden, encoded(hidden)),
        common,
    )


def read_examples(name: str, split: str) -> list[Example]:
    """The examples of a task of SuperGLUE, or of one made of the standard library."""
    if name in superglue.TASKS:
        return superglue.read(name, split)
    if split == "test":
        raise ValueError(f"{name} has no test split: leave out --submit, or this task")
    rng, modules = task_generator(0, 0, 0, _LABELLED), _library(split)
    make = _same_module if name == "Same_module" else _package
    found = make(modules, rng, 400 if split == "train" else 120)
    return [each._replace(idx=i) for i, each in enumerate(found)]


def _passage(text: str, rng: np.random.Generator) -> str:
    begin = int(rng.integers(max(len(text) - _PASSAGE, 0) + 1))
    return text[begin : begin + _PASSAGE]


def _package(modules: dict[str, str], rng: np.random.Generator, count: int) -> list[Example]:
    """Which package is a passage from, its own name masked?"""
    of = [
        [text for name, text in modules.items() if name.split(".")[0] == each] for each in _PACKAGES
    ]
    found = []
    for i in range(count):
        label = i % len(_PACKAGES)
        text = of[label][int(rng.integers(len(of[label])))]
        passage = name_pattern(_PACKAGES[label]).sub("_", _passage(text, rng))
        found.append(Example(passage, None, label))
    return found


def _same_module(modules: dict[str, str], rng: np.random.Generator, count: int) -> list[Example]:
    """Are two passages from the same module?"""
    whole, found = list(modules.values()), []
    for i in range(count):
        a, b = rng.choice(len(whole), 2, replace=False)
        label = i % 2
        second = whole[a] if label else whole[b]
        found.append(Example(_passage(whole[a], rng), _passage(second, rng), label))
    return found


def _first(examples: list[Example], most: int) -> list[Example]:
    """The first examples; a question of MultiRC is not cut in two."""
    if not most or len(examples) <= most:
        return examples

    def question(i: int) -> Any:
        idx = examples[i].idx
        return idx[:2] if isinstance(idx, tuple) else i

    while most < len(examples) and question(most) == question(most - 1):
        most += 1
    return examples[:most]


def score(task: TextTask, predicted: Sequence[Any], examples: Sequence[Example]) -> Score:
    """The official metrics of a task of SuperGLUE, and the accuracy of another."""
    if task.name in superglue.TASKS:
        return superglue.score(task.name, predicted, examples)
    gold = [int(example.label) for example in examples]
    return Score({"accuracy": accuracy(predicted, gold)}, len(examples))


def official(
    task: TextTask, predicted: Sequence[Any], examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Predictions as rows ``{"idx", "label"}``, as the benchmark's server takes them."""
    if task.name in superglue.TASKS:
        return superglue.official(task.name, predicted, examples)
    return [
        {"idx": example.idx, "label": task.classes[int(index)]}
        for index, example in zip(predicted, examples, strict=True)
    ]


def trivial(found: Downstream) -> list[Any]:
    """What needs no network: the most frequent class, or the entity that is mentioned most."""
    examples = found.val[0]
    if found.common is not None:
        return [found.common] * len(examples)
    return [_most_mentioned(example.b or "") for example in examples]


def _most_mentioned(passage: str) -> str:
    names = passage.split("*")[1::2]  # mentions stand between stars
    return max(names, key=names.count) if names else ""


def text_sample(
    config: Any, data: Data, *lead: int, objective: Objective = masked_lm
) -> Callable[[int, int], Batch]:
    """``(seed, step) -> `` corrupted windows ``[*lead, batch, positions]``, texts of a batch apart.

    Raises:
        ValueError: the corpus has fewer texts than a batch.
    """
    source = mlm.masked(data.corpus, data.words, config.positions, objective=objective)
    if source.examples < config.batch:
        raise ValueError(
            f"the corpus has {source.examples} texts, fewer than a batch of {config.batch}"
        )

    def sample(seed: int, step: int) -> Batch:
        rng = task_generator(seed, step, 0, _TEXT)
        drawn = [source.draw(rng, config.batch) for _ in range(math.prod(lead))]
        shape = (*lead, config.batch, config.positions)
        return {name: np.stack([each[name] for each in drawn]).reshape(shape) for name in _KEPT}

    return sample


def corrupted_sample(config: Any, data: Data, objective: Objective) -> Sample:
    """Episodes without a teacher: the corrupted texts of a student's step, in one batch."""
    sample = text_sample(config, data, config.micro_batches, objective=objective)

    def episode(seed: int, step: int) -> Episode:
        batch = sample(seed, step)
        return Episode((), {k: leaf.reshape(-1, leaf.shape[-1]) for k, leaf in batch.items()})

    return episode


def teacher_sample(
    config: Any, data: Data, *, keep: tuple[str, ...], mlm_task: bool, mask_bug: bool
) -> Sample:
    """Episodes of a teacher.

    Each of an outer step's micro-batches is scored on ``tasks_per_batch`` draws of a task, of
    ``samples_per_task`` support and as many query examples, all distinct. With ``mlm_task``, a
    draw is of masked language modelling half of the time.

    Args:
        config: the experiment's configuration.
        data: the data.
        keep: which of the optional entries of the unlabelled batch are needed.
        mlm_task: whether masked language modelling is a labelled task as well.
        mask_bug: count every position that is no padding, whether it has a label or not: the
            labels that are missing are then [PAD], a class like any other.

    Returns:
        ``(seed, step) -> Episode(unlabelled, Episode(support, query))``.

    Raises:
        ValueError: a task has too few examples.
    """
    micro, size = config.micro_batches, config.samples_per_task
    inner = (config.inner_steps,) if config.inner_steps > 1 else ()
    sample = text_sample(config, data, micro, *inner)
    labelled = feeding.meta_batches(
        [feeding.labelled(name, each.train) for name, each in data.tasks.items()],
        size=micro * config.tasks_per_batch,
        samples_per_task=1,  # a draw is of so many examples already
        shots=size,
        queries=size,
        unlabelled=mlm.masked(data.corpus, data.words, config.positions) if mlm_task else None,
    )

    def of_micro(batch: Batch) -> Batch:
        kept = {name: batch[name] for name in _KEPT}
        if mask_bug:
            kept["weights"] = kept["mask"]
        return {name: leaf.reshape(micro, -1, *leaf.shape[1:]) for name, leaf in kept.items()}

    def episode(seed: int, step: int) -> Episode:
        read = unlabelled(sample(seed, step), data.words)
        read = {name: leaf for name, leaf in read.items() if name in ("tokens", "mask", *keep)}
        support, query = map(of_micro, labelled(seed, step))
        return Episode(Steps(read) if inner else read, Episode(support, query))

    return episode
