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
from ...tensors import Array, Float, Float32, Float64, Shape, namespace

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

    up: Float32[Array, "out R"]
    """R = Σr."""
    down: Float32[Array, "R in"]
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
        xp = namespace(self.up)
        if not left.shape[1]:  # every LoRA is zero
            return low_rank(xp.zeros_like(self.up[:, :1]), xp.zeros_like(self.down[:1]), self.shape)
        up = self.up @ xp.astype(left, xp.float32)
        down = xp.astype(right, xp.float32) @ self.down
        return low_rank(up, down, self.shape)


def stack(layers: Sequence[Layer]) -> Stack:
    """Stack the factors of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    factors = [linalg.thin(*layer.factors()) for layer in layers]
    xp = namespace(factors[0][0])
    up = xp.concat([up for up, _ in factors], axis=1)
    down = xp.concat([down for _, down in factors], axis=0)
    stops = list(accumulate(up.shape[1] for up, _ in factors))
    slices = tuple(slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False))
    return Stack(up, down, slices, layers[0].shape)


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
    stacked = stack(layers)
    own = [_own_factors(stacked.gram_up[s, s], stacked.gram_down[s, s]) for s in stacked.slices]
    to_up = linalg.block_diagonal([left for left, _, _ in own])
    to_down = linalg.block_diagonal([right for _, _, right in own])
    left, into = _orthonormal(to_up.T @ stacked.gram_up @ to_up)
    right, onto = _orthonormal(to_down @ stacked.gram_down @ to_down.T)
    stops = list(accumulate(values.shape[0] for _, values, _ in own))
    parts, spectra = [], []
    for start, stop, (_, values, _) in zip([0, *stops], stops, own, strict=False):
        root = values**0.5
        u, v = into[:, start:stop], onto[:, start:stop]
        parts.append(u @ v.T)
        spectra.append((u / root, values, (v / root).T))
    return Core(stacked, to_up @ left, tuple(parts), right.T @ to_down, tuple(spectra))


def _own_factors(
    gram_up: Float64[Array, "r r"], gram_down: Float64[Array, "r r"]
) -> tuple[Float64[Array, "r k"], Float64[Array, " k"], Float64[Array, "k r"]]:
    """Return P, S and Q with up @ P = U√S and Q @ down = √SVᵀ, for one LoRA's ΔW = USVᵀ."""
    found = linalg.spectrum(gram_up, gram_down)
    root = found.sigma**0.5
    return found.left * root, found.sigma, (found.right * root).T


def _orthonormal(gram: Float64[Array, "n n"]) -> tuple[Float64[Array, "n k"], Float64[Array, "k n"]]:
    """Return T, which makes the columns X @ T orthonormal, and (X @ T)ᵀ X, from the Gram matrix of X."""
    values, vectors = _falling(gram)
    return vectors / values, (vectors * values).T


def _falling(gram: Float64[Array, "n n"]) -> tuple[Float64[Array, " k"], Float64[Array, "n k"]]:
    """Return the singular values of X, the largest first, and its right singular vectors, from the Gram matrix of X."""
    squares, vectors = linalg.eigenpairs(gram, FAINT**2)
    return squares**0.5, vectors


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
        xp = namespace(merged)
        if not merged.shape[0]:
            return self.stack.layer(self.left, self.left.T)
        return low_rank(self.stack.up @ xp.astype(self.left, xp.float32), merged, self.stack.shape)


def aligned(layers: Sequence[Layer]) -> Aligned:
    """Compute KnOTS' space of layers.

    Raises:
        NoFactorsError: A layer has no factors.
    """
    stacked = stack(layers)
    xp = namespace(stacked.up)
    # [ΔW₁ … ΔW_N] = up @ L @ Q with L block-diagonal and Q's rows orthonormal, so only blocks are multiplied.
    lower = [(s, linalg.cholesky(linalg.gram(stacked.down[s]))) for s in stacked.slices]
    half = xp.concat([block.T @ stacked.gram_up[s] for s, block in lower], axis=0)
    values, vectors = _falling(xp.concat([half[:, s] @ block for s, block in lower], axis=1))
    vectors = vectors / values
    left = xp.concat([block @ vectors[s] for s, block in lower], axis=0)
    onto = vectors.T @ half
    return Aligned(stacked, left, Parts(xp.astype(onto, xp.float32), stacked.down, stacked.slices))


def inner_products(layers: Sequence[Layer]) -> Float64[Array, "n n"]:
    """Compute ⟨ΔWᵢ, ΔWⱼ⟩ of all pairs from the factors."""
    stacked = stack(layers)
    xp = namespace(stacked.up)
    products = stacked.gram_up * stacked.gram_down
    return xp.stack([xp.stack([products[a, b].sum() for b in stacked.slices]) for a in stacked.slices])
