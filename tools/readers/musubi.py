"""musubi-tuner: of some models it merges LoRAs into the weights as it loads them, of others into the made model."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkout import enter
from judging import Changes, narrow, product, zeros
from safetensors.torch import load_file

REPOSITORY = "kohya-ss/musubi-tuner"


class Trained(NamedTuple):
    """A model that musubi-tuner trains."""

    build: Callable[[], torch.nn.Module]
    network: str
    merges: bool = False
    """True if its generation merges LoRAs into the made model, with the network's code, as training does."""
    converts: str = ""
    """The function that its generation converts LoRAs with."""


def _of(module: str) -> Any:
    return import_module(f"musubi_tuner.{module}")


def _wan(name: str) -> torch.nn.Module:
    config = _of("wan.configs").WAN_CONFIGS[name]
    sizes = ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    kind = "i2v" if config.i2v else "t2v"
    version = "2.2" if config.v2_2 else "2.1"
    return _of("wan.modules.model").WanModel(kind, version, **{size: config[size] for size in sizes}, attn_mode="torch")


def _flux2(name: str) -> torch.nn.Module:
    return _of("flux_2.flux2_models").Flux2(_of("flux_2.flux2_utils").FLUX2_MODEL_INFO[name].params, "torch", False)


def _kandinsky(name: str) -> torch.nn.Module:
    given = vars(_of("kandinsky5.configs").TASK_CONFIGS[name].dit_params)
    return _of("kandinsky5.models.dit").get_dit({**given, "attention_engine": "sdpa"})


def _hunyuan() -> torch.nn.Module:
    given = {"text_states_dim": 4096, "text_states_dim_2": 768, "in_channels": 16, "out_channels": 16}
    return _of("hunyuan_model.models").load_dit_model(
        **given, factor_kwargs={"device": "meta", "dtype": torch.float32, "attn_mode": "torch", "split_attn": False}
    )


def _framepack() -> torch.nn.Module:
    return _of("frame_pack.hunyuan_video_packed").HunyuanVideoTransformer3DModelPacked(
        has_clean_x_embedder=True, has_image_proj=True, image_proj_dim=1152, num_layers=20, num_single_layers=40,
        patch_size=2, patch_size_t=1, pooled_projection_dim=768, text_embed_dim=4096, guidance_embeds=True,
        rope_axes_dim=(16, 56, 56), attn_mode="torch",
    )  # fmt: skip


def _krea() -> torch.nn.Module:
    config = _of("krea2.krea2_utils").single_mmdit_large_wide
    return _of("krea2.krea2_mmdit").SingleStreamDiT(config, attn_mode="torch", split_attn=False)


def _ideogram() -> torch.nn.Module:
    ideogram = _of("ideogram4.ideogram4_model")
    return ideogram.Ideogram4Transformer(ideogram.Ideogram4Config(), attn_mode="torch", split_attn=False)


MODELS: Mapping[str, Mapping[str, Trained]] = {
    "flux": {
        "FLUX.1 Kontext": Trained(
            lambda: _of("flux.flux_models").Flux(
                _of("flux.flux_models").configs_flux_dev_context.params, "torch", False
            ),
            "lora_flux",
            merges=True,
        )
    },
    "qwen-image": {
        "": Trained(
            lambda: _of("qwen_image.qwen_image_model").create_model("torch", False, False, False, False, torch.float32),
            "lora_qwen_image",
        )
    },
    "z-image": {"": Trained(lambda: _of("zimage.zimage_model").create_model("torch", False, None), "lora_zimage")},
    "krea2": {"": Trained(_krea, "lora_krea2")},
    "wan-14b": {"Wan 2.1 I2V": Trained(lambda: _wan("i2v-14B"), "lora_wan")},
    "wan-1.3b": {"": Trained(lambda: _wan("t2v-1.3B"), "lora_wan")},
    **{
        f"flux2-{size}": {"": Trained(lambda size=size: _flux2(size), "lora_flux_2")}
        for size in ("dev", "klein-4b", "klein-9b")
    },
    "hunyuanvideo": {
        "": Trained(_hunyuan, "lora", merges=True),
        "FramePack": Trained(_framepack, "lora_framepack", converts="fpack_generate_video.convert_lora_for_framepack"),
    },
    "hunyuanvideo15": {
        "": Trained(
            lambda: _of("hunyuan_video_1_5.hunyuan_video_1_5_models").create_model("i2v", "torch", False, None),
            "lora_hv_1_5",
        )
    },
    "kandinsky5-lite": {"": Trained(lambda: _kandinsky("k5-lite-t2v-5s-sd"), "lora_kandinsky", merges=True)},
    "kandinsky5-pro": {"": Trained(lambda: _kandinsky("k5-pro-t2v-5s-sd"), "lora_kandinsky", merges=True)},
    "kandinsky5-image": {"": Trained(lambda: _kandinsky("k5-lite-t2i-hd"), "lora_kandinsky", merges=True)},
    "ideogram4": {"": Trained(_ideogram, "lora_ideogram4", merges=True)},
}
"""musubi-tuner's models by our families."""


def open_checkout(folder: Path) -> None:
    """Make musubi-tuner importable."""
    torch.cuda.current_device = lambda: 0  # its default arguments ask which GPU there is
    enter(folder / "src")


@cache
def built(family: str, model: str) -> torch.nn.Module:
    """Build a model at its real size, without weights."""
    with torch.device("meta"):
        return MODELS[family][model].build()


def read(family: str, model: str, file: Path) -> Changes:
    """Return what a file changes when it is loaded for generation."""
    trained = MODELS[family][model]
    tensors = load_file(file)
    if trained.converts:
        module, _, function = trained.converts.rpartition(".")
        tensors = getattr(_of(module), function)(tensors)
    return _merged(built(family, model), tensors, trained) if trained.merges else _hooked(built(family, model), tensors)


def paths(family: str, model: str) -> list[str]:
    """Return the paths of a model's layers, with underscores for dots."""
    weights = built(family, model).state_dict().items()
    return [k.removesuffix(".weight").replace(".", "_") for k, w in weights if k.endswith(".weight") and w.ndim > 1]


def _hooked(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> Changes:
    """Run the loader of checkpoints that merges LoRAs, on weights of zeros with a few columns."""
    utils = _of("utils.lora_utils")
    changed: dict[str, torch.Tensor] = {}

    def load(*_: Any, weight_hook: Callable[..., torch.Tensor], **__: Any) -> dict[str, torch.Tensor]:
        for key, weight in model.state_dict().items():
            if key.endswith(".weight") and weight.ndim > 1:
                changed[key] = weight_hook(key, zeros(len(weight), weight.shape))
        return changed

    utils.load_safetensors_with_fp8_optimization_and_hook = load
    utils.load_safetensors_with_lora_and_fp8("", [narrow(tensors, kernels=False)], [1.0], False, torch.device("cpu"))
    return {key.removesuffix(".weight").replace(".", "_"): weight for key, weight in changed.items()}


def _merged(model: torch.nn.Module, tensors: dict[str, torch.Tensor], trained: Trained) -> Changes:
    """Run the code that makes a network from a file, for inference and for training."""
    made = _of(f"networks.{trained.network}").create_arch_network_from_weights(1.0, tensors, unet=model)
    layers = {layer.lora_name: layer for layer in made.unet_loras}
    for layer in layers.values():
        made.add_module(layer.lora_name, layer)
    made.load_state_dict(tensors, strict=False)
    return {
        name.removeprefix("lora_unet_"): product(layer.lora_up.weight, layer.lora_down.weight, float(layer.scale))
        for name, layer in layers.items()
    }
