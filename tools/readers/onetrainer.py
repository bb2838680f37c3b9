"""OneTrainer: its reader brings the names of every format to diffusers', from the names of the live model."""

import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from checkout import enter
from judging import Changes, product
from safetensors.torch import load_file

from loramerge.files.architectures import ARCHITECTURES

REPOSITORY = "Nerogar/OneTrainer"

MODELS: Mapping[str, Mapping[str, str]] = {
    "sdxl": {"": "StableDiffusionXLModel"},
    "sd15": {"": "StableDiffusionModel"},
    "flux": {"": "FluxModel"},
    "sd3-medium": {"": "StableDiffusion3Model"},
    "sd3.5-medium": {"": "StableDiffusion3Model"},
    "sd3.5-large": {"": "StableDiffusion3Model"},
    "qwen-image": {"": "QwenModel"},
    "z-image": {"": "ZImageModel"},
    "krea2": {"": "Krea2Model"},
    "anima": {"": "AnimaModel"},
    **{f"flux2-{size}": {"": "Flux2Model"} for size in ("dev", "klein-4b", "klein-9b")},
    "hunyuanvideo": {"": "HunyuanVideoModel"},
    "chroma": {"": "ChromaModel"},
    "hidream": {"": "HiDreamModel"},
    "ernie-image": {"": "ErnieModel"},
    "ideogram4": {"": "IdeogramModel"},
    "pixart-sigma": {"": "PixArtAlphaModel"},
    "sana-1.6b": {"": "SanaModel"},
}
"""OneTrainer's models by our families."""


def open_checkout(folder: Path) -> None:
    """Make OneTrainer importable."""
    enter(folder)
    sys.path.append(str(Path(__file__).parents[1]))  # for dump_architectures


@cache
def built(family: str) -> torch.nn.Module:
    """Build the denoiser at its real size, without weights."""
    with torch.device("meta"):
        made = import_module("dump_architectures").MODELS[ARCHITECTURES[family].model]()
    return made[0] if isinstance(made, list) else made


def paths(family: str, model: str) -> list[str]:
    """Return the paths of the layers that LoRAs are made for, with underscores for dots."""
    return [name.replace(".", "_") for name in _names(family)]


def _names(family: str) -> set[str]:
    return import_module("modules.util.load_lora_util").lora_module_names(built(family))


@cache
def base(family: str, model: str) -> Any:
    """Make the object that knows a model's names, without text encoders."""
    name = MODELS[family][model]
    made = object.__new__(getattr(import_module(f"modules.model.{name}"), name))
    setattr(made, ARCHITECTURES[family].denoiser, built(family))
    return made


def read(family: str, model: str, file: Path) -> Changes:
    """Return what a file changes."""
    code, own = import_module("modules.util.load_lora_util"), base(family, model)
    component = ARCHITECTURES[family].denoiser
    found = code.to_canonical(
        code.normalize_various(load_file(file)), component, own.lora_diffusers_to_original(), own.lora_diffusers_to_comfy(),
        own.fusion_groups(), [], None, own.lora_diffusers_to_kohya(), {component: _names(family)},
    )  # fmt: skip
    ends = (".lora_up.weight", ".lora_down.weight", ".alpha")
    stems = [key.removesuffix(ends[0]) for key in found if key.endswith(ends[0])]
    changes = {}
    for stem in stems:
        up, down, alpha = (found[stem + end] for end in ends)
        changes[stem.removeprefix(f"{component}.")] = product(up, down, float(alpha) / len(down))
    return {
        path.replace(".", "_"): rows for path, rows in _parted(family, own, changes).items() if path in _names(family)
    }


def _parted(family: str, own: Any, changes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the leaves of a fused projection their rows."""
    parted, util = dict(changes), import_module("modules.util.convert_util")
    for pattern, leaves, fused, _ in own.fusion_groups() or ():
        for group in set.intersection(*(util.matched_leaf_groups(pattern, leaf, _names(family)) for leaf in leaves)):
            if (whole := parted.pop(f"{group}.{fused}", None)) is not None:
                names = [f"{group}.{leaf}" for leaf in leaves]
                rows = [built(family).get_submodule(name).out_features for name in names]
                parted |= dict(zip(names, whole.split(rows), strict=True))
    return parted
