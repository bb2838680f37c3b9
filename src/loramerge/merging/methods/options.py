"""Options whose annotations say what they take: keyword-only parameters of a merge method, fields of settings."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ...errors import OptionError, did_you_mean


@dataclass(frozen=True)
class Range:
    """The numbers between two bounds, which are included unless they are open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'from'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


Density = Annotated[float, Range(0, 1, open_low=True)]
"""Share of the entries that are kept."""

Seed = Annotated[int, Range(0)]
"""Seed of random choices, which depend only on it and the module's name."""

Count = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0, open_high=True)]
"""A finite number from 0."""

Positive = Annotated[float, Range(0, open_low=True, open_high=True)]
"""A finite number above 0."""

Share = Annotated[float, Range(0, 1)]
"""From nothing to all of it."""


@dataclass(frozen=True)
class Option:
    """One option of a method."""

    name: str
    kind: type
    """``int``, ``float``, ``str`` or ``bool``."""
    default: Any
    choices: tuple[str, ...] = ()
    range: Range | None = None

    @property
    def wanted(self) -> str:
        """The values that the option takes, in words."""
        if self.choices:
            return " or ".join(self.choices)
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.kind]
        return f"{name} {self.range}" if self.range else name

    @property
    def usage(self) -> str:
        """The option as typed on a command line: its default, and the values that it takes."""
        return f"-O {self.name}={self.default}  {self.wanted}"

    def parse(self, text: str) -> Any:
        """Parse a value as typed on a command line."""
        if self.kind is bool:
            known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            return self.check(known.get(text.lower(), text))
        try:
            return self.check(self.kind(text))
        except ValueError:
            return self.check(text)

    def allows(self, value: Any) -> bool:
        """True if the value has the option's type, and lies within the range or among the choices."""
        fits = isinstance(value, (int, float) if self.kind is float else self.kind)
        fits = fits and not (isinstance(value, int) and abs(value) >= 2**63)
        if not fits or (isinstance(value, bool) and self.kind is not bool):
            return False
        return (not self.choices or value in self.choices) and (self.range is None or value in self.range)

    def check(self, value: Any) -> Any:
        """Convert a value to the option's type and check it.

        Raises:
            OptionError: It has another type, is out of range, or isn't one of the choices.
        """
        value = math.inf if self.kind is float and value == "inf" else value  # as JSON holds it
        if not self.allows(value):
            raise OptionError(f"The option {self.name} wants {self.wanted}, got {value!r}.")
        return float(value) if self.kind is float else value


def options_of(function: Callable[..., Any]) -> Mapping[str, Option]:
    """Return the options of a function, by name.

    Raises:
        TypeError: A parameter's type has no form on a command line, it has no default, or its name is taken.
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: _option(p, function) for p in parameters if p.kind is p.KEYWORD_ONLY}


def title_of(function: Callable[..., Any], name: str) -> str:
    """Return the first line of a function's docstring, or the name of a function that has none."""
    return (inspect.getdoc(function) or name).splitlines()[0]


def checked(what: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options: those given, and the defaults of the others.

    Args:
        what: Whose options they are, for messages: ``"The method ties"``.
        options: The options by name.
        given: Values by name.

    Raises:
        OptionError: An option is unknown, or its value is out of range.
    """
    for name in given:
        if name not in options:
            known, hint = ", ".join(options) or "none", did_you_mean(name, options)
            raise OptionError(f"{what} has no option {name!r}.{hint} Its options: {known}.")
    return {name: option.check(given.get(name, option.default)) for name, option in options.items()}


TAKEN = (
    *("loras", "weights", "method", "rank", "scope", "exclude", "device", "base", "progress", "allow_growth"),
    *("max_error", "energy", "max_size", "to", "dtype", "workers", "most"),
)
"""Arguments of `merge` and settings of a sweep: an option of the same name could never be given."""


def _option(parameter: inspect.Parameter, function: Callable[..., Any]) -> Option:
    where = function.__name__
    if parameter.name in TAKEN:
        raise TypeError(f"Option {parameter.name!r} of {where}: merging has an argument of that name. Wanted another.")
    annotation = _evaluated(parameter.annotation, function)
    kind, choices, found = _allowed(annotation)
    if kind not in (int, float, str, bool) or parameter.default is parameter.empty:
        raise TypeError(
            f"Option {parameter.name!r} of {where}: wanted a default, and int, float, str, bool, a Literal of "
            f"texts or an Annotated number with a Range; got {annotation!r}."
        )
    return Option(parameter.name, kind, parameter.default, choices, found)


def misfits(settings: Any) -> list[str]:
    """Say which fields of a dataclass have values that their annotations don't allow, one phrase per field.

    Only fields annotated by a Literal of texts or by an Annotated number with a Range are checked; None is allowed if
    the annotation ends in ``| None``.
    """
    wrong = []
    for name, annotation in get_type_hints(type(settings), include_extras=True).items():
        value, parts = getattr(settings, name), get_args(annotation)
        kind, choices, found = _allowed(parts[0] if NoneType in parts else annotation)
        option = Option(name, kind, None, choices, found)
        if (choices or found) and not option.allows(value) and not (value is None and NoneType in parts):
            wrong.append(
                f"{name} must be {'one of ' * bool(choices)}{', '.join(choices) or option.wanted}, got {value!r}"
            )
    return wrong


def _allowed(annotation: Any) -> tuple[Any, tuple[str, ...], Range | None]:
    """The type, the choices and the range that an annotation says."""
    kind, found = get_args(annotation) if get_origin(annotation) is Annotated else (annotation, None)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return str if choices else kind, choices, found


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """Evaluate an annotation that ``from __future__ import annotations`` left as text."""
    return eval(annotation, getattr(function, "__globals__", {})) if isinstance(annotation, str) else annotation
