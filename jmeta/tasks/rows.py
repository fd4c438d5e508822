"""Rows of a data set, read field by field: what is missing or strange is named by row and field."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jmeta.data.sources import Columns, DataUnavailable, from_datasets, local_path
from jmeta.tasks.text import HIDDEN
from jmeta.tasks.tokenizer import whole_characters

_DEV = ("dev", "validation", "val", "valid")  # one split under four names


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
    return whole_characters(value, f"{row.where}, field {name!r}")


def whole(row: Row, name: str) -> int:
    """A field that must be there and be a whole number, such as the place of a character.

    Raises:
        ValueError: it is missing, or no whole number.
    """
    value = field(row, name)
    # A column with a gap holds its whole numbers as floats.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"{row.where}, field {name!r}: {value!r} is no whole number")
    return int(value)


def several(row: Row, name: str) -> Sequence[Any]:
    """A field that must be there and be a list, which may be empty.

    Raises:
        ValueError: it is missing, or no list.
    """
    value = field(row, name)
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(f"{row.where}, field {name!r}: {value!r} is no list")
    return list(value)


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
    if isinstance(value, np.ndarray):
        value = value.tolist()  # no label, but it can be compared and shown
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
        split: the split; ``"dev"``, ``"val"`` and ``"validation"`` are one.
        local: where the copy of this split lies under ``$JMETA_DATA``, or None.
        hub: name and configuration on the hub, or None.

    Returns:
        The columns.

    Raises:
        DataUnavailable: there is neither; the message says what to do.
    """
    if path is not None:
        return _read_path(path, split)
    folder = os.environ.get("JMETA_DATA")
    if folder and local and os.path.exists(os.path.join(folder, local)):
        return _read_file(os.path.join(folder, local), split)
    if hub is None:
        raise DataUnavailable(
            f"there is no {split} split here: JMETA_DATA is {folder or 'not set'}, where "
            f"{local or 'no copy'} is looked for; pass path=..."
        )
    name, config = hub
    return from_datasets(name, split=_hub_name(split), config=config)


def _read_path(path: str | os.PathLike[str], split: str) -> Columns:
    found = local_path(path)
    if found is None:
        return from_datasets(path, split=_hub_name(split))
    if found.is_file():
        return _read_file(path, split)
    names = [split, *(name for name in _DEV if split in _DEV and name != split)]
    errors = []
    for name in names:
        try:
            return from_datasets(path, split=name)
        except ValueError as error:  # no such split
            errors.append(error)
    raise errors[0]


def _read_file(path: str | os.PathLike[str], split: str) -> Columns:
    """A file is what the caller says it is, unless it tells splits apart itself."""
    columns = from_datasets(path)
    if "split" not in columns:
        return columns
    there = set(columns["split"])
    same = [name for name in _DEV if split in _DEV and name in there]
    return from_datasets(path, split=split if split in there or not same else same[0])


def _hub_name(split: str) -> str:
    return "validation" if split in _DEV else split


def _given(values: Mapping[str, Any]) -> list[str]:
    return [key for key, value in values.items() if value is not None]
