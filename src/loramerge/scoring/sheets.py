"""Contact sheets: one row per setting, one column per prompt."""

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..files.storage.paths import path_of
from ..files.storage.texts import visible
from .pictures import read
from .png import save_png
from .scores import Shot

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN = 4


def sheet(shots: Sequence[Shot], *, side: int = 192, seeds: int = 1) -> "Image":
    """Draw the pictures of some settings in a grid, with the prompts above and the settings' names at the left.

    Args:
        shots: Pictures: `loramerge.scoring.scores.shots_of`.
        side: Length of each picture's longer side, in pixels.
        seeds: Pictures per prompt and setting, those of the lowest seeds.

    Raises:
        FileError: A picture can't be read.
        OptionError: There are no pictures.
    """
    from PIL import Image, ImageDraw

    if not shots:
        raise OptionError("A contact sheet needs pictures, got none.")
    settings, prompts = (list(dict.fromkeys(getattr(s, what) for s in shots)) for what in ("setting", "prompt"))
    font = _font(side)
    line = font.size + 2
    above = _wrapped(prompts, max(8, int(seeds * side / (0.55 * font.size))))
    head, left = line * max(map(len, above)) + 2 * MARGIN, _widest(font, map(visible, settings)) + 2 * MARGIN
    step = side + MARGIN
    canvas = Image.new("RGB", (left + step * seeds * len(prompts), head + step * len(settings)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, words in enumerate(above):
        draw.multiline_text((left + x * seeds * step, MARGIN), "\n".join(words), fill="black", font=font, spacing=2)
    for y, setting in enumerate(settings):
        draw.text((MARGIN, head + y * step + (side - line) // 2), visible(setting), fill="black", font=font)
        for x, prompt in enumerate(prompts):
            for i, shot in enumerate(_first(shots, setting, prompt, seeds)):
                canvas.paste(_fitted(read(shot.path), side), (left + (x * seeds + i) * step, head + y * step))
    return canvas


def save_sheet(shots: Sequence[Shot], path: str | os.PathLike[str], *, side: int = 192, seeds: int = 1) -> Path:
    """Write a contact sheet as a PNG; the arguments are those of `sheet`."""
    path = path_of(path)
    save_png(sheet(shots, side=side, seeds=seeds), path, settings=list(dict.fromkeys(s.setting for s in shots)))
    return path


def _fitted(image: "Image", side: int) -> "Image":
    """Resize a picture so that its longer side has this many pixels; enlarge without blur."""
    from PIL import Image, ImageOps

    enlarged = max(image.size) < side
    return ImageOps.contain(image, (side, side), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _wrapped(texts: Sequence[str], width: int) -> list[list[str]]:
    return [textwrap.wrap(visible(text), width) or [""] for text in texts]


def _first(shots: Sequence[Shot], setting: str, prompt: str, count: int) -> list[Shot]:
    found = [shot for shot in shots if (shot.setting, shot.prompt) == (setting, prompt)]
    return sorted(found, key=lambda shot: -1 if shot.seed is None else shot.seed)[:count]


def _font(side: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(max(10, side // 14))


def _widest(font: Any, texts: Iterable[str]) -> int:
    return int(max(font.getlength(text) for text in texts)) + 1
