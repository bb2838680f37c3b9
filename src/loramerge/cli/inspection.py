"""The report of ``loramerge inspect``: a LoRA file's facts from its header, as text and as data."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import computing
from ..files.architectures import blocks, titles
from ..files.architectures.labels import SPECIFICATION, VERSION
from ..files.dialects import DIALECTS
from ..files.lora import LoRA
from ..files.reading import open
from ..files.storage.texts import said
from ..layers import Layer
from ..tensors import code
from .output import Block as Lines, bar, joined, print_json, say, table

MOST = 20
"""Rows to print for an unknown family, where every module may be a block of its own."""


def show(
    source: str,
    *,
    norms: bool = False,
    as_json: bool = False,
    architecture: str | None = None,
    adapter: str | None = None,
    pickle: bool = False,
) -> None:
    """Print what a LoRA is."""
    with open(source, architecture=architecture, adapter=adapter, allow_pickle=pickle) as lora:
        found = norms_of(lora) if norms else {}
        if as_json:
            print_json(as_data(lora, found))
            return
        say(summary(lora), "", _by_block(lora, found))
        if not norms:
            say("", "Norms of the blocks: --norms.  Every module: --json.")


def show_recipe(
    source: str, *, architecture: str | None = None, adapter: str | None = None, pickle: bool = False
) -> None:
    """Print how a LoRA was merged, as a recipe that can be run again."""
    from ..merging import toml
    from ..merging.recipe import Recipe

    with open(source, architecture=architecture, adapter=adapter, allow_pickle=pickle) as lora:
        say(f"# How {toml.text(lora.name)} was merged.", *Recipe.of(lora).to_toml().splitlines())


def as_data(lora: LoRA, norms: dict[str, float]) -> dict[str, Any]:
    """Return the facts as plain data, with every module and all metadata."""
    return {
        "name": lora.name,
        "architecture": lora.architecture,
        "alike": list(lora.alike),
        "dialect": lora.dialect,
        "trigger_words": list(dict.fromkeys(word for _, words in _triggers(lora) for word in words)),
        "base_model": _base_model(lora),
        "notes": list(lora.notes),
        "extras": list(lora.extras),
        "modules": {
            module: {
                "kind": layer.kind,
                "shape": list(layer.shape),
                "rank": layer.rank,
                "dim": layer.dim,
                "alpha": _alpha(layer),
                "dtype": layer.dtype,
                **({"norm": norms[module]} if module in norms else {}),
            }
            for module, layer in lora.layouts.items()
        },
        "metadata": dict(lora.metadata),
    }


def summary(lora: LoRA) -> Lines:
    """Return what a LoRA is, a line per fact."""
    family = ("one of " if lora.alike else "") + titles(lora.families, ", ")
    layers = lora.layouts.values()
    facts = {
        "file": lora.name,
        "architecture": family or "unknown",
        "dialect": f"{lora.dialect} ({DIALECTS[lora.dialect].title})",
        "modules": f"{len(lora)}: " + _counts(layer.kind for layer in layers),
        "ranks": _counts(_rank(layer) for layer in layers if layer.rank is not None),
        "alphas": _counts(_alpha(layer) for layer in layers) or "none: scale 1",
        "dtypes": _counts(code(t) for layer in layers for t in layer.tensors().values()),
        "base model": _base_model(lora),
        "says it is for": "" if lora.architecture else _first(lora.metadata, SPECIFICATION, VERSION),
        "trigger words": _shown(_triggers(lora)),
        "extras": ", ".join(lora.extras),
        **_made_from(lora),
    }
    lines = [f"{name + ':':15s}{value}" for name, value in facts.items() if value]
    return joined([*lines, *(f"{'note:':15s}{note}" for note in lora.notes)])


def _counts(values: Iterable[Any]) -> str:
    counts = Counter(v for v in values if v is not None)
    commonest = counts.most_common()[:6]
    shown = [f"{v:g}" if isinstance(v, float) else str(v) for v, _ in commonest]
    if len(counts) == 1:
        return shown[0]
    texts = [f"{text} ({n})" for text, (_, n) in zip(shown, commonest, strict=True)]
    return ", ".join(texts) + (f" and {len(counts) - 6} more" if len(counts) > 6 else "")


def _rank(layer: Layer) -> int | str | None:
    """Return the rank; for LoHas and LoKrs, the dim that trainers name and the rank as a LoRA."""
    if layer.rank == layer.dim:
        return layer.rank
    return f"{'full factors' if layer.dim is None else f'dim {layer.dim}'}, as a LoRA {layer.rank}"


def _alpha(layer: Layer) -> float | None:
    return None if layer.own_alpha is None else float(layer.own_alpha)


@dataclass(frozen=True)
class Block:
    """A block of a model in which a LoRA has modules."""

    component: str
    name: str
    modules: tuple[str, ...]
    ranks: str
    norm: float


def blocks_of(lora: LoRA, norms: Mapping[str, float]) -> list[Block]:
    """Return the blocks in the order in which data passes them; norms are those of the modules, as far as they are known."""
    groups: dict[tuple[str, str], list[str]] = {}
    for module in lora:
        component = module.partition(".")[0]
        groups.setdefault((component, blocks.block(module, lora.architecture)), []).append(module)
    found = []
    for group, modules in sorted(groups.items(), key=lambda item: blocks.position(*item[0])):
        ranks = [rank for m in modules if (rank := lora.layout(m).rank) is not None]
        span = "" if not ranks else str(min(ranks)) if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"
        norm = math.sqrt(sum(norms.get(m, 0.0) ** 2 for m in modules))
        found.append(Block(*group, tuple(modules), span, norm))
    return found


def _by_block(lora: LoRA, norms: dict[str, float]) -> Lines:
    head = ["component", "block", "modules", "ranks", *["norm", ""] * bool(norms)]
    found = blocks_of(lora, norms)
    largest = max((block.norm for block in found), default=0.0)
    rows = []
    for block in found:
        shown = [f"{block.norm:.4g}", bar(block.norm, largest)] if norms else []
        rows.append([block.component, block.name, str(len(block.modules)), block.ranks, *shown])
    if lora.architecture is None and len(rows) > MOST:
        return joined([table(head, rows[:MOST]), f"… and {len(rows) - MOST} more: every module with --json."])
    return table(head, rows)


def norms_of(lora: LoRA) -> dict[str, float]:
    """Return the norms of the modules whose ΔW depends on the file alone."""
    return {m: _norm(lora, m) for m in lora if lora.layout(m).kind in ("lora", "loha", "lokr", "full", "norm")}


def _norm(lora: LoRA, module: str) -> float:
    with computing(module):
        return lora[module].norm()


def _base_model(lora: LoRA) -> str:
    """Return the model that it was trained on; entries that name a family don't count."""
    return _first(lora.metadata, "ss_sd_model_name", "base_model") or next(
        (str(name) for config in lora.about.values() if (name := config.get("base_model_name_or_path"))), ""
    )


