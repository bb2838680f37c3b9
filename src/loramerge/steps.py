"""What a merge will do in each module, and whether the LoRAs can be merged at all: from headers."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .architectures import ARCHITECTURES, name_family
from .architectures.hints import KEYS
from .checkpoints import Checkpoint
from .errors import LoRAMergeError, MergeError
from .layers import FACTORED, ON_BASE, Layer
from .layers.full import LEAVE_OUT
from .lora import LoRA
from .methods import Method
from .ranks import Rank, rule
from .tensors import FLOATS, Shape, Tensor, largest_rank


@dataclass(frozen=True)
class Step:
    """One module's merge."""

    module: str
    shape: Shape
    inputs: tuple[int, ...]
    """Which of the LoRAs change the module: those that have it, with a weight other than 0."""
    ranks: tuple[int, ...]
    full_rank: int
    """Rank of the method's own result, before it is cut; 0 where there is none to speak of."""
    rank: int
    """Rank of the result."""
    alone: bool = False
    """Whether the result is one layer times its weight, which keeps its form unless it is cut."""
    dense: bool = False
    """Whether an input has no factors, so that the result has none."""

    @property
    def cut(self) -> bool:
        """Whether the result is cut to a smaller rank than it has."""
        return self.rank < self.full_rank and self.rank < largest_rank(self.shape)

    @property
    def kept(self) -> bool:
        """Whether the result is the one input's own layer, times its weight."""
        return self.alone and not self.cut

    @property
    def rankless(self) -> bool:
        """Whether there is no rank to choose: biases, norms, tables, and layers that are handed on as they are."""
        return self.full_rank == 0


@contextmanager
def named(module: str) -> Iterator[None]:
    """Have errors say in which module they arose."""
    try:
        yield
    except LoRAMergeError as error:
        raise error.at(module) from None


Weigh = Callable[[str], Sequence[Any]]


def steps_of(
    loras: Sequence[LoRA],
    method: Method,
    options: Mapping[str, Any],
    rank: Rank,
    base: "Checkpoint | None",
    weights: Weigh | None = None,
    whole: bool = True,
) -> dict[str, Step]:
    """Every module's merge, in order.

    Args:
        loras: What is merged.
        method: How.
        options: All options of the method.
        rank: The rule that gives each module's rank.
        base: The base model, for layers whose ΔW depends on it.
        weights: The weights of a module; None where only the tensors tell them.
        whole: Whether a layer that has no factors may stay as it is: no budget is to be kept.

    Returns:
        The modules in which a LoRA has a weight other than 0.

    Raises:
        MergeError: A layer has no low-rank form, or shapes differ.
        OptionError: The rank is none.
    """
    rule(rank)
    takes_dense = method.dense and options.get("space", "delta") == "delta"
    merged: dict[str, tuple[int, ...]] = {}
    given: dict[str, Sequence[Any] | None] = {}
    for module in dict.fromkeys(module for lora in loras for module in lora):
        present = [i for i, lora in enumerate(loras) if module in lora]
        found = given[module] = None if weights is None else weights(module)
        inputs = tuple(i for i in present if found is None or found[i])
        if inputs and not (method.of_first and inputs[0] != 0):
            merged[module] = inputs
        _common_shape([loras[i] for i in present], module)
    single = len({i for inputs in merged.values() for i in inputs}) == 1
    maker = _Maker(loras, method, options, rank, base, takes_dense, whole and isinstance(rank, str), single)
    shapes = {module: _common_shape([loras[i] for i in inputs], module) for module, inputs in merged.items()}
    return {module: maker.step(module, shapes[module], inputs, given[module]) for module, inputs in merged.items()}


@dataclass(frozen=True)
class _Maker:
    loras: Sequence[LoRA]
    method: Method
    options: Mapping[str, Any]
    rank: Rank
    base: "Checkpoint | None"
    takes_dense: bool
    whole: bool
    """Whether a layer without factors may be handed on as it is."""
    single: bool
    """Whether no more than one LoRA has a weight."""

    def step(self, module: str, shape: Shape, inputs: tuple[int, ...], weights: Sequence[Any] | None) -> Step:
        layouts = [self.loras[i].layout(module) for i in inputs]
        alone = weights is not None and self._alone(layouts, weights[inputs[0]])
        if entrywise(layouts) or (alone and layouts[0].kind not in FACTORED):
            return Step(module, shape, inputs, (0,) * len(inputs), 0, 0, alone)
        for i in inputs:
            self._check(self.loras[i], module)
        layouts = [layout for layout in layouts if layout.kind != "bias"]
        limit = largest_rank(shape)
        ranks = tuple(limit if layout.kind not in FACTORED else layout.rank or 0 for layout in layouts)
        dense = any(layout.kind not in FACTORED for layout in layouts)
        with named(module):
            full = limit if dense else self.method.rank(layouts, **self.options)
        return Step(module, shape, inputs, ranks, full, max(1, min(rule(self.rank)(ranks), full, limit)), alone, dense)

    def _alone(self, layouts: Sequence[Layer], weight: float) -> bool:
        """Whether the one layer can be handed on, times its weight."""
        layout = layouts[0]
        if len(layouts) > 1 or not self.method.linear or layout.rankless or layout.times(weight) is None:
            return False
        limit = largest_rank(layout.shape)
        if layout.kind == "lora":
            return (layout.rank or 0) <= limit
        if layout.kind in FACTORED:  # diffusers reads no file in which a LoHa or LoKr stands beside LoRAs
            return self.single or _as_lora(layout) > MORE * _numbers(layout)
        return self.whole and layout.kind != "full"

    def _check(self, lora: LoRA, module: str) -> None:
        """Whether a module's layer can be merged with others.

        Raises:
            MergeError: It can't.
        """
        layout = lora.layout(module)
        if layout.kind in FACTORED or layout.kind == "bias":
            return
        where = f"{lora.name}: {module} can't be merged"
        if layout.kind not in ("full", *ON_BASE):
            raise MergeError(f"{where}: {layout.no_factors}.")
        if not self.takes_dense:
            base = f" ({_a(layout.kind)} layer needs the base model too: --base, base=…)" * (layout.kind in ON_BASE)
            raise MergeError(
                f"{where} by this method: its ΔW has no factors. Ways out: the method linear, or one on entries such as "
                f"ties with space=delta{base}, or {LEAVE_OUT}."
            )
        if layout.kind in ON_BASE and self.base is not None and module not in self.base:
            raise MergeError(
                f"{where}: it is {_a(layout.kind)} layer, and the base {self.base.name} has no such module."
            )
        if layout.kind in ON_BASE and (self.base is None or isinstance(self.rank, str)):
            raise MergeError(f"{where}: {needed_on_base(layout.kind, self.base is not None)}.")


