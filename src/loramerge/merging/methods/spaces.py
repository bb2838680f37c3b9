"""Spaces in which methods work: ΔW itself, or small matrices that represent it.

In a module's common space every ΔWᵢ is left @ partᵢ @ right with one ``left`` and one ``right``
for all LoRAs.  A method sees the parts; its result is turned into a layer again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ... import linalg
from ...layers import Layer, LowRank, low_rank
from ...layers.base import matrix
from ...tensors import Array, Float, Float32, Float64, Shape, float32, float64, namespace

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
    """The factors of all LoRAs of a module, concatenated: Σ ΔWᵢ = up @ down."""

    up: Float64[Array, "out R"]
    """R = Σr; float64, so that a direction's accuracy doesn't depend on its strength."""
    down: Float64[Array, "R in"]
    """A convolution's kernel is flattened into ``in``."""
    slices: tuple[slice, ...]
    """Each LoRA's columns of up and rows of down."""
    shape: Shape

    @cached_property
    def gram_up(self) -> Float64[Array, "R R"]:
        """``upᵀ up``."""
        return linalg.gram(self.up.T)

    @cached_property
    def gram_down(self) -> Float64[Array, "R R"]:
        """``down downᵀ``."""
        return linalg.gram(self.down)

    def layer(self, left: Float64[Array, "R k"], right: Float64[Array, "k R"]) -> LowRank:
        """Make the layer (up @ left) @ (right @ down)."""
        if not left.shape[1]:  # every LoRA is zero
            xp, like = namespace(self.up), {"dtype": self.up.dtype, "device": self.up.device}
            left, right = xp.zeros((self.up.shape[1], 1), **like), xp.zeros((1, self.up.shape[1]), **like)
        return low_rank(float32(self.up @ left), float32(right @ self.down), self.shape)


def stack(layers: Sequence[Layer]) -> Stack:
    """Stack the factors of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    factors = [linalg.thin(*layer.factors(float64)) for layer in layers]
    xp = namespace(factors[0][0])
    up = xp.concat([up for up, _ in factors], axis=1)
    down = xp.concat([down for _, down in factors], axis=0)
    return Stack(up, down, _behind([up.shape[1] for up, _ in factors]), layers[0].shape)


@dataclass(frozen=True)
class Core:
    """The common space of one module's LoRAs: ΔWᵢ = (up @ left) @ partᵢ @ (right @ down), without loss.

    ``up @ left`` has orthonormal columns that span those of all ``up``, ``right @ down``
    orthonormal rows that span those of all ``down``.  Both are singular vectors of the stacked
    factors, each LoRA's own factors being U√S and √SVᵀ of its ΔW: so they depend only on the
    ΔWs, not on how a file factorises them.

    Source:
        Panariello et al., 2025, https://arxiv.org/abs/2509.17786; here by Gram matrices, so that
        nothing longer than R is decomposed.
    """

    stack: Stack
    left: Float64[Array, "R p"]
    """p ≤ R."""
    parts: tuple[Float64[Array, "p q"], ...]
    right: Float64[Array, "q R"]
    """q ≤ R."""
    spectra: tuple[tuple[Float64[Array, "p _"], Float64[Array, " _"], Float64[Array, "_ q"]], ...]
    """The singular value decomposition U, S, Vᵀ of each part, with as many values as it has rank."""
    most: int | None = None
    """The rank that the result will be cut to, for methods that need it; None if it isn't cut."""

    @property
    def empty(self) -> bool:
        """True if every LoRA is zero, so there is nothing to merge."""
        return 0 in self.parts[0].shape

    def layer(self, merged: Float64[Array, "p q"]) -> LowRank:
        """Make the layer with a merged core."""
        if merged.shape[0] < merged.shape[1]:
            return self.stack.layer(self.left, merged @ self.right)
        return self.stack.layer(self.left @ merged, self.right)


def core(layers: Sequence[Layer]) -> Core:
    """Compute the common space of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    stacked, own = _balanced(stack(layers))
    left, into = _orthonormal(stacked.gram_up)
    right, onto = _orthonormal(stacked.gram_down)
    parts, spectra = [], []
    for x, s in zip(own, stacked.slices, strict=True):
        u, v, root = into[s].T, onto[s], x.sigma**0.5
        parts.append(u @ v)
        spectra.append((u / root, x.sigma, v / root[:, None]))
    return Core(stacked, left, tuple(parts), right.T, tuple(spectra))


def _balanced(stacked: Stack) -> tuple[Stack, list[linalg.Spectrum]]:
    """Return the stack of each LoRA's U√S and √SVᵀ, and the SVDs: a Gram matrix of these has no large terms that cancel."""
    xp = namespace(stacked.up)
    own = [linalg.spectrum(*linalg.grams(stacked.up[:, s], stacked.down[s])) for s in stacked.slices]
    ups = [stacked.up[:, s] @ (x.left * x.sigma**0.5) for x, s in zip(own, stacked.slices, strict=True)]
    downs = [(x.right * x.sigma**0.5).T @ stacked.down[s] for x, s in zip(own, stacked.slices, strict=True)]
    return Stack(xp.concat(ups, axis=1), xp.concat(downs), _behind([x.rank for x in own]), stacked.shape), own


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
    left: Float64[Array, "R p"]
    """U = up @ left."""
    parts: Parts
    """Each S Vᵢ, of shape ``(p, in)``."""

    @property
    def empty(self) -> bool:
        """True if every LoRA is zero, so there is nothing to merge."""
        return not self.left.shape[1]

    def layer(self, merged: Float[Array, "p in"]) -> LowRank:
        """Make the layer U @ merged."""
        if not merged.shape[0]:
            return self.stack.layer(self.left, self.left.T)
        return low_rank(float32(self.stack.up @ self.left), merged, self.stack.shape)


def aligned(layers: Sequence[Layer]) -> Aligned:
    """Compute KnOTS' space of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    stacked, own = _balanced(stack(layers))
    # With ΔWᵢ = Uᵢ Sᵢ Vᵢᵀ the left singular vectors of all are those of [U₁S₁ … U_N S_N].
    root = namespace(stacked.up).concat([x.sigma for x in own]) ** 0.5
    left = root[:, None] * _orthonormal(stacked.gram_up * root[:, None] * root)[0]
    parts = Parts(float32(left.T @ stacked.gram_up), float32(stacked.down), stacked.slices)
    return Aligned(stacked, left, parts)


def inner_products(layers: Sequence[Layer]) -> Float64[Array, "n n"]:
    """Compute ⟨ΔWᵢ, ΔWⱼ⟩ of all pairs from the factors."""
    stacked = stack(layers)
    xp = namespace(stacked.up)
    products = stacked.gram_up * stacked.gram_down
    return xp.stack([xp.stack([products[a, b].sum() for b in stacked.slices]) for a in stacked.slices])
