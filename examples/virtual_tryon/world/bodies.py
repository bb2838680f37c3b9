"""Draw bodies: torso, arms and legs, and the garment on them."""

import math

import numpy as np
from PIL import Image

from .cloth import cloth
from .colours import CHALK, CLOTH, RGB, TROUSERS, shade
from .pen import Pen, Point, arc
from .picture import FULL_LENGTH, Garment, Picture
from .scenes import shoe

TOP = 1.22
"""Height of the shoulders, below the centre of the head."""
HEM = 2.4
"""Length of the torso if the whole figure is seen."""

Arm = list[Point]


def arms(picture: Picture) -> list[Arm]:
    """Return shoulder, elbow and hand of each arm, in head units from the middle of the shoulders."""
    s = picture.pose.shoulders
    left, right = (-1.22 * s, 0.5), (1.22 * s, 0.5)
    down = [left, (-1.62 * s, 1.55), (-1.6 * s, 2.75)]
    if picture.person is None:
        return [[left, (-2.0 * s, 1.45)], [right, (2.0 * s, 1.45)]]
    name = picture.scene.name
    if name == "side":
        return [[(-0.1, 0.62), (-0.3, 1.7), (0.15, 2.8)]]
    if name == "selfie":
        return [down, [right, (2.0 * s, 1.1), (2.6, 0.25), (3.4, -0.6)]]
    if name == "mirror":
        return [down, [right, (1.85 * s, 1.25), (1.5, -0.15)]]
    if name == "field":
        return [[left, (-1.75 * s, 1.6), (-0.82, 2.25)], [right, (1.75 * s, 1.6), (0.82, 2.25)]]
    return [down, [(-x, y) for x, y in down]]


def torso(picture: Picture) -> list[Point]:
    s = picture.pose.shoulders
    bottom = HEM if picture.person is None or picture.scene.name in FULL_LENGTH else 6.0
    if picture.scene.name == "side" and picture.person is not None:
        return [
            (-0.46, -0.02),
            (0.36, -0.02),
            (0.86, 0.36),
            (1.1 * s, 1.1),
            (1.05 * s, bottom),
            (-1.05 * s, bottom),
            (-1.16 * s, 1.0),
            (-0.98 * s, 0.3),
        ]
    return [
        (-0.5, -0.02),
        (0.5, -0.02),
        (1.12 * s, 0.18),
        (1.36 * s, 0.55),
        (1.24 * s, 1.3),
        (1.2 * s, bottom),
        (-1.2 * s, bottom),
        (-1.24 * s, 1.3),
        (-1.36 * s, 0.55),
        (-1.12 * s, 0.18),
    ]


def sleeve(arm: Arm, garment: Garment) -> Arm:
    """Return the part of an arm that the garment covers."""
    if garment.kind == "sweater":
        return arm
    (x, y), (u, v) = arm[:2]
    return [(x, y), (x + 0.72 * (u - x), y + 0.72 * (v - y))]


def lower(points: list[Point]) -> list[Point]:
    return [(x, y + TOP) for x, y in points]


def body(pen: Pen, picture: Picture, skin: RGB) -> None:
    """Draw everything below the chin except what the hands hold."""
    garment = picture.garment
    if picture.person is not None and picture.scene.name in FULL_LENGTH:
        legs(pen, picture)
    if picture.person is not None:
        neck(pen, skin)
    fabric = cloth(garment, pen, TOP, picture.pose.light)
    behind = picture.scene.name != "field" and picture.scene.name != "side"
    if behind:
        for arm in arms(picture):
            draw_arm(pen, arm, picture, skin, fabric)
    mask = Image.new("L", pen.image.size, 0)
    pen.on(mask).polygon(lower(torso(picture)), 255)
    pen.image.paste(fabric, (0, 0), mask)
    neckline(pen, picture, skin)
    emblem(pen, garment)
    if not behind:
        for arm in arms(picture):
            draw_arm(pen, arm, picture, skin, fabric)


