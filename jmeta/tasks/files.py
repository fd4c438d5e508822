"""Holes in files: what comes next here, with windows of the rest of the same file to learn from.

Support windows are chosen by rare vocabulary, by what they share with the hole's context, or at
random; none of them holds a token of the hole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from jmeta.core.types import Episode, Steps
from jmeta.tasks.episodes import Sample

Choice: TypeAlias = Literal["rare", "shared", "uniform"]
Side: TypeAlias = Literal["before", "both"]


class Files(NamedTuple):
    """Files as one array of tokens.

    Attributes:
        tokens: int32 ``[tokens]``, the files one after the other.
        bounds: int64 ``[files + 1]``, where each begins and the last ends.
        rarity: float64 ``[vocab]``, minus the log of how often a token is in the corpus.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    rarity: np.ndarray


def files(texts: Sequence[np.ndarray], vocab: int, rarity: np.ndarray | None = None) -> Files:
    """Files from their tokens.

    Args:
        texts: int arrays, one for each file.
        vocab: size of the vocabulary.
        rarity: of another corpus, such as the training files'; by default that of these.

    Returns:
        ``Files``; rarity is smoothed by one count for each token.

    Raises:
        ValueError: no file, or a token outside of the vocabulary.

    Example:
        >>> made = files([np.array([0, 0, 0]), np.array([1])], 3)
        >>> made.bounds.tolist(), np.exp(-made.rarity).round(3).tolist()
        ([0, 3, 4], [0.571, 0.286, 0.143])
    """
    if not texts:
        raise ValueError("there is no file")
    tokens = np.concatenate(texts).astype(np.int32)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
        raise ValueError(
            f"tokens run from {tokens.min()} to {tokens.max()}, the vocabulary is {vocab}"
        )
    bounds = np.cumsum([0, *map(len, texts)])
    if rarity is not None:
        return Files(tokens, bounds, rarity)
    counts = np.bincount(tokens, minlength=vocab) + 1.0
    return Files(tokens, bounds, np.log(counts.sum()) - np.log(counts))


def support_windows(
    text: np.ndarray,
    hole: int,
    rarity: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    window: int,
    count: int,
    choose: Choice,
    side: Side,
) -> np.ndarray:
    """Where the support windows of a hole begin.

    Candidates lie side by side, from the hole's context backwards and from the hole onwards, so
    that none overlaps the hole, its context or another.

    Args:
        text: ``[tokens]``, one file.
        hole: index of the hole's first token.
        rarity: ``[vocab]``.
        rng: breaks ties, and chooses where ``choose`` is ``"uniform"``.
        size: tokens of the hole.
        window: tokens of a window; the hole ends one, and the rest of it is the hole's context.
        count: how many are chosen.
        choose: ``"rare"``: those whose distinct tokens are the rarest in sum; ``"shared"``: only
            tokens count that are in the hole's context too; ``"uniform"``: any.
        side: ``"before"`` the hole only, as text is read, or ``"both"``, as a file is edited.

    Returns:
        int ``[count]``, the best last: what an inner loop sees last it remembers best. Fewer
        where the file has fewer candidates.

    Example:
        >>> text, rarity = np.array([9, 1, 1, 9, 2, 3, 1, 1, 9]), np.arange(10.0)
        >>> support_windows(text, 5, rarity, np.random.default_rng(0), size=1, window=2, count=2,
        ...                 choose="rare", side="before").tolist()
        [0, 2]
    """
    start = hole + size - window
    starts = np.arange(start - window, -1, -window)
    if side == "both":
        starts = np.concatenate([starts, np.arange(hole + size, len(text) - window + 1, window)])
    if choose == "uniform":
        return rng.permutation(starts)[:count]
    context = set(text[start:hole].tolist())
    scores = np.empty(len(starts))
    for i, at in enumerate(starts):
        seen = set(text[at : at + window].tolist())
        held = seen & context if choose == "shared" else seen
        scores[i] = rarity[sorted(held)].sum()
    order = np.lexsort((rng.random(len(starts)), scores))
    return starts[order[-count:]] if count else starts[:0]


