import shutil
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from jmeta.data.sources import DataUnavailable
from jmeta.tasks.omniglot import omniglot, shrink


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The layout of the original archives: 4 + 2 alphabets of 2 characters, 3 drawings each."""
    root = tmp_path_factory.mktemp("omniglot")
    rng = np.random.default_rng(0)
    for part, alphabets in (("background", "ABCD"), ("evaluation", "YZ")):
        for alphabet in alphabets:
            for character in (1, 2):
                folder = root / f"images_{part}" / alphabet / f"character{character:02d}"
                folder.mkdir(parents=True)
                for drawer in range(3):
                    image = Image.new("1", (105, 105), 1)
                    corners = [tuple(map(int, rng.integers(5, 100, 2))) for _ in range(3)]
                    ImageDraw.Draw(image).line(corners, fill=0, width=3)
                    image.save(folder / f"{drawer:04d}.png")
    return root


def as_npz(sources, path):
    names, images, alphabet, character, split = ["A", "B", "C", "D", "Y", "Z"], [], [], [], []
    for part, source in sources.items():
        for x, y in zip(source.x, source.y, strict=True):
            name, number = source.names[y].split("/")
            images.append(np.round(x[..., 0] * 255))
            alphabet.append(names.index(name))
            character.append(int(number.removeprefix("character")))
            split.append(part == "test")
    np.savez_compressed(
        path,
        images=np.array(images, np.uint8),
        alphabet=np.array(alphabet, np.uint8),
        character=np.array(character, np.uint8),
        split=np.array(split, np.uint8),
        alphabet_names=np.array(names),
        split_names=np.array(["background", "evaluation"]),
    )


def test_folders_zips_and_npz_give_the_same_sources(original, tmp_path):
    folders = omniglot(original, rotations=False, validation_alphabets=1)
    assert {s: (len(v.names), len(v.y)) for s, v in folders.items()} == {
        "train": (6, 18),
        "validation": (2, 6),
        "test": (4, 12),
    }
    for part in ("background", "evaluation"):
        shutil.make_archive(
            str(tmp_path / f"images_{part}"), "zip", original, base_dir=f"images_{part}"
        )
    zips = omniglot(tmp_path, rotations=False, validation_alphabets=1)
    as_npz(folders, tmp_path / "omniglot28.npz")
    npz = omniglot(tmp_path, rotations=False, validation_alphabets=1)
    for split, source in folders.items():
        for other in (zips[split], npz[split]):
            assert other.names == source.names
            np.testing.assert_array_equal(other.y, source.y)
            np.testing.assert_array_equal(other.x, source.x)


def test_images_are_ink_on_nothing_and_shrunk_like_pillow(original):
    drawing = original / "images_evaluation" / "Y" / "character02" / "0001.png"
    image = Image.open(drawing).convert("L")
    small = np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(shrink(np.asarray(image)[None])[0], 255 - small)
    test = omniglot(original)["test"]
    mine = test.x[test.y == test.names.index("Y/character02")][1, ..., 0]
    np.testing.assert_allclose(mine, 1 - small / np.float32(255), atol=1e-6)
    assert 0 < mine.mean() < 0.3  # little ink
    assert mine.max() > 0.5


def test_rotations_are_new_classes_of_training_only(original):
    plain = omniglot(original, rotations=False, validation_alphabets=1)
    turned = omniglot(original, validation_alphabets=1)
    assert len(turned["train"].names) == 4 * len(plain["train"].names)
    assert turned["validation"].names == plain["validation"].names
    assert turned["test"].names == plain["test"].names
    name = plain["train"].names[0]

    def images(angle):
        source = turned["train"]
        return source.x[source.y == source.names.index(name + angle)]

    upright = images("")
    for turns, angle in ((1, "/90"), (2, "/180"), (3, "/270")):
        np.testing.assert_array_equal(images(angle), np.rot90(upright, turns, axes=(1, 2)))


def test_held_out_alphabets(original):
    def alphabets(source):
        return {name.split("/")[0] for name in source.names}

    held = {tuple(alphabets(omniglot(original, seed=s)["validation"])) for s in range(3)}
    assert len(held) > 1
    sources = omniglot(original, validation_alphabets=2)
    assert alphabets(sources["train"]) | alphabets(sources["validation"]) == set("ABCD")
    assert not alphabets(sources["train"]) & alphabets(sources["validation"])
    assert alphabets(sources["test"]) == set("YZ")
    assert "validation" not in omniglot(original, validation_alphabets=0)
    with pytest.raises(ValueError, match="4 of 4 background alphabets"):
        omniglot(original, validation_alphabets=4)


def test_what_is_missing_or_damaged_is_said(original, tmp_path, monkeypatch):
    with pytest.raises(DataUnavailable, match=r"no Omniglot at .*images_background"):
        omniglot(tmp_path)
    monkeypatch.delenv("JMETA_DATA", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataUnavailable, match="set JMETA_DATA"):
        omniglot()
    (tmp_path / "omniglot28.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(DataUnavailable, match="damaged"):
        omniglot(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "images_background.zip").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(DataUnavailable, match="damaged"):
        omniglot(tmp_path / "cut")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataUnavailable, match="pip install pillow"):
        omniglot(original)


def test_tfds_records_give_the_same_images(original, tmp_path, monkeypatch):
    import jmeta.tasks.omniglot as module

    parts = {}
    for split, part in (("train", "background"), ("test", "evaluation")):
        paths = sorted((original / f"images_{part}").glob("*/*/*.png"))
        letters = sorted({p.parts[-3] for p in paths})
        images = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
        parts[split] = {
            "image": images,
            "alphabet": np.array(
                [letters.index(p.parts[-3]) + 30 * (split == "test") for p in paths]
            ),
            "alphabet_char_id": np.array([int(p.parts[-2][-2:]) for p in paths]),
        }
    monkeypatch.delenv("JMETA_DATA", raising=False)
    monkeypatch.setattr(module, "from_tfds", lambda name, split: parts[split])
    found = omniglot(rotations=False, validation_alphabets=0)
    expected = omniglot(original, rotations=False, validation_alphabets=0)
    for split in ("train", "test"):
        np.testing.assert_array_equal(found[split].x, expected[split].x)
        np.testing.assert_array_equal(found[split].y, expected[split].y)


def test_the_real_one(jmeta_data):
    sources = omniglot(jmeta_data / "omniglot")
    classes = {split: len(source.names) for split, source in sources.items()}
    assert classes["train"] / 4 + classes["validation"] == 964
    assert classes["test"] == 515
    assert all((np.bincount(source.y) == 20).all() for source in sources.values())
