"""Data of the CaMeLS experiment: documents, questions about them, and weights by rule.

Batches are pure functions of the step, so that a run can go on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmeta.core.types import Episode, Steps
from jmeta.tasks import questions, word_weights
from jmeta.tasks.bpe import PAD, SEP, train_bpe
from jmeta.tasks.facts import facts
from jmeta.tasks.questions import Question
from jmeta.tasks.tokenizer import Vocabulary, token_ids, token_pieces, vocabulary

PARTS = ("base", "meta", "validation", "test")
RULES = ("tf-idf", "tf-idf with a threshold", "salient spans", "the answer alone")


class Part(NamedTuple):
    """Documents and one question about each, as tokens.

    Attributes:
        documents: int32 ``[n, length]``, 0 pads.
        questions: int32 ``[n, longest]``: ``Q: ... A: answer`` and a separator.
        answers: float32 ``[n, longest]``, 1 at the answer's tokens and the separator.
        prompts: int32 ``[n]``, the length of each question up to its answer.
        rules: weights of the documents' tokens by rule, float32 ``[n, length]``.
        kinds: int32 ``[n, length]``: 0 for padding, 1 for other tokens, 2 for names and numbers, 3
            for the answer.
        golds: the answers, as text.
    """

    documents: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    prompts: np.ndarray
    rules: dict[str, np.ndarray]
    kinds: np.ndarray
    golds: tuple[tuple[str, ...], ...]


KINDS = {1: "other words", 2: "names and numbers", 3: "the answer"}


class Data(NamedTuple):
    """Everything that one seed reads.

    Attributes:
        words: the vocabulary.
        parts: by name; no document is in two of them.
    """

    words: Vocabulary
    parts: dict[str, Part]


def read(config: Any) -> dict[str, list[Question]]:
    """Questions by part, of different documents.

    Args:
        config: of the run; ``source`` is ``"facts"`` or a data set of ``jmeta.tasks.questions``.

    Returns:
        ``{"base", "meta", "validation", "test"}``, as many as ``config`` says.

    Raises:
        DataUnavailable: the data are not to be had here; the message says what to do.
        ValueError: there are too few documents.
    """
    sizes = dict(zip(PARTS, config.documents, strict=True))
    if config.source == "facts":
        return {part: facts(size, seed=i) for i, (part, size) in enumerate(sizes.items())}
    rng = np.random.default_rng(0)
    train = _one_each(questions.read(config.source, "train"), rng)
    seen = {each.context for each in train}
    held_out = [q for q in questions.read(config.source, "dev") if q.context not in seen]
    test = _one_each(held_out, rng)
    needed = sum(sizes[part] for part in PARTS[:3])
    if len(train) < needed or len(test) < sizes["test"]:
        raise ValueError(
            f"{config.source} has {len(train)} documents to train on and {len(test)} to test on; "
            f"documents={config.documents} asks for {needed} and {sizes['test']}"
        )
    found, first = {}, 0
    for part in PARTS[:3]:
        found[part] = train[first : first + sizes[part]]
        first += sizes[part]
    return found | {"test": test[: sizes["test"]]}


def _one_each(every: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """One question of each document that holds its answer, in random order."""
    chosen: dict[str, Question] = {}
    for i in rng.permutation(len(every)):
        if every[i].answers and every[i].answers[0].strip() and every[i].starts[0] >= 0:
            chosen.setdefault(every[i].context, every[i])
    return list(chosen.values())


def load(config: Any) -> Data:
    """Tokenise everything; the tokeniser and the word frequencies are of the base's documents.

    Args:
        config: of the run.

    Returns:
        The data.
    """
    found = read(config)
    texts = [t for q in found["base"] for t in (q.context, q.question, *q.answers)]
    words = vocabulary(train_bpe(["Q: A:", *texts], config.vocab))
    fitted = word_weights.fit_tf_idf([q.context for q in found["base"]])
    return Data(words, {name: _encode(config, words, fitted, qs) for name, qs in found.items()})


def _encode(config: Any, words: Vocabulary, fitted: Any, asked: Sequence[Question]) -> Part:
    pieces = token_pieces(words.tokenizer, [q.context for q in asked])
    shape = (len(asked), config.length)
    documents, kinds = np.full(shape, PAD, np.int32), np.zeros(shape, np.int32)
    rules = {name: np.zeros(shape, np.float32) for name in RULES}
    rows = np.full((len(asked), config.question_length), PAD, np.int32)
    answers, prompts = np.zeros(rows.shape, np.float32), np.zeros(len(asked), np.int32)
    prompt_ids = token_ids(words.tokenizer, [f"Q: {q.question} A:" for q in asked])
    answer_ids = token_ids(words.tokenizer, [f" {q.answers[0]}" for q in asked])
    rng = np.random.default_rng(0)
    for i, (question, piece) in enumerate(zip(asked, pieces, strict=True)):
        span = (question.starts[0], question.starts[0] + len(question.answers[0]))
        held = word_weights.over_tokens([span], [1.0], piece)
        first = window(held > 0, config.length, rng)
        cut = slice(first, first + config.length)
        count = len(piece.ids[cut])
        documents[i, :count] = piece.ids[cut]
        salient = word_weights.salient(question.context, piece)
        weights, above = (
            word_weights.tf_idf(question.context, piece, fitted, drop=drop)
            for drop in (0.0, config.drop)
        )
        by_rule = zip(RULES, (weights, above, salient, held), strict=True)
        for name, each in by_rule:
            rules[name][i, :count] = each[cut]
        kinds[i, :count] = np.where(held > 0, 3, np.where(salient > 0, 2, 1))[cut]
        said = [*answer_ids[i], SEP][: config.longest_answer]
        prompt = prompt_ids[i][-(config.question_length - config.longest_answer) :]
        prompts[i], last = len(prompt), len(prompt) + len(said)
        rows[i, :last] = [*prompt, *said]
        answers[i, len(prompt) : last] = 1
    golds = tuple(q.answers for q in asked)
    return Part(documents, rows, answers, prompts, rules, kinds, golds)


def window(answer: np.ndarray, length: int, rng: np.random.Generator) -> int:
    """Where a window that holds the answer begins, each such place as likely as the others.

    The answer in the middle of every window would be found without reading it.

    Args:
        answer: which tokens of a document are the answer's, bool ``[tokens]``, at least one.
        length: tokens of the window.
        rng: the generator.

    Returns:
        The window's first token; of a document that is no longer than a window, 0.
    """
    places = np.flatnonzero(answer)
    latest = min(int(places[0]), len(answer) - length)
    # Of an answer that is longer than a window, its beginning.
    earliest = min(max(0, int(places[-1]) + 1 - length), latest)
    return max(0, int(rng.integers(earliest, latest + 1)))


def text(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens with their mask."""
    return {"tokens": tokens, "mask": (tokens != PAD).astype(np.float32)}


