"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each, as 28 x 28 images.

Background alphabets to train on, some of them held out to choose a model, evaluation alphabets to
report on: no alphabet is on two sides.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from jmeta.data.sources import DataUnavailable, from_tfds
from jmeta.tasks.episodes import FewShot, few_shot

SIZE = 28
_HOW = (
    "pass a folder with omniglot28.npz, or with images_background and images_evaluation (folders "
    "or .zip files, from github.com/brendenlake/omniglot), or set JMETA_DATA to a folder that has "
    "an omniglot folder like that; or prepare tfds' omniglot with file_format='array_record'"
)


class Drawings(NamedTuple):
    """Every drawing of Omniglot, whatever it was read from.

    Attributes:
        images: uint8 ``[n, 28, 28]``, ink 255 on 0.
        alphabet: ``[n]`` names of alphabets.
        character: int ``[n]``, number within the alphabet.
        background: bool ``[n]``, true in the background set.
    """

    images: np.ndarray
    alphabet: np.ndarray
    character: np.ndarray
    background: np.ndarray


def omniglot(
    path: str | os.PathLike[str] | None = None,
    *,
    rotations: bool = True,
    validation_alphabets: int = 3,
    seed: int = 0,
) -> dict[str, FewShot]:
    """Omniglot as three few-shot sources: training, model selection, evaluation.

    Args:
        path: ``omniglot28.npz``, a folder that holds it, or the folder of the original
            ``images_background`` and ``images_evaluation`` (unpacked, or as ``.zip``). By
            default ``$JMETA_DATA/omniglot``, else tfds.
        rotations: add each training character turned by 90, 180 and 270 degrees, as classes of
            their own; never for validation and test.
        validation_alphabets: how many of the background alphabets are held out of training.
        seed: decides which.

    Returns:
        ``{"train", "validation", "test"}``: ``x`` float32 ``[n, 28, 28, 1]`` in [0, 1], ink is 1;
        class names such as ``"Latin/character01"`` and ``"Latin/character01/90"``.

    Raises:
        DataUnavailable: there is no Omniglot here; the message lists what can be given.
        ValueError: no background alphabet would be left to train on.

    Reference:
        Lake et al. 2015, "Human-level concept learning through probabilistic program induction";
        rotations as classes: Santoro et al. 2016, section 4.1.
    """
    drawings = _read(path)
    alphabets = np.unique(drawings.alphabet[drawings.background])
    if not 0 <= validation_alphabets < len(alphabets):
        raise ValueError(
            f"{validation_alphabets} of {len(alphabets)} background alphabets cannot be held out"
        )
    held_out = np.random.default_rng(seed).permutation(alphabets)[:validation_alphabets]
    validation = drawings.background & np.isin(drawings.alphabet, held_out)
    parts = {"train": drawings.background & ~validation}
    if validation_alphabets:
        parts["validation"] = validation
    if not drawings.background.all():
        parts["test"] = ~drawings.background
    return {
        split: _source(drawings, rows, rotations and split == "train")
        for split, rows in parts.items()
    }


def _source(drawings: Drawings, rows: np.ndarray, rotations: bool) -> FewShot:
    images = drawings.images[rows][..., None]
    names = np.array(
        [
            f"{alphabet}/character{number:02d}"
            for alphabet, number in zip(
                drawings.alphabet[rows], drawings.character[rows], strict=True
            )
        ]
    )
    if rotations:
        images = np.concatenate([np.rot90(images, turns, axes=(1, 2)) for turns in range(4)])
        names = np.concatenate([names] + [np.char.add(names, f"/{90 * i}") for i in (1, 2, 3)])
    x = images.astype(np.float32)
    x /= 255
    return few_shot(x, names)


