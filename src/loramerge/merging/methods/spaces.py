"""Spaces in which methods work: ΔW itself, or small matrices that represent it.

In a module's common space every ΔWᵢ is left @ partᵢ @ right with one ``left`` and one ``right``
for all LoRAs.  A method sees the parts; its result is turned into a layer again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from ... import linalg
from ...layers import Layer, LowRank, low_rank
from ...layers.base import Convert, dense_norm, identity, matrix
from ...tensors import (
    Array,
    Float,
    Float32,
    Float64,
    Shape,
    check_float32,
    float32,
    float64,
    largest_of,
    namespace,
    row_blocks,
)

FAINT = 1e-6
"""Directions below this share of the largest are rounding noise and don't count as part of the span."""


class Deltas(Sequence[Array]):
    """The ΔWs of one module as dense matrices ``(out, in·kh·kw)``, each formed when it is indexed."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return Deltas(self.layers[index])
        return matrix(self.layers[index].delta())

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Stack:
    """The factors of all LoRAs of a module, ΔWᵢ = upᵢ @ downᵢ."""

    ups: tuple[Float64[Array, "out _"], ...]
    """float64, so that a direction's accuracy doesn't depend on its strength."""
    downs: tuple[Float64[Array, "_ in"], ...]
    """A convolution's kernel is flattened into ``in``."""
    shape: Shape

    def up(self, left: Sequence[Float64[Array, "_ k"]]) -> Float32[Array, "out k"]:
        """Return Σ upᵢ @ leftᵢ."""
        xp, like = namespace(self.ups[0]), self.ups[0]
        found = xp.empty((like.shape[0], left[0].shape[1]), dtype=xp.float32, device=like.device)
        _fill(found, self.ups, left)
        return found

    def down(self, right: Sequence[Float64[Array, "_ k"]]) -> Float32[Array, "k in"]:
        """Return Σ rightᵢᵀ @ downᵢ."""
        xp, like = namespace(self.downs[0]), self.downs[0]
        found = xp.empty((right[0].shape[1], like.shape[1]), dtype=xp.float32, device=like.device)
        _fill(found.T, [down.T for down in self.downs], right)
        return found


def stack(layers: Sequence[Layer]) -> Stack:
    """Return the factors of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    ups, downs = zip(*(linalg.thin(*layer.factors(float64)) for layer in layers), strict=True)
    return Stack(ups, downs, layers[0].shape)


def _fill(
    found: Float32[Array, "n k"], columns: Sequence[Float64[Array, "n _"]], maps: Sequence[Float64[Array, "_ k"]]
) -> None:
    """Write Σ Xᵢ Mᵢ into an array, some rows at a time.

    Raises:
        NumberError: Its largest value is outside of the range of float32.
    """
    largest = 0.0
    for rows in row_blocks(found):
        block = sum(x[rows] @ m for x, m in zip(columns, maps, strict=True))
        size = largest_of(block)
        check_float32(max(size, 1.0))  # these rows alone may be as small as they like
        largest = max(largest, size)
        found[rows] = block
    check_float32(largest)


def _gram(
    columns: Sequence[Float64[Array, "n _"]], maps: Sequence[Float64[Array, "_ _"] | None]
) -> Float64[Array, "R R"]:
    """Return XᵀX of X = [X₁M₁ … X_N M_N], of which some rows are formed at a time; without a map, Xᵢ is taken.

    From the Gram matrix of the Xᵢ it would be a sum of large terms that cancel where the Xᵢ are faint.
    """
    xp, total = namespace(columns[0]), 0.0
    for rows in row_blocks(columns[0]):
        parts = [x[rows] if m is None else x[rows] @ m for x, m in zip(columns, maps, strict=True)]
        block = xp.concat(parts, axis=1)
        total = total + block.T @ block
    return total


@dataclass(frozen=True)
class Core:
    """The common space of one module's LoRAs: ΔWᵢ = (Σ upⱼ @ leftⱼ) @ partᵢ @ (Σ rightⱼᵀ @ downⱼ), without loss.

    Σ upⱼ @ leftⱼ has orthonormal columns that span those of all ``up``, Σ rightⱼᵀ @ downⱼ
    orthonormal rows that span those of all ``down``.  Both are singular vectors of the stacked
    factors, each LoRA's own factors being U√S and √SVᵀ of its ΔW: so they depend only on the
    ΔWs, not on how a file factorises them.

    Source:
        Panariello et al., 2025, https://arxiv.org/abs/2509.17786; here by Gram matrices, so that
        nothing longer than R is decomposed.
    """

    stack: Stack
    left: tuple[Float64[Array, "_ p"], ...]
    """p ≤ R = Σr."""
    parts: tuple[Float64[Array, "p q"], ...]
    right: tuple[Float64[Array, "_ q"], ...]
    """q ≤ R."""
    spectra: tuple[tuple[Float64[Array, "p _"], Float64[Array, " _"], Float64[Array, "_ q"]], ...]
    """The singular value decomposition U, S, Vᵀ of each part, with as many values as it has rank."""
    most: int | None = None
    """The rank that the result will be cut to, for methods that need it; None if it isn't cut."""

    @property
    def empty(self) -> bool:
        """True if every LoRA is zero, so there is nothing to merge."""
        return 0 in self.parts[0].shape

    def layer(self, merged: Float64[Array, "p q"]) -> "InSpace":
        """Make the layer with a merged core."""
        return InSpace(space=self, merged=merged)

    def factors(
        self, left: Float64[Array, "p k"], right: Float64[Array, "k q"]
    ) -> tuple[Float32[Array, "out k"], Float32[Array, "k in"]]:
        """Return the factors of ΔW from those of a core."""
        return self.stack.up([own @ left for own in self.left]), self.stack.down([own @ right.T for own in self.right])


