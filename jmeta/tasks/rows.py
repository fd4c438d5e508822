"""Rows of a data set, read field by field: what is missing or strange is named by row and field."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmeta.data.sources import Columns, DataUnavailable, from_datasets, local_path
from jmeta.tasks.text import HIDDEN


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
        values: its fields.
        where: what errors call it, such as ``"row 3 of BoolQ"``.
    """

    values: Mapping[str, Any]
    where: str


def rows_of(columns: Columns, name: str) -> list[Row]:
    """The rows of columns of equal length.

    Example:
        >>> rows_of({"a": ["x"], "n": np.array([1])}, "mine")[0].where
        'row 0 of mine'
    """
    count = len(next(iter(columns.values())))
    return [
        Row({key: _plain(column[i]) for key, column in columns.items()}, f"row {i} of {name}")
        for i in range(count)
    ]


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    # A column of numbers with a gap is read as floats, with NaN in the gap.
    return None if isinstance(value, float) and value != value else value


def field(row: Row, name: str) -> Any:
    """A field that must be there.

    Raises:
        ValueError: it is missing or null.
    """
    value = row.values.get(name)
    if value is None:
        raise ValueError(
            f"{row.where} has no field {name!r}; its fields are {sorted(_given(row.values))}"
        )
    return value


def text(row: Row, name: str) -> str:
    """A field that must be there and be text, which may be empty.

    Raises:
        ValueError: it is missing, no text, or holds half of a surrogate pair.
    """
    value = field(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{row.where}, field {name!r}: {value!r} is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{row.where}, field {name!r}: character {error.start} is half of a surrogate pair "
            f"({value[error.start : error.end]!a}), so the file was decoded wrongly"
        ) from error
    return value


def inner(row: Row, values: Any, where: str) -> Row:
    """An object inside a row, as a row of its own.

    Raises:
        ValueError: it is no object.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{row.where}, field {where!r}: {values!r} is no object with fields")
    return Row(values, f"{row.where}, {where}")


def label(row: Row, classes: Sequence[str], order: Sequence[str], name: str = "label") -> int:
    """The index of a row's class; ``HIDDEN`` where the label is missing, empty or -1.

    Args:
        row: the row. A field ``{name}_name``, as data sets with class labels have, wins.
        classes: the classes in the order of their indices here.
        order: the classes in the order of the integers that stand for them in the data.
        name: the field.

    Raises:
        ValueError: the value is none of the classes.

    Example:
        >>> label(Row({"label": True}, "row 0"), ("False", "True"), ("False", "True"))
        1
    """
    value = row.values.get(f"{name}_name")
    value = row.values.get(name) if value is None else value
    if value is None or value == "" or (value == -1 and not isinstance(value, bool)):
        return HIDDEN
    if isinstance(value, str):
        found = {each.casefold(): i for i, each in enumerate(classes)}.get(value.casefold())
        if found is not None:
            return found
    elif value in range(len(order)):  # True and False are 1 and 0
        return list(classes).index(order[int(value)])
    raise ValueError(
        f"{row.where}, field {name!r}: {value!r} is none of {tuple(order)}, nor one of their "
        f"numbers 0..{len(order) - 1}, nor -1 for a hidden label"
    )


def read_columns(
    path: str | os.PathLike[str] | None,
    split: str,
    local: str | None,
    hub: tuple[str, str | None] | None,
) -> Columns:
    """Columns of a file the user names, of a copy under ``$JMETA_DATA``, or from the hub.

    Args:
        path: what the user names: a file, a folder, a name on the hub; or None.
        split: the split.
        local: where the copy lies under ``$JMETA_DATA``, or None.
        hub: name and configuration on the hub, or None.

    Returns:
        The columns.

    Raises:
        DataUnavailable: there is neither; the message says what to do.
    """
    if path is not None:
        found = local_path(path)
        # A file is what the user says it is, unless it tells splits apart itself.
        whole = found is not None and found.is_file()
        columns = from_datasets(path, split=None if whole else split)
        if whole and "split" in columns:
            return from_datasets(path, split=split)
        return columns
    folder = os.environ.get("JMETA_DATA")
    if folder and local and os.path.exists(os.path.join(folder, local)):
        columns = from_datasets(os.path.join(folder, local))
        if "split" in columns:
            return from_datasets(os.path.join(folder, local), split=split)
        return columns
    if hub is None:
        raise DataUnavailable(
            f"there is no {split} split here: JMETA_DATA is {folder or 'not set'}, where "
            f"{local or 'no copy'} is looked for; pass path=..."
        )
    name, config = hub
    return from_datasets(
        name, split="validation" if split in ("dev", "val") else split, config=config
    )


def _given(values: Mapping[str, Any]) -> list[str]:
    return [key for key, value in values.items() if value is not None]
