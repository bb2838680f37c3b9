"""ai-toolkit: its network, made as for training of all layers, takes a file that training goes on from."""

import sys
import types
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkout import StandIn, enter
from judging import DOWN, Changes, product
from safetensors.torch import load_file

REPOSITORY = "ostris/ai-toolkit"
EXTENSIONS = "extensions_built_in.diffusion_models"


class Trained(NamedTuple):
    """A model that ai-toolkit trains."""

    build: Callable[[], torch.nn.Module]
    code: str = ""
    """The class that reads and writes its LoRAs; the older models have none of their own."""
    flags: tuple[str, ...] = ()


def _built(model: str) -> torch.nn.Module:
    built = import_module("dump_architectures").MODELS[model]()
    return built[0] if isinstance(built, list) else built


def _of(module: str) -> Any:
    return import_module(f"{EXTENSIONS}.{module}")


def _krea() -> torch.nn.Module:
    code = _of("krea2.src.mmdit")
    return code.SingleStreamDiT(code.SingleMMDiTConfig(**_of("krea2.krea2").KREA2_MMDIT_CONFIG))


def _flux2(params: str) -> torch.nn.Module:
    code = _of("flux2.src.model")
    return code.Flux2(getattr(code, params)())


def _chroma() -> torch.nn.Module:
    code = _of("chroma.src.model")
    return code.Chroma(code.chroma_params)


def _anima() -> torch.nn.Module:
    parts = (_built("transformer-cosmos-predict2-2b"), _built("text-conditioner-anima"))
    return _of("anima.anima").AnimaTrainableModel(*parts)


def _same(family: str, code: str = "", *flags: str) -> Trained:
    """Make the entry of a family that ai-toolkit trains on diffusers' model."""
    return Trained(partial(_built, f"transformer-{family}"), code, flags)


MODELS: Mapping[str, Mapping[str, Trained]] = {
    "flux": {"": _same("flux", "", "is_flux")},
    "sd3-medium": {"": _same("sd3-medium", "", "is_v3")},
    "sd3.5-medium": {"": _same("sd35-medium", "", "is_v3")},
    "sd3.5-large": {"": _same("sd35-large", "", "is_v3")},
    "lumina2": {"": _same("lumina2", "", "is_lumina2")},
    "qwen-image": {"": _same("qwen-image", "qwen_image.qwen_image.QwenImageModel")},
    "z-image": {"": _same("z-image", "z_image.z_image.ZImageModel")},
    "krea2": {"": Trained(_krea, "krea2.krea2.Krea2Model")},
    "anima": {"": Trained(_anima, "anima.anima.AnimaModel")},
    **{f"wan-{size}": {"": _same(f"wan-{size}", "wan21.Wan21")} for size in ("14b", "1.3b", "5b")},
    "flux2-dev": {"": Trained(lambda: _flux2("Flux2Params"), "flux2.flux2_model.Flux2Model")},
    "flux2-klein-4b": {"": Trained(lambda: _flux2("Klein4BParams"), "flux2.flux2_model.Flux2Model")},
    "flux2-klein-9b": {"": Trained(lambda: _flux2("Klein9BParams"), "flux2.flux2_model.Flux2Model")},
    "chroma": {"": Trained(_chroma, "chroma.chroma_model.ChromaModel")},
    "ltx2": {"": _same("ltx2", "ltx2.ltx2.LTX2Model")},
    "hidream": {"": _same("hidream", "hidream.hidream_model.HidreamModel")},
    "ernie-image": {"": _same("ernie-image", "ernie_image.ernie_image.ErnieImageModel")},
    "ideogram4": {"": _same("ideogram4", "ideogram4.ideogram4.Ideogram4Model")},
}
"""ai-toolkit's models by our families."""


def open_checkout(folder: Path) -> None:
    """Make ai-toolkit importable, without the models that aren't asked for."""
    enter(folder)
    sys.path.append(str(Path(__file__).parents[1]))  # for dump_architectures
    package = types.ModuleType(EXTENSIONS)
    package.__path__ = [str(folder / EXTENSIONS.replace(".", "/"))]
    video = "diffusers.pipelines.ltx2.export_utils"
    sys.modules |= {EXTENSIONS: package, video: StandIn(video)}


@cache
def built(family: str, model: str) -> torch.nn.Module:
    """Build a model at its real size, without weights."""
    with torch.device("meta"):
        return MODELS[family][model].build()


def paths(family: str, model: str) -> list[str]:
    """Return the paths of a model's layers, with underscores for dots."""
    weights = built(family, model).state_dict().items()
    return [_path(k.removesuffix(".weight")) for k, w in weights if k.endswith(".weight") and w.ndim > 1]


def _path(path: str) -> str:
    return path.removeprefix("transformer.").replace(".", "_")


@cache
def base(family: str, model: str) -> Any:
    """Make the object that knows a model's names, without the model."""
    code = MODELS[family][model].code
    if not code:
        return None
    module, _, name = code.rpartition(".")
    where = import_module("toolkit.models.wan21.wan21") if module == "wan21" else _of(module)
    made = object.__new__(getattr(where, name))
    made.__dict__ |= {"use_old_lokr_format": False, "_modules": {}}
    return made


def read(family: str, model: str, file: Path) -> Changes:
    """Return what a file changes."""
    trained, whole = MODELS[family][model], built(family, model)
    special, config = import_module("toolkit.lora_special"), import_module("toolkit.config_modules").NetworkConfig
    rank = max((len(v) for k, v in load_file(file).items() if k.endswith(DOWN)), default=1)
    flags = dict.fromkeys(trained.flags, True) if trained.flags else {"is_transformer": True}
    network = special.LoRASpecialNetwork(
        text_encoder=[], unet=whole, lora_dim=rank, alpha=rank, train_text_encoder=False, conv_lora_dim=1, conv_alpha=1,
        target_lin_modules=[type(whole).__name__], target_conv_modules=[], transformer_only=False, base_model=base(family, model),
        network_config=config(linear=rank, conv=1, transformer_only=False), **flags,
    )  # fmt: skip
    for layer in network.unet_loras:
        network.add_module(layer.lora_name, layer)
    with torch.no_grad():
        for layer in network.unet_loras:
            layer.lora_up.weight.zero_()
    network.load_weights(str(file))
    return {
        _path(layer.lora_name.replace("$$", ".").removeprefix("transformer.")): product(
            layer.lora_up.weight, layer.lora_down.weight, float(layer.scale)
        )
        for layer in network.unet_loras
    }
