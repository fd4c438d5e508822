"""Several processes as one program: joining them, who writes, who stops when, who is gone.

The engine is ``jax.distributed``; nothing here does anything when there is one process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmeta.files import write_atomically
from jmeta.runtime.watch import watched

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "JMETA_HEARTBEAT_SECONDS"

# What schedulers set for each process of a job; JAX reads the rest by itself.
_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_PATIENCE = 4.0  # seconds for the others to notice a failure and say so
_FAREWELLS = "jmeta/farewells/"
_ADVICE = (
    "then start all again with --resume (fit(resume=True)), and the run goes on from its newest "
    "whole checkpoint"
)


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_seconds: int | None = None,
    connect_seconds: int = 300,
) -> None:
    """Join the other processes of this program; call it before anything else uses JAX.

    On a TPU VM, under Slurm, Open MPI and Kubernetes JAX finds the processes by itself. Elsewhere
    say which they are here, or in ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``. On a machine of its own, and when called again, it does nothing.

    Args:
        coordinator: ``host:port`` of process 0, a free port that the others can reach.
        processes: how many there are.
        process: which one this is, from 0.
        heartbeat_seconds: how long a process may be silent before the others give it up; default:
            ``JMETA_HEARTBEAT_SECONDS``, else 30.
        connect_seconds: how long to wait for the others at the start.

    Raises:
        ValueError: only some of the three are given, or they are not a cluster.
        ConnectionError: the coordinator cannot be reached.
        RuntimeError: JAX was used before, so that its devices are fixed.

    Example:
        >>> initialize()
    """
    if jax.distributed.is_initialized():
        return
    given = (
        coordinator or os.environ.get(ADDRESS),
        processes if processes is not None else _number(COUNT),
        process if process is not None else _number(INDEX),
    )
    asked = heartbeat_seconds if heartbeat_seconds is not None else _number(HEARTBEAT)
    heartbeat = 30 if asked is None else asked
    if heartbeat < 1:
        raise ValueError(f"the heartbeat is {heartbeat} seconds; it must be positive")
    _, count, index = given
    if _is_complete(given):
        if count is not None and index is not None and not 0 <= index < count:
            raise ValueError(  # JAX would wait for ever
                f"process {index} of {count}: they are numbered from 0, so {INDEX} is less than "
                f"{COUNT}"
            )
        _reach(given[0], given[2], connect_seconds)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=connect_seconds,
            heartbeat_timeout_seconds=heartbeat,
            # The writer may draw figures while the others wait; heartbeats find who is dead.
            shutdown_timeout_seconds=24 * 3600,
        )
    except ValueError:
        if any(part is not None for part in given):
            raise
        return  # JAX found no cluster
    except RuntimeError as error:
        if given[0] is None and not _scheduled():
            return
        raise RuntimeError(
            "the processes of this program cannot be joined any more, because JAX is in use "
            "already: call jmeta.runtime.distributed.initialize() first of all"
        ) from error
    if jax.process_count() > 1:
        _sign_logs()
        # A process whose reduction never returns is ended by JAX's client, which knows no advice.
        print(
            f"jmeta: {name()}. If one dies, the others end within {heartbeat} s: {_ADVICE}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def session(*cluster: Any, **options: Any) -> Iterator[None]:
    """Join the other processes, and leave quickly, with a sentence, if one of them fails.

    A process that fails would wait at its end for all others, and they in their next reduction for
    it. In this block it tells them, waits a few seconds for what they know, says which process is
    gone, and ends with a status that is not zero. So it does, in some seconds, when another one
    is killed, whatever it waits for itself.

    Args:
        *cluster: coordinator, processes and process, as for ``initialize``.
        **options: of ``initialize``.

    Example:
        >>> with session():
        ...     print(is_writer())
        True
    """
    initialize(*cluster, **options)
    with _watched(*cluster):
        try:
            yield
        except BaseException as error:
            if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
                raise
            missing, told = _farewells(error)
            if not missing and len(set(told.values())) == 1:
                raise  # all of them say the same: they can end in good order
            _leave(error, missing, told)


def is_writer() -> bool:
    """Whether this process writes metrics, reports and figures: the first of all."""
    # Asked before the processes are joined, JAX must not begin to use its devices.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def write(path: Path | str, content: str | bytes) -> Path:
    """Write a file that all processes would write alike: the first one does, whole or not at all.

    Args:
        path: the file.
        content: what it holds.

    Returns:
        The path.
    """
    return write_atomically(path, content) if is_writer() else Path(path)


def name() -> str:
    """This process in words: ``process 1 of 4``."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def first_says(value: bool) -> bool:
    """The first process's value, in all of them; every process must ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def all_say(value: Any) -> np.ndarray:
    """Every process's value, stacked in the order of the processes; every process must ask."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def barrier(label: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(label)


def told_to_stop(step: int) -> bool:
    """Whether a process has had a preemption notice (SIGTERM), the same answer in all at a step.

    Args:
        step: the number of the step; every process must ask at each.
    """
    from jax.experimental import multihost_utils

    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def own_copy(tree: Any) -> Any:
    """A tree whose replicated leaves are arrays of this process alone, to compute with by itself.

    Leaves that are split over the processes stay global.
    """

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return leaf.addressable_data(0) if leaf.is_fully_replicated else leaf

    return jax.tree.map(own, tree)


