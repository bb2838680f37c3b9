"""Measuring several updates of one module, from their factors.

Everything is computed from Gram matrices of the factors, except the sign conflict: it needs values of
ΔW, which are formed in blocks of rows.  A dense ΔW, which has no factors, is measured directly.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, combinations, pairwise

from .. import linalg
from ..layers import Layer
from ..layers.base import matrix
from ..linalg import Spectrum
from ..tensors import BLOCK, Array, namespace
from .measures import Alone, Pair, ratio

SHARE = 0.99
"""Share of a dense ΔW's ‖ΔW‖² in the directions that count as its spaces: all directions span the whole space."""


class Updates:
    """Several updates of one module, with the Gram matrices of all their factors.

    If the factors are larger than ΔW (Kronecker products of full parts), or there are none (whole
    differences), ΔW is used instead.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.factors = [factors_of(layer) for layer in layers]
        xp = self.xp = namespace(self.factors[0][0])
        self.up = xp.astype(xp.concat([up for up, _ in self.factors], axis=1), xp.float64)
        self.down = xp.astype(xp.concat([down for _, down in self.factors]), xp.float64)
        stops = list(accumulate(down.shape[0] for _, down in self.factors))
        self.slices = [slice(start, stop) for start, stop in pairwise([0, *stops])]
        self.spectra: dict[int, Spectrum] = {}
        self.sums: dict[tuple[int, ...], Alone] = {}
        self.blocks: dict[tuple[int, int], tuple[Array, Array]] = {}
        wide = stops[-1] > min(self.height, self.width)
        self.dense = [xp.astype(matrix(layer.delta()), xp.float64) for layer in layers] if wide else None
        self.lengths = [self.products(i, i).clip(0.0) ** 0.5 for i in range(len(layers))]

    @property
    def height(self) -> int:
        """Rows of ΔW."""
        return int(self.up.shape[0])

    @property
    def width(self) -> int:
        """Columns of ΔW."""
        return int(self.down.shape[1])

    def grams(self, i: int, j: int) -> tuple[Array, Array]:
        """Return ``upᵢᵀ upⱼ`` and ``downᵢ downⱼᵀ``."""
        a, b = self.slices[i], self.slices[j]
        if self.dense is None:
            return self._grams[0][a, b], self._grams[1][a, b]
        if (i, j) not in self.blocks:
            self.blocks[i, j] = self.up[:, a].T @ self.up[:, b], self.down[a] @ self.down[b].T
        return self.blocks[i, j]

    @cached_property
    def _grams(self) -> tuple[Array, Array]:
        """The Gram matrices of all ups side by side, and of all downs one below the other."""
        return linalg.grams(self.up, self.down)

    def spectrum(self, member: int) -> Spectrum:
        """Return the SVD of one of the updates."""
        if member not in self.spectra:
            layer = self.layers[member]
            if layer.factored:
                self.spectra[member] = layer.spectrum(lambda: self.grams(member, member))
            else:
                self.spectra[member] = linalg.dense_spectrum(self._whole(member))
        return self.spectra[member]

    def space(self, member: int) -> Spectrum:
        """Return the directions of an update's spaces: all, or for a dense update those that carry `SHARE` of it."""
        found = self.spectrum(member)
        return found if self.layers[member].factored else linalg.leading(found, SHARE)

    def _whole(self, member: int) -> Array:
        """Return a dense ΔW: it is one of its trivial factors."""
        part = self.slices[member]
        up, down = self.up[:, part], self.down[part]
        return down if up.shape[0] == up.shape[1] else up

    def sigma(self, members: tuple[int, ...]) -> Array:
        """Return the singular values of the sum of some of the updates."""
        if len(members) == 1:
            return self.spectrum(members[0]).sigma
        if self.dense is not None:
            return linalg.singular_values(sum(self.dense[i] for i in members), sum(self._size(i) for i in members))
        return linalg.values(*(self._some(which, members) for which in (0, 1)))

    def _size(self, member: int) -> float:
        """Return Σ ‖column of up‖ · ‖row of down‖, the scale of a sum's rounding errors."""
        xp, part = self.xp, self.slices[member]
        lengths = xp.linalg.vector_norm(self.up[:, part], axis=0) * xp.linalg.vector_norm(self.down[part], axis=1)
        return float(xp.sum(lengths))

    def _some(self, which: int, members: tuple[int, ...]) -> Array:
        """Return the Gram matrix of the concatenated ups (0) or downs (1) of some of the updates."""
        rows = [self.xp.concat([self.grams(i, j)[which] for j in members], axis=1) for i in members]
        return self.xp.concat(rows, axis=0)

    def inner(self, i: int, j: int) -> float:
        """Return ⟨ΔWᵢ, ΔWⱼ⟩."""
        if self.dense is not None:
            return float((self.dense[i] * self.dense[j]).sum())
        gram_up, gram_down = self.grams(i, j)
        return float((gram_up * gram_down).sum())

    def products(self, i: int, j: int) -> Array:
        """Return the inner products of corresponding columns, ``(in,)``."""
        if self.dense is not None:
            return self.xp.sum(self.dense[i] * self.dense[j], axis=0)
        return linalg.column_products(self.grams(i, j)[0], self.down[self.slices[i]], self.down[self.slices[j]])

    def overlaps(self, i: int, j: int) -> tuple[float, float]:
        """Return the overlaps of the column and of the row spaces."""
        first, second = self.space(i), self.space(j)
        most = max(first.rank, second.rank) if min(first.rank, second.rank) else 0
        # A space of all dimensions contains every other.
        outputs = 1.0 if most == self.height else linalg.overlap(self.grams(i, j)[0], first.left, second.left)
        inputs = 1.0 if most == self.width else linalg.overlap(self.grams(i, j)[1], first.right, second.right)
        return outputs, inputs

    def alone(self, members: tuple[int, ...]) -> Alone:
        """Measure the sum of some of the updates."""
        if members not in self.sums:
            sigma = self.sigma(members)
            square = float((sigma**2).sum())
            self.sums[members] = Alone(modules=1, square=square, spread=square * linalg.effective_rank(sigma))
        return self.sums[members]

    def pair(self, i: int, j: int, signs: Mapping[tuple[int, int], tuple[float, float]]) -> Pair:
        """Measure a pair of the updates."""
        squares = self.alone((i,)).square, self.alone((j,)).square
        weight = math.sqrt(squares[0] * squares[1])
        inner = self.inner(i, j)
        outputs, inputs = self.overlaps(i, j)
        larger = max(self.space(i).rank, self.space(j).rank)
        above = _above_chance(inputs, larger, self.width) * _above_chance(outputs, larger, self.height)
        opposed, mass = signs[i, j]
        return Pair(
            modules=1,
            first=squares[0],
            second=squares[1],
            inner=inner,
            weight=weight,
            inputs=weight * inputs,
            outputs=weight * outputs,
            clashes=weight * math.sqrt(above) * (1 - max(-1.0, min(1.0, ratio(inner, weight)))) / 2,
            columns=float(self.xp.sum(self.xp.abs(self.products(i, j)))),
            column_weight=float((self.lengths[i] * self.lengths[j]).sum()),
            opposed=opposed,
            mass=mass,
            spread=self.alone((i, j)).spread,
        )

    def signs(self, rows: Sequence[int] | None) -> dict[tuple[int, int], tuple[float, float]]:
        """Return per pair Σ |v₁| + |v₂| of the entries with opposite signs, and of all.

        Args:
            rows: The rows to look at; the sums are scaled up to all rows, so that those of modules add up.
        """
        found = dict.fromkeys(combinations(range(len(self.layers)), 2), (0.0, 0.0))
        for deltas in self._dense(rows) if found else ():
            for i, j in found:
                opposed, mass = _signs(deltas[i], deltas[j])
                found[i, j] = found[i, j][0] + opposed, found[i, j][1] + mass
        each = 1.0 if rows is None else self.height / len(rows)
        return {pair: (each * opposed, each * mass) for pair, (opposed, mass) in found.items()}

    def _dense(self, rows: Sequence[int] | None) -> Iterator[list[Array]]:
        """Yield blocks of rows of every ΔW."""
        count = self.height if rows is None else len(rows)
        step = max(1, BLOCK // self.width)
        for start in range(0, count, step):
            part = slice(start, start + step)
            chosen = part if rows is None else rows[part]
            if self.dense is not None:
                yield [delta[chosen] for delta in self.dense]
            else:
                yield [up[chosen] @ down for up, down in self.factors]


def _signs(first: Array, second: Array) -> tuple[float, float]:
    xp = namespace(first)
    sizes = xp.abs(first) + xp.abs(second)
    # first * second < 0 would miss opposite signs: the product of two small values may underflow to 0.
    opposed = sizes * (first * xp.sign(second) < 0)
    return float(xp.sum(opposed, dtype=xp.float64)), float(xp.sum(sizes, dtype=xp.float64))


def factors_of(layer: Layer) -> tuple[Array, Array]:
    """Return the factors of a layer; if it has none, ΔW and the identity."""
    return linalg.thin(*layer.factors()) if layer.factored else linalg.trivial(matrix(layer.delta()))


def chosen_rows(height: int, rows: int | None, seed: int, module: str) -> list[int] | None:
    """Choose a random subset of rows, which depends on the seed and the module's name only; None for all rows."""
    if rows is None or rows >= height:
        return None
    import numpy as np

    chosen = np.random.default_rng([seed, zlib.crc32(module.encode())]).choice(height, rows, replace=False)
    return sorted(chosen.tolist())


def _above_chance(overlap: float, rank: int, size: int) -> float:
    """Rescale an overlap so that 0 is that of random subspaces."""
    chance = rank / size
    return max(overlap - chance, 0.0) / (1 - chance) if chance < 1 else 0.0
