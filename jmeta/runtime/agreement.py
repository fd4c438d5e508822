"""Whether several processes are one run: the same options, the same numbers, one folder.

What they do not agree on would end in a wait without end, or in numbers that are nobody's.
"""

from __future__ import annotations

import pathlib
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jmeta.core.tree import path_name
from jmeta.files import write_atomically
from jmeta.runtime import distributed
from jmeta.runtime.checkpoint import fingerprint
from jmeta.runtime.train import TrainState

_PATIENCE = 6.0  # seconds for which a mounted bucket may still say that a new file is not there


def require_same(asked: Mapping[str, Any]) -> None:
    """The processes were asked for the same; every process must ask.

    Args:
        asked: options by name, the same names in all; their ``repr`` is compared.

    Raises:
        ValueError: an option differs; it is named.

    Example:
        >>> require_same({"steps": 10})
    """
    if jax.process_count() == 1:
        return
    own = [zlib.crc32(repr(value).encode()) for value in asked.values()]
    every = distributed.all_say(np.asarray(own, np.uint32))
    for process, row in enumerate(every):
        for name, first, other in zip(asked, every[0], row, strict=True):
            if first != other:
                raise ValueError(
                    f"process {process} was started with another '{name}' than process 0: give "
                    "all the same options, data and code"
                )


def require_one_start(state: TrainState) -> None:
    """The processes begin with the same numbers: what differs would train to nothing in silence.

    Args:
        state: of each process, before it is laid out on a mesh.

    Raises:
        ValueError: a leaf differs; it is named.
    """
    prints = distributed.all_say(fingerprint(state))
    named = jax.tree_util.tree_leaves_with_path(state)
    for process, row in enumerate(prints):
        for (path, _), mine, theirs in zip(named, prints[0], row, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"process {process} begins with another '{path_name(path)}' than process 0: "
                    "make meta from the same seed in all, and pass the same key="
                )


def require_one_folder(out: pathlib.Path) -> None:
    """All processes see the folder: each would otherwise save a part of a checkpoint nobody has.

    Args:
        out: the run directory.

    Raises:
        ValueError: one of them does not.
    """
    if jax.process_count() == 1:
        return
    mark = out / ".processes"
    if distributed.is_writer():
        write_atomically(mark, f"{jax.process_count()}\n")
    distributed.barrier("the run directory")
    sees = distributed.all_say(_appears(mark))
    if distributed.is_writer():
        mark.unlink()
    if not sees.all():
        raise ValueError(
            f"process {int(np.argmin(sees))} does not see what process 0 writes to {out}: give all "
            "processes one run directory, on a file system or bucket that they share"
        )


def _appears(mark: pathlib.Path) -> bool:
    """Whether a file is there, or soon is."""
    end = time.monotonic() + _PATIENCE
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.2)
    return mark.exists()
