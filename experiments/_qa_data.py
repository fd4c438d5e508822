"""Data of the question-answering transfer experiment: prompts, sentences, and text to model.

Batches are pure functions of the step, so that a run can go on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jmeta.core.types import Episode, Steps
from jmeta.data.cache import cache_key, cached_arrays, cached_text
from jmeta.files import cache_dir
from jmeta.tasks import glue, inputs, prompts, questions
from jmeta.tasks.bpe import train_bpe
from jmeta.tasks.corpora import stdlib_modules
from jmeta.tasks.episodes import FewShot
from jmeta.tasks.questions import Question
from jmeta.tasks.text import Example
from jmeta.tasks.tokenizer import Vocabulary, cache_name, token_ids, vocabulary

SOURCES = {"squad": "squad", "squad2": "squad_v2", "duorc": "duorc"}
"""The sources in the order of the sequence, and what ``questions.read`` calls them."""
SPECIAL = ("<|pad|>", "<|endoftext|>")
RUN, LEAST = 5, 12  # words in a row that may not be shared; words of a held-out sentence

Questions: TypeAlias = dict[str, dict[str, list[Question]]]
Sample: TypeAlias = Callable[[int], Episode]


class Source(NamedTuple):
    """The prompts of one source, with their answers.

    Attributes:
        train: of the training questions.
        dev: of development questions about contexts that no source trains on.
        questions: training questions, and development questions scored.
        constant: share of the latter whose first answer is the most frequent one of training.
    """

    train: prompts.Prompts
    dev: prompts.Prompts
    questions: tuple[int, int]
    constant: float


class Sentiment(NamedTuple):
    """SST-2 as one seed sees it.

    Attributes:
        train: phrases to fine-tune on, in random order.
        validation: sentences for the learning curves.
        test: sentences for the numbers reported.
        phrases: all examples that could be trained on; ``train`` is of the first.
        sentences: the examples of ``test``.
    """

    train: FewShot
    validation: FewShot
    test: FewShot
    phrases: list[Example]
    sentences: list[Example]


def read_questions() -> Questions:
    """Questions by source and split, the development part without contexts that are trained on.

    SQuAD's and SQuAD 2.0's parts may share articles: what one trains on, the other must not
    be scored on.

    Raises:
        DataUnavailable: a source is neither under ``$JMETA_DATA`` nor on the hub.
        ValueError: a source has no development question left.
    """
    train = {name: questions.read(known) for name, known in SOURCES.items()}
    seen = {question.context for each in train.values() for question in each}
    found: Questions = {}
    for name, known in SOURCES.items():
        dev = [each for each in questions.read(known, "dev") if each.context not in seen]
        if not dev:
            raise ValueError(f"every development context of {name} is trained on by some source")
        found[name] = {"train": train[name], "dev": dev}
    return found


def contexts(found: Questions) -> list[str]:
    """The texts that the training questions of all sources are about, each once."""
    return list(dict.fromkeys(each.context for part in found.values() for each in part["train"]))


def library() -> list[str]:
    """The modules of the running Python's standard library as texts."""
    return [
        path.read_text(encoding="utf-8", errors="replace") for path in stdlib_modules().values()
    ]


def small_vocabulary(texts: Sequence[str], size: int) -> Vocabulary:
    """A byte-level BPE of the text that the small GPT-2 is trained on, with an end of text."""
    from tokenizers import Tokenizer

    path = cache_dir() / f"qa-transfer-bpe-{cache_key(texts=list(texts), size=size)}.json"
    made = cached_text(
        path, Tokenizer.from_str, lambda: train_bpe(texts, size, special=SPECIAL).to_str()
    )
    return vocabulary(made)


