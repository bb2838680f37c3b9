"""Pictures with captions in a folder: the training data of a LoRA.

A caption is a line of ``metadata.jsonl`` (``{"file_name": "1.png", "text": "a psq-person"}``), or a
``.txt`` file next to the picture, of the same name.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError
from ..files.storage.paths import path_of
from ..files.storage.texts import parsed, read_text
from ..tensors import Array
from .pictures import SUFFIXES, bytes_of, images_in, opened, read

LANCZOS = 1
"""Pillow's number for the filter."""

METADATA = "metadata.jsonl"
COLUMNS = ("text", "caption", "prompt")
"""Keys of a ``metadata.jsonl`` line that may hold the caption; the first one that is there counts."""


@dataclass(frozen=True)
class Picture:
    """A picture and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Cropped:
    """The middle square of a picture."""

    pixels: Array
    """``(3, resolution, resolution)``, float32, in [-1, 1]."""
    original: tuple[int, int]
    """Height and width of the picture."""
    corner: tuple[int, int]
    """Top and left of the square, in the picture resized to the resolution."""


def captioned(folder: str | os.PathLike[str], caption: str | None = None) -> list[Picture]:
    """Return the captioned pictures of a folder, sorted by name.

    Args:
        folder: Only the files directly in it count.
        caption: Used for pictures that have none.

    Raises:
        FileError: The folder is missing, holds no picture, or a caption is missing or unreadable.
    """
    place = path_of(folder)
    files = images_in(place)
    said = _metadata(place)
    _check_listed(place, files, said)
    found = [Picture(file, _caption(file, said) or caption or "") for file in files]
    bare = [picture.path.name for picture in found if not picture.caption]
    if bare:
        raise FileError(
            f"{place}: {len(bare)} of {len(found)} images have no caption, such as {bare[0]}. Ways out: a prompt for "
            f"all of them, {Path(bare[0]).stem}.txt beside the image, or a line in {METADATA}."
        )
    return found


def _check_listed(folder: Path, files: Sequence[Path], said: dict[str, str]) -> None:
    """Refuse a list that names a file that isn't a picture of the folder: it would be left out silently."""
    there = {file.name for file in files}
    lost = [name for name in said if name not in there]
    if lost:
        why = f"a file that does not end in {', '.join(SUFFIXES)}" if os.path.isfile(folder / lost[0]) else "not there"
        raise FileError(
            f"{folder / METADATA} names {lost[0]!r}, which is {why}. Wanted names of the folder's own images."
        )


def _metadata(folder: Path) -> dict[str, str]:
    """Read the captions of ``metadata.jsonl``, by file name."""
    path = folder / METADATA
    if not path.exists():
        return {}
    said = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = parsed(line, str(path))
            name, caption = entry["file_name"], next(entry[c] or "" for c in COLUMNS if c in entry)
            if not isinstance(name, str):
                raise TypeError
            said[name] = caption.strip()
        except (FileError, KeyError, StopIteration, AttributeError, TypeError):
            raise FileError(
                f'{path}, line {number}: wanted {{"file_name": "1.png", "text": "a caption"}}, got {line[:80]}'
            ) from None
    return said


def _caption(file: Path, said: dict[str, str]) -> str:
    beside = file.with_suffix(".txt")
    if file.name not in said and beside.exists():
        return _text(beside).strip()
    return said.get(file.name, "")


def _text(path: Path) -> str:
    """Read a text file without the byte order mark that Windows' editors put in front."""
    return read_text(path).removeprefix("\ufeff")


def cropped(path: Path, resolution: int) -> Cropped:
    """Return the middle square of a picture, resized so that its shorter side has the resolution.

    Raises:
        FileError: The picture can't be read.
    """
    import numpy as np

    image = read(path)
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    image = image.resize(size, LANCZOS).crop((left, top, left + resolution, top + resolution))
    values = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return Cropped(np.ascontiguousarray(values.transpose(2, 0, 1)), (height, width), (top, left))


def size(path: Path) -> tuple[int, int]:
    """Return the height and width of a picture as it is stored.

    Raises:
        FileError: It can't be read.
    """
    with opened(path) as image:
        return image.height, image.width


def digest(found: Sequence[Picture]) -> str:
    """Return the SHA-256 of the pictures' bytes and captions, in order."""
    whole = hashlib.sha256()
    for picture in found:
        whole.update(bytes_of(picture.path))
        whole.update(picture.caption.encode() + b"\0")
    return whole.hexdigest()
