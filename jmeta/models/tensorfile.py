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
        ValueError: a file is truncated or damaged, or two of them hold a tensor of one name; the
            message names the tensor, of those that are cut the first.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, (shape, dtype) in _header(file).items():
            if name in found:
                raise ValueError(f"the tensor {name!r} lies in {found[name].file} and in {file}")
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
        ValueError: the file is damaged, or the dtype is none of numpy's.
    """
    from safetensors import SafetensorError, safe_open

    if stored.dtype not in _NAMES:
        raise ValueError(
            f"{stored.file}: tensor {stored.name!r} has dtype {stored.dtype}, which jmeta does not "
            "read"
        )
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


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names to shapes and dtypes; checks that all tensors are there, each in its own place."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        head = opened.read(length) if length <= size - 8 else b""
    try:
        parsed = json.loads(head)
        parsed.pop("__metadata__", None)
        tensors = {name: _entry(**entry) for name, entry in parsed.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file: its header cannot be read; copy or "
            "download it again"
        ) from error
    size -= 8 + length
    cut = {name: end for name, (*_, end) in tensors.items() if end > size}
    if cut:
        first = min(cut, key=lambda name: cut[name])
        raise ValueError(
            f"{file} is truncated: it ends at byte {8 + length + size}, before the end of "
            f"{len(cut)} of its {len(tensors)} tensors, the first {first!r} of shape "
            f"{list(tensors[first][0])}; copy or download it again"
        )
    last = 0
    for name in sorted(tensors, key=lambda name: tensors[name][2:]):
        shape, dtype, begin, end = tensors[name]
        item = np.dtype(_numpy(dtype)).itemsize if dtype in _NAMES else None
        if begin != last or (item and end - begin != item * math.prod(shape)):
            raise ValueError(
                f"{file} is damaged: it puts the tensor {name!r}, {dtype} of shape {list(shape)}, "
                f"at the bytes {begin} to {end}, and the one before it ends at {last}"
            )
        last = end
    if last != size:
        raise ValueError(f"{file} is damaged: {size - last} bytes follow its last tensor")
    return {name: (shape, dtype) for name, (shape, dtype, *_) in tensors.items()}


def _entry(
    *, dtype: str, shape: list[int], data_offsets: list[int]
) -> tuple[tuple[int, ...], str, int, int]:
    """Shape, dtype, first and last byte of a tensor; anything else is an error."""
    begin, end = data_offsets
    numbers = [*shape, begin, end]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"shape {shape}, bytes {data_offsets}")
    return tuple(shape), str(_DTYPES.get(dtype, dtype)), begin, end
