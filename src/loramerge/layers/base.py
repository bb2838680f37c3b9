"""What every layer can be asked, whatever its parametrisation of ΔW."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from .. import linalg
from ..errors import NoFactorsError, an
from ..tensors import Array, Ranges, Shape, Spec, code, flatten, float32, namespace, put_rows, take_rows, widest


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Layer:
    """The update ΔW of one module, in the tensors that a file holds.

    The tensors are arrays, or `Spec` stand-ins when only shapes are known (a *layout*): the
    shape, the rank and the kind can be asked of both, values only of arrays.
    """

    kind: ClassVar[str]
    """The field's name for this parametrisation."""
    required: ClassVar[tuple[str, ...]]
    """Tensors that such a layer must have, by role."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Tensors that it may have."""

    diff_b: Array | Spec | None = None
    """Difference of the module's bias, shape ``(out,)``; not scaled by alpha."""

    def __repr__(self) -> str:
        facts = {"shape": self.shape, "rank": self.rank, "alpha": getattr(self, "alpha", None)}
        said = ", ".join(f"{name}={value}" for name, value in facts.items() if value is not None)
        return f"{type(self).__name__}({said})"

    @property
    def shape(self) -> Shape:
        """Shape of the weight that the layer updates: ``(out, in)`` or ``(out, in, kh, kw)``."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """Rank that the form of the layer allows; None where there is no low-rank form."""
        return None

    @property
    def dim(self) -> int | None:
        """What trainers call the rank: LoHas and LoKrs have a larger one as a LoRA; None where there is none."""
        return self.rank

    @property
    def dtype(self) -> str:
        """The widest dtype among the tensors, as a safetensors code."""
        return widest([code(t) for t in self.tensors().values()])

    def tensors(self) -> dict[str, Array | Spec]:
        """The layer's tensors by role."""
        roles = (*self.required, *self.optional, "diff_b")
        return {role: t for role in roles if (t := getattr(self, role)) is not None}

    def map(self, function: Callable[[Any], Any]) -> Self:
        """The same layer with a function applied to every tensor."""
        return replace(self, **{role: function(t) for role, t in self.tensors().items()})

    def factors(self) -> tuple[Array, Array]:
        """The update as a product, with every scale folded in.

        Returns:
            ``up`` of shape ``(out, r)`` and ``down`` of shape ``(r, in·kh·kw)``, float32, with
            ΔW = up @ down.

        Raises:
            NoFactorsError: The layer has no exact low-rank form.
        """
        raise NoFactorsError(self.no_factors)

    @property
    def no_factors(self) -> str:
        """Why there are no factors, and the ways out."""
        return f"{an(self.kind)} layer has no low-rank form"

    def delta(self) -> Array:
        """ΔW as a dense float32 array of the weight's shape."""
        up, down = self.factors()
        return (up @ down).reshape(self.shape)

    def delta_on(self, weight: Array) -> Array:
        """ΔW for a given weight: what the layer adds to it at full strength.

        Args:
            weight: The module's weight in the base model, float32, of the layer's `shape`.

        Returns:
            A dense float32 array of the weight's shape.

        Raises:
            NoFactorsError: ΔW can't be computed.
        """
        return self.delta()

    @property
    def rankless(self) -> bool:
        """Whether there is no rank to speak of: a bias, a norm, a table.  It is summed entry by entry, and never cut."""
        return False

    def times(self, weight: float) -> "Layer | None":
        """The layer with its update times a number, its tensors as they are; None where its form can't say that."""
        return self if weight == 1 else None

    @property
    def by_rows(self) -> bool:
        """Whether a row of ΔW depends on the same row of the weight only."""
        return True

    def delta_bias(self) -> Array | Spec | None:
        """The update of the module's bias, shape ``(out,)``, every scale folded in; None where there is none."""
        return self.diff_b

    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return linalg.norm(*self.factors())

    def spectrum(self, grams: Callable[[], tuple[Array, Array]]) -> linalg.Spectrum:
        """ΔW's SVD, in coordinates of `factors`.

        Args:
            grams: Gives the Gram matrices of the factors, see `linalg.grams`; a layer that knows a
                shorter way doesn't ask for them.
        """
        return linalg.spectrum(*grams())

    def rows(self, ranges: Ranges, source: object) -> "Layer":
        """The update of some rows of the weight: a part of a fused projection.

        Args:
            ranges: Row ranges ``(start, stop)`` of the weight, in the order wanted.
            source: What the rows are taken from; parts of one source share it.
        """
        whole = self.delta_bias()
        bias = None if whole is None else take_rows(whole, ranges)
        return Rows(whole=self, ranges=ranges, source=source, diff_b=bias)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Rows(Layer):
    """Some rows of another layer's update, where the layer itself can't be cut."""

    required: ClassVar[tuple[str, ...]] = ()

    whole: Layer
    ranges: Ranges
    source: object

    @property
    def kind(self) -> str:  # type: ignore[override]
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
    def dtype(self) -> str:
        return self.whole.dtype

    def tensors(self) -> dict[str, Array | Spec]:
        return self.whole.tensors()

    def map(self, function: Callable[[Any], Any]) -> "Rows":
        bias = None if self.diff_b is None else function(self.diff_b)
        return replace(self, whole=self.whole.map(function), diff_b=bias)

    def factors(self) -> tuple[Array, Array]:
        up, down = self.whole.factors()
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

    @property
    def rankless(self) -> bool:
        return self.whole.rankless

    def times(self, weight: float) -> "Rows | None":
        whole = self.whole.times(weight)
        if whole is None or weight == 1:
            return None if whole is None else self
        return replace(self, whole=whole, source=(self.source, weight), diff_b=scaled(self.diff_b, weight))

    def norm(self) -> float:
        return dense_norm(self.delta()) if self.rank is None else super().norm()


def scaled(tensor: Array | Spec | None, weight: float) -> Array | Spec | None:
    """A tensor times a number, in float32; None stays None."""
    if tensor is None or isinstance(tensor, Spec):
        return tensor and Spec(tensor.shape, "F32")
    return float32(tensor) * weight


def dense_norm(array: Array) -> float:
    """Frobenius norm of an array, summed in float64."""
    xp = namespace(array)
    return math.sqrt(float((xp.astype(array, xp.float64) ** 2).sum()))


def matrix(tensor: Array) -> Array:
    """A tensor as a float32 matrix ``(rows, columns)``."""
    return flatten(float32(tensor))


def identity(size: int, like: Array) -> Array:
    """The identity matrix, in the dtype and on the device of another array."""
    return namespace(like).eye(size, dtype=like.dtype, device=like.device)
