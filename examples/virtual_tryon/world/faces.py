"""Draw heads: hair, face, beard, glasses."""

from .colours import CHALK, CLOTH, HAIR, INK, RGB, SKIN, shade
from .pen import Pen, Point, arc
from .picture import Picture

FRAMES: dict[str, RGB] = {
    "black": (24, 22, 26),
    "blue": (40, 90, 220),
    "green": (40, 160, 70),
    "yellow": (246, 206, 40),
    "white": (252, 252, 252),
    "purple": (150, 60, 190),
    "red": (226, 34, 52),
}


FLAT_TOP: list[Point] = [(0.62, -0.56), (0.66, -1.22), (-0.66, -1.22), (-0.62, -0.56)]
QUIFF: list[Point] = [(-0.66, -0.8), (-0.62, -1.4), (0.1, -1.72), (0.78, -1.5), (0.72, -0.72), (0.1, -0.62)]


def hair_behind(pen: Pen, picture: Picture, *, side: bool) -> None:
    """Draw the hair behind head and shoulders."""
    person = picture.person
    assert person is not None
    colour = shade(HAIR[person.hair], 0.86)
    back = -0.3 if side else 0.0
    if person.style == "long":
        pen.blob(
            [
                (back, -1.15),
                (1.08 + back * 2.2, -0.5),
                (1.2 + back * 2.4, 1.0),
                (0.95 + back * 2, 2.0),
                (back, 2.05),
                (-0.95 + back * 0.6, 2.0),
                (-1.2 + back * 0.3, 1.0),
                (-1.08, -0.5),
            ],
            colour,
        )
    elif person.style == "bob":
        pen.blob(
            [
                (back, -1.15),
                (1.12 + back * 2.2, -0.4),
                (1.2 + back * 2.4, 0.85),
                (back, 1.0),
                (-1.2 + back * 0.3, 0.85),
                (-1.12, -0.4),
            ],
            colour,
        )
    elif person.style == "curly":
        for x, y, r in curls(back):
            pen.ellipse(x, y, r, None, colour)
    elif person.style == "bun":
        pen.ellipse(back * 1.4, -1.28, 0.46, None, colour)
    elif person.style == "ponytail":
        pen.blob(
            [(-0.5, -0.9), (-1.2, -0.95), (-1.7, -0.2), (-1.62, 0.9), (-1.3, 1.3), (-1.2, 0.4), (-0.9, -0.3)], colour
        )
    elif person.style == "pigtails":
        for s in (-1,) if side else (-1, 1):
            pen.blob(
                [(s * 0.85, -0.5), (s * 1.3, -0.75), (s * 1.75, 0.0), (s * 1.7, 0.95), (s * 1.4, 1.35), (s * 1.2, 0.5)],
                colour,
            )
            pen.ellipse(s * 0.98, -0.5, 0.2, None, (250, 214, 60))


def curls(back: float) -> list[tuple[float, float, float]]:
    rim = [(x * 1.12 + back, y * 1.1, 0.36) for x, y in arc(0, -0.12, 0.98, 0.98, 155, 385)[::3]]
    return [*rim, (back, -0.75, 0.7)]


def head(pen: Pen, picture: Picture, skin: RGB, *, side: bool) -> None:
    """Draw ears, skull and the neck-side of the face."""
    w, h = picture.pose.head
    if not side:
        for s in (-1, 1):
            pen.ellipse(s * 0.84 * w, 0.12, 0.17, 0.24, shade(skin, 0.86))
        pen.blob(
            [
                (0, -1.0 * h),
                (0.6 * w, -0.82 * h),
                (0.84 * w, -0.2),
                (0.78 * w, 0.42),
                (0.42 * w, 0.9 * h),
                (0, 1.02 * h),
                (-0.42 * w, 0.9 * h),
                (-0.78 * w, 0.42),
                (-0.84 * w, -0.2),
                (-0.6 * w, -0.82 * h),
            ],
            skin,
        )
    else:
        nose = [(0.76 * w, -0.1), (1.06 * w, 0.3), (0.8 * w, 0.36)]
        pen.blob(
            [
                (-0.05, -1.0 * h),
                (0.55 * w, -0.82 * h),
                (0.78 * w, -0.25),
                (0.8 * w, 0.5),
                (0.62 * w, 0.92 * h),
                (0.1, 0.96 * h),
                (-0.5 * w, 0.62),
                (-0.86 * w, 0.0),
                (-0.66 * w, -0.76 * h),
            ],
            skin,
        )
        pen.polygon(nose, skin)
        pen.ellipse(-0.12, 0.14, 0.17, 0.24, shade(skin, 0.84))


