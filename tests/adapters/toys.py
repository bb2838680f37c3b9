"""Whole pipelines of random weights a few channels wide, LoRAs that fit them, and a DINOv2 as small."""

import json
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from loramerge import LoRA
from loramerge.testing import random_layer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_"
ENDS = ("<|startoftext|>", "<|endoftext|>")
VOCABULARY = {piece: i for i, piece in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS), *ENDS])}
LENGTH = 24
PROMPTS = ("a psq-person", "a barca24_jersey")
PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 32},
    "resample": 3,
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=dict(VOCABULARY), merges=[], model_max_length=LENGTH)


def clip(*, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=LENGTH,
        bos_token_id=VOCABULARY[ENDS[0]],
        eos_token_id=VOCABULARY[ENDS[1]],
        pad_token_id=VOCABULARY[ENDS[1]],
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **options,
    )


def sdxl() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=16,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=8 + 6 * 2,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )


def sd15() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


BUILDERS: Mapping[str, Callable[[], DiffusionPipeline]] = {"sdxl": sdxl, "sd15": sd15, "sd3-medium": sd3}


@cache
def pipeline(architecture: str) -> DiffusionPipeline:
    """A pipeline that tests share, the same in every run."""
    torch.manual_seed(0)
    pipe = BUILDERS[architecture]()
    for parameter in denoiser(pipe).parameters():  # zero-initialised layers would hide what LoRAs do
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def component(pipe: DiffusionPipeline) -> str:
    return "unet" if "unet" in pipe.components else "transformer"


def denoiser(pipe: DiffusionPipeline) -> Any:
    return pipe.components[component(pipe)]


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
