"""Merging a module: from the LoRAs' layers to one layer of the planned rank.

The loop over modules is in `files.storage.writer` for a file, where workers share it, and in `LoRA.in_memory` otherwise:
both ask the merged LoRA for one module after the other, and that calls a `Merger`.
"""

import math
import mmap
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import linalg
from ..errors import MergeError, computing
from ..files.lora import LoRA, checked
from ..layers import Full, Layer, LowRank, low_rank
from ..layers.base import in_one_library, matrix
from ..tensors import float32, largest_rank, times
from .fused import Join, apart, lost_by, one, side_by_side
from .methods import Method
from .methods.base import Merged, applied
from .methods.linear import linear
from .methods.selection import Streams, module_seed
from .methods.spaces import InSpace
from .methods.vectors import plus_biases, vectors
from .steps import Step
from .weights import ModuleWeights

if TYPE_CHECKING:
    from ..checkpoints.models import Checkpoint


@dataclass(frozen=True)
class Outcome:
    """One module's merged layer, and the energy that was lost by cutting it to its rank."""

    module: str
    layer: Layer
    energy: float | None
    """‖ΔW‖² of the method's result before the cut; None in a merge that cuts nothing."""
    lost: float
    """The part of ‖ΔW‖² that was cut off."""


class Kept:
    """A count of the energy that a merge keeps and loses, made while it runs: ``plan.lora(kept)``.

    The numbers are in memory that forked workers share.

    Args:
        modules: The plan's modules, ``plan.steps``.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._places = {module: 2 * i for i, module in enumerate(modules)}
        self._numbers = memoryview(mmap.mmap(-1, 16 * max(1, len(self._places)))).cast("d")

    def add(self, outcome: Outcome) -> None:
        """Count a module."""
        place = self._places[outcome.module]
        self._numbers[place], self._numbers[place + 1] = outcome.energy or 0.0, outcome.lost

    @property
    def energy(self) -> float:
        """‖ΔW‖² of the method's result before the cut, over all modules."""
        return math.fsum(self._numbers[::2])

    @property
    def lost(self) -> float:
        """The part of ‖ΔW‖² that was cut off."""
        return math.fsum(self._numbers[1::2])

    @property
    def errors(self) -> dict[str, float]:
        """The relative error of every module that was cut."""
        pairs = {module: (self._numbers[i], self._numbers[i + 1]) for module, i in self._places.items()}
        return {module: relative_error(energy, lost) for module, (energy, lost) in pairs.items() if lost}

    @property
    def error(self) -> float:
        """‖ΔW − kept‖ / ‖ΔW‖ over all modules."""
        return relative_error(self.energy, self.lost)

    @property
    def share(self) -> float:
        """The share of ‖ΔW‖² that was kept."""
        return 1.0 - self.error**2

    def told(self) -> str | None:
        """Say in a line what was kept; None if nothing was cut."""
        if not self.errors:
            return None
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"kept {100 * self.share:.4g} % of the energy: relative error {100 * self.error:.3g} %, "
            f"largest {100 * self.errors[worst]:.3g} % in {worst}"
        )


