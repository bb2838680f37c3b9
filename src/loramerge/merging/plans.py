"""A merge as data, before any tensor is read; and the merge itself, one module at a time."""

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import linalg
from ..checkpoints.models import Checkpoint, on_base
from ..errors import OptionError, size
from ..files.dialects import DIALECTS
from ..files.families import alike
from ..files.lora import LoRA, agreed, in_one_library
from ..files.metadata import RECIPE, lasting
from ..files.storage.header import Awaited
from ..files.triggers import PHRASE, TAGS, joined
from ..files.writing import saved_size
from ..layers import ON_BASE, Full, Layer, LoKr, LowRank, bias_of, low_rank
from ..layers.base import matrix
from ..tensors import Spec, Tensor, code, float32, largest_rank, namespace, nbytes
from .fused import Join, apart, down_id, joins_of, lost_by, one, side_by_side
from .methods import Method
from .methods.base import Merged, applied, shared_down
from .methods.linear import linear
from .methods.selection import Streams, module_seed
from .methods.vectors import plus_biases, vectors
from .provenance import UNKNOWN, record
from .ranks import Budget, Rank, Spectrum, choose
from .steps import Step, named
from .weights import ModuleWeights, Scope

if TYPE_CHECKING:
    from ..files.storage.writer import Progress


@dataclass(frozen=True)
class Outcome:
    """One module's merged layer, and what bringing it to its rank took away."""

    module: str
    layer: Layer
    energy: float | None
    """‖ΔW‖² of the method's own result; None in a merge that cuts nothing."""
    lost: float
    """The part of it that was cut off."""

    @property
    def error(self) -> float:
        """‖ΔW − kept‖ / ‖ΔW‖."""
        return relative_error(self.energy, self.lost)


