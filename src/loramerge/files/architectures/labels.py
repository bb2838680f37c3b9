"""Header entries by which other tools name the family of a LoRA, family by family.

Sources: kohya-ss/sd-scripts, library/sai_model_spec.py and model_util.py; musubi-tuner; Stability-AI/ModelSpec.
They are read by A1111's and Forge's network.py (SDXL if it begins with ``sdxl_``, SD 2 if there is ``ss_v2``), SD.Next's
network.py and SwarmUI's T2IModelClassSorter.cs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ARCHITECTURE = "loramerge.architecture"
"""Our own entry, for every family and for models with widths of their own: the family's name in `ARCHITECTURES`."""

SPECIFICATION, VERSION = "modelspec.architecture", "ss_base_model_version"


@dataclass(frozen=True)
class Label:
    """The names that other tools have for a family."""

    specifications: tuple[str, ...]
    """ModelSpec's names: the first is written, unless the header's value begins with one of them already."""
    versions: tuple[str, ...]
    """The same for ``ss_base_model_version``."""
    module: str = "networks.lora"
    """sd-scripts' or musubi-tuner's ``--network_module`` for plain LoRAs."""
    v2: str | None = None
    """``ss_v2``, which tells SD 1 and 2 apart."""

    @property
    def kin(self) -> tuple[str, str | None]:
        """The features that readers tell families by: A1111 takes all that begins with ``sdxl_`` for SDXL."""
        return self.versions[0].partition("_")[0], self.v2


LABELS: Mapping[str, Label] = {
    "sd15": Label(("stable-diffusion-v1",), ("sd_v1",), v2="False"),
    "sd21": Label(("stable-diffusion-v2",), ("sd_v2",), v2="True"),
    "sdxl": Label(("stable-diffusion-xl-v1-base",), ("sdxl_base_v1-0", "sdxl_base")),
    "sdxl-refiner": Label(("stable-diffusion-xl-v1-refiner",), ("sdxl_refiner_v1-0", "sdxl_refiner")),
    "ssd-1b": Label(("segmind-stable-diffusion-1b",), ("sdxl_ssd-1b",)),
    "segmind-vega": Label(("segmind-vega",), ("sdxl_vega",)),
    "sd3-medium": Label(("stable-diffusion-v3-medium",), ("sd3-medium",), "networks.lora_sd3"),
    "sd3.5-medium": Label(("stable-diffusion-v3.5-medium",), ("sd3.5-medium",), "networks.lora_sd3"),
    "sd3.5-large": Label(("stable-diffusion-v3.5-large",), ("sd3.5-large",), "networks.lora_sd3"),
    "flux": Label(("flux-1",), ("flux1",), "networks.lora_flux"),
    "qwen-image": Label(("qwen-image", "Qwen-Image"), ("qwen_image",), "networks.lora_qwen_image"),
    "chroma": Label(("chroma",), ("chroma",), "networks.lora_flux"),
    "flux2-dev": Label(("Flux.2-dev",), ("flux2", "flux_2"), "networks.lora_flux_2"),
    "flux2-klein-4b": Label(("Flux.2-klein-4b",), ("flux_2_klein_4b", "flux2_klein_4b"), "networks.lora_flux_2"),
    "flux2-klein-9b": Label(("Flux.2-klein-9b",), ("flux_2_klein_9b", "flux2_klein_9b"), "networks.lora_flux_2"),
    "z-image": Label(("Z-Image",), ("z_image", "zimage"), "networks.lora_zimage"),
    "krea2": Label(("Krea-2",), ("krea2",)),
    "anima": Label(("anima",), ("anima",), "networks.lora_anima"),
    "lumina2": Label(("lumina-2",), ("lumina2",), "networks.lora_lumina"),
    "hunyuanvideo": Label(("hunyuan-video",), ("hunyuan_video",)),
    **dict.fromkeys(("wan-14b", "wan-1.3b", "wan-5b"), Label(("wan2.1", "wan2.2"), ("wan",), "networks.lora_wan")),
}
"""Families that other tools have a name for.  The others have only our own entry."""


def labelled(families: Sequence[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that name a LoRA's family; right entries of the header aren't replaced.

    If several families fit, only entries that are true of each are returned.

    Args:
        families: Names of the families that it may be for, the likeliest first.
        metadata: The header so far.
    """
    entries = {ARCHITECTURE: families[0]} if len(families) == 1 else {}
    label = LABELS.get(families[0])
    if label is None or len({LABELS[family].kin for family in families if family in LABELS}) > 1:
        return entries
    if not metadata.get(SPECIFICATION, "").startswith(label.specifications):
        entries[SPECIFICATION] = f"{label.specifications[0]}/lora"
    if not metadata.get(VERSION, "").startswith(label.versions):
        entries[VERSION] = label.versions[0]
    return entries | ({"ss_v2": label.v2} if label.v2 else {})
