"""Whole pipelines of random weights, a few channels wide: tokenizers, text encoders, VAE, denoiser, scheduler."""

import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import flows
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
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
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from loramerge import LoRA
from loramerge.testing import random_layer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_"
WORDS = ("<|startoftext|>", "<|endoftext|>")
VOCABULARY = {piece: i for i, piece in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS), *WORDS])}
LENGTH = 24
SIDE = 16
PROMPTS = ["a psq-person", "a barca24_jersey"]


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=dict(VOCABULARY), merges=[], model_max_length=LENGTH)


def clip(width: int = 8, *, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=LENGTH,
        bos_token_id=VOCABULARY[WORDS[0]],
        eos_token_id=VOCABULARY[WORDS[1]],
        pad_token_id=VOCABULARY[WORDS[1]],
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(channels: int = 4, *, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        shift_factor=shift,
    ).eval()


def sdxl() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
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
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )


def sd15(prediction: str = "epsilon") -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
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
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift=0.1),
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    config = T5Config(vocab_size=len(pieces), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    encoder, second = t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift=0.1),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=second,
        transformer=transformer.eval(),
    )


BUILDERS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sdxl": sdxl,
    "sd15": sd15,
    "sd21": lambda: sd15("v_prediction"),
    "sd3-medium": sd3,
    "flux": flux,
    **flows.BUILDERS,
}


def pipeline(architecture: str, seed: int = 0) -> DiffusionPipeline:
    """A pipeline of its own, the same in every run."""
    torch.manual_seed(seed)
    pipe = BUILDERS[architecture]()
    for parameter in denoiser(pipe).parameters():  # zero-initialised layers would hide what LoRAs do
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def component(pipe: DiffusionPipeline) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def denoiser(pipe: DiffusionPipeline) -> Any:
    return getattr(pipe, component(pipe))


@cache
def shapes(architecture: str) -> Mapping[str, tuple[int, ...]]:
    """Weight shape of every module of the denoiser, by loramerge's names."""
    pipe = BUILDERS[architecture]()
    return {
        f"{component(pipe)}.{path}": tuple(module.weight.shape)
        for path, module in denoiser(pipe).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def attention(module: str) -> bool:
    return module.endswith(("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"))


def lora(
    architecture: str,
    seed: int,
    rank: int = 2,
    *,
    only: Callable[[str], bool] = attention,
    more: Mapping[str, tuple[int, ...]] | None = None,
) -> LoRA:
    """A LoRA with random values in some modules of a tiny pipeline."""
    found = {m: shape for m, shape in shapes(architecture).items() if only(m)} | dict(more or {})
    layouts = {
        module: random_layer(shape, rank=rank, alpha=3.0, seed=zlib.crc32(f"{seed}/{module}".encode()))
        for module, shape in found.items()
    }
    return LoRA(name=f"lora {seed}", architecture=architecture, dialect="diffusers-peft", layouts=layouts)


def images(folder: Path, caption: str | None, count: int = 2, seed: int = 0) -> Path:
    """A folder of small pictures, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 255, (24, 20 + 4 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption)
    return folder
