"""Where a checkpoint lies: its folder, or huggingface_hub's cache; its index and its JSON files.

An index is believed only in what lies beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def local_folder(
    source: str | os.PathLike[str], patterns: list[str], whole: Callable[[Path], bool]
) -> Path:
    """A local folder, or that of a model on the hub once huggingface_hub has it.

    Args:
        source: a folder, or the name of a model.
        patterns: the files needed.
        whole: whether they are all in a folder; where the cache holds others alone, such as the
            tokeniser's, the rest is downloaded.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    try:
        if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise ValueError("it is no folder, and no name of a model either")
        from huggingface_hub import snapshot_download

        with contextlib.suppress(OSError):  # what is in the cache needs no network
            held = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
            if whole(held):
                return held
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        # Their own messages run over many lines; the last of the causes says enough.
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"{name!r} is neither a local folder nor in huggingface_hub's cache, and could not be "
            f"downloaded ({reason}): give the path of a folder that holds config.json and "
            "model.safetensors, as transformers' save_pretrained writes it"
        ) from error


def listed(folder: Path) -> dict[str, str]:
    """Tensors to files, as the index of a sharded checkpoint has it; empty of a single file."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return {}  # one file comes first, as in transformers: an index may be of a former model
    found = json_object(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{folder / INDEX} has no weight_map of tensors to files")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{folder / INDEX} puts the tensor {name!r} into {file!r}, outside")
    return found


def weights(folder: Path, index: Mapping[str, str]) -> list[Path]:
    """The files of a checkpoint, there or not, as ``listed`` has them."""
    return [folder / name for name in sorted(set(index.values()) or {WEIGHTS})]


def whole(folder: Path) -> bool:
    """Whether a folder holds a checkpoint's ``config.json`` and all of its weights."""
    files = [folder / "config.json", *weights(folder, listed(folder))]
    return all(file.is_file() for file in files)


def json_object(file: Path) -> dict[str, Any]:
    """The contents of a JSON file that holds an object.

    Args:
        file: the file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no JSON, or no object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found
