"""Timing programs against one another: in turns, the hopeless leave early.

In turns, so that a busy machine disturbs all alike; a program leaves once it is far behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

from jmeta.cost.measured import median, turn

Name = TypeVar("Name", bound=Hashable)

# Who is this many times slower than the best after so many timed runs leaves.
BEHIND = (2.5, 1.5, 1.3, 1.2)
SHORT = 0.1  # seconds: of anything shorter a single run says little, so that nobody leaves by it
ENOUGH = 0.5  # seconds: a short program is timed more often, up to LONGEST times
LONGEST = 15


def race(
    programs: Mapping[Name, Callable[[], Any]],
    repeats: int = 5,
    seen: Callable[[Name, Any], None] = lambda name, answer: None,
) -> dict[Name, list[float]]:
    """Run programs in turns, and fewer of them as it becomes clear who is slow.

    Args:
        programs: ``{name: function without arguments}``.
        repeats: timed runs of those that stay, after one that warms up; more, up to 15, of
            programs that take less than half a second together.
        seen: called once with the name and the answer of each.

    Returns:
        ``{name: seconds of each timed run}``; who left early has fewer, at the least one.

    Example:
        >>> seconds = race({"a": lambda: jax.numpy.ones(2), "b": lambda: time.sleep(0.05)})
        >>> len(seconds["a"]) > len(seconds["b"]) > 0
        True
    """
    seconds: dict[Name, list[float]] = {name: [] for name in programs}
    first: dict[Name, float] = {}
    for name, run in programs.items():
        spent, answer = _timed(run)
        seen(name, answer)
        del answer  # two gradients at once are more memory than was asked for
        first[name] = spent
    short = min(first.values()) < SHORT
    # A program far behind in its first run is timed once more, for the table, and leaves.
    running = [name for name in programs if short or first[name] <= BEHIND[0] * min(first.values())]
    for name in programs:
        if name not in running:
            seconds[name].append(_timed(programs[name])[0])
    for rounds in range(1, max(repeats, LONGEST) + 1):
        for name in turn(running, rounds):
            seconds[name].append(_timed(programs[name])[0])
        quickest = min(min(seconds[name]) for name in running)
        enough = sum(seconds[running[0]]) > ENOUGH or rounds >= LONGEST
        if rounds >= repeats and (enough or len(running) == 1):
            break
        if not short or rounds >= 3:
            limit = BEHIND[min(rounds, len(BEHIND) - 1)] * quickest
            running = [name for name in running if min(seconds[name]) <= limit]
    return seconds


def fastest_of(seconds: Mapping[Name, list[float]], cost: Mapping[Name, float]) -> Name:
    """The name with the least median; of those within 2 % of it, the one of least cost.

    Args:
        seconds: of ``race``.
        cost: of each name, such as its memory.

    Returns:
        A name.

    Example:
        >>> fastest_of({"a": [1.0], "b": [1.01], "c": [2.0]}, {"a": 3, "b": 2, "c": 1})
        'b'
    """
    best = min(median(values) for values in seconds.values())
    near = [name for name, values in seconds.items() if median(values) <= 1.02 * best]
    return min(near, key=lambda name: cost[name])


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    answer = jax.block_until_ready(run())
    return time.perf_counter() - begin, answer
