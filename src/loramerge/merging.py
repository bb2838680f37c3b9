"""A merge as data, before any tensor is read; and the merge itself, one module at a time."""

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from . import linalg
from .architectures import ARCHITECTURES
from .dialects import DIALECTS
from .errors import LoRAMergeError, MergeError, OptionError
from .files import Source, load, open
from .layers import Layer, LowRank, low_rank
from .layers.base import matrix
from .lora import LoRA, in_one_library
from .metadata import RECIPE, STALE
from .methods import METHODS, Method
from .methods.linear import shared_down
from .tensors import Shape, Spec, Tensor, nbytes, widest
from .weights import ModuleWeights, Scope, Weights, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

Rank = int | str


@dataclass(frozen=True)
class Step:
    """One module's merge."""

    module: str
    shape: Shape
    inputs: tuple[int, ...]
    """Which of the LoRAs have the module; in the others ΔW is zero."""
    ranks: tuple[int, ...]
    full_rank: int
    """Rank of the method's own result, before it is cut."""
    rank: int
    """Rank of the result."""

    @property
    def cut(self) -> bool:
        """Whether the result is cut to a smaller rank than it has."""
        return self.rank < min(self.full_rank, self.shape[0], math.prod(self.shape[1:]))


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

    def run(self) -> "Iterator[tuple[str, LowRank]]":
        """Merge module by module: the caller's loop is the progress bar."""
        for module in self.steps:
            yield module, self.merge(module)

    def merge(self, module: str) -> LowRank:
        """One module's merged layer, float32, scale folded in."""
        step = self.steps[module]
        try:
            layers = in_one_library([self.loras[i][module] for i in step.inputs], self.device)
            weights = self.weights.of(module)
            merged: LowRank = self.method.merge(layers, [weights[i] for i in step.inputs], **self.options)
            return _truncated(merged, step.rank)
        except LoRAMergeError as error:
            raise type(error)(f"{module}: {error}") from None

    def lora(self) -> LoRA:
        """The result, whose layers are merged when they are asked for: saving it streams."""
        return LoRA(
            name=self.name,
            architecture=self.architecture,
            dialect=self.dialect,
            layouts={module: self._layout(step) for module, step in self.steps.items()},
            compute=self.merge,
            metadata=self._metadata(),
            extras=self.extras,
            dtype=self.dtype,
        )

    def _layout(self, step: Step) -> LowRank:
        layouts = [self.loras[i].layout(step.module) for i in step.inputs]
        whole = step.rank >= step.full_rank
        down_id = shared_down(layouts) if self.method.name == "linear" and whole else None
        up = Spec((step.shape[0], step.rank), "F32")
        down = Spec((step.rank, math.prod(step.shape[1:])), "F32")
        layer = low_rank(up, down, step.shape, down_id)
        biased = any(layout.delta_bias() is not None for layout in layouts)
        return replace(layer, diff_b=Spec(step.shape[:1], "F32")) if biased else layer

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n} × {w}" for n, w in zip((x.name for x in self.loras), self.weights.label, strict=True))
        return f"Plan({inputs}; {self.method.name}, rank {self.rank}, {len(self.steps)} modules of {self.architecture})"

    @property
    def size(self) -> int:
        """Bytes of the result's tensors in the dtype that saving uses."""
        return sum(nbytes((s.shape[0] + math.prod(s.shape[1:]), s.rank), self.dtype) for s in self.steps.values())

    @property
    def recipe(self) -> dict[str, Any]:
        """The merge in words, as the saved file keeps it."""
        from . import __version__

        return {
            "loramerge": __version__,
            "method": self.method.name,
            "options": dict(self.options),
            "rank": self.rank,
            "inputs": [
                {"name": lora.name, "weight": label} for lora, label in zip(self.loras, self.weights.label, strict=True)
            ],
        }

    def _metadata(self) -> dict[str, str]:
        """Entries on which the inputs agree stay; where they differ, each input's own go into the recipe."""
        metadatas = [{k: v for k, v in lora.metadata.items() if k not in STALE} for lora in self.loras]
        common = {k: v for k, v in metadatas[0].items() if all(m.get(k) == v for m in metadatas)}
        recipe = self.recipe
        for entry, metadata in zip(recipe["inputs"], metadatas, strict=True):
            own = {k: v for k, v in metadata.items() if k not in common}
            if own:
                entry["metadata"] = own
        titles = [m.get("modelspec.title") or lora.name for m, lora in zip(metadatas, self.loras, strict=True)]
        if any(key.startswith("modelspec.") for m in metadatas for key in m):
            common["modelspec.merged_from"] = ", ".join(titles)
        return common | {RECIPE: json.dumps(recipe, ensure_ascii=False)}


