"""DoRA: W' = m · (W + ΔW) / ‖W + ΔW‖, a direction and a magnitude.

Source: Liu et al., 2024, https://arxiv.org/abs/2402.09353.  The norm runs over the rows or
over the columns of the weight, and tools disagree which; the magnitude's shape says it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ..errors import LayerError
from ..tensors import Array, Ranges, Shape, Spec, float32, namespace, row_blocks, take_rows
from .base import Layer
from .full import LEAVE_OUT


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DoRA(Layer):
    """A low-rank direction of any kind, and the norms that the patched weight is given."""

    kind_name: ClassVar[str] = "dora"

    direction: Layer
    magnitude: Array | Spec
    """(out, 1[, 1, 1]) or (out,): one norm per output row. (1, in[, 1, 1]): one per input column."""

    def __post_init__(self) -> None:
        out, *rest = self.direction.shape
        sizes = tuple(self.magnitude.shape)
        count = math.prod(sizes)
        wanted = [out] * (sizes[:1] == (count,)) + rest[:1] * (len(sizes) > 1)
        flattened = len(sizes) > 2 and len(rest) == 1 and count > 0 and rest[0] % count == 0  # its kernel is told later
        if not rest or count != max(sizes, default=0) or (count not in wanted and not flattened):
            raise LayerError(f"the DoRA magnitude has shape {sizes}; the weight has shape {self.direction.shape}")

    @property
    def axis(self) -> Literal["out", "in"]:
        """The index that the magnitude has, read from its shape: of a square layer, from the axis that is 1."""
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
    def dim(self) -> int | None:
        return self.direction.dim

    @property
    def own_rank(self) -> int | None:
        return self.direction.own_rank

    @property
    def own_alpha(self) -> float | None:
        return self.direction.own_alpha

    @property
    def inner(self) -> Layer:
        return self.direction

    def with_inner(self, function: Callable[[Layer], Layer]) -> "DoRA":
        return replace(self, direction=function(self.direction))

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def computable(self) -> bool:
        return self.direction.computable

    @property
    def has_core(self) -> bool:
        return self.direction.has_core

    @property
    def no_factors(self) -> str:
        return (
            "it is a DoRA layer, whose ΔW depends on the base weight. Ways out: bake it into the base model, "
            f"or {LEAVE_OUT}"
        )

    def tensors(self) -> dict[str, Array | Spec]:
        return {**self.direction.tensors(), "magnitude": self.magnitude}

    def map(self, function: Callable[[Any], Any]) -> "DoRA":
        return replace(self, direction=self.direction.map(function), magnitude=function(self.magnitude))

    def delta_bias(self) -> Array | Spec | None:
        return self.direction.delta_bias()

    def delta_on(self, weight: Array) -> Array:
        """Return W' − W, with W' = m · (W + ΔV) / ‖W + ΔV‖ and ΔV the direction's update.

        The norm is that of the patched weight, over everything but the magnitude's own index,
        as in the paper, PEFT and LyCORIS.  (ComfyUI takes the base weight's norm where the
        magnitude has one value per output row.)  All is in float64: W' and W nearly cancel.
        """
        xp = namespace(weight)
        own = 0 if self.axis == "out" else 1
        others = tuple(axis for axis in range(weight.ndim) if axis != own)
        if math.prod(self.magnitude.shape) != weight.shape[own]:
            raise LayerError(
                f"the DoRA magnitude has shape {tuple(self.magnitude.shape)}, and the weight {tuple(weight.shape)}: the kernel's "
                "shape isn't known"
            )
        magnitude = float32(self.magnitude).reshape([size if i == own else 1 for i, size in enumerate(weight.shape)])
        update, found = self.direction.delta_on(weight), xp.empty_like(weight)
        for rows in row_blocks(weight) if own == 0 else [slice(None)]:
            patched = xp.astype(weight[rows], xp.float64)
            patched += update[rows]
            squares = xp.sum(patched**2, axis=others, keepdims=True)
            if not bool((squares > 0).all()):
                raise LayerError("W + ΔW has a row or column of zeros, which has no direction to give a length to")
            patched *= magnitude[rows] / xp.sqrt(squares)
            patched -= weight[rows]
            found[rows] = patched
        return found

    def _shaped(self, weight: Shape) -> "DoRA":
        fits = self.axis == "out" or math.prod(self.magnitude.shape) == weight[1]
        return replace(self, direction=self.direction.shaped(weight)) if fits else self

    @property
    def by_rows(self) -> bool:
        return self.axis == "out" and self.direction.by_rows

    def rows(self, ranges: Ranges, source: object) -> Layer:
        if self.axis == "in":
            return super().rows(ranges, source)
        return replace(self, direction=self.direction.rows(ranges, source), magnitude=take_rows(self.magnitude, ranges))
