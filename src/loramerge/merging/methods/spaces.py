"""Where a method works: on ΔW itself, or on small matrices that stand for it.

In a module's common space every ΔWᵢ is left @ partᵢ @ right with one ``left`` and one ``right``
for all LoRAs.  A method sees the parts; what it makes of them becomes a layer again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ... import linalg
from ...layers import Layer, LowRank, low_rank
from ...layers.base import matrix
from ...tensors import Array, Shape, namespace

FAINT = 1e-6
"""Directions whose share of the largest is below it are rounding noise and no part of the span."""


class Deltas(Sequence[Array]):
    """The ΔWs of one module as dense matrices ``(out, in·kh·kw)``, formed one at a time when asked for."""

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
    """The factors of all LoRAs of a module beside each other: Σ ΔWᵢ = up @ down."""

    up: Array
    """Shape ``(out, R)``, float32, R = Σr."""
    down: Array
    """Shape ``(R, in·kh·kw)``, float32."""
    slices: tuple[slice, ...]
    """Each LoRA's rows and columns."""
    shape: Shape

    @cached_property
    def gram_up(self) -> Array:
        """``upᵀ up``, ``(R, R)``, float64."""
        return linalg.gram(self.up.T)

    @cached_property
    def gram_down(self) -> Array:
        """``down downᵀ``, ``(R, R)``, float64."""
        return linalg.gram(self.down)

    def layer(self, left: Array, right: Array) -> LowRank:
        """The layer (up @ left) @ (right @ down), with ``left`` of shape ``(R, k)`` and ``right`` ``(k, R)``."""
        xp = namespace(self.up)
        if not left.shape[1]:  # every LoRA is zero
            return low_rank(xp.zeros_like(self.up[:, :1]), xp.zeros_like(self.down[:1]), self.shape)
        up = self.up @ xp.astype(left, xp.float32)
        down = xp.astype(right, xp.float32) @ self.down
        return low_rank(up, down, self.shape)


def stack(layers: Sequence[Layer]) -> Stack:
    """The stacked factors of layers that have some.

    Raises:
        NoFactorsError: A layer has none.
    """
    factors = [layer.factors() for layer in layers]
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
    factors, each LoRA's own factors being U√S and √SVᵀ of its ΔW: so they depend on the ΔWs
    only, not on how a file factorises them.

    Source:
        Panariello et al., 2025, https://arxiv.org/abs/2509.17786; here by Gram matrices, so that
        nothing longer than R is decomposed.
    """

    stack: Stack
    left: Array
    """Shape ``(R, p)``, float64, p ≤ R."""
    parts: tuple[Array, ...]
    """Each ``(p, q)``, float64."""
    right: Array
    """Shape ``(q, R)``, float64, q ≤ R."""
    spectra: tuple[tuple[Array, Array, Array], ...]
    """The singular value decomposition U, S, Vᵀ of each part, with as many values as it has rank."""
    most: int | None = None
    """The rank that the result will be cut to, for methods that have to know; None for none."""

    @property
    def empty(self) -> bool:
        """Whether every LoRA is zero, so that there is nothing to merge."""
        return 0 in self.parts[0].shape

    def layer(self, merged: Array) -> LowRank:
        """The layer that a merged core means."""
        if merged.shape[0] < merged.shape[1]:
            return self.stack.layer(self.left, merged @ self.right)
        return self.stack.layer(self.left @ merged, self.right)


def core(layers: Sequence[Layer]) -> Core:
    """The common space of layers that have factors.

    Raises:
        NoFactorsError: A layer has none.
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


def _own_factors(gram_up: Array, gram_down: Array) -> tuple[Array, Array, Array]:
    """Of one LoRA, P, S and Q with up @ P = U√S and Q @ down = √SVᵀ, for its ΔW = USVᵀ."""
    found = linalg.spectrum(gram_up, gram_down)
    root = found.sigma**0.5
    return found.left * root, found.sigma, (found.right * root).T


def _orthonormal(gram: Array) -> tuple[Array, Array]:
    """For columns X with the Gram matrix, T with X @ T orthonormal, and (X @ T)ᵀ X."""
    values, vectors = _falling(gram)
    return vectors / values, (vectors * values).T


def _falling(gram: Array) -> tuple[Array, Array]:
    """Singular values of what a Gram matrix is of, the largest first, and its right singular vectors."""
    squares, vectors = linalg.eigenpairs(gram, FAINT**2)
    return squares**0.5, vectors


@dataclass(frozen=True)
class Parts(Sequence[Array]):
    """Products of columns of one matrix with rows of another, formed one at a time when asked for."""

    left: Array
    """Shape ``(p, R)``."""
    right: Array
    """Shape ``(R, n)``."""
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
    left: Array
    """Shape ``(R, p)``, float64: U = up @ left."""
    parts: "Parts"
    """Each S Vᵢ ``(p, in·kh·kw)``, float32."""

    @property
    def empty(self) -> bool:
        """Whether every LoRA is zero, so that there is nothing to merge."""
        return not self.left.shape[1]

    def layer(self, merged: Array) -> LowRank:
        """The layer U @ merged."""
        xp = namespace(merged)
        if not merged.shape[0]:
            return self.stack.layer(self.left, self.left.T)
        return low_rank(self.stack.up @ xp.astype(self.left, xp.float32), merged, self.stack.shape)


def aligned(layers: Sequence[Layer]) -> Aligned:
    """KnOTS' space of layers that have factors.

    Raises:
        NoFactorsError: A layer has none.
    """
    stacked = stack(layers)
    xp = namespace(stacked.up)
    # [ΔW₁ … ΔW_N] = up @ L @ Q with L block-diagonal and Q's rows orthonormal, so that only blocks are multiplied.
    lower = [(s, linalg.cholesky(linalg.gram(stacked.down[s]))) for s in stacked.slices]
    half = xp.concat([block.T @ stacked.gram_up[s] for s, block in lower], axis=0)
    values, vectors = _falling(xp.concat([half[:, s] @ block for s, block in lower], axis=1))
    vectors = vectors / values
    left = xp.concat([block @ vectors[s] for s, block in lower], axis=0)
    onto = vectors.T @ half
    return Aligned(stacked, left, Parts(xp.astype(onto, xp.float32), stacked.down, stacked.slices))


def inner_products(layers: Sequence[Layer]) -> Array:
    """⟨ΔWᵢ, ΔWⱼ⟩ of all pairs, ``(N, N)``, float64, from the factors."""
    stacked = stack(layers)
    xp = namespace(stacked.up)
    products = stacked.gram_up * stacked.gram_down
    return xp.stack([xp.stack([products[a, b].sum() for b in stacked.slices]) for a in stacked.slices])