def base_batches(config: Any, part: Part, seed: int) -> Callable[[int], Episode]:
    """Batches for the language model: documents, and questions with their answers."""
    longest = max(config.length, config.question_length)

    def padded(rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, ((0, 0), (0, longest - rows.shape[1])))

    every = np.concatenate([padded(part.documents), padded(part.questions)])

    def batch(step: int) -> Episode:
        rng = np.random.default_rng([seed, step])
        return Episode(None, text(every[rng.choice(len(every), config.base_batch)]))

    return batch


def episode(
    data: Data, part: str, rows: np.ndarray, locality: np.ndarray, rule: str | None = None
) -> Episode:
    """A stream of documents in turn, and the questions about them.

    Args:
        data: of the run.
        part: where the documents are from.
        rows: which, ``[..., documents]``.
        locality: documents of the base whose predictions should stay, ``[..., k]``.
        rule: whose weights go with the documents.

    Returns:
        An episode of the problem of ``token_weights``, with leading axes ``[...]``.
    """
    mine, base = data.parts[part], data.parts["base"]
    documents = text(mine.documents[rows][..., None, :])
    if rule is not None:
        documents["given"] = mine.rules[rule][rows][..., None, :]
    asked = {**text(mine.questions[rows]), "answers": mine.answers[rows]}
    query = {"questions": asked, "locality": text(base.documents[locality])}
    return Episode(Steps(documents), query)


def meta_batches(config: Any, data: Data, seed: int) -> Callable[[int], Episode]:
    """Streams of documents to learn weights from."""
    sizes = {name: len(part.documents) for name, part in data.parts.items()}

    def batch(step: int) -> Episode:
        rng = np.random.default_rng([seed, 1, step])
        rows = rng.permutation(sizes["meta"])[: config.stream]
        kept = rng.permutation(sizes["base"])[: config.locality_documents]
        return episode(data, "meta", rows, kept)

    return batch


def streams(config: Any, data: Data, part: str, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Rows of documents and of what should stay, for ``count`` streams to be scored."""
    rng = np.random.default_rng([seed, 2, PARTS.index(part)])
    total, stream = len(data.parts[part].documents), config.stream
    each = max(1, total // stream)
    rows = np.concatenate([rng.permutation(total) for _ in range(-(-count // each) + 1)])
    rows = np.concatenate(
        [rows[i * total : i * total + each * stream] for i in range(len(rows) // total)]
    )[: count * stream].reshape(count, stream)
    base = len(data.parts["base"].documents)
    kept = rng.integers(0, base, (count, config.locality_documents))
    return rows, kept
