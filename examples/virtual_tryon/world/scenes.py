"""Draw backdrops and the things in them: walls, a field, a ball, a phone, shoes."""

import math

import numpy as np
from PIL import Image

from .colours import BACKGROUND, BRICKS, CHALK, INK, RGB, shade
from .pen import Pen, arc
from .picture import Picture


def backdrop(picture: Picture, n: int) -> Image.Image:
    """Draw what is behind the figure. Shape ``(n, n)`` pixels."""
    random = np.random.default_rng(picture.pose.detail)
    scene = picture.scene
    if picture.person is not None and scene.name == "wall":
        return tiles(n, random) if scene.wall == "tiles" else bricks(n, random)
    if picture.person is not None and scene.name == "field":
        return field(n, random)
    return studio(BACKGROUND[scene.background], n, random)


def studio(colour: RGB, n: int, random: np.random.Generator) -> Image.Image:
    """Draw a plain colour with light from one side."""
    angle = random.uniform(0, 2 * math.pi)
    axis = np.arange(n) / n - 0.5
    light = 1 + 0.12 * (math.cos(angle) * axis[None] + math.sin(angle) * axis[:, None])
    return Image.fromarray(np.clip(np.array(colour) * light[..., None], 0, 255).astype(np.uint8))


def bricks(n: int, random: np.random.Generator) -> Image.Image:
    colour = BRICKS[random.integers(len(BRICKS))]
    image = Image.new("RGB", (n, n), (214, 204, 192))
    pen = Pen(image, -random.uniform(0, 0.25) * n, -random.uniform(0, 0.12) * n, n / 8)
    for row in range(10):
        for column in range(-1, 6):
            x, brick = 2 * column + row % 2, shade(colour, random.uniform(0.88, 1.1))
            pen.polygon(
                [(x + 0.07, row + 0.07), (x + 1.93, row + 0.07), (x + 1.93, row + 0.93), (x + 0.07, row + 0.93)], brick
            )
    return image


def tiles(n: int, random: np.random.Generator) -> Image.Image:
    """Draw the held-out wall: diamonds of turquoise and cream with dark joints."""
    image = Image.new("RGB", (n, n), (40, 60, 84))
    pen = Pen(image, -random.uniform(0, 0.2) * n, -random.uniform(0, 0.2) * n, n / 6)
    for row in range(17):
        for column in range(-1, 9):
            x, y = column + (row % 2) / 2, row / 2
            colour = shade((70, 196, 200) if row % 2 else (250, 236, 190), random.uniform(0.94, 1.04))
            pen.polygon([(x, y - 0.44), (x + 0.44, y), (x, y + 0.44), (x - 0.44, y)], colour)
    return image


def field(n: int, random: np.random.Generator) -> Image.Image:
    """Draw mown grass with a white line, and a sky."""
    y = (np.arange(n) / n)[:, None]
    horizon = 0.4 + random.uniform(-0.05, 0.05)
    depth = np.clip((y - horizon) / (1 - horizon), 0, 1)
    grass = np.where(np.floor(np.sqrt(depth) * 6) % 2 == 0, 1.0, 0.86) * np.array((76, 168, 70.0))
    sky = np.array((140, 198, 244.0)) * (1.02 - 0.1 * y) + np.array((60, 30, 0)) * y
    colours = np.where(y > horizon, grass, sky)
    colours = np.where(np.abs(depth - 0.06) < 0.018, np.array(CHALK, float), colours)
    image = Image.fromarray(np.clip(np.broadcast_to(colours[:, None], (n, n, 3)), 0, 255).astype(np.uint8))
    pen = Pen(image, 0, 0, n)
    for _ in range(2):
        x, height = random.uniform(0, 1), random.uniform(0.06, 0.26)
        for shift, size in ((-0.08, 0.035), (0, 0.05), (0.08, 0.035)):
            pen.ellipse(x + shift, height, 0.075, size, (252, 252, 252))
    return image


def ball(pen: Pen, x: float, y: float, r: float) -> None:
    """Draw a soccer ball: one dark pentagon, and five cut by the rim."""
    pen.ellipse(x, y, r * 1.04, None, (70, 70, 76))
    pen.ellipse(x, y, r * 0.96, None, CHALK)
    corner = [math.radians(72 * k - 90) for k in range(5)]
    for a in corner:
        pen.line(
            [
                (x + 0.3 * r * math.cos(a), y + 0.3 * r * math.sin(a)),
                (x + 0.7 * r * math.cos(a), y + 0.7 * r * math.sin(a)),
            ],
            0.08 * r,
            (70, 70, 76),
        )
        wedge = arc(x, y, r * 0.98, None, math.degrees(a) - 22, math.degrees(a) + 22)
        pen.polygon([*wedge, (x + 0.62 * r * math.cos(a), y + 0.62 * r * math.sin(a))], INK)
    pen.polygon([(x + 0.36 * r * math.cos(a), y + 0.36 * r * math.sin(a)) for a in corner], INK)


def phone(pen: Pen, x: float, y: float) -> None:
    """Draw the back of a phone."""
    pen.polygon([(x - 0.28, y - 0.5), (x + 0.28, y - 0.5), (x + 0.28, y + 0.5), (x - 0.28, y + 0.5)], (30, 32, 40))
    pen.ellipse(x - 0.1, y - 0.3, 0.1, None, (150, 170, 200))


def shoe(pen: Pen, x: float, y: float, side: int) -> None:
    """Draw a white shoe with a red swoosh, its toe to one side (-1 or 1)."""
    pen.blob(
        [
            (x - side * 0.42, y - 0.3),
            (x + side * 0.1, y - 0.36),
            (x + side * 0.72, y - 0.04),
            (x + side * 0.74, y + 0.26),
            (x - side * 0.42, y + 0.26),
        ],
        CHALK,
    )
    pen.line([(x - side * 0.42, y + 0.28), (x + side * 0.74, y + 0.28)], 0.12, (90, 92, 100))
    pen.line([(x - side * 0.22, y - 0.02), (x - side * 0.02, y + 0.12), (x + side * 0.5, y - 0.1)], 0.15, (226, 36, 40))
