import numpy as np
import pytest

from jmeta.data.cache import cache_key, cached_arrays
from jmeta.files import cache_dir, write_atomically


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_damaged_arrays_are_made_again(tmp_path, damage):
    path = tmp_path / "a.npz"
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(5000) ** 2 % 97, "names": np.array(["a", "é"])}

    first = cached_arrays(path, make)
    raw = path.read_bytes()
    flipped = raw[:200] + bytes([raw[200] ^ 255]) + raw[201:]
    path.write_bytes({"empty": b"", "cut": raw[: len(raw) // 2], "flipped": flipped}[damage])
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
