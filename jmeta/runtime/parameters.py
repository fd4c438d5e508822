"""Parameters as a single safetensors file: one user's adapted model, to keep or to send.

Not pickled; the file appears whole or not at all, and a damaged one is found out.
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmeta.core.types import PyTree
from jmeta.files import write_atomically

_MAX_SHOWN = 5


def save_params(
    path: str | os.PathLike, tree: PyTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write nested dicts of arrays to one safetensors file: an adapted model, for instance.

    Args:
        path: the file, replaced atomically.
        tree: nested dicts with string keys; a leaf's name in the file is its keys joined by ``/``.
        metadata: what JSON can hold, kept in the file's header.

    Raises:
        TypeError: a node that is not a dict, or a leaf that is not a plain array; it is named.
        ValueError: a key that contains ``/`` or is empty.
        OSError: the disk is full or not writable; a file that was there stays whole.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/ann.safetensors"
        ...     save_params(path, {"head": {"w": jnp.ones(2)}}, {"user": "ann"})
        ...     tree, metadata = load_params(path)
        >>> tree["head"]["w"].tolist(), metadata
        ([1.0, 1.0], {'user': 'ann'})
    """
    from safetensors.numpy import save as to_bytes

    arrays: dict[str, np.ndarray] = {}
    empty: list[str] = []
    _flatten(tree, "", arrays, empty)
    header = {"metadata": dict(metadata or {}), "empty": empty, "crc32": _crc_arrays(arrays)}
    content = to_bytes(arrays, metadata={"format": "np", "jmeta": json.dumps(header)})
    try:
        write_atomically(pathlib.Path(path), content)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def load_params(path: str | os.PathLike) -> tuple[PyTree, dict[str, Any]]:
    """Read a file of ``save_params``, or any safetensors file.

    Args:
        path: the file.

    Returns:
        The nested dicts of jax arrays, equal bit for bit to those saved, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no parameter file {path}")
    try:
        with safe_open(path, framework="np") as file:
            notes = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(notes["jmeta"]) if "jmeta" in notes else None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was truncated or "
            "damaged; copy or save it again"
        ) from error
    if header is not None and header["crc32"] != _crc_arrays(arrays):
        raise ValueError(f"{path} is damaged: its checksum differs; copy or save it again")
    narrowed = [n for n, a in arrays.items() if jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype]
    if narrowed:
        warnings.warn(
            f"jmeta: {path} holds 64-bit arrays ({', '.join(narrowed[:_MAX_SHOWN])}) that become "
            '32-bit, because jax_enable_x64 is off: jax.config.update("jax_enable_x64", True)',
            stacklevel=2,
        )
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        _descend(tree, parents)[last] = jnp.asarray(np.array(array))  # not a view of the file
    for name in header["empty"] if header else []:
        _descend(tree, name.split("/") if name else [])
    return tree, header["metadata"] if header else dict(notes)


def _flatten(node: Any, name: str, arrays: dict[str, np.ndarray], empty: list[str]) -> None:
    if isinstance(node, Mapping):
        if not node:
            empty.append(name)
        for key, child in node.items():
            if not isinstance(key, str):
                raise TypeError(f"under '{name}' is the key {key!r}: keys must be strings")
            if "/" in key or not key:
                raise ValueError(
                    f"under '{name}' is the key {key!r}: it may not be empty or hold /"
                )
            _flatten(child, f"{name}/{key}" if name else key, arrays, empty)
        return
    if not name or not hasattr(node, "dtype") or not hasattr(node, "shape"):
        raise TypeError(
            f"'{name or '(the whole tree)'}' is a {type(node).__name__}: a parameter file holds "
            "nested dicts of arrays; turn lists and tuples into dicts, and put other values into "
            "metadata"
        )
    if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        raise TypeError(f"'{name}' is a PRNG key: save jax.random.key_data(key) instead")
    # A copy in C order: safetensors writes a strided array's buffer as it lies, without an error.
    arrays[name] = np.array(node, order="C")


def _descend(tree: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    for key in keys:
        tree = tree.setdefault(key, {})
    return tree


def _crc_arrays(arrays: Mapping[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), crc))
    return crc