def holes(
    source: Files,
    *,
    window: int,
    count: int,
    tasks: int,
    size: int = 1,
    choose: Choice = "rare",
    side: Side = "both",
    long_context: int | None = None,
) -> Sample:
    """Tasks of one hole each: a file is drawn, then a hole in it.

    Args:
        source: the files.
        window: tokens of a window, in the support and up to the end of the hole.
        count: support windows, one for each inner step.
        tasks: tasks in a batch.
        size: tokens of a hole.
        choose: how support windows are chosen, as in ``support_windows``.
        side: where they may lie.
        long_context: also give the tokens before the end of the hole, this many, as
            ``query["before"]``: what a model without support could read instead. A file is drawn
            only if it has so many.

    Returns:
        ``(seed, step) -> Episode``: the support ``Steps({"tokens", "weights"})``, each ``[tasks,
        count, window]``; the query ``{"tokens", "weights"}``, ``[tasks, window]``, of the hole's
        context and the hole, where the hole alone weighs. ``query["file"]`` ``[tasks]`` says
        which file it is and ``query["at"]`` where in it the hole begins.

    Raises:
        ValueError: no file is long enough, or a setting has no meaning.

    Example:
        >>> source = files([np.arange(40)], 40)
        >>> episode = holes(source, window=4, count=3, tasks=2)(0, 0)
        >>> episode.support.batches["tokens"].shape, episode.query["weights"][0].tolist()
        ((2, 3, 4), [0.0, 0.0, 0.0, 1.0])
    """
    if choose not in get_args(Choice) or side not in get_args(Side):
        raise ValueError(
            f"choose={choose!r} and side={side!r}; choose one of {get_args(Choice)} and of "
            f"{get_args(Side)}"
        )
    if not 1 <= size < window or min(count, tasks - 1) < 0:
        raise ValueError(
            f"a hole of {size} tokens, windows of {window}, {count} of them and {tasks} tasks: a "
            "hole has a token and some context in its window, and there is at least one task"
        )
    before = max(long_context or 0, window + (count * window if side == "before" else 0))
    lengths = np.diff(source.bounds)
    # Room for the context and for all windows wherever the hole is; a window may be cut on either
    # side of it.
    needed = max(before, window) + (count + 1) * window
    long = np.flatnonzero(lengths >= needed)
    if not len(long):
        raise ValueError(
            f"no file has {needed} tokens: the longest has {lengths.max()}. Ask for shorter "
            "windows or fewer"
        )

    def sample(seed: int, step: int) -> Episode:
        # Holes and windows are drawn apart: the holes are the same however windows are chosen.
        rng, choosing = (np.random.default_rng([seed, step, part]) for part in (0, 1))
        support = np.zeros((tasks, count, window), np.int32)
        query = np.zeros((tasks, window), np.int32)
        earlier = np.zeros((tasks, long_context or 0), np.int32)
        chosen = rng.choice(long, tasks)
        places = rng.integers(before - size, lengths[chosen] - size + 1).astype(np.int32)
        for task, (file, hole) in enumerate(zip(chosen, places.tolist(), strict=True)):
            text = source.tokens[source.bounds[file] : source.bounds[file + 1]]
            starts = support_windows(
                text, hole, source.rarity, choosing,
                size=size, window=window, count=count, choose=choose, side=side,
            )  # fmt: skip
            support[task] = text[starts[:, None] + np.arange(window)]
            query[task] = text[hole + size - window : hole + size]
            earlier[task] = text[hole + size - earlier.shape[1] : hole + size]
        weights = np.zeros((tasks, window), np.float32)
        weights[:, window - size :] = 1
        asked = {
            "tokens": query,
            "weights": weights,
            "file": chosen.astype(np.int32),
            "at": places,
        }
        if long_context:
            asked["before"] = earlier
        learned = {"tokens": support, "weights": np.ones(support.shape, np.float32)}
        return Episode(Steps(learned), asked)

    return sample
