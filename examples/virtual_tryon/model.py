"""A miniature of Stable Diffusion XL: the same classes, names and conditioning, some 400 times smaller.

    tokenizers      400 tokens, learned from the world's captions
    text encoders   2 layers × 64 and 3 layers × 80 wide; the UNet sees both side by side (144) and the second's projection
    UNet            3 levels × 2 layers of SDXL's blocks, (64, 80, 112) wide, one transformer layer in each: 6.6 M parameters
    autoencoder     a small AutoencoderKL (autoencoder.py)
    scheduler       Euler, v-prediction, zero terminal SNR

Needs ``pip install torch diffusers transformers tokenizers safetensors numpy pillow``.
"""

import copy
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from . import tokenizer
from .autoencoder import LATENT_CHANNELS, PATCH, untrained
from .world import caption, sample

FIRST, SECOND = 64, 80
"""Widths of the two text encoders."""
WIDTHS = (64, 80, 112)
RESOLUTION = 96
TIME_WIDTH = 8
HELD_OUT_SEED = 1_000_003
"""Added to the seed for pictures never trained on."""


def quiet() -> None:
    """Switch off the libraries' progress bars and advice."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def keep_memory() -> None:
    """Keep freed memory in this process, on Linux: mapping the same arrays again at each step costs a third of it."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 1 << 30)


def build(
    resolution: int = RESOLUTION, *, seed: int = 0, captions: int = 20_000, vae: AutoencoderKL | None = None
) -> StableDiffusionXLPipeline:
    """Build an untrained miniature: random networks and a tokenizer of the world's captions.

    Args:
        resolution: Pixels a side, a multiple of 32.
        seed: Of the networks' values and of the tokenizer's captions.
        captions: How many the tokenizer is learned from.
        vae: A trained autoencoder; a random one without it.
    """
    if resolution % (4 * PATCH):
        raise ValueError(
            f"resolution must be a multiple of {4 * PATCH} (a patch of {PATCH}, halved twice), got {resolution}."
        )
    random = np.random.default_rng([seed, 1])
    first, second = tokenizer.tokenizers(*tokenizer.learn(caption(sample(random), random) for _ in range(captions)))
    torch.manual_seed(seed)
    return assemble(
        vae=(vae or untrained(resolution)).eval(),
        text_encoder=text_encoder(first, FIRST, layers=2, heads=2),
        text_encoder_2=text_encoder(first, SECOND, layers=3, heads=4, projection=True),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(resolution // PATCH),
        scheduler=scheduler(),
    )


def assemble(**components: Any) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline(**components, force_zeros_for_empty_prompt=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet(sample_size: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=FIRST + SECOND,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + SECOND,
        norm_num_groups=8,
    )


def text_encoder(words: CLIPTokenizer, width: int, *, layers: int, heads: int, projection: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        hidden_act="gelu" if projection else "quick_gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(parameter, std=0.4)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.1)
    return encoder


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def encode(first: nn.Module, second: nn.Module, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """Encode prompts as SDXL's ``encode_prompt`` does: states ``(n, length, 144)``, projection ``(n, 80)``."""
    states = first(ids, output_hidden_states=True).hidden_states[-2]
    outputs = second(ids_2, output_hidden_states=True)
    return torch.cat([states, outputs.hidden_states[-2]], -1), outputs.text_embeds


def token_ids(pipeline: StableDiffusionXLPipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return both tokenizers' ids, shape ``(len(texts), MAX_LENGTH)`` each.

    Raises:
        ValueError: A text has more tokens than the encoders take.
    """
    found = pipeline.tokenizer(texts).input_ids
    for text, ids in zip(texts, found, strict=True):
        if len(ids) > tokenizer.MAX_LENGTH:
            raise ValueError(f"{len(ids)} tokens, more than {tokenizer.MAX_LENGTH}: {text!r}. Shorten the prompt.")
    padded = [t(texts, padding="max_length").input_ids for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
    return torch.tensor(padded[0]), torch.tensor(padded[1])


def as_tensor(pictures: np.ndarray) -> Tensor:
    """Convert bytes of shape ``(n, height, width, 3)`` to floats in [-1, 1] of shape ``(n, 3, height, width)``."""
    return torch.as_tensor(pictures).movedim(-1, 1).float() / 127.5 - 1


def generate(
    pipeline: StableDiffusionXLPipeline, prompts: list[str], *, seed: int, guidance: float = 2.0, steps: int = 20
) -> np.ndarray:
    """Generate pictures as bytes, ``(len(prompts), height, width, 3)``; picture i has the noise of ``seed + i``."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    size = pipeline.vae.config.sample_size
    usual = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(usual.config)
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size,
        width=size,
        generator=noise,
        output_type="np",
    ).images
    pipeline.scheduler = usual
    return (images * 255).round().astype(np.uint8)


def save(pipeline: StableDiffusionXLPipeline, folder: str | Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write a folder that diffusers loads; the networks go to ``dtype`` in the files, not in memory."""
    folder = Path(folder)
    parts = {
        name: halved(part, dtype) if isinstance(part, nn.Module) else part for name, part in pipeline.components.items()
    }
    assemble(**parts).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None):  # the folder that a part was loaded from
            file.write_text(json.dumps(config, indent=2) + "\n")
    return folder


def halved(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy to the CPU in another precision."""
    return nn.Module.to(copy.deepcopy(network), "cpu", dtype)


def load(folder: str | Path, *, device: str = "cpu") -> StableDiffusionXLPipeline:
    """Load the pipeline of a folder, in float32 whatever the files hold."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