def neck(pen: Pen, skin: RGB) -> None:
    pen.polygon([(-0.38, 0.6), (0.38, 0.6), (0.44, TOP + 0.3), (-0.44, TOP + 0.3)], shade(skin, 0.84))


def draw_arm(pen: Pen, arm: Arm, picture: Picture, skin: RGB, fabric: Image.Image) -> None:
    if picture.person is not None:
        pen.line(lower(arm), 0.52, skin)
    mask = Image.new("L", pen.image.size, 0)
    covered = lower(sleeve(arm, picture.garment))
    pen.on(mask).line(covered, 0.74, 255)
    pen.image.paste(fabric.point(lambda byte: int(byte * 0.86)), (0, 0), mask)
    if picture.person is not None and picture.garment.kind == "sweater":
        x, y = lower(arm)[-1]
        pen.ellipse(x, y + 0.12, 0.3, None, skin)
    if picture.garment.trim != "none" and picture.garment.kind == "jersey":
        (a, b), (x, y) = covered[0], covered[-1]
        far = math.hypot(x - a, y - b)
        across = (-(y - b) / far * 0.37, (x - a) / far * 0.37)
        pen.line([(x - across[0], y - across[1]), (x + across[0], y + across[1])], 0.16, CLOTH[picture.garment.trim])


def legs(pen: Pen, picture: Picture) -> None:
    colour = TROUSERS[np.random.default_rng(picture.pose.detail).integers(len(TROUSERS))]
    foot = TOP + HEM + 1.55
    for s in (-1, 1):
        pen.polygon(
            [(s * 0.04, TOP + HEM - 0.2), (s * 1.18, TOP + HEM - 0.2), (s * 1.05, foot), (s * 0.26, foot)],
            shade(colour, 1.0 if s > 0 else 0.88),
        )
        shoe(pen, s * 0.68, foot + 0.28, s)


def neckline(pen: Pen, picture: Picture, skin: RGB) -> None:
    """Draw a jersey's V, a sweater's roll, a shirt's round neck, or a dress shirt's collar and buttons."""
    garment = picture.garment
    colour = CLOTH[garment.colour]
    inside = shade(skin, 0.84) if picture.person is not None else shade(colour, 0.5)
    side = picture.scene.name == "side" and picture.person is not None
    w = 0.4 if side else 0.56
    if garment.kind == "sweater":
        roll = shade(CLOTH[garment.trim] if garment.trim != "none" else colour, 0.74)
        pen.blob(
            [
                (-w, TOP - 0.2),
                (0, TOP - 0.08),
                (w, TOP - 0.2),
                (w + 0.1, TOP + 0.12),
                (0, TOP + 0.34),
                (-w - 0.1, TOP + 0.12),
            ],
            roll,
        )
    elif garment.kind == "jersey":
        collar = CLOTH[garment.trim if garment.trim != "none" else garment.second]
        pen.polygon([(-w - 0.16, TOP - 0.06), (w + 0.16, TOP - 0.06), (0, TOP + 0.92)], collar)
        pen.polygon([(-w + 0.06, TOP - 0.1), (w - 0.06, TOP - 0.1), (0, TOP + 0.58)], inside)
    else:
        pen.ellipse(0, TOP - 0.04, w, 0.32, shade(colour, 0.78))
        pen.ellipse(0, TOP - 0.08, w - 0.08, 0.28, inside)
    if garment.emblem == "buttons":
        for s in (-1, 1):
            pen.polygon([(s * 0.62, TOP - 0.16), (0, TOP + 0.3), (s * 0.5, TOP + 0.62)], shade(CHALK, 0.86))
        pen.line([(0, TOP + 0.3), (0, TOP + 6)], 0.06, (150, 154, 166))
        for y in (0.75, 1.35, 1.95, 2.55):
            pen.ellipse(0, TOP + y, 0.11, None, (60, 70, 110))


