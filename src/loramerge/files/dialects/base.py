"""A dialect: the names that one tool gives the tensors of a LoRA.

It is a rule for the names of an architecture's modules and a table of suffixes, used both ways: to read a file, every
name that the tool would write for a family is generated, and the file's names are looked up in that table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..architectures import Architecture
from ..architectures.names import Parts
from .free import Free
from .suffixes import SPELLINGS, STYLES

Names = Callable[[Architecture], Mapping[str, Parts]]
"""Stems of every weight that the dialect can name, each with the modules that it holds."""

_TABLES: dict[tuple[Names, str], Mapping[str, Parts]] = {}


def table(names: Names, a: Architecture) -> Mapping[str, Parts]:
    """Return the stems that a naming gives an architecture; they are computed once."""
    key = (names, a.name)
    if key not in _TABLES:
        _TABLES[key] = names(a)
    return _TABLES[key]


LOW_RANK = frozenset({"lora"})
PEFT_KINDS = frozenset({"lora", "dora"})
LYCORIS_KINDS = frozenset({"lora", "loha", "lokr", "dora", "full", "norm", "bias", "table", "set"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Dialect:
    """The names that one tool gives the tensors of a LoRA, and what its readers understand."""

    name: str
    title: str
    source: str
    """The code that writes or reads it."""
    names: Names
    style: str
    """Spelling of LoRA's own tensors: a key of `suffixes.STYLES`."""
    text_style: str | None = None
    """The same for text encoders, if it differs."""
    style_for: Callable[[Architecture], str] | None = None
    """Chooses the style by family, if readers expect different ones; a file that had one of them keeps it."""
    also_reads: frozenset[str] = frozenset()
    """Other styles that its files have."""
    also_names: tuple[Names, ...] = ()
    """Other names that its files have: read, never written."""
    begins: tuple[str, ...]
    """Beginnings of its stems: a quick test before any table is built."""
    writes: bool = False
    alpha: Literal["constant", "keep", "bake"] = "bake"
    """``constant``: every layer has an alpha, all LoRA layers the same; ``keep``: each layer keeps its own; ``bake``: no
    alpha, the scale is multiplied into ``up``."""
    holds: frozenset[str] = LOW_RANK
    """Kinds of layers that its readers understand."""
    even_rank: tuple[str, ...] = ()
    """Modules (by the ends of their names) whose rank diffusers ignores: they are padded to the commonest rank."""
    lokr_cores: bool = True
    """True if its readers get LoKr's Tucker cores right; else ``w2`` is written whole."""
    dora_axis: Literal["out", "any"] = "any"
    """The axis that DoRA's magnitudes must have."""
    recognised_by: Names | None = None
    """A naming used only to recognise this dialect, if `names` is shared with another one."""
    numbered: bool = False
    """Stems are numbers: a numbering is right only when every layer fits."""
    rewrites: bool = False
    """True if a LoRA that was read in it can be written back after a change, though `writes` is False."""
    free: Free | None = None
    """Spelling of modules that no table lists. Without it, such a module is called what its stem is."""

    @cached_property
    def styles(self) -> frozenset[str]:
        """All styles that its files may have."""
        return self.also_reads | {self.style, self.text_style or self.style}

    @property
    def tables(self) -> tuple[Names, ...]:
        """All namings that its files may have, the one that is written first."""
        return (self.names, *self.also_names)

    def free_module(self, stem: str) -> str:
        """Return the module of a stem that no table lists."""
        return self.free.module(stem) if self.free else stem

    def free_stem(self, module: str, own: "Dialect") -> str | None:
        """Return the stem of a module that no table lists, or None if the dialect can't spell it.

        Args:
            module: The module's name.
            own: The dialect that the name is from.
        """
        if self.free is None or own.free is None:
            return module if self is own or (own.free is None and module.startswith(self.begins)) else None
        return self.free.stem(module, self is own) if self is own or self.free.paths == own.free.paths else None

    def can_write(self, own: str) -> bool:
        """Return whether a LoRA of the dialect `own` can be written in this one."""
        return self.writes or (self.rewrites and self.name == own)

    def reads_core(self, kind: str) -> bool:
        """Return whether its readers get Tucker cores of a kind of layer right."""
        return self.lokr_cores if kind == "lokr" else "lokr" in self.holds

    def written_style(self, a: Architecture | None, had: str = "") -> str:
        """Choose the style to write a LoRA in.

        Args:
            a: Its family, if it is known.
            had: The style that its file had in this dialect, if it had one.
        """
        if self.style_for is None:
            return self.style
        if had in self.styles:
            return "peft" if had.startswith("peft") else had
        return self.style_for(a) if a else self.style

    def suffix(self, role: str, module: str, style: str | None = None) -> str:
        """Return the suffix of a module's tensor."""
        text = module.startswith("text_encoder")
        chosen = STYLES[self.text_style if text and self.text_style else style or self.style]
        return chosen.get(role) or SPELLINGS[role]
