"""``loramerge methods``: loramerge's own merge methods, and those that installed packages publish."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import OptionError
from .options import Json
from .output import print_json, say, table

if TYPE_CHECKING:
    from ..merging.methods import Method

FROM = "loramerge"
"""The package of loramerge's own methods."""


def run(json: Json = False) -> None:
    """List the merge methods and their options: loramerge's own, and those that installed packages publish.

    Example: loramerge methods
    """
    if json:
        print_json([_entry(*each) for each in _offered()])
        return
    rows = []
    for name, package, method in _offered():
        if isinstance(method, str):
            rows.append([name, f"can't be used: {method}"])
            continue
        rows.append([name, method.title if package == FROM else f"{method.title} (of {package})"])
        rows += [["", option.usage] for option in method.options.values()]
    say(table(["method", "what it does, and its options"], rows))


def _offered() -> "Iterator[tuple[str, str, Method | str]]":
    """Yield name, package and method; for a method that can't be used, the reason instead."""
    from ..merging.methods import METHODS, of_package, published

    for method in METHODS.values():
        yield method.name, FROM, method
    for offer in published():
        try:
            yield offer.name, offer.package, of_package(offer)
        except OptionError as error:
            yield offer.name, offer.package, str(error)


def _entry(name: str, package: str, method: "Method | str") -> dict[str, object]:
    entry: dict[str, object] = {"name": name, "package": package}
    if isinstance(method, str):
        return entry | {"error": method}
    reference = {"reference": method.reference} if method.reference else {}
    options = list(method.options)
    return entry | reference | {"title": method.title, "source": method.source, "options": options}
