"""A merge as data: what it will do in every module, and what its file will hold, before any tensor is read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..files.dialects import DIALECTS
from ..files.dialects.write import spell
from ..files.families import alike
from ..files.lora import LoRA, agreed
from ..files.metadata import RECIPE, lasting
from ..files.storage.header import Awaited
from ..files.thumbnails import PICTURES
from ..files.triggers import LICENCE, PHRASE, TAGS, joined
from ..files.writing import saved_size, tensors_size
from ..layers import Full, Layer, low_rank
from ..tensors import Spec, Tensor, code, largest_rank, nbytes
from .fused import Join, down_id, joins_of, missing_rows
from .methods import Method
from .methods.base import shared_down
from .methods.vectors import vectors
from .provenance import UNKNOWN, as_text, record
from .ranks import Budget, Rank
from .running import Kept, Merger, scaled_layer
from .steps import Step
from .weights import ModuleWeights

if TYPE_CHECKING:
    from ..checkpoints.models import Checkpoint


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A planned merge.  `lora` is its result, computed when asked for."""

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
    """The budget that the ranks were chosen for."""
    base: "Checkpoint | None" = None
    """The base model, for layers whose ΔW depends on it."""
    given: tuple[LoRA, ...] = ()
    """The LoRAs as they were given, with the modules that ``exclude`` leaves out."""
    exclude: tuple[str, ...] = ()
    allow_growth: bool = False
    """True if the result may be more than ten times as large as the inputs."""
    cut_as: str | None = None
    """The dialect whose joined weights are cut as one; None for that of the plan."""
    allow_lossy: bool = False
    """True if what the dialect can't hold will be left out of the file, so that it has no part in the sizes."""
    ranks: Mapping[str, int] | None = None
    """The chosen rank of every module; for modules that are cut as one, the rank of the whole."""

    def _stays_dense(self, step: Step) -> bool:
        """Return whether a dense result is written as it is, because factors of its rank would not be smaller."""
        if not step.dense:
            return False
        rows, columns = step.shape[0], math.prod(step.shape[1:])
        small = step.rank * (rows + columns) < rows * columns
        held = "full" in DIALECTS[self.dialect].holds or (isinstance(self.rank, str) and self.ranks is None)
        return held and not small

    @cached_property
    def joins(self) -> Mapping[str, Join]:
        """The modules that the dialect writes as one weight, by each of them."""
        keeps = self.method.linear and not self.weights.columns
        found = joins_of(
            self.steps,
            self.loras,
            self.cut_as or self.dialect,
            self.architecture,
            self.rank,
            keeps_down=keeps,
            exact=keeps and self.method.name == "linear",  # others choose the coefficients of their sum
        )
        if self.ranks is None:
            return found
        chosen = {
            join.modules: replace(join, rank=self.ranks[join.modules[0]], sought=join.rank) for join in found.values()
        }
        return {module: chosen[join.modules] for module, join in found.items()}

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's result; for modules that are joined, the rank of the whole."""
        return self.joins[module].rank if module in self.joins else self.steps[module].rank

    @cached_property
    def merger(self) -> Merger:
        """The merger of the plan's modules, which merges each when it is asked for."""
        return Merger(
            loras=self.loras,
            method=self.method,
            options=self.options,
            weights=self.weights,
            steps=self.steps,
            joins=self.joins,
            dense={module for module, step in self.steps.items() if self._stays_dense(step)},
            measured=self.cuts,
            promised=self.budget is not None and self.budget.kind != "max_size",
            device=self.device,
            base=self.base,
        )

    @cached_property
    def cuts(self) -> bool:
        """True if any module is cut to a smaller rank than the method's result has."""
        return any(map(self.is_cut, self.steps))

    def is_cut(self, module: str) -> bool:
        """Return whether a module is cut to a smaller rank than the method's result has."""
        join = self.joins.get(module)
        return join.cut if join is not None and join.as_one else self.steps[module].cut

    def lora(self, kept: Kept | None = None) -> LoRA:
        """Return the result, whose layers are merged when they are asked for, so that saving it streams.

        Args:
            kept: Counts how much of ΔW is kept when modules are cut to their ranks.
        """

        def compute(module: str) -> Layer:
            outcome = self.merger.outcome(module)
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
            source_bytes=self.source_bytes,
        )

    @property
    def source_bytes(self) -> int | None:
        """Bytes of the inputs' tensors; None if a rank, a budget or `allow_growth` sets the size of the result."""
        chosen = not isinstance(self.rank, str) or self.ranks is not None or self.allow_growth
        return None if chosen else sum(_bytes(lora) for lora in self.loras)

    def _layout(self, step: Step) -> Layer:
        layouts = [self.loras[i].layout(step.module) for i in step.inputs]
        counted = layouts[:1] if self.method.of_first else layouts
        biased = any(layout.delta_bias() is not None for layout in counted)
        bias = Spec(step.shape[:1], "F32") if biased else None
        join = self.joins.get(step.module)
        if join is None or not join.as_one:
            if step.kept:
                return scaled_layer(layouts[0], self.weights.of(step.module)[step.inputs[0]])
            if step.rankless:
                return vectors(counted, [1.0] * len(counted))
            if self._stays_dense(step):
                return Full(diff=Spec(step.shape, "F32"), diff_b=bias)
        layouts = [layout for layout in layouts if not layout.bias_only]
        whole = step.rank >= step.full_rank
        shared = shared_down(layouts) if self.method.linear and whole and not self.weights.columns else None
        rank = step.rank
        if join is not None and join.as_one:
            rank, shared = join.rank, down_id(join)
        up = Spec((step.shape[0], rank), "F32")
        down = Spec((rank, math.prod(step.shape[1:])), "F32")
        return low_rank(up, down, step.shape, shared, bias)

    def first(self, module: str) -> str:
        """Return the module that represents those that this one is joined with."""
        join = self.joins.get(module)
        return self._firsts[join.modules] if join else module

    @cached_property
    def _firsts(self) -> Mapping[tuple[str, ...], str]:
        """The first module of every join, in the order of the steps."""
        firsts: dict[tuple[str, ...], str] = {}
        for module in self.steps:
            if module in self.joins:
                firsts.setdefault(self.joins[module].modules, module)
        return firsts

    def at(self, ranks: Mapping[str, int], budget: Budget | None) -> "Plan":
        """Return the same plan at given ranks, which were chosen for a budget."""
        given = {module: ranks[self.first(module)] for module, step in self.steps.items() if not step.rankless}
        alone = {m: self.steps[m] for m in given if m not in self.joins}
        cut = {m: replace(step, rank=given[m], sought=step.rank) for m, step in alone.items()}
        steps = {m: cut.get(m, step) for m, step in self.steps.items()}
        return replace(self, steps=steps, budget=budget, ranks=given)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n} × {w}" for n, w in zip((x.name for x in self.loras), self.weights.label, strict=True))
        return f"Plan({inputs}; {self.method.name}, rank {self.rank}, {len(self.steps)} modules of {self.architecture})"

    @property
    def widest(self) -> int:
        """Bytes of the largest ΔW that is formed, as float32; 0 if everything is done on factors."""
        formed = [s for s in self.steps.values() if not s.rankless and not s.kept]
        dense = [step.shape for step in formed if step.full_rank == largest_rank(step.shape)]
        return max((nbytes(shape, "F32") for shape in dense), default=0)

    @property
    def size(self) -> int:
        """Bytes of the result's tensors as they are saved.

        Raises:
            DialectError: The plan's dialect can't hold them.
        """
        return tensors_size(spell(self.lora(), allow_lossy=self.allow_lossy))

    @property
    def file_size(self) -> int:
        """Bytes of the file that the result is saved as, with its header.

        Raises:
            DialectError: The plan's dialect can't hold the tensors.
        """
        return saved_size(self.lora(), allow_lossy=self.allow_lossy)

    @property
    def ranked_size(self) -> int:
        """Bytes that the factors take at the planned ranks."""
        ranked = {self.first(module) for module, step in self.steps.items() if not step.rankless}
        return sum(nbytes((self.cost_of(module), self.rank_of(module)), self.dtype) for module in ranked)

    def cost_of(self, module: str) -> int:
        """Return the count of numbers that one more rank of a module takes in the file; of its join, if it has one."""
        shape = self.joins[module].shape if module in self.joins else self.steps[module].shape
        return shape[0] + math.prod(shape[1:]) + self._missing.get(module, 0)

    @cached_property
    def _missing(self) -> Mapping[str, int]:
        return missing_rows(self.steps, self.dialect, self.architecture)

    @property
    def recipe(self) -> dict[str, Any]:
        """The record of the merge that the saved file holds; to hash the inputs, all their tensors are read."""
        hashes = [lora.sha256 for lora in self.given]
        return record(self, hashes, self.base.sha256 if self.base and self.on_base else None)

    @property
    def on_base(self) -> bool:
        """True if the result depends on the base's weights."""
        return any(self.loras[i].layout(s.module).needs_base for s in self.steps.values() for i in s.inputs)

    def _metadata(self) -> Awaited:
        """Return the metadata: entries on which all used inputs agree; the others go into the record, per input."""
        metadatas = [lasting(lora.metadata) for lora in self.given]
        first, *others = [metadatas[i] for i in self._used]
        known = {k: v for k, v in first.items() if k != RECIPE and all(m.get(k) == v for m in others)}
        # A picture shows what its own LoRA does, and is large.
        apart = [{k: v for k, v in m.items() if known.get(k) != v or k in (PHRASE, TAGS, LICENCE)} for m in metadatas]
        own = [{k: v for k, v in m.items() if k not in PICTURES} for m in apart]
        base = UNKNOWN if self.base and self.on_base else None
        draft = as_text(record(self, [UNKNOWN] * len(self.given), base), own)
        return Awaited(known | self._of_parents(), RECIPE, draft, lambda: as_text(self.recipe, own))

    @cached_property
    def _used(self) -> list[int]:
        """The places of the inputs that have a part in the result."""
        return sorted({i for step in self.steps.values() for i in step.inputs})

    def _style(self) -> str:
        """Return the style that all inputs have in the dialect, or an empty text if they differ."""
        styles = {lora.style if lora.dialect == self.dialect else "" for lora in self.loras}
        return styles.pop() if len(styles) == 1 else ""

    def _of_parents(self) -> dict[str, str]:
        """Return the metadata that describe several parents together: trigger words, tags, titles."""
        parents = [(self.loras[i].name, self.loras[i].metadata) for i in self._used]
        if len(parents) < 2:
            return {}
        found = joined(parents)
        if any(key.startswith("modelspec.") for _, metadata in parents for key in metadata):
            found["modelspec.merged_from"] = ", ".join(m.get("modelspec.title") or name for name, m in parents)
        return found


def _bytes(lora: LoRA) -> int:
    """Return the bytes of a LoRA's tensors as they were read, or as they are in memory."""
    if lora.source_bytes is not None:
        return lora.source_bytes
    return sum(nbytes(tuple(t.shape), code(t)) for layer in lora.layouts.values() for t in layer.tensors().values())
