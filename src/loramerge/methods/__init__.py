"""Merge methods: the index."""

from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from ..registry import Registry
from .base import Method, method
from .combinations import karcher, model_stock, slerp
from .knots import knots
from .linear import factor_average, linear
from .sparse import breadcrumbs, dare, della, magnitude_prune, sce, ties
from .subspaces import cart, iso_c, iso_cts, np_lora, subtract, tsv

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
        knots,
        tsv,
        iso_c,
        iso_cts,
        cart,
        slerp,
        karcher,
        model_stock,
        np_lora,
        subtract,
        factor_average,
    ],
    aliases={
        "cat": "linear",
        "concat": "linear",
        "weighted": "linear",
        "average": "linear",
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
"""Where arguments belong that are no option of any method."""


def check_options(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the method, as `Method.check` gives them.

    Raises:
        OptionError: An option is unknown, which may belong elsewhere, or its value is outside of its range.
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


__all__ = ["METHODS", "Method", "check_options", "method"]