def _truncated(layer: LowRank, rank: int) -> LowRank:
    if rank >= layer.rank:
        return layer
    up, down = linalg.truncate(matrix(layer.up), matrix(layer.down), rank)
    return replace(low_rank(up, down, layer.shape), diff_b=layer.diff_b)


def plan(
    loras: Sequence[LoRA | Source],
    *,
    weights: Weights = None,
    method: str = "linear",
    rank: Rank = "sum",
    scope: Scope = "module",
    exclude: Sequence[str] = (),
    device: str | None = None,
    **options: Any,
) -> Plan:
    """Plan a merge from headers only; the arguments are those of `merge`.

    Raises:
        MergeError: Families or shapes differ, or a layer has no low-rank form.
        OptionError: A weight, the rank, the method or an option is wrong.
    """
    opened = [lora if isinstance(lora, LoRA) else open(lora) for lora in _listed(loras)]
    if exclude:
        opened = _without(opened, [exclude] if isinstance(exclude, str) else exclude)
    if not any(opened):
        raise MergeError("Nothing to merge: give at least one LoRA with a module.")
    if device is not None:
        _check_device(device)
    chosen = METHODS[method]
    chosen.check(options)
    steps = _steps(opened, chosen, _rank_rule(rank))
    first = opened[0].dialect
    resolved = resolve(opened, weights, scope)
    for module in () if resolved.from_values else steps:
        resolved.of(module)  # a block vector may lack a module's block
    return Plan(
        loras=tuple(opened),
        architecture=_architecture(opened),
        method=chosen,
        options=options,
        weights=resolved,
        rank=rank if isinstance(rank, str) else operator.index(rank),
        steps=steps,
        name=" + ".join(lora.name for lora in opened),
        dialect=first if DIALECTS[first].writes or opened[0].architecture is None else "kohya",
        dtype=widest([layer.dtype for lora in opened for layer in lora.layouts.values()]),
        device=device,
        extras=_extras(opened),
    )


def merge(
    loras: Sequence[LoRA | Source],
    *,
    weights: Weights = None,
    method: str = "linear",
    rank: Rank = "sum",
    scope: Scope = "module",
    exclude: Sequence[str] = (),
    device: str | None = None,
    **options: Any,
) -> LoRA:
    """Merge LoRAs of one model family into one, whatever tool made each.

    Args:
        loras: LoRAs, or what `load` takes.
        weights: One weight a LoRA: a number (negative too), a table of patterns such as
            ``{"*": 0.8, "text_encoder": 0}``, or ``"lbw:1,0,…"``.  ``"uniform"`` (the default)
            is 1/N each, ``"l2"`` each LoRA's share of the norms.
        method: Name of a merge method.
        rank: ``"sum"`` is exact, ``"max"`` the largest of the inputs' ranks, a number that
            rank; a smaller one than the sum gives the nearest in Frobenius norm.
        scope: What ``"l2"`` takes the norms over: ``"module"``, ``"component"``, ``"whole"``.
        exclude: Glob patterns of modules to leave out.
        device: Where to compute, such as ``"cuda"``; the CPU with numpy by default.
        **options: The method's own.

    Returns:
        The merged LoRA, in memory.  To stream one to a file, save ``plan(…).lora()``.

    Raises:
        MergeError: Families or shapes differ, or a layer has no low-rank form.
        OptionError: A weight, the rank, the method or an option is wrong.
        NumberError: A value is NaN or infinite.

    Example:
        >>> from loramerge.testing import random_lora
        >>> person, jersey = random_lora("sd15", rank=4, seed=1), random_lora("sd15", rank=8, seed=2)
        >>> merge([person, jersey], weights=[0.7, 0.5]).summary("rank")
        'rank 12'
    """
    loaded = [lora if isinstance(lora, LoRA) else load(lora) for lora in _listed(loras)]
    planned = plan(
        loaded,
        weights=weights,
        method=method,
        rank=rank,
        scope=scope,
        exclude=exclude,
        device=device,
        **options,
    )
    return planned.lora().in_memory()


