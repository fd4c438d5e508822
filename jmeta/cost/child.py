"""The process in which a program is compiled for a TPU topology: one request, one row.

Run by ``jmeta.cost.plan`` as ``python -m jmeta.cost.child REQUEST.json ROW.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jmeta.cost.programs import compile_row, made
from jmeta.cost.rows import Candidate, as_json


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compile what is asked for.

    Args:
        request: of ``in_a_child``.

    Returns:
        A row as JSON holds it, or ``{"refused": why}``.

    Example:
        >>> answer({"reference": "nowhere:to_be_found", "candidate": {"estimator": "x", "mesh": {}},
        ...         "steps": 1, "topology": "local", "usable": None, "keep": None})
        {'refused': "'nowhere:to_be_found' cannot be imported: No module named 'nowhere'"}
    """
    candidate = Candidate(**request["candidate"])
    keep = request["keep"]
    try:
        row = compile_row(
            made(request["reference"], candidate.options),
            candidate,
            steps=request["steps"],
            topology=request["topology"],
            usable=request["usable"],
            keep=None if keep is None else Path(keep).write_text,
        )
    except (TypeError, ValueError, NotImplementedError) as error:  # the last: of jax.make_mesh
        return {"refused": str(error)}
    return as_json(row)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answer(asked)), encoding="utf-8")