def core(layers: Sequence[Layer]) -> Core:
    """Compute the common space of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    stacked = stack(layers)
    own = _spectra(stacked)
    left, into = _directions(stacked.ups, [x.left * x.sigma**0.5 for x in own])
    right, onto = _directions([down.T for down in stacked.downs], [x.right * x.sigma**0.5 for x in own])
    parts, spectra = [], []
    for x, u, v in zip(own, into, onto, strict=True):
        u, root = u.T, x.sigma**0.5
        parts.append(u @ v)
        spectra.append((u / root, x.sigma, v / root[:, None]))
    return Core(stacked, left, tuple(parts), right, tuple(spectra))


def _spectra(stacked: Stack) -> list[linalg.Spectrum]:
    """Return the SVD of each ΔW.  A Gram matrix of all U√S, or of all √SVᵀ, has no large terms that cancel."""
    return [linalg.spectrum(*linalg.grams(up, down)) for up, down in zip(stacked.ups, stacked.downs, strict=True)]


def _directions(
    columns: Sequence[Float64[Array, "n _"]], maps: Sequence[Float64[Array, "_ _"]]
) -> tuple[tuple[Float64[Array, "_ p"], ...], tuple[Float64[Array, "_ p"], ...]]:
    """Return Tᵢ and Cᵢ: the left singular vectors of X = [X₁M₁ … X_N M_N] are Q = Σ Xᵢ Tᵢ, and XᵢMᵢ is Q Cᵢᵀ."""
    turn, into = _orthonormal(_gram(columns, maps))
    slices = _behind([m.shape[1] for m in maps])
    return tuple(m @ turn[s] for m, s in zip(maps, slices, strict=True)), tuple(into[s] for s in slices)


def _orthonormal(gram: Float64[Array, "n n"]) -> tuple[Float64[Array, "n k"], Float64[Array, "n k"]]:
    """Return T, for which X T are the left singular vectors of X, and XᵀX T, from the Gram matrix of X."""
    squares, vectors = linalg.eigenpairs(gram, FAINT**2)
    return vectors / squares**0.5, vectors * squares**0.5


def _behind(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Return slices of these sizes, one behind the other."""
    stops = list(accumulate(sizes))
    return tuple(slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True))


@dataclass(frozen=True)
class Parts(Sequence[Array]):
    """Products of columns of one matrix with rows of another, each formed when it is indexed."""

    left: Float32[Array, "p R"]
    right: Float32[Array, "R in"]
    slices: tuple[slice, ...]

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return replace(self, slices=self.slices[index])
        part = self.slices[index]
        return self.left[:, part] @ self.right[part]


