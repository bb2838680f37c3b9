"""Names of modules that no table lists: those of a family that loramerge doesn't know.

Tools make a stem of a module's path by a rule: a prefix, and the path with its dots or with underscores
in their place.  So a path can be had from a stem, and a stem from a path, without knowing the model.
Whose path it is can't be told: that of the model's own code, or diffusers'.
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
    """How a dialect spells the modules of a model that no table lists."""

    prefix: str
    """What stands before the denoiser's paths, ``{}`` for ``unet`` or ``transformer``."""
    flat: bool = False
    """Whether the path's dots are underscores."""
    paths: Literal["native", "diffusers", "other"]
    """Whose paths they are: the same ones can be spelled in another dialect that has them too."""
    text: str | None = None
    """What stands before a text encoder's paths, ``{}`` for its number; None where the component's name does."""

    def module(self, stem: str) -> str:
        """The module of a stem."""
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
        """Whether the prefix says what the denoiser is."""
        return "{}" in self.prefix

    def stem(self, module: str, own: bool) -> str | None:
        """The stem of a module; None where the dots of its path, or what the dialect calls its component, isn't known.

        Args:
            module: The module.
            own: Whether its name is from a stem of this very dialect.
        """
        component, _, path = module.partition(".")
        spelled = flat(path) if self.flat else path
        if self.flat and spelled.startswith("_") and not own:
            return None  # readers take it for a second underscore of the prefix
        if component in DENOISERS:
            return self.prefix.format(component) + spelled if self.flat or has_dots(path) else None
        if self.text is not None and (match := re.fullmatch(r"text_encoder_?(\d*)", component)):
            return self.text.format(match[1]) + spelled
        return module if not self.flat and (own or self.says_component) else None


def has_dots(path: str) -> bool:
    """Whether a path has its dots: one with a number in it has some."""
    return "." in path or re.search(r"_\d", path) is None
