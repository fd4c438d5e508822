"""JAX's compilation cache for experiments run with plain ``python``: a second run is quick."""

from __future__ import annotations

import os
import pathlib

import jax

from jmeta.files import cache_dir


def use_compilation_cache() -> pathlib.Path:
    """Keep compiled programs on disk; call it before anything is compiled.

    The folder is ``$JMETA_CACHE/jax`` or ``~/.cache/jmeta/jax``. JAX's own environment variables
    (``JAX_COMPILATION_CACHE_DIR``, ``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`` and
    ``JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES``) win where they are set.

    Returns:
        The folder in use.

    Example:
        >>> folder = use_compilation_cache()
    """
    folder = cache_dir() / "jax"
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        # XLA's own caches of kernels tie an entry to the folder it was made in.
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    for name, value in wanted.items():
        if not os.environ.get(name.upper()):
            jax.config.update(name, value)
    return pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder))
