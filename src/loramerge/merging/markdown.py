"""Text of strangers in Markdown: nothing in it acts, be it Markdown, HTML or a control character."""

import re

from ..files.storage.texts import visible

ACTIVE = re.compile(r"([\\`*_{}\[\]<>#|!&~$])")
"""The characters that Markdown, or the Hub's reader of it, acts on inside of a line."""


def plain(text: str) -> str:
    """Return a text as Markdown that shows it as it is."""
    return ACTIVE.sub(r"\\\1", visible(text))


def code(text: str) -> str:
    """Return a text as code within a line."""
    shown = visible(text)
    ticks = "`" * (1 + _longest(shown))
    space = " " if not shown or shown[0] in "` " or shown[-1] in "` " else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def fenced(language: str, text: str) -> str:
    """Return lines as a block of code."""
    fence = "`" * max(3, 1 + _longest(text))
    shown = "\n".join(map(visible, text.strip().split("\n")))
    return f"{fence}{language}\n{shown}\n{fence}"


def _longest(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
