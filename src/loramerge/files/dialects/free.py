"""Names of modules that no table lists: those of a family that loramerge doesn't know.

Tools make a stem of a module's path by a rule: a prefix, and the path with its dots or with underscores
in their place.  So a path can be derived from a stem, and a stem from a path, without knowing the model.
What can't be derived is whether the path is that of the model's own code or diffusers'.
"""

import re
from dataclasses import dataclass
from typing import Literal

from ..architectures.names import flat

UNETS = re.compile(r"(?:down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)[._]")
"""Beginnings of paths in a UNet."""

DENOISERS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class Free:
    """A dialect's spelling of the modules of a model that no table lists."""

    prefix: str
    """Prefix of the denoiser's paths, ``{}`` for ``unet`` or ``transformer``."""
    flat: bool = False
    """True if the path's dots are written as underscores."""
    paths: Literal["native", "diffusers", "other"]
    """The code whose paths they are; dialects with the same can spell each other's modules."""
    text: str | None = None
    """Prefix of a text encoder's paths, ``{}`` for its number; None if it is the component's name."""

    def module(self, stem: str) -> str:
        """Return the module of a stem."""
        if self.text is not None and (match := re.match(re.escape(self.text).replace(r"\{\}", r"(\d*)"), stem)):
            return f"text_encoder{'_' * bool(match[1])}{match[1]}.{stem[match.end() :]}"
        for component in DENOISERS:
            start = self.prefix.format(component)
            if stem.startswith(start):
                path = stem[len(start) :]
                guess = "unet" if UNETS.match(path) else "transformer"
                return f"{component if self.says_component else guess}.{path}"
        return stem

    @property
    def says_component(self) -> bool:
        """True if the prefix says whether the denoiser is a UNet or a transformer."""
        return "{}" in self.prefix

    def stem(self, module: str, own: bool) -> str | None:
        """Return the stem of a module; None if the dots of its path or the dialect's name of its component aren't known.

        Args:
            module: The module.
            own: True if its name is from a stem of this very dialect.
        """
        component, _, path = module.partition(".")
        spelled = flat(path) if self.flat else path
        if self.flat and spelled.startswith("_") and not own:
            return None  # readers would take the underscore for a second one of the prefix
        if component in DENOISERS:
            return self.prefix.format(component) + spelled if self.flat or has_dots(path) else None
        if self.text is not None and (match := re.fullmatch(r"text_encoder_?(\d*)", component)):
            return self.text.format(match[1]) + spelled
        return module if not self.flat and (own or self.says_component) else None


def has_dots(path: str) -> bool:
    """Return whether a path has its dots: a path with a number in it has some."""
    return "." in path or re.search(r"_\d", path) is None
