"""Pictures with captions in a folder: what a LoRA was trained on, or will be.

A caption is a line of ``metadata.jsonl`` (``{"file_name": "1.png", "text": "a psq-person"}``), or a
``.txt`` file of the picture's name beside it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError, MissingExtraError
from ..tensors import Array

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
COLUMNS = ("text", "caption", "prompt")
"""Where a line of ``metadata.jsonl`` may have its caption."""


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows."""

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
    """Where the square begins, top and left, once the picture's shorter side has the resolution."""


def pictures(folder: str | os.PathLike[str], caption: str | None = None) -> list[Picture]:
    """The pictures of a folder, by name.

    Args:
        folder: Its own files only.
        caption: For pictures that have none.

    Raises:
        FileError: The folder is missing, holds no picture, or a caption is missing or unreadable.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileError(f"No such directory of images: {place}.")
    files = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise FileError(f"{place} holds no image; wanted {', '.join(SUFFIXES)}.")
    said = _metadata(place)
    found = [Picture(file, _caption(file, said) or caption or "") for file in files]
    bare = [picture.path.name for picture in found if not picture.caption]
    if bare:
        raise FileError(
            f"{place}: {len(bare)} of {len(found)} images have no caption, such as {bare[0]}. Ways out: a prompt for "
            f"all of them, {Path(bare[0]).stem}.txt beside the image, or a line in {METADATA}."
        )
    return found


def _metadata(folder: Path) -> dict[str, str]:
    """Captions by file name."""
    path = folder / METADATA
    if not path.exists():
        return {}
    said = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            said[str(entry["file_name"])] = next(str(entry[c]).strip() for c in COLUMNS if c in entry)
        except (ValueError, TypeError, KeyError, StopIteration):
            raise FileError(
                f'{path}, line {number}: wanted {{"file_name": "1.png", "text": "a caption"}}, got {line[:80]}'
            ) from None
    return said


def _caption(file: Path, said: dict[str, str]) -> str:
    beside = file.with_suffix(".txt")
    if file.name not in said and beside.exists():
        return beside.read_text(encoding="utf-8").strip()
    return said.get(file.name, "")


def cropped(path: Path, resolution: int) -> Cropped:
    """The middle square of a picture, its shorter side brought to the resolution.

    Raises:
        FileError: The picture can't be read.
    """
    import numpy as np

    image = _opened(path)
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    image = image.resize(size, _pil().Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    values = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return Cropped(np.ascontiguousarray(values.transpose(2, 0, 1)), (height, width), (top, left))


def size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as it is stored.

    Raises:
        FileError: It can't be read.
    """
    with _image(path) as image:
        return image.height, image.width


def _opened(path: Path) -> Any:
    pil = _pil()
    from PIL import ImageOps

    with _image(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("RGBA", "LA", "P"):  # what is transparent is white, not black
            upright = upright.convert("RGBA")
            ground = pil.new("RGBA", upright.size, "white")
            upright = pil.alpha_composite(ground, upright)
        return upright.convert("RGB")


@contextmanager
def _image(path: Path) -> Iterator[Any]:
    """An image that is read while this lasts."""
    pil = _pil()
    try:
        with pil.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise FileError(f"Can't read the image {path}: {error}.") from error


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("Reading images needs Pillow: pip install 'loramerge[diffusers]'.") from None
    return Image


def digest(found: Sequence[Picture]) -> str:
    """SHA-256 of the pictures' bytes and captions, in order."""
    whole = hashlib.sha256()
    for picture in found:
        whole.update(picture.path.read_bytes())
        whole.update(picture.caption.encode() + b"\0")
    return whole.hexdigest()
