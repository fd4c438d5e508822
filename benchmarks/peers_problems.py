"""The problems that every framework of ``benchmarks.peers`` solves: the same arrays for all.

Plain NumPy: parameters by flat names, episodes with a leading task axis, the inner rate.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZES = ("paper", "quick", "smoke")


class Given(NamedTuple):
    """One problem as arrays.

    Attributes:
        kind: ``sinusoid``, ``omniglot`` or ``decoder``.
        params: ``{"block0/kernel": array}``, as jmeta's networks lay them out.
        support: arrays ``[tasks, ...]``.
        query: the same.
        steps: inner steps.
        rate: of the inner SGD.
        heads: of the decoder's attention.
    """

    kind: str
    params: dict[str, np.ndarray]
    support: dict[str, np.ndarray]
    query: dict[str, np.ndarray]
    steps: int
    rate: float
    heads: int = 0

    @property
    def tasks(self) -> int:
        """How many."""
        return len(next(iter(self.support.values())))


def given(kind: str, size: str = "paper") -> Given:
    """The arrays of a problem.

    Args:
        kind: ``sinusoid``: MAML's network 1-40-40-1 on 25 tasks of ten points; ``omniglot``: four
            blocks of 64 filters on 8 tasks, 5-way 1-shot, images of noise; ``decoder``: 4 layers
            of width 256, vocabulary 4096, 4 x 128 tokens. Five inner steps each.
        size: ``paper``; ``quick``: fewer tasks, a smaller decoder; ``smoke``: as small as can be.

    Returns:
        A ``Given``.
    """
    make = {"sinusoid": _sinusoid, "omniglot": _omniglot, "decoder": _decoder}[kind]
    return make(np.random.default_rng(0), size)


def _sinusoid(rng: np.random.Generator, size: str) -> Given:
    tasks, width = {"paper": (25, 40), "quick": (25, 40), "smoke": (3, 8)}[size]
    widths = (1, width, width, 1)
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        params[f"layer{i}/kernel"] = rng.normal(size=(fan_in, fan_out)) * (2 / fan_in) ** 0.5
        params[f"layer{i}/bias"] = 0.1 * rng.normal(size=fan_out)
    height, phase = rng.uniform(0.1, 5, (tasks, 1, 1)), rng.uniform(0, np.pi, (tasks, 1, 1))

    def batch() -> dict[str, np.ndarray]:
        x = rng.uniform(-5, 5, (tasks, 10, 1))
        return {"x": x, "y": height * np.sin(x - phase)}

    return _single(Given("sinusoid", params, batch(), batch(), 5, 0.01))


def _omniglot(rng: np.random.Generator, size: str) -> Given:
    tasks, filters, queries, steps = {
        "paper": (8, 64, 15, 5), "quick": (4, 32, 5, 3), "smoke": (2, 4, 1, 2),
    }[size]  # fmt: skip
    params = {}
    for i in range(4):
        fan_in = 9 * (filters if i else 1)
        kernel = rng.normal(size=(3, 3, fan_in // 9, filters)) * (2 / fan_in) ** 0.5
        params[f"block{i}/kernel"] = kernel
        params[f"block{i}/scale"] = 1 + 0.1 * rng.normal(size=filters)
        params[f"block{i}/bias"] = 0.1 * rng.normal(size=filters)
    params["head/kernel"] = rng.normal(size=(filters, 5)) * filters**-0.5
    params["head/bias"] = np.zeros(5)

    def batch(each: int) -> dict[str, np.ndarray]:
        x = rng.uniform(size=(tasks, 5 * each, 28, 28, 1))
        return {"x": x, "y": np.tile(np.arange(5, dtype=np.int32), (tasks, each))}

    return _single(Given("omniglot", params, batch(1), batch(queries), steps, 0.1))


def _decoder(rng: np.random.Generator, size: str) -> Given:
    layers, width, vocab, batch, time, steps = {
        "paper": (4, 256, 4096, 4, 128, 5), "quick": (2, 128, 1024, 2, 64, 3),
        "smoke": (2, 16, 32, 2, 8, 2),
    }[size]  # fmt: skip

    def normal(*shape: int) -> np.ndarray:
        return 0.05 * rng.normal(size=shape)

    params = {"embed/tokens": normal(vocab, width), "embed/positions": normal(time, width)}
    for name in ("blocks/ln1", "blocks/ln2", "ln_f"):
        shape = (width,) if name == "ln_f" else (layers, width)
        params |= {f"{name}/scale": 1 + normal(*shape), f"{name}/bias": normal(*shape)}
    params |= {
        "blocks/attn/qkv": normal(layers, width, 3 * width),
        "blocks/attn/out": normal(layers, width, width),
        "blocks/mlp/up": normal(layers, width, 4 * width),
        "blocks/mlp/down": normal(layers, 4 * width, width),
    }
    texts = [rng.integers(0, vocab, (1, batch, time), dtype=np.int32) for _ in range(2)]
    return _single(Given("decoder", params, {"x": texts[0]}, {"x": texts[1]}, steps, 0.1, 4))


def _single(made: Given) -> Given:
    """In float32, which is what is timed; float64 widens the same numbers."""
    parts = {
        name: {key: a.astype(np.float32) if a.dtype.kind == "f" else a for key, a in part.items()}
        for name, part in (("params", made.params), ("support", made.support),
                           ("query", made.query))
    }  # fmt: skip
    return made._replace(**parts)


def save(made: Given, path: Path) -> None:
    """Write a problem for another process."""
    flat: dict[str, Any] = {
        f"{part}:{name}": array
        for part in ("params", "support", "query")
        for name, array in getattr(made, part).items()
    }
    rest = {"kind": made.kind, "steps": made.steps, "rate": made.rate, "heads": made.heads}
    with path.open("wb") as file:
        np.savez(file, **flat, rest=np.array(json.dumps(rest)))


def load(path: Path) -> Given:
    """Read what ``save`` wrote."""
    parts: dict[str, dict[str, np.ndarray]] = {"params": {}, "support": {}, "query": {}}
    with np.load(path) as file:
        rest = json.loads(str(file["rest"]))
        for key in file.files:
            part, colon, name = key.partition(":")
            if colon:
                parts[part][name] = file[key]
    return Given(**parts, **rest)
