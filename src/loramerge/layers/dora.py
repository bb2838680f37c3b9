"""DoRA: W' = m · (W + ΔW) / ‖W + ΔW‖, a direction and a magnitude.

Source: Liu et al., 2024, https://arxiv.org/abs/2402.09353.  The norm runs over the rows or
over the columns of the weight, and tools disagree which; the magnitude's shape says it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ..errors import LayerError, NoFactorsError
from ..tensors import Array, Ranges, Shape, Spec, take_rows
from .base import Layer
from .full import LEAVE_OUT


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DoRA(Layer):
    """A low-rank direction of any kind, and the norms that the patched weight is given."""

    kind: ClassVar[str] = "dora"
    required: ClassVar[tuple[str, ...]] = ()

    direction: Layer
    magnitude: Array | Spec
    """(out, 1[, 1, 1]) or (out,): one norm an output row. (1, in[, 1, 1]): one an input column."""

    def __post_init__(self) -> None:
        out, *rest = self.direction.shape
        sizes = tuple(self.magnitude.shape)
        count = math.prod(sizes)
        if not rest or count != max(sizes, default=0) or count not in (out, rest[0]):
            raise LayerError(f"the DoRA magnitude has shape {sizes}; the weight has shape {self.direction.shape}")

    @property
    def axis(self) -> Literal["out", "in"]:
        """Which index the magnitude has, decided by its shape: a square layer is told by which axis is 1."""
        sizes = tuple(self.magnitude.shape)
        out = self.direction.shape[0]
        if len(sizes) == 1 or (sizes[0] == out and sizes[1] == 1):
            return "out"
        return "in"

    @property
    def shape(self) -> Shape:
        return self.direction.shape

    @property
    def rank(self) -> int | None:
        return self.direction.rank

    @property
    def no_factors(self) -> str:
        return (
            "it is a DoRA layer, whose ΔW depends on the base weight. Ways out: merge it into the base model, "
            f"or {LEAVE_OUT}"
        )

    def tensors(self) -> dict[str, Array | Spec]:
        return {**self.direction.tensors(), "magnitude": self.magnitude}

    def map(self, function: Callable[[Any], Any]) -> "DoRA":
        return replace(self, direction=self.direction.map(function), magnitude=function(self.magnitude))

    def delta(self) -> Array:
        raise NoFactorsError(self.no_factors)

    def norm(self) -> float:
        raise NoFactorsError(self.no_factors)

    def rows(self, ranges: Ranges, source: object) -> Layer:
        if self.axis == "in":
            return super().rows(ranges, source)
        return replace(self, direction=self.direction.rows(ranges, source), magnitude=take_rows(self.magnitude, ranges))


def direction_of(layer: Layer) -> Layer:
    """The layer that holds the factors: a DoRA's direction, any other layer itself."""
    return layer.direction if isinstance(layer, DoRA) else layer
