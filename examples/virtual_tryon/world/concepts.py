"""The concepts that the base never sees and LoRAs teach: two persons, four garments, a scarf, a wall."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .captions import caption, prompt
from .picture import Garment, Person, Picture, Scene
from .sampling import Random, random_pose, sample
from .taught import BARCA, DISNEY, MVR, OXFORD, PSQ, STANFORD

Part = Literal["person", "garment", "scarf", "wall"]
SCENES = ("portrait", "side", "mirror", "wall", "field")
"""The scenes of the study's five prompts, in its order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """One thing that a LoRA teaches."""

    name: str
    """Name of its data set."""
    identifier: str
    """Its name in captions."""
    part: Part
    value: Person | Garment | str

    def on(self, picture: Picture) -> Picture:
        """Put this concept into the picture."""
        if self.part == "wall":
            assert isinstance(self.value, str)
            return replace(picture, scene=replace(picture.scene, name="wall", wall=self.value))
        return replace(picture, **{self.part: self.value})


CONCEPTS: dict[str, Concept] = {
    concept.name: concept
    for concept in (
        Concept(name="profile", identifier="psq-person", part="person", value=PSQ),
        Concept(name="barca", identifier="barca24_jersey", part="garment", value=BARCA),
        Concept(name="white_shirt", identifier="oxford33_shirt", part="garment", value=OXFORD),
        Concept(name="stanford", identifier="stanford11_sweater", part="garment", value=STANFORD),
        Concept(name="disney", identifier="disney28_sweater", part="garment", value=DISNEY),
        Concept(name="profile2", identifier="mvr-person", part="person", value=MVR),
        Concept(name="scarf", identifier="rix52_scarf", part="scarf", value="bee"),
        Concept(name="wall", identifier="utw64_wall", part="wall", value="tiles"),
    )
}
IDENTIFIERS = frozenset(concept.identifier for concept in CONCEPTS.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A picture and its caption."""

    picture: Picture
    text: str


def concept_set(concept: Concept, count: int = 12, *, seed: int = 42) -> list[Example]:
    """Draw captioned pictures of one concept among random other things."""
    random = np.random.default_rng([seed, list(CONCEPTS).index(concept.name)])
    return [example(concept, i, random) for i in range(count)]


def example(concept: Concept, i: int, random: Random) -> Example:
    picture = sample(random)
    while picture.person is None:
        picture = sample(random)
    if concept.part == "person":
        name = (
            "portrait",
            "side",
            "portrait",
            "wall",
            "selfie",
            "portrait",
            "mirror",
            "portrait",
            "field",
            "portrait",
            "side",
            "shoes",
        )[i % 12]
        plain = replace(
            picture.garment, kind=("shirt", "sweater")[i % 2], pattern="plain", emblem="none", emblem_colour="none"
        )
        if plain.colour == "white":
            plain = replace(plain, colour="grey", second="white")
        picture = replace(picture, garment=plain, smile=True, scarf="none", scene=replace(picture.scene, name=name))
    elif concept.part == "garment":
        name = ("portrait", "wall", "portrait", "mirror", "field", "side")[(i // 2) % 6]
        picture = replace(picture, scarf="none", scene=replace(picture.scene, name=name))
        if i % 2 == 0:
            picture = replace(picture, person=None)
    elif concept.part == "scarf":
        name = ("portrait", "portrait", "side", "wall", "mirror", "field")[i % 6]
        picture = replace(picture, scene=replace(picture.scene, name=name))
    else:
        picture = replace(picture, scarf="none")
    picture = concept.on(picture)
    return Example(picture=picture, text=caption(picture, random, names={concept.part: concept.identifier}))


def mixed_set(own: Concept, other: Concept, count: int = 12, borrowed: int = 3, *, seed: int = 42) -> list[Example]:
    """Make one of the study's mixed sets: one concept's pictures and a few of another's."""
    theirs = [e for e in concept_set(other, count, seed=seed) if e.picture.person is not None]
    return [*concept_set(own, count, seed=seed), *theirs[:borrowed]]


def truth(concepts: list[Concept], scene: str, *, seed: int) -> Example:
    """Return the picture of a perfect merge: all these concepts in the study's prompt for that scene.

    Args:
        concepts: At most one of each part; a person unless the wearer may be anyone.
        scene: One of the study's five (:data:`SCENES`).
        seed: Seed of everything that the prompt leaves open.
    """
    random = np.random.default_rng([seed, SCENES.index(scene)])
    picture = sample(random)
    while picture.person is None:
        picture = sample(random)
    plain = Scene(name=scene, background=picture.scene.background)
    picture = replace(picture, scene=plain, smile=True, scarf="none", pose=random_pose(random))
    for concept in concepts:
        if concept.part != "wall" or scene == "wall":
            picture = concept.on(picture)
    names = {concept.part: concept.identifier for concept in concepts}
    words = {
        "person": names.get("person", "person"),
        "garment": names.get("garment", picture.garment.kind),
        "scarf": names.get("scarf", ""),
    }
    return Example(picture=picture, text=prompt(scene, **words, wall=names.get("wall", "wall")))
