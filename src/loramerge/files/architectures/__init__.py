"""Architectures: the module names and weight shapes of each model family, as data.

The names inside loramerge are diffusers'; ``native`` says how the model's own code
(stability's sgm, Black Forest Labs' flux …) names, orders and fuses the same weights.
"""

from collections.abc import Iterable

from ...registry import Registry
from .family import STOPS, Architecture, Forms, Kin, Label, TextEncoder, Unread, forms, last_numbers, model, outlines
from .names import Part, Parts, flat
from .table import FAMILIES

ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture", FAMILIES, aliases={alias: a.name for a in FAMILIES for alias in a.aliases}
)
"""All families, commonest first: if several fit a file, the first is taken."""


def titles(names: Iterable[str], between: str = " or ") -> str:
    """Write out families for messages: ``FLUX.1 (flux) or Chroma (chroma)``."""
    return between.join(f"{ARCHITECTURES[name].title} ({name})" for name in names)


def name_family() -> str:
    """Return the way out for a file whose family isn't known."""
    return (
        "name the model family if it is one that loramerge knows: --architecture NAME, such as sdxl or flux (in Python "
        "open(…, architecture=NAME)); a wrong NAME lists all"
    )


__all__ = [
    "ARCHITECTURES",
    "STOPS",
    "Architecture",
    "Forms",
    "Kin",
    "Label",
    "Part",
    "Parts",
    "TextEncoder",
    "Unread",
    "flat",
    "forms",
    "last_numbers",
    "model",
    "outlines",
]
