"""Contact sheets."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def sheet(pictures: Sequence[np.ndarray] | np.ndarray, columns: int, *, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Arrange pictures of one size in rows, on white."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        page[y : y + height, x : x + width] = picture
    image = Image.fromarray(page)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
