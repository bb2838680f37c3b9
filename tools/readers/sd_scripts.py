"""sd-scripts: its networks, made from a file as for inference and for training that goes on."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from checkout import enter
from judging import Changes, product
from safetensors.torch import load_file

REPOSITORY = "kohya-ss/sd-scripts"


def _of(module: str) -> Any:
    return import_module(module)


def _unet(v2: bool) -> torch.nn.Module:
    config = _of("library.model_util").create_unet_diffusers_config(v2, True)
    return _of("library.original_unet").UNet2DConditionModel(**config)


def _flux() -> torch.nn.Module:
    flux = _of("library.flux_models")
    return flux.Flux(flux.configs["dev"].params)


def _chroma() -> torch.nn.Module:
    chroma = _of("library.chroma_models")
    return chroma.Chroma(chroma.chroma_params)


def _sd3(depth: int, blocks: int = -1, qk_norm: str | None = None) -> torch.nn.Module:
    sd3 = _of("library.sd3_models")
    given = {"patch_size": 2, "depth": depth, "num_patches": 384 * 384, "pos_embed_max_size": 384}
    params = sd3.SD3Params(
        **given, adm_in_channels=2048, qk_norm=qk_norm, x_block_self_attn_layers=[*range(blocks + 1)],
        context_embedder_in_features=4096, context_embedder_out_features=64 * depth, model_type="",
    )  # fmt: skip
    return sd3.create_sd3_mmdit(params)


def _anima() -> torch.nn.Module:
    given = {"max_img_h": 512, "max_img_w": 512, "max_frames": 128, "in_channels": 16, "out_channels": 16}
    return _of("library.anima_models").Anima(
        **given, patch_spatial=2, patch_temporal=1, model_channels=2048, num_blocks=28, num_heads=16,
        crossattn_emb_channels=1024, use_adaln_lora=True, adaln_lora_dim=256, use_llm_adapter=True, pos_emb_cls="rope3d",
    )  # fmt: skip


MODELS: Mapping[str, Mapping[str, tuple[Callable[[], torch.nn.Module], str]]] = {
    "sdxl": {"": (lambda: _of("library.sdxl_original_unet").SdxlUNet2DConditionModel(), "lora")},
    "sd15": {"": (lambda: _unet(False), "lora")},
    "sd21": {"": (lambda: _unet(True), "lora")},
    "flux": {"": (_flux, "lora_flux")},
    "chroma": {"": (_chroma, "lora_flux")},
    "sd3-medium": {"": (lambda: _sd3(24), "lora_sd3")},
    "sd3.5-medium": {"": (lambda: _sd3(24, 12, "rms"), "lora_sd3")},
    "sd3.5-large": {"": (lambda: _sd3(38, -1, "rms"), "lora_sd3")},
    "lumina2": {"": (lambda: _of("library.lumina_models").NextDiT_2B_GQA_patch2_Adaln_Refiner(), "lora_lumina")},
    "hunyuanimage": {
        "": (lambda: _of("library.hunyuan_image_models").create_model("torch", False, None), "lora_hunyuan_image")
    },
    "anima": {"": (_anima, "lora_anima")},
}
"""sd-scripts' models by our families, each with its network."""


def open_checkout(folder: Path) -> None:
    """Make sd-scripts importable."""
    enter(folder)


@cache
def built(family: str, model: str) -> torch.nn.Module:
    """Build a model at its real size, without weights."""
    with torch.device("meta"):
        return MODELS[family][model][0]()


def paths(family: str, model: str) -> list[str]:
    """Return the paths of a model's layers, with underscores for dots."""
    weights = built(family, model).state_dict().items()
    return [k.removesuffix(".weight").replace(".", "_") for k, w in weights if k.endswith(".weight") and w.ndim > 1]


def read(family: str, model: str, file: Path) -> Changes:
    """Return what a file changes."""
    network, tensors = _of(f"networks.{MODELS[family][model][1]}"), load_file(file)
    made, _ = network.create_network_from_weights(
        1.0, None, None, [torch.nn.Module()], built(family, model), tensors, True
    )
    layers = {layer.lora_name: layer for layer in made.unet_loras}
    for layer in layers.values():
        made.add_module(layer.lora_name, layer)
    made.load_state_dict(tensors, strict=False)
    return {
        name.removeprefix("lora_unet_"): product(layer.lora_up.weight, layer.lora_down.weight, float(layer.scale))
        for name, layer in layers.items()
    }
