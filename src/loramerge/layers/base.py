"""The interface of layers: all that other packages ask of one, whatever its parametrisation of ΔW.

A new kind is one file next to this one and a line in `building.KINDS`.  By default a kind has no rank and no factors;
where it overrides `rank` and `factors`, its ΔW, norm and spectrum follow from them.
"""

import math
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from ..devices import to_torch
from ..errors import LayerError, NoFactorsError, an
from ..tensors import (
    Array,
    Ranges,
    Shape,
    Spec,
    code,
    flatten,
    float32,
    is_torch,
    namespace,
    put_rows,
    same_weight,
    take_rows,
    times,
    widest,
)

if TYPE_CHECKING:
    from ..linalg import Spectrum

Convert = Callable[[Array], Array]
"""`float32` or `float64`."""

DeltaRows = Callable[[slice], Array]
"""Returns some rows of a ΔW, in float32."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Layer:
    """The update ΔW of one module, in the tensors that a file holds.

    The tensors are arrays, or `Spec` stand-ins when only shapes are known (a *layout*): the
    shape, the rank and the kind can be asked of both, values only of arrays.
    """

    kind_name: ClassVar[str]
    """The parametrisation's name in the literature."""
    required: ClassVar[tuple[str, ...]] = ()
    """Roles of the tensors that such a layer must have."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Roles of tensors that it may have."""
    ranked_by: ClassVar[tuple[str, ...]] = ()
    """Roles of the factors whose first axis is the rank that alpha is divided by, in order of precedence."""

    diff_b: Array | Spec | None = None
    """Difference of the module's bias, shape ``(out,)``; not scaled by alpha."""

    def __repr__(self) -> str:
        facts = {"shape": self.shape, "rank": self.rank, "alpha": getattr(self, "alpha", None)}
        listed = ", ".join(f"{name}={value}" for name, value in facts.items() if value is not None)
        return f"{type(self).__name__}({listed})"

    @property
    def kind(self) -> str:
        """The parametrisation's name in the literature, such as ``"lora"`` or ``"dora"``."""
        return self.kind_name

    @property
    def shape(self) -> Shape:
        """Shape of the weight that the layer updates: ``(out, in)`` or ``(out, in, kh, kw)``."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """Rank that the form of the layer allows; None if it has no low-rank form."""
        return None

    @property
    def dim(self) -> int | None:
        """The rank as trainers count it, or None.  Written as a LoRA, a LoHa or a LoKr has a larger one: `rank`."""
        return self.rank

    @property
    def own_rank(self) -> int | None:
        """The rank that alpha is divided by: of LoHa's and LoKr's own factors, not of their product."""
        tensors = self.tensors()
        return next((int(tensors[role].shape[0]) for role in self.ranked_by if role in tensors), None)

    @property
    def own_alpha(self) -> float | None:
        """The effective alpha; None if the layer has none, or its kind knows none."""
        alpha: float | None = getattr(self, "alpha", None)
        return alpha

    @property
    def dtype(self) -> str:
        """The widest dtype among the tensors, as a safetensors code."""
        return widest([code(t) for t in self.tensors().values()])

    @property
    def inner(self) -> "Layer":
        """The layer that holds the factors: a DoRA's direction, any other layer itself."""
        return self

    def with_inner(self, function: "Callable[[Layer], Layer]") -> "Layer":
        """Apply a function to `inner` and keep what is around it."""
        return function(self)

    @property
    def axis(self) -> Literal["out", "in"] | None:
        """ "out" if the layer's magnitude has one value per row of the weight, "in" if one per column; None without one."""
        return None

    @property
    def factored(self) -> bool:
        """True if the layer's own tensors give ΔW exactly as a product of two factors."""
        return self.rank is not None and not self.needs_base

    @property
    def dense(self) -> bool:
        """True if the layer holds ΔW whole, as a difference of the weight."""
        return False

    @property
    def bias_only(self) -> bool:
        """True if the layer changes the module's bias and not its weight."""
        return False

    def fits(self, shape: Shape) -> bool:
        """Return whether the layer is for a weight of this shape, whose kernel is maybe flattened in one of them."""
        return self.shape[:1] == shape[:1] and (self.bias_only or same_weight(self.shape, shape))

    @property
    def replaces(self) -> bool:
        """True if the layer puts a new value in the weight's place, at any weight but 0: it is copied, never summed."""
        return False

    @property
    def rankless(self) -> bool:
        """True if there is no rank to speak of (a bias, a norm, a table): it is summed entry by entry, never cut."""
        return False

    @property
    def needs_base(self) -> bool:
        """True if ΔW depends on the module's weight in the base model, and can be computed from it."""
        return False

    @property
    def computable(self) -> bool:
        """True if ΔW can be computed, maybe from the weight in the base model."""
        return True

    @property
    def has_core(self) -> bool:
        """True if the layer holds a Tucker core."""
        return False

    @property
    def down_key(self) -> Hashable:
        """An identity of ``down``: layers with an equal one have the same ``down``. None if it isn't known."""
        return None

    def tensors(self) -> dict[str, Array | Spec]:
        """Return the layer's tensors by role."""
        roles = (*self.required, *self.optional, "diff_b")
        return {role: t for role in roles if (t := getattr(self, role)) is not None}

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Apply a function to every tensor."""
        return replace(self, **{role: function(t) for role, t in self.tensors().items()})

    def factors(self, to: Convert = float32) -> tuple[Array, Array]:
        """Return the update as a product, with every scale folded in.

        Args:
            to: Converts the layer's tensors, to float32 or, where its faintest directions count, to float64.

        Returns:
            ``up`` of shape ``(out, r)`` and ``down`` of shape ``(r, in·kh·kw)``, with ΔW = up @ down.

        Raises:
            NoFactorsError: The layer has no exact low-rank form.
        """
        raise NoFactorsError(self.no_factors)

    def stored_factors(self) -> tuple[Array, Array, float]:
        """Return matrices ``up`` and ``down`` and a scale, ΔW = scale · up @ down, unrounded if the file holds them."""
        return *self.factors(), 1.0

    def nearest(self, rank: int) -> tuple[Array, Array, Array] | None:
        """Return the best factors of a rank if the kind knows a way to them without ΔW's own factors, else None.

        Returns:
            ``up`` of shape ``(out, k)`` and ``down`` of shape ``(k, in·kh·kw)``, k at most the rank, and all
            singular values of ΔW, falling.
        """
        return None

    @property
    def no_factors(self) -> str:
        """The reason why there are no factors, and the ways out."""
        return f"{an(self.kind)} layer has no low-rank form"

    def delta(self) -> Array:
        """Return ΔW as a dense float32 array of the weight's shape."""
        up, down = self.factors()
        check_size(self, math.prod(self.shape), LARGEST_WEIGHT)
        return (up @ down).reshape(self.shape)

    def delta_on(self, weight: Array) -> Array:
        """Return ΔW for a given weight: what the layer adds to it at full strength.

        Args:
            weight: The module's weight in the base model, float32, of the layer's `shape`.

        Returns:
            A dense float32 array of the weight's shape.

        Raises:
            NoFactorsError: ΔW can't be computed.
        """
        return self.delta()

    def delta_rows(self, weight: Callable[[], Array]) -> DeltaRows:
        """Return a function that computes some rows of `delta_on`; unless the kind knows a way, all are computed first.

        Args:
            weight: Returns the weight, see `delta_on`; it is called only if ΔW depends on it.
        """
        whole = self.delta_on(weight()) if self.needs_base or self.replaces else self.delta()
        return lambda rows: whole[rows]

    def times(self, weight: float) -> "Layer | None":
        """Return the layer with its update times a number; None if its kind has no form for that."""
        return self if weight == 1 else None

    def with_alpha(self) -> "Layer":
        """Return the same ΔW with an alpha that is written out; the layer itself if it has one, or its kind none."""
        return self

    def without_core(self) -> "Layer":
        """Return the same ΔW without a Tucker core; the layer itself if it has none, or no other form."""
        return self

    def padded(self, rank: int) -> "Layer":
        """Return the same ΔW at a larger rank, filled up with zeros; the layer itself if its kind can't be."""
        return self

    def remade(self, update: Array | Spec, bias: Array | Spec | None) -> "Layer | None":
        """Return a layer of this kind with another update and bias; None for a kind without such a form."""
        return None

    def shaped(self, weight: Shape) -> "Layer":
        """Return the layer in the form of its weight: a convolution that is stored as a matrix, or the reverse.

        A layer of another shape, or of a kind that has only one form, stays what it is.
        """
        fits = self.shape and self.shape != weight and same_weight(self.shape, weight)
        return self._shaped(weight) if fits else self

    def _shaped(self, weight: Shape) -> "Layer":
        return self

    def widened(self, weight: Shape) -> "Layer":
        """Return the layer for a weight with more inputs, on which the further ones have no effect.

        A layer for another weight, or of a kind that has no such form, stays what it is.
        """
        own = self.shape
        fits = len(own) == len(weight) > 1 and own[1] < weight[1] and (own[0], own[2:]) == (weight[0], weight[2:])
        return self._widened(weight) if fits else self

    def _widened(self, weight: Shape) -> "Layer":
        return self

    @property
    def by_rows(self) -> bool:
        """True if a row of ΔW depends on the same row of the weight only."""
        return True

    def delta_bias(self) -> Array | Spec | None:
        """Return the update of the module's bias, shape ``(out,)``, every scale folded in; None if there is none."""
        return self.diff_b

    def norm(self) -> float:
        """Return the Frobenius norm of ΔW."""
        from ..linalg import norm

        return norm(*self.factors())

    def spectrum(self, grams: Callable[[], tuple[Array, Array]]) -> "Spectrum":
        """Return ΔW's SVD, in coordinates of `factors`.

        Args:
            grams: Returns the Gram matrices of the factors, see `linalg.grams`; a layer that knows a
                shorter way doesn't call it.
        """
        from ..linalg import spectrum

        return spectrum(*grams())

    def rows(self, ranges: Ranges, source: object) -> "Layer":
        """Return the update of some rows of the weight: a part of a fused projection.

        Args:
            ranges: Row ranges ``(start, stop)`` of the weight, in the order wanted.
            source: Identifies the fused layer that the rows are taken from; its parts share it.
        """
        whole = self.delta_bias()
        bias = None if whole is None else take_rows(whole, ranges)
        return Rows(whole=self, ranges=ranges, source=source, diff_b=bias)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Rows(Layer):
    """Some rows of another layer's update, for kinds whose tensors can't be cut into rows."""

    whole: Layer
    ranges: Ranges
    """Row ranges of the whole layer's weight, in the order of this layer's rows."""
    source: object
    """Identifies the whole layer: its parts share it."""

    @property
    def kind(self) -> str:
        return self.whole.kind

    @property
    def shape(self) -> Shape:
        return (sum(stop - start for start, stop in self.ranges), *self.whole.shape[1:])

    @property
    def rank(self) -> int | None:
        return self.whole.rank

    @property
    def dim(self) -> int | None:
        return self.whole.dim

    @property
    def own_rank(self) -> int | None:
        return self.whole.own_rank

    @property
    def own_alpha(self) -> float | None:
        return self.whole.own_alpha

    @property
    def axis(self) -> Literal["out", "in"] | None:
        return self.whole.axis

    @property
    def replaces(self) -> bool:
        return self.whole.replaces

    @property
    def rankless(self) -> bool:
        return self.whole.rankless

    @property
    def needs_base(self) -> bool:
        return self.whole.needs_base

    @property
    def computable(self) -> bool:
        return self.whole.computable

    @property
    def has_core(self) -> bool:
        return self.whole.has_core

    @property
    def down_key(self) -> Hashable:
        return None if self.source is None else ("whole", self.source)

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    def tensors(self) -> dict[str, Array | Spec]:
        return self.whole.tensors()

    def map(self, function: Callable[[Any], Any]) -> "Rows":
        bias = None if self.diff_b is None else function(self.diff_b)
        return replace(self, whole=self.whole.map(function), diff_b=bias)

    def factors(self, to: Convert = float32) -> tuple[Array, Array]:
        up, down = self.whole.factors(to)
        return take_rows(up, self.ranges), down

    @property
    def no_factors(self) -> str:
        return self.whole.no_factors

    def delta(self) -> Array:
        return take_rows(self.whole.delta(), self.ranges)

    def delta_on(self, weight: Array) -> Array:
        if not self.by_rows:
            raise NoFactorsError("its norms run over a whole fused weight, of which only some rows are given")
        rows = namespace(weight).zeros(self.whole.shape, dtype=weight.dtype, device=weight.device)
        return take_rows(self.whole.delta_on(put_rows(rows, self.ranges, weight)), self.ranges)

    @property
    def by_rows(self) -> bool:
        return self.whole.by_rows

    def times(self, weight: float) -> "Rows | None":
        whole = self.whole.times(weight)
        if whole is None or weight == 1:
            return None if whole is None else self
        return replace(self, whole=whole, source=(self.source, weight), diff_b=scaled(self.diff_b, weight))

    def norm(self) -> float:
        return dense_norm(self.delta()) if self.rank is None else super().norm()


