"""PEFT's patterns: values by module, under names, ends of names, or regular expressions.

Names are looked up; the work of the other patterns is bounded.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...errors import FileError, OptionError
from ..expressions import Effort, Expression

NAME = re.compile(r"\^?\w(?:[\w.-]|\\\.)*\$?")
"""Matches patterns that are names; their dots are taken as dots."""


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
        self.expressions: list[tuple[int, Expression, Any]] = []
        effort = Effort()
        for place, (pattern, value) in enumerate(patterns.items()):
            if NAME.fullmatch(pattern):
                self.names.setdefault(pattern.rstrip("$").replace("\\.", "."), (place, value))
            else:
                # PEFT's rule; a leading ``.*`` is made part of what may stand before a match.
                rest = re.sub(r"^\.\*(?![?+*{])(?!.*\|)", "", pattern)
                before = r"(.*\.)?" if rest == pattern else ".*"
                with self._named():
                    self.expressions.append((place, Expression(rf"^{before}({rest})$", effort), value))

    def of(self, path: str, default: Any) -> Any:
        """Return the value for a module's path.

        Raises:
            FileError: The regular expressions would take too long.
        """
        if not self.count:
            return default
        matching = (self.names[end] for end in _ends(path) if end in self.names)
        place, value = min(matching, key=lambda placed: placed[0], default=(self.count, default))
        for at, expression, given in self.expressions:
            if at > place:
                break
            with self._named():
                if expression.found_in(path):
                    return given
        return value

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the field in an error about a pattern."""
        try:
            yield
        except OptionError as error:
            raise FileError(f"{self.field} in the configuration: {error}") from None


def _ends(path: str) -> Iterator[str]:
    """Yield a path, anchored and not, and what follows each of its dots."""
    yield f"^{path}"
    yield path
    while path:
        path = path.partition(".")[2]
        yield path
