"""PEFT's patterns: values by module, under names, ends of names, or regular expressions.

A configuration may come from anyone, and Python's regular expressions can take exponential time: names are
looked up, and the work of the other patterns is bounded before any is tried.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...errors import FileError

NAME = re.compile(r"\^?\w(?:[\w.-]|\\\.)*\$?")
"""Matches patterns that are names; their dots are taken as dots."""

ENDLESS = re.compile(r"\)[*+?{]|\(\?(?!:)|\\\d")
"""Repeated groups, lookarounds and back-references: with these a few characters can take exponential time."""

MAX_WORK = 10_000_000
"""Estimated steps that the regular expressions of a configuration may take for all modules together."""


class Expression(NamedTuple):
    """A regular expression among the patterns."""

    place: int
    compiled: re.Pattern[str]
    repeats: int
    choices: int
    value: Any


class Patterns:
    """Values for modules: a module has that of the first pattern that matches its path, or an end of it after a dot.

    Args:
        patterns: Values by pattern.
        field: Their name in the configuration, such as ``alpha_pattern``.

    Raises:
        FileError: They aren't a mapping, or one isn't a regular expression or would take too long.
    """

    def __init__(self, patterns: Any, field: str = "alpha_pattern") -> None:
        if not isinstance(patterns, Mapping):
            raise FileError(f"{field} in the configuration is {patterns!r}, wanted an object")
        self.field = field
        self.count = len(patterns)
        self.names: dict[str, tuple[int, Any]] = {}
        self.expressions: list[Expression] = []
        self._work = 0
        for place, (pattern, value) in enumerate(patterns.items()):
            if NAME.fullmatch(pattern):
                self.names.setdefault(pattern.rstrip("$").replace("\\.", "."), (place, value))
            else:
                self.expressions.append(_expression(place, pattern, value, field))

    def of(self, path: str, default: Any) -> Any:
        """Return the value for a module's path.

        Raises:
            FileError: The regular expressions would take too long.
        """
        if not self.count:
            return default
        matching = (self.names[end] for end in _ends(path) if end in self.names)
        place, value = min(matching, key=lambda placed: placed[0], default=(self.count, default))
        for expression in self.expressions:
            if expression.place > place:
                break
            self._work += max(1, len(path)) ** expression.repeats * 2**expression.choices
            if self._work > MAX_WORK:
                raise FileError(f"{self.field} in the configuration is too much work. Way out: name the modules in it")
            if expression.compiled.match(path):
                return expression.value
        return value


def _expression(place: int, pattern: str, value: Any, field: str) -> Expression:
    """Compile a pattern by PEFT's rule; a leading ``.*`` is made part of what may stand before a match."""
    rest = re.sub(r"^\.\*(?![?+*{])(?!.*\|)", "", pattern)
    plain = re.sub(r"\\.|\[\^?.[^\]]*\]", "c", rest)
    if ENDLESS.search(rest) or len(plain) > 1000:
        raise FileError(f"{field} {pattern[:80]!r} is too much work. Way out: name the modules in it")
    try:
        compiled = re.compile(rf"(.*\.)?({rest})$" if rest == pattern else rf".*({rest})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise FileError(f"{field} {pattern[:80]!r} is no regular expression: {error}") from None
    return Expression(place, compiled, len(re.findall(r"[*+{]|(?<!\()\?", plain)), plain.count("|"), value)


def _ends(path: str) -> Iterator[str]:
    """Yield a path, anchored and not, and what follows each of its dots."""
    yield f"^{path}"
    yield path
    while path:
        path = path.partition(".")[2]
        yield path
