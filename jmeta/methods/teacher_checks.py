"""A teacher's data looked at before the first step: labels, vocabulary and length."""

from __future__ import annotations

from typing import Any

import numpy as np

from jmeta.core.types import Episode, Steps
from jmeta.methods.teacher import require_episodes


def check_teacher(episodes: Episode, *, vocabulary: int, positions: int) -> None:
    """Look at one batch of a text teacher's episodes, and say in plain words what is wrong with it.

    Args:
        episodes: what the teacher's ``estimate`` takes, as arrays.
        vocabulary: entries of the models' embeddings.
        positions: the longest sequence that the models take.

    Raises:
        TypeError: the query is no ``Episode`` of labelled data, or labels are no integers.
        ValueError: a task without a label, a token or a label outside of the vocabulary, a text
            that is longer than the models; the message names the batch and the place.

    Example:
        >>> text = {"tokens": np.full((1, 2, 4), 3), "mask": np.ones((1, 2, 4))}
        >>> named = {**text, "labels": np.full((1, 2, 4), 9), "weights": np.ones((1, 2, 4))}
        >>> task = {name: leaf[:, None] for name, leaf in named.items()}
        >>> check_teacher(Episode(text, Episode(task, task)), vocabulary=9, positions=4)
        Traceback (most recent call last):
        ...
        ValueError: the label at [0, 0, 0, 0] of the labelled support is 9: the vocabulary has 9 \
entries, 0 to 8
    """
    require_episodes(episodes)
    support = episodes.support
    unlabelled = support.batches if isinstance(support, Steps) else support
    _tokens(unlabelled, "unlabelled batch", vocabulary, positions)
    if "masked" in unlabelled:
        _labels(unlabelled["masked"], "corruption of the unlabelled batch", vocabulary)
    for name, batch in (("support", episodes.query.support), ("query", episodes.query.query)):
        if batch is None:
            continue
        where = f"labelled {name}"
        _tokens(batch, where, vocabulary, positions)
        _labels(batch, where, vocabulary)
        counted = np.asarray(batch["weights"]).sum((-2, -1))
        if not counted.all():
            place = np.argwhere(counted == 0)[0].tolist()
            raise ValueError(
                f"the {where} of task {place} (micro-batch, task) has no label that counts: its "
                "weights are all zero, so nothing could be learned from it"
            )


def _tokens(batch: Any, where: str, vocabulary: int, positions: int) -> None:
    tokens = np.asarray(batch["tokens"])
    if tokens.shape[-1] > positions:
        raise ValueError(
            f"the {where} has texts of {tokens.shape[-1]} tokens, and the models take {positions}: "
            f"encode it with positions={positions}, or make the models longer"
        )
    _inside(tokens, np.ones(tokens.shape, bool), f"the token at {{}} of the {where}", vocabulary)
    if "mask" in batch and not np.asarray(batch["mask"]).any(-1).all():
        place = np.argwhere(~np.asarray(batch["mask"]).any(-1))[0].tolist()
        raise ValueError(f"the text at {place} of the {where} is all padding")


def _labels(batch: Any, where: str, vocabulary: int) -> None:
    for name in ("labels", "weights"):
        if name not in batch:
            raise ValueError(f"the {where} has no {name}, only {sorted(batch)}")
    labels, weights = np.asarray(batch["labels"]), np.asarray(batch["weights"])
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"the labels of the {where} are {labels.dtype}; they must be integers")
    if labels.shape != weights.shape:
        raise ValueError(
            f"the {where} has labels {labels.shape} and weights {weights.shape}; each label needs "
            "a weight, 0 where it does not count"
        )
    _inside(labels, weights != 0, f"the label at {{}} of the {where}", vocabulary)


def _inside(values: np.ndarray, counted: np.ndarray, said: str, vocabulary: int) -> None:
    outside = counted & ((values < 0) | (values >= vocabulary))
    if outside.any():
        place = np.argwhere(outside)[0].tolist()
        raise ValueError(
            f"{said.format(place)} is {values[tuple(place)]}: the vocabulary has {vocabulary} "
            f"entries, 0 to {vocabulary - 1}"
        )