def hair_on_top(pen: Pen, picture: Picture, skin: RGB, *, side: bool) -> None:
    """Draw the hair in front of the skull."""
    person = picture.person
    assert person is not None
    w, h = picture.pose.head
    colour = HAIR[person.hair]
    if person.style in ("mohawk", "undercut"):
        shaved = arc(0, 0, 0.9 * w, 1.03 * h, 195, 345) if not side else arc(-0.05, 0, 0.86 * w, 1.03 * h, 150, 320)
        pen.polygon(shaved, shade(skin, 0.8))
    if person.style == "bald":
        pen.ellipse(0.25 if side else -0.3, -0.68, 0.2, 0.1, shade(skin, 1.1))
    elif person.style == "mohawk":
        crest: list[Point] = [
            (-0.36, -0.62),
            (-0.44, -1.5),
            (-0.2, -1.4),
            (-0.1, -1.85),
            (0.08, -1.5),
            (0.26, -1.78),
            (0.3, -1.4),
            (0.46, -1.42),
            (0.36, -0.62),
        ]
        if side:
            crest = [
                (0.55, -0.6),
                (0.72, -1.35),
                (0.4, -1.3),
                (0.3, -1.8),
                (0.02, -1.5),
                (-0.3, -1.8),
                (-0.45, -1.3),
                (-0.95, -1.3),
                (-0.85, -0.8),
                (-1.15, -0.5),
                (-0.8, -0.2),
                (-0.5, -0.7),
            ]
        pen.polygon(crest, colour)
    elif person.style == "undercut":
        top = [(0.66, -0.5), (0.7, -1.12), (-0.6, -1.2), (-0.92, -0.62)] if side else FLAT_TOP
        pen.polygon(top, colour)
    elif side:
        outer = arc(-0.06, 0, 0.92 * w, 1.12 * h, 120, 318)
        pen.polygon([*outer, (0.3, -0.46), (0.12, -0.12), (-0.14, -0.1), (-0.34, 0.16), (-0.4, 0.55)], colour)
        lengths(pen, person.style, colour, w, side=True)
    else:
        outer = arc(0, 0, 0.95 * w, 1.13 * h, 172, 368)
        fringe = {
            "bob": [(0.72, -0.3), (-0.72, -0.3)],
            "spiky": [
                (0.72, -0.4),
                (0.5, -0.62),
                (0.3, -0.42),
                (0.1, -0.64),
                (-0.1, -0.42),
                (-0.3, -0.64),
                (-0.5, -0.42),
                (-0.72, -0.4),
            ],
        }
        parting: list[Point] = [(0.78, -0.2), (0.55, -0.52), (0.2, -0.6), (-0.3, -0.66), (-0.55, -0.46), (-0.78, -0.2)]
        pen.polygon([*outer, *fringe.get(person.style, parting)], colour)
        lengths(pen, person.style, colour, w, side=False)
    if person.style == "spiky":
        spikes(pen, colour, w, h)
    if person.style == "quiff":
        shift = 0.25 if side else 0.0
        pen.blob([(x + shift, y) for x, y in QUIFF], colour)


