"""A parameter file: exact round trips, what it cannot hold, damage that is found."""

import errno
import pathlib
from collections import namedtuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from jmeta.runtime.parameters import load_params, save_params

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_, np.int8]

arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        np.uint8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    ).map(lambda array: array.astype(dtype))
)
names = st.text("abc.é", min_size=1, max_size=3)
trees = st.dictionaries(
    names,
    st.recursive(arrays, lambda leaf: st.dictionaries(names, leaf, max_size=3), max_leaves=6),
    max_size=4,
)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(tree=trees, notes=st.dictionaries(st.text(), st.integers() | st.text()))
def test_parameters_round_trip(tmp_path_factory, tree, notes):
    path = tmp_path_factory.mktemp("p") / "user.safetensors"
    save_params(path, tree, notes)
    found, found_notes = load_params(path)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert found_notes == notes
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_strided_arrays_are_saved_as_they_read(tmp_path):
    array = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    save_params(tmp_path / "p", {"t": array.T, "s": array[:, ::2], "r": array[::-1]})
    found, _ = load_params(tmp_path / "p")
    np.testing.assert_array_equal(found["t"], array.T)
    np.testing.assert_array_equal(found["s"], array[:, ::2])
    np.testing.assert_array_equal(found["r"], array[::-1])


def test_adapt_save_load_predict(tmp_path):
    """One user's model: the loaded one predicts what the adapted one does, bit for bit."""
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    y = x.sum(axis=1)

    @jax.jit
    def predict(params, x):
        return jnp.tanh(x @ params["hidden"]["kernel"]) @ params["out"]

    @jax.jit
    def adapted(params):
        grads = jax.grad(lambda params: jnp.mean((predict(params, x) - y) ** 2))(params)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, grads)

    params = {"hidden": {"kernel": np.eye(4, dtype=np.float32)}, "out": np.ones(4, np.float32)}
    for _ in range(5):
        params = adapted(params)
    save_params(tmp_path / "ann", params, {"user": "ann", "inner_steps": 5})
    loaded, notes = load_params(tmp_path / "ann")
    assert notes == {"user": "ann", "inner_steps": 5}
    assert predict(params, x).tobytes() == predict(loaded, x).tobytes()


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({"a": {"b": [jnp.ones(1)]}}, TypeError, r"'a/b' is a list.*turn lists and tuples"),
        ({"a": (jnp.ones(1),)}, TypeError, "'a' is a tuple"),
        ({"a": "text"}, TypeError, "'a' is a str.*metadata"),
        ({"a": namedtuple("Pair", "w b")(1, 2)}, TypeError, "'a' is a Pair"),
        ({"a": jax.random.key(0)}, TypeError, "'a' is a PRNG key.*key_data"),
        ({"a": {0: jnp.ones(1)}}, TypeError, "under 'a' is the key 0"),
        ({"a/b": jnp.ones(1)}, ValueError, "key 'a/b'"),
        (jnp.ones(1), TypeError, "the whole tree"),
    ],
)
def test_what_a_parameter_file_cannot_hold_is_named(tmp_path, tree, error, words):
    with pytest.raises(error, match=words):
        save_params(tmp_path / "p", tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_parameter_file_is_said(tmp_path, keep):
    path = tmp_path / "p"
    save_params(path, {"w": np.arange(100, dtype=np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"/p is not a whole safetensors file"):
        load_params(path)


def test_a_flipped_bit_in_a_parameter_file_is_said(tmp_path):
    path = tmp_path / "p"
    save_params(path, {"w": np.arange(100, dtype=np.float32)})
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_params(path)


def test_a_file_from_elsewhere_loads_too(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.b": np.ones(2, np.float32)}, tmp_path / "p", metadata={"format": "pt"})
    tree, notes = load_params(tmp_path / "p")
    assert tree["a.b"].tolist() == [1.0, 1.0]
    assert notes == {"format": "pt"}
    with pytest.raises(FileNotFoundError, match="no parameter file"):
        load_params(tmp_path / "absent")


def test_float64_parameters_narrow_with_a_warning(tmp_path):
    save_params(tmp_path / "p", {"w": np.array([0.1])})
    with pytest.warns(UserWarning, match=r"64-bit arrays \(w\)"):
        assert load_params(tmp_path / "p")[0]["w"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert load_params(tmp_path / "p")[0]["w"].tolist() == [0.1]


def test_a_full_disk_leaves_the_old_parameter_file(tmp_path, monkeypatch):
    path = pathlib.Path(tmp_path / "p")
    save_params(path, {"w": jnp.ones(3)})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"/p could not be written: No space left"):
        save_params(path, {"w": jnp.zeros(3)})
    assert load_params(path)[0]["w"].tolist() == [1.0, 1.0, 1.0]
    assert [each.name for each in tmp_path.iterdir()] == ["p"]
