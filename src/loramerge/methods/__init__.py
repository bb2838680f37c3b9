"""Merge methods: the index."""

from ..registry import Registry
from .base import Method, method
from .linear import factor_average, linear

METHODS: Registry[Method] = Registry(
    "merge method",
    [linear, factor_average],
    aliases={"cat": "linear", "concat": "linear", "weighted": "linear", "average": "linear", "sum": "linear"},
)

__all__ = ["METHODS", "Method", "method"]
