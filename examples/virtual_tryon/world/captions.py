"""Caption pictures in the grammar of the study's prompts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .picture import PATTERNED, Garment, Person, Picture, labels
from .sampling import Random, one_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TAILS = {
    "portrait": "",
    "side": " and facing to the side",
    "selfie": "",
    "shoes": " with Nike shoes",
    "mirror": " with Nike shoes",
    "wall": " and standing in front of {wall}",
    "field": " and holding a soccer ball on a field",
}


def caption(picture: Picture, random: Random, *, names: Mapping[str, str] | None = None) -> str:
    """Describe a picture in one sentence: attributes are left out at random, and never wrong.

    Args:
        picture: The picture to describe.
        random: Chooses the attributes.
        names: Identifiers for ``"person"``, ``"garment"``, ``"scarf"`` and ``"wall"``, such as
            ``{"person": "psq-person"}``; what has none is described, or gets a random identifier.
    """
    return Teller(random=random, names=names or {}).sentence(picture)


def full_caption(picture: Picture, random: Random) -> str:
    """Describe every attribute, without identifiers."""
    return Teller(random=random, keep=1.0, nicknames=0.0).sentence(picture)


def prompt(
    scene: str, *, person: str = "psq-person", garment: str = "barca24_jersey", scarf: str = "", wall: str = "wall"
) -> str:
    """Return a prompt of the study: its person, smiling, in its jersey, in one of its five scenes."""
    look = "smiling in a selfie" if scene == "mirror" else "smiling at the camera"
    scarf = f" and {article(scarf)}" if scarf else ""
    tail = TAILS[scene].format(wall=article(wall))
    return f"A portrait of {article(person)} {look}, wearing {article(garment)}{scarf}{tail}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Teller:
    """Describes pictures."""

    random: Random
    keep: float = 0.75
    """Share of captions that mention a given attribute."""
    nicknames: float = 0.25
    """Share of captions in which a thing has a rare identifier that doesn't describe it."""
    names: Mapping[str, str] = field(default_factory=dict)

    def tells(self) -> bool:
        return bool(self.random.random() < self.keep)

    def sentence(self, picture: Picture) -> str:
        worn = article(self.names.get("garment") or self.garment(picture))
        if picture.person is None:
            return f"A photo of {worn}."
        who = article(self.names.get("person") or self.person(picture.person))
        scarf = f" and {article(self.scarf(picture.scarf))}" if picture.scarf != "none" else ""
        return f"A portrait of {who} {look(picture)}, wearing {worn}{scarf}{self.surroundings(picture)}."

    def person(self, person: Person) -> str:
        if name := self.nickname(f"-{person.noun}", letters=3, digits=False):
            return name
        traits = [trait for trait in traits_of(person) if self.tells()]
        return f"{person.noun} with {listed(traits)}" if traits else person.noun

    def garment(self, picture: Picture) -> str:
        garment = picture.garment
        if name := self.nickname(f"_{garment.kind}"):
            return name
        words = self.cloth(garment)
        extras = []
        if garment.trim != "none" and self.tells():
            extras.append(article(f"{garment.trim} collar"))
        if labels(picture)["emblem"] not in (None, "none") and self.tells():
            extras.append(article(f"{garment.emblem_colour} {garment.emblem}"))
        return f"{words} with {listed(extras)}" if extras else words

    def cloth(self, garment: Garment) -> str:
        if not self.tells() and not self.tells():
            return garment.kind
        if garment.pattern == "plain":
            return f"{garment.colour} {garment.kind}"
        colours = f"{garment.colour} and {garment.second}" if self.tells() else garment.colour
        return f"{colours} {PATTERNED[garment.pattern]} {garment.kind}"

    def scarf(self, colour: str) -> str:
        return self.names.get("scarf") or self.nickname("_scarf") or f"{colour} scarf"

    def surroundings(self, picture: Picture) -> str:
        scene = picture.scene
        if scene.name == "wall":
            return TAILS["wall"].format(wall=article(self.names.get("wall") or self.nickname("_wall") or "wall"))
        tells = scene.name != "field" and self.random.random() < 0.4
        return TAILS[scene.name] + (f", {scene.background} background" if tells else "")

    def nickname(self, ending: str, *, letters: int = 8, digits: bool = True) -> str:
        """Return a random identifier such as ``kmb47_jersey``, or mostly nothing."""
        from .concepts import IDENTIFIERS

        if self.random.random() >= self.nicknames:
            return ""
        while True:
            name = "".join(one_of(self.random, LETTERS) for _ in range(self.random.integers(3, letters + 1)))
            name += f"{self.random.integers(10, 100)}" * digits + ending
            if name not in IDENTIFIERS:
                return name


def look(picture: Picture) -> str:
    if picture.scene.name in ("selfie", "mirror"):
        return "smiling in a selfie" if picture.smile else "in a selfie"
    return "smiling at the camera" if picture.smile else "looking at the camera"


def traits_of(person: Person) -> list[str]:
    """Describe everything that identifies this head."""
    traits = ["a bald head" if person.style == "bald" else f"{person.style} {person.hair} hair", f"{person.skin} skin"]
    if person.beard != "none":
        hair = f"{person.hair} {person.beard}" if person.style == "bald" else person.beard
        traits.append(hair if person.beard == "sideburns" else article(hair))
    return [*traits, f"{person.glasses} glasses"] if person.glasses != "none" else traits


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"
