"""A pen that draws in units of a figure: (0, 0) is the centre of its head, 1 is half the head's height, y down."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Ink = tuple[int, int, int] | int

_ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)


@dataclass(frozen=True, eq=False)
class Pen:
    """Draws polygons, so that every shape can be tilted."""

    image: Image.Image
    x: float
    """Position of the origin, in pixels."""
    y: float
    unit: float
    """Pixels per unit."""
    tilt: float = 0.0
    """Rotation about the neck, (0, 1), in degrees."""

    def on(self, image: Image.Image) -> "Pen":
        """Return the same pen on another image, such as a mask."""
        return Pen(image, self.x, self.y, self.unit, self.tilt)

    def turned(self, *, tilt: float) -> "Pen":
        return Pen(self.image, self.x, self.y, self.unit, tilt)

    def pixels(self, points: Sequence[Point] | np.ndarray) -> list[tuple[float, float]]:
        p = np.asarray(points, float)
        if self.tilt:
            angle = math.radians(self.tilt)
            x, y = p[:, 0], p[:, 1] - 1
            p = np.stack([x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle) + 1], 1)
        return [(self.x + a * self.unit, self.y + b * self.unit) for a, b in p.tolist()]

    def polygon(self, points: Sequence[Point] | np.ndarray, ink: Ink) -> None:
        ImageDraw.Draw(self.image).polygon(self.pixels(points), fill=ink)

    def blob(self, points: Sequence[Point], ink: Ink) -> None:
        """Fill a closed smooth curve (Catmull-Rom) through the points."""
        self.polygon(smooth(points), ink)

    def ellipse(self, x: float, y: float, rx: float, ry: float | None, ink: Ink) -> None:
        self.polygon(arc(x, y, rx, ry, 0, 360), ink)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, ink: Ink) -> None:
        self.line([*arc(x, y, rx, ry, 0, 360), (x + rx, y)], width, ink)

    def line(self, points: Sequence[Point] | np.ndarray, width: float, ink: Ink) -> None:
        """Draw a stroke with round ends and joints."""
        draw, pixels, pen = ImageDraw.Draw(self.image), self.pixels(points), max(1.0, width * self.unit)
        draw.line(pixels, fill=ink, width=round(pen), joint="curve")
        if pen > 2:
            for x, y in (pixels[0], pixels[-1]):
                draw.ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], fill=ink)


def arc(x: float, y: float, rx: float, ry: float | None, start: float, stop: float) -> list[Point]:
    """Return points of an ellipse between two angles in degrees, clockwise from the right as y points down."""
    angles = _ANGLES if stop - start >= 360 else np.radians(np.linspace(start, stop, 24))
    ry = rx if ry is None else ry
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles.tolist()]


def smooth(points: Sequence[Point], steps: int = 6) -> np.ndarray:
    """Return the closed Catmull-Rom curve through the points. Shape ``(len(points) * steps, 2)``."""
    p = np.asarray(points, float)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.arange(steps)[None, :, None] / steps
    a, b, c, d = (q[:, None] for q in (before, p, after, beyond))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.asarray(curve.reshape(-1, 2))
