"""Regular expressions that anyone may have written, and a bound on their work.

Python tries one way after another in which a pattern can match, and a few characters can mean more ways than there is
time for.  So the ways are counted before a pattern is tried, and the time is taken.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from re import _parser  # type: ignore[attr-defined]
from time import thread_time
from typing import Any

from ..errors import OptionError

MAX_WAYS = 10_000_000
"""The most ways in which a pattern may match one name."""

MAX_SECONDS = 0.5
"""CPU time that the patterns of one use may take together, for all names."""

LONGEST, FEW = 1000, 20
"""The most characters and the most repeats of a pattern."""


class Effort:
    """The CPU time that some patterns have taken together."""

    seconds = 0.0

    @contextmanager
    def on(self, pattern: str) -> Iterator[None]:
        """Count the time of a block.

        Raises:
            OptionError: It is too much; or Python can't compile the pattern, in the block.
        """
        began = thread_time()
        try:
            yield
        except (re.error, RecursionError, OverflowError) as error:
            raise OptionError(f"{pattern[:80]!r} is not a regular expression: {error}.") from None
        self.seconds += thread_time() - began
        if self.seconds > MAX_SECONDS:
            raise _too_much(pattern)


class Expression:
    """A regular expression to be found in names.

    Args:
        pattern: The pattern.
        effort: What counts the time of it and others.

    Raises:
        OptionError: It isn't one, or would take too long.
    """

    def __init__(self, pattern: str, effort: Effort) -> None:
        self.pattern, self.effort = pattern, effort
        if len(pattern) > LONGEST:
            raise OptionError(f"{pattern[:80]!r} is not a regular expression of at most {LONGEST} characters.")
        with effort.on(pattern):
            self.compiled = re.compile(pattern)
            self.choices, self.repeats = _ways(_parser.parse(pattern).data)

    def found_in(self, name: str) -> bool:
        """Return whether a name has a part that matches.

        Raises:
            OptionError: To find out would take too long.
        """
        # Repeats cut the name at as many places, and the match begins at one.
        cuts = self.repeats + 1
        if self.repeats > FEW or self.choices * math.comb(len(name) + cuts, cuts) > MAX_WAYS:
            raise _too_much(self.pattern)
        with self.effort.on(self.pattern):
            return self.compiled.search(name) is not None


def _too_much(pattern: str) -> OptionError:
    return OptionError(f"{pattern[:80]!r} is too much work. Way out: name the modules, or use fewer repeats.")


def _ways(nodes: Sequence[tuple[Any, Any]]) -> tuple[float, int]:
    """Count the ways in which a part of a pattern can match: choices, and repeats of any length."""
    choices, repeats = 1.0, 0
    for (operation, value), following in zip_longest(nodes, nodes[1:]):
        kind = str(operation)
        if kind.endswith("REPEAT"):
            least, most, item = value
            inner, within = _ways(item.data)
            if most > 1 and (inner, within) != (1, 0):  # a repeated choice: exponential
                return math.inf, 0
            choices *= inner + 1 if most == 1 else 1
            repeats += within + (most > max(least, 1) and not _is_decided(item.data, following))
        else:
            parts = [_ways(part.data) for part in _parts(kind, value)]
            choices *= sum(inner for inner, _ in parts) or 1
            repeats += max((within for _, within in parts), default=0)
    return choices, repeats


def _parts(kind: str, value: Any) -> list[Any]:
    """Return the patterns inside of a node that isn't a repeat."""
    if kind == "BRANCH":
        return list(value[1])
    found = [value] if kind == "ATOMIC_GROUP" else value if isinstance(value, tuple) else []
    return [part for part in found if isinstance(part, _parser.SubPattern)]


def _is_decided(item: Sequence[tuple[Any, Any]], following: tuple[Any, Any] | None) -> bool:
    """Return whether a repeat can end at one place only: digits before something else."""
    digits = [tuple(map(str, node)) for node in item] == [("IN", "[(CATEGORY, CATEGORY_DIGIT)]")]
    kind, value = following or ("AT", 0)
    return digits and (str(kind) == "AT" or (str(kind) == "LITERAL" and not chr(value).isdigit()))
