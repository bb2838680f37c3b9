"""The contents of a picture, a person in a garment in a scene, as plain data."""

from dataclasses import dataclass, field

PATTERNED = {"hoops": "hooped", "stripes": "striped", "halves": "halved", "dots": "dotted", "checks": "checked"}
"""Each pattern of a garment and the word for a garment that has it."""
FULL_LENGTH = ("shoes", "mirror")
"""Scenes that show the whole figure down to its shoes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """A head: everything that identifies a person."""

    noun: str
    skin: str
    hair: str
    style: str
    beard: str = "none"
    glasses: str = "none"
    """Colour of the frame, or ``"none"``."""
    freckles: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Garment:
    """A shirt, sweater or jersey."""

    kind: str
    pattern: str
    colour: str
    second: str
    """Colour of the pattern, and of a jersey's collar unless ``trim`` says otherwise."""
    emblem: str = "none"
    emblem_colour: str = "none"
    trim: str = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The place of the person and the view of the camera."""

    name: str
    background: str
    wall: str = "bricks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Details that no caption mentions: small shifts of camera, body and light; all zero is the mean pose."""

    shift: tuple[float, float] = (0.0, 0.0)
    """Shift of the head, in heights of the picture."""
    zoom: float = 1.0
    tilt: float = 0.0
    """Tilt of the head, in degrees."""
    head: tuple[float, float] = (1.0, 1.0)
    shoulders: float = 1.0
    light: float = 1.0
    gaze: float = 0.0
    detail: int = 0
    """Seed of bricks, clouds and trousers, which are neither captioned nor posed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """Everything that :func:`draw` needs."""

    person: Person | None
    """``None`` in a product shot: the garment alone."""
    garment: Garment
    scene: Scene
    scarf: str = "none"
    """Its colour, ``"bee"`` for the held-out one, or ``"none"``."""
    smile: bool = True
    pose: Pose = field(default_factory=Pose)


def labels(picture: Picture) -> dict[str, str | None]:
    """Return every attribute by name; ``None`` if it can't be seen."""
    person, garment = picture.person, picture.garment
    patterned = garment.pattern != "plain"
    face: dict[str, str | None] = dict.fromkeys(("skin", "hair", "style", "beard", "glasses", "smile", "scarf"))
    if person is not None:
        face = {
            "skin": person.skin,
            "hair": None if person.style == "bald" and person.beard == "none" else person.hair,
            "style": person.style,
            "beard": person.beard,
            "glasses": person.glasses,
            "smile": "yes" if picture.smile else "no",
            "scarf": picture.scarf,
        }
    return face | {
        "garment": garment.kind,
        "pattern": garment.pattern,
        "colour": garment.colour,
        "second": garment.second if patterned else None,
        "emblem": None if person is not None and picture.scene.name in ("side", "field") else garment.emblem,
        "scene": "product" if person is None else picture.scene.name,
        "wall": picture.scene.wall if picture.scene.name == "wall" else None,
    }
