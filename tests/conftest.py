"""Strict settings for every test: eight CPU devices, no silent promotion, no network."""

import gc
import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The tests check numbers, not speed, and three quarters of their time was the compiler's: LLVM
# without its optimiser, fusions by the older emitters, one module to a program.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Later ones have no older emitters, and a process with a flag that XLA does not know dies.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
# Whatever the Makefile says for programs: a test compiles hundreds of small ones, an operation
# each, and other files and the other worker compile the same.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A third of the time is tracing's: many objects that are garbage together, and a source line of
# each operation that nobody reads.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(200_000, 20, 20)


ROOM = 3 * 2**30


def resident() -> int:
    """Bytes of memory this process holds, as Linux says; elsewhere too many to keep anything."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return ROOM + 1
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop what was compiled once it fills memory: a worker would grow to seven gigabytes."""
    yield
    if resident() > ROOM:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Run the test in float64: oracles are compared at 1e-10."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Optax's bias correction mixes dtypes in float64; jmeta itself stays strict."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def jmeta_data() -> pathlib.Path:
    """The folder of optional real data sets, named by JMETA_DATA."""
    folder = os.environ.get("JMETA_DATA")
    if not folder:
        pytest.skip("JMETA_DATA is not set: this test reads real data sets from that folder")
    return pathlib.Path(folder)