class Kept:
    """What a merge kept, counted while it runs: ``plan.lora(kept)``.

    It counts in memory that forked workers share.

    Args:
        modules: Those of the plan, ``plan.steps``.
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
        """‖ΔW‖² of what the method made, over all modules."""
        return math.fsum(self._numbers[::2])

    @property
    def lost(self) -> float:
        """The part of it that was cut off."""
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


def relative_error(energy: float | None, lost: float) -> float:
    """‖ΔW − kept‖ / ‖ΔW‖, from ‖ΔW‖² and the part of it that was cut off."""
    return math.sqrt(lost / energy) if energy else 0.0


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """What a merge will do.  `lora` is its result, computed when asked for."""

    loras: tuple[LoRA, ...]
    architecture: str | None
    method: Method
    options: Mapping[str, Any]
    weights: ModuleWeights
    rank: Rank
    steps: Mapping[str, Step]
    name: str
    dialect: str
    dtype: str
    device: str | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    budget: Budget | None = None
    """What the ranks were chosen out of."""
    base: Checkpoint | None = None
    """The base model, for layers whose ΔW depends on it."""
    given: tuple[LoRA, ...] = ()
    """The LoRAs as they were given, with the modules that ``exclude`` leaves out."""
    exclude: tuple[str, ...] = ()
    scope: Scope = "module"
    allow_growth: bool = False
    """Whether the result may take many times the room of what it is made of."""
    ranks: Mapping[str, int] | None = None
    """Every module's rank as it was chosen; for modules that are cut as one that of the whole."""

    def run(self) -> "Iterator[tuple[str, Layer]]":
        """Merge module by module: the caller's loop is the progress bar."""
        for module in self.steps:
            yield module, self.merge(module)

    def merge(self, module: str) -> Layer:
        """One module's merged layer."""
        return self.outcome(module).layer

    def outcome(self, module: str) -> Outcome:
        """One module's merged layer, and what was cut off to bring it to its rank."""
        join = self.joins.get(module)
        if join is not None and join.as_one:
            return self._cut_as_one(join)[module]
        step = self.steps[module]
        with named(module):
            if nearest := self._nearest(step):
                return nearest
            made = self._uncut(step)
            if step.kept or step.rankless or self._stays_dense(step):
                return Outcome(module, made, made.norm() ** 2 if self.cuts and not step.rankless else None, 0.0)
            return _fitted(_merged(made), step, self.cuts)

    def _nearest(self, step: Step) -> Outcome | None:
        """The cut of a LoKr that is alone: its singular values are products, and no large matrix is formed."""
        layer = self.inputs(step.module)[0] if step.alone and step.cut else None
        if not isinstance(layer, LoKr):
            return None
        up, down, values = layer.nearest(step.rank)
        squares = linalg.as_numpy(values).astype("float64") ** 2
        weight = self.weights.of(step.module)[step.inputs[0]]
        bias = None if layer.diff_b is None else float32(layer.diff_b) * weight
        found = low_rank(up * weight, down, step.shape, diff_b=bias)
        found = found if found.rank == step.rank else _filled(found, step.rank)
        energy, lost = (float(part.sum()) * weight**2 for part in (squares, squares[step.rank :]))
        return Outcome(step.module, found, energy, lost)

    def _stays_dense(self, step: Step) -> bool:
        """Whether a dense result is written as it is: factors of its rank would take no less room."""
        rows, columns = step.shape[0], math.prod(step.shape[1:])
        small = step.rank * (rows + columns) < rows * columns
        held = "full" in DIALECTS[self.dialect].holds or (isinstance(self.rank, str) and self.ranks is None)
        return step.dense and held and not small

    @cached_property
    def joins(self) -> Mapping[str, Join]:
        """The modules that the dialect writes as one weight, by each of them."""
        exact = self.method.linear and not self.weights.columns
        found = joins_of(self.steps, self.loras, self.dialect, self.architecture, exact, self.rank)
        if self.ranks is None:
            return found
        chosen = {join.modules: replace(join, rank=self.ranks[join.modules[0]]) for join in found.values()}
        return {module: chosen[join.modules] for module, join in found.items()}

    def rank_of(self, module: str) -> int:
        """The rank of a module's result; of modules that are joined that of the whole."""
        return self.joins[module].rank if module in self.joins else self.steps[module].rank

    def _cut_as_one(self, join: Join) -> dict[str, Outcome]:
        """The outcomes of modules that are one weight; the last ones are kept, as each module asks for them."""
        if join.modules not in self._recent:
            made = self._outcomes(join)
            self._recent.clear()
            self._recent[join.modules] = made
            return made
        return self._recent[join.modules]

    @cached_property
    def _recent(self) -> dict[tuple[str, ...], dict[str, Outcome]]:
        return {}

    def _outcomes(self, join: Join) -> dict[str, Outcome]:
        layers = self._uncut_parts(join)
        whole = _fitted(self._joined(join, layers), join.step, join.cut or self.cuts)
        assert isinstance(whole.layer, LowRank)
        parts = apart(join, whole.layer, layers)
        if whole.energy is None:
            return {m: Outcome(m, part, None, 0.0) for m, part in parts.items()}
        shares = lost_by(whole.lost, layers, list(parts.values()))
        return {m: Outcome(m, part, *share) for (m, part), share in zip(parts.items(), shares, strict=True)}

    def _joined(self, join: Join, layers: Sequence[Merged]) -> Merged:
        """All modules of a join as one, before it is cut."""
        if not join.exact:
            return one(join, layers)
        found: dict[int, dict[str, LowRank]] = {}
        for module in join.modules:
            weights = self.weights.of(module)
            for i, layer in zip(self.steps[module].inputs, self.inputs(module), strict=True):
                if layer.kind != "bias":
                    part = linear.merge([layer], [weights[i]])
                    assert isinstance(part, LowRank)
                    found.setdefault(i, {})[module] = part
        return side_by_side(join, list(found.values()))

    def _uncut_parts(self, join: Join) -> list[Merged]:
        found = []
        for module in join.modules:
            with named(module):
                # A method that makes the most of its rank gets a share of it, so that the parts fit into the whole.
                share = max(1, join.rank // len(join.modules))
                found.append(_merged(self._uncut(replace(self.steps[module], rank=share, alone=False))))
        return found

    def _uncut(self, step: Step) -> Layer:
        weights = self.weights.of(step.module)
        pairs = [(layer, weights[i], i) for layer, i in zip(self.inputs(step.module), step.inputs, strict=True)]
        if step.kept:
            return _handed_on(*pairs[0][:2])
        counted = pairs[:1] if self.method.of_first else pairs
        if step.rankless:
            return vectors([layer for layer, _, _ in counted], [weight for _, weight, _ in counted])
        layers, shares, inputs = zip(*[pair for pair in pairs if pair[0].kind != "bias"], strict=True)
        biases = [pair for pair in counted if pair[0].kind == "bias"]
        merged = self._by_method(step, layers, shares, inputs)
        return plus_biases(merged, [layer for layer, _, _ in biases], [weight for _, weight, _ in biases])

    def _by_method(
        self, step: Step, layers: Sequence[Layer], weights: Sequence[Any], inputs: tuple[int, ...]
    ) -> Merged:
        options = dict(self.options)
        if "seed" in options:
            options["seed"] = Streams(module_seed(options["seed"], step.module), inputs)
        if self.method.ranked:
            options["most"] = step.rank
        return applied(self.method, layers, list(weights), options, step.full_rank)

    def inputs(self, module: str) -> list[Layer]:
        """The module's layers as they are merged: a DoRA with the base's weight in it."""
        step = self.steps[module]
        return in_one_library([self._with_base(self.loras[i][module], step) for i in step.inputs], self.device)

    def _with_base(self, layer: Layer, step: Step) -> Layer:
        """The layer, or its whole ΔW where only the base's weight tells it."""
        if layer.kind not in ON_BASE or self.base is None:
            return layer
        return on_base(layer, step.module, self.base)

    @cached_property
    def cuts(self) -> bool:
        """Whether a module is cut to a smaller rank than the method's result has."""
        return any(map(self.is_cut, self.steps))

    def is_cut(self, module: str) -> bool:
        """Whether a module is brought to a smaller rank than the method's result has."""
        join = self.joins.get(module)
        return join.cut if join is not None and join.as_one else self.steps[module].cut

    def lora(self, kept: Kept | None = None) -> LoRA:
        """The result, whose layers are merged when they are asked for: saving it streams.

        Args:
            kept: Counts what bringing the modules to their ranks took away.
        """

        def compute(module: str) -> Layer:
            outcome = self.outcome(module)
            if kept:
                kept.add(outcome)
            return outcome.layer

        return LoRA(
            name=self.name,
            architecture=self.architecture,
            alike=alike(self.loras, self.architecture),
            dialect=self.dialect,
            style=self._style(),
            layouts={module: self._layout(step) for module, step in self.steps.items()},
            compute=compute,
            metadata=self._metadata(),
            about=agreed(self.loras),
            extras=self.extras,
            dtype=self.dtype,
            made_of=self.made_of,
        )

    @property
    def made_of(self) -> int | None:
        """Bytes of the inputs' tensors; None where the size of the result was chosen: by a rank, a budget, or in words."""
        chosen = not isinstance(self.rank, str) or self.ranks is not None or self.allow_growth
        return None if chosen else sum(_bytes(lora) for lora in self.loras)

    def _layout(self, step: Step) -> Layer:
        layouts = [self.loras[i].layout(step.module) for i in step.inputs]
        counted = layouts[:1] if self.method.of_first else layouts
        biased = any(bias_of(layout) is not None for layout in counted)
        bias = Spec(step.shape[:1], "F32") if biased else None
        join = self.joins.get(step.module)
        if join is None or not join.as_one:
            if step.kept:
                return _handed_on(layouts[0], self.weights.of(step.module)[step.inputs[0]])
            if step.rankless:
                return vectors(counted, [1.0] * len(counted))
            if self._stays_dense(step):
                return Full(diff=Spec(step.shape, "F32"), diff_b=bias)
        layouts = [layout for layout in layouts if layout.kind != "bias"]
        whole = step.rank >= step.full_rank
        shared = shared_down(layouts) if self.method.linear and whole and not self.weights.columns else None
        rank = step.rank
        if join is not None and join.as_one:
            rank, shared = join.rank, down_id(join)
        up = Spec((step.shape[0], rank), "F32")
        down = Spec((rank, math.prod(step.shape[1:])), "F32")
        return low_rank(up, down, step.shape, shared, bias)

    def within(self, budget: Budget, progress: "Progress | None" = None) -> "Plan":
        """The same plan with the rank of every module chosen out of one budget, at most the one it has.

        Raises:
            OptionError: The budget can't be met.
        """
        if all(step.rankless for step in self.steps.values()):
            raise OptionError(f"{budget}: no module has a rank that could be made smaller. Way out: no budget.")
        least = self._check_least(budget) if budget.kind == "max_size" else 0
        spectra: dict[str, Spectrum] = {}
        for done, (module, step) in enumerate(self.steps.items(), start=1):
            if self._first(module) == module and not step.rankless:
                spectra[module] = self._spectrum(module)
            if progress:
                progress(done, len(self.steps))
        if budget.kind != "max_size":
            return self.at(choose(spectra, budget), budget)
        # What is no factor (names, alphas) takes room too, and depends on the ranks a little.
        room, best = budget.value, None
        for _ in range(8):
            found = self.at(choose(spectra, budget, int(room // nbytes((1,), self.dtype))), budget)
            spare = budget.value - saved_size(found.lora())
            if best and spare >= 0 and found.ranked_size == best.ranked_size:
                break
            best = found if spare >= 0 else best
            room = max(found.ranked_size + spare, least)
        if best is None:
            raise OptionError(f"{budget}: can't be met in the dialect {self.dialect}. Way out: a larger size.")
        return best

    def _first(self, module: str) -> str:
        """The module that stands for those that it is joined with."""
        join = self.joins.get(module)
        return next(m for m in self.steps if m in join.modules) if join else module

    def _spectrum(self, module: str) -> Spectrum:
        """What each rank of a module would bring, or of all that are one weight with it."""
        join = self.joins.get(module)
        if join is not None:
            return _spectrum(self._joined(join, self._uncut_parts(join)), join.step)
        with named(module):
            return _spectrum(self._uncut(self.steps[module]), self.steps[module])

    def _check_least(self, budget: Budget) -> int:
        """Bytes of the factors at rank 1; a size that is too small for the file of them is refused, before any tensor is read."""
        smallest = self.at(dict.fromkeys(self.steps, 1), budget)
        least = saved_size(smallest.lora())
        if least > budget.value:
            narrower = ", or a dtype of 16 bits" if self.dtype in ("F32", "F64") else ""
            raise OptionError(
                f"{budget}: can't be met: at rank 1 in every module the file takes {size(least)} ({least} bytes) as "
                f"{self.dtype} in the dialect {self.dialect}. Way out: a size from {least} bytes on{narrower}."
            )
        return smallest.ranked_size

    def at(self, ranks: Mapping[str, int], budget: Budget | None) -> "Plan":
        """The same plan at ranks that were chosen before, out of a budget."""
        given = {module: ranks[self._first(module)] for module, step in self.steps.items() if not step.rankless}
        cut = {m: replace(self.steps[m], rank=rank) for m, rank in given.items() if m not in self.joins}
        steps = {m: cut.get(m, step) for m, step in self.steps.items()}
        return replace(self, steps=steps, budget=budget, ranks=given)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n} × {w}" for n, w in zip((x.name for x in self.loras), self.weights.label, strict=True))
        return f"Plan({inputs}; {self.method.name}, rank {self.rank}, {len(self.steps)} modules of {self.architecture})"

    @property
    def widest(self) -> int:
        """Bytes of the largest ΔW that is formed, as float32; 0 where all is done on factors."""
        formed = [s for s in self.steps.values() if not s.rankless and not s.kept]
        dense = [step.shape for step in formed if step.full_rank == largest_rank(step.shape)]
        return max((nbytes(shape, "F32") for shape in dense), default=0)

    @property
    def size(self) -> int:
        """Bytes of the result's tensors in the dtype that saving uses."""
        alone = [step for module, step in self.steps.items() if module not in self.joins]
        whole = [s for s in alone if s.kept or s.rankless or self._stays_dense(s)]
        left = sum(nbytes((s.shape[0] + math.prod(s.shape[1:]), s.rank), self.dtype) for s in whole if not s.rankless)
        kept = [self._layout(step).tensors().values() for step in whole]
        return self.ranked_size - left + sum(nbytes(t.shape, self.dtype) for tensors in kept for t in tensors)

    @property
    def ranked_size(self) -> int:
        """Bytes of factors of all the ranks."""
        joined = {join.modules: join.step for join in self.joins.values()}
        steps = [*(step for module, step in self.steps.items() if module not in self.joins), *joined.values()]
        return sum(nbytes((s.shape[0] + math.prod(s.shape[1:]), s.rank), self.dtype) for s in steps if not s.rankless)

    @property
    def recipe(self) -> dict[str, Any]:
        """The merge in words, as the saved file keeps it; hashing the inputs reads every tensor of theirs."""
        hashes = [lora.sha256 for lora in self.given]
        return record(self, hashes, self.base.sha256 if self.base and self.on_base else None)

    @property
    def on_base(self) -> bool:
        """Whether the result depends on the base's weights."""
        return any(self.loras[i].layout(s.module).kind in ON_BASE for s in self.steps.values() for i in s.inputs)

    def _metadata(self) -> Awaited:
        """Entries on which the inputs agree stay; where they differ, each input's own go into the recipe."""
        metadatas = [lasting(lora.metadata) for lora in self.loras]
        known = {k: v for k, v in metadatas[0].items() if k != RECIPE and all(m.get(k) == v for m in metadatas)}
        own = [{k: v for k, v in m.items() if k not in known or k in (PHRASE, TAGS)} for m in metadatas]
        base = UNKNOWN if self.base and self.on_base else None
        draft = _as_text(record(self, [UNKNOWN] * len(self.given), base), own)
        return Awaited(known | self._of_parents(), RECIPE, draft, lambda: _as_text(self.recipe, own))

    def _style(self) -> str:
        """The style that all inputs have in the dialect."""
        styles = {lora.style if lora.dialect == self.dialect else "" for lora in self.loras}
        return styles.pop() if len(styles) == 1 else ""

    def _of_parents(self) -> dict[str, str]:
        """What a merge's header says of all that it was made from."""
        used = {i for step in self.steps.values() for i in step.inputs}
        parents = [(lora.name, lora.metadata) for i, lora in enumerate(self.loras) if i in used]
        if len(parents) < 2:
            return {}
        found = joined(parents)
        if any(key.startswith("modelspec.") for _, metadata in parents for key in metadata):
            found["modelspec.merged_from"] = ", ".join(m.get("modelspec.title") or name for name, m in parents)
        return found


def _as_text(recipe: dict[str, Any], metadatas: Sequence[Mapping[str, str]]) -> str:
    """A recipe for a header, with the entries that each input alone had."""
    for entry, metadata in zip(recipe["inputs"], metadatas, strict=True):
        if metadata:
            entry["metadata"] = metadata
    return json.dumps(recipe, ensure_ascii=False)


def _bytes(lora: LoRA) -> int:
    """Bytes of a LoRA's tensors as they were read, or as they are."""
    if lora.made_of is not None:
        return lora.made_of
    return sum(nbytes(tuple(t.shape), code(t)) for layer in lora.layouts.values() for t in layer.tensors().values())


def _handed_on(layer: Layer, weight: float) -> Layer:
    found = layer.times(weight)
    assert found is not None
    return found


def _merged(layer: Layer) -> Merged:
    assert isinstance(layer, LowRank | Full)
    return layer


def _fitted(layer: Merged, step: Step, measured: bool) -> Outcome:
    """A merged layer at exactly the rank that was announced: cut, or filled up with zeros."""
    if isinstance(layer, Full):
        cut = linalg.truncate_dense(matrix(layer.diff), step.rank)
    elif step.rank < layer.rank:
        cut = linalg.truncate(matrix(layer.up), matrix(layer.down), step.rank)
    else:
        found = layer if layer.rank == step.rank else _filled(layer, step.rank)
        return Outcome(step.module, found, layer.norm() ** 2 if measured else None, 0.0)
    fitted = low_rank(cut.up, cut.down, layer.shape, diff_b=layer.diff_b)
    fitted = fitted if fitted.rank == step.rank else _filled(fitted, step.rank)
    # At the full rank of the matrix nothing is cut off, and what would be measured is rounding.
    lost = cut.lost if step.rank < largest_rank(step.shape) else 0.0
    return Outcome(step.module, fitted, cut.energy if measured else None, lost)


def _spectrum(layer: Layer, step: Step) -> Spectrum:
    """What each rank up to the step's own would bring."""
    if not isinstance(layer, LowRank | Full):
        squares = linalg.as_numpy(layer.spectrum(lambda: linalg.grams(*layer.factors())).sigma) ** 2
        energy = float(squares.sum())
    elif isinstance(layer, Full):
        cut = linalg.truncate_dense(matrix(layer.diff), step.rank)
        squares, energy = linalg.squares(cut.up, cut.down), cut.energy
    else:
        squares = linalg.squares(matrix(layer.up), matrix(layer.down))
        energy = float(squares.sum())
    return Spectrum(squares[: step.rank], energy, step.shape[0] + math.prod(step.shape[1:]))


def _filled(layer: LowRank, rank: int) -> LowRank:
    """The same ΔW at a larger rank, by zeros."""
    up, down = matrix(layer.up), matrix(layer.down)
    xp = namespace(up)
    more = rank - layer.rank
    up = xp.concat([up, xp.zeros((up.shape[0], more), dtype=up.dtype, device=up.device)], axis=1)
    down = xp.concat([down, xp.zeros((more, down.shape[1]), dtype=down.dtype, device=down.device)], axis=0)
    return low_rank(up, down, layer.shape, diff_b=layer.diff_b)