L = TypeVar("L", bound=Layer)


def in_one_library(layers: Sequence[L], device: str | None = None) -> list[L]:
    """Return the layers with all arrays numpy's or all torch's: torch's if one is, or if a device is named."""
    if "torch" not in sys.modules and device is None:
        return list(layers)
    tensors = [tensor for layer in layers for tensor in layer.tensors().values()]
    torches = [is_torch(tensor) for tensor in tensors if not isinstance(tensor, Spec)]
    if device is None and (all(torches) or not any(torches)):
        return list(layers)

    def moved(tensor: Array | Spec) -> Array | Spec:
        if isinstance(tensor, Spec):
            return tensor
        found = to_torch(tensor)
        return found if device is None else found.to(device)

    return [layer.map(moved) for layer in layers]


def scaled(tensor: Array | Spec | None, weight: float) -> Array | Spec | None:
    """Multiply a tensor by a number, in float32; None stays None."""
    if tensor is None or isinstance(tensor, Spec):
        return tensor and Spec(tensor.shape, "F32")
    return times(float32(tensor), weight)


LARGEST_WEIGHT = 2**29
"""Numbers of a ΔW that may be written out from its factors: no model has a larger weight."""

IMPLIED = 2**23
"""The same for a kind of a few numbers that imply many, if no architecture knows the weight."""


