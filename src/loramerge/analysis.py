"""What LoRAs share and where they fight, before they are merged.

Every measure of a module comes from the Gram matrices of the factors, but for the sign
conflict, which needs values of ΔW itself and streams blocks of rows.  What is kept of a module
are sums, so that the measures of a block are those of its modules together.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import combinations, pairwise
from typing import Any, TypeVar

from . import blocks, linalg
from .errors import LoRAMergeError, MergeError, NoFactorsError, OptionError
from .files import Source, open
from .layers import FACTORED, Layer
from .linalg import Spectrum
from .lora import LoRA, in_one_library
from .tensors import Array, namespace

ROWS = 64
"""Rows of a module that the sign conflict is estimated from."""

BLOCK = 2**20
"""Values of ΔW that are formed at a time."""


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One update, in a module or in several."""

    modules: int = 0
    square: float = 0.0
    """‖ΔW‖²."""
    spread: float = 0.0
    """Σ ‖ΔW‖² · effective rank."""

    @property
    def norm(self) -> float:
        """‖ΔW‖ in Frobenius norm, over all the modules."""
        return math.sqrt(self.square)

    @property
    def effective_rank(self) -> float:
        """Effective rank of ΔW (`linalg.effective_rank`), a mean over modules weighted by their ‖ΔW‖²."""
        return _ratio(self.spread, self.square)

    def to_dict(self) -> dict[str, Any]:
        """The measures by name."""
        return {"modules": self.modules, "norm": self.norm, "effective_rank": self.effective_rank}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two updates ΔW₁ and ΔW₂, in the modules that both change.

    Means over modules are weighted by ‖ΔW₁‖·‖ΔW₂‖: a module counts as much as the two can meet in it.
    """

    modules: int = 0
    first: float = 0.0
    """‖ΔW₁‖²."""
    second: float = 0.0
    """‖ΔW₂‖²."""
    inner: float = 0.0
    """⟨ΔW₁, ΔW₂⟩."""
    weight: float = 0.0
    """Σ ‖ΔW₁‖·‖ΔW₂‖."""
    inputs: float = 0.0
    outputs: float = 0.0
    clashes: float = 0.0
    columns: float = 0.0
    """Σ |⟨column, column⟩|."""
    column_weight: float = 0.0
    """Σ ‖column‖·‖column‖."""
    opposed: float = 0.0
    """Σ |v₁| + |v₂| over values v of different signs."""
    mass: float = 0.0
    """Σ |v₁| + |v₂|."""
    spread: float = 0.0
    """Σ ‖ΔW₁ + ΔW₂‖² · effective rank of the sum."""

    @property
    def cosine(self) -> float:
        """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖), in [−1, 1]."""
        return max(-1.0, min(1.0, _ratio(self.inner, math.sqrt(self.first * self.second))))

    @property
    def input_overlap(self) -> float:
        """Overlap of the row spaces (`linalg.overlap`), in [0, 1]: whether both act on the same inputs."""
        return _ratio(self.inputs, self.weight)

    @property
    def output_overlap(self) -> float:
        """Overlap of the column spaces, in [0, 1]: whether both write to the same outputs."""
        return _ratio(self.outputs, self.weight)

    @property
    def overlap(self) -> float:
        """Geometric mean of both overlaps: two updates meet only where inputs and outputs are the same."""
        return math.sqrt(self.input_overlap * self.output_overlap)

    @property
    def alignment(self) -> float:
        """Σ |⟨dₐ, d'ₐ⟩| / Σ ‖dₐ‖·‖d'ₐ‖ over the columns a of both ΔW, in [0, 1].

        It is the mean of ZipLoRA's |cos| of corresponding columns, weighted by the columns' norms, so that
        columns in which nothing happens don't count.

        Source:
            Shah et al., 2023, section 3.2, https://arxiv.org/abs/2311.13600
        """
        return min(_ratio(self.columns, self.column_weight), 1.0)

    @property
    def conflict(self) -> float:
        """Share of Σ |v₁| + |v₂| that lies in values with different signs, in [0, 1]; one half by chance."""
        return _ratio(self.opposed, self.mass)

    @property
    def clash(self) -> float:
        """Mean of √(overlaps above chance) · (1 − cosine) / 2, in [0, 1]: the same place, different things.

        An overlap o above that of random subspaces, c, is (o − c) / (1 − c).
        """
        return _ratio(self.clashes, self.weight)

    @property
    def sum_norm(self) -> float:
        """‖ΔW₁ + ΔW₂‖."""
        return math.sqrt(self.sum_square)

    @property
    def sum_square(self) -> float:
        """‖ΔW₁ + ΔW₂‖²."""
        return max(self.first + self.second + 2 * self.inner, 0.0)

    @property
    def sum_effective_rank(self) -> float:
        """Effective rank of ΔW₁ + ΔW₂."""
        return _ratio(self.spread, self.sum_square)

    def to_dict(self) -> dict[str, Any]:
        """The measures by name; None where no module is in both."""
        return {"modules": self.modules} | {name: getattr(self, name) if self.modules else None for name in MEASURES}


MEASURES = (
    "cosine",
    "input_overlap",
    "output_overlap",
    "alignment",
    "conflict",
    "clash",
    "sum_norm",
    "sum_effective_rank",
)
"""What a `Pair` can be asked."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """All LoRAs in a module, or in several."""

    name: str
    component: str
    block: str
    modules: int
    alone: tuple[Alone, ...]
    """One a LoRA, in order."""
    pairs: Mapping[tuple[int, int], Pair]
    """By the numbers of the two LoRAs, the smaller first."""
    together: Alone
    """The sum of all LoRAs, each with weight 1."""

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain data."""
        return {
            "name": self.name,
            "component": self.component,
            "block": self.block,
            "modules": self.modules,
            "loras": [alone.to_dict() for alone in self.alone],
            "pairs": [{"loras": list(pair), **found.to_dict()} for pair, found in self.pairs.items()],
            "sum": self.together.to_dict(),
        }


