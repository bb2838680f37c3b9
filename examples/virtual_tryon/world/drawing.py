"""Draw a picture's description as pixels."""

from dataclasses import replace

import numpy as np
from PIL import Image

from .bodies import TOP, body
from .colours import INK
from .faces import face, hair_behind, hair_on_top, head, scarf, skin_of
from .pen import Pen
from .picture import FULL_LENGTH, Picture
from .scenes import backdrop, ball, phone

CAMERA: dict[str, tuple[float, float, float]] = {
    "portrait": (0.5, 0.37, 0.19),
    "side": (0.49, 0.37, 0.19),
    "selfie": (0.46, 0.42, 0.24),
    "shoes": (0.5, 0.24, 0.126),
    "mirror": (0.47, 0.24, 0.126),
    "wall": (0.5, 0.37, 0.18),
    "field": (0.5, 0.29, 0.165),
    "product": (0.5, -0.02, 0.255),
}
"""Centre of the head (x, y) and half its height, in heights of the picture."""


def draw(picture: Picture, size: int = 96, *, supersample: int = 4) -> np.ndarray:
    """Draw a picture as bytes.

    Args:
        picture: What to draw.
        size: Height and width in pixels.
        supersample: Factor by which it is drawn larger and then averaged.

    Returns:
        Shape ``(size, size, 3)``, uint8, sRGB. The same picture gives the same bytes.
    """
    n = size * supersample
    image = backdrop(picture, n)
    pen = camera(picture, image, n)
    if picture.person is None:
        body(pen, picture, INK)
    else:
        figure(pen, picture)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def camera(picture: Picture, image: Image.Image, n: int) -> Pen:
    pose = picture.pose
    x, y, unit = CAMERA["product" if picture.person is None else picture.scene.name]
    return Pen(image, (x + pose.shift[0]) * n, (y + pose.shift[1]) * n, unit * pose.zoom * n)


def figure(pen: Pen, picture: Picture) -> None:
    """Draw a person, from back to front."""
    name = picture.scene.name
    side, skin = name == "side", skin_of(picture)
    pose = picture.pose if name not in FULL_LENGTH else replace(picture.pose, gaze=0.0)
    picture = replace(picture, pose=pose)
    tilted = pen.turned(tilt=pose.tilt)
    hair_behind(tilted, picture, side=side)
    body(pen, picture, skin)
    if picture.scarf != "none":
        scarf(pen, picture.scarf, TOP)
    head(tilted, picture, skin, side=side)
    hair_on_top(tilted, picture, skin, side=side)
    face(tilted, picture, skin, side=side)
    if name == "field":
        held_ball(pen, skin)
    if name == "mirror":
        phone(pen, 1.5, TOP - 0.3)
        pen.ellipse(1.5, TOP - 0.02, 0.26, None, skin)


def held_ball(pen: Pen, skin: tuple[int, int, int]) -> None:
    ball(pen, 0, TOP + 2.35, 0.92)
    for s in (-1, 1):
        pen.ellipse(s * 0.86, TOP + 2.5, 0.27, None, skin)