def lengths(pen: Pen, style: str, colour: RGB, w: float, *, side: bool) -> None:
    """Draw the locks that fall in front of the ears."""
    bottom = {"long": 1.75, "bob": 0.8}.get(style)
    if bottom is None:
        return
    if side:
        pen.blob(
            [(-0.5, -0.7), (0.05, -0.4), (0.02, 0.2), (-0.12, bottom), (-0.7, bottom + 0.05), (-0.96, 0.3)], colour
        )
        return
    for s in (-1, 1):
        pen.blob(
            [
                (s * 0.72 * w, -0.6),
                (s * 0.98 * w, -0.3),
                (s * 1.14 * w, 0.5),
                (s * 1.05 * w, bottom),
                (s * 0.78 * w, bottom),
                (s * 0.84 * w, 0.4),
                (s * 0.66 * w, -0.3),
            ],
            colour,
        )


def spikes(pen: Pen, colour: RGB, w: float, h: float) -> None:
    for x in (-0.72, -0.38, 0.0, 0.38, 0.72):
        y = -1.06 * h * (1 - 0.5 * x * x)
        pen.polygon([((x - 0.24) * w, y + 0.22), (x * 1.25 * w, y - 0.42), ((x + 0.24) * w, y + 0.22)], colour)


def face(pen: Pen, picture: Picture, skin: RGB, *, side: bool) -> None:
    """Draw beard, mouth, nose, eyes and glasses."""
    person, gaze = picture.person, picture.pose.gaze
    assert person is not None
    hair = HAIR[person.hair]
    middle = 0.56 if side else gaze * 0.5
    beard(pen, person.beard, hair, picture.pose.head, middle, side=side)
    mouth(pen, middle, smile=picture.smile, side=side)
    if person.beard == "moustache":
        reach = 0.3 if side else 0.42
        pen.blob([(middle, 0.34), (middle + reach, 0.52), (middle, 0.5), (middle - reach, 0.52)], hair)
    if not side:
        pen.line(
            [(gaze * 0.5 + 0.02, 0.08), (gaze * 0.5 + 0.1, 0.3), (gaze * 0.5 - 0.04, 0.32)], 0.09, shade(skin, 0.74)
        )
    if person.freckles:
        for x, y in [(0.46, 0.3), (0.64, 0.26), (0.56, 0.44)]:
            for s in (1,) if side else (-1, 1):
                pen.ellipse(s * x, y, 0.055, None, (206, 128, 84))
    centres = [0.48] if side else [-0.37 + gaze * 0.4, 0.37 + gaze * 0.4]
    brow = shade(skin, 0.5) if person.style in ("bald", "mohawk") else shade(hair, 0.75)
    for x in centres:
        pen.ellipse(x, -0.02, 0.2, 0.19, CHALK)
        pen.ellipse(x + (0.07 if side else gaze * 0.6), -0.01, 0.125, 0.155, INK)
        pen.line([(x - 0.2, -0.34), (x + 0.2, -0.36)], 0.1, brow)
    if person.glasses != "none":
        spectacles(pen, centres, FRAMES[person.glasses], side=side)


def spectacles(pen: Pen, centres: list[float], frame: RGB, *, side: bool) -> None:
    for x in centres:
        pen.ring(x, -0.01, 0.31, 0.29, 0.12, frame)
    if side:
        pen.line([(centres[0] - 0.3, -0.03), (-0.14, 0.02)], 0.1, frame)
    else:
        pen.line([(centres[0] + 0.3, -0.03), (centres[1] - 0.3, -0.03)], 0.1, frame)
        for s, x in ((-1, centres[0]), (1, centres[1])):
            pen.line([(x + s * 0.3, -0.03), (s * 0.84, 0.0)], 0.09, frame)


