"""LoKr: ΔW = scale · w1 ⊗ w2, a Kronecker product, each part full or factored.

By the mixed-product rule kron(U₁V₁, U₂V₂) = kron(U₁, U₂) · kron(V₁, V₂), so ΔW is exactly a
LoRA whose rank is the product of the parts' ranks.

Source: Yeh et al., 2023, https://arxiv.org/abs/2309.14859, section 3; LyCORIS, modules/lokr.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from .. import linalg
from ..errors import LayerError
from ..linalg import Spectrum, kron
from ..tensors import Array, Shape, Spec, float32, largest_rank, namespace, times
from .base import Convert, Layer, check_size, dense_norm, identity, matrix, scaled


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoKr(Layer):
    """``w1`` (o1, i1) and ``w2`` (o2, i2[, kh, kw]); a factored part is ``w_a`` (o, r) and ``w_b`` (r, i)."""

    kind_name: ClassVar[str] = "lokr"
    optional: ClassVar[tuple[str, ...]] = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    )
    ranked_by: ClassVar[tuple[str, ...]] = ("lokr_w2_b", "lokr_w1_b")

    lokr_w1: Array | Spec | None = None
    lokr_w1_a: Array | Spec | None = None
    lokr_w1_b: Array | Spec | None = None
    lokr_w2: Array | Spec | None = None
    lokr_w2_a: Array | Spec | None = None
    lokr_w2_b: Array | Spec | None = None
    lokr_t2: Array | Spec | None = None
    """Tucker core (r, r, kh, kw); ``w2_a`` is then (r, o2) and ``w2_b`` (r, i2)."""
    alpha: float | None = None
    """The scale is alpha / r, and 1 when both parts are full."""
    weight: Shape | None = None
    """Shape of the weight, if the architecture knows it."""

    def __post_init__(self) -> None:
        for part in ("lokr_w1", "lokr_w2"):
            full, a, b = (getattr(self, part + end) for end in ("", "_a", "_b"))
            if (full is None) == (a is None or b is None) or (a is None) != (b is None):
                raise LayerError(f"wanted either {part} or both {part}_a and {part}_b")
            if any(t is not None and len(t.shape) < 2 for t in (full, a, b)):
                raise LayerError(f"{part} has fewer than two axes")
            flat = (full, a, b) if part == "lokr_w1" else (a, b)  # a kernel is in lokr_w2, or in lokr_t2
            if any(t is not None and len(t.shape) > 2 for t in flat):
                raise LayerError(f"a part of {part} has more than two axes; a kernel belongs to lokr_w2 or lokr_t2")
        if self.lokr_t2 is not None and self.lokr_w2_a is None:
            raise LayerError("lokr_t2 without lokr_w2_a")
        if self.lokr_w1_a is not None and self.lokr_w1_b is not None:
            _check_rank("lokr_w1", self.lokr_w1_a.shape[1], self.lokr_w1_b.shape[0])
        if self.lokr_w2_a is not None and self.lokr_w2_b is not None:
            a, b = self.lokr_w2_a.shape, self.lokr_w2_b.shape
            _check_rank("lokr_w2", a[1] if self.lokr_t2 is None else a[0], b[0])
            if self.lokr_t2 is not None and tuple(self.lokr_t2.shape[:2]) != (a[0], b[0]):
                raise LayerError(f"lokr_t2 has shape {tuple(self.lokr_t2.shape)}, wanted ({a[0]}, {b[0]}, …)")
        if 0 in self._outer or 0 in self._inner:
            raise LayerError("a part of the Kronecker product has size 0")

    @property
    def _outer(self) -> tuple[int, int]:
        """Shape (o1, i1) of w1."""
        if self.lokr_w1 is not None:
            return (self.lokr_w1.shape[0], self.lokr_w1.shape[1])
        return (self.lokr_w1_a.shape[0], self.lokr_w1_b.shape[1])  # type: ignore[union-attr]

    @property
    def _inner(self) -> Shape:
        """Shape of w2 in the file: (o2, i2[, kh, kw])."""
        if self.lokr_w2 is not None:
            return tuple(self.lokr_w2.shape)
        a, b = self.lokr_w2_a, self.lokr_w2_b
        if self.lokr_t2 is not None:
            return (a.shape[1], b.shape[1], *self.lokr_t2.shape[2:])  # type: ignore[union-attr]
        return (a.shape[0], b.shape[1])  # type: ignore[union-attr]

    @property
    def shape(self) -> Shape:
        (o1, i1), (o2, i2, *kernel) = self._outer, self._inner
        return self.weight or (o1 * o2, i1 * i2, *kernel)

    @property
    def rank(self) -> int:
        limits = [(largest_rank(self._outer), self.lokr_w1_b), (largest_rank(self._inner), self.lokr_w2_b)]
        ranks = [limit if b is None else min(limit, b.shape[0]) for limit, b in limits]
        return int(math.prod(ranks))

    @property
    def dim(self) -> int | None:
        """Rank of the factored part, by which readers divide alpha; None if both parts are full."""
        factored = self.lokr_w2_b if self.lokr_w2_b is not None else self.lokr_w1_b
        return None if factored is None else int(factored.shape[0])

    @property
    def has_core(self) -> bool:
        return self.lokr_t2 is not None

    @property
    def scale(self) -> float:
        """The factor alpha / r; 1 without alpha, and if both parts are full."""
        if self.alpha is None or self.dim is None:
            return 1.0
        return self.alpha / self.dim

    def factors(self, to: Convert = float32) -> tuple[Array, Array]:
        check_size(self, self.rank * (self.shape[0] + math.prod(self.shape[1:])))
        (up1, down1), (up2, down2) = self._parts(to)
        return times(kron(up1, up2), self.scale), kron(down1, down2)

    def times(self, weight: float) -> "LoKr":
        if weight == 1:
            return self
        factored = self if self.dim else self._with_identity()
        assert factored.dim
        alpha = factored.scale * factored.dim * weight
        return replace(factored, alpha=alpha, diff_b=scaled(self.diff_b, weight))

    def _with_identity(self) -> "LoKr":
        """Return the same ΔW with w1 times an identity as its factors: readers use alpha only if a part is factored."""
        w1: Array | Spec = self.lokr_w1
        rows, columns = w1.shape
        eye = _identity(min(rows, columns), w1)
        a, b = (eye, w1) if rows <= columns else (w1, eye)
        return replace(self, lokr_w1=None, lokr_w1_a=a, lokr_w1_b=b, alpha=None)

    def norm(self) -> float:
        first = _norm(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None)
        return abs(self.scale) * first * _norm(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)

    def delta(self) -> Array:
        check_size(self, math.prod(self.shape))
        outer, inner = (up @ down for up, down in self._parts())
        return times(kron(outer, inner), self.scale).reshape(self.shape)

    def spectrum(self, grams: Callable[[], tuple[Array, Array]]) -> Spectrum:
        check_size(self, self.rank**2)
        first, second = (linalg.spectrum(*linalg.grams(up, down)) for up, down in self._parts())
        return linalg.kron_spectrum(first, second, self.scale)

    def with_alpha(self) -> "LoKr":
        return self if self.alpha is not None else replace(self, alpha=float(self.dim or 1))

    def _shaped(self, weight: Shape) -> "LoKr":
        return replace(self, weight=weight)

    def without_core(self) -> "LoKr":
        """Return the same ΔW with ``w2`` whole and the scale in it; the layer itself without a core."""
        if self.lokr_t2 is None:
            return self
        if any(isinstance(tensor, Spec) for tensor in self.tensors().values()):
            whole: Array | Spec = Spec(self._inner, "F32")
        else:
            up, down = self._parts()[1]
            whole = times(up @ down, self.scale).reshape(self._inner)
        return replace(self, lokr_w2=whole, lokr_w2_a=None, lokr_w2_b=None, lokr_t2=None, alpha=None)

    def nearest(self, rank: int) -> tuple[Array, Array, Array]:
        """Return the best factors of a rank: the singular triples of w1 ⊗ w2 are products of those of w1 and w2."""
        check_size(self, rank * (self.shape[0] + math.prod(self.shape[1:])))
        xp = namespace(self._parts()[0][0])
        (u1, s1, v1), (u2, s2, v2) = (xp.linalg.svd(up @ down, full_matrices=False) for up, down in self._parts())
        values = xp.reshape(s1[:, None] * s2[None, :], (-1,)) * abs(self.scale)
        order = xp.argsort(-values)
        largest = order[:rank]
        i, j = largest // s2.shape[0], largest % s2.shape[0]
        root = xp.sqrt(values[largest])
        up = (u1[:, i][:, None, :] * u2[:, j][None, :, :]).reshape((-1, largest.shape[0])) * root
        down = (v1[i][:, :, None] * v2[j][:, None, :]).reshape((largest.shape[0], -1)) * root[:, None]
        return up if self.scale >= 0 else -up, down, values[order]

    def _parts(self, to: Convert = float32) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Factors of w1 and of w2."""
        core: Shape = () if self.lokr_t2 is None else self.lokr_t2.shape
        check_size(self, math.prod((core[0], *self._inner[1:])) if core else 0)
        return (
            _factored(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None, to),
            _factored(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2, to),
        )


