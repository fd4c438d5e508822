"""Product reviews of many domains: sentiment as few-shot domain adaptation.

A task is a domain; its support and its query are disjoint reviews of it, and all domains share
their two labels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmeta.core.types import Episode
from jmeta.data.sources import Columns
from jmeta.tasks import inputs
from jmeta.tasks.episodes import Sample, task_generator
from jmeta.tasks.rows import label, read_columns, rows_of, text
from jmeta.tasks.text import HIDDEN
from jmeta.tasks.tokenizer import Vocabulary

LABELS = ("negative", "positive")  # 0 and 1
LOW_RESOURCE = ("automotive", "computer_&_video_games", "office_products")
LOCAL = "amazon/amazon_fewshot.jsonl.gz"


class Reviews(NamedTuple):
    """Labelled texts of several domains.

    Attributes:
        texts: ``[n]`` texts.
        labels: int32 ``[n]``, 0 negative and 1 positive.
        domains: int32 ``[n]``, which of ``names``.
        names: the names of the domains, sorted.
        dropped: rows left out because their domain holds the same text already.
    """

    texts: list[str]
    labels: np.ndarray
    domains: np.ndarray
    names: tuple[str, ...]
    dropped: int


def read(
    path: str | os.PathLike[str] | None = None,
    split: str = "train",
) -> Reviews:
    """Read reviews: objects with the fields ``text``, ``label`` and ``domain``.

    Texts that a domain holds twice, up to case and outer blanks, are kept once, so that support
    and query never share one. Where they are labelled differently, neither is kept.

    Args:
        path: a file or folder, or a name on the hub; by default the copy under
            ``$JMETA_DATA/amazon``.
        split: the split, where the data tell splits apart; the copy is its own ``"train"``.

    Returns:
        The reviews.

    Raises:
        DataUnavailable: the data are not to be had here; the message says what to do.
        ValueError: a field is missing, a label is unknown or hidden, or a text is empty; the row
            and the field are named.
    """
    local = LOCAL if split == "train" else None  # it tells no splits apart
    return from_columns(read_columns(path, split, local, None), str(path or "the reviews"))


def from_columns(columns: Columns, name: str = "the reviews") -> Reviews:
    """Reviews of columns ``text``, ``label`` and ``domain``; see ``read``.

    Example:
        >>> rows = {"text": ["good", "bad", "Good "], "domain": ["pens"] * 3}
        >>> reviews = from_columns({**rows, "label": ["positive", "negative", "positive"]})
        >>> reviews.labels.tolist(), reviews.dropped
        ([1, 0], 1)
    """
    kept: dict[tuple[str, str], tuple[str, int]] = {}
    contradicted: set[tuple[str, str]] = set()
    rows = rows_of(columns, name)
    for row in rows:
        said, domain, found = text(row, "text"), text(row, "domain"), label(row, LABELS, LABELS)
        if found == HIDDEN:
            raise ValueError(
                f"{row.where}, field 'label': there is none; ask for the split with labels, or "
                "drop these rows"
            )
        for field, value in (("text", said), ("domain", domain)):
            if not value.strip():
                raise ValueError(f"{row.where}, field {field!r} is empty")
        key = (domain, said.strip().casefold())
        if kept.setdefault(key, (said, found))[1] != found:
            contradicted.add(key)
    for key in contradicted:
        del kept[key]
    names = tuple(sorted({domain for domain, _ in kept}))
    number = {domain: i for i, domain in enumerate(names)}
    return Reviews(
        [said for said, _ in kept.values()],
        np.asarray([found for _, found in kept.values()], np.int32),
        np.asarray([number[domain] for domain, _ in kept], np.int32),
        names,
        len(rows) - len(kept),
    )


def hold_out(reviews: Reviews, names: Iterable[str] = LOW_RESOURCE) -> tuple[Reviews, Reviews]:
    """Set domains aside for testing; what they hold leaves the other domains too.

    Args:
        reviews: all reviews.
        names: the domains to set aside.

    Returns:
        The reviews of the other domains, without texts that a held-out domain also holds, and
        the reviews of the held-out domains.

    Raises:
        ValueError: there is no such domain, or none is left.
    """
    names = tuple(names)
    numbers = [_number(reviews, name) for name in names]
    held = np.isin(reviews.domains, numbers)
    seen = {said.strip().casefold() for said, h in zip(reviews.texts, held, strict=True) if h}
    fresh = np.asarray([said.strip().casefold() not in seen for said in reviews.texts])
    if not (~held & fresh).any() or not held.any():
        raise ValueError(f"holding out {names} leaves no review on one of the sides")
    return _rows(reviews, ~held & fresh), _rows(reviews, held)


def _number(reviews: Reviews | Encoded, name: str) -> int:
    if name not in reviews.names:
        raise ValueError(f"there is no domain {name!r}; the domains are {sorted(reviews.names)}")
    return reviews.names.index(name)


def _rows(reviews: Reviews, keep: np.ndarray) -> Reviews:
    present = np.unique(reviews.domains[keep])
    renumber = np.searchsorted(present, reviews.domains[keep]).astype(np.int32)
    return Reviews(
        [said for said, k in zip(reviews.texts, keep, strict=True) if k],
        reviews.labels[keep],
        renumber,
        tuple(reviews.names[i] for i in present),
        reviews.dropped,
    )


class Encoded(NamedTuple):
    """Reviews as tokens.

    Attributes:
        tokens: uint16 or int32 ``[n, positions]``, ``[CLS] text [SEP]`` padded at the end.
        length: int32 ``[n]``, tokens before the padding.
        labels: int32 ``[n]``, 0 negative and 1 positive.
        domains: int32 ``[n]``, which of ``names``.
        names: the names of the domains.
        cut: how many texts were longer and lost their end.
    """

    tokens: np.ndarray
    length: np.ndarray
    labels: np.ndarray
    domains: np.ndarray
    names: tuple[str, ...]
    cut: int


def encode(reviews: Reviews, vocabulary: Vocabulary, *, positions: int = 128) -> Encoded:
    """Tokenise reviews once and keep the result on disk.

    Args:
        reviews: the reviews.
        vocabulary: ``vocabulary(tokenizer)`` of the model; without [CLS] and [SEP], as GPT-2's,
            its end of text follows the text.
        positions: tokens of a review, special tokens included; longer ones lose their end.

    Returns:
        The tokens.

    Raises:
        ValueError: no position is left for the text.
    """
    tokens, length, _, cut = inputs.encode(reviews.texts, vocabulary, positions=positions)
    return Encoded(tokens, length, reviews.labels, reviews.domains, reviews.names, cut)


def sizes(reviews: Reviews | Encoded) -> dict[str, tuple[int, int]]:
    """How many negative and how many positive reviews each domain holds."""
    counts = np.zeros((len(reviews.names), 2), int)
    np.add.at(counts, (reviews.domains, reviews.labels), 1)
    return {name: (int(n), int(p)) for name, (n, p) in zip(reviews.names, counts, strict=True)}


def describe(reviews: Reviews | Encoded) -> str:
    """A Markdown table of the domains, with n and how many are positive."""
    lines = ["| domain | n | positive |", "| --- | ---: | ---: |"]
    for name, (negative, positive) in sizes(reviews).items():
        lines.append(f"| {name} | {negative + positive:,} | {positive:,} |")
    lines.append(
        f"| all {len(reviews.names)} | {len(reviews.labels):,} | {reviews.labels.sum():,} |"
    )
    return "\n".join(lines)


def at_least(reviews: Encoded, examples: int) -> tuple[str, ...]:
    """The names of the domains with at least that many reviews."""
    return tuple(name for name, (n, p) in sizes(reviews).items() if n + p >= examples)


def batch(encoded: Encoded, rows: Any) -> dict[str, Any]:
    """Reviews as a batch: ``{"x": {"tokens", "mask"}, "y", "mask"}``, as ``episodes`` makes them.

    Args:
        encoded: the reviews.
        rows: int array of any shape.

    Returns:
        ``x["tokens"]`` int32 and ``x["mask"]`` float32 ``[*rows, positions]``; ``y`` int32 and
        ``mask`` float32 ``[*rows]``, all 1.
    """
    rows = np.asarray(rows, np.int64)
    tokens = encoded.tokens[rows].astype(np.int32)
    mask = np.arange(tokens.shape[-1]) < encoded.length[rows][..., None]
    return {
        "x": {"tokens": tokens, "mask": mask.astype(np.float32)},
        "y": encoded.labels[rows],
        "mask": np.ones(rows.shape, np.float32),
    }


def domain_episodes(
    encoded: Encoded,
    *,
    shots: int,
    queries: int,
    tasks: int,
    domains: Sequence[str] | None = None,
) -> Sample:
    """Episodes of one domain each: K reviews to learn from, others of the same domain to answer.

    A domain is drawn with a probability in proportion to its size (the domain of a random
    review); its reviews without replacement, whatever their labels. So a support may hold one
    class alone, as it does in life.

    Args:
        encoded: the reviews.
        shots: support reviews of an episode, in all.
        queries: query reviews.
        tasks: episodes per batch.
        domains: the domains to draw from; all by default.

    Returns:
        ``(seed, step) -> Episode`` of batches ``{"x": {"tokens", "mask"}, "y", "mask"}`` with
        leading axes ``[tasks, shots]`` and ``[tasks, queries]``.

    Raises:
        ValueError: a domain holds fewer than ``shots + queries`` reviews; all such are named.

    Example:
        >>> rows = synthetic(["pens", "ink"], 12)
        >>> from jmeta.tasks.bpe import train_bpe
        >>> from jmeta.tasks.tokenizer import vocabulary
        >>> source = encode(rows, vocabulary(train_bpe(rows.texts, 300)), positions=16)
        >>> domain_episodes(source, shots=4, queries=6, tasks=3)(0, 0).query["y"].shape
        (3, 6)
    """
    drawn = draws(encoded, shots=shots, queries=queries, tasks=tasks, domains=domains)

    def sample(seed: int, step: int) -> Episode:
        rows = drawn(seed, step)
        return Episode(
            support=batch(encoded, rows[:, :shots]), query=batch(encoded, rows[:, shots:])
        )

    return sample


def draws(
    encoded: Encoded,
    *,
    shots: int,
    queries: int,
    tasks: int,
    domains: Sequence[str] | None = None,
) -> Any:
    """Like ``domain_episodes``, but the rows in place of the reviews.

    Returns:
        ``(seed, step) -> int64 [tasks, shots + queries]``, the support first.
    """
    if shots < 0 or queries < 0 or shots + queries < 1 or tasks < 1:
        raise ValueError(f"no episode has shots={shots}, queries={queries}, tasks={tasks}")
    names = encoded.names if domains is None else tuple(domains)
    rows = [np.flatnonzero(encoded.domains == _number(encoded, name)) for name in names]
    needed = shots + queries
    short = [f"{n} has {len(r)}" for n, r in zip(names, rows, strict=True) if len(r) < needed]
    if short or not names:
        raise ValueError(
            f"{', '.join(short) or 'no domain'}, needs {needed} ({shots} support + {queries} "
            "query): ask for fewer, or for the domains of at_least(encoded, "
            f"{needed})"
        )
    weights = np.asarray([len(each) for each in rows]) / sum(len(each) for each in rows)

    def one(rng: np.random.Generator) -> np.ndarray:
        domain = rows[rng.choice(len(rows), p=weights)]
        return rng.choice(domain, needed, replace=False)

    return lambda seed, step: np.stack([one(task_generator(seed, step, t)) for t in range(tasks)])


_WORDS: Mapping[str, Sequence[str]] = {
    "negative": ("broken", "awful", "returned", "waste", "poor", "useless"),
    "positive": ("great", "love", "perfect", "works", "excellent", "happy"),
}
_FILLER = ("the", "product", "it", "was", "bought", "this", "after", "a", "week", "really")


def synthetic(domains: Sequence[str], each: int, *, seed: int = 0) -> Reviews:
    """Made-up reviews of the same schema, for tests and for machines without data.

    Half of each domain is positive; every review holds two words of its sentiment and a word of
    its domain among filler.

    Args:
        domains: the names of the domains.
        each: reviews of a domain.
        seed: decides the words.

    Returns:
        The reviews; a domain may lose some to duplicates where ``each`` is very large.

    Example:
        >>> sizes(synthetic(["pens"], 10))
        {'pens': (5, 5)}
    """
    rng = np.random.default_rng([seed, each])
    columns: Columns = {"text": [], "label": [], "domain": []}
    for domain in domains:
        for i in range(each):
            sentiment = LABELS[i % 2]
            words = [*rng.choice(_WORDS[sentiment], 2), domain, *rng.choice(_FILLER, 8), str(i)]
            columns["text"].append(" ".join(rng.permutation(words).tolist()))
            columns["label"].append(sentiment)
            columns["domain"].append(domain)
    return from_columns(columns)