def _first(metadata: Mapping[str, str], *keys: str) -> str:
    return next((value for key in keys if (value := metadata.get(key))), "")


def _triggers(lora: LoRA) -> list[tuple[str, list[str]]]:
    """Return the trigger words of each parent of a merge, or else the LoRA's own."""
    if not lora.metadata:
        return []
    from ..files.triggers import by_parent

    return by_parent(lora.name, lora.metadata)


def _shown(triggers: Sequence[tuple[str, Sequence[str]]]) -> str:
    if len(triggers) == 1:
        return ", ".join(triggers[0][1])
    return "; ".join(f"{', '.join(words)} ({name})" for name, words in triggers)


def _made_from(lora: LoRA) -> dict[str, str]:
    """Return the inputs of a merge and their weights, or the LoRA that was resized."""
    if not lora.metadata:
        return {}
    from ..files.metadata import RECIPE, weight_of

    try:
        recipe = said(lora.metadata.get(RECIPE))
        inputs = [f"{i['name']} × {weight_of(i, recipe)}" for i in recipe.get("inputs", [])]
        budget = "".join(f", {kind} {value:g}" for kind, value in recipe.get("budget", {}).items())
        label = "merged from" if len(inputs) > 1 else "made from"
        return {label: f"{', '.join(inputs)} by {recipe['method']}, rank {recipe['rank']}{budget}"} if inputs else {}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}