def check_size(layer: Layer, numbers: int, most: int = IMPLIED) -> None:
    """Refuse to write out what a file implies and does not hold, before memory is taken for it.

    Raises:
        LayerError: It has more numbers than ``most``, and no architecture knows such a weight.
    """
    if numbers > most and getattr(layer, "weight", None) is None:
        raise LayerError(
            f"{an(layer.kind)} layer of the shape {layer.shape} would be written out to {numbers:.3g} numbers, wanted "
            f"{most:.3g} at most. Ways out: name the model family (architecture), or leave the module out (exclude)"
        )


def dense_norm(array: Array) -> float:
    """Return the Frobenius norm of an array, summed in float64, some rows at a time."""
    xp, rows = namespace(array), array.reshape((array.shape[0], -1)) if array.ndim else array.reshape((1, 1))
    step = max(1, 2**20 // max(1, rows.shape[1]))
    blocks = (xp.astype(rows[start : start + step], xp.float64) for start in range(0, rows.shape[0], step))
    return math.sqrt(sum(float((block * block).sum()) for block in blocks))


def matrix(tensor: Array, to: Convert = float32) -> Array:
    """Return a tensor as a matrix ``(rows, columns)``, float32 or float64."""
    return flatten(to(tensor))


def identity(size: int, like: Array) -> Array:
    """Return the identity matrix, in the dtype and on the device of another array."""
    return namespace(like).eye(size, dtype=like.dtype, device=like.device)
