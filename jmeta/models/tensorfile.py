"""Safetensors files read and written tensor by tensor, so that no second copy of a model exists.

Reading goes through the safetensors library; its writer would first copy every tensor to bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jmeta.files import write_atomically

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {short: name for name, short in _NAMES.items()}


class Stored(NamedTuple):
    """A tensor that lies in a file.

    Attributes:
        file: the file.
        name: its name there.
        shape: its shape.
        dtype: the name of its dtype, such as ``"bfloat16"``.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Lazy(NamedTuple):
    """A tensor that is made when it is written.

    Attributes:
        shape: its shape.
        dtype: the name of its dtype.
        make: makes the array.
    """

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]


def contents(files: Iterable[Path]) -> dict[str, Stored]:
    """What some safetensors files hold, read from their headers alone.

    Args:
        files: the files.

    Returns:
        ``{name: Stored}``.

    Raises:
        ValueError: a file is truncated or damaged; the message names the first tensor that is cut.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, (shape, dtype, _) in _header(file).items():
            found[name] = Stored(file, name, shape, dtype)
    return found


def read(stored: Stored, index: tuple[slice, ...] = ()) -> np.ndarray:
    """One tensor, or a part of it, in an array of its own.

    Args:
        stored: where it lies.
        index: a slice for each of its axes; empty: all of it.

    Returns:
        A numpy array (bfloat16 by ml_dtypes).

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Opened for one tensor and closed again: what stays mapped would count as resident.
        with safe_open(stored.file, framework="numpy") as file:
            if not index or not stored.shape:
                return file.get_tensor(stored.name)
            return file.get_slice(stored.name)[index]
    except SafetensorError as error:
        raise ValueError(
            f"{stored.file}: tensor {stored.name!r} cannot be read: {error}"
        ) from error


def write(path: Path, tensors: Mapping[str, Lazy]) -> Path:
    """Write a safetensors file atomically, one tensor in memory at a time.

    Args:
        path: the file.
        tensors: what it is to hold.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> stored = write(file, {"x": Lazy((2,), "int32", lambda: np.arange(2, dtype="int32"))})
        >>> read(contents([stored])["x"]).tolist()
        [0, 1]
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers insists on
    end = 0
    # The widest first, so that every tensor is aligned to its own item size.
    order = sorted(tensors, key=lambda name: -np.dtype(_numpy(tensors[name].dtype)).itemsize)
    for name in order:
        shape, dtype, _ = tensors[name]
        begin, end = end, end + math.prod(shape) * np.dtype(_numpy(dtype)).itemsize
        header[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]
        }  # fmt: skip
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def pour(file: IO[bytes]) -> None:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            # A strided array would be written as if it were not: transposes are copied first.
            array = np.ascontiguousarray(tensors[name].make())
            file.write(array.reshape(-1).view(np.uint8).data)

    return write_atomically(path, pour)


def _numpy(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return dtype


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Names to shapes, dtypes and last bytes; checks that all of it is there."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        head = opened.read(length) if length <= size - 8 else b""
    try:
        parsed = json.loads(head)
        parsed.pop("__metadata__", None)
        tensors = {
            name: (
                tuple(entry["shape"]),
                str(_DTYPES.get(entry["dtype"], entry["dtype"])),
                entry["data_offsets"][1],
            )
            for name, entry in parsed.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file: its header cannot be read; copy or "
            "download it again"
        ) from error
    cut = {name: end for name, (_, _, end) in tensors.items() if 8 + length + end > size}
    if cut:
        first = min(cut, key=lambda name: cut[name])
        raise ValueError(
            f"{file} is truncated: it ends at byte {size}, before the end of {len(cut)} of its "
            f"{len(tensors)} tensors, the first {first!r} of shape {list(tensors[first][0])}; copy "
            "or download it again"
        )
    return tensors
