"""Modules that a dialect writes as one fused weight, and that are therefore cut to a rank together.

The files of kohya and ComfyUI hold q, k and v of a FLUX block as one weight with one ``down``.  Each
cut by itself would have a ``down`` of its own, and the file three of them side by side; cut as the one
matrix [ΔW_q; ΔW_k; ΔW_v] = [up_q; up_k; up_v] @ down they share it, and the rank is what was asked for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .. import linalg
from ..files.architectures import ARCHITECTURES
from ..files.architectures.names import Parts
from ..files.dialects import DIALECTS, fuse
from ..files.dialects.base import table
from ..files.lora import LoRA
from ..layers import Full, Layer, LowRank, low_rank
from ..layers.base import dense_norm, in_one_library, matrix
from ..tensors import Array, Shape, concat, largest_rank
from .methods.base import Merged, shared_down
from .methods.linear import linear
from .ranks import Rank, rule
from .steps import Step


@dataclass(frozen=True)
class Join:
    """Modules of a merge that are one weight in the file."""

    parts: Parts
    """The weight's modules that are merged."""
    rows: tuple[int, ...]
    """Number of rows of each module."""
    columns: int
    apart_rank: int
    """Rank of the weight as written if each module is merged by itself."""
    full_rank: int
    """The smallest rank without loss: parts that share a ``down`` in an input share it in the result."""
    rank: int
    """Rank of the result."""
    exact: bool = False
    """True if the result before the cut is a concatenation of the inputs' own joined weights."""
    sought: int = 0
    """The rank that a budget chose within, see `Step.sought`."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(part.module for part in self.parts)

    @property
    def shape(self) -> Shape:
        """Shape of the fused weight: the modules one below the other."""
        return sum(self.rows), self.columns

    @property
    def as_one(self) -> bool:
        """True if the modules are merged as one matrix."""
        return self.rank < self.apart_rank

    @property
    def cut(self) -> bool:
        """True if the rank is smaller than that of the uncut result."""
        return self.rank < min(self.full_rank, *self.shape)

    @property
    def step(self) -> Step:
        """The step of the fused weight."""
        return Step(", ".join(self.modules), self.shape, (), (), self.full_rank, self.rank, sought=self.sought)


def joins_of(
    steps: Mapping[str, Step],
    loras: Sequence[LoRA],
    dialect: str,
    architecture: str | None,
    rank: Rank,
    *,
    keeps_down: bool,
    exact: bool,
) -> dict[str, Join]:
    """Find the joins of a dialect, by each of their modules.

    Args:
        steps: The step of every module.
        loras: The LoRAs that are merged.
        dialect: Name of the dialect that will be written.
        architecture: Name of the model family.
        rank: The rule that gives the rank, from the ranks that the joined weight has in each input.
        keeps_down: True if the method keeps a ``down`` that modules share.
        exact: True if the method's result is Σ wᵢ ΔWᵢ with the weights as they were given.
    """
    found: dict[str, Join] = {}
    for _, present in _weights(steps, dialect, architecture):
        if len(present) > 1:
            join = _join(present, [steps[part.module] for part in present], loras, rank, keeps_down, exact)
            found |= dict.fromkeys(join.modules, join)
    return found


def missing_rows(steps: Mapping[str, Step], dialect: str, architecture: str | None) -> dict[str, int]:
    """Count the rows of zeros that a dialect writes for the other modules of a weight, which have no factors.

    Args:
        steps: The step of every module.
        dialect: Name of the dialect that will be written.
        architecture: Name of the model family.

    Returns:
        The rows by each module of the weight that has factors.
    """
    shapes = ARCHITECTURES[architecture].shapes if architecture else {}
    found: dict[str, int] = {}
    for parts, present in _weights(steps, dialect, architecture):
        if 0 < len(present) < len(parts):
            first = present[0].module
            rows = sum(shapes[part.module][0] for part in parts if part not in present)
            # The LoRAs may be for a model of another width than the family's own.
            found |= dict.fromkeys((part.module for part in present), rows * steps[first].shape[0] // shapes[first][0])
    return found


def _weights(steps: Mapping[str, Step], dialect: str, architecture: str | None) -> Iterator[tuple[Parts, Parts]]:
    """Yield the parts of every weight that a dialect writes, and those of them that have factors."""
    names = table(DIALECTS[dialect].names, ARCHITECTURES[architecture]) if architecture else {}
    for parts in names.values():
        yield parts, tuple(part for part in parts if part.module in steps and not steps[part.module].rankless)


def _join(
    parts: Parts, steps: Sequence[Step], loras: Sequence[LoRA], rank: Rank, keeps_down: bool, exact: bool
) -> Join:
    rows, columns = tuple(step.shape[0] for step in steps), math.prod(steps[0].shape[1:])
    written = [min(step.rank if rank == "sum" else step.full_rank, largest_rank(step.shape)) for step in steps]
    same = keeps_down and len({_downs(step, loras) or step.module for step in steps}) == 1
    # A sum of a larger rank than its matrix can have is brought to that, and has a down of its own then.
    shared = same and all(step.kept or step.full_rank <= largest_rank(step.shape) for step in steps)
    apart = max(written) if shared else sum(written)
    inputs = dict.fromkeys(i for step in steps for i in step.inputs)
    ranks = [_input_rank(loras[i], steps, i) for i in inputs]
    plain = exact and not any(step.dense for step in steps)
    full = min(apart, sum(ranks)) if plain else apart
    if shared and all(step.kept and loras[step.inputs[0]].layout(step.module).kind != "lora" for step in steps):
        return Join(parts, rows, columns, full, full, full)  # written as the one LoHa or LoKr that it was
    if rank == "sum" and not any(step.cut for step in steps):
        wanted = full
    else:
        wanted = rule(rank)(ranks)
    return Join(parts, rows, columns, apart, full, max(1, min(wanted, full, sum(rows), columns)), plain)


def _downs(step: Step, loras: Sequence[LoRA]) -> object:
    """Return a key that identifies the ``down`` of a module's sum."""
    return shared_down([loras[i].layout(step.module) for i in step.inputs])


