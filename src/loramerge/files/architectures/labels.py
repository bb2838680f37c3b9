"""Header entries by which other tools name the family of a LoRA, family by family.

Sources: kohya-ss/sd-scripts, library/sai_model_spec.py and model_util.py; musubi-tuner; Stability-AI/ModelSpec.
They are read by A1111's and Forge's network.py (SDXL if it begins with ``sdxl_``, SD 2 if there is ``ss_v2``), SD.Next's
network.py and SwarmUI's T2IModelClassSorter.cs.
"""

from collections.abc import Mapping, Sequence

from . import ARCHITECTURES
from .family import Label

ARCHITECTURE = "loramerge.architecture"
"""Our own entry, for every family and for models with widths of their own: the family's name in `ARCHITECTURES`."""

SPECIFICATION, VERSION = "modelspec.architecture", "ss_base_model_version"


def label_of(family: str | None) -> Label | None:
    """Return the names that other tools have for a family, if it is known and they have any."""
    return ARCHITECTURES[family].label if family else None


def labelled(families: Sequence[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that name a LoRA's family; right entries of the header aren't replaced.

    If several families fit, only entries that are true of each are returned.

    Args:
        families: Names of the families that it may be for, the likeliest first.
        metadata: The header so far.
    """
    entries = {ARCHITECTURE: families[0]} if len(families) == 1 else {}
    labels = [found for family in families if (found := label_of(family))]
    label = label_of(families[0])
    if label is None or len({found.features for found in labels}) > 1:
        return entries
    if not metadata.get(SPECIFICATION, "").startswith(label.specifications):
        entries[SPECIFICATION] = f"{label.specifications[0]}/lora"
    if not metadata.get(VERSION, "").startswith(label.versions):
        entries[VERSION] = label.versions[0]
    return entries | ({"ss_v2": label.v2} if label.v2 else {})
