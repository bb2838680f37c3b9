"""Draw the pattern of a garment as a picture, in the units of the figure that wears it."""

import numpy as np
from PIL import Image

from .colours import CLOTH
from .pen import Pen
from .picture import Garment

STRIPE = 0.52
"""Width of a stripe, a hoop or a check, in head units."""


def second_colour(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return where the second colour is, at points in head units; ``y`` counts from the shoulders."""
    if pattern == "hoops":
        return np.floor(y / STRIPE) % 2 == 1
    if pattern == "stripes":
        return np.floor(x / STRIPE + 0.5) % 2 == 1
    if pattern == "halves":
        return x > 0
    if pattern == "checks":
        return (np.floor(x / STRIPE) + np.floor(y / STRIPE)) % 2 == 1
    if pattern == "dots":
        row = np.floor(y / 0.62)
        return ((x / 0.74 + row / 2) % 1 - 0.5) ** 2 * 0.74**2 + ((y / 0.62) % 1 - 0.5) ** 2 * 0.62**2 < 0.24**2
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)


def cloth(garment: Garment, pen: Pen, top: float, light: float) -> Image.Image:
    """Draw the garment's cloth over the whole picture, darker at the sides; ``top`` is y of the shoulders."""
    width, height = pen.image.size
    x = ((np.arange(width, dtype=np.float32) + 0.5 - pen.x) / pen.unit)[None]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - pen.y) / pen.unit - top)[:, None]
    mask = np.broadcast_to(second_colour(garment.pattern, x, y), (height, width))
    shading = light * (1.05 - 0.1 * np.clip(x / 1.6, -1, 1) ** 2)
    pair = np.array([CLOTH[garment.colour], CLOTH[garment.second]], np.float32)
    columns = np.clip(pair[:, None] * shading[0, :, None], 0, 255).astype(np.uint8)
    return Image.fromarray(np.where(mask[..., None], columns[1][None], columns[0][None]))
