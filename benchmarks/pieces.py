"""A benchmark in pieces: each is measured once and kept, so that a long one can be run in parts.

A piece is a list of rows in ``OUT/pieces/NAME.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jmeta.files import write_atomically

Rows = list[dict[str, Any]]


def piece(out: Path, name: str, make: Callable[[], Rows], *, wanted: bool, resume: bool) -> Rows:
    """The rows of one piece: those kept, or measured now.

    Args:
        out: the run directory.
        name: of the piece.
        make: measures it.
        wanted: whether this call measures it; where not, only what is kept counts.
        resume: whether what is kept is taken instead of measuring again.

    Returns:
        Rows; none where the piece is not wanted and was never measured.
    """
    file = out / "pieces" / f"{name}.json"
    if file.exists() and (resume or not wanted):
        return json.loads(file.read_text(encoding="utf-8"))
    if not wanted:
        return []
    rows = make()
    write_atomically(file, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return rows
