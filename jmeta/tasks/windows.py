"""Overlapping windows over texts that are longer than a model: every token is in at least one.

A stride is the distance from the start of one window to the start of the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Cut a sequence into windows of at most ``room`` tokens that together hold all of it.

    A stride longer than the room would leave gaps, so the step is the smaller of the two.

    Args:
        length: tokens of the sequence.
        room: tokens a window can hold.
        stride: tokens from the start of one window to the start of the next.

    Returns:
        ``(start, stop)`` of each window, in order; one empty window for an empty sequence.

    Raises:
        ValueError: ``room`` or ``stride`` is not positive, or ``length`` is negative.

    Example:
        >>> windows(10, room=6, stride=3)
        [(0, 6), (3, 9), (6, 10)]
        >>> windows(4, room=6, stride=3)
        [(0, 4)]

    Source:
        The sliding window of BERT's question answering (Devlin et al. 2019), ``doc_stride``.
    """
    if length < 0 or room < 1 or stride < 1:
        raise ValueError(
            f"windows need room for a token and a positive stride, not length={length}, "
            f"room={room}, stride={stride}"
        )
    found = [(0, min(room, length))]
    while found[-1][1] < length:
        start = found[-1][0] + min(stride, room)
        found.append((start, min(start + room, length)))
    return found


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of two sequences fits into ``room`` tokens, the longer one shortened first.

    Args:
        first: tokens of the first sequence.
        second: tokens of the second.
        room: tokens for both.

    Returns:
        The tokens left to each; their sum is ``min(first + second, room)``.

    Example:
        >>> shares(4, 100, 20), shares(50, 100, 21), shares(4, 5, 20)
        ((4, 16), (10, 11), (4, 5))
    """
    if first + second <= room:
        return first, second
    if first > second:  # an odd token goes to the longer, or to the second
        kept = min(second, room // 2)
        return room - kept, kept
    kept = min(first, room // 2)
    return kept, room - kept


def pair_windows(
    first: int, second: int, room: int, stride: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Windows over a pair of sequences: every window of the one beside every window of the other.

    Args:
        first: tokens of the first sequence.
        second: tokens of the second.
        room: tokens for both; at least 2, so that neither is ever squeezed out.
        stride: tokens from one window to the next, in the sequence that is cut.

    Returns:
        ``((start, stop), (start, stop))`` of each window, the first sequence's and the second's.

    Raises:
        ValueError: ``room`` is less than 2, or the stride not positive.

    Example:
        >>> pair_windows(2, 7, room=6, stride=3)
        [((0, 2), (0, 4)), ((0, 2), (3, 7))]
    """
    if room < 2:
        raise ValueError(f"a pair of texts needs room for two tokens, not {room}")
    of_first, of_second = shares(first, second, room)
    return [
        (a, b)
        for a in windows(first, max(of_first, 1), stride)
        for b in windows(second, max(of_second, 1), stride)
    ]


def check_outputs(outputs: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse a model's outputs that do not fit its windows, or are NaN and so an answer like any.

    Args:
        outputs: an array, a row for each window.
        shape: the shape it must have.
        name: what errors call it.

    Raises:
        ValueError: the shape differs, or a row holds NaN; the first such window is named.

    Example:
        >>> check_outputs([[0.0, float("nan")]], (1, 2), "scores")
        Traceback (most recent call last):
        ValueError: scores of window 0 hold NaN: the model has diverged
    """
    values = np.asarray(outputs)
    if values.shape != shape:
        raise ValueError(f"{name} have the shape {values.shape}, not {shape}: a row for a window")
    wrong = np.flatnonzero(np.isnan(values.astype(np.float64)).any(-1))
    if len(wrong):
        raise ValueError(f"{name} of window {wrong[0]} hold NaN: the model has diverged")
