"""Finding the model family that a file's metadata names."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from . import ARCHITECTURES
from .labels import ARCHITECTURE, SPECIFICATION, VERSION
from .table import ELSEWHERE

KEYS = (SPECIFICATION, VERSION)
"""Entries of a header that name the family."""


class Named(NamedTuple):
    """The families that a header names."""

    said: str
    """The entry that names them, as ``key: value``; empty if none does."""
    families: tuple[str, ...]
    """The known families."""
    unknown: str
    """A family that loramerge doesn't know; empty if there is none."""


def named(metadata: Mapping[str, str]) -> Named:
    """Return the families that a file's metadata names.

    Our own entry has precedence over those of other tools, in which the longest words count:
    ``flux-2-klein-9b`` isn't FLUX.1, though ``flux`` is in it.
    """
    own = metadata.get(ARCHITECTURE, "")
    if own in ARCHITECTURES:
        return Named(f"{ARCHITECTURE}: {own}", (ARCHITECTURES[own].name,), "")
    entries = [(key, metadata[key]) for key in KEYS if metadata.get(key)]
    families: dict[str, None] = {}
    unknown, said = "", ""
    for key, value in entries:
        for name in _names(re.sub(r"[\s_./:]+", "-", value.lower())):
            said = said or f"{key}: {value}"
            if name in ARCHITECTURES:
                families[name] = None
            else:
                unknown = unknown or name
    return Named(said, tuple(families), unknown)


def _names(text: str) -> list[str]:
    """Find the families that a text names by its longest words; it is in lower case, its words joined by hyphens."""
    matches = [(*place, names) for word, names in _words().items() for place in _places(word, text)]
    longest = [
        (start, end, names)
        for start, end, names in matches
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in matches)
    ]
    return list(dict.fromkeys(name for *_, names in sorted(longest) for name in names))


def _places(word: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield where a text has a word: no letter or number is before it, and no letter behind it."""
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not text[max(0, start - 1) : start].isalnum() and not text[end : end + 1].isalpha():
            yield start, end
        start = text.find(word, start + 1)


@cache
def _words() -> dict[str, list[str]]:
    """Map each word that names families to those families."""
    words: dict[str, list[str]] = {}
    for a in ARCHITECTURES.values():
        for word in dict.fromkeys((a.name.replace(".", "-"), *a.hints)):
            words.setdefault(word, []).append(a.name)
    for title, others in ELSEWHERE.items():
        for word in others:
            words.setdefault(word, []).append(title)
    return words
