"""``loramerge methods``: the methods of the index, and what installed packages publish beside them."""

from collections.abc import Iterator

from ..errors import OptionError
from ..merging.methods import METHODS, Method, of_package, published
from .output import print_json, table

FROM = "loramerge"
"""Where the methods of the index come from."""


def show(as_json: bool) -> None:
    """Print every method with its options, and why one that is published can't be used."""
    if as_json:
        print_json([_entry(*each) for each in _offered()])
        return
    rows = []
    for name, package, method in _offered():
        if isinstance(method, str):
            rows.append([name, f"can't be used: {method}"])
            continue
        rows.append([name, method.title if package == FROM else f"{method.title} (of {package})"])
        rows += [["", f"-O {option.name}={option.default}  {option.wanted}"] for option in method.options.values()]
    print(table(["method", "what it does, and its options"], rows))


def _offered() -> Iterator[tuple[str, str, Method | str]]:
    """Name, package and method; in the place of a method that can't be used, why."""
    for method in METHODS.values():
        yield method.name, FROM, method
    for offer in published():
        try:
            yield offer.name, offer.package, of_package(offer)
        except OptionError as error:
            yield offer.name, offer.package, str(error)


def _entry(name: str, package: str, method: Method | str) -> dict[str, object]:
    entry: dict[str, object] = {"name": name, "package": package}
    if isinstance(method, str):
        return entry | {"error": method}
    reference = {"reference": method.reference} if method.reference else {}
    options = list(method.options)
    return entry | reference | {"title": method.title, "source": method.source, "options": options}