def _input_rank(lora: LoRA, steps: Sequence[Step], i: int) -> int:
    """Return the rank that the joined weight has, or would have, in an input."""
    layouts = [lora.layout(step.module) for step in steps if i in step.inputs]
    ranks: dict[object, int] = {}
    for n, layout in enumerate(layouts):
        name = shared_down([layout]) or n
        ranks[name] = max(ranks.get(name, 0), layout.rank or 0)
    return sum(ranks.values())


def side_by_side(join: Join, inputs: Sequence[Mapping[str, LowRank]]) -> LowRank:
    """Add the inputs' joined weights, each with the ``down`` that its parts share.

    Args:
        join: The modules.
        inputs: The layers of each input by module, already times their weights.
    """
    wholes = [_whole(join, {module: replace(layer, diff_b=None) for module, layer in each.items()}) for each in inputs]
    found = linear.merge(in_one_library(wholes), [1.0] * len(wholes))
    assert isinstance(found, LowRank)
    return found


def _whole(join: Join, layers: Mapping[str, Layer]) -> Layer:
    rows = dict(zip(join.modules, join.rows, strict=True))
    return fuse.fused(join.parts, layers, rows.__getitem__, lambda layer: layer)


def one(join: Join, layers: Sequence[Merged]) -> Merged:
    """Stack the modules' layers, one below the other, without their biases."""
    bare: list[Layer] = [replace(layer, diff_b=None) for layer in layers]
    if any(layer.dense for layer in bare):
        bare = [Full(diff=matrix(layer.delta())) for layer in bare]
    whole = _whole(join, dict(zip(join.modules, bare, strict=True)))
    assert isinstance(whole, LowRank | Full)
    return whole


def apart(join: Join, whole: LowRank, layers: Sequence[Layer]) -> dict[str, LowRank]:
    """Split the whole into the modules' parts, with the biases of their layers."""
    up, down = matrix(whole.up), matrix(whole.down)
    found, start = {}, 0
    for module, rows, layer in zip(join.modules, join.rows, layers, strict=True):
        part = up[start : start + rows]
        found[module] = low_rank(part, down, layer.shape, down_id(join), layer.diff_b)
        start += rows
    return found


def down_id(join: Join) -> tuple[str, ...]:
    """Return a key that identifies the ``down`` that the modules share."""
    return ("cut as one", *join.modules)


def lost_by(layers: Sequence[Layer], kept: Sequence[LowRank]) -> list[tuple[float, float]]:
    """Return each module's ‖ΔW‖², and the part of it that is missing in what is kept."""
    return [
        (layer.norm() ** 2, _missing(layer, *part.factors()) ** 2) for layer, part in zip(layers, kept, strict=True)
    ]


def _missing(layer: Layer, up: Array, down: Array) -> float:
    """Return ‖ΔW − up @ down‖."""
    if layer.dense:
        return dense_norm(matrix(layer.delta()) - up @ down)
    own_up, own_down = layer.factors()
    return linalg.norm(concat([own_up, -up], axis=1), concat([own_down, down]))
