"""How a picture was made, in the picture: JSON in an international text chunk (iTXt) of the PNG."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError, MissingExtraError
from ..storage.writer import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "loramerge"
"""The chunk's keyword."""


def save_png(image: "Image", path: Path, recipe: Mapping[str, Any] | None = None) -> None:
    """Write a picture, with its recipe if it has one: whole, or not at all."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if recipe is not None:
        chunks.add_itxt(KEY, json.dumps(recipe, ensure_ascii=False))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=chunks)
    write_bytes(path, data.getvalue())


def recipe_in(path: Path) -> dict[str, Any] | None:
    """The recipe in a picture; None where it has none.

    Raises:
        FileError: The file is no picture, or its recipe is no recipe.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("Pictures need Pillow: pip install 'loramerge[diffusers]'.") from None
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"Can't read the image {path}: {error}.") from error
    if text is None:
        return None
    try:
        recipe: dict[str, Any] = json.loads(text)
        if isinstance(recipe["prompt"], str) and isinstance(recipe["seed"], int):
            return recipe
    except (ValueError, TypeError, KeyError):
        pass
    raise FileError(f"{path}: the recipe inside is no recipe: {text[:80]}. Save the picture anew without it.")