@dataclass(frozen=True)
class NotCompared:
    """A layer without a low-rank form, such as DoRA or a whole difference."""

    lora: int
    module: str
    kind: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """What LoRAs share, module by module."""

    names: tuple[str, ...]
    architecture: str | None
    rows: tuple[Row, ...]
    """One a module that can be compared."""
    not_compared: tuple[NotCompared, ...] = ()
    conflict_rows: int | None = ROWS
    """Rows of each module that the sign conflict was estimated from; None for all of them."""
    seed: int = 0

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.names)}; {len(self.rows)} modules of {self.architecture})"

    @property
    def letters(self) -> tuple[str, ...]:
        """A short name for each LoRA: a, b, c …"""
        return tuple(chr(ord("a") + i) if i < 26 else str(i + 1) for i in range(len(self.names)))

    @property
    def total(self) -> Row:
        """All modules together."""
        return _together("total", "", "", self.rows, len(self.names))

    def by_block(self) -> tuple[Row, ...]:
        """The modules of each block together, in the order in which data passes the blocks."""
        found = self.grouped(lambda row: f"{row.component} {row.block}")
        return tuple(sorted(found, key=lambda row: blocks.position(row.component, row.block)))

    def grouped(self, key: Callable[[Row], str]) -> tuple[Row, ...]:
        """The modules for which a function gives the same name, together."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return tuple(
            _together(name, rows[0].component, rows[0].block, rows, len(self.names)) for name, rows in groups.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "loras": list(self.names),
            "architecture": self.architecture,
            "conflict_rows": self.conflict_rows,
            "seed": self.seed,
            "total": self.total.to_dict(),
            "blocks": [row.to_dict() for row in self.by_block()],
            "modules": [row.to_dict() for row in self.rows],
            "not_compared": [
                {"lora": self.names[n.lora], "module": n.module, "kind": n.kind} for n in self.not_compared
            ],
        }


def compare(
    loras: Sequence[LoRA | Source],
    *,
    rows: int | None = ROWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare LoRAs of one model: norms, cosines, overlaps, sign conflict, by module and by block.

    Args:
        loras: Two LoRAs or more, or what `open` takes.  Tensors are read one module at a time.
        rows: Random rows of every module that the sign conflict is estimated from; None for all rows, exact
            and slow.  Nothing else depends on it.
        seed: Chooses the rows, together with the module's name.
        progress: Called with the number of modules done and of all.

    Raises:
        MergeError: A module has different shapes: the LoRAs are for different models.
        NoFactorsError: A LoRA has no layer that can be compared.
        OptionError: There are fewer than two LoRAs, or no rows.

    Example:
        >>> from loramerge.testing import random_lora
        >>> person, jersey = random_lora("sd15", seed=1), random_lora("sd15", seed=2)
        >>> round(abs(compare([person, jersey]).total.pairs[0, 1].cosine), 1)
        0.0
    """
    if isinstance(loras, str | LoRA) or not isinstance(loras, Sequence) or len(loras) < 2:
        raise OptionError("Give a list of two LoRAs or more, such as [a, b].")
    if rows is not None and rows < 1:
        raise OptionError(f"The sign conflict needs at least one row of each module, got {rows}.")
    with ExitStack() as stack:
        opened = [lora if isinstance(lora, LoRA) else stack.enter_context(open(lora)) for lora in loras]
        architecture = _checked(opened)
        modules = list(dict.fromkeys(m for lora in opened for m in lora if lora.layout(m).kind in FACTORED))
        found = []
        for module in modules:
            found.append(_row(opened, module, architecture, rows, seed))
            if progress:
                progress(len(found), len(modules))
    return Comparison(
        names=tuple(lora.name for lora in opened),
        architecture=architecture,
        rows=tuple(found),
        not_compared=tuple(_not_compared(opened)),
        conflict_rows=rows,
        seed=seed,
    )


