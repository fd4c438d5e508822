"""Configuration: frozen dataclasses, presets, a YAML file and command-line overrides.

A key that does not exist is an error, and so is one that was set and never read (`track`).
"""

import contextlib
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

from jmeta.runtime.coerce import ConfigError, coerce, plain
from jmeta.runtime.provenance import command_of, devices, program_of, versions

C = TypeVar("C")

_PROVENANCE = "_jmeta_provenance"
_DEFAULT_OUT = Path("runs")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every experiment understands; experiments extend it with fields of their own.

    Example:
      >>> RunConfig(seeds=3).seed_list
      [0, 1, 2]
    """

    seeds: int = 1
    """Number of seeds; each is a whole run with its own initialisation and episodes."""
    out: Path = _DEFAULT_OUT
    """Run directory: results.json, config.yaml, run.json, figures, checkpoints, report.html."""
    resume: bool = False
    """Continue from the last checkpoint in the run directory."""
    first_seed: int = 0
    """The seeds are first_seed, first_seed + 1, ..."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is the number of seeds and at least 1, got {self.seeds}")

    @property
    def seed_list(self) -> list[int]:
        """The seeds of this run."""
        return list(range(self.first_seed, self.first_seed + self.seeds))


class _Provenance(NamedTuple):
    explicit: tuple[str, ...]  # dotted names of the fields that the user set
    command: str
    preset: str | None