@dataclass(frozen=True)
class Aligned:
    """KnOTS' space: [ΔW₁ … ΔW_N] = U S [V₁ … V_N], with the parts S Vᵢ and one U for all.

    Source:
        Stoica et al., 2024, section 4, https://arxiv.org/abs/2410.19735; here from the factors,
        so that no ΔW is formed and the result is a LoRA.
    """

    stack: Stack
    left: tuple[Float64[Array, "_ p"], ...]
    """U = Σ upᵢ @ leftᵢ."""
    parts: Parts
    """Each S Vᵢ, of shape ``(p, in)``."""

    @property
    def empty(self) -> bool:
        """True if every LoRA is zero, so there is nothing to merge."""
        return not self.left[0].shape[1]

    def layer(self, merged: Float32[Array, "p in"]) -> "InSpace":
        """Make the layer U @ merged."""
        return InSpace(space=self, merged=merged)

    def factors(
        self, left: Float32[Array, "p k"], right: Float32[Array, "k in"]
    ) -> tuple[Float32[Array, "out k"], Float32[Array, "k in"]]:
        """Return the factors of ΔW from those of a merged S V."""
        return self.stack.up([own @ float64(left) for own in self.left]), right


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InSpace(Layer):
    """A LoRA as a matrix in a common space; its factors are formed once it is known which rank they have."""

    kind_name: ClassVar[str] = LowRank.kind_name
    required: ClassVar[tuple[str, ...]] = ("merged",)

    space: Core | Aligned
    merged: Float[Array, "p q"]

    @property
    def shape(self) -> Shape:
        """Shape of the weight."""
        return self.space.stack.shape

    @property
    def rank(self) -> int:
        """Rank of the factors without loss."""
        rank: int = max(1, min(self.merged.shape))
        return rank

    def factors(self, to: Convert = float32) -> tuple[Array, Array]:
        """Return the factors without loss, float32."""
        xp, like = namespace(self.merged), {"dtype": self.merged.dtype, "device": self.merged.device}
        rows, columns = self.merged.shape
        if self.space.empty:
            return self.space.factors(xp.zeros((rows, 1), **like), xp.zeros((1, columns), **like))
        if rows < columns:
            return self.space.factors(xp.eye(rows, **like), self.merged)
        return self.space.factors(self.merged, xp.eye(columns, **like))

    def as_product(self) -> LowRank:
        """Return the layer as factors."""
        return low_rank(*self.factors(), self.shape, diff_b=self.diff_b)

    def cut(self, rank: int) -> linalg.Cut:
        """Compute the best factors of a rank, from those of the matrix in the space."""
        left, right, lost = linalg.project(identity(self.merged.shape[0], self.merged), self.merged, rank)
        return linalg.Cut(*self.space.factors(left, right), dense_norm(self.merged) ** 2, lost)


def aligned(layers: Sequence[Layer]) -> Aligned:
    """Compute KnOTS' space of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    stacked = stack(layers)
    own = _spectra(stacked)
    xp = namespace(stacked.ups[0])
    maps, slices = [x.left * x.sigma**0.5 for x in own], _behind([x.rank for x in own])
    gram = _gram(stacked.ups, maps)
    # With ΔWᵢ = Uᵢ Sᵢ Vᵢᵀ the left singular vectors of all are those of [U₁S₁ … U_N S_N].
    root = xp.concat([x.sigma for x in own]) ** 0.5
    left = root[:, None] * _orthonormal(gram * root[:, None] * root)[0]
    downs = [float32((x.right * x.sigma**0.5).T @ down) for x, down in zip(own, stacked.downs, strict=True)]
    parts = Parts(float32(left.T @ gram), xp.concat(downs), slices)
    return Aligned(stacked, tuple(m @ left[s] for m, s in zip(maps, slices, strict=True)), parts)


def inner_products(layers: Sequence[Layer]) -> Float64[Array, "n n"]:
    """Compute ⟨ΔWᵢ, ΔWⱼ⟩ of all pairs from the factors."""
    stacked = stack(layers)
    xp, none = namespace(stacked.ups[0]), [None] * len(layers)
    products = _gram(stacked.ups, none) * _gram([down.T for down in stacked.downs], none)
    slices = _behind([up.shape[1] for up in stacked.ups])
    return xp.stack([xp.stack([products[a, b].sum() for b in slices]) for a in slices])
