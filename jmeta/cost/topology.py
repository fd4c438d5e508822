"""Machines that need not be there: TPU topologies by name, and the memory that their chips offer.

The TPU compiler is part of libtpu and runs without a TPU, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# What a program may use of a chip's HBM, in GiB, as the compiler of libtpu 0.0.42 reports it
# for chips sold as 32, 16, 95 and 32 GB.
USABLE = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}

# One device is one chip: on a v4 that is asked for, elsewhere it is so.
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
_NAME = re.compile(r"(v\d+[a-z]*):(\d+(?:x\d+){1,2})")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_EXCEEDS = re.compile(
    r"\(([\d.]+)([BKMGT]?)\) exceeds available HBM \(([\d.]+)([BKMGT]?)\)"
    r"|Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) hbm"
)


class TopologyError(ValueError):
    """A topology that cannot be compiled for; the message says what to do."""


def check_topology(name: str) -> None:
    """Refuse a topology whose name makes no sense, before any compiler is started.

    Args:
        name: ``local`` or ``GENERATION:SHAPE``, such as ``v5e:2x4``.

    Raises:
        TopologyError: the name is of another form, or the generation is none of the known ones.

    Example:
        >>> check_topology("v5p-128")
        Traceback (most recent call last):
        ...
        jmeta.cost.topology.TopologyError: 'v5p-128' is no topology; write GENERATION:SHAPE with \
the shape in chips, such as v5e:2x4, v5e:16x16 or v5p:4x4x4, or local for the devices here
    """
    found = _NAME.fullmatch(name)
    if name != "local" and found is None:
        raise TopologyError(
            f"{name!r} is no topology; write GENERATION:SHAPE with the shape in chips, such as "
            "v5e:2x4, v5e:16x16 or v5p:4x4x4, or local for the devices here"
        )
    if found is not None and found[1] not in USABLE:
        raise TopologyError(
            f"{name!r} names the generation {found[1]!r}; known are {', '.join(USABLE)}"
        )


def require_libtpu() -> None:
    """Refuse to plan for a TPU where its compiler is not installed.

    Raises:
        TopologyError: there is no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "the TPU compiler is not installed: pip install -e '.[tpu]' in a checkout of jmeta (no "
            "TPU is needed)"
        )


def environment() -> dict[str, str]:
    """The variables that let libtpu compile where there is no TPU; for a child process alone.

    In a process that sets them for itself jax would believe that it is on a TPU VM.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # A program compiled for another machine has no place in this one's cache.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def devices(name: str, env: Mapping[str, str] = os.environ) -> list[Any]:
    """The devices of a topology: those here for ``local``, else abstract ones to compile for.

    Args:
        name: of the topology.
        env: the environment of this process.

    Returns:
        Devices, for a mesh.

    Raises:
        TopologyError: no such topology; the process lacks what ``environment`` sets.

    Example:
        >>> devices("local") == jax.devices()
        True
    """
    check_topology(name)
    if name == "local":
        return jax.devices()
    require_libtpu()
    if any(env.get(key) != value for key, value in environment().items() if "TPU" in key):
        raise TopologyError(
            f"{name} cannot be compiled for inside this process; use jmeta.cost.plan, which "
            "starts one for it"
        )
    from jax.experimental import topologies

    options = _OPTIONS.get(name.partition(":")[0], {})
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TopologyError(f"the TPU compiler refuses the topology {name}: {reason}") from error
    return list(found.devices)


def usable_bytes(device: Any, topology: str = "local") -> int:
    """The memory of one device that a program may use, by its compiler's or runtime's own word.

    Args:
        device: of ``devices``.
        topology: that it belongs to.

    Returns:
        Bytes. Host devices share the machine's memory evenly.

    Example:
        >>> usable_bytes(jax.devices("cpu")[0]) > 2**20
        True
    """
    if topology != "local":
        return _asked_of_the_compiler(device)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole // len(jax.devices(device.platform))


def _asked_of_the_compiler(device: Any) -> int:
    """Compile what fits nowhere, and read how much there would have been."""
    layout = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=layout)
    try:
        jax.jit(jnp.cumsum).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = exhausted(str(error))
        if found is not None:
            return found[1]
    raise TopologyError(f"the compiler does not say how much memory {device} has; give memory=")


def exhausted(message: str) -> tuple[int, int] | None:
    """The two figures of a compiler's ``RESOURCE_EXHAUSTED``.

    Args:
        message: of the error.

    Returns:
        ``(bytes needed, bytes there are)``, or None where the message is another.

    Example:
        >>> exhausted("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
        ...           "for HLO temporaries (24.5G) exceeds available HBM (15.75G).")
        (26306674688, 16911433728)
    """
    found = _EXCEEDS.search(message) if "RESOURCE_EXHAUSTED" in message else None
    if found is None:
        return None
    needed, unit, there, there_unit = [part for part in found.groups() if part is not None]
    return (
        int(float(needed) * _UNITS[unit.lower().strip("b")]),
        int(float(there) * _UNITS[there_unit.lower().strip("b")]),
    )


def memory_bytes(memory: str | int | float) -> int:
    """A size of memory as people write it.

    Args:
        memory: bytes, or text: ``16GiB`` or ``16G`` is 16 x 2^30, ``16GB`` is 16 x 10^9.

    Returns:
        Bytes.

    Raises:
        ValueError: it is no size, or not positive.

    Example:
        >>> memory_bytes("15.75GiB"), memory_bytes("16 GB")
        (16911433728, 16000000000)
    """
    text = str(memory).strip().lower()
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(?:([kmgt]?)(i?b)?)", text)
    if found is None or not float(found[1]):
        raise ValueError(
            f"{memory!r} is no size of memory; write bytes or a unit: 16911433728, 15.75GiB, 16GB"
        )
    unit, suffix = found[2], found[3]
    factor = _DECIMAL[unit + "b"] if unit and suffix == "b" else _UNITS[unit]
    return int(float(found[1]) * factor)
