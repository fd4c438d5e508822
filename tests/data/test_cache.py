import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir, write_atomically


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "encrypted"])
def test_damaged_arrays_are_made_again(tmp_path, damage):
    path = tmp_path / "a.npz"
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(5000) ** 2 % 97, "names": np.array(["a", "é"])}

    first = cached_arrays(path, make)
    raw = path.read_bytes()
    flipped = raw[:200] + bytes([raw[200] ^ 255]) + raw[201:]
    entry = raw.index(b"PK\1\2") + 8  # the flags of the first file in the archive's index
    encrypted = raw[:entry] + bytes([raw[entry] ^ 1]) + raw[entry + 1 :]
    damaged = {"empty": b"", "cut": raw[: len(raw) // 2], "flipped": flipped}
    path.write_bytes(damaged.get(damage, encrypted))
    with pytest.warns(UserWarning, match=r"a\.npz is damaged .*; it is made again"):
        again = cached_arrays(path, make)
    for read in (again, cached_arrays(path, make)):
        np.testing.assert_array_equal(read["x"], first["x"])
        assert read["names"].tolist() == ["a", "é"]
    assert len(calls) == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_as_readable_as_any_other_and_the_process_is_left_as_it_was(
    tmp_path, monkeypatch
):
    (tmp_path / "other").write_text("x")

    def never(mask):  # asking for it sets it, for every thread of the process
        raise AssertionError("the process's umask was changed")

    monkeypatch.setattr(os, "umask", never)
    written = write_atomically(tmp_path / "ours", "x")
    assert written.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    path = tmp_path / "a.npz"

    def write(i):
        return cached_arrays(path, lambda: {"x": np.full(2000, i)})["x"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(write, range(40)))
    assert all(len(set(x.tolist())) == 1 for x in found)  # each reads one writer's, whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_only_warns(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="set JMETA_CACHE"):
        arrays = cached_arrays(tmp_path / "file" / "a.npz", lambda: {"x": np.ones(2)})
    assert arrays["x"].sum() == 2


def test_cache_folder_and_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("JMETA_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "jmeta")
    assert cache_key(a=1, b=2) == cache_key(b=2, a=1) != cache_key(a=1, b=3)
    long = np.arange(5000)
    assert cache_key(a=long) == cache_key(a=long.copy())
    # str shows the first and the last three alone
    assert cache_key(a=long) != cache_key(a=np.where(long == 2500, 0, long))
    assert cache_key(a=long) != cache_key(a=long.reshape(50, 100))
