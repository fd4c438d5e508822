"""What ``fit`` asks of its data: an iterator whose whole state is one integer, of steady shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax

from jmeta.core.tree import path_name
from jmeta.core.types import PyTree
from jmeta.data.loader import process_slice
from jmeta.runtime.train import describe


class RecompilationWarning(UserWarning):
    """A step was compiled again, because the shape or dtype of an episode's leaf changed."""


@runtime_checkable
class Batches(Protocol):
    """An iterator over episodes whose position is one integer.

    ``state()`` counts what was consumed (not what was prefetched); ``restore(step)`` goes there.
    """

    def __iter__(self) -> Iterator[PyTree]:
        """Itself."""
        ...

    def __next__(self) -> PyTree:
        """The next batch of episodes."""
        ...

    def state(self) -> int:
        """How many batches were consumed."""
        ...

    def restore(self, step: int) -> None:
        """Go to a position that ``state`` returned."""
        ...


class _FromFunction:
    """``from_function``'s iterator."""

    def __init__(self, batch: Callable[[int], PyTree], process: tuple[int, int]):
        self._batch, self._process, self._step = batch, process, 0

    def __iter__(self) -> Iterator[PyTree]:
        return self

    def __next__(self) -> PyTree:
        batch = process_slice(self._batch(self._step), self._process)
        self._step += 1
        return batch

    def state(self) -> int:
        return self._step

    def restore(self, step: int) -> None:
        self._step = step


def from_function(
    batch: Callable[[int], PyTree], *, process: tuple[int, int] | None = None
) -> Batches:
    """Endless batches from a pure function of the step; ``episode_loader`` also makes them ahead.

    Args:
        batch: ``step -> episodes``, of all processes; the same step must give the same episodes.
        process: ``(index, count)``: which part of the episodes to give; default: this process's.

    Returns:
        An iterator that ``fit`` can resume.

    Raises:
        ValueError: while iterating, tasks that the processes cannot share equally.

    Example:
        >>> batches = from_function(lambda step: step * 10)
        >>> next(batches), next(batches), batches.state()
        (0, 10, 2)
    """
    return _FromFunction(batch, process or (jax.process_index(), jax.process_count()))


def require_batches(batches: Any) -> None:
    """Refuse an iterator that cannot be put back where it was.

    Raises:
        TypeError: it has no ``state()`` and ``restore(step)``.
    """
    if not isinstance(batches, Batches):
        raise TypeError(
            f"batches is a {type(batches).__name__}, whose position cannot be saved. Give fit an "
            "episode_loader(...), or from_function(f) with f: step -> episodes, or add state() and "
            "restore(step) to your iterator"
        )


def recompilation_watch() -> Callable[[Any, PyTree], None]:
    """A function to call with each step's stage and episodes, which warns of a new compilation.

    The first compilation of a stage is expected; a later one, for other shapes, is not.
    """
    seen: set[Any] = set()
    last: dict[Any, Any] = {}

    def watch(stage: Any, episodes: PyTree) -> None:
        leaves, structure = jax.tree.flatten(episodes)
        now = (structure, tuple(describe(leaf) for leaf in leaves))
        if stage in last and (stage, now) not in seen:
            before, after = _by_name(*last[stage]), _by_name(*now)
            changed = [
                f"'{name}' from {before.get(name, 'absent')} to {after.get(name, 'absent')}"
                for name in dict.fromkeys([*before, *after])
                if before.get(name) != after.get(name)
            ]
            warnings.warn(
                "jmeta: the outer step compiles again, because the episodes changed: "
                f"{'; '.join(changed) or 'their structure'}. Pad them to one shape with a mask, "
                "or to a few, to save the time",
                RecompilationWarning,
                stacklevel=3,
            )
        seen.add((stage, now))
        last[stage] = now

    return watch


def _by_name(structure: Any, kinds: tuple[str, ...]) -> dict[str, str]:
    named = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(structure, kinds))
    return {path_name(path): kind for path, kind in named}
