"""The grid of a sweep: every combination of some settings, each with its recipe and a name for its file."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..errors import OptionError, did_you_mean
from .methods import Method, check_options, find
from .ranks import BUDGETS
from .recipe import Recipe, check

SETTINGS = ("method", "rank", *BUDGETS, "weights", "scope", "to", "dtype")
"""The settings of a grid, apart from the methods' options."""

LONGEST = 200
"""The most bytes of a merge's name, from which a file's is made; a longer one ends in its hash."""


@dataclass(frozen=True)
class Point:
    """One combination of a grid."""

    name: str
    settings: Mapping[str, Any]
    """The settings that apply: options that the method doesn't have are left out."""
    recipe: Recipe

    @property
    def file(self) -> str:
        """Name of the merged file."""
        return f"{self.name}.safetensors"


def points(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return the combinations of a grid that differ, each with its recipe.

    Raises:
        OptionError: A setting is unknown, or a value is wrong.
    """
    _check(recipe, grid)
    found: list[Point] = []
    for values in product(*grid.values()):
        asked = dict(zip(grid, values, strict=True))
        method = find(asked.get("method", recipe.method))
        known = method.options
        settings = {name: value for name, value in asked.items() if name in SETTINGS or name in known}
        options = {name: settings[name] for name in settings if name not in SETTINGS}
        changes = {name: settings[name] for name in settings if name in SETTINGS}
        changed = recipe.override(**changes, options=options)
        check(changed)
        check_options(method, changed.options)
        if all(changed != point.recipe for point in found):
            settings = {name: _plain(value) for name, value in settings.items()}
            found.append(Point(unique(_readable(settings), [p.name for p in found]), settings, changed))
    return found


def left_out(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """Return the options that some methods of a grid don't have, each with the names of these methods."""
    methods = list(map(find, grid.get("method", [recipe.method])))
    options = [name for name in dict.fromkeys((*grid, *recipe.options)) if name not in SETTINGS]
    lacking = {name: [m.name for m in methods if name not in m.options] for name in options}
    return {name: without for name, without in lacking.items() if without}


def _check(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> None:
    methods = list(map(find, grid.get("method", [recipe.method])))
    options = list(dict.fromkeys(name for method in methods for name in method.options))
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise OptionError(f"The setting {name}: got {values!r}, wanted a list of values.")
        if name not in SETTINGS and name not in options:
            hint = did_you_mean(name, [*SETTINGS, *options])
            raise OptionError(
                f"Unknown setting {name!r}.{hint} Available: {', '.join(SETTINGS)}; options of the methods: "
                f"{', '.join(options) or 'none'}."
            )


def _plain(value: Any) -> Any:
    """Return a setting as it is shown in tables and file names."""
    return value.reference or value.name if isinstance(value, Method) else value


def _readable(settings: Mapping[str, Any]) -> str:
    """Name a file after its settings: ``ties_density=0.1``."""
    parts = [_word(value) if name == "method" else f"{name}={_word(value)}" for name, value in settings.items()]
    name = "_".join(parts) or "merge"
    if len(name.encode()) <= LONGEST:
        return name
    start = name.encode()[: LONGEST - 13].decode(errors="ignore")
    return f"{start}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{pattern}={number}" for pattern, number in value.items()]
    text = "+".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^\w.=+%-]+", "-", text)


def unique(name: str, taken: Sequence[str]) -> str:
    """Return the name, with a number appended if it is taken; upper and lower case count as equal."""
    names = [name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))]
    return next(n for n in names if n.lower() not in {t.lower() for t in taken})
