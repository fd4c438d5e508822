"""Documents of the adaptive language models: files of the standard library, or articles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments._meta_lm_data import wikitext2
from jmeta.data.cache import cache_key
from jmeta.files import cache_dir
from jmeta.tasks.bpe import cached_bpe
from jmeta.tasks.corpora import stdlib_modules
from jmeta.tasks.episodes import partition_classes, task_generator
from jmeta.tasks.tokenizer import load_tokenizer, token_ids

FRACTIONS = (0.7, 0.1, 0.2)
_SHORTEST = 64  # tokens of a document that is scored
_HELD_OUT = 60  # training articles of WikiText-2 on which rates are chosen
_DRAWS = 30  # a stream of the generator


class Rows(NamedTuple):
    """The beginnings of documents.

    Attributes:
        tokens: int32 ``[documents, length + 1]``, 0 after the end.
        mask: float32, 1 for tokens.
    """

    tokens: np.ndarray
    mask: np.ndarray


class Data(NamedTuple):
    """What is trained on and what is scored.

    Attributes:
        vocab: size of the vocabulary.
        train: the training documents, each int32 ``[tokens]``.
        validation: documents on which settings are chosen.
        test: documents that are scored.
        counts: ``[vocab]``, how often each token occurs in training.
    """

    vocab: int
    train: list[np.ndarray]
    validation: Rows
    test: Rows
    counts: np.ndarray


def load(config: Any) -> Data:
    """Read, split and tokenise the corpus.

    Raises:
        DataUnavailable: it is not to be had here.
        ValueError: documents are too few or too short.
    """
    if config.corpus == "embedded":
        parts = by_package()
    else:
        train, test = wikitext2("train"), wikitext2("valid")
        parts = [train[:-_HELD_OUT], train[-_HELD_OUT:], test]
    if config.model == "decoder":
        key = cache_key(texts=parts[0], size=config.vocab)
        path = cache_dir() / f"adaptive-lm-bpe-{key}.json"
        tokenizer = cached_bpe(path, lambda: parts[0], config.vocab)
    else:
        tokenizer = load_tokenizer(config.model)
    train, validation, test = (token_ids(tokenizer, texts) for texts in parts)
    vocab = tokenizer.get_vocab_size()
    counts = np.bincount(np.concatenate(train), minlength=vocab)
    return Data(
        vocab,
        [ids for ids in train if len(ids) > 1],
        beginnings(validation, config.length, config.validation_documents),
        beginnings(test, config.length, config.test_documents),
        counts,
    )


def by_package() -> list[list[str]]:
    """Files of the standard library for training, validation and test; no package is in two."""
    files: dict[str, list[str]] = {}
    for module, path in stdlib_modules().items():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            files.setdefault(module.split(".")[0], []).append(text)
    names = list(files)
    parts = partition_classes(len(names), FRACTIONS, seed=0)
    return [[text for i in sorted(part) for text in files[names[i]]] for part in parts]


def beginnings(documents: Sequence[np.ndarray], length: int, most: int) -> Rows:
    """The first ``length + 1`` tokens of documents spread over all that are long enough.

    Raises:
        ValueError: there is none.
    """
    found = [ids for ids in documents if len(ids) > min(_SHORTEST, length)]
    if not found:
        raise ValueError(f"no document has more than {min(_SHORTEST, length)} tokens to score")
    chosen = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
    return _padded([found[i][: length + 1] for i in chosen], length + 1)


def _padded(pieces: Sequence[np.ndarray], width: int) -> Rows:
    tokens = np.zeros((len(pieces), width), np.int32)
    mask = np.zeros((len(pieces), width), np.float32)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
        mask[row, : len(piece)] = 1
    return Rows(tokens, mask)


def sampler(data: Data, length: int, batch: int) -> Callable[[int, int], Rows]:
    """``(seed, step) -> Rows``: pieces of training documents, drawn by their number of tokens.

    A piece may begin half a length before its document does, and begins there then: beginnings
    are what is scored.
    """
    sizes = np.array([len(ids) for ids in data.train])
    shares = sizes / sizes.sum()

    def sample(seed: int, step: int) -> Rows:
        rng = task_generator(seed, step, 0, _DRAWS)
        pieces = []
        for i in rng.choice(len(sizes), batch, p=shares):
            begin = int(rng.integers(-(length // 2), max(sizes[i] - length, 1)))
            begin = max(begin, 0)
            pieces.append(data.train[i][begin : begin + length + 1])
        return _padded(pieces, length + 1)

    return sample


def unigram(data: Data, rows: Rows) -> np.ndarray:
    """Losses ``[documents, length]`` of the training text's token frequencies, plus one each."""
    log_share = np.log(data.counts + 1.0) - math.log(float((data.counts + 1.0).sum()))
    return -log_share[rows.tokens[:, 1:]].astype(np.float32)


def seen_before(rows: Rows) -> np.ndarray:
    """How often the token at each scored place has occurred in its document before it."""
    counts = np.zeros((rows.tokens.shape[0], rows.tokens.shape[1] - 1), np.int64)
    for row, tokens in enumerate(rows.tokens):
        seen: dict[int, int] = {}
        for place, token in enumerate(tokens.tolist()):
            if place:
                counts[row, place - 1] = seen.get(token, 0)
            seen[token] = seen.get(token, 0) + 1
    return counts
