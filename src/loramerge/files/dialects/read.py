"""Recognising a file: the tool that wrote it, its model family, and the modules of its keys."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import NotALoRAError, OptionError
from ...tensors import Tensor
from ..architectures import Architecture
from ..architectures.hints import named
from . import DIALECTS
from .base import Dialect
from .naming import Matcher
from .records import Record, check_ranks, layer_of, not_a_lora, records_of, rejoined

SPLIT_QKV = r'"split_qkv":\s*"?[Tt]rue'
"""Matches ``split_qkv=True`` in ``ss_network_args``: there sd-scripts keeps alpha while it stacks ranks.

Source: https://github.com/kohya-ss/sd-scripts/issues/2204
"""

UNUSED = r".*\.self_attn\.(q|k|v|out)_proj\.to_(?!\1$)(q|k|v|out)"
"""Layers that diffusers 0.16 and 0.17 saved and never applied."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A file whose family, dialect and layers are recognised."""

    architecture: Architecture | None
    dialect: Dialect
    records: Mapping[str, Record]
    extras: tuple[str, ...]
    """Keys that belong to no layer: embeddings and strays."""
    notes: tuple[str, ...]
    alike: tuple[str, ...] = ()
    """Other families that have these names and shapes."""

    @property
    def style(self) -> str:
        """The commonest style of LoRA's own tensors, empty if there are none."""
        counts = Counter(record.style for record in self.records.values() if record.style)
        return counts.most_common(1)[0][0] if counts else ""


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    architecture: str | None = None,
    dialect: str | None = None,
) -> Reading:
    """Recognise a LoRA by its keys and shapes.

    Args:
        tensors: The file's tensors by key.
        metadata: The file's own metadata; it decides between families that are alike, and names the one of a
            model of its own widths.
        architecture: Name of the family, if the caller knows it.
        dialect: Name of the dialect, if the caller knows it.

    Raises:
        NotALoRAError: The keys have no layer.
        LayerError: A layer is incomplete or its shapes disagree.
        FamilyError: The metadata names another family than the layers do.
        OptionError: No layer has a name of the dialect that the caller knows.
    """
    records, extras = records_of(tensors)
    mended = rejoined(records)
    unused = [stem for stem in records if ".self_attn." in stem and re.fullmatch(UNUSED, stem)]
    for stem in unused:
        del records[stem]
    if not records:
        raise NotALoRAError(not_a_lora(list(tensors)))
    for record in records.values():
        record.layer = layer_of(record, tensors)
    check_ranks(records)
    names = Matcher(records, extras)
    said = named(metadata)
    fits = [names.told(architecture)] if architecture else names.families(said)
    family = fits[0] if fits else names.stated(said)
    broken = DIALECTS["kohya-broken"] if mended else None
    likeliest = names.dialect(family)
    chosen = DIALECTS[dialect] if dialect else broken or likeliest
    if dialect and chosen is not broken and not names.score(chosen, family) and names.score(likeliest, family):
        raise OptionError(
            f"This isn't a LoRA in the dialect {chosen.name}: none of its {len(records)} layers has a name of that, they are "
            f"those of {likeliest.name}. Way out: the dialect {likeliest.name}, or leave it out."
        )
    notes = names.resolve(family, chosen)
    if family is None:
        notes.append(names.unknown(said))
    if unused:
        notes.append(
            f"{len(unused)} layers that diffusers 0.16 saved and never applied; only a verbatim copy keeps them"
        )
    if mended:
        notes.append(f"repaired {mended} names: dots in those of DoRA's magnitudes (diffusers' export for kohya)")
    arguments = metadata.get("ss_network_args", "")
    if arguments and re.search(SPLIT_QKV, arguments):
        notes.append(
            "trained with split_qkv: readers scale its fused layers by a third or a quarter, and so does loramerge"
        )
    alike = tuple(a.name for a in fits[1:])
    return Reading(family, chosen, names.records, tuple(names.extras), tuple(notes), alike)
