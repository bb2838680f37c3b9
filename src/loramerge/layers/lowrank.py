"""LoRA and LoCon: ΔW = alpha/r · up @ down, for linear and convolution weights.

Sources: Hu et al., 2021, https://arxiv.org/abs/2106.09685; the Tucker form with ``mid`` is
LyCORIS's, https://arxiv.org/abs/2309.14859, section 3.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import LayerError
from ..tensors import Array, Ranges, Shape, Spec, code, flatten, float32, reshape, take_rows, times, widened
from .base import Convert, DeltaRows, Layer, check_size, matrix, scaled


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LowRank(Layer):
    """``down`` (r, in[, kh, kw]) and ``up`` (out, r[, 1, 1]), with an optional Tucker core ``mid``."""

    kind_name: ClassVar[str] = "lora"
    required: ClassVar[tuple[str, ...]] = ("down", "up")
    optional: ClassVar[tuple[str, ...]] = ("mid", "up_bias")
    ranked_by: ClassVar[tuple[str, ...]] = ("down",)

    down: Array | Spec
    up: Array | Spec
    mid: Array | Spec | None = None
    """Shape ``(r, r, kh, kw)``; ``down`` is then ``(r, in, 1, 1)``."""
    up_bias: Array | Spec | None = None
    """Bias of ``up``, shape ``(out,)``: an update of the module's bias, scaled like ΔW."""
    alpha: float | None = None
    """The scale is alpha / r; without alpha it is 1."""
    down_id: Hashable = None
    """Identity of ``down``: layers with the same have the same ``down``, bit for bit (parts of a fused projection)."""

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) < 2 or len(up) < 2 or set(up[2:]) - {1}:
            raise LayerError(f"down has shape {down} and up {up}; wanted (r, in[, kh, kw]) and (out, r[, 1, 1])")
        if 0 in down or 0 in up:
            raise LayerError(f"rank or size 0: down has shape {down}, up has shape {up}")
        if self.mid is not None and (
            tuple(self.mid.shape[:2]) != (up[1],) * 2 or down[0] != up[1] or set(down[2:]) - {1}
        ):
            raise LayerError(f"mid of shape {tuple(self.mid.shape)} doesn't fit up {up} and down {down}")
        if self.mid is None and down[0] != up[1]:
            why = f". They would fit the other way round, at rank {up[0]}" if down[1] == up[0] else ""
            if set(down[2:]) - {1} and down[0] % up[1] == 0:
                why = f". A convolution in {down[0] // up[1]} groups has such factors, and none are read"
            raise LayerError(f"up and down disagree on the rank: up has shape {up}, down has shape {down}{why}")
        if self.up_bias is not None and tuple(self.up_bias.shape) != up[:1]:
            raise LayerError(f"bias of up has shape {tuple(self.up_bias.shape)}, wanted {up[:1]}")

    @property
    def shape(self) -> Shape:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """The factor alpha / r, 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def has_core(self) -> bool:
        return self.mid is not None

    @property
    def down_key(self) -> Hashable:
        return self.down_id

    def factors(self, to: Convert = float32) -> tuple[Array, Array]:
        plain = self.without_core(to)
        return times(matrix(plain.up, to), self.scale), matrix(plain.down, to)

    def as_product(self) -> "LowRank":
        """Return the layer as ``up @ down`` alone: without alpha, a Tucker core or a bias in ``up``."""
        if self.scale == 1.0 and self.mid is None and self.up_bias is None:
            return self
        up, down = self.factors()
        return low_rank(up, down, self.shape, self.down_id if self.mid is None else None, self.delta_bias())

    def stored_factors(self) -> tuple[Array, Array, float]:
        plain = self.without_core()
        return flatten(plain.up), flatten(plain.down), plain.scale

    def delta_rows(self, weight: Callable[[], Array]) -> DeltaRows:
        up, down = self.factors()
        return lambda rows: up[rows] @ down

    def norm(self) -> float:
        if self.mid is None:
            return super().norm()
        from ..linalg import tucker_norm

        return abs(self.scale) * tucker_norm(matrix(self.up), float32(self.mid), matrix(self.down))

    def bias(self) -> Array | None:
        """Return the update of the module's bias that ``up`` carries, scale folded in; None without one."""
        return None if self.up_bias is None else times(float32(self.up_bias), self.scale)

    def delta_bias(self) -> Array | Spec | None:
        up_bias: Array | Spec | None = self.up_bias
        if up_bias is None:
            return self.diff_b
        if isinstance(up_bias, Spec):
            return Spec(up_bias.shape, "F32")
        return self.bias() if self.diff_b is None else self.bias() + float32(self.diff_b)

    def rows(self, ranges: Ranges, source: object) -> "LowRank":
        down_id = ("rows of", source) if isinstance(source, Hashable) and source is not None else None
        cut: dict[str, Any] = {
            role: take_rows(t, ranges) for role, t in self.tensors().items() if role in ("up", "up_bias", "diff_b")
        }
        return replace(self, **cut, down_id=down_id)

    def times(self, weight: float) -> "LowRank":
        if weight == 1:
            return self
        return replace(self, alpha=self.scale * self.rank * weight, diff_b=scaled(self.diff_b, weight))

    def with_alpha(self) -> "LowRank":
        return self if self.alpha is not None else replace(self, alpha=float(self.rank))

    def without_core(self, to: Convert = float32) -> "LowRank":
        if self.mid is None:
            return self
        from ..linalg import tucker

        mid: Array = self.mid
        down = Spec((self.rank, *self.shape[1:]), "F32")
        if not isinstance(mid, Spec):
            check_size(self, math.prod(down.shape))
            down = tucker(to(mid), matrix(self.down, to)).reshape(down.shape)
        return replace(self, down=down, mid=None)

    def padded(self, rank: int) -> "LowRank":
        if rank <= self.rank or self.mid is not None:
            return self
        from ..linalg import padded

        up, down = self.up, self.down
        if isinstance(up, Spec) or isinstance(down, Spec):
            up, down = Spec((up.shape[0], rank, *up.shape[2:]), code(up)), Spec((rank, *down.shape[1:]), code(down))
        else:
            up, down = padded(up, down, rank)
        padded_id = None if self.down_id is None else ("padded", self.down_id, rank)
        return replace(
            self, up=up, down=down, alpha=None if self.scale == 1.0 else self.scale * rank, down_id=padded_id
        )

    def _shaped(self, weight: Shape) -> "LowRank":
        if self.mid is not None:
            return self
        up = reshape(self.up, (weight[0], self.rank, *(1,) * (len(weight) - 2)))
        return replace(self, up=up, down=reshape(self.down, (self.rank, *weight[1:])))

    def _widened(self, weight: Shape) -> "LowRank":
        return self if self.mid is not None else replace(self, down=widened(self.down, weight[1]), down_id=None)


def low_rank(
    up: Array, down: Array, shape: Shape, down_id: Hashable = None, diff_b: Array | Spec | None = None
) -> LowRank:
    """Make a layer from matrices, shaped for a weight.

    Args:
        up: Shape ``(out, r)``.
        down: Shape ``(r, in·kh·kw)``.
        shape: Shape of the weight.
        down_id: See `LowRank.down_id`.
        diff_b: Difference of the bias.
    """
    rank = up.shape[1]
    up = reshape(up, (shape[0], rank, *(1,) * (len(shape) - 2)))
    return LowRank(up=up, down=reshape(down, (rank, *shape[1:])), down_id=down_id, diff_b=diff_b)