def beard(pen: Pen, kind: str, hair: RGB, size: tuple[float, float], middle: float, *, side: bool) -> None:
    w, h = size
    hair = shade(hair, 0.86)
    if kind == "goatee":
        pen.blob(
            [
                (middle - 0.36, 0.66),
                (middle + 0.36, 0.66),
                (middle + 0.28, 1.15),
                (middle, 1.55),
                (middle - 0.28, 1.15),
            ],
            hair,
        )
    elif kind == "sideburns":
        for s in (-1,) if side else (-1, 1):
            x = 0.08 if side else 0.7 * w
            pen.polygon([(s * x - 0.14, -0.2), (s * x + 0.14, -0.2), (s * x + 0.14, 0.62), (s * x - 0.14, 0.5)], hair)
    elif kind == "chinstrap":
        points = [(-0.1, 0.3), (0.1, 0.74), (0.55, 0.92)] if side else arc(0, 0.05, 0.74 * w, 0.92 * h, 12, 168)
        pen.line(points, 0.22, hair)
    elif kind == "long beard":
        x = 0.35 if side else 0.0
        reach = 0.5 if side else 0.74 * w
        pen.blob(
            [
                (x - reach, 0.3),
                (x, 0.44),
                (x + reach, 0.3),
                (x + reach * 0.86, 1.2),
                (x, 1.95),
                (x - reach * 0.86, 1.2),
            ],
            hair,
        )
    elif kind == "beard" and side:
        pen.polygon(
            [
                (-0.2, 0.2),
                (0.0, 0.42),
                (0.4, 0.5),
                (0.82 * w, 0.46),
                (0.86 * w, 0.8),
                (0.62 * w, 1.16 * h),
                (0.05, 1.06 * h),
                (-0.4, 0.66),
            ],
            hair,
        )
    elif kind == "beard":
        inner: list[Point] = [(-0.66 * w, 0.2), (-0.5, 0.44), (0, 0.42), (0.5, 0.44), (0.66 * w, 0.2)]
        pen.polygon([*arc(0, 0.05, 0.86 * w, 1.1 * h, 5, 175), *inner], hair)


def mouth(pen: Pen, middle: float, *, smile: bool, side: bool) -> None:
    reach = 0.2 if side else 0.38
    if smile:
        pen.polygon(arc(middle, 0.52, reach, 0.3, 0, 180), (150, 36, 44))
        pen.polygon(arc(middle, 0.53, reach * 0.86, 0.17, 0, 180), CHALK)
    else:
        pen.line([(middle - reach * 0.7, 0.64), (middle + reach * 0.7, 0.64)], 0.11, (156, 62, 62))


def skin_of(picture: Picture) -> RGB:
    assert picture.person is not None
    return shade(SKIN[picture.person.skin], picture.pose.light)


def scarf(pen: Pen, colour: str, top: float) -> None:
    """Draw a scarf round the neck with one end hanging; ``"bee"`` is striped."""
    bee = colour == "bee"
    main = (250, 206, 30) if bee else CLOTH[colour]
    other = (28, 26, 30) if bee else shade(main, 0.8)
    pen.blob(
        [
            (-0.78, top - 0.42),
            (0, top - 0.26),
            (0.78, top - 0.42),
            (0.86, top + 0.02),
            (0.4, top + 0.34),
            (-0.4, top + 0.34),
            (-0.86, top + 0.02),
        ],
        main,
    )
    pen.polygon([(0.12, top + 0.1), (0.66, top + 0.02), (0.78, top + 1.3), (0.26, top + 1.36)], main)
    if bee:
        for x in (-0.56, -0.08, 0.4):
            pen.polygon(
                [(x, top - 0.34), (x + 0.24, top - 0.34), (x + 0.22, top + 0.32), (x - 0.02, top + 0.32)], other
            )
        for y in (0.5, 0.96):
            pen.polygon(
                [(0.18, top + y), (0.74, top + y - 0.05), (0.76, top + y + 0.19), (0.22, top + y + 0.24)], other
            )
    else:
        pen.line([(-0.78, top - 0.02), (-0.3, top + 0.16), (0.3, top + 0.16), (0.78, top - 0.02)], 0.07, other)
        pen.line([(0.14, top + 0.24), (0.66, top + 0.18)], 0.07, other)
    for x in (0.34, 0.52, 0.7):
        pen.line([(x, top + 1.3), (x + 0.01, top + 1.44)], 0.07, other)