def parse(
    config: type[C] | C | Mapping[str, C],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> C:
    """Build a configuration from a preset, a YAML file and the command line, in that order.

    `--preset NAME` chooses a preset, `--config FILE.yaml` loads a file over it (a dumped one, or
    one with a few keys), and flags such as `--inner-lr 0.1` or `--inner.lr 0.1` override both.
    An unknown preset, key or flag ends the program with a message that suggests the nearest one.

    Args:
      config: A frozen dataclass, an instance of one (the defaults), or a dict of named instances,
        the presets, of which the first is the default.
      argv: Command-line arguments; by default those of the program.
      description: Text for `--help`; by default the first paragraph of the dataclass's docstring.

    Returns:
      An instance of the dataclass. A `RunConfig` whose `out` nobody chose gets
      `runs/EXPERIMENT` or `runs/EXPERIMENT-PRESET`.

    Raises:
      SystemExit: With code 2 for a user's mistake (the message goes to stderr), 0 for `--help`.
      TypeError: If the dataclass itself cannot serve, e.g. because it is not frozen.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config(RunConfig):
      ...     inner_lr: float = 0.1
      >>> parse({"demo": Config(), "full": Config(seeds=5)},
      ...       ["--preset", "full", "--inner-lr", "0.5"]).inner_lr
      0.5
    """
    if isinstance(config, Mapping):
        presets = cast(dict[str, C], dict(config))
    else:
        presets = {"": _instance(cast(C, config))}
    for preset in presets.values():
        _check_class(type(preset))
    module = type(next(iter(presets.values()))).__module__
    program = program_of(module)
    arguments = list(sys.argv[1:] if argv is None else argv)
    said, file, rest = _own_flags(arguments)
    names = [name for name in presets if name]
    try:
        if said is not None and said not in names:
            known = f"the presets are {', '.join(names)}" if names else "there are no presets"
            raise ConfigError(f"--preset {said}: {known}{did_you_mean(said, names)}")
        chosen = said or next(iter(presets))
        base = _with_own_folder(presets[chosen], program, chosen)
        explicit: tuple[str, ...] = ()
        if file is not None:
            base, keys = _load(Path(file), base)
            # A dumped file sets every field, so none of them says what its user wanted.
            explicit = keys if set(keys) != set(leaves(base)) else ()
        _check_own_flags(rest, leaves(base))
        parsed = _from_flags(base, rest, program, _help(base, description, names))
    except ValueError as error:
        _exit(program, str(error))
    explicit = tuple(dict.fromkeys((*explicit, *_flag_names(rest, leaves(base)))))
    # A file says it all: the default preset below it had no say.
    preset = said or (chosen if file is None else "")
    provenance = _Provenance(explicit, command_of(program, arguments), preset or None)
    # A copy, so that a preset that is returned unchanged is not marked itself.
    parsed = _copy(_below_here(parsed))
    object.__setattr__(parsed, _PROVENANCE, provenance)
    return parsed


def load(path: Path | str, default: type[C] | C) -> C:
    """Read a YAML file over the defaults.

    Args:
      path: A YAML mapping from field names to values, nested for nested dataclasses.
      default: The dataclass or an instance of it; fields that the file leaves out keep its values.

    Returns:
      A new instance.

    Raises:
      ConfigError: If a key is unknown or a value has the wrong type; every unknown key is named.
    """
    return _load(Path(path), _instance(default))[0]


@contextlib.contextmanager
def track(config: C) -> Iterator[C]:
    """Record which fields a run reads; at its end, raise if one that the user set was not.

    Only what was set on the command line or in a hand-written YAML file counts, not the values of
    presets. A run that fails raises its own error. Call `dataclasses.replace` before, not inside:
    it reads every field.

    Args:
      config: What `parse` returned.

    Yields:
      The same configuration (an instance of a subclass of its class) that takes notes.

    Raises:
      ConfigError: At the end of the block, naming the fields that had no effect.

    Example:
      >>> with track(parse(RunConfig, ["--seeds", "2"])) as config:
      ...     config.seeds
      2
    """
    noted: set[str] = set()
    proxy = _noting(config, "", noted)
    yield proxy
    unused = unused_keys(proxy)
    if unused:
        flags = ", ".join("--" + key.replace("_", "-") for key in unused)
        raise ConfigError(
            f"set but never read, so without effect in this run: {flags}. Leave out what this "
            "method does not use"
        )


def unused_keys(config: Any) -> list[str]:
    """The fields that the user set explicitly and that nothing has read yet, inside `track`."""
    instance = type(config)
    noted = getattr(instance, "_jmeta_noted", None)
    if noted is None:
        raise TypeError("unused_keys needs the configuration that `with track(config) as` gives")
    provenance = vars(config).get(_PROVENANCE)
    return [key for key in (provenance.explicit if provenance else ()) if key not in noted]


def values(config: Any) -> dict[str, Any]:
    """All fields as YAML holds them; inside `track`, none of them counts as read.

    Example:
      >>> values(RunConfig(seeds=2))["seeds"]
      2
    """
    return cast(Any, plain(_untracked(config)))


def dump(config: Any, out_dir: Path | str) -> Path:
    """Write config.yaml and run.json, which say how to repeat a run.

    config.yaml holds every field; `--config OUT/config.yaml` gives an equal configuration. run.json
    holds the command (relative paths only), preset, seeds, devices and versions.

    Args:
      config: A configuration, from `parse` or built by hand.
      out_dir: The run directory.

    Returns:
      The path of config.yaml; of several processes the first writes.
    """
    import yaml

    from jmeta.runtime import distributed

    config = _untracked(config)
    provenance = vars(config).get(_PROVENANCE)
    run = {
        "command": provenance.command if provenance else None,
        "preset": provenance.preset if provenance else None,
        "seeds": config.seed_list if isinstance(config, RunConfig) else None,
        "devices": devices(),
        "versions": versions(),
    }
    out_dir = Path(out_dir)
    distributed.write(out_dir / "run.json", json.dumps(run, indent=2) + "\n")
    fields = values(config)
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != fields:
        # PyYAML does not escape a next-line character, and reads it as a line break.
        text = yaml.safe_dump(fields, sort_keys=False)
    return distributed.write(out_dir / "config.yaml", text)


def leaves(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields of a configuration, nested dataclasses opened."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += leaves(value, f"{prefix}{field.name}.")
        elif field.init:
            names.append(prefix + field.name)
    return names


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' if one of the known names is near, else ''."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _instance(config: type[C] | C) -> C:
    return cast(C, config() if isinstance(config, type) else config)


def _check_class(cls: type) -> None:
    if not dataclasses.is_dataclass(cls) or not cast(Any, cls).__dataclass_params__.frozen:
        raise TypeError(f"{cls.__name__} must be a frozen dataclass: @dataclass(frozen=True)")
    if "__slots__" in vars(cls):
        raise TypeError(f"{cls.__name__} must not use slots: parse notes where a value came from")
    taken = {"preset", "config"} & {field.name for field in dataclasses.fields(cls)}
    if taken:
        raise TypeError(f"{cls.__name__}.{taken.pop()} clashes with the flag of every experiment")


def _own_flags(arguments: list[str]) -> tuple[str | None, str | None, list[str]]:
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(arguments)
    return known.preset, known.config, rest


def _check_own_flags(rest: list[str], known: list[str]) -> None:
    for argument in rest:
        name = argument[2:].partition("=")[0].replace("-", "_")
        if not argument.startswith("--") or name in known:
            continue
        close = difflib.get_close_matches(name, ["preset", "config", *known], n=1, cutoff=0.75)
        if close and close[0] in ("preset", "config"):
            raise ConfigError(f"unrecognized option {argument}; did you mean --{close[0]}?")


def _below_here(config: C) -> C:
    """The run directory relative to the working directory, so that a dump names no user's."""
    here = Path.cwd()
    if not isinstance(config, RunConfig) or not config.out.is_relative_to(here):
        return config
    return dataclasses.replace(config, out=config.out.relative_to(here))


def _with_own_folder(config: C, program: str, preset: str) -> C:
    if not isinstance(config, RunConfig) or config.out != _DEFAULT_OUT:
        return config
    name = program.removesuffix(".py").rpartition(".")[2]
    return dataclasses.replace(config, out=_DEFAULT_OUT / "-".join(filter(None, (name, preset))))


def _load(path: Path, base: C) -> tuple[C, tuple[str, ...]]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must map field names to values, got a {type(data).__name__}")
    unknown = _unknown(data, base, "")
    if unknown:
        known = leaves(base)
        listed = [f"unknown key {key}{did_you_mean(key, known)}" for key in unknown]
        raise ConfigError(f"{path}: " + "\n  ".join(listed))
    config = coerce(data, type(base), str(path), base)
    return config, tuple(key for key in leaves(config) if _given(data, key))


def _unknown(data: Mapping[Any, Any], config: Any, prefix: str) -> list[str]:
    found = []
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    for key, item in data.items():
        if key not in fields:
            found.append(f"{prefix}{key}")
        elif dataclasses.is_dataclass(getattr(config, key)) and isinstance(item, dict):
            found += _unknown(item, getattr(config, key), f"{prefix}{key}.")
    return found


def _given(data: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _from_flags(base: C, rest: list[str], program: str, description: str) -> C:
    if not rest:
        return base
    import tyro

    prog = f"python {program}" if program.endswith(".py") else f"python -m {program}"
    return tyro.cli(type(base), default=base, args=rest, prog=prog, description=description)


def _help(config: Any, description: str | None, presets: list[str]) -> str:
    text = description or (type(config).__doc__ or "").split("\n\n")[0]
    if presets:
        text += (
            f"\n\n--preset NAME starts from one of: {', '.join(presets)} (default: {presets[0]})."
        )
    return text + "\n\n--config FILE.yaml loads a configuration; the options below override it."


def _flag_names(rest: list[str], known: list[str]) -> list[str]:
    """Dotted names of the fields that the flags set, in tyro's spellings of them."""
    found = []
    for argument in rest:
        if not argument.startswith("--"):
            continue
        name = argument[2:].partition("=")[0].replace("-", "_")
        path, _, last = name.rpartition(".")
        positive = ".".join(filter(None, (path, last.removeprefix("no_"))))
        for candidate in (name, positive, path):
            if candidate in known:
                found.append(candidate)
                break
    return found


def _copy(config: C, cls: type | None = None) -> C:
    cls = cls or type(config)
    copied = object.__new__(cls)
    vars(copied).update(vars(config))
    return cast(C, copied)


def _noting(config: C, prefix: str, noted: set[str]) -> C:
    cls = type(config)
    names = {field.name for field in dataclasses.fields(cast(Any, cls))}

    def __getattribute__(self: Any, name: str) -> Any:
        if name in names:
            noted.add(prefix + name)
        return object.__getattribute__(self, name)

    def __repr__(self: Any) -> str:
        return repr(_untracked(self))  # printing a configuration does not use it

    tracked = type(
        cls.__name__,
        (cls,),
        {
            "__getattribute__": __getattribute__,
            "__repr__": __repr__,
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
            "_jmeta_noted": noted,
            "_jmeta_original": config,
        },
    )
    proxy = _copy(config, tracked)
    for name, value in list(vars(proxy).items()):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            object.__setattr__(proxy, name, _noting(value, f"{prefix}{name}.", noted))
    return proxy


def _untracked(config: C) -> C:
    return getattr(type(config), "_jmeta_original", config)


def _exit(program: str, message: str) -> NoReturn:
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)