def _listed(loras: object) -> "Sequence[LoRA | Source]":
    if isinstance(loras, str | os.PathLike | LoRA) or not isinstance(loras, Sequence):
        raise OptionError(f"Give a list of LoRAs, such as [a, b]; got a {type(loras).__name__}.")
    return loras


def _without(loras: Sequence[LoRA], exclude: Sequence[str]) -> list[LoRA]:
    """The LoRAs without some modules; one of which nothing is left adds nothing."""
    kept = [lora.part(lora.others(*exclude)) for lora in loras]
    patterns = " or ".join(exclude)
    if all(len(now) == len(was) for now, was in zip(kept, loras, strict=True)):
        raise OptionError(f"No module matches the pattern {patterns}, such as {next(iter(loras[0]))}.")
    if not any(kept):
        raise OptionError(f"Nothing is left to merge: every module matches {patterns}.")
    return kept


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"Can't compute on the device {device!r}: {str(error).splitlines()[0]}") from None


def _steps(loras: Sequence[LoRA], method: Method, rule: "Callable[[Sequence[int]], int]") -> dict[str, Step]:
    steps = {}
    for module in dict.fromkeys(module for lora in loras for module in lora):
        inputs = tuple(i for i, lora in enumerate(loras) if module in lora)
        layouts = [_mergeable(loras[i], module) for i in inputs]
        shape = _common_shape([loras[i] for i in inputs], module)
        ranks = tuple(layout.rank or 0 for layout in layouts)
        try:
            full = method.rank(layouts)
        except MergeError as error:
            raise MergeError(f"{module}: {error}") from None
        limit = min(full, shape[0], math.prod(shape[1:]))
        steps[module] = Step(module, shape, inputs, ranks, full, max(1, min(rule(ranks), limit)))
    return steps


def _mergeable(lora: LoRA, module: str) -> Layer:
    layout = lora.layout(module)
    if layout.kind not in ("lora", "loha", "lokr"):
        raise MergeError(f"{lora.name}: {module} can't be merged: {layout.no_factors}.")
    return layout


def _common_shape(loras: Sequence[LoRA], module: str) -> Shape:
    first = loras[0].layout(module).shape
    for lora in loras[1:]:
        shape = lora.layout(module).shape
        if shape != first:
            raise MergeError(
                f"{module} has the shape {first} in {loras[0].name} and {shape} in {lora.name}: "
                "they were made for different models."
            )
    return first


def _architecture(loras: Sequence[LoRA]) -> str | None:
    """The family that all LoRAs fit; a file with few modules may fit several."""
    names = dict.fromkeys(lora.architecture for lora in loras)
    for name in names:
        if all(lora.architecture == name or (name and _fits(lora, name)) for lora in loras):
            return name
    listed = "; ".join(f"{lora.name} is for {lora.architecture or 'an unknown architecture'}" for lora in loras)
    raise MergeError(f"LoRAs of different model families can't be merged: {listed}.")


def _fits(lora: LoRA, architecture: str) -> bool:
    shapes = ARCHITECTURES[architecture].shapes
    return all(shapes.get(module) == lora.layout(module).shape for module in lora)


def _rank_rule(rank: Rank) -> "Callable[[Sequence[int]], int]":
    if isinstance(rank, str) and rank in ("sum", "max"):
        return sum if rank == "sum" else max
    number = 0 if isinstance(rank, str | bool) or not hasattr(rank, "__index__") else operator.index(rank)
    if number < 1:
        raise OptionError(f"The rank {rank!r} is none of: a number from 1, 'sum', 'max'.")
    return lambda ranks: number


def _extras(loras: Sequence[LoRA]) -> dict[str, Tensor]:
    """Tensors that belong to no layer, from all inputs; two of one name must be equal."""
    found: dict[str, Tensor] = {}
    for lora in loras:
        for key, tensor in lora.extras.items():
            if key in found and not _equal(found[key], tensor):
                raise MergeError(
                    f"Two of the LoRAs hold different tensors {key!r}, which belong to no layer and can't be merged. "
                    "Way out: remove one, or give them different names."
                )
            found[key] = tensor
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.read() == b.read()).all())
