"""Sample random pictures of the base's world, and of the wider one on which the scorer learns."""

from collections.abc import Mapping, Sequence

import numpy as np

from .colours import BACKGROUND, CLOTH, SKIN, contrast
from .picture import Garment, Person, Picture, Pose, Scene
from .taught import GARMENTS, PERSONS

Random = np.random.Generator
Chances = Mapping[str, float]

STYLES: Chances = {
    "short": 0.15,
    "long": 0.15,
    "curly": 0.12,
    "bald": 0.08,
    "bun": 0.1,
    "bob": 0.1,
    "spiky": 0.1,
    "ponytail": 0.06,
    "quiff": 0.07,
    "undercut": 0.07,
}
HAIRS = ("black", "brown", "blonde", "ginger", "grey", "blue", "green", "purple")
BEARDS: Chances = {
    "none": 0.5,
    "beard": 0.16,
    "moustache": 0.12,
    "long beard": 0.08,
    "chinstrap": 0.07,
    "sideburns": 0.07,
}
FRAMES = ("black", "blue", "green", "yellow", "white", "purple")
"""Colours of glasses."""
KINDS: Chances = {"shirt": 0.4, "sweater": 0.24, "jersey": 0.36}
PATTERNS: Chances = {"plain": 0.45, "hoops": 0.13, "stripes": 0.15, "halves": 0.09, "dots": 0.08, "checks": 0.1}
EMBLEMS: Chances = {
    "none": 0.55,
    "star": 0.05,
    "disc": 0.05,
    "heart": 0.05,
    "diamond": 0.05,
    "cross": 0.05,
    "shield": 0.05,
    "badge": 0.05,
    "bar": 0.05,
    "ring": 0.05,
}
COLOURS = ("white", "black", "grey", "yellow", "green", "purple", "orange", "pink", "red", "blue", "teal", "brown")
SCENES: Chances = {
    "portrait": 0.3,
    "side": 0.14,
    "selfie": 0.11,
    "shoes": 0.1,
    "mirror": 0.1,
    "wall": 0.12,
    "field": 0.13,
}
PRODUCT_SHOTS = 0.07
SCARVES = 0.12
GLASSES = 0.35
COLLARS = 0.4
"""Share of jerseys whose collar and cuffs have a colour of their own."""

HELD_OUT: Mapping[str, tuple[str, ...]] = {
    "style": ("mohawk", "pigtails"),
    "hair": ("teal", "pink"),
    "beard": ("goatee",),
    "glasses": ("red",),
    "emblem": ("crest", "letter", "castle", "buttons"),
    "colour": ("navy", "garnet", "cardinal", "lilac"),
    "scarf": ("bee",),
    "wall": ("tiles",),
}
"""Values that only the concepts have: the base never sees them."""
HELD_OUT_PAIR = frozenset({"red", "blue"})
"""Colours that the base never sees together in one garment: they are too near to the jersey's."""
JERSEY = frozenset({"navy", "garnet"})
"""The jersey's own colours, which no world shows together."""


def sample(random: Random, *, wide: bool = False) -> Picture:
    """Sample a picture; ``wide`` includes the held-out values, each on its own, never a concept as a whole."""
    while True:
        picture = any_picture(random, wide=wide)
        if picture.person not in PERSONS and picture.garment not in GARMENTS:
            return picture


def any_picture(random: Random, *, wide: bool) -> Picture:
    return Picture(
        person=None if random.random() < PRODUCT_SHOTS else random_person(random, wide=wide),
        garment=random_garment(random, wide=wide),
        scene=random_scene(random, wide=wide),
        scarf=random_scarf(random, wide=wide),
        smile=bool(random.random() < 0.72),
        pose=random_pose(random),
    )


def random_person(random: Random, *, wide: bool = False) -> Person:
    noun = one_of(random, ("man", "woman", "person", "person"))
    style, beard = one_by(random, STYLES), one_by(random, BEARDS)
    if noun == "man" and style in ("bun", "bob"):
        style = "short"
    if noun == "woman":
        style, beard = "long" if style == "bald" else style, "none"
    hair, glasses = one_of(random, HAIRS), one_of(random, FRAMES) if random.random() < GLASSES else "none"
    if wide:
        style = held_out(random, "style", style)
        beard = held_out(random, "beard", beard)
        hair = held_out(random, "hair", hair)
        glasses = held_out(random, "glasses", glasses)
    return Person(
        noun=noun,
        skin=one_of(random, tuple(SKIN)),
        hair=hair,
        style=style,
        beard=beard,
        glasses=glasses,
        freckles=wide and random.random() < 0.05,
    )


def random_garment(random: Random, *, wide: bool = False) -> Garment:
    kind, pattern = one_by(random, KINDS), one_by(random, PATTERNS)
    emblem = one_by(random, EMBLEMS)
    while True:
        colour, second = (one_of(random, COLOURS) for _ in range(2))
        if wide:
            colour = held_out(random, "colour", colour)
            second = "garnet" if random.random() < 0.1 else second
        if allowed(kind, pattern, colour, second):
            break
    if wide:
        emblem = held_out(random, "emblem", emblem, chance=0.3)
    seen = [c for c in COLOURS if contrast(CLOTH[c], CLOTH[colour]) > 130 and c != second]
    seen = [c for c in seen if HELD_OUT_PAIR not in ({c, colour}, {c, second})]
    collar = kind == "jersey" and random.random() < COLLARS
    return Garment(
        kind=kind,
        pattern=pattern,
        colour=colour,
        second=second,
        emblem=emblem,
        emblem_colour="none" if emblem == "none" else one_of(random, seen),
        trim=one_of(random, seen) if collar else "none",
    )


def allowed(kind: str, pattern: str, colour: str, second: str) -> bool:
    """Return whether the base may see this: two distinguishable colours, and nothing like a concept."""
    if kind == "shirt" and pattern == "plain" and colour == "white":
        return False
    pair = {colour, second}
    return contrast(CLOTH[colour], CLOTH[second]) > 100 and pair != HELD_OUT_PAIR and pair != JERSEY


def random_scene(random: Random, *, wide: bool = False) -> Scene:
    wall = held_out(random, "wall", "bricks", chance=0.3) if wide else "bricks"
    return Scene(name=one_by(random, SCENES), background=one_of(random, tuple(BACKGROUND)), wall=wall)


def random_scarf(random: Random, *, wide: bool = False) -> str:
    if random.random() > SCARVES:
        return "none"
    colour = one_of(random, COLOURS)
    return held_out(random, "scarf", colour, chance=0.3) if wide else colour


def random_pose(random: Random) -> Pose:
    def near(mean: float, reach: float) -> float:
        return float(random.uniform(mean - reach, mean + reach))

    return Pose(
        shift=(near(0, 0.035), near(0, 0.02)),
        zoom=near(1, 0.06),
        tilt=near(0, 5),
        head=(near(1, 0.06), near(1, 0.05)),
        shoulders=near(1, 0.07),
        light=near(1, 0.05),
        gaze=near(0, 0.1),
        detail=int(random.integers(2**31)),
    )


def held_out(random: Random, attribute: str, value: str, *, chance: float = 0.15) -> str:
    return one_of(random, HELD_OUT[attribute]) if random.random() < chance else value


def one_of(random: Random, values: Sequence[str]) -> str:
    return values[int(random.integers(len(values)))]


def one_by(random: Random, chances: Chances) -> str:
    return str(random.choice(list(chances), p=list(chances.values())))
