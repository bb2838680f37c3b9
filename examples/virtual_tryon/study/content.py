"""The contents of a report, from which the page and the Markdown are written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class Table:
    """Rows of short texts; ``**text**`` is bold."""

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
    table: Table | None = None
    """The same in figures, where there are no charts."""


@dataclass(frozen=True)
class Sheet:
    """A grid of pictures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Path, ...]], ...]
    caption: str


Part: TypeAlias = str | Table | Figure | Sheet
"""A string is a paragraph, or a list item if it begins with ``- ``."""


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Report:
    """A title and its sections."""

    title: str
    sections: tuple[Section, ...]


def section(title: str, *parts: Part | Sequence[Part] | None) -> Section:
    """Make a section of the parts that aren't None, flattening sequences."""
    flat: list[Part] = []
    for part in parts:
        if isinstance(part, str | Table | Figure | Sheet):
            flat.append(part)
        elif part is not None:
            flat += part
    return Section(title, tuple(flat))
