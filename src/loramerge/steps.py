"""What a merge will do in each module, and whether the LoRAs can be merged at all: from headers."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .architectures import ARCHITECTURES, name_family
from .architectures.hints import named as families_named
from .checkpoints import Checkpoint
from .errors import LoRAMergeError, MergeError
from .layers import FACTORED, Layer
from .layers.full import LEAVE_OUT
from .lora import LoRA
from .methods import Method
from .ranks import Rank, rule
from .tensors import Shape, Tensor, largest_rank


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
        raise type(error)(f"{module}: {error}") from None


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


def of_one_family(loras: Sequence[LoRA]) -> tuple[list[LoRA], str | None]:
    """The LoRAs as those of one model family, which each may be for, and its name; None where it isn't known.

    Raises:
        MergeError: There is no such family, or nobody can tell whether they update the same modules.
    """
    chosen = next(iter(_common(loras)), None)
    known = [lora for lora in loras if lora.families]
    if (known and chosen is None) or (chosen and len(known) < len(loras) and not _all_fit(loras, chosen)):
        raise MergeError(_different(loras))
    if chosen:
        loras = [lora if lora.architecture == chosen else replace(lora, architecture=chosen) for lora in loras]
    return named_alike(loras, chosen), chosen


def alike(loras: Sequence[LoRA], chosen: str | None) -> tuple[str, ...]:
    """The other families that all LoRAs may be for."""
    return tuple(name for name in _common(loras) if name != chosen)


def _common(loras: Sequence[LoRA]) -> list[str]:
    """The families that every LoRA of a known one may be for, those first that the surest LoRA names."""
    known = sorted((lora.families for lora in loras if lora.families), key=len)
    return [name for name in known[0] if all(name in families for families in known)] if known else []


def _all_fit(loras: Sequence[LoRA], architecture: str) -> bool:
    shapes = ARCHITECTURES[architecture].shapes
    unknown = [lora for lora in loras if not lora.families]
    return all(shapes.get(module) == lora.layout(module).shape for lora in unknown for module in lora)


def _different(loras: Sequence[LoRA]) -> str:
    listed = "; ".join(
        f"{lora.name} is for {' or '.join(lora.families) or 'a family that loramerge does not know'}" for lora in loras
    )
    unknown = not all(lora.families for lora in loras)
    ways = f" If they are for one model, {name_family()}." if unknown else ""
    return f"LoRAs of different model families can't be merged: {listed}.{ways}"


def named_alike(loras: Sequence[LoRA], architecture: str | None) -> list[LoRA]:
    """The LoRAs with one name for each module that their family doesn't list, whichever tool named it.

    Tools write a path with its dots or with underscores in their place: where one LoRA has the dots, they
    are taken from it.

    Raises:
        MergeError: Nobody can tell whether they update the same modules: they share none, or have names of
            different code.
    """
    shapes = ARCHITECTURES[architecture].shapes if architecture else {}
    free = [[module for module in lora if module not in shapes] for lora in loras]
    if sum(map(bool, free)) < 2:
        return list(loras)
    spelled = _spellings(module for modules in free for module in modules)
    renamed = [lora.renamed({m: spelled[_flat(m)] for m in modules}) for lora, modules in zip(loras, free, strict=True)]
    having = [lora for lora, modules in zip(renamed, free, strict=True) if modules]
    if architecture is None:
        _check_shared(having)
    for a, b in combinations(having, 2):
        _check_naming(a, b)
    return renamed


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _spellings(modules: Iterable[str]) -> dict[str, str]:
    """The name of each module by its flattened name: with its dots, where somebody has them."""
    found: dict[str, str] = {}
    for module in modules:
        known = found.get(_flat(module), module)
        if known != module and has_path(known) and has_path(module):
            raise MergeError(f"{known} and {module} may be one module or two: they differ in nothing but dots.")
        found[_flat(module)] = max(known, module, key=lambda name: name.count("."))
    return found


def has_path(module: str) -> bool:
    """Whether a module's path has dots of its own."""
    return "." in module.partition(".")[2]


def _check_shared(loras: Sequence[LoRA]) -> None:
    """Refuse LoRAs of an unknown family of which some share no module with the others.

    Raises:
        MergeError: Some do, and their metadata doesn't name one model for all.
    """
    for i, lora in enumerate(loras):
        others = [*loras[:i], *loras[i + 1 :]]
        if not any(module in other for other in others for module in lora) and not _say_the_same(loras):
            first = others[0]
            raise MergeError(
                f"{lora.name} ({lora.dialect}) shares no module with {first.name} ({first.dialect}), and their model "
                f"family isn't known: whether they are for one model can't be told. {lora.name} has {next(iter(lora))}, "
                f"{first.name} has {next(iter(first))}. Ways out: files of one tool, or {name_family()}."
            )


def _say_the_same(loras: Sequence[LoRA]) -> bool:
    said = {families_named(lora.metadata)[1:] for lora in loras}
    return len(said) == 1 and any(map(any, said))


QUERIES = (r"qkv", r"to_[qkv]", r"[qkv]", r"[qkv]_proj", r"w[qkv]", r"to_(query|key|value)", r"[qkv]_linear|kv_linear")
"""What tools call the query, key and value of an attention: together, or each by a name of its own."""


def _check_naming(a: LoRA, b: LoRA) -> None:
    """Refuse two LoRAs that call the parts of one attention by the names of different tools.

    Raises:
        MergeError: They do, such as ``attention.qkv`` beside ``attention.to_q``.
    """
    first, second = _queries(a), _queries(b)
    for place in first.keys() & second.keys():
        mine, theirs = first[place], second[place]
        if mine[0] != theirs[0]:
            raise MergeError(
                f"{place} has {mine[1]} in {a.name} and {theirs[1]} in {b.name}: two tools' names of the same weights, "
                "and how they correspond isn't known, as their model family isn't. Ways out: convert one file with the "
                f"tool that made it, or {name_family()}."
            )


def _queries(lora: LoRA) -> dict[str, tuple[int, str]]:
    """The naming of each attention, as its place in `QUERIES`, and one of its names."""
    found: dict[str, tuple[int, str]] = {}
    for module in lora:
        for i, pattern in enumerate(QUERIES):
            if match := re.fullmatch(rf"(.*?\d.*?)[._]({pattern})", module):
                found.setdefault(match[1], (i, match[2]))
                break
    return found


def common_extras(loras: Sequence[LoRA]) -> dict[str, Tensor]:
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
