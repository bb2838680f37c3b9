"""LoRAs of one model: agreeing on its family, and on one name and shape for each of its modules."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from ..errors import MergeError
from ..tensors import Shape
from .architectures import ARCHITECTURES, name_family
from .architectures.hints import KEYS
from .architectures.names import INPUTS, flat
from .lora import LoRA


def of_one_family(loras: Sequence[LoRA]) -> tuple[list[LoRA], str | None]:
    """Return the LoRAs as those of one model family that all may be for, and its name; None if it isn't known.

    Raises:
        MergeError: There is no such family, or nobody can tell whether they update the same modules.
    """
    chosen = next(iter(common(loras)), None)
    known = [lora for lora in loras if lora.families]
    if (known and chosen is None) or (chosen and len(known) < len(loras) and not _all_fit(loras, chosen)):
        raise MergeError(_different(loras))
    if chosen:
        loras = [_for_family(lora, chosen) for lora in loras]
    return shaped_alike(named_alike(loras, chosen)), chosen


def _for_family(lora: LoRA, chosen: str) -> LoRA:
    """Return a LoRA with a family as the likeliest; the others that it may be for stay."""
    others = tuple(name for name in lora.families if name != chosen)
    return lora if lora.architecture == chosen else replace(lora, architecture=chosen, alike=others)


def shaped_alike(loras: Sequence[LoRA]) -> list[LoRA]:
    """Return the LoRAs with convolution kernels unflattened, if one of them has the shape: some tools store matrices."""
    shapes: dict[str, Shape] = {}
    for lora in loras:
        for module, layout in lora.layouts.items():
            shapes[module] = max(shapes.get(module, ()), layout.shape, key=len)
    return _as_wide([lora.shaped(shapes) for lora in loras])


def _as_wide(loras: Sequence[LoRA]) -> list[LoRA]:
    """Return the LoRAs with input layers as wide as the widest: where a model has more channels, they are behind."""
    widest: dict[str, Shape] = {}
    for lora in loras:
        for module, layout in lora.layouts.items():
            if module.partition(".")[2] in INPUTS:
                widest[module] = max(widest.get(module, ()), layout.shape, key=lambda shape: (len(shape), *shape[1:2]))
    return [lora.widened(widest) for lora in loras]


def alike(loras: Sequence[LoRA], chosen: str | None) -> tuple[str, ...]:
    """Return the other families that all LoRAs may be for."""
    return tuple(name for name in common(loras) if name != chosen)


def common(loras: Sequence[LoRA]) -> list[str]:
    """Return the families that every LoRA may be for, unknown ones apart, in the order of the least ambiguous LoRA."""
    known = sorted((lora.families for lora in loras if lora.families), key=len)
    return [name for name in known[0] if all(name in families for families in known)] if known else []


def _all_fit(loras: Sequence[LoRA], architecture: str) -> bool:
    a = ARCHITECTURES[architecture]
    unknown = [lora for lora in loras if not lora.families]
    return all(lora.layout(module).shape in a.sizes(module) for lora in unknown for module in lora)


def _different(loras: Sequence[LoRA]) -> str:
    listed = "; ".join(
        f"{lora.name} is for {' or '.join(lora.families) or 'a family that loramerge does not know'}" for lora in loras
    )
    unknown = not all(lora.families for lora in loras)
    ways = f" If they are for one model, {name_family()}." if unknown else ""
    return f"LoRAs of different model families can't be merged: {listed}.{ways}"


def named_alike(loras: Sequence[LoRA], architecture: str | None) -> list[LoRA]:
    """Return the LoRAs with one name for each module that their family doesn't list, whichever tool named it.

    Tools write a path with its dots or with underscores in their place: where one LoRA has the dots, they
    are taken from it.

    Raises:
        MergeError: Nobody can tell whether they update the same modules: they share none, or have names of
            different code.
    """
    renamed = spelled_alike(loras, architecture)
    having = [lora for lora in renamed if _unlisted(lora, architecture)]
    if architecture is None and len(having) > 1:
        _check_shared(having)
    for a, b in combinations(having, 2):
        _check_naming(a, b)
    return renamed


def spelled_alike(loras: Sequence[LoRA], architecture: str | None) -> list[LoRA]:
    """Return the LoRAs with dots in their modules' names, if one of them has the dots."""
    free = [_unlisted(lora, architecture) for lora in loras]
    if sum(map(bool, free)) < 2:
        return list(loras)
    spelled = _spellings(module for modules in free for module in modules)
    return [lora.renamed({m: spelled[flat(m)] for m in modules}) for lora, modules in zip(loras, free, strict=True)]


def _unlisted(lora: LoRA, architecture: str | None) -> list[str]:
    """Return the modules that the family doesn't list."""
    shapes = ARCHITECTURES[architecture].shapes if architecture else {}
    return [module for module in lora if module not in shapes]


def _spellings(modules: Iterable[str]) -> dict[str, str]:
    """Map each flattened name to the module's name, with its dots if any LoRA has them."""
    found: dict[str, str] = {}
    for module in modules:
        known = found.get(flat(module), module)
        if known != module and has_path(known) and has_path(module):
            raise MergeError(f"{known} and {module} may be one module or two: they differ in nothing but dots.")
        found[flat(module)] = max(known, module, key=lambda name: name.count("."))
    return found


def has_path(module: str) -> bool:
    """Return whether a module's path, after its component, has dots."""
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
"""Tools' names of an attention's query, key and value: fused into one weight, or three."""


def _check_naming(a: LoRA, b: LoRA) -> None:
    """Refuse two LoRAs that call the parts of one attention by the names of different tools.

    Raises:
        MergeError: They do, such as ``attention.qkv`` and ``attention.to_q``.
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
    """Map each attention to the position of its naming in `QUERIES`, and one of its names."""
    found: dict[str, tuple[int, str]] = {}
    for module in lora:
        for i, pattern in enumerate(QUERIES):
            if match := re.fullmatch(rf"(.*?\d.*?)[._]({pattern})", module):
                found.setdefault(flat(match[1]), (i, match[2]))
                break
    return found