def _factored(
    full: Array | None, a: Array | None, b: Array | None, core: Array | None, to: Convert
) -> tuple[Array, Array]:
    """Return factors (o, k) and (k, i·kh·kw) of w1 or w2, with the smallest k that its form allows."""
    if full is not None:
        return linalg.trivial(matrix(full, to))
    up, down = matrix(a, to), matrix(b, to)
    if core is not None:
        up, down = up.T, linalg.tucker(to(core), down)
    return (up, down) if up.shape[1] <= min(up.shape[0], down.shape[1]) else linalg.trivial(up @ down)


def _norm(full: Array | None, a: Array | None, b: Array | None, core: Array | None) -> float:
    """Return ‖w1‖ or ‖w2‖."""
    if full is not None:
        return dense_norm(matrix(full))
    if core is not None:
        return linalg.tucker_norm(matrix(a).T, float32(core), matrix(b))
    return linalg.norm(matrix(a), matrix(b))


def _identity(size: int, like: Array | Spec) -> Array | Spec:
    return Spec((size, size), like.dtype) if isinstance(like, Spec) else identity(size, like)


def _check_rank(part: str, a: int, b: int) -> None:
    if a != b or a == 0:
        raise LayerError(f"{part}_a and {part}_b disagree on the rank, {a} and {b}, or it is 0")