def relative_error(energy: float | None, lost: float) -> float:
    """Compute ‖ΔW − kept‖ / ‖ΔW‖ from ‖ΔW‖² and the part of it that was cut off."""
    return math.sqrt(lost / energy) if energy else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Merger:
    """Merges the modules of a plan, each when it is asked for."""

    loras: Sequence[LoRA]
    method: Method
    options: Mapping[str, Any]
    weights: ModuleWeights
    steps: Mapping[str, Step]
    joins: Mapping[str, Join]
    """The modules that the dialect writes as one weight, by each of them."""
    dense: Set[str]
    """Modules whose dense result is written as it is."""
    measured: bool
    """True if ‖ΔW‖ of every module is computed, because some are cut."""
    promised: bool
    """True if a budget limits the error, which is that of a cut: a method gets the rank that the budget chose within."""
    device: str | None
    base: "Checkpoint | None"

    def outcome(self, module: str) -> Outcome:
        """Merge one module and bring it to its rank."""
        join, step = self.joins.get(module), self.steps[module]
        with computing(module):
            if join is not None and join.as_one:
                return self._cut_as_one(join)[module]
            layers = self.inputs(module)
            if nearest := self._nearest(step, layers):
                return nearest
            made = self._uncut(step, layers)
            if step.kept or step.rankless or step.module in self.dense:
                return Outcome(module, made, made.norm() ** 2 if self.measured and not step.rankless else None, 0.0)
            return _fitted(_merged(made), step, self.measured)

    def _nearest(self, step: Step, layers: Sequence[Layer]) -> Outcome | None:
        """Cut a layer that is alone by its kind's own way, if it has one: LoKr's forms no large matrix."""
        layer = layers[0]
        nearest = layer.nearest(step.rank) if step.alone and step.cut else None
        if nearest is None:
            return None
        up, down, values = nearest
        squares = linalg.as_numpy(values).astype("float64") ** 2
        weight = self.weights.of(step.module)[step.inputs[0]]
        bias = None if layer.diff_b is None else times(float32(layer.diff_b), weight)
        found = low_rank(times(up, weight), down, step.shape, diff_b=bias).padded(step.rank)
        energy, lost = (float(part.sum()) * weight**2 for part in (squares, squares[step.rank :]))
        return Outcome(step.module, found, energy, lost)

    def _cut_as_one(self, join: Join) -> dict[str, Outcome]:
        """Merge and cut modules that are one weight; the last outcomes are kept, as each module asks for them in turn."""
        made = self._recent.get(join.modules)  # once: another thread may clear it
        if made is None:
            made = self._outcomes(join)
            self._recent.clear()
            self._recent[join.modules] = made
        return made

    @cached_property
    def _recent(self) -> dict[tuple[str, ...], dict[str, Outcome]]:
        return {}

    def _outcomes(self, join: Join) -> dict[str, Outcome]:
        layers = self.uncut_parts(join)
        whole = _fitted(self.joined(join, layers), join.step, join.cut or self.measured)
        assert isinstance(whole.layer, LowRank)
        parts = apart(join, whole.layer, layers)
        if whole.energy is None:
            return {m: Outcome(m, part, None, 0.0) for m, part in parts.items()}
        shares = lost_by(layers, list(parts.values()))
        return {m: Outcome(m, part, *share) for (m, part), share in zip(parts.items(), shares, strict=True)}

    def joined(self, join: Join, layers: Sequence[Merged]) -> Merged:
        """Merge the modules of a join into one weight, before it is cut.

        Args:
            join: The modules.
            layers: Those of `uncut_parts`; an exact join doesn't use them.
        """
        if not join.exact:
            return one(join, layers)
        found: dict[int, dict[str, LowRank]] = {}
        for module in join.modules:
            with computing(module):
                weights = self._weights_of(module)
                for i, layer in zip(self.steps[module].inputs, self.inputs(module), strict=True):
                    if not layer.bias_only:
                        part = linear.merge([layer], [weights[i]])
                        assert isinstance(part, LowRank)
                        found.setdefault(i, {})[module] = part
        return side_by_side(join, list(found.values()))

    def uncut_parts(self, join: Join) -> list[Merged]:
        """Merge every module of a join, before the whole is cut."""
        found = []
        rank = self._most(join)
        for module in join.modules:
            with computing(module):
                step = self.steps[module]
                # A method that fills its rank gets a share of it, so that the parts together fit into the whole's rank.
                most = step.rank if rank >= join.apart_rank else max(1, rank // len(join.modules))
                found.append(_merged(self.uncut(replace(step, rank=most, alone=False))))
        return in_one_library(found)

    def _most(self, weight: Step | Join) -> int:
        """Return the rank that a method fills, if it fills one."""
        return weight.sought if self.promised and weight.sought else weight.rank

    def uncut(self, step: Step) -> Layer:
        """Merge a module by the method, before it is brought to the planned rank."""
        made = self._uncut(step, self.inputs(step.module))
        return made.as_product() if isinstance(made, InSpace) else made

    def _uncut(self, step: Step, layers: Sequence[Layer]) -> Layer:
        weights = self._weights_of(step.module)
        pairs = [(layer, weights[i], i) for layer, i in zip(layers, step.inputs, strict=True)]
        if step.kept:
            return scaled_layer(*pairs[0][:2])
        counted = pairs[:1] if self.method.of_first else pairs
        if step.rankless:
            return vectors([layer for layer, _, _ in counted], [weight for _, weight, _ in counted])
        weighed, shares, inputs = zip(*[pair for pair in pairs if not pair[0].bias_only], strict=True)
        biases = [pair for pair in counted if pair[0].bias_only]
        merged = self._by_method(step, weighed, shares, inputs)
        return plus_biases(merged, [layer for layer, _, _ in biases], [weight for _, weight, _ in biases])

    def _weights_of(self, module: str) -> Sequence[Any]:
        """Return the weights of a module; those that no header tells are checked here, as the others are by the plan.

        Raises:
            MergeError: The method doesn't take them.
        """
        weights = self.weights.of(module)
        if self.weights.deferred and self.method.allows:
            self.method.allows([weights[i] for i in self.steps[module].inputs])
        return weights

    def _by_method(
        self, step: Step, layers: Sequence[Layer], weights: Sequence[Any], inputs: tuple[int, ...]
    ) -> Merged:
        options = dict(self.options)
        if "seed" in options:
            options["seed"] = Streams(module_seed(options["seed"], step.module), inputs)
        if self.method.ranked:
            options["most"] = self._most(step)
        return applied(self.method, layers, list(weights), options, step.full_rank)

    def inputs(self, module: str) -> list[Layer]:
        """Return the module's layers as they are merged: those that depend on the base as their whole ΔW."""
        step = self.steps[module]
        return in_one_library([self._with_base(checked(self.loras[i], module), step) for i in step.inputs], self.device)

    def _with_base(self, layer: Layer, step: Step) -> Layer:
        """Return the layer, or its whole ΔW if that depends on the base's weight."""
        if not layer.needs_base or self.base is None:
            return layer
        from ..checkpoints.models import on_base

        return on_base(layer, step.module, self.base)


def scaled_layer(layer: Layer, weight: float) -> Layer:
    """Scale a layer that is alone and keeps its kind."""
    scaled = layer.times(weight)
    if scaled is None:
        raise MergeError(f"a {layer.kind} layer can't be scaled and keep its kind")
    return scaled


def _merged(layer: Layer) -> Merged:
    assert isinstance(layer, Merged)
    return layer


def _fitted(layer: Merged, step: Step, measured: bool) -> Outcome:
    """Bring a merged layer to exactly the planned rank, which the layout announced: cut it, or pad it with zeros."""
    if isinstance(layer, Full):
        cut = linalg.truncate_dense(matrix(layer.diff), step.rank, within=step.sought)
    elif isinstance(layer, InSpace):
        if step.rank >= layer.rank:
            return _fitted(layer.as_product(), step, measured)
        cut = layer.cut(step.rank)
    elif step.rank < layer.rank:
        cut = linalg.truncate(matrix(layer.up), matrix(layer.down), step.rank, exact=step.sought > 0)
    else:
        return Outcome(step.module, layer.padded(step.rank), layer.norm() ** 2 if measured else None, 0.0)
    fitted = low_rank(cut.up, cut.down, layer.shape, diff_b=layer.diff_b).padded(step.rank)
    # At the full rank of the matrix nothing is cut off; a measured loss would be rounding.
    lost = cut.lost if step.rank < largest_rank(step.shape) else 0.0
    return Outcome(step.module, fitted, cut.energy if measured else None, lost)
