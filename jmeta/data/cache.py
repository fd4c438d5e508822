"""What is made once and kept: arrays and text in files named after everything they depend on.

A cache is a convenience: any file in it can be deleted, and a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from jmeta.files import write_atomically


def cache_key(**settings: Any) -> str:
    """A short name for a set of settings: other settings, another file.

    Example:
        >>> cache_key(a=1, b="x") == cache_key(b="x", a=1)
        True
    """
    text = json.dumps(settings, sort_keys=True, default=_name)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _name(value: Any) -> str:
    if isinstance(value, np.ndarray):  # a long one is shortened by str
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype}{value.shape}{digest}"
    return str(value)


def cached_arrays(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Read an ``.npz`` file, or make its arrays and write it where it is missing or damaged.

    Args:
        path: the file; what it is called must say everything that ``make`` depends on.
        make: makes the arrays.

    Returns:
        The arrays by name.

    Warns:
        UserWarning: the file is damaged, and made again; or it cannot be written.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        _say_if_damaged(path, error)
    arrays = make()
    _try_to_keep(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    return arrays


def cached_text(path: Path, read: Callable[[str], Any], make: Callable[[], str]) -> Any:
    """Read a text file into an object, or make the text and write it where it is no good.

    Args:
        path: the file; what it is called must say everything that ``make`` depends on.
        read: makes the object of the text, and raises any exception where it cannot.
        make: makes the text.

    Returns:
        ``read`` of the text.

    Warns:
        UserWarning: the file is damaged, and made again; or it cannot be written.
    """
    try:
        return read(path.read_text(encoding="utf-8"))
    except Exception as error:  # whatever the reader raises for a damaged file
        _say_if_damaged(path, error)
    text = make()
    _try_to_keep(path, lambda file: file.write(text.encode()))
    return read(text)


def _say_if_damaged(path: Path, error: Exception) -> None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return
    _warn(f"the cache {path} is damaged ({type(error).__name__}: {error}); it is made again")


def _try_to_keep(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:  # a read-only home: slower the next time, nothing worse
        _warn(
            f"cannot write the cache {path} ({error}); set JMETA_CACHE to a folder that can be "
            "written, or this is made again every time"
        )


def _warn(message: str) -> None:
    warnings.warn(f"jmeta: {message}", stacklevel=4)  # at the caller of the function that caches
