"""A merge as data, before any tensor is read; and the merge itself, one module at a time."""

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import linalg
from .architectures import ARCHITECTURES
from .checkpoints import Checkpoint, open_checkpoint
from .dialects import DIALECTS
from .errors import LoRAMergeError, MergeError, OptionError
from .files import Source, load, open, saved_size
from .layers import Full, Layer, LowRank, low_rank
from .layers.base import matrix
from .layers.full import LEAVE_OUT
from .lora import LoRA, in_one_library
from .metadata import RECIPE, STALE
from .methods import METHODS, Method
from .methods.base import Merged
from .methods.linear import shared_down
from .provenance import UNKNOWN, record
from .ranks import Budget, Rank, Spectrum, budget, choose, rule
from .selection import module_seed
from .storage.awaited import Awaited
from .tensors import Array, Shape, Spec, Tensor, float32, namespace, nbytes, widest
from .weights import ModuleWeights, Scope, Weights, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from .storage.writer import Progress


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


@dataclass(frozen=True)
class Outcome:
    """One module's merged layer, and what bringing it to its rank took away."""

    module: str
    layer: LowRank
    energy: float | None
    """‖ΔW‖² of the method's own result; None in a merge that cuts nothing."""
    lost: float
    """The part of it that was cut off."""

    @property
    def error(self) -> float:
        """‖ΔW − kept‖ / ‖ΔW‖."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0


@dataclass
class Kept:
    """What a merge kept, counted while it runs: ``plan.lora(kept.add)``."""

    energy: float = 0.0
    lost: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    """The relative error of every module that was cut."""

    def add(self, outcome: Outcome) -> None:
        """Count a module."""
        self.energy += outcome.energy or 0.0
        self.lost += outcome.lost
        if outcome.lost:
            self.errors[outcome.module] = outcome.error

    @property
    def error(self) -> float:
        """‖ΔW − kept‖ / ‖ΔW‖ over all modules."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0

    @property
    def share(self) -> float:
        """The share of ‖ΔW‖² that was kept."""
        return 1.0 - self.error**2


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

    def run(self) -> "Iterator[tuple[str, LowRank]]":
        """Merge module by module: the caller's loop is the progress bar."""
        for module in self.steps:
            yield module, self.merge(module)

    def merge(self, module: str) -> LowRank:
        """One module's merged layer, float32, scale folded in."""
        return self.outcome(module).layer

    def outcome(self, module: str) -> Outcome:
        """One module's merged layer, and what was cut off to bring it to its rank."""
        step = self.steps[module]
        with _named(module):
            return _fitted(self._uncut(step), step, self.cuts)

    def _uncut(self, step: Step) -> Merged:
        layers = in_one_library([self._with_base(self.loras[i][step.module], step) for i in step.inputs], self.device)
        weights = self.weights.of(step.module)
        options = dict(self.options)
        if "seed" in options:
            options["seed"] = module_seed(options["seed"], step.module)
        if self.method.ranked:
            options["most"] = step.rank
        return self.method.merge(layers, [weights[i] for i in step.inputs], **options)

    def _with_base(self, layer: Layer, step: Step) -> Layer:
        """The layer, or its whole ΔW where only the base's weight tells it."""
        if layer.kind != "dora" or self.base is None:
            return layer
        weight = self.base.weight(step.module)
        like: Array = next(iter(layer.tensors().values()))
        weight = namespace(like).asarray(float32(weight).reshape(step.shape), device=like.device)
        delta = layer.delta_on(weight)
        return Full(diff=delta, diff_b=layer.delta_bias())

    @cached_property
    def cuts(self) -> bool:
        """Whether a module is cut to a smaller rank than the method's result has."""
        return any(step.cut for step in self.steps.values())

    def lora(self, record: "Callable[[Outcome], None] | None" = None) -> LoRA:
        """The result, whose layers are merged when they are asked for: saving it streams.

        Args:
            record: Called with every module's outcome; see `Kept`.
        """

        def compute(module: str) -> LowRank:
            outcome = self.outcome(module)
            if record:
                record(outcome)
            return outcome.layer

        return LoRA(
            name=self.name,
            architecture=self.architecture,
            dialect=self.dialect,
            layouts={module: self._layout(step) for module, step in self.steps.items()},
            compute=compute,
            here=record is not None,
            metadata=self._metadata(),
            extras=self.extras,
            dtype=self.dtype,
        )

    def _layout(self, step: Step) -> LowRank:
        layouts = [self.loras[i].layout(step.module) for i in step.inputs]
        whole = step.rank >= step.full_rank
        down_id = shared_down(layouts) if self.method.linear and whole and not self.weights.columns else None
        up = Spec((step.shape[0], step.rank), "F32")
        down = Spec((step.rank, math.prod(step.shape[1:])), "F32")
        layer = low_rank(up, down, step.shape, down_id)
        counted = layouts[:1] if self.method.of_first else layouts
        biased = any(layout.delta_bias() is not None for layout in counted)
        return replace(layer, diff_b=Spec(step.shape[:1], "F32")) if biased else layer

    def advice(self, progress: "Progress | None" = None) -> str:
        """What a comparison of the LoRAs says about merging them, in one sentence.

        Unlike the rest of a plan it reads the tensors; ``progress`` is called with the number of
        modules done and of all.
        """
        from .advice import advice
        from .analysis import compare

        return advice(compare(self.loras, progress=progress))

    def within(self, budget: Budget, progress: "Progress | None" = None) -> "Plan":
        """The same plan with the rank of every module chosen out of one budget, at most the one it has.

        Raises:
            OptionError: The budget can't be met.
        """
        if budget.kind == "max_size":
            self._check_least(budget)
        spectra = {}
        for done, (module, step) in enumerate(self.steps.items(), start=1):
            with _named(module):
                spectra[module] = _spectrum(self._uncut(step), step)
            if progress:
                progress(done, len(self.steps))
        if budget.kind != "max_size":
            return self.at(choose(spectra, budget), budget)
        # What is no factor (names, alphas) takes room too, and depends on the ranks a little.
        room, best = budget.value, None
        for _ in range(8):
            found = self.at(choose(spectra, budget, int(room // nbytes((1,), self.dtype))), budget)
            spare = budget.value - saved_size(found.lora())
            if best and spare >= 0 and found.size == best.size:
                break
            best = found if spare >= 0 else best
            room = found.size + spare
        if best is None:
            raise OptionError(f"{budget}: can't be met in the dialect {self.dialect}. Way out: a larger size.")
        return best

    def _check_least(self, budget: Budget) -> None:
        """Refuse a size that is too small for rank 1, before any tensor is read."""
        least = saved_size(self.at(dict.fromkeys(self.steps, 1), budget).lora())
        if least > budget.value:
            raise OptionError(
                f"{budget}: can't be met: at rank 1 in every module the file takes {least} bytes as {self.dtype} in the "
                f"dialect {self.dialect}. Way out: a larger size, or a narrower dtype."
            )

    def at(self, ranks: Mapping[str, int], budget: Budget | None) -> "Plan":
        """The same plan at ranks that were chosen before, out of a budget."""
        steps = {module: replace(step, rank=ranks[module]) for module, step in self.steps.items()}
        return replace(self, steps=steps, budget=budget)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n} × {w}" for n, w in zip((x.name for x in self.loras), self.weights.label, strict=True))
        return f"Plan({inputs}; {self.method.name}, rank {self.rank}, {len(self.steps)} modules of {self.architecture})"

    @property
    def size(self) -> int:
        """Bytes of the result's tensors in the dtype that saving uses."""
        return sum(nbytes((s.shape[0] + math.prod(s.shape[1:]), s.rank), self.dtype) for s in self.steps.values())

    @property
    def recipe(self) -> dict[str, Any]:
        """The merge in words, as the saved file keeps it; hashing the inputs reads every tensor of theirs."""
        return record(self, [lora.sha256 for lora in self.given])

    def _metadata(self) -> Awaited:
        """Entries on which the inputs agree stay; where they differ, each input's own go into the recipe."""
        metadatas = [{k: v for k, v in lora.metadata.items() if k not in STALE} for lora in self.loras]
        common = {k: v for k, v in metadatas[0].items() if all(m.get(k) == v for m in metadatas)}
        titles = [m.get("modelspec.title") or lora.name for m, lora in zip(metadatas, self.loras, strict=True)]
        if any(key.startswith("modelspec.") for m in metadatas for key in m):
            common["modelspec.merged_from"] = ", ".join(titles)
        own = [{k: v for k, v in m.items() if k not in common} for m in metadatas]
        known = {k: v for k, v in common.items() if k != RECIPE}
        draft = _as_text(record(self, [UNKNOWN] * len(self.given)), own)
        return Awaited(known, RECIPE, draft, lambda: _as_text(self.recipe, own))


def _as_text(recipe: dict[str, Any], metadatas: Sequence[Mapping[str, str]]) -> str:
    """A recipe for a header, with the entries that each input alone had."""
    for entry, metadata in zip(recipe["inputs"], metadatas, strict=True):
        if metadata:
            entry["metadata"] = metadata
    return json.dumps(recipe, ensure_ascii=False)


@contextmanager
def _named(module: str) -> Iterator[None]:
    """Have errors say in which module they arose."""
    try:
        yield
    except LoRAMergeError as error:
        raise type(error)(f"{module}: {error}") from None


def _fitted(layer: Merged, step: Step, measured: bool) -> Outcome:
    """A merged layer at exactly the rank that was announced: cut, or filled up with zeros."""
    if isinstance(layer, Full):
        cut = linalg.truncate_dense(matrix(layer.diff), step.rank)
    elif step.rank < layer.rank:
        cut = linalg.truncate(matrix(layer.up), matrix(layer.down), step.rank)
    else:
        found = layer if layer.rank == step.rank else _filled(layer, step.rank)
        return Outcome(step.module, found, layer.norm() ** 2 if measured else None, 0.0)
    fitted = replace(low_rank(cut.up, cut.down, layer.shape), diff_b=layer.diff_b)
    fitted = fitted if fitted.rank == step.rank else _filled(fitted, step.rank)
    return Outcome(step.module, fitted, cut.energy, cut.lost)


def _spectrum(layer: Merged, step: Step) -> Spectrum:
    """What each rank up to the step's own would bring."""
    if isinstance(layer, Full):
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
    max_error: float | str | None = None,
    energy: float | str | None = None,
    max_size: int | str | None = None,
    base: "Checkpoint | str | os.PathLike[str] | None" = None,
    progress: "Progress | None" = None,
    **options: Any,
) -> Plan:
    """Plan a merge; the arguments are those of `merge`.

    Only headers are read, unless a budget is given: then every module is merged once to see
    what each rank brings, and ``progress`` is called with the number of modules done and of all.

    Raises:
        MergeError: Families or shapes differ, or a layer has no low-rank form.
        OptionError: A weight, the rank, the method or an option is wrong.
    """
    given = opened = [lora if isinstance(lora, LoRA) else open(lora) for lora in _listed(loras)]
    left_out = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if left_out:
        opened = _without(opened, left_out)
    if not any(opened):
        raise MergeError("Nothing to merge: give at least one LoRA with a module.")
    if device is not None:
        _check_device(device)
    chosen = METHODS[method]
    checked = chosen.check(options)
    if chosen.count not in (None, len(opened)):
        raise OptionError(f"The method {method} merges {chosen.count} LoRAs, got {len(opened)}.")
    architecture = _architecture(opened)
    model = None if base is None else base if isinstance(base, Checkpoint) else open_checkpoint(os.fspath(base))
    steps = _steps(opened, chosen, checked, rank, model)
    if not steps:
        raise MergeError(f"Nothing to merge: {method} changes the first LoRA, and {opened[0].name} has no module.")
    first = opened[0].dialect
    resolved = resolve(opened, weights, scope, chosen.default_weight)
    if resolved.columns and chosen.name != "linear":
        raise OptionError(f"Learned coefficients are weights of the method linear; {method} takes numbers.")
    for module in () if resolved.from_values else steps:
        found = resolved.of(module)  # a block vector may lack a module's block
        if chosen.allows:
            with _named(module):
                chosen.allows([found[i] for i in steps[module].inputs])
    planned = Plan(
        loras=tuple(opened),
        architecture=architecture,
        method=chosen,
        options=checked,
        weights=resolved,
        rank=rank if isinstance(rank, str) else operator.index(rank),
        steps=steps,
        name=" + ".join(lora.name for lora in opened),
        dialect=first if DIALECTS[first].writes or opened[0].architecture is None else "kohya",
        dtype=widest([layer.dtype for lora in opened for layer in lora.layouts.values()]),
        device=device,
        extras=_extras(opened),
        base=model,
        given=tuple(given),
        exclude=left_out,
        scope=scope,
    )
    limit = budget(max_error, energy, max_size)
    return planned.within(limit, progress) if limit else planned


def merge(
    loras: Sequence[LoRA | Source],
    *,
    weights: Weights = None,
    method: str = "linear",
    rank: Rank = "sum",
    scope: Scope = "module",
    exclude: Sequence[str] = (),
    device: str | None = None,
    max_error: float | str | None = None,
    energy: float | str | None = None,
    max_size: int | str | None = None,
    base: "Checkpoint | str | os.PathLike[str] | None" = None,
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
        max_error: Choose each module's rank so that the error of all together, ‖ΔW − kept‖ / ‖ΔW‖,
            is at most this: ``0.01`` or ``"1%"``.  One of the three budgets at most.
        energy: The same for the share of ‖ΔW‖² that stays: ``0.999``.
        max_size: The same for the size of the file in the LoRA's dialect: bytes, or ``"150MB"``.
        base: The base model, a checkpoint or its path.  With it DoRA layers merge too: their ΔW is
            dense and cut to the rank.  Whole differences of a weight need no base, but a number
            as the rank.
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
        max_error=max_error,
        energy=energy,
        max_size=max_size,
        base=base,
        **options,
    )
    return planned.lora().in_memory()


def resize(
    lora: LoRA | Source,
    *,
    rank: Rank = "sum",
    max_error: float | str | None = None,
    energy: float | str | None = None,
    max_size: int | str | None = None,
    device: str | None = None,
) -> LoRA:
    """The best fit to one LoRA at smaller ranks: a merge of one.

    Args:
        lora: A LoRA, or what `load` takes.
        rank: The rank of every module, at most its own.
        max_error: As for `merge`.
        energy: As for `merge`.
        max_size: As for `merge`.
        device: As for `merge`.

    Raises:
        MergeError: A layer has no low-rank form.
        OptionError: The rank or the budget is wrong, or can't be met.

    Example:
        >>> from loramerge.testing import random_lora
        >>> resize(random_lora("sd15", rank=8), rank=3).summary("rank")
        'rank 3'
    """
    return merge([lora], weights=[1.0], rank=rank, max_error=max_error, energy=energy, max_size=max_size, device=device)


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


def _steps(
    loras: Sequence[LoRA], method: Method, options: Mapping[str, Any], rank: Rank, base: "Checkpoint | None"
) -> dict[str, Step]:
    wanted = rule(rank)
    takes_dense = method.dense and options.get("space", "delta") == "delta"
    steps = {}
    for module in dict.fromkeys(module for lora in loras for module in lora):
        inputs = tuple(i for i, lora in enumerate(loras) if module in lora)
        if method.of_first and inputs[0] != 0:
            continue
        layouts = [_mergeable(loras[i], module, takes_dense, isinstance(rank, str), base) for i in inputs]
        shape = _common_shape([loras[i] for i in inputs], module)
        ranks = tuple(layout.rank or 0 for layout in layouts)
        limit = min(shape[0], math.prod(shape[1:]))
        with _named(module):
            dense = any(layout.kind not in FACTORED for layout in layouts)
            full = limit if dense else method.rank(layouts, **options)
        steps[module] = Step(module, shape, inputs, ranks, full, max(1, min(wanted(ranks), full, limit)))
    return steps


FACTORED = ("lora", "loha", "lokr")
"""Kinds of layers that have an exact low-rank form."""


def _mergeable(lora: LoRA, module: str, takes_dense: bool, by_ranks: bool, base: "Checkpoint | None") -> Layer:
    """A module's layout, if it can be merged.

    A DoRA layer has a ΔW where the base is given.  A whole difference has one, but no rank of its own.
    """
    layout = lora.layout(module)
    if layout.kind in FACTORED:
        return layout
    where = f"{lora.name}: {module} can't be merged"
    if layout.kind == "dora" and base is not None:
        if module not in base:
            raise MergeError(f"{where}: it is a DoRA layer, and the base {base.name} has no such module.")
    elif layout.kind == "dora":
        raise MergeError(f"{where}: {layout.no_factors}; or give the base model (--base, base=…).")
    elif layout.kind != "full":
        raise MergeError(f"{where}: {layout.no_factors}.")
    if not takes_dense:
        raise MergeError(
            f"{where} by this method: its ΔW has no factors. Ways out: the method linear, or one on entries such as "
            f"ties with space=delta, or {LEAVE_OUT}."
        )
    if by_ranks:
        what = "a whole difference of the weight" if layout.kind == "full" else "a DoRA layer"
        raise MergeError(
            f"{where}: it holds {what}, whose ΔW is dense and has no rank of its own. "
            f"Ways out: a number as the rank, such as --rank 32, or {LEAVE_OUT}."
        )
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
