"""What ``jmeta.auto`` has chosen and why, and the file in which a choice is kept.

A choice holds for a problem's traced computation, its shapes, the device, the version of jax, and
the estimators that it was made among.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jmeta.core.inner import Objective, inner_loop, start
from jmeta.core.types import Episode, Key, MetaGradient, Problem, PyTree
from jmeta.cost.measured import median
from jmeta.cost.variants import ESTIMATORS, Trial, Variant, describe
from jmeta.files import write_atomically

_ADDRESS = re.compile(r"0x[0-9a-f]+")


class Choice(NamedTuple):
    """The fastest exact variant that fits, and every trial that led to it.

    Attributes:
        variant: what was chosen.
        mg: it, as an estimator.
        trials: one for each variant that was compiled.
        usable: bytes it may use.
        setting: what the choice holds for: steps, tasks, device, versions, estimators.
        file: where it is kept.
        remembered: whether it was read from there, and nothing was measured.
    """

    variant: Variant
    mg: MetaGradient
    trials: tuple[Trial, ...]
    usable: int
    setting: dict[str, Any]
    file: Path
    remembered: bool


def explain(choice: Choice) -> str:
    """A choice as a Markdown table of what was tried, and a sentence that says what was chosen.

    Args:
        choice: of ``fastest``, or what ``auto`` reports.

    Returns:
        Text; times are medians over the runs, whose number is the last column.

    Example:
        >>> import tempfile
        >>> from jmeta.cost.choosing import fastest
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     choice = fastest(q.problem, 3, q.meta, q.episode, memory="1MiB", folder=folder)
        >>> explain(choice).splitlines()[0]
        '| estimator | remat | MiB | temp | GFLOP | compile s | seconds | x | runs | |'
    """
    several = any(trial.variant.microbatch is not None for trial in choice.trials)
    chosen = next(trial for trial in choice.trials if trial.variant == choice.variant)
    best = median(chosen.seconds)
    head = ["estimator", "remat", *(["together"] if several else []), "MiB", "temp", "GFLOP",
            "compile s", "seconds", "x", "runs", ""]  # fmt: skip
    words = 3 if several else 2
    lines = [
        "| " + " | ".join(head[:-1]) + " | |",
        "| " + " | ".join(["---"] * words + ["--:"] * (len(head) - words - 1) + ["---"]) + " |",
    ]
    for trial in choice.trials:
        timed = bool(trial.seconds)
        seconds = median(trial.seconds)
        cells = [
            trial.variant.estimator,
            trial.variant.remat,
            *([str(trial.variant.microbatch)] if several else []),
            f"{trial.bytes / 2**20:.2f}",
            f"{trial.temp_bytes / 2**20:.2f}",
            "" if math.isnan(trial.flops) else f"{trial.flops / 1e9:.2f}",
            f"{trial.compile_seconds:.1f}",
            f"{seconds:.4g}" if timed else "",
            f"{seconds / best:.2f}" if timed else "",
            str(len(trial.seconds)),
            "chosen" if trial is chosen else trial.note,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    how = "read from" if choice.remembered else "kept in"
    verdict = (
        f"Chosen: {describe(choice.variant)}: {in_words(chosen.bytes)} of "
        f"{in_words(choice.usable)} on {choice.setting['device']}; {how} {choice.file}."
    )
    return "\n".join([*lines, "", verdict])


def in_words(size: float) -> str:
    """A size of memory as people write it.

    Example:
        >>> in_words(300), in_words(5 * 2**19), in_words(12 * 2**30)
        ('0.3 KiB', '2.5 MiB', '12.0 GiB')
    """
    power = 3 if size >= 2**30 else 2 if size >= 2**20 else 1
    return f"{size / 2 ** (10 * power):.1f} {'KMG'[power - 1]}iB"


def trace(
    problem: Problem, steps: int, objective: Objective, meta: PyTree, episode: Episode, key: Key
) -> str:
    """The inner loop on one episode as text, the same for the same computation.

    Args:
        problem: what will be differentiated.
        steps: number of inner steps.
        objective: where the outer loss is read.
        meta: shapes of the meta-parameters.
        episode: shapes of one episode.
        key: the shape of a random key, or None.

    Returns:
        A jaxpr, without the addresses of Python's objects.

    Example:
        >>> from jmeta.core.inner import final
        >>> from jmeta.testing import quadratic
        >>> q = quadratic()
        >>> both = [trace(q.problem, n, final, q.meta, q.episode, None) for n in (2, 3)]
        >>> both[0] == both[1]
        False
    """
    run = inner_loop(problem, steps, objective=objective)

    def whole(meta: PyTree, episode: Episode, key: Key) -> Any:
        return run(meta, start(problem, meta, key), episode, key)

    return _ADDRESS.sub("", str(jax.make_jaxpr(whole)(meta, episode, key)))


def setting_of(text: str, **more: Any) -> dict[str, Any]:
    """What a choice holds for, as words and numbers; ``text`` goes in by its digest.

    Example:
        >>> setting_of("{ lambda ; a:f32[]. }", steps=3)["steps"]
        3
    """
    device = jax.devices()[0]
    try:
        version = importlib.metadata.version("jmeta")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "program": hashlib.sha256(text.encode()).hexdigest(),
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
        "jmeta": version,
        "estimators": list(ESTIMATORS),  # what it was chosen among
        **more,
    }


def digest(setting: Mapping[str, Any]) -> str:
    """The name of a setting's file.

    Example:
        >>> len(digest({"steps": 3}))
        24
    """
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:24]


def keep(file: Path, setting: Mapping[str, Any], variant: Variant, trials: list[Trial]) -> None:
    """Write a choice, whole or not at all.

    Args:
        file: where to.
        setting: what it holds for.
        variant: what was chosen.
        trials: what was tried.
    """
    content = {
        "setting": dict(setting),
        "variant": variant._asdict(),
        "trials": [
            trial._asdict()
            | {"variant": trial.variant._asdict()}
            | ({"flops": None} if math.isnan(trial.flops) else {})
            for trial in trials
        ],
    }
    write_atomically(file, json.dumps(content, indent=1) + "\n")


def recall(file: Path, setting: Mapping[str, Any]) -> tuple[Variant, list[Trial]] | None:
    """Read a choice that was kept.

    Args:
        file: where it would be.
        setting: what it must hold for.

    Returns:
        The variant and the trials, or None: no file, another setting, or a file that is no choice.

    Example:
        >>> recall(Path("nowhere.json"), {}) is None
        True
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["setting"] != dict(setting):
            return None
        trials = [
            Trial(**each)._replace(
                variant=Variant(**each["variant"]),
                flops=math.nan if each["flops"] is None else each["flops"],
                seconds=tuple(each["seconds"]),
            )
            for each in content["trials"]
        ]
        variant = Variant(**content["variant"])
        # A choice that nothing supports is none.
        supported = any(trial.variant == variant and trial.seconds for trial in trials)
        return (variant, trials) if supported else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
