"""Safetensors files: damage of every kind has one clear error, before a tensor is read."""

import json

import numpy as np
import pytest

from jmeta.models import tensorfile


def written(path, **arrays):
    lazy = {n: tensorfile.Lazy(a.shape, str(a.dtype), lambda a=a: a) for n, a in arrays.items()}
    return tensorfile.write(path, lazy)


@pytest.fixture
def file(tmp_path):
    return written(
        tmp_path / "a.safetensors",
        first=np.arange(6, dtype=np.float32).reshape(2, 3),
        second=np.arange(4, dtype=np.float16),
    )


def parts(file):
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def put(file, header, data):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"data_offsets": [0, 24]}, "damaged: it puts the tensor 'second', float16 of shape .4."),
        ({"data_offsets": [22, 30]}, "bytes 22 to 30, and the one before it ends at 24"),
        ({"data_offsets": [24, 34]}, "truncated.* 1 of its 2 tensors, the first 'second' of shape"),
        ({"shape": [5]}, "damaged: it puts the tensor 'second', float16 of shape .5."),
        ({"dtype": "F32"}, "damaged: it puts the tensor 'second', float32"),
        ({"data_offsets": [-8, 0]}, "header cannot be read"),
        ({"data_offsets": ["a", "b"]}, "header cannot be read"),
        ({"data_offsets": [24]}, "header cannot be read"),
        ({"shape": "ab"}, "header cannot be read"),
        ({"shape": [2.0, 2.0]}, "header cannot be read"),
        ({"dtype": ["F16"]}, "header cannot be read"),
        ({"more": 1}, "header cannot be read"),
    ],
)
def test_a_header_that_lies_is_found_out(file, entry, words):
    header, data = parts(file)
    header["second"] |= entry
    put(file, header, data)
    with pytest.raises(ValueError, match=words):
        tensorfile.contents([file])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\5",
        (2**62).to_bytes(8, "little") + b"{}",
        (1).to_bytes(8, "little") + b"{}",
        (6).to_bytes(8, "little") + b"[1, 2]",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
        (14).to_bytes(8, "little") + b'{"first": null}'[:14],
    ],
    ids=range(8),
)
def test_what_is_no_header_is_said_to_be_none(tmp_path, content):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        tensorfile.contents([file])


def test_bytes_after_the_last_tensor_and_twins_are_refused(file, tmp_path):
    other = written(tmp_path / "b.safetensors", second=np.zeros(4, np.float16))
    with pytest.raises(ValueError, match=r"'second' lies in .*a\.safetensors and in .*b\.safe"):
        tensorfile.contents([file, other])
    file.write_bytes(file.read_bytes() + b"junk")
    with pytest.raises(ValueError, match="4 bytes follow its last tensor"):
        tensorfile.contents([file])


def test_a_dtype_that_numpy_has_not_is_named(file):
    header, data = parts(file)
    header["second"] |= {"dtype": "F8_E4M3", "shape": [8]}
    put(file, header, data)
    stored = tensorfile.contents([file])
    np.testing.assert_array_equal(tensorfile.read(stored["first"]), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match="'second' has dtype F8_E4M3, which jmeta does not read"):
        tensorfile.read(stored["second"])


def test_empty_tensors_and_scalars_come_back(tmp_path):
    arrays = {"none": np.zeros((0, 3), np.float32), "one": np.asarray(7, np.int64)}
    stored = tensorfile.contents([written(tmp_path / "a.safetensors", **arrays)])
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensorfile.read(stored[name]), array)
