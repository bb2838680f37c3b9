"""Several updates of one module side by side: what is measured of them, from the factors.

All comes from Gram matrices of the factors, but for the sign conflict, which needs values of ΔW
itself and streams blocks of rows.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from . import linalg
from .layers import Layer
from .linalg import Spectrum
from .measures import Alone, Pair, ratio
from .tensors import Array, namespace

BLOCK = 2**20
"""Values of ΔW that are formed at a time."""


class Updates:
    """Several updates of one module, with the Gram matrices of all their factors."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.factors = [layer.factors() for layer in layers]
        xp = self.xp = namespace(self.factors[0][0])
        self.ups = [xp.astype(up, xp.float64) for up, _ in self.factors]
        self.downs = [xp.astype(down, xp.float64) for _, down in self.factors]
        self.gram_up, self.gram_down = linalg.grams(xp.concat(self.ups, axis=1), xp.concat(self.downs, axis=0))
        ends = [0]
        for up, _ in self.factors:
            ends.append(ends[-1] + up.shape[1])
        self.parts = [slice(a, b) for a, b in pairwise(ends)]
        self.spectra: dict[int, Spectrum] = {}
        self.sums: dict[tuple[int, ...], Array] = {}
        own = [linalg.column_products(self.gram_up[p, p], d, d) for p, d in zip(self.parts, self.downs, strict=True)]
        self.lengths = [squares.clip(0.0) ** 0.5 for squares in own]

    @property
    def height(self) -> int:
        """Rows of ΔW."""
        return int(self.factors[0][0].shape[0])

    def spectrum(self, member: int) -> Spectrum:
        """The SVD of one of the updates."""
        if member not in self.spectra:
            part = self.parts[member]
            self.spectra[member] = linalg.spectrum(self.gram_up[part, part], self.gram_down[part, part])
        return self.spectra[member]

    def sigma(self, members: tuple[int, ...]) -> Array:
        """Singular values of the sum of some of the updates."""
        if len(members) == 1:
            return self.spectrum(members[0]).sigma
        if members not in self.sums:
            self.sums[members] = self._sigma(members)
        return self.sums[members]

    def _sigma(self, members: tuple[int, ...]) -> Array:
        rank = sum(self.downs[i].shape[0] for i in members)
        if rank > min(self.height, self.downs[0].shape[1]):  # ΔW is then smaller than its factors
            sides = [self.ups[i] for i in members], [self.downs[i] for i in members]
            return linalg.singular_values(self.xp.concat(sides[0], axis=1), self.xp.concat(sides[1], axis=0))
        return linalg.spectrum(*(self._some(gram, members) for gram in (self.gram_up, self.gram_down))).sigma

    def _some(self, gram: Array, members: tuple[int, ...]) -> Array:
        if len(members) == len(self.parts):
            return gram
        rows = [self.xp.concat([gram[self.parts[i], self.parts[j]] for j in members], axis=1) for i in members]
        return self.xp.concat(rows, axis=0)

    def inner(self, i: int, j: int) -> float:
        """⟨ΔWᵢ, ΔWⱼ⟩."""
        a, b = self.parts[i], self.parts[j]
        return float((self.gram_up[a, b] * self.gram_down[a, b]).sum())

    def alone(self, members: tuple[int, ...]) -> Alone:
        """The sum of some of the updates."""
        sigma = self.sigma(members)
        square = float((sigma**2).sum())
        return Alone(modules=1, square=square, spread=square * linalg.effective_rank(sigma))

    def pair(self, i: int, j: int, signs: Mapping[tuple[int, int], tuple[float, float]]) -> Pair:
        """What two of the updates have in common."""
        a, b = self.parts[i], self.parts[j]
        first, second = self.spectrum(i), self.spectrum(j)
        squares = self.alone((i,)).square, self.alone((j,)).square
        weight = math.sqrt(squares[0] * squares[1])
        inner = self.inner(i, j)
        outputs = linalg.overlap(self.gram_up[a, b], first.left, second.left)
        inputs = linalg.overlap(self.gram_down[a, b], first.right, second.right)
        larger = max(first.rank, second.rank)
        above = _above_chance(inputs, larger, self.downs[i].shape[1]) * _above_chance(outputs, larger, self.height)
        products = linalg.column_products(self.gram_up[a, b], self.downs[i], self.downs[j])
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
            columns=float(self.xp.sum(self.xp.abs(products))),
            column_weight=float((self.lengths[i] * self.lengths[j]).sum()),
            opposed=opposed,
            mass=mass,
            spread=self.alone((i, j)).spread,
        )

    def signs(self, rows: Sequence[int] | None) -> dict[tuple[int, int], tuple[float, float]]:
        """For each pair Σ |v₁| + |v₂|, of values with different signs and of all, in some rows or in all."""
        found = dict.fromkeys(combinations(range(len(self.factors)), 2), (0.0, 0.0))
        for deltas in self._dense(rows) if found else ():
            for i, j in found:
                opposed, mass = _signs(deltas[i], deltas[j])
                found[i, j] = found[i, j][0] + opposed, found[i, j][1] + mass
        return found

    def _dense(self, rows: Sequence[int] | None) -> Iterator[list[Array]]:
        """Blocks of rows of every ΔW."""
        count = self.height if rows is None else len(rows)
        step = max(1, BLOCK // int(self.downs[0].shape[1]))
        for start in range(0, count, step):
            part = slice(start, start + step)
            yield [(up[part] if rows is None else up[rows[part]]) @ down for up, down in self.factors]


def _signs(first: Array, second: Array) -> tuple[float, float]:
    xp = namespace(first)
    sizes = xp.abs(first) + xp.abs(second)
    # The sign of one, not its value: the product of two small values may be 0.
    opposed = xp.where(first * xp.sign(second) < 0, sizes, xp.zeros_like(sizes))
    return float(xp.sum(opposed, dtype=xp.float64)), float(xp.sum(sizes, dtype=xp.float64))


def chosen_rows(height: int, rows: int | None, seed: int, module: str) -> list[int] | None:
    """A random subset of rows: a module's depends on the seed and its name only."""
    if rows is None or rows >= height:
        return None
    import numpy as np

    chosen = np.random.default_rng([seed, zlib.crc32(module.encode())]).choice(height, rows, replace=False)
    return sorted(int(row) for row in chosen)


def _above_chance(overlap: float, rank: int, size: int) -> float:
    """An overlap from 0, that of random subspaces, to 1."""
    chance = rank / size
    return max(overlap - chance, 0.0) / (1 - chance) if chance < 1 else 0.0
