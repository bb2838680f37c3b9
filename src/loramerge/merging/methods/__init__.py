"""Merge methods: the index of loramerge's own, and the search for those of other packages."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import OptionError
from ...registry import Registry, plain, reference_of
from .base import Merged, Method, equal_rank, method, sum_of_ranks
from .combinations import karcher, model_stock, slerp
from .engines import combination, elementwise, on_core
from .knots import knots
from .linear import factor_average, linear
from .options import Density, Range, Seed
from .published import Published, method_at, published
from .selection import chance, module_seed
from .spaces import Core
from .sparse import breadcrumbs, dare, della, magmax, magnitude_prune, sce, ties
from .subspaces import cart, iso_c, iso_cts, np_lora, subtract, tsv, wudi

METHODS: Registry[Method] = Registry(
    "merge method",
    [
        linear,
        ties,
        dare,
        magnitude_prune,
        della,
        breadcrumbs,
        sce,
        magmax,
        knots,
        tsv,
        iso_c,
        iso_cts,
        cart,
        slerp,
        karcher,
        model_stock,
        np_lora,
        wudi,
        subtract,
        factor_average,
    ],
    aliases={
        "cat": "linear",
        "concat": "linear",
        "weighted": "linear",
        "sum": "linear",
        "tsv_m": "tsv",
        "np": "np_lora",
        "dare_linear": "dare",
    },
)

ELSEWHERE = {
    "dialect": "save(lora, path, dialect=…)",
    "to": "save(lora, path, dialect=…)",
    "dtype": "save(lora, path, dtype=…)",
    "architecture": "open(path, architecture=…)",
}
"""Arguments that aren't options of any method, with the function that takes each."""


def find(method: Method | str) -> Method:
    """Find the merge method that is meant.

    Args:
        method: A method; the name of one in the index, or of one that an installed package publishes (the entry
            point group ``loramerge.methods``); or ``package.module:name``.

    Returns:
        The method.  If it isn't in the index, its ``reference`` is the name that recipes use for it.

    Raises:
        OptionError: There is no such method, it can't be imported, or its name is taken by another in the index.
    """
    if isinstance(method, Method):
        return _own_or_apart(method, method.reference or reference_of(method, method.function.__module__))
    check_name(method)
    if ":" in method:
        return _own_or_apart(method_at(method), method)
    if method in METHODS:
        return METHODS[method]
    return of_package(_publisher(method))


def of_package(offer: Published) -> Method:
    """Import a method that a package publishes.

    Raises:
        OptionError: It can't be imported, or its name is taken by another.
    """
    try:
        found = _own_or_apart(method_at(offer.reference), offer.reference)
        if offer.name in METHODS or plain(found.name) != plain(offer.name):
            taken = "which means a method of loramerge" if offer.name in METHODS else f"but it is called {found.name!r}"
            raise OptionError(f"{offer.reference} is published as {offer.name!r}, {taken}. Way out: one name for both.")
    except OptionError as error:
        raise OptionError(f"The package {offer.package} publishes the method {offer.name!r}: {error}") from error
    return found


def check_name(method: str) -> None:
    """Refuse a name that doesn't belong to any method, without importing one.

    Raises:
        OptionError: The name is neither ``package.module:name``, nor in the index, nor published.
    """
    if not isinstance(method, str):
        raise OptionError(
            f"The merge method is a {type(method).__name__}, wanted a name, package.module:name or a Method."
        )
    if ":" not in method and method not in METHODS:
        _publisher(method)


def _publisher(name: str) -> Published:
    offered = published()
    having = [each for each in offered if plain(each.name) == plain(name)]
    if not having and plain(name) == "average":
        raise OptionError(
            "Unknown merge method 'average': it is linear with the same weight for all, which add up to 1. Way out: linear, and "
            "--weights uniform (weights='uniform')."
        )
    if not having:
        METHODS.find(name, METHODS, dict.fromkeys(each.name for each in offered))
    if len(having) > 1:
        ways = " or ".join(f"{each.reference} (of {each.package})" for each in having)
        raise OptionError(f"{len(having)} packages publish a method {name!r}. Way out: name one: {ways}.")
    return having[0]


def _own_or_apart(method: Method, reference: str | None) -> Method:
    """Return a method of the index unchanged, and any other with its reference; refuse a name that the index has."""
    if method.name not in METHODS:
        return replace(method, reference=reference)
    if METHODS[method.name] is not method:
        raise OptionError(
            f"The method {reference or method.function!r} has the name {method.name!r}, which means a method of loramerge. "
            "Way out: another name in its decorator."
        )
    return method


def check_options(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of the method, as `Method.check` does.

    Raises:
        OptionError: An option is unknown (the message says if it belongs elsewhere), or its value is out of range.
    """
    for name in options:
        if name in method.options:
            continue
        having = [m.name for m in METHODS.values() if name in m.options]
        if having:
            raise OptionError(
                f"The method {method.name} has no option {name!r}. Methods that have it: {', '.join(having)}."
            )
        if name in ELSEWHERE:
            raise OptionError(f"The method {method.name} has no option {name!r}: it goes to {ELSEWHERE[name]}.")
    return method.check(options)


__all__ = [
    "METHODS",
    "Core",
    "Density",
    "Merged",
    "Method",
    "Published",
    "Range",
    "Seed",
    "chance",
    "check_name",
    "check_options",
    "combination",
    "elementwise",
    "equal_rank",
    "find",
    "method",
    "module_seed",
    "of_package",
    "on_core",
    "published",
    "sum_of_ranks",
]
