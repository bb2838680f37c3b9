"""Text of strangers: small files, and JSON in files and headers.

A file must be a regular one, of a bounded size and UTF-8; JSON must be an object whose numbers are finite and whose
nesting is bounded, so that no reader of it overflows or recurses without end.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import FileError

MAX_TEXT = 10_000_000
"""The most bytes of a text file, such as a configuration."""

MAX_QUOTES, MAX_STRUCTURE, MAX_WIDE = 1_000_000, 4_000_000, 40_000_000
"""Limits of JSON, such as a header: its quotation marks (a tensor has ten), its bytes outside of strings, and its bytes if some are
not ASCII.  Python needs 20 times the bytes of lists and numbers, and four times those of a text with an emoji."""

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)

DEEPEST = 100
"""Levels of lists and objects inside of each other."""

LARGEST = 1.7976931348623157e308
"""The largest float; an integer may be larger, and then fails wherever it is divided or formatted."""

HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Matches an escaped half of a surrogate pair, which JSON can write and UTF-8 can't."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a file for reading; refuse pipes and devices, which may never end.

    Raises:
        FileError: It can't be opened, or is not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to blocks.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise FileError(f"Can't open {path}: {getattr(error, 'strerror', error)}.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileError(f"Can't open {path}: it is a directory, a pipe or a device, wanted a file.")
    return fd


def read_text(path: str | os.PathLike[str], most: int = MAX_TEXT) -> str:
    """Read a small text file.

    Args:
        path: The file.
        most: The most bytes that it may have.

    Raises:
        FileError: It can't be read, is not UTF-8, or is too large.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileError(f"Can't read {path}: it has more than {most} bytes.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"Can't read {path}: it is not UTF-8 ({error}).") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a small file that holds a JSON object.

    Raises:
        FileError: It can't be read, or isn't such a file.
    """
    return parsed(read_text(path), str(path))


def parsed(text: str, name: str) -> dict[str, Any]:
    """Parse a JSON object that anyone may have written.

    Args:
        text: The JSON.
        name: Its file or its place in messages.

    Raises:
        FileError: It isn't one, is too large or too deep, or has a number that isn't finite or a text that isn't Unicode.
    """
    try:
        if len(text) > MAX_STRUCTURE and (reason := too_large(text.encode())):
            raise FileError(f"{name} {reason}.")
        found = json.loads(text, parse_constant=SPELLED.get)
        check_plain([found])
        if HALF.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise FileError(f"{name} is not a JSON object: {str(found)[:80]}.")
    return found


def said(text: str | None) -> dict[str, Any]:
    """Return the JSON object in a header's entry; empty if there is none, or the text is something else."""
    try:
        return parsed(text or "{}", "")
    except FileError:
        return {}


def too_large(data: bytes) -> str | None:
    """Say why JSON would need many times its size in memory; None if it would not."""
    if len(data) > MAX_WIDE and not data.isascii():
        return f"has {len(data)} bytes, not all of them ASCII; at most {MAX_WIDE} are allowed then"
    if len(data) <= MAX_STRUCTURE:
        return None
    if data.count(b'"') - data.count(b'\\"') > MAX_QUOTES:
        return f"has more than {MAX_QUOTES} quotation marks: {MAX_QUOTES // 10} tensors, or {MAX_QUOTES // 4} entries of metadata"
    if len(data) - sum(found.end() - found.start() for found in STRING.finditer(data)) > MAX_STRUCTURE:
        return f"has more than {MAX_STRUCTURE} bytes outside of strings"
    return None


def check_plain(values: Iterable[Any], *, infinite: bool = False, depth: int = 0) -> None:
    """Check numbers and nesting of parsed values, of which anyone may have written the text.

    Raises:
        ValueError: There are more than `DEEPEST` levels, or a number isn't finite; infinity may be allowed.
    """
    if depth > DEEPEST:
        raise ValueError(f"it has more than {DEEPEST} levels")
    for value in values:
        if isinstance(value, dict | list):
            check_plain(value.values() if isinstance(value, dict) else value, infinite=infinite, depth=depth + 1)
        elif isinstance(value, int | float) and not (abs(value) <= LARGEST or (infinite and value in INFINITE)):
            raise ValueError("a number is not finite")


INFINITE = (math.inf, -math.inf)
SPELLED = {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}
"""Texts for the numbers that JSON lacks, by the words that Python's own writer has for them."""


def escaped(text: str, escape: Callable[[str], str]) -> str:
    """Escape the characters that a terminal doesn't show, or acts on: controls, line ends, marks of direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in SPACES_AND_JOINERS else escape(c) for c in text)


def whole(text: str) -> bool:
    """Return whether a text can be written as UTF-8: names of files may have bytes that are no characters."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def visible(text: str) -> str:
    r"""Return a text as one line, in which nothing is hidden: ``\x1b``, ``\n``, ``\u202e``."""
    return escaped(text, lambda c: c.encode("unicode_escape").decode())


SPACES_AND_JOINERS = "\u00a0\u202f\u3000\u200c\u200d"
"""Characters of ordinary text that Python doesn't call printable: spaces, and what joins the parts of an emoji."""


def as_json(data: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Write JSON; of the numbers that JSON lacks, infinity as the text "inf" and NaN as null.

    Args:
        data: Mappings, lists, texts and numbers.
        indent: Spaces per level; None for one line.
        default: Called with anything else, to give one of these.
    """
    return json.dumps(finite(data), indent=indent, ensure_ascii=False, allow_nan=False, default=default)


def finite(data: Any) -> Any:
    """Spell the numbers that JSON lacks, as `as_json` does."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None if math.isnan(data) else str(data)
    return data
