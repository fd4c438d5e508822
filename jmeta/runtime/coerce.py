"""From plain YAML values to the types a configuration declares, and back.

YAML knows no tuples, paths or enums, and reads `1e-3` as text: the declared type decides.
"""

import dataclasses
import enum
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A mistake in a configuration, said in the user's words."""


def plain(value: Any, where: str = "config") -> Any:
    """A configuration as dicts, lists and scalars that YAML and JSON hold.

    Args:
      value: A dataclass or a value of one of its fields.
      where: Name used in errors.

    Returns:
      Nested dicts, lists, strings, numbers, booleans and None.

    Raises:
      TypeError: If a value has no plain form; it names the field.

    Example:
      >>> plain({"out": Path("runs/a"), "steps": (1, 5)})
      {'out': 'runs/a', 'steps': [1, 5]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: a {type(value).__name__} cannot be written to YAML")


def coerce(value: Any, hint: Any, where: str, base: Any = None) -> Any:
    """Read a plain value as the declared type.

    Args:
      value: What YAML gave.
      hint: The declared type: a dataclass, scalar, Path, Enum, Literal, list, tuple, dict, or
        a union of these.
      where: Name used in errors.
      base: For a dataclass: the instance that supplies fields which `value` leaves out.

    Returns:
      A value of the declared type.

    Raises:
      ConfigError: If the value does not fit; it says where, what was expected and what came.

    Example:
      >>> coerce(["1e-3", 2], tuple[float, ...], "rates")
      (0.001, 2.0)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _one_of(value, arguments, where)
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, arguments, where, base)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(value, hint, where, base)
    if hint in (list, tuple, dict):
        origin = hint
    if origin is list:
        _expect(isinstance(value, list), "a list", value, where)
        item = arguments[0] if arguments else Any
        return [coerce(x, item, f"{where}[{i}]") for i, x in enumerate(value)]
    if origin is tuple:
        return _tuple(value, arguments, where)
    if origin is dict or origin is Mapping:
        _expect(isinstance(value, dict), "a mapping", value, where)
        key, item = arguments or (Any, Any)
        return {coerce(k, key, where): coerce(x, item, f"{where}.{k}") for k, x in value.items()}
    return _scalar(value, hint, where)


def _dataclass(value: Any, hint: type, where: str, base: Any) -> Any:
    _expect(isinstance(value, dict), f"the fields of {hint.__name__}", value, where)
    hints = get_type_hints(hint)
    known = {field.name for field in dataclasses.fields(cast(Any, hint)) if field.init}
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]}; {hint.__name__} has {sorted(known)}")
    changes = {
        name: coerce(item, hints[name], f"{where}: {name}", getattr(base, name, None))
        for name, item in value.items()
    }
    try:
        return hint(**changes) if base is None else dataclasses.replace(base, **changes)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, where)
    if not arguments:
        return tuple(value)
    if arguments[-1] is Ellipsis:
        return tuple(coerce(x, arguments[0], f"{where}[{i}]") for i, x in enumerate(value))
    _expect(len(value) == len(arguments), f"{len(arguments)} items", value, where)
    return tuple(
        coerce(x, hint, f"{where}[{i}]")
        for i, (x, hint) in enumerate(zip(value, arguments, strict=True))
    )


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint in (None, type(None)):
        _expect(value is None, "nothing (null)", value, where)
        return None
    if hint is float:
        if isinstance(value, str):
            # YAML 1.1 takes 1e-3, without a point, for text.
            try:
                value = float(value)
            except ValueError:
                _expect(False, "a number", value, where)
        _expect(type(value) in (int, float), "a number", value, where)
        return float(value)
    if hint in (bool, int, str):
        name = {bool: "true or false", int: "a whole number", str: "text"}[hint]
        _expect(type(value) is hint, name, value, where)
        return value
    if hint is Path:
        _expect(isinstance(value, str), "a path", value, where)
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[_one_of(value, tuple(hint.__members__), where)]
    raise TypeError(f"{where}: fields of type {hint} cannot be read from YAML")


def _one_of(value: Any, options: tuple[Any, ...], where: str) -> Any:
    for option in options:
        if type(option) is type(value) and option == value:
            return option
    _expect(False, f"one of {', '.join(map(repr, options))}", value, where)


def _first_that_fits(value: Any, options: tuple[Any, ...], where: str, base: Any) -> Any:
    if value is None and type(None) in options:
        return None
    if isinstance(value, str) and str in options:
        return value  # `float | str` keeps "1e-3" as written
    errors = []
    for option in options:
        try:
            fits = isinstance(option, type) and isinstance(base, option)
            return coerce(value, option, where, base if fits else None)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[0] if len(errors) == 1 else f"{where}: no type fits: {errors}")


def _expect(condition: bool, expected: str, value: Any, where: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: expected {expected}, got {value!r}")
