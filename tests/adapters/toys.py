"""The pipelines of `tiny`, one of each for all tests, LoRAs that fit them, and a DINOv2 as small."""

import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler
from PIL import Image
from tiny import PROMPTS, clip, denoiser
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from loramerge import LoRA
from loramerge.testing import random_layer

__all__ = ["PROMPTS", "clip", "denoiser"]

PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 32},
    "resample": 3,
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@cache
def pipeline(architecture: str) -> DiffusionPipeline:
    """A pipeline that tests share, the same in every run; that of SD 1.5 draws noise in every step."""
    pipe = tiny.pipeline(architecture)
    if architecture == "sd15":
        pipe.scheduler = EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear")
    return pipe


def attention(module: str) -> bool:
    return "attn" in module and module.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj"))


def everything(module: str) -> bool:
    return "embed" not in module and "norm" not in module


def lora(
    architecture: str, seed: int, *, only: Callable[[str], bool] = attention, components: str = "unet transformer"
) -> LoRA:
    """A LoRA with random values in some modules of a tiny pipeline, of ranks 1 to 3.

    diffusers takes text_projection to have its encoder's commonest rank.
    """
    pipe = pipeline(architecture)
    layouts = {}
    for name in components.split():
        for path, weight in (pipe.components.get(name) or torch.nn.Module()).named_parameters():
            module = f"{name}.{path.removesuffix('.weight')}"
            if name.startswith("text_encoder") and path.startswith("encoder."):
                module = f"{name}.text_model.{path.removesuffix('.weight')}"
            if path.endswith(".weight") and weight.ndim > 1 and only(module):
                number = zlib.crc32(f"{seed}/{module}".encode())
                layouts[module] = random_layer(
                    tuple(weight.shape),
                    rank=2 if "text_encoder" in module else 1 + number % 3,
                    alpha=3.0,
                    seed=number,
                )
    return LoRA(name=f"lora {seed}", architecture=architecture, dialect="diffusers", layouts=layouts)


def dinov2(folder: Path, *, registers: bool = False, preprocessing: bool = True) -> Path:
    """A random DINOv2 in a directory, as the Hub has it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "layerscale_value": 1.0,
    }
    model = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **options))
        if registers
        else Dinov2Model(Dinov2Config(**options))
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if preprocessing:
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def picture(seed: int, width: int = 24, height: int = 20, mode: str = "RGB") -> Image.Image:
    """Noise, smooth enough that filters matter."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 256, (5, 4, channels) if channels > 1 else (5, 4), dtype=np.uint8)
    return Image.fromarray(coarse, mode).resize((width, height), Image.Resampling.BICUBIC)


def folder_of(path: Path, seeds: range, **options: Any) -> Path:
    """A folder of pictures."""
    path.mkdir(parents=True)
    for seed in seeds:
        picture(seed, **options).save(path / f"a-{seed}.png")
    return path
