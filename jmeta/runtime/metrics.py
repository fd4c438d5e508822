"""The numbers of a run: metrics.jsonl, TensorBoard beside it, and both cut back on resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jmeta.core.types import Info, PyTree
from jmeta.files import write_atomically

FILE = "metrics.jsonl"


class MetricsLog(NamedTuple):
    """Where the rows of a run go.

    Attributes:
        write: ``(row) -> None``; ``row`` has ``"step"`` and scalars.
        settle: ``() -> None``: what was written survives the machine.
        close: ``() -> None``.
    """

    write: Callable[[Mapping[str, Any]], None]
    settle: Callable[[], None]
    close: Callable[[], None]


def open_log(out: str | os.PathLike | None, step: int) -> MetricsLog:
    """Append rows to ``out/metrics.jsonl`` and ``out/tensorboard``, from ``step`` on.

    Args:
        out: the run directory, or None for nowhere.
        step: what was restored; later rows of an interrupted run are dropped.

    Returns:
        Three functions.
    """
    if out is None:
        return MetricsLog(lambda row: None, lambda: None, lambda: None)
    out = pathlib.Path(out)
    cut_back(out / FILE, step)
    file = open(out / FILE, "a")  # noqa: SIM115  (closed by close)
    board = _tensorboard(out / "tensorboard", step)

    def write(row: Mapping[str, Any]) -> None:
        strict = {key: None if _not_finite(value) else value for key, value in row.items()}
        with _named(out / FILE):
            file.write(json.dumps(strict) + "\n")
            file.flush()  # in the kernel's hands: a killed process loses no row
        if board is not None:
            for key, value in row.items():
                if key != "step":
                    name = key if "/" in key else f"train/{key}"
                    board.add_scalar(name, value, row["step"])

    def settle() -> None:
        nonlocal file
        with _named(out / FILE):
            os.fsync(file.fileno())
            file.close()  # a mounted bucket has what was written when it is closed, not before
            file = open(out / FILE, "a")  # noqa: SIM115

    def close() -> None:
        file.close()
        if board is not None:
            board.close()

    return MetricsLog(write, settle, close)


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, NaN where a value was not finite, without a half-written row.

    Args:
        path: the file; no file has no rows.

    Returns:
        One dict for each row, in order.
    """
    path = pathlib.Path(path)
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the process was killed while it wrote
            continue
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def cut_back(path: str | os.PathLike, step: int) -> None:
    """Keep the rows up to ``step`` of a metrics.jsonl, atomically.

    Args:
        path: the file; nothing happens if there is none.
        step: the last step that stays.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    lines = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_atomically(path, "".join(lines))


def info_row(info: Info) -> dict[str, float]:
    """An ``Info`` as scalars by name; an array, such as one value for each task, as its mean.

    Args:
        info: fetched to the host.

    Returns:
        ``loss``, ``grad_norm``, ``inner_loss/first``, ``inner_loss/last``, ``aux/...``,
        ``diagnostics/...``.
    """
    row = {"loss": _mean(info.loss), "grad_norm": _mean(info.grad_norm)}
    inner = np.asarray(info.inner_losses)
    if inner.size:
        row["inner_loss/first"] = _mean(inner[..., 0])
        row["inner_loss/last"] = _mean(inner[..., -1])
    for name, tree in (("aux", info.aux), ("diagnostics", info.diagnostics)):
        row.update(scalars(tree, name + "/"))
    return row


def scalars(tree: PyTree, prefix: str = "") -> dict[str, float]:
    """The numbers of a pytree by their path, in folders as TensorBoard shows; arrays as means."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/") or "value", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return {prefix + name: _mean(leaf) for name, leaf in leaves if np.size(leaf)}


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Say which file a full disk or a lost mount has left unwritten."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def _mean(value: Any) -> float:
    return float(np.mean(np.asarray(value).astype(np.float64)))


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _tensorboard(folder: pathlib.Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        warnings.warn(
            "jmeta: tensorboardX is not installed, so there is no TensorBoard log, only "
            "metrics.jsonl: pip install tensorboardX",
            stacklevel=4,
        )
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
