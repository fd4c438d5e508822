"""Where examples come from: Hugging Face data sets, local files, tfds, arrays in memory.

Each constructor gives the same thing, columns of equal length read into memory once.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Columns: TypeAlias = dict[str, Any]  # name -> array [n, ...], or a list of n strings or objects


class DataUnavailable(Exception):
    """A data set is not here, or cannot be read; the message says what to do."""


def from_arrays(**columns: Any) -> Columns:
    """A source of arrays and lists at hand.

    Args:
        **columns: arrays ``[n, ...]`` or lists of strings, all of the same length.

    Returns:
        The columns, numbers as numpy arrays and strings as lists.

    Raises:
        ValueError: the columns differ in length, or there is none.

    Example:
        >>> from_arrays(text=["a", "b"], label=[0, 1])["label"]
        array([0, 1])
    """
    if not columns:
        raise ValueError("a source needs at least one column")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of a source must be equally long, but have {lengths} rows")
    return {name: _column(column) for name, column in columns.items()}


def from_datasets(
    name_or_path: str | os.PathLike[str],
    split: str | None = None,
    config: str | None = None,
    columns: Iterable[str] | None = None,
) -> Columns:
    """Read a Hugging Face data set or a local file into memory.

    Args:
        name_or_path: a local file (``.parquet``, ``.json``, ``.jsonl``, ``.csv``, ``.tsv``,
            ``.arrow``; the text formats also with ``.gz``), a local folder (laid out as on the hub
            or written by ``save_to_disk``), a path inside ``$JMETA_DATA``, or a name on the hub.
        split: ``"train"``, or a slice of it (``"train[:100]"``, ``"train[50%:]"``). A local file
            with a ``split`` column is filtered by it; a file without one is its own ``"train"``
            split. None takes all rows of a file, and the only split of anything else.
        config: the configuration on the hub.
        columns: the columns to read; all by default.

    Returns:
        Columns: numbers as numpy arrays, strings as lists. A ``ClassLabel`` column ``c`` is
        accompanied by a list of strings ``c_name``.

    Raises:
        DataUnavailable: the data set is not to be had, or the file is damaged.
        ValueError: there is no such split or column, or no row.
    """
    path = local_path(name_or_path)
    if path is None:
        return _select(_from_hub(os.fspath(name_or_path), split, config), columns, name_or_path)
    if path.is_dir():
        return _select(_from_folder(path, split, config), columns, path)
    return _select(_rows_of_split(_from_file(path), split, path), columns, path)


def from_tfds(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Columns:
    """Read a prepared TensorFlow Datasets data set into memory, without TensorFlow.

    Args:
        name: the data set's name (``"omniglot"``), or the folder of one prepared version.
        split: a split, or a slice of one (``"train[:50%]"``).
        data_dir: where it was prepared; tfds's own default otherwise.

    Returns:
        Columns: numbers as numpy arrays, text decoded as lists of strings.

    Raises:
        DataUnavailable: the data set is not prepared, or not in the array_record format.
        ValueError: there is no such split, or no row.
    """
    records = _tfds_records(name, split, data_dir)
    if len(records) == 0:
        raise ValueError(f"the split {split!r} of {name!r} holds no example")
    rows = [records[i] for i in range(len(records))]
    return from_arrays(**{key: [row[key] for row in rows] for key in rows[0]})


def _tfds_records(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Any:
    import tensorflow_datasets as tfds

    how = (
        f"prepare it once, where there is a network, with tfds.builder({name!r}, "
        "file_format='array_record').download_and_prepare(), and pass its data_dir"
    )
    try:
        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:  # tfds raises many kinds, not all of them public
        raise DataUnavailable(
            f"tfds has no data set {name!r} here ({_line(error)}); {how}"
        ) from error
    if not builder.info.splits:
        raise DataUnavailable(f"tfds knows {name!r}, but it is not prepared here; {how}")
    kind = builder.info.file_format
    if kind is None or kind.value != "array_record":
        raise DataUnavailable(
            f"the tfds data set {name!r} is stored as {getattr(kind, 'value', kind)}, which cannot "
            f"be read without TensorFlow; {how}"
        )
    if split.split("[")[0] not in builder.info.splits:
        raise ValueError(f"{name!r} has no split {split!r}, only {sorted(builder.info.splits)}")
    try:
        return builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
    except Exception as error:
        raise DataUnavailable(
            f"the tfds data set {name!r} cannot be read ({_line(error)}); {how}"
        ) from error


def _line(error: BaseException) -> str:
    """The first line of an error, short enough to stand inside a sentence."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def local_path(name: str | os.PathLike[str]) -> Path | None:
    """The local file or folder a name stands for; None if it must be a name on the hub.

    Args:
        name: a path, a path inside ``$JMETA_DATA``, or a name on the hub.

    Returns:
        The path that exists, or None.

    Raises:
        DataUnavailable: the name can only be a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    folder = os.environ.get("JMETA_DATA")
    if folder and (Path(folder) / path).exists():
        return Path(folder) / path
    if _reader(path) is not None or path.is_absolute() or len(path.parts) > 2:
        where = f", nor in JMETA_DATA ({folder})" if folder else "; JMETA_DATA is not set"
        raise DataUnavailable(f"there is no file or folder {os.fspath(name)!r} here{where}")
    return None


def _from_hub(name: str, split: str | None, config: str | None) -> Columns:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        data = datasets.load_dataset(name, config, split=split)
    except (OSError, RuntimeError, DatasetsError) as error:
        # No network, no such name, or a data set that is a script: nothing the user can read here.
        raise DataUnavailable(
            f"the data set {name!r} could not be had from the Hugging Face hub ({_line(error)}): "
            "pass the path of a local copy (parquet, JSON, CSV or arrow file, or folder), or set "
            "JMETA_DATA to the folder that holds it; where there is no network, HF_HUB_OFFLINE=1 "
            "makes this message come at once"
        ) from error
    return _one_split(data, name)


def _from_folder(path: Path, split: str | None, config: str | None) -> Columns:
    import datasets
    from datasets.exceptions import DatasetsError

    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    try:
        if not saved:
            return _one_split(datasets.load_dataset(str(path), config, split=split), path)
        data = datasets.load_from_disk(str(path))
    except (OSError, RuntimeError, DatasetsError) as error:
        raise DataUnavailable(f"the folder {path} cannot be read ({_line(error)})") from error
    if split is not None and isinstance(data, Mapping):
        name = split.partition("[")[0]
        if name not in data:
            raise ValueError(f"{path} has no split {name!r}, only {sorted(map(str, data))}")
        data = data[name].select(_positions(split, len(data[name])))
    return _one_split(data, path)


def _one_split(data: Any, name: Any) -> Columns:
    import datasets

    if isinstance(data, Mapping):
        if len(data) != 1:
            raise ValueError(
                f"{name} has the splits {sorted(map(str, data))}: say which, split=..."
            )
        data = next(iter(data.values()))
    columns = _from_table(data.with_format("arrow")[:])
    for key, feature in data.features.items():
        if isinstance(feature, datasets.ClassLabel) and key in columns:
            names = feature.names
            columns[f"{key}_name"] = [names[int(i)] if i >= 0 else "" for i in columns[key]]
    return columns


def _from_file(path: Path) -> Columns:
    read = _reader(path)
    if read is None:
        raise ValueError(f"{path} is by its name no parquet, JSON, JSONL, CSV, TSV or arrow file")
    try:
        return _from_table(read(path))
    # pyarrow's and gzip's own errors are these; a number of more than 64 bits overflows.
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise DataUnavailable(
            f"{path} cannot be read: it is damaged, cut short, or not what its name says "
            f"({_line(error)}); fetch it again"
        ) from error


def _reader(path: Path) -> Callable[[Path], Any] | None:
    """The function that reads a file of this name into an arrow table."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return {
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_json,
    }.get(suffix)


