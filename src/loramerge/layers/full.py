"""Updates that are not low-rank: whole differences, norms, replaced values, and algorithms that are only carried."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..errors import LayerError
from ..tensors import Array, Ranges, Shape, Spec, float32, namespace, reshape, take_rows, widened
from .base import Layer, dense_norm, scaled

LEAVE_OUT = "leave the module out (exclude)"
HOLDERS = "a dialect that holds it (kohya, comfyui)"


def check_sizes(role: str, tensor: Array | Spec | None) -> None:
    """Refuse a number and an empty tensor."""
    if tensor is None or not tensor.shape or 0 in tensor.shape:
        raise LayerError(f"{role} has shape {None if tensor is None else tuple(tensor.shape)}, wanted that of a weight")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Summed(Layer):
    """A layer whose tensors are differences, without a scale: it is summed entry by entry."""

    @property
    def rankless(self) -> bool:
        return True

    def times(self, weight: float) -> Layer:
        return self if weight == 1 else self.map(lambda tensor: scaled(tensor, weight))

    def norm(self) -> float:
        return dense_norm(self.delta())


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Full(_Summed):
    """ΔW itself, as ``diff`` of the weight's shape."""

    kind_name: ClassVar[str] = "full"
    required: ClassVar[tuple[str, ...]] = ("diff",)

    diff: Array | Spec

    def __post_init__(self) -> None:
        check_sizes("diff", self.diff)

    @property
    def shape(self) -> Shape:
        return tuple(self.diff.shape)

    @property
    def dense(self) -> bool:
        return True

    @property
    def rankless(self) -> bool:
        return len(self.shape) < 2 or self.shape[0] == 1

    def _shaped(self, weight: Shape) -> "Full":
        return replace(self, diff=reshape(self.diff, weight))

    @property
    def no_factors(self) -> str:
        cut = "" if self.rankless else "a merge with a number as the rank, such as --rank 32, "
        return (
            f"it holds a whole difference of the weight, which isn't a LoRA. Ways out: {cut}{HOLDERS}, or {LEAVE_OUT}"
        )

    def delta(self) -> Array:
        return float32(self.diff)

    def _widened(self, weight: Shape) -> "Full":
        return replace(self, diff=widened(self.diff, weight[1]))

    def rows(self, ranges: Ranges, source: object) -> "Full":
        return replace(self, **{role: take_rows(tensor, ranges) for role, tensor in self.tensors().items()})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BiasOnly(_Summed):
    """An update of a module's bias alone."""

    kind_name: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        check_sizes("diff_b", self.diff_b)

    @property
    def shape(self) -> Shape:
        assert self.diff_b is not None
        return tuple(self.diff_b.shape)

    @property
    def bias_only(self) -> bool:
        return True

    @property
    def no_factors(self) -> str:
        return f"it changes a bias only, which a LoRA can't hold. Ways out: {HOLDERS}, or {LEAVE_OUT}"

    def rows(self, ranges: Ranges, source: object) -> "BiasOnly":
        return BiasOnly(diff_b=take_rows(self.diff_b, ranges))

    def delta_on(self, weight: Array) -> Array:
        return namespace(weight).zeros_like(weight)

    def norm(self) -> float:
        return dense_norm(float32(self.diff_b))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Norm(_Summed):
    """Differences of a normalisation's weight and bias, as LyCORIS stores them."""

    kind_name: ClassVar[str] = "norm"
    required: ClassVar[tuple[str, ...]] = ("w_norm",)
    optional: ClassVar[tuple[str, ...]] = ("b_norm",)

    w_norm: Array | Spec
    b_norm: Array | Spec | None = None

    def __post_init__(self) -> None:
        check_sizes("w_norm", self.w_norm)
        if self.b_norm is not None and self.diff_b is not None:
            raise LayerError("b_norm and diff_b both give the difference of the bias")

    @property
    def shape(self) -> Shape:
        return tuple(self.w_norm.shape)

    def remade(self, update: Array | Spec, bias: Array | Spec | None) -> "Norm":
        return Norm(w_norm=update, b_norm=bias)

    def delta_bias(self) -> Array | Spec | None:
        return self.diff_b if self.b_norm is None else self.b_norm

    @property
    def no_factors(self) -> str:
        return f"it changes a normalisation, which a LoRA can't hold. Ways out: {HOLDERS}, or {LEAVE_OUT}"

    def delta(self) -> Array:
        return float32(self.w_norm)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Table(_Summed):
    """The difference of a modulation table, which is neither a weight nor a bias; LightX2V's ``diff_m``.

    Source: https://github.com/ModelTC/LightX2V, tools/extract/lora_extractor.py
    """

    kind_name: ClassVar[str] = "table"
    required: ClassVar[tuple[str, ...]] = ("diff_m",)

    diff_m: Array | Spec

    def __post_init__(self) -> None:
        check_sizes("diff_m", self.diff_m)

    @property
    def shape(self) -> Shape:
        return tuple(self.diff_m.shape)

    def remade(self, update: Array | Spec, bias: Array | Spec | None) -> "Table":
        return Table(diff_m=update, diff_b=bias)

    @property
    def no_factors(self) -> str:
        return f"it changes a table of modulation, which a LoRA can't hold. Ways out: {HOLDERS}, or {LEAVE_OUT}"

    def delta(self) -> Array:
        return float32(self.diff_m)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Replaced(Layer):
    """A new value that takes the place of the weight."""

    kind_name: ClassVar[str] = "set"
    required: ClassVar[tuple[str, ...]] = ("set_weight",)

    set_weight: Array | Spec

    def __post_init__(self) -> None:
        check_sizes("set_weight", self.set_weight)

    @property
    def shape(self) -> Shape:
        return tuple(self.set_weight.shape)

    @property
    def no_factors(self) -> str:
        return (
            "it replaces the weight instead of changing it, so it has no sum with others. "
            f"Ways out: the weight 0 for the LoRA or for the others that change the module, or {LEAVE_OUT}"
        )

    @property
    def replaces(self) -> bool:
        return True

    def times(self, weight: float) -> "Replaced":
        """Return the new value as it is, which ComfyUI and diffusers put in whatever the strength is, and the bias scaled."""
        return self if weight == 1 else replace(self, diff_b=scaled(self.diff_b, weight))

    def delta_on(self, weight: Array) -> Array:
        return float32(self.set_weight).reshape(weight.shape) - weight


TITLES = {
    "oft": "an OFT layer, which turns the weight",
    "glora": "a GLoRA layer, whose ΔW depends on the base weight",
    "ia3": "an IA³ layer, which scales the weight",
    "embedding lora": "a LoRA of an embedding",
    "reshaped weight": "a layer that widens the weight",
}
"""Algorithms in the words of messages."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Carried(Layer):
    """An algorithm that loramerge reads and writes back unharmed, but does not compute with."""

    algorithm: str
    """Its name in the literature: ``"oft"``, ``"glora"``, ``"ia3"``."""
    held: dict[str, Array | Spec] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def kind(self) -> str:
        return self.algorithm

    @property
    def computable(self) -> bool:
        return False

    @property
    def shape(self) -> Shape:
        return ()

    @property
    def no_factors(self) -> str:
        what = TITLES.get(self.algorithm, self.algorithm)
        return f"it is {what}; such layers are written back as they are, and neither merged nor baked. Way out: {LEAVE_OUT}"

    def tensors(self) -> dict[str, Array | Spec]:
        return dict(self.held)

    def map(self, function: Callable[[Any], Any]) -> "Carried":
        return replace(self, held={role: function(t) for role, t in self.held.items()})
