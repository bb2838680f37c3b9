"""The colours of the world, as sRGB bytes."""

RGB = tuple[int, int, int]

SKIN: dict[str, RGB] = {
    "light": (247, 212, 184),
    "tan": (222, 172, 124),
    "brown": (164, 108, 68),
    "dark": (98, 62, 44),
}
HAIR: dict[str, RGB] = {
    "black": (30, 26, 30),
    "brown": (104, 62, 36),
    "blonde": (236, 200, 96),
    "ginger": (204, 92, 34),
    "grey": (168, 168, 174),
    "blue": (58, 96, 210),
    "green": (96, 160, 52),
    "purple": (134, 74, 184),
    "teal": (24, 176, 152),
    "pink": (244, 104, 172),
}
CLOTH: dict[str, RGB] = {
    "white": (246, 246, 244),
    "black": (34, 34, 40),
    "grey": (142, 144, 152),
    "yellow": (250, 212, 48),
    "green": (44, 152, 74),
    "purple": (128, 66, 174),
    "orange": (244, 130, 34),
    "pink": (246, 152, 192),
    "red": (208, 36, 50),
    "blue": (36, 84, 196),
    "teal": (28, 160, 164),
    "brown": (122, 80, 48),
    "navy": (0, 52, 148),
    "garnet": (176, 10, 62),
    "cardinal": (150, 18, 30),
    "lilac": (186, 160, 226),
}
BACKGROUND: dict[str, RGB] = {
    "white": (238, 238, 238),
    "grey": (178, 182, 190),
    "blue": (150, 192, 230),
    "beige": (228, 212, 184),
    "pink": (242, 206, 216),
    "green": (170, 210, 168),
    "yellow": (246, 232, 168),
    "dark": (72, 76, 90),
}
TROUSERS: tuple[RGB, ...] = ((46, 58, 100), (40, 40, 46), (110, 112, 122), (176, 152, 116))
BRICKS: tuple[RGB, ...] = ((172, 86, 62), (150, 104, 84), (186, 120, 84))
INK: RGB = (34, 26, 28)
CHALK: RGB = (250, 250, 248)


def shade(colour: RGB, factor: float) -> RGB:
    """Make a colour darker (factor < 1) or lighter, within the range of bytes."""
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in colour)
    return red, green, blue


def contrast(one: RGB, other: RGB) -> float:
    """Return the Euclidean distance in RGB, in [0, 442]."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5