def emblem(pen: Pen, garment: Garment) -> None:
    """Draw what is on the chest."""
    x, y = 0.0, TOP + (1.3 if garment.kind == "jersey" else 1.16)
    ink = CLOTH.get(garment.emblem_colour, CHALK)
    if garment.emblem == "star":
        turns = [math.radians(36 * k - 90) for k in range(10)]
        pen.polygon(
            [
                (x + (0.64, 0.28)[k % 2] * math.cos(a), y + (0.64, 0.28)[k % 2] * math.sin(a))
                for k, a in enumerate(turns)
            ],
            ink,
        )
    elif garment.emblem == "disc":
        pen.ellipse(x, y, 0.5, None, ink)
    elif garment.emblem == "heart":
        for s in (-1, 1):
            pen.ellipse(s * 0.25, y - 0.18, 0.3, None, ink)
        pen.polygon([(-0.52, y - 0.05), (0.52, y - 0.05), (0, y + 0.6)], ink)
    elif garment.emblem == "diamond":
        pen.polygon([(0, y - 0.66), (0.5, y), (0, y + 0.66), (-0.5, y)], ink)
    elif garment.emblem == "cross":
        pen.line([(0, y - 0.5), (0, y + 0.5)], 0.34, ink)
        pen.line([(-0.5, y), (0.5, y)], 0.34, ink)
    elif garment.emblem == "ring":
        pen.ring(x, y, 0.46, 0.46, 0.26, ink)
    elif garment.emblem == "shield":
        pen.blob(shield(x, y, 0.5), ink)
    elif garment.emblem == "badge":
        pen.ellipse(0.66, TOP + 0.84, 0.34, None, ink)
    elif garment.emblem == "bar":
        bar(pen, ink)
    elif garment.emblem == "crest":
        pen.blob(shield(0.68, TOP + 0.86, 0.4), ink)
        pen.ellipse(0.68, TOP + 0.82, 0.2, None, CLOTH["garnet"])
        bar(pen, ink)
    elif garment.emblem == "letter":
        spine = [*arc(0, y - 0.3, 0.4, 0.34, -30, -265), *arc(0, y + 0.36, 0.42, 0.36, -85, 150)]
        pen.line(spine, 0.27, ink)
    elif garment.emblem == "castle":
        castle(pen, y, ink)


def shield(x: float, y: float, r: float) -> list[Point]:
    """Return the outline of a shield with its centre and half its width."""
    top, bottom = y - 0.9 * r, y + 1.1 * r
    return [
        (x - r, top),
        (x, top + 0.15 * r),
        (x + r, top),
        (x + 0.95 * r, y + 0.3 * r),
        (x, bottom),
        (x - 0.95 * r, y + 0.3 * r),
    ]


def bar(pen: Pen, ink: RGB) -> None:
    """Draw a bar across the chest."""
    pen.polygon([(-0.86, TOP + 1.46), (0.86, TOP + 1.46), (0.86, TOP + 1.96), (-0.86, TOP + 1.96)], ink)


def castle(pen: Pen, y: float, ink: RGB) -> None:
    """Draw three towers with pointed roofs."""
    for x, height in ((-0.55, 0.2), (0.0, 0.5), (0.55, 0.2)):
        pen.polygon([(x - 0.2, y + 0.7), (x - 0.2, y - height), (x + 0.2, y - height), (x + 0.2, y + 0.7)], ink)
        pen.polygon([(x - 0.27, y - height), (x, y - height - 0.5), (x + 0.27, y - height)], CLOTH["pink"])
    pen.polygon([(-0.6, y + 0.7), (-0.6, y + 0.2), (0.6, y + 0.2), (0.6, y + 0.7)], ink)
    pen.ellipse(0, y + 0.55, 0.15, 0.24, (80, 60, 120))
