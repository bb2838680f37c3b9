"""What a report is made of, before it is a page or a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class Table:
    """Rows of short texts; ``**so**`` is strong."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart."""

    svg: str
    title: str
    """Read out by screen readers."""
    caption: str


@dataclass(frozen=True)
class Sheet:
    """Pictures beside each other."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Path, ...]], ...]
    caption: str


Part: TypeAlias = str | Table | Figure | Sheet
"""A text is a paragraph; one that begins with ``- `` is an item of a list."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Report:
    """All of it."""

    title: str
    sections: tuple[Section, ...]


def section(title: str, *parts: Part | Sequence[Part] | None) -> Section:
    """A section of the parts that there are."""
    flat: list[Part] = []
    for part in parts:
        if isinstance(part, str | Table | Figure | Sheet):
            flat.append(part)
        elif part is not None:
            flat += part
    return Section(title, tuple(flat))
