"""Methods that other packages publish, under the entry point group ``loramerge.methods``.

Their names come from the packages' metadata; a package is imported only when its method is used.
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
    """Return the methods that installed packages publish, sorted by name."""
    from importlib.metadata import entry_points  # slow to import, and few merges need it

    found = [
        Published(point.name, point.value.partition("[")[0].strip(), _package(point))
        for point in entry_points(group=GROUP)
    ]
    return tuple(sorted(found, key=lambda each: (each.name, each.package)))


def _package(point: "EntryPoint") -> str:
    name: str | None = point.dist.name if point.dist else None  # dist is None if the package's metadata is broken
    return f"{name} {point.dist.version}" if point.dist and name else "of an unknown name"


def method_at(reference: str) -> Method:
    """Import the method that ``package.module:name`` names.

    Raises:
        OptionError: There is no such method.
    """
    found = referenced(reference, "method")
    if not isinstance(found, Method):
        raise OptionError(
            f"{reference} is a {type(found).__name__}, wanted a merge method. Way out: a decorator of loramerge.merging.methods, "
            "such as @combination(…) or @method(…), above the function."
        )
    return found