def stream(texts: Sequence[str], words: Vocabulary) -> np.ndarray:
    """Texts as one stream of tokens, each ended by the end of text; kept on disk.

    Returns:
        int32 ``[tokens]``.

    Raises:
        ValueError: the vocabulary has no end of text.
    """
    end = words.eos
    if end is None:
        raise ValueError("the tokeniser has no end of text, so that texts would run together")

    def make() -> dict[str, np.ndarray]:
        parts = [[*ids, end] for ids in token_ids(words.tokenizer, texts)]
        return {"tokens": np.concatenate(parts).astype(np.int32)}

    key = cache_key(texts=list(texts), tokenizer=cache_name(words))
    return cached_arrays(cache_dir() / f"qa-transfer-text-{key}.npz", make)["tokens"]


def source(
    part: dict[str, list[Question]], words: Vocabulary, *, positions: int, most: int
) -> Source:
    """Encode a source; of its development questions a fixed random sample of at most ``most``."""
    order = np.random.default_rng(0).permutation(len(part["dev"]))[:most]
    dev = [part["dev"][i] for i in np.sort(order)]
    size = {"positions": positions, "stride": positions // 2, "longest_question": positions // 3}
    said = [each.answers[0] if each.answers else prompts.UNANSWERABLE for each in part["train"]]
    common = Counter(said).most_common(1)[0][0]
    asked = [each.answers[0] if each.answers else prompts.UNANSWERABLE for each in dev]
    return Source(
        prompts.answered(part["train"], words, **size),
        prompts.answered(dev, words, **size),
        (len(said), len(dev)),
        sum(each == common for each in asked) / len(asked),
    )


def held_out(examples: Sequence[Example], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Sentences to score on, and the rows that may then be trained on.

    SST-2's training file holds the phrases of its sentences as rows of their own, so that a
    random row is mostly known from others. Here no two held-out sentences, and no held-out
    sentence and training row, share five words in a row; shorter rows are no part of a held-out
    sentence at all.

    Args:
        examples: rows of SST-2.
        count: sentences wanted.
        seed: decides which.

    Returns:
        Indices of the sentences and of the training rows, both in random order.

    Raises:
        ValueError: there are not as many sentences, or nothing is left to train on.
    """
    rows = [tuple(each.a.split()) for each in examples]
    order = np.random.default_rng([seed, 2]).permutation(len(rows)).tolist()
    taken: set[tuple[str, ...]] = set()
    held: list[int] = []
    for i in order:
        runs = _runs(rows[i], RUN)
        if len(held) < count and len(rows[i]) >= LEAST and not runs & taken:
            held.append(i)
            taken |= runs
    parts = {run for i in held for size in range(1, RUN) for run in _runs(rows[i], size)}

    def apart(row: tuple[str, ...]) -> bool:
        return not _runs(row, RUN) & taken if len(row) >= RUN else row not in parts

    chosen = set(held)
    left = [i for i in order if i not in chosen and apart(rows[i])]
    if len(held) < count or not left:
        raise ValueError(
            f"SST-2 has {len(held)} sentences of {LEAST} words that share no {RUN} words in a row "
            f"and {len(left)} rows apart from them; {count} sentences are to be held out"
        )
    return held, left


def _runs(words: tuple[str, ...], size: int) -> set[tuple[str, ...]]:
    """All runs of as many words."""
    return {words[i : i + size] for i in range(len(words) - size + 1)}


def sentiment(
    examples: Sequence[Example],
    words: Vocabulary,
    seed: int,
    *,
    positions: int,
    rows: int,
    validation: int,
    test: int,
) -> Sentiment:
    """SST-2 cut for one seed.

    Args:
        examples: all rows.
        words: the model's vocabulary.
        seed: decides the cut.
        positions: tokens of a row.
        rows: training rows encoded; fewer where there are not as many.
        validation: sentences for the learning curves.
        test: sentences for the numbers reported.

    Returns:
        The parts.

    Raises:
        ValueError: see ``held_out``.
    """
    held, left = held_out(examples, validation + test, seed)
    parts = {"train": left[:rows], "validation": held[:validation], "test": held[validation:]}
    encoded = {
        name: inputs.labelled(
            glue.TASKS["SST-2"], [examples[i] for i in part], words, positions=positions
        )
        for name, part in parts.items()
    }
    return Sentiment(
        **encoded,
        phrases=[examples[i] for i in left],
        sentences=[examples[i] for i in parts["test"]],
    )


def rows_of(found: prompts.Prompts, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Prompts as a batch for the loss of a causal language model."""
    return {"tokens": found.tokens[rows], "mask": found.mask[rows], "weights": found.weights[rows]}


def classes_of(found: FewShot, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Sentences as a batch for the loss of a classifier."""
    return {
        "tokens": found.x["tokens"][rows],
        "mask": found.x["mask"][rows],
        "y": found.y[rows].astype(np.int32),
    }


def _drawn(name: str, found: Source, size: int, seed: int, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 3, list(SOURCES).index(name), step])
    return rows_of(found.train, rng.integers(0, len(found.train.tokens), size))


def in_sequence(sources: dict[str, Source], size: int, steps: int, seed: int) -> Sample:
    """Batches of one source after the other, as many of each."""
    names, each = list(sources), steps // len(sources)

    def sample(step: int) -> Episode:
        name = names[step // each]
        return Episode((), _drawn(name, sources[name], size, seed, step))

    return sample


def mixed(sources: dict[str, Source], size: int, seed: int) -> Sample:
    """Batches over all sources; their rows take turns, so that each source has equally many."""
    names = list(sources)

    def sample(step: int) -> Episode:
        drawn = {name: _drawn(name, sources[name], size, seed, step) for name in names}
        turn = (step * size + np.arange(size)) % len(names)
        stacked: Any = {k: np.stack([drawn[name][k] for name in names]) for k in drawn[names[0]]}
        return Episode((), {k: leaf[turn, np.arange(size)] for k, leaf in stacked.items()})

    return sample


def by_task(sources: dict[str, Source], size: int, inner: int, seed: int) -> Sample:
    """For Reptile: every source is a task, with one batch for each inner step."""

    def sample(step: int) -> Episode:
        tasks = [
            [_drawn(name, each, size, seed, step * inner + i) for i in range(inner)]
            for name, each in sources.items()
        ]
        keys = tasks[0][0]
        stacked = {k: np.stack([[batch[k] for batch in task] for task in tasks]) for k in keys}
        return Episode(Steps(stacked))

    return sample


def windows_of(streams: Sequence[np.ndarray], size: int, positions: int, seed: int) -> Sample:
    """Random windows of streams of tokens, the streams in turn, to model as language."""
    for found in streams:
        if len(found) <= positions:
            raise ValueError(f"a text of {len(found)} tokens holds no window of {positions}")

    def sample(step: int) -> Episode:
        rng = np.random.default_rng([seed, 4, step])
        rows = []
        for i in range(size):
            found = streams[(step * size + i) % len(streams)]
            begin = int(rng.integers(0, len(found) - positions))
            rows.append(found[begin : begin + positions])
        ones = np.ones((size, positions), np.float32)
        return Episode((), {"tokens": np.stack(rows), "mask": ones, "weights": ones})

    return sample


def phrases(found: FewShot, size: int) -> Sample:
    """Batches of a source in its own order, from the beginning again when it ends."""

    def sample(step: int) -> Episode:
        rows = (step * size + np.arange(size)) % len(found.y)
        return Episode((), classes_of(found, rows))

    return sample


def counted(sample: Sample, steps: int) -> tuple[int, int]:
    """Positions and real tokens that a training sees, counted batch by batch.

    Args:
        sample: makes the batch of a step.
        steps: outer steps.

    Returns:
        Positions, padding included, and tokens without it.
    """
    positions, tokens = 0, 0
    for step in range(steps):
        episode = sample(step)
        support = episode.support
        batch = support.batches if isinstance(support, Steps) else episode.query
        positions, tokens = positions + batch["mask"].size, tokens + int(batch["mask"].sum())
    return positions, tokens