def whole(tree: Any) -> Any:
    """A tree of global arrays as one that this process can read; every process must ask."""
    from jax.experimental import multihost_utils

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        plain = jax.random.key_data(leaf) if is_key else leaf
        if not plain.is_fully_replicated:
            plain = multihost_utils.process_allgather(plain, tiled=True)
        plain = jax.numpy.asarray(np.asarray(plain))
        return jax.random.wrap_key_data(plain, impl=jax.random.key_impl(leaf)) if is_key else plain

    return jax.tree.map(gather, tree)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{variable} is {text!r}, which is not a number of processes or seconds")
    return int(text)


def _is_complete(given: tuple[Any, ...]) -> bool:
    """All three are there; some without the others are a mistake, unless a scheduler adds them."""
    missing = [
        name for name, part in zip((ADDRESS, COUNT, INDEX), given, strict=True) if part is None
    ]
    if missing and len(missing) < 3 and not _scheduled():
        raise ValueError(
            f"{' and '.join(missing)} must be given too: a process needs the coordinator's "
            "host:port, the number of processes and its own"
        )
    return not missing


def _scheduled() -> bool:
    """Whether a scheduler says that this is one process of several."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any((_number(size) or 1) > 1 for size in _SIZES)


def _reach(address: Any, process: Any, seconds: float) -> None:
    """Wait for the coordinator's port: JAX's own client aborts the process if it never opens."""
    host, colon, port = str(address).rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError(f"the coordinator is host:port, not {address!r}")
    if process == 0:
        return
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise ConnectionError(
                    f"process {process} cannot reach the coordinator, process 0, at {address} "
                    f"({error.strerror or error}): start process 0, and check the address and "
                    "that no firewall is between"
                ) from error
        time.sleep(0.2)


def _sign_logs() -> None:
    """Put the process in front of every warning and log record."""
    plain, make, sign = warnings.formatwarning, logging.getLogRecordFactory(), f"[{name()}] "

    def formatwarning(*args: Any, **kwargs: Any) -> str:
        return sign + plain(*args, **kwargs)

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.msg = sign + str(made.msg)
        return made

    warnings.formatwarning = formatwarning
    logging.setLogRecordFactory(record)


def _watched(
    coordinator: str | None = None, *cluster: Any
) -> contextlib.AbstractContextManager[None]:
    """Around a session: end, when another process is killed, even if this one waits for ever."""
    del cluster
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    from orbax.checkpoint import multihost

    def gone(process: int) -> None:
        # Whoever finds it in a reduction knows more, tells it, and leaves by itself.
        time.sleep(_PATIENCE + 2)
        told = {jax.process_index(): ""}
        with contextlib.suppress(Exception):
            told |= _told(multihost.get_jax_distributed_client())
        _leave(ConnectionError(f"process {process} is gone"), [process], told)

    host = (coordinator or os.environ.get(ADDRESS) or "").rpartition(":")[0].strip("[]")
    client = multihost.get_jax_distributed_client()
    return watched(client, jax.process_index(), jax.process_count(), host or None, gone)


def _told(client: Any) -> dict[int, str]:
    """What the processes that failed have said."""
    return {
        int(key.rpartition("/")[2]): reason for key, reason in client.key_value_dir_get(_FAREWELLS)
    }


def _farewells(error: BaseException) -> tuple[list[int], dict[int, str]]:
    """Tell the others why this process fails, and hear what they say: who does not, and who what.

    Returns:
        The processes that did not answer, and the reasons of those that did.
    """
    from orbax.checkpoint import multihost

    told = {jax.process_index(): _reason(error)}
    everyone = range(jax.process_count())
    end = time.monotonic() + _PATIENCE
    try:
        client = multihost.get_jax_distributed_client()
        client.key_value_set(f"{_FAREWELLS}{jax.process_index()}", _reason(error))
        while len(told) < len(everyone) and time.monotonic() < end:
            told |= _told(client)
            time.sleep(0.1)
        if is_writer():
            time.sleep(0.5)  # the coordinator ends with this process: let the others read
    except Exception:  # the coordinator does not answer
        return [0], told
    return [index for index in everyone if index not in told], told


def _reason(error: BaseException) -> str:
    """A failure in one line; a lost connection is not one: its cause is elsewhere."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError) or "Gloo" in str(cause):
            return ""
        cause = cause.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _leave(error: BaseException, missing: list[int], told: dict[int, str]) -> None:
    """Say who is gone or failed and what to do, and end without waiting for anyone."""
    here = jax.process_index()
    if told[here]:
        traceback.print_exception(error)
        said = f"{name()} failed ({told[here]}), and ends the run"
    else:
        failed = [f"process {i} failed ({why})" for i, why in sorted(told.items()) if why]
        gone = [f"process {i} is gone" for i in missing]
        first = str(error).splitlines()[0][:200]
        what = ", ".join(failed or gone) or f"the connection to another process broke ({first})"
        said = f"{what}; {name()} cannot go on without it"
    sys.stdout.flush()
    print(
        f"jmeta: {said}: {_ADVICE}",
        file=sys.stderr,
        flush=True,
    )
    logging.shutdown()
    os._exit(1)
