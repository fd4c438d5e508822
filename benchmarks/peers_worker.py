"""One framework in a process of its own: it waits for a line, works, answers with a line.

``python -m benchmarks.peers_worker jax|torch PROBLEM.npz``; requests and answers are JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers_problems import Given, load

AT_LEAST = 0.05  # seconds: what takes less is run several times in its turn
ENOUGH = 0.5  # seconds: what takes more is run once, as the caches are refilled in no time


def answer(framework: str, made: Given, request: dict[str, Any], built: dict[str, Any]) -> Any:
    """Do what one request asks for.

    Args:
        framework: ``jax`` or ``torch``.
        made: the problem.
        request: ``{"do": "gradient" | "time" | "memory", "row": ..., "file": ..., "dtype": ...}``;
            a gradient is float64 unless ``dtype`` says ``float32``, all else is float32.
        built: the rows built so far, filled here.

    Returns:
        What JSON can hold.
    """
    module: Any = importlib.import_module(f"benchmarks.peers_{framework}")
    row = request["row"]
    if request["do"] == "gradient":
        dtype = request.get("dtype", "float64")
        if framework == "jax":
            import jax

            jax.config.update("jax_enable_x64", dtype == "float64")
        run = module.build(made, row, dtype)
        np.savez(request["file"], **module.flat(run()))
        return {}
    if row not in built:
        built[row] = module.build(made, row, "float32")
    run = built[row]
    if request["do"] == "memory":
        return {"peak": peak_bytes(run), "temp": getattr(run, "temp_bytes", None)}
    begin = time.perf_counter()
    run()  # the caches hold what the last framework left
    first = time.perf_counter() - begin
    if first > ENOUGH:
        return {"seconds": first}
    times = max(1, round(AT_LEAST / max(first, 1e-6)))
    begin = time.perf_counter()
    for _ in range(min(times, 100)):
        run()
    return {"seconds": (time.perf_counter() - begin) / min(times, 100)}


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most resident memory while a function runs twice, above what was there before."""
    gc.collect()
    with contextlib.suppress(OSError):  # what was freed goes back, or it is taken again unseen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    except OSError:
        return _sampled(run) - before
    for _ in range(2):
        run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _sampled(run: Callable[[], Any]) -> int:
    """The peak by looking often, where the kernel keeps none."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], resident("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        run()
    done.set()
    watcher.join()
    return most[0]


def main() -> None:
    """Answer until standard input ends."""
    framework, path = sys.argv[1:]
    made = load(Path(path))
    built: dict[str, Any] = {}
    # What a library prints is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = answer(framework, made, json.loads(line), built)
        except Exception as error:  # a peer that cannot run says why
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            reply = {"error": f"{type(error).__name__}: {first}"[:300]}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