def _read_parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


def _read_arrow(path: Path) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(path).read_all()  # what `datasets` writes
    except pa.ArrowInvalid:
        return pa.ipc.open_file(path).read_all()


def _read_csv(path: Path) -> Any:
    import pyarrow.csv

    tabs = ".tsv" in path.suffixes
    return pyarrow.csv.read_csv(
        path,  # a .gz is unpacked by pyarrow
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if tabs else ",", newlines_in_values=True
        ),
    )


def _read_json(path: Path) -> Any:
    """A list of objects, or one object per line; not `str.splitlines`, which cuts at U+2028."""
    import pyarrow as pa

    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:  # with a byte order mark or without
        if ".jsonl" in path.suffixes:
            rows = [json.loads(line) for line in file if line.strip()]
        else:
            text = file.read()
            try:
                rows = json.loads(text)
            except json.JSONDecodeError:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    rows = rows if isinstance(rows, list) else [rows]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {i} is {row!r:.40}, no object with fields")
    # pyarrow takes the first row's fields for all: name those of every row.
    names = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name) for name in names} for row in rows]
    return pa.Table.from_pylist(rows)


def _from_table(table: Any) -> Columns:
    import pyarrow.types as kinds

    def read(column: Any) -> Any:
        kind = column.type
        if kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind):
            return column.to_numpy()
        return _column(column.to_pylist())

    return {name: read(table[name]) for name in table.column_names}


def _column(values: Any) -> Any:
    """A column as an array where it is rectangular numbers, and as a list where it is not."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "biufc":
        return values
    values = list(values)
    if values and all(isinstance(value, bytes | np.bytes_) for value in values):
        return [value.decode("utf-8") for value in values]
    if values and all(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different shapes
        return values
    return array if array.dtype.kind in "biufc" and len(values) else values


def _rows_of_split(columns: Columns, split: str | None, path: Path) -> Columns:
    if split is None or ("split" not in columns and split == "train"):
        return columns
    name = split.partition("[")[0]
    if "split" not in columns and name != "train":
        raise ValueError(
            f"{path} has no column 'split', so it is its own 'train' split; there is no {name!r}"
        )
    each = columns.get("split", [name] * len(next(iter(columns.values()), [])))
    rows = [i for i, value in enumerate(each) if value == name]
    if not rows and "split" in columns:
        raise ValueError(f"{path} has no split {name!r}, only {sorted(set(each))}")
    rows = [rows[i] for i in _positions(split, len(rows))]
    return {
        key: column[rows] if isinstance(column, np.ndarray) else [column[i] for i in rows]
        for key, column in columns.items()
    }


def _positions(split: str, rows: int) -> range:
    """Which of a split's rows an expression asks for: all, or those of a slice."""
    name, bracket, _ = split.partition("[")
    if not bracket:
        return range(rows)
    if "+" in split:
        raise ValueError(f"the split {split!r} is a sum: read one slice at a time")
    import datasets

    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: rows})
    return range(part.from_, part.to)


def _select(columns: Columns, wanted: Iterable[str] | None, name: Any) -> Columns:
    if not columns or not len(next(iter(columns.values()))):
        raise ValueError(f"{name} holds no example")
    wanted = tuple(columns if wanted is None else wanted)
    missing = [key for key in wanted if key not in columns]
    if missing:
        raise ValueError(f"{name} has no column {missing[0]!r}; its columns are {sorted(columns)}")
    return {key: columns[key] for key in wanted}
