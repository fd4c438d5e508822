"""Checkpoints in one copy: sharded as they are read, written leaf by leaf, never held twice."""

import pathlib
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_folder import BERT, GPT2, same
from jax.sharding import NamedSharding, PartitionSpec
from random_params import random_params

from jmeta.models import bert, gpt2, pretrained, tensorfile
from jmeta.models.pretrained import from_pretrained, to_pretrained


@pytest.fixture
def folder(tmp_path):
    return to_pretrained(tmp_path / "bert", BERT, random_params(bert, BERT))


def test_sharded_at_load(folder):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    read = []

    def sharding(path, shape):
        last = "model" if path.endswith("up.kernel") else None
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), last))

    params = from_pretrained(folder, sharding=sharding).params
    same(params, from_pretrained(folder).params)
    shards = params["blocks"]["mlp"]["up"]["kernel"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(2, 8, 5)] * 8
    original = tensorfile.read

    def spy(stored, index=()):
        part = original(stored, index)
        read.append((stored.name, part.shape))
        return part

    try:
        tensorfile.read = spy
        from_pretrained(folder, sharding=sharding)
    finally:
        tensorfile.read = original
    # Stored as [out, in]: of each shard only its own rows are read, once for all its copies.
    assert [s for n, s in read if n.endswith("0.intermediate.dense.weight")] == [(5, 8)] * 2


def test_never_two_copies(tmp_path):
    """Reading and writing need the model once, and beyond it no more than a leaf twice."""
    config = GPT2._replace(width=256, layers=8, heads=4, vocab=512, ff=1024)
    shapes = jax.eval_shape(lambda: gpt2.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    leaf = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert size > 3 * leaf
    tracemalloc.start()
    try:
        to_pretrained(tmp_path, config, params)
        written = tracemalloc.get_traced_memory()[1]
        del params
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        model = from_pretrained(tmp_path)  # jax may keep or copy what numpy allocated
        read = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert model.config == config
    assert written < leaf
    assert read < size + 2 * leaf + 2**20


def test_no_copy_of_a_sharded_model_stays_behind(tmp_path):
    """What numpy makes of an array in pieces stays with the array: here with a copy of it."""
    mesh = jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    config = GPT2._replace(width=128, layers=4, vocab=256, ff=512)
    shapes = jax.eval_shape(lambda: gpt2.init(config, jax.random.key(0)))
    last = lambda n: PartitionSpec(*[None] * (n - 1), "all")  # noqa: E731
    params = jax.tree.map(
        lambda leaf: jax.device_put(
            np.ones(leaf.shape, leaf.dtype), NamedSharding(mesh, last(leaf.ndim))
        ),
        shapes,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tracemalloc.start()
    try:
        to_pretrained(tmp_path, config, params)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * size  # a leaf, and what compiling the slices leaves
    assert left < 0.3 * size
    same(from_pretrained(tmp_path).params, params)


def test_a_model_split_over_processes_is_refused_before_anything_is_written(
    folder, tmp_path, monkeypatch
):
    params = from_pretrained(folder).params
    lacking = params["blocks"]["ln1"]["bias"]
    monkeypatch.setattr(pretrained, "_at_hand", lambda leaf: leaf is not lacking)
    with pytest.raises(ValueError, match=r"'blocks.ln1.bias' is split over several processes; in"):
        to_pretrained(tmp_path / "new", BERT, params)
    assert not (tmp_path / "new").exists()


def test_a_replicated_model_is_written_from_one_copy(folder, tmp_path):
    """Without a computation that the other processes of a launch would have to join."""
    mesh = jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    params = from_pretrained(folder, sharding=NamedSharding(mesh, PartitionSpec())).params
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "copy", None)
        patch.setattr(type(params["embed"]["tokens"]), "__getitem__", None)
        to_pretrained(tmp_path, BERT, params)
    same(from_pretrained(tmp_path).params, params)


RESIDENT = """
import resource, sys
import jax, jax.numpy as jnp
from jmeta.models import gpt2, pretrained
import safetensors.numpy, numpy
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jnp.zeros(3).block_until_ready()
before = peak()
model = pretrained.from_pretrained(sys.argv[1])
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in Linux's units")
def test_resident_memory_of_reading(tmp_path):
    import subprocess

    config = GPT2._replace(width=512, layers=12, heads=4, vocab=512, ff=2048)
    shapes = jax.eval_shape(lambda: gpt2.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    leaf = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    to_pretrained(tmp_path, config, params)
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path)],
        capture_output=True, text=True, check=True,
        cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    grown, size = map(int, done.stdout.split())
    assert size > 100 * 2**20
    assert grown < size + 2 * leaf + 40 * 2**20
    assert grown < 1.8 * size
