"""What a merge will do in each module, and whether the LoRAs can be merged at all: from headers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from .architectures import ARCHITECTURES, NAME_FAMILY
from .checkpoints import Checkpoint
from .errors import LoRAMergeError, MergeError
from .layers import FACTORED, ON_BASE, Layer
from .layers.full import LEAVE_OUT
from .lora import LoRA
from .methods import Method
from .ranks import Rank, rule
from .tensors import Shape, Tensor, largest_rank

if TYPE_CHECKING:
    pass


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
        return self.rank < min(self.full_rank, largest_rank(self.shape))


@contextmanager
def named(module: str) -> Iterator[None]:
    """Have errors say in which module they arose."""
    try:
        yield
    except LoRAMergeError as error:
        raise error.at(module) from None


def steps_of(
    loras: Sequence[LoRA], method: Method, options: Mapping[str, Any], rank: Rank, base: "Checkpoint | None"
) -> dict[str, Step]:
    """Every module's merge, in order.

    Args:
        loras: What is merged.
        method: How.
        options: All options of the method.
        rank: The rule that gives each module's rank.
        base: The base model, for layers whose ΔW depends on it.

    Raises:
        MergeError: A layer has no low-rank form, or shapes differ.
        OptionError: The rank is none.
    """
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
        limit = largest_rank(shape)
        with named(module):
            dense = any(layout.kind not in FACTORED for layout in layouts)
            full = limit if dense else method.rank(layouts, **options)
        steps[module] = Step(module, shape, inputs, ranks, full, max(1, min(wanted(ranks), full, limit)))
    return steps


def _mergeable(lora: LoRA, module: str, takes_dense: bool, by_ranks: bool, base: "Checkpoint | None") -> Layer:
    """A module's layout, if it can be merged.

    A DoRA layer has a ΔW where the base is given.  A whole difference has one, but no rank of its own.
    """
    layout = lora.layout(module)
    if layout.kind in FACTORED:
        return layout
    where = f"{lora.name}: {module} can't be merged"
    if layout.kind in ON_BASE and base is not None:
        if module not in base:
            raise MergeError(f"{where}: it is a {layout.kind} layer, and the base {base.name} has no such module.")
    elif layout.kind in ON_BASE:
        raise MergeError(f"{where}: {layout.no_factors}; or give the base model (--base, base=…).")
    elif layout.kind != "full":
        raise MergeError(f"{where}: {layout.no_factors}.")
    if not takes_dense:
        raise MergeError(
            f"{where} by this method: its ΔW has no factors. Ways out: the method linear, or one on entries such as "
            f"ties with space=delta, or {LEAVE_OUT}."
        )
    if by_ranks:
        what = "a whole difference of the weight" if layout.kind == "full" else f"a {layout.kind} layer"
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


def architecture_of(loras: Sequence[LoRA]) -> str | None:
    """The family that all LoRAs fit; a file with few modules may fit several."""
    names = dict.fromkeys(lora.architecture for lora in loras)
    for name in names:
        if all(lora.architecture == name or (name and _fits(lora, name)) for lora in loras):
            if name is None:
                _check_naming(loras)
            return name
    listed = "; ".join(f"{lora.name} is for {lora.architecture or 'an unknown architecture'}" for lora in loras)
    ways = f" Way out: {NAME_FAMILY}." if None in names else ""
    raise MergeError(f"LoRAs of different model families can't be merged: {listed}.{ways}")


def _check_naming(loras: Sequence[LoRA]) -> None:
    """Refuse LoRAs of which nobody can tell whether they update the same modules: each has names of its own.

    Raises:
        MergeError: Two of an unknown family are in different dialects and share no name.
    """
    for a, b in combinations(filter(None, loras), 2):
        if a.dialect != b.dialect and a.layouts.keys().isdisjoint(b.layouts):
            raise MergeError(
                f"{a.name} ({a.dialect}) and {b.name} ({b.dialect}) are for an unknown architecture and share no name of "
                f"a module, so what they have in common can't be told. Way out: {NAME_FAMILY}."
            )


def _fits(lora: LoRA, architecture: str) -> bool:
    shapes = ARCHITECTURES[architecture].shapes
    return all(shapes.get(module) == lora.layout(module).shape for module in lora)


def common_extras(loras: Sequence[LoRA]) -> dict[str, Tensor]:
    """Tensors that belong to no layer, from all inputs; two of one name must be equal."""
    found: dict[str, Tensor] = {}
    for lora in loras:
        for key, tensor in lora.extras.items():
            if key in found and not _equal(found[key], tensor):
                raise MergeError(
                    f"Two of the LoRAs hold different tensors {key!r}, which belong to no layer and can't be merged. "
                    "Way out: leave them out (exclude)."
                )
            found[key] = tensor
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.read() == b.read()).all())
