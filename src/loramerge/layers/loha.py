"""LoHa: ΔW = alpha/r · (w1_a w1_b) ∘ (w2_a w2_b), a Hadamard product of two low-rank matrices.

It is exactly a LoRA of rank r₁·r₂: column (i, j) of ``up`` is w1_a[:, i] ∘ w2_a[:, j], and
likewise for the rows of ``down`` (the face-splitting product).

Source: Hyeon-Woo et al., 2021, https://arxiv.org/abs/2108.06098; LyCORIS, modules/loha.py.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from .. import linalg
from ..errors import LayerError
from ..tensors import Array, Shape, Spec, float32, float64, largest_rank, times
from .base import LARGEST_WEIGHT, Convert, Layer, check_size, dense_norm, matrix, scaled


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoHa(Layer):
    """``w_a`` (out, r) and ``w_b`` (r, in·kh·kw) twice; with Tucker cores ``t`` (r, r, kh, kw) ``w_a`` is (r, out)."""

    kind_name: ClassVar[str] = "loha"
    required: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    optional: ClassVar[tuple[str, ...]] = ("hada_t1", "hada_t2")
    ranked_by: ClassVar[tuple[str, ...]] = ("hada_w1_b",)

    hada_w1_a: Array | Spec
    hada_w1_b: Array | Spec
    hada_w2_a: Array | Spec
    hada_w2_b: Array | Spec
    hada_t1: Array | Spec | None = None
    hada_t2: Array | Spec | None = None
    alpha: float | None = None
    weight: Shape | None = None
    """Shape of the weight, if the architecture knows it: a convolution's kernel is flattened in the file."""

    def __post_init__(self) -> None:
        for i in (1, 2):
            a, b = (tuple(getattr(self, f"hada_w{i}_{end}").shape) for end in "ab")
            if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
                raise LayerError(f"hada_w{i}_a has shape {a} and hada_w{i}_b {b}; wanted two non-empty matrices")
        if (self.hada_t1 is None) != (self.hada_t2 is None):
            raise LayerError("of hada_t1 and hada_t2 one is missing")
        sizes = [half.shape for half in (self._half(1), self._half(2))]
        if sizes[0] != sizes[1]:
            raise LayerError(f"the two halves of the product have shapes {sizes[0]} and {sizes[1]}")

    def _half(self, which: int) -> "_Half":
        if which == 1:
            return _Half(self.hada_w1_a, self.hada_w1_b, self.hada_t1, which)
        return _Half(self.hada_w2_a, self.hada_w2_b, self.hada_t2, which)

    @property
    def shape(self) -> Shape:
        return self.weight or self._half(1).shape

    @property
    def rank(self) -> int:
        return min(self._half(1).rank * self._half(2).rank, largest_rank(self.shape))

    @property
    def dim(self) -> int:
        return self._half(1).rank

    @property
    def scale(self) -> float:
        """The factor alpha / r, 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.dim

    @property
    def has_core(self) -> bool:
        return self.hada_t1 is not None

    def with_alpha(self) -> "LoHa":
        return self if self.alpha is not None else replace(self, alpha=float(self.dim))

    def _shaped(self, weight: Shape) -> "LoHa":
        return replace(self, weight=weight)

    def times(self, weight: float) -> "LoHa":
        if weight == 1:
            return self
        return replace(self, alpha=self.scale * self.dim * weight, diff_b=scaled(self.diff_b, weight))

    def factors(self, to: Convert = float32) -> tuple[Array, Array]:
        check_size(self, self.rank * (self.shape[0] + math.prod(self.shape[1:])))
        (up1, down1), (up2, down2) = self._halves(to)
        if up1.shape[1] * up2.shape[1] > self.rank:  # as wide as ΔW
            return linalg.trivial(times((up1 @ down1) * (up2 @ down2), self.scale))
        up = (up1[:, :, None] * up2[:, None, :]).reshape((up1.shape[0], -1))
        down = (down1[:, None, :] * down2[None, :, :]).reshape((-1, down1.shape[1]))
        return times(up, self.scale), down

    def delta(self) -> Array:
        check_size(self, math.prod(self.shape))
        (up1, down1), (up2, down2) = self._halves()
        product = up1 @ down1
        product *= up2 @ down2
        return times(product, self.scale).reshape(self.shape)

    def norm(self) -> float:
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        if self.rank**2 <= min(rows, columns):
            return super().norm()
        check_size(self, rows * columns, LARGEST_WEIGHT)
        (up1, down1), (up2, down2) = self._halves(float64)
        step = max(1, 2**20 // columns)
        parts = [slice(start, start + step) for start in range(0, rows, step)]
        norms = [dense_norm((up1[part] @ down1) * (up2[part] @ down2)) for part in parts]
        return abs(self.scale) * math.hypot(*norms)

    def _halves(self, to: Convert = float32) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return the factors of both matrices."""
        halves = self._half(1), self._half(2)
        check_size(self, max(half.rank for half in halves) * math.prod(self.shape[1:]) if self.has_core else 0)
        return halves[0].factors(to), halves[1].factors(to)


class _Half:
    """One of the two low-rank matrices."""

    def __init__(self, a: Array, b: Array, core: Array | None, which: int) -> None:
        self.a, self.b, self.core = a, b, core
        rank = a.shape[0] if core is not None else a.shape[1]
        expected = b.shape[0] if core is None else core.shape[0]
        if rank != expected or (core is not None and tuple(core.shape[:2]) != (b.shape[0],) * 2):
            raise LayerError(
                f"hada_w{which}_a of shape {tuple(a.shape)} and hada_w{which}_b of shape {tuple(b.shape)} "
                "disagree on the rank"
            )

    @property
    def rank(self) -> int:
        return int(self.b.shape[0])

    @property
    def shape(self) -> Shape:
        if self.core is None:
            return (self.a.shape[0], self.b.shape[1])
        return (self.a.shape[1], self.b.shape[1], *self.core.shape[2:])

    def factors(self, to: Convert) -> tuple[Array, Array]:
        a, b = matrix(self.a, to), matrix(self.b, to)
        return (a, b) if self.core is None else (a.T, linalg.tucker(to(self.core), b))
