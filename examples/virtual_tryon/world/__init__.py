"""A world of drawn people in clothes: any number of pictures, each with an exact caption and labels."""

from .captions import caption, full_caption, prompt
from .concepts import CONCEPTS, SCENES, Concept, Example, concept_set, mixed_set, truth
from .drawing import draw
from .picture import Garment, Person, Picture, Pose, Scene, labels
from .sampling import HELD_OUT, sample
from .sheets import sheet

__all__ = [
    "CONCEPTS",
    "HELD_OUT",
    "SCENES",
    "Concept",
    "Example",
    "Garment",
    "Person",
    "Picture",
    "Pose",
    "Scene",
    "caption",
    "concept_set",
    "draw",
    "full_caption",
    "labels",
    "mixed_set",
    "prompt",
    "sample",
    "sheet",
    "truth",
]