def _read(path: str | os.PathLike[str] | None) -> Drawings:
    if path is None:
        folder = os.environ.get("JMETA_DATA")
        if not folder or not (Path(folder) / "omniglot").exists():
            return _read_tfds()
        path = Path(folder) / "omniglot"
    path = Path(path).expanduser()
    archive = path / "omniglot28.npz" if path.is_dir() else path
    if archive.suffix == ".npz" and archive.exists():
        return _read_npz(archive)
    if path.is_dir() and _part(path, "images_background") is not None:
        return _read_images(path)
    raise DataUnavailable(f"there is no Omniglot at {path}: {_HOW}")


def _read_npz(path: Path) -> Drawings:
    try:
        with np.load(path, allow_pickle=False) as file:
            background = list(file["split_names"]).index("background")
            return Drawings(
                images=file["images"],
                alphabet=file["alphabet_names"][file["alphabet"]],
                character=file["character"].astype(int),
                background=file["split"] == background,
            )
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataUnavailable(f"{path} is damaged ({error}): {_HOW}") from error


def _read_tfds() -> Drawings:
    try:
        parts = [from_tfds("omniglot", split) for split in ("train", "test")]
    except DataUnavailable as error:
        raise DataUnavailable(f"Omniglot is not here: {_HOW} ({error})") from error
    return Drawings(
        images=np.concatenate([shrink(part["image"][..., 0]) for part in parts]),
        alphabet=np.concatenate([[f"alphabet{a:02d}" for a in part["alphabet"]] for part in parts]),
        character=np.concatenate([part["alphabet_char_id"] for part in parts]),
        background=np.repeat([True, False], [len(part["alphabet"]) for part in parts]),
    )


def _part(folder: Path, name: str) -> Path | None:
    """The unpacked folder of a part, or its zip file."""
    for path in (folder / name, folder / f"{name}.zip"):
        if path.exists():
            return path
    return None


def _read_images(folder: Path) -> Drawings:
    images, alphabets, characters, background = [], [], [], []
    for name in ("images_background", "images_evaluation"):
        part = _part(folder, name)
        if part is None:
            continue
        for inside, data in _pngs(part):
            images.append(_decode(data, inside))
            alphabets.append(inside.parts[-3])
            characters.append(int(inside.parts[-2].removeprefix("character")))
            background.append(name == "images_background")
    if not images:
        raise DataUnavailable(f"no alphabet/character01/*.png below {folder}: {_HOW}")
    return Drawings(
        shrink(np.stack(images)), np.array(alphabets), np.array(characters), np.array(background)
    )


def _pngs(part: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The drawings below a folder or in a zip file, in the order of their paths."""
    if part.is_dir():
        for path in sorted(part.glob("*/character*/*.png")):
            yield PurePosixPath(path.as_posix()), path.read_bytes()
        return
    try:
        with zipfile.ZipFile(part) as archive:
            for name in sorted(archive.namelist()):
                inside = PurePosixPath(name)
                drawing = inside.suffix == ".png" and "__MACOSX" not in inside.parts
                if drawing and inside.parent.name.startswith("character"):
                    yield inside, archive.read(name)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataUnavailable(f"{part} is damaged ({error}): {_HOW}") from error


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise DataUnavailable(
            "the original images of Omniglot are PNG files, which need pillow: "
            "pip install pillow, or use omniglot28.npz"
        ) from error
    return Image


def _decode(data: bytes, name: PurePosixPath) -> np.ndarray:
    import io

    image = _pillow()
    try:
        return np.asarray(image.open(io.BytesIO(data)).convert("L"))
    except OSError as error:
        raise DataUnavailable(f"the drawing {name} is damaged ({error}): {_HOW}") from error


def shrink(images: np.ndarray) -> np.ndarray:
    """Scale drawings to 28 x 28 (Lanczos, anti-aliased) and turn black ink on white around.

    Args:
        images: uint8 ``[n, height, width]``, ink 0 on 255.

    Returns:
        uint8 ``[n, 28, 28]``, ink 255 on 0.
    """
    image = _pillow()
    small = [
        np.asarray(image.fromarray(drawing).resize((SIZE, SIZE), image.Resampling.LANCZOS))
        for drawing in images
    ]
    return 255 - np.stack(small)
