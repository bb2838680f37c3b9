"""diffusers: its loaders of LoRAs put PEFT's layers into the model that the pipeline would have."""

import logging
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import lora_pipeline
from judging import Changes, product
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from loramerge.files.architectures import ARCHITECTURES

LOADERS: Mapping[str, str] = {
    **dict.fromkeys(("sdxl", "sdxl-refiner", "ssd-1b", "segmind-vega", "kolors"), "StableDiffusionXL"),
    **dict.fromkeys(("sd15", "sd21"), "StableDiffusion"),
    **dict.fromkeys(("flux", "chroma", "longcat-image"), "Flux"),
    **dict.fromkeys(("sd3-medium", "sd3.5-medium", "sd3.5-large"), "SD3"),
    **dict.fromkeys(("flux2-dev", "flux2-klein-4b", "flux2-klein-9b"), "Flux2"),
    **dict.fromkeys(("wan-14b", "wan-1.3b", "wan-5b"), "Wan"),
    **dict.fromkeys(("ltxv-2b", "ltxv-13b"), "LTXVideo"),
    **dict.fromkeys(("kandinsky5-lite", "kandinsky5-pro", "kandinsky5-image"), "Kandinsky"),
    **dict.fromkeys(("sana-0.6b", "sana-1.6b", "sana-4.8b"), "Sana"),
    **dict.fromkeys(("cogvideox-2b", "cogvideox-5b"), "CogVideoX"),
    "hunyuanvideo": "HunyuanVideo", "auraflow": "AuraFlow", "lumina2": "Lumina2", "cosmos-predict2-2b": "Cosmos",
    "anima": "Anima", "z-image": "ZImage", "ltx2": "LTX2", "mochi": "Mochi1", "krea2": "Krea2", "hidream": "HiDreamImage",
    "ernie-image": "ErnieImage", "qwen-image": "QwenImage", "ideogram4": "Ideogram4", "minimax-h3": "MiniMaxH3",
    "flux3": "Flux3", "ace-step": "AceStep", "bria-fibo2": "BriaFibo2", "cogview4": "CogView4",
}  # fmt: skip
"""The loaders of pipelines by our families; the others' models load LoRAs themselves."""

MODELS: Mapping[str, Mapping[str, None]] = {name: {"": None} for name in ARCHITECTURES if name != "omnigen2"}
"""All families but one, of which diffusers has no model."""


def source() -> list[str]:
    """Return the package and its version."""
    return ["huggingface/diffusers", version("diffusers"), ""]


def open_checkout(folder: Path) -> None:
    """Make the models' configurations importable; diffusers itself is installed."""
    sys.path.append(str(Path(__file__).parents[1]))
    logging.disable(logging.CRITICAL)
    BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda *_, **__: (
        None
    )  # not to where the models have no values


def built(family: str) -> dict[str, torch.nn.Module]:
    """Build the models at their real size, without weights."""
    a, builders = ARCHITECTURES[family], import_module("dump_architectures").MODELS
    with torch.device("meta"):
        made = {a.denoiser: builders[a.model]()} | {b.component: builders[b.model]() for b in a.beside}
    return {name: model[0] if isinstance(model, list) else model for name, model in made.items()}


@cache
def paths(family: str, model: str) -> tuple[str, ...]:
    """Return the paths of the layers, with underscores for dots."""
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return tuple(
        _path(name, path)
        for name, part in built(family).items()
        for path, layer in part.named_modules()
        if isinstance(layer, layers)
    )


def _path(component: str, path: str) -> str:
    """Return the path that the denoiser's modules have, and those beside it."""
    return f"{component}.{path}".replace(".", "_") if component == "text_conditioner" else path.replace(".", "_")


def read(family: str, model: str, file: Path) -> Changes:
    """Return what a file changes."""
    parts = built(family)
    if family in LOADERS:
        given: dict[str, Any] = {
            "components": parts,
            "hf_device_map": None,
            "text_encoder": None,
            "text_encoder_2": None,
        }
        loader = getattr(lora_pipeline, f"{LOADERS[family]}LoraLoaderMixin")
        pipe = type("Pipe", (loader,), {**given, "text_encoder_3": None, **parts})()
        pipe.load_lora_weights(str(file), adapter_name="x")
    else:
        name = ARCHITECTURES[family].denoiser
        parts[name].load_lora_adapter(load_file(file), prefix=name, low_cpu_mem_usage=True)
    return {
        _path(name, path): _change(layer)
        for name, part in parts.items()
        for path, layer in part.named_modules()
        if getattr(layer, "lora_A", None) and not next(iter(layer.lora_A.values())).weight.is_meta
    }


def _change(layer: Any) -> torch.Tensor:
    ((name, down),) = layer.lora_A.items()
    return product(layer.lora_B[name].weight, down.weight, layer.scaling[name])
