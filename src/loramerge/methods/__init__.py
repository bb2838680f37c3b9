"""Merge methods: the index."""

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

__all__ = ["METHODS", "Method", "method"]
