"""A prefetching loader whose whole state is one integer: the step of the next batch.

What a batch holds is a function of (seed, step) alone; threads only make it ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

# grain's index is a Python integer; a run never gets here.
_FOREVER = 2**40


def process_slice(batch: Any, process: tuple[int, int]) -> Any:
    """The part of a global batch that belongs to one process: a contiguous block of the first axis.

    Args:
        batch: a pytree of arrays with the same leading axis.
        process: ``(index, count)``.

    Returns:
        The same pytree with the leading axis divided by ``count``.

    Raises:
        ValueError: the leading axis of a leaf is not a multiple of ``count``.

    Example:
        >>> import numpy as np
        >>> process_slice(np.arange(6), (1, 2))
        array([3, 4, 5])
    """
    index, count = process

    def part(path: Any, leaf: Any) -> Any:
        if len(leaf) % count:
            raise ValueError(
                f"the batch leaf {jax.tree_util.keystr(path) or 'batch'} has {len(leaf)} rows, "
                f"which {count} processes cannot share equally: make the batch (its number of "
                f"tasks) a multiple of {count}"
            )
        each = len(leaf) // count
        return leaf[index * each : (index + 1) * each]

    return batch if count == 1 else jax.tree_util.tree_map_with_path(part, batch)


class EpisodeLoader(Iterator[Any]):
    """An endless iterator over batches that can be saved and restored; see ``episode_loader``."""

    def __init__(self, make: Callable[[int], Any], start: int, threads: int, prefetch: int) -> None:
        self._make = make
        self._threads = threads
        self._prefetch = prefetch
        self._batches: Any = None
        self.restore(start)

    def __iter__(self) -> EpisodeLoader:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            raise ValueError("this loader is closed; restore(step) opens it again")
        batch = next(self._batches)
        self._step += 1
        return batch

    def state(self) -> int:
        """The step of the next batch to be consumed: one more than the last one taken."""
        return self._step

    def restore(self, step: int) -> None:
        """Continue at that step, as if every batch before it had been consumed."""
        import grain

        if step < 0:
            raise ValueError(f"a step is not negative, got {step}")
        self.close()
        self._step = int(step)
        steps = grain.MapDataset.range(self._step, _FOREVER).map(self._make)
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=self._prefetch if self._threads else 0
        )
        self._batches = iter(steps.to_iter_dataset(options))

    def close(self) -> None:
        """Stop the threads and drop what they made ahead; harmless when done twice."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def episode_loader(
    sample: Callable[[int, int], Any],
    *,
    seed: int,
    start: int = 0,
    threads: int = 2,
    prefetch: int = 8,
    process: tuple[int, int] | None = None,
) -> EpisodeLoader:
    """Iterate over ``sample(seed, 0), sample(seed, 1), ...``, made ahead by threads.

    Args:
        sample: a pure function ``(seed, step) -> batch``: the *global* batch, a pytree of numpy
            arrays with a leading task (or example) axis. It is called from several threads.
        seed: the seed of the data order.
        start: the step of the first batch.
        threads: threads that make batches; 0 makes each batch when it is asked for.
        prefetch: batches made ahead at most.
        process: ``(index, count)``: which part of the global batch to give; default: this
            process's, by ``jax.process_index()`` and ``jax.process_count()``.

    Returns:
        An endless iterator with ``state() -> int``, the step of the next batch to be consumed
        (whatever was made ahead), ``restore(step)`` and ``close()``.

    Raises:
        ValueError: a bad ``process``, ``threads`` or ``prefetch``; while iterating, a global batch
            that the processes cannot share equally.

    Example:
        >>> import numpy as np
        >>> loader = episode_loader(lambda seed, step: np.array([seed, step]), seed=7)
        >>> next(loader), next(loader), loader.state()
        (array([7, 0]), array([7, 1]), 2)
        >>> loader.close()
    """
    from absl import flags

    process = process or (jax.process_index(), jax.process_count())
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process is (index, count) with 0 <= index < count, not {process}")
    if threads < 0 or prefetch < 1:
        raise ValueError(f"threads={threads} must be at least 0 and prefetch={prefetch} at least 1")
    if not flags.FLAGS.is_parsed():  # grain reads absl flags, which a plain script never parses
        flags.FLAGS(["jmeta"])
    return EpisodeLoader(
        lambda step: process_slice(sample(seed, int(step)), process), start, threads, prefetch
    )
