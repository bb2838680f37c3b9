"""The strings in a file's header: those that stay true are kept, the others are updated or dropped."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..layers import Layer
from ..tensors import NAMES
from .architectures import ARCHITECTURES, Label
from .architectures.labels import label_of, labelled
from .dialects.config import adapter_metadata, component_configs
from .storage.header import Awaited
from .storage.texts import as_json, said

if TYPE_CHECKING:
    from .dialects.write import Spelling
    from .lora import LoRA

RECIPE = "loramerge"
"""The metadata key of a merged file's recipe."""

CHANGED = "changed"
"""The entry of a recipe whose result was changed since: some of its layers were left out, or have other numbers."""

HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
STALE = (
    *HASHES,
    "lora_adapter_metadata",
    "ss_network_module",
    "ss_network_args",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_output_name",
    "ot_branch",
)
"""Entries that describe the tensors or the file, and are wrong once those change.

Two files of one ``ss_output_name`` hide each other in A1111, and InvokeAI treats any file with ``ot_branch`` as OMI.
"""

NUMBERED = re.compile(r"(unet|text_encoder)(:\d+:rank)?")
"""cloneofsimo's entries: the ranks of tensors that had a number for a name."""

HASHED_DIALECTS = ("kohya", "kohya-diffusers")
"""Dialects whose readers look for kohya's hashes."""


def for_writing(lora: "LoRA", spelling: "Spelling") -> tuple[Mapping[str, str], bool]:
    """Return the metadata of a LoRA as it is written, and whether kohya's hashes belong in it."""
    if spelling.verbatim:
        stale = HASHES if spelling.dtype else ()
        return {key: value for key, value in lora.metadata.items() if key not in stale}, False
    late = lora.metadata if isinstance(lora.metadata, Awaited) else None
    kept = lasting(late.known if late else lora.metadata)
    kept.setdefault("format", "pt")
    if lora.families:
        kept |= labelled(lora.families, kept)
    if spelling.dialect.name == "diffusers-peft":
        kept["lora_adapter_metadata"] = adapter_metadata(component_configs(spelling.layers, lora.about))
    if spelling.dialect.name in HASHED_DIALECTS:
        kept |= network(label_of(lora.architecture), list(spelling.layers.values()))
    hashed = spelling.dialect.name in HASHED_DIALECTS
    if late:
        text = _with_output(late.draft, spelling, lora)
        return Awaited(kept, RECIPE, text, lambda: _with_output(late[RECIPE], spelling, lora)), hashed
    if RECIPE in kept and lora.origin is None:
        kept[RECIPE] = _with_output(kept.pop(RECIPE), spelling, lora)
    return kept, hashed


def lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that stay true when a LoRA is written anew."""
    return {key: value for key, value in metadata.items() if key not in STALE and not NUMBERED.fullmatch(key)}


def of_changed(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Return the metadata of a changed LoRA: its recipe still names the parents, and is marked as that of another file."""
    if isinstance(metadata, Awaited):
        return Awaited(metadata.known, RECIPE, _marked(metadata.draft), lambda: _marked(metadata[RECIPE]))
    return {**metadata, RECIPE: _marked(metadata[RECIPE])} if RECIPE in metadata else metadata


def _marked(recipe: str) -> str:
    found = said(recipe)
    return as_json(found | {CHANGED: True}) if "inputs" in found else recipe


def inputs_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of the LoRAs that a merge's record names; none where it has another form."""
    found = record.get("inputs")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def weight_of(entry: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the weight of one of a record's LoRAs as text: a number, patterns with numbers, or the rule for all."""
    rule = str(record.get("weights")) + (f" ({record['scope']})" if record.get("scope") else "")
    weight = entry.get("weight", rule)
    if isinstance(weight, dict):
        return ";".join(f"{pattern}={_short(number)}" for pattern, number in weight.items())
    return _short(weight)


def _short(number: Any) -> str:
    """Return a weight with four digits; a record may have anything in its place."""
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _with_output(recipe: str, spelling: "Spelling", lora: "LoRA") -> str:
    """Return a merge's recipe with the dialect and the dtype in which it is written; any other text as it is."""
    found = said(recipe)
    if "inputs" not in found:
        return recipe
    output = {"dialect": spelling.dialect.name}
    output |= {"dtype": NAMES[spelling.dtype]} if spelling.dtype else {}
    output |= _cut_as(found.get("output"), spelling.dialect.name, lora)
    return as_json(found | {"output": output | ({"allow_lossy": True} if spelling.left_out else {})})


def _cut_as(planned: Any, dialect: str, lora: "LoRA") -> dict[str, str]:
    """Name the dialect in which a merge was planned, if it joins other modules than the one that is written.

    Args:
        planned: The record's output, as the plan has it.
        dialect: Name of the dialect that is written.
        lora: The merged LoRA.
    """
    from .dialects import DIALECTS

    name = str(planned.get("cut_as", planned.get("dialect"))) if isinstance(planned, dict) else ""
    return {"cut_as": name} if name in DIALECTS and _joined(name, lora) != _joined(dialect, lora) else {}


def _joined(dialect: str, lora: "LoRA") -> set[tuple[str, ...]]:
    """Return the modules of a LoRA that a dialect writes as one weight, which a merge cuts as one."""
    from .dialects import DIALECTS
    from .dialects.base import table

    if lora.architecture is None:
        return set()
    whole = table(DIALECTS[dialect].names, ARCHITECTURES[lora.architecture]).values()
    found = [tuple(part.module for part in parts if part.module in lora) for parts in whole]
    return {modules for modules in found if len(modules) > 1}


def network(label: Label | None, layers: Sequence[Layer]) -> dict[str, str]:
    """Return the entries by which sd-scripts and LyCORIS describe a network, from the layers as written.

    Args:
        label: The family's labels, if it is known.
        layers: The layers, or their layouts.
    """
    plain = label.module if label else "networks.lora"
    found = {"ss_network_module": plain if all(map(_is_plain, layers)) else "lycoris.kohya"}
    ranks = {rank for layer in layers if (rank := layer.own_rank) is not None}
    alphas = {layer.own_rank if (a := layer.own_alpha) is None else a for layer in layers} - {None}
    found["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    found["ss_network_alpha"] = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    arguments = _arguments(layers)
    return found | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def _is_plain(layer: Layer) -> bool:
    """Return whether sd-scripts' own networks have such layers."""
    return layer.kind == "lora" and not layer.has_core


def _arguments(layers: Sequence[Layer]) -> dict[str, str]:
    """Return LyCORIS's arguments for such layers; none for plain LoRAs, and no algorithm if there are several."""
    if all(map(_is_plain, layers)):
        return {}
    kinds = {layer.inner.kind for layer in layers} & {"lora", "loha", "lokr", "full"}
    found = {"algo": kinds.pop()} if len(kinds) == 1 else {}
    found |= {"use_tucker": "True"} if any(layer.has_core for layer in layers) else {}
    return found | ({"dora_wd": "True"} if any(layer.axis for layer in layers) else {})