def _a(kind: str) -> str:
    """A kind of layer whose ΔW depends on the base, with its article."""
    return {"dora": "a DoRA", "pissa": "a PiSSA", "olora": "an OLoRA"}.get(kind, f"a {kind}")


def needed_on_base(kind: str, has_base: bool) -> str:
    """What a layer whose ΔW depends on the base lacks to be merged, and the ways out."""
    base = "" if has_base else "the base model and "
    typed = "--rank 32, or rank=32" if has_base else "--base MODEL --rank 32, or base=…, rank=32"
    return (
        f"it is {_a(kind)} layer, whose ΔW depends on the base weight and has no rank of its own. Ways out: give {base}a number "
        f"as the rank ({typed}), bake it into the base model (loramerge bake), or {LEAVE_OUT}"
    )


MORE = 100
"""How many times the room of a LoHa or LoKr its LoRA may take beside other LoRAs."""


def _as_lora(layout: Layer) -> int:
    """How many numbers the LoRA with the same ΔW has."""
    return (layout.rank or 0) * (layout.shape[0] + math.prod(layout.shape[1:]))


def _numbers(layout: Layer) -> int:
    return sum(math.prod(tensor.shape) for tensor in layout.tensors().values())


def entrywise(layouts: Sequence[Layer]) -> bool:
    """Whether a module's layers are summed entry by entry: none has a rank, or one is a table."""
    table = any(layout.kind == "table" for layout in layouts)
    return all(layout.rankless or (table and layout.kind == "full") for layout in layouts)


def _common_shape(loras: Sequence[LoRA], module: str) -> Shape:
    """The shape of the weight that all change; a bias tells its rows only."""
    layouts = [lora.layout(module) for lora in loras]
    whole = next((k for k, layout in enumerate(layouts) if layout.kind != "bias"), 0)
    first = layouts[whole].shape
    for lora, layout in zip(loras, layouts, strict=True):
        if layout.shape != (first[:1] if layout.kind == "bias" else first):
            raise MergeError(
                f"{module} has the shape {first} in {loras[whole].name} and {layout.shape} in {lora.name}: "
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
    return shaped_alike(named_alike(loras, chosen)), chosen


def shaped_alike(loras: Sequence[LoRA]) -> list[LoRA]:
    """The LoRAs with kernels as convolutions have them where one of them has: some tools store these as matrices."""
    shapes: dict[str, Shape] = {}
    for lora in loras:
        for module, layout in lora.layouts.items():
            shapes[module] = max(shapes.get(module, ()), layout.shape, key=len)
    return [lora.shaped(shapes) for lora in loras]


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
    said = {tuple(lora.metadata.get(key, "") for key in KEYS) for lora in loras}
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
                found.setdefault(_flat(match[1]), (i, match[2]))
                break
    return found


def common_extras(loras: Sequence[LoRA], weights: Weigh | None) -> dict[str, Tensor]:
    """Tensors that belong to no layer, from all inputs; two of one name must be equal.

    What may change the model is taken from a LoRA of weight 1 only: nobody knows how to weigh it.

    Raises:
        MergeError: Two differ, or one would have to be weighed.
    """
    found: dict[str, Tensor] = {}
    for i, lora in enumerate(loras):
        shares = {None if weights is None else weights(module)[i] for module in lora} if lora.extras else set()
        for key, tensor in lora.extras.items() if shares != {0} else ():
            changes = not harmless(key, tensor)
            if changes and (shares != {1} or key in found):
                raise MergeError(_unweighed(lora, key))
            if key in found and not _equal(found[key], tensor):
                raise MergeError(
                    f"Two of the LoRAs hold different tensors {key!r}, which belong to no layer and can't be merged. "
                    f"Way out: leave them out (exclude), such as --exclude '{key}'."
                )
            found[key] = tensor
    return found


EMBEDDING = re.compile(r"^(emb_params|string_to_param|bundle_emb|clip_[lgh]$|t5|<)")
"""Begins the name of a new word's vectors, which a prompt asks for and no weight strengthens."""


def harmless(key: str, tensor: Tensor) -> bool:
    """Whether a tensor that belongs to no layer changes the model by no strength: a new word, a counter, a stray alpha."""
    number = key.endswith((".alpha", ".scale")) and math.prod(tensor.shape) == 1
    return number or tensor.dtype not in FLOATS or EMBEDDING.match(key) is not None


def _unweighed(lora: LoRA, key: str) -> str:
    return (
        f"{lora.name}: the tensor {key!r} belongs to no layer that loramerge knows. It may change the model, so it can't be "
        "weighed, nor added to another's. Ways out: the weight 1 for this LoRA in every module, if no other has such a "
        f"tensor; or leave it out (exclude), such as --exclude '{key}'."
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.read() == b.read()).all())
