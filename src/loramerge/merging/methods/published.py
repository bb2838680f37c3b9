"""Methods that other packages publish, under the entry point group ``loramerge.methods``.

Their names are read from the packages' metadata; nothing is imported before it is used.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import OptionError
from ...registry import referenced
from .base import Method

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "loramerge.methods"


@dataclass(frozen=True)
class Published:
    """A name that a package publishes for a method."""

    name: str
    reference: str
    """``package.module:name``."""
    package: str
    """The package and its version."""


def published() -> tuple[Published, ...]:
    """What the installed packages publish, by name."""
    from importlib.metadata import entry_points  # slow to import, and few merges ask

    found = [
        Published(point.name, point.value.partition("[")[0].strip(), _package(point))
        for point in entry_points(group=GROUP)
    ]
    return tuple(sorted(found, key=lambda each: (each.name, each.package)))


def _package(point: "EntryPoint") -> str:
    name: str | None = point.dist.name if point.dist else None  # None of a package whose metadata is broken
    return f"{name} {point.dist.version}" if point.dist and name else "of an unknown name"


def method_at(reference: str) -> Method:
    """The method that ``package.module:name`` names.

    Raises:
        OptionError: There is none.
    """
    found = referenced(reference, "method")
    if not isinstance(found, Method):
        raise OptionError(
            f"{reference} is a {type(found).__name__}, wanted a merge method. Way out: a decorator of loramerge.merging.methods, "
            "such as @combination(…) or @method(…), above the function."
        )
    return found
