"""The recipe of a picture inside the picture: JSON in an international text chunk (iTXt) of the PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError
from ..files.storage.texts import as_json, parsed
from ..files.storage.writer import write_bytes
from .pictures import opened

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "loramerge"
"""The chunk's keyword."""
ORDER = "loramerge.settings"
"""The keyword of a contact sheet's chunk: its settings, in drawing order."""


RATE = 16
"""Frames per second of an animated PNG: Wan's."""


def save_png(
    image: "Image",
    path: Path,
    recipe: Mapping[str, Any] | None = None,
    *,
    more: Sequence["Image"] = (),
    settings: Sequence[str] = (),
) -> None:
    """Write a picture, with its recipe or a sheet's settings if it has any: whole, or not at all.

    Args:
        image: The picture, or the first frame.
        path: The file.
        recipe: What `recipe_in` gives back.
        more: Further frames: with them it is an animated PNG.
        settings: What `order_in` gives back.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if recipe is not None:
        chunks.add_itxt(KEY, as_json(recipe))
    if settings:
        chunks.add_itxt(ORDER, as_json(list(settings)))
    data = io.BytesIO()
    frames = {"save_all": True, "append_images": list(more), "duration": 1000 / RATE} if more else {}
    image.save(data, "PNG", pnginfo=chunks, **frames)
    write_bytes(path, data.getvalue())


def order_in(sheet: Path) -> list[str]:
    """Return the settings of a contact sheet in drawing order; none if loramerge didn't write it."""
    try:
        with opened(sheet) as image:
            found = parsed(f'{{"settings": {image.info.get(ORDER, "[]")}}}', str(sheet))["settings"]
    except FileError:
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def recipe_in(path: Path) -> dict[str, Any] | None:
    """Return the recipe in a picture; None if it has none.

    Raises:
        FileError: The file isn't a picture, or its recipe is broken.
        MissingExtraError: Pillow is not installed.
    """
    with opened(path) as image:
        text = image.info.get(KEY)
    if text is None:
        return None
    try:
        recipe = parsed(text, str(path))
        whole = isinstance(recipe["prompt"], str) and isinstance(recipe["seed"], int)
    except (FileError, KeyError):
        whole = False
    if not whole:
        raise FileError(
            f"{path}: the recipe inside isn't JSON with a prompt and a seed: {text[:80]}. "
            "Save the picture again without it."
        )
    return recipe
