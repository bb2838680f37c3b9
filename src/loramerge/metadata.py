"""The strings in a file's header: kept, brought up to date, and never left wrong."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .dialects.config import adapter_metadata, component_configs
from .layers import Layer, alpha_of, direction_of
from .storage.awaited import Awaited
from .tensors import NAMES

if TYPE_CHECKING:
    from .dialects.write import Spelling
    from .lora import LoRA

RECIPE = "loramerge"
"""Where a merged file says how it was made."""

HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
STALE = (*HASHES, "lora_adapter_metadata", "ss_network_dim", "ss_network_alpha")
"""Entries that describe the tensors and are wrong once those change."""

HASHED = ("kohya", "kohya-diffusers")
"""Dialects whose readers look for kohya's hashes."""


def for_writing(lora: "LoRA", spelling: "Spelling") -> tuple[Mapping[str, str], bool]:
    """The metadata of a LoRA as it is written, and whether kohya's hashes belong in it."""
    if spelling.verbatim:
        stale = HASHES if spelling.dtype else ()
        return {key: value for key, value in lora.metadata.items() if key not in stale}, False
    late = lora.metadata if isinstance(lora.metadata, Awaited) else None
    kept = {key: value for key, value in (late.known if late else lora.metadata).items() if key not in STALE}
    kept.setdefault("format", "pt")
    if spelling.dialect.name == "diffusers-peft":
        kept["lora_adapter_metadata"] = adapter_metadata(component_configs(spelling.layers, lora.about))
    if spelling.dialect.name in HASHED:
        kept |= network(lora, spelling.layers.values())
    hashed = spelling.dialect.name in HASHED
    if late:
        text = _with_output(late.draft, spelling)
        return Awaited(kept, RECIPE, text, lambda: _with_output(late[RECIPE], spelling)), hashed
    if RECIPE in kept and lora.origin is None:
        kept[RECIPE] = _with_output(kept.pop(RECIPE), spelling)
    return kept, hashed


def _with_output(recipe: str, spelling: "Spelling") -> str:
    """A merge's recipe with the dialect and the dtype in which it is written."""
    try:
        found = json.loads(recipe)
    except ValueError:
        return recipe
    if not isinstance(found, dict) or "inputs" not in found:
        return recipe
    output = {"dialect": spelling.dialect.name}
    output |= {"dtype": NAMES[spelling.dtype]} if spelling.dtype else {}
    return json.dumps(
        found | {"output": output | ({"allow_lossy": True} if spelling.left_out else {})}, ensure_ascii=False
    )


def network(lora: "LoRA", layers: Iterable[Layer]) -> Mapping[str, str]:
    """What sd-scripts says of a network, from the layers as written."""
    directions = [direction_of(layer) for layer in layers]
    ranks = {layer.rank for layer in directions if layer.rank is not None}
    alphas = {layer.rank if (a := alpha_of(layer)) is None else a for layer in directions} - {None}
    return {
        "ss_network_module": lora.metadata.get("ss_network_module", "networks.lora"),
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
