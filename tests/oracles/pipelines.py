"""Pipelines with every block of the published models, LoRAs that fit them, and what the pipelines make of those."""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loramerge import LoRA
from loramerge.testing import random_layer

Shape = tuple[int, ...]
WIDTH = 8
ADAPTER = "oracle"
SOME = re.compile(
    r"mid_block\.attentions\.0\.(proj_|transformer_blocks\.0)|resnets\.0\.|samplers|conv_(in|out)|_embedding"
    r"|\.layers\.0\.|^transformer\.((single_)?transformer_blocks\.[07]\.|[^.]*embed|norm_out|proj_out)"
)


def clip(layers: int, *, width: int = WIDTH, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=9,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def sdxl() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8, 12),
        norm_num_groups=2,
        attention_head_dim=(1, 2, 3),
        cross_attention_dim=10,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=14,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=clip(12),
        text_encoder_2=clip(32, projection=True),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=None,
    )


def sd15() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(4, 8, 12, 12),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=10,
    )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=clip(12),
        tokenizer=None,
        unet=unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux() -> DiffusionPipeline:
    """Real widths, because diffusers' reader of kohya's names has them in its code; without their memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    return FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=clip(12),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=hollow(transformer),
    )


def hollow(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose every weight is one zero, seen in the weight's shape."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return model


PIPELINES: Mapping[str, Callable[[], DiffusionPipeline]] = {"sdxl": sdxl, "sd15": sd15, "flux": flux}


@cache
def pipeline(architecture: str) -> DiffusionPipeline:
    """A pipeline that tests share."""
    return PIPELINES[architecture]()


@contextmanager
def loaded(architecture: str, source: object) -> Iterator[dict[str, LoraLayer]]:
    """PEFT's layers in a pipeline after `load_lora_weights`, by loramerge's module names."""
    pipe = pipeline(architecture)
    try:
        pipe.load_lora_weights(source, adapter_name=ADAPTER)
    except Exception:
        pipeline.cache_clear()  # diffusers leaves a half-loaded pipeline behind
        raise
    try:
        yield {
            named(component, path): module
            for component, model in components(pipe).items()
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
    finally:
        pipe.unload_lora_weights()


def components(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}


def named(component: str, path: str) -> str:
    """loramerge's name of a module: transformers 5 leaves out ``text_model.`` in one of its classes."""
    if component.startswith("text_encoder") and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"
    return f"{component}.{path}"


@cache
def shapes(architecture: str) -> Mapping[str, Shape]:
    """Weight shape of every module of a pipeline, by loramerge's names."""
    return {
        named(component, path): tuple(module.weight.shape)
        for component, model in components(PIPELINES[architecture]()).items()
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }


def attention(module: str, shape: Shape) -> bool:
    return "attn" in module and len(shape) == 2


def everything(module: str, shape: Shape) -> bool:
    return len(shape) >= 2 and "embeddings" not in module


def a_few(module: str, shape: Shape) -> bool:
    """Some modules of every kind and component, convolutions among them."""
    return everything(module, shape) and SOME.search(module) is not None


def some_attention(module: str, shape: Shape) -> bool:
    return attention(module, shape) and "blocks.0." in module


def modules(architecture: str, scope: Callable[[str, Shape], bool]) -> list[str]:
    return [module for module, shape in shapes(architecture).items() if scope(module, shape)]


T = TypeVar("T")


def pick(module: str, choices: Sequence[T]) -> T:
    """One of the choices, different from module to module and the same in every run."""
    return choices[zlib.crc32(module.encode()) % len(choices)]


def dynamic_rank(module: str) -> int:
    """A module's own rank; of ``text_projection`` the commonest, which diffusers takes it to have."""
    return 4 if module.endswith("text_projection") else pick(module, (4, 4, 4, 1, 2, 6))


def own_alpha(module: str) -> float | None:
    return pick(module[::-1], (None, 0.5, 1.0, 3.0, 8.0))


def lora_for(
    architecture: str,
    scope: Callable[[str, Shape], bool],
    *,
    kind: Callable[[str], str] = lambda module: "lora",
    rank: Callable[[str], int] = dynamic_rank,
    alpha: Callable[[str], float | None] = own_alpha,
    seed: int = 0,
) -> LoRA:
    """A LoRA for a pipeline, by default with a rank and an alpha of its own in every module."""
    layouts = {
        module: random_layer(
            shapes(architecture)[module],
            kind=kind(module),
            rank=rank(module),
            alpha=alpha(module),
            seed=zlib.crc32(f"{seed}/{module}".encode()),
        )
        for module in modules(architecture, scope)
    }
    return LoRA(name=f"lora {seed}", architecture=architecture, dialect="kohya", layouts=layouts)