def _checked(loras: Sequence[LoRA]) -> str | None:
    """The family of the LoRAs, which must be for one model."""
    for lora in loras:
        if not any(layout.kind in FACTORED for layout in lora.layouts.values()):
            why = next((layout.no_factors for layout in lora.layouts.values()), "it has no layer")
            raise NoFactorsError(f"{lora.name} can't be compared: none of its layers has a low-rank form; {why}.")
    for first, second in combinations(loras, 2):
        shared = [module for module in first if module in second]
        for module in shared:
            shapes = first.layout(module).shape, second.layout(module).shape
            if not _same_weight(*shapes):
                raise MergeError(
                    f"{module} has the shape {shapes[0]} in {first.name} and {shapes[1]} in {second.name}: "
                    "they were made for different models."
                )
        families = first.architecture, second.architecture
        if not shared and None not in families and families[0] != families[1]:
            raise MergeError(
                f"{first.name} is for {families[0]} and {second.name} for {families[1]}: there is nothing to compare."
            )
    return next((lora.architecture for lora in loras if lora.architecture), None)


def _same_weight(a: Sequence[int], b: Sequence[int]) -> bool:
    return not a or not b or (a[0] == b[0] and math.prod(a) == math.prod(b))


def _not_compared(loras: Sequence[LoRA]) -> Iterator[NotCompared]:
    for i, lora in enumerate(loras):
        for module, layout in lora.layouts.items():
            if layout.kind not in FACTORED:
                yield NotCompared(i, module, layout.kind)


def _row(loras: Sequence[LoRA], module: str, architecture: str | None, rows: int | None, seed: int) -> Row:
    present = [i for i, lora in enumerate(loras) if module in lora and lora.layout(module).kind in FACTORED]
    try:
        updates = _Updates(in_one_library([loras[i][module] for i in present]))
    except LoRAMergeError as error:
        raise type(error)(f"{module}: {error}") from None
    signs = updates.signs(_chosen_rows(updates.height, rows, seed, module))
    alone = [updates.alone((k,)) for k in range(len(present))]
    everyone = tuple(range(len(present)))
    return Row(
        name=module,
        component=module.partition(".")[0],
        block=blocks.block(module, architecture),
        modules=1,
        alone=tuple(alone[present.index(i)] if i in present else Alone() for i in range(len(loras))),
        pairs={
            (i, j): updates.pair(present.index(i), present.index(j), signs) if {i, j} <= {*present} else Pair()
            for i, j in combinations(range(len(loras)), 2)
        },
        together=updates.alone(everyone),
    )


class _Updates:
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
            clashes=weight * math.sqrt(above) * (1 - max(-1.0, min(1.0, _ratio(inner, weight)))) / 2,
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


def _chosen_rows(height: int, rows: int | None, seed: int, module: str) -> list[int] | None:
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


Sums = TypeVar("Sums", Alone, Pair)


def _added(kind: type[Sums], items: Iterable[Sums]) -> Sums:
    listed = list(items)
    return kind(**{field.name: sum(getattr(item, field.name) for item in listed) for field in fields(kind)})


def _together(name: str, component: str, block: str, rows: Sequence[Row], count: int) -> Row:
    return Row(
        name=name,
        component=component,
        block=block,
        modules=len(rows),
        alone=tuple(_added(Alone, (row.alone[i] for row in rows)) for i in range(count)),
        pairs={pair: _added(Pair, (row.pairs[pair] for row in rows)) for pair in combinations(range(count), 2)},
        together=_added(Alone, (row.together for row in rows)),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
