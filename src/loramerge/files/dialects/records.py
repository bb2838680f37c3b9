"""The tensors of a file grouped by stem: its layers, before their modules are known."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import LayerError, LoRAMergeError
from ...layers import MAGNITUDES, UNKNOWN, Layer, LowRank, build
from ...tensors import Tensor
from ..architectures.names import Parts, flat
from .alphas import stored
from .suffixes import parse


@dataclass(eq=False)
class Record:
    """The tensors that a file has under one stem."""

    stem: str
    style: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    """The key of each tensor, by role."""
    parts: Parts = ()
    """The modules that the stem stands for."""
    alpha: float | None = None
    """The alpha among the tensors."""
    layer: Layer | None = None
    """The layer that the tensors make up, before the shape of its weight is known."""


def records_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Record], list[str]]:
    """Group keys by stem; the keys that have no known suffix are returned apart."""
    records: dict[str, Record] = {}
    rest: list[str] = []
    for key, spec in tensors.items():
        parsed = parse(key)
        if parsed is None:
            rest.append(key)
            continue
        stem, role, style = parsed
        if role == "scale" and len(spec.shape) == 1 and spec.shape[0] > 1:
            role = "set_weight"
        record = records.get(stem)
        if record is None:
            record = records[stem] = Record(stem)
        if role in record.keys:
            raise LayerError(f"{stem}: both {record.keys[role]!r} and {key!r} give its {role}")
        record.keys[role] = key
        record.style = record.style or style
    extras = _claim(rest, records)
    for stem in [stem for stem, record in records.items() if not record.keys.keys() - {"alpha", "scale"}]:
        extras += records.pop(stem).keys.values()
    return records, extras


def rejoined(records: dict[str, Record]) -> int:
    """Move magnitudes whose stem kept its dots to their layer's record; return how many there were."""
    lone = [stem for stem, r in records.items() if "." in stem and r.keys.keys() <= MAGNITUDES]
    homes = {stem: home for stem in lone if (home := records.get(flat(stem))) is not None}
    for stem, home in homes.items():
        home.keys |= records.pop(stem).keys
    return len(homes)


def _claim(rest: list[str], records: Mapping[str, Record]) -> list[str]:
    """Add keys with an unknown suffix to the record whose stem they begin with; return the others."""
    extras = []
    for key in rest:
        if ".base_layer." in key:  # a whole weight of the model that PEFT wrapped
            extras.append(key)
            continue
        stem, _, end = key.rpartition(".")
        while stem and stem not in records:
            stem, _, more = stem.rpartition(".")
            end = f"{more}.{end}"
        if stem:
            records[stem].keys[f"{UNKNOWN}{end}"] = key
        else:
            extras.append(key)
    return extras


def layer_of(record: Record, tensors: Mapping[str, Tensor]) -> Layer:
    """Build the layer of a record and note its alpha.

    Raises:
        LoRAMergeError: The tensors don't make up a layer, or the alpha isn't a number.
    """
    held = {role: tensors[key] for role, key in record.keys.items() if role not in ("alpha", "scale", "reshape_weight")}
    try:
        record.alpha = stored(record.keys, tensors)
        return build(held, record.alpha, None)
    except LoRAMergeError as error:
        raise type(error)(f"{record.stem}: {error}. Keys: {', '.join(record.keys.values())}.") from None


def check_ranks(records: Mapping[str, Record]) -> None:
    """Refuse a file if most of its ranks exceed both sides of their weights: its factors are exchanged.

    A few may exceed them, such as in a small layer of a file that has one rank for all.

    Raises:
        LayerError: Most do.
    """
    plain = {stem: r.layer for stem, r in records.items() if isinstance(r.layer, LowRank) and r.layer.mid is None}
    above = {s: layer for s, layer in plain.items() if layer.rank > max(layer.shape[0], math.prod(layer.shape[1:]))}
    if 2 * len(above) > len(plain):
        stem, layer = next(iter(above.items()))
        raise LayerError(
            f"{stem}: rank {layer.rank} on a weight of {layer.shape}: lora_A (down) and lora_B (up) are exchanged, here and in "
            f"{len(above)} of {len(plain)} layers. Wanted lora_A of shape (rank, inputs) and lora_B of (outputs, rank). "
            "Way out: exchange them where the file was made."
        )


def not_a_lora(keys: list[str]) -> str:
    """Say what a file without LoRA layers looks like."""
    what = next((what for mark, what in OTHER_FILES if any(re.search(mark, key) for key in keys)), "something else")
    shown = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    if not keys:
        return "The file holds no tensors, so it is not a LoRA."
    return (
        f"No LoRA layer among the file's {len(keys)} keys ({shown}); it looks like {what}. Wanted keys such as "
        f"'….lora_down.weight', '….lora_A.weight' or '….hada_w1_a'.{BAKE if what in MODELS else ''}"
    )


MODELS = ("a whole checkpoint", "a model's weights")
BAKE = " To add a LoRA to a model: loramerge bake LORA --base MODEL -o NEW."


OTHER_FILES = (
    (
        r"^gates\.",
        "MoLE's gates, which follow the picture and which no LoRA file can hold: loramerge generate --compose mole -O gates=FILE",
    ),
    (r"^lora_controlnet$", "a Control-LoRA: a ControlNet, stored as factors, which loaders of ControlNets read"),
    (r"^lllite_", "a ControlNet-LLLite"),
    (r"^(first_stage_model|cond_stage_model|model\.diffusion_model)\.", "a whole checkpoint"),
    (r"^(control_model|controlnet_|input_hint_block|zero_convs)", "a ControlNet"),
    (r"^(image_proj|ip_adapter)", "an IP-Adapter"),
    (r"^(emb_params|string_to_param|clip_[lg]$|<)", "a textual inversion"),
    (r"^(encoder|decoder)\.(down|up|mid)\.", "a VAE"),
    (r"^(down_blocks|double_blocks|transformer_blocks|input_blocks)\.", "a model's weights"),
)
