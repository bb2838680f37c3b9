"""ComfyUI: its key maps name the model's weights, its adapters compute ΔW; neither needs a model."""

import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from checkout import enter
from judging import COLUMNS, Changes, dialects, narrow
from safetensors.torch import load_file

import loramerge as lm
from loramerge import LoRA
from loramerge.files.architectures import ARCHITECTURES, Architecture, lumina, model
from loramerge.files.architectures.names import Parts, flat
from loramerge.layers import BiasOnly, Layer
from loramerge.testing import random_layer, relative_error

TRIED = ("sdxl", "sd15", "flux", "sd3-medium", "qwen-image")
"""Families whose kinds of layers are tried."""


def _unet(down: list[int], up: list[int], middle: int) -> dict[str, Any]:
    """Return a UNet's configuration: the transformers in each of its blocks."""
    found = {"num_res_blocks": [2] * (len(down) // 2), "channel_mult": [1, 2, 4, 4][: len(down) // 2]}
    return {**found, "transformer_depth": down, "transformer_depth_output": up, "transformer_depth_middle": middle}


XL, ONE = (
    _unet([0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10),
    _unet([1] * 6 + [0] * 2, [1] * 9 + [0] * 3, 1),
)
UNETS = {
    "sdxl": XL,
    "kolors": XL,
    "sd15": ONE,
    "sd21": ONE,
    "sdxl-refiner": _unet([0, 0, 4, 4, 4, 4, 0, 0], [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0], 4),
    "ssd-1b": _unet([0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1),
    "segmind-vega": _unet([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1),
}
"""The part of the configurations that the key maps read."""

CLASSES = {
    "sdxl": "SDXL",
    "flux": "Flux",
    **dict.fromkeys(("sd3-medium", "sd3.5-medium", "sd3.5-large"), "SD3"),
    "qwen-image": "QwenImage",
    "hunyuanvideo": "HunyuanVideo",
    "hunyuanvideo15": "HunyuanVideo",
    "hunyuanimage": "HunyuanVideo",
    "hidream": "HiDream",
    "auraflow": "AuraFlow",
    "pixart-sigma": "PixArt",
    "mochi": "GenmoMochi",
    "omnigen2": "Omnigen2",
    "z-image": "Lumina2",
    "lumina2": "Lumina2",
    "ace-step": "ACEStep15",
    "stable-cascade": "StableCascade_C",
    "krea2": "Krea2",
    "ernie-image": "ErnieImage",
    "ltx2": "LTXAV",
    **dict.fromkeys(("ltxv-2b", "ltxv-13b"), "LTXV"),
    **dict.fromkeys(("flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "chroma"), "Flux"),
    **dict.fromkeys(("kandinsky5-lite", "kandinsky5-pro", "kandinsky5-image"), "Kandinsky5"),
}
"""ComfyUI's classes of the families for which its key maps have more than the model's own names."""

MODELS = {a.name: {"": None} for a in ARCHITECTURES.values() if a.native}
PLACES = (
    r"mid_block\.attentions\.0\.(proj_|transformer_blocks\.0\.(attn|ff))|down_blocks\.1\.resnets\.0\.|conv_in|time_emb|add_emb"
    r"|^transformer\.((single_)?transformer_blocks\.0\.|[^.]*embed|norm_out|proj_out)|layers\.0\.|block\.0\.layer"
)
ATTENTION = re.compile(r"^unet.mid.*attn1|^transformer\.transformer_blocks\.0\.attn\.(to|add)_")
REPOSITORY = "Comfy-Org/ComfyUI"
KINDS = ("lora", "tucker", "loha", "lokr", "lokr-tucker", "dora", "full", "bias", "biased", "norm")


def open_checkout(folder: Path) -> None:
    """Import ``comfy.lora``, with the models replaced by classes of their names, which its key maps ask for."""
    enter(folder)
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args  # type: ignore[import-not-found]

    comfy.cli_args.args.cpu = True
    classes = types.ModuleType("comfy.model_base")
    classes.__file__ = str(folder)
    classes.__getattr__ = lambda name: classes.__dict__.setdefault(name, type(name, (), {}))  # type: ignore[method-assign]
    sys.modules["comfy.model_base"] = comfy.model_base = classes
    import comfy.lora  # type: ignore[import-not-found]
    import comfy.lora_convert  # type: ignore[import-not-found]


@cache
def key_map(a: Architecture) -> dict[str, Any]:
    """Return ComfyUI's names of a family's weights, for every name that it reads."""
    import comfy  # type: ignore[import-not-found]

    model = getattr(comfy.model_base, CLASSES.get(a.name, "BaseModel"))()
    model.model_config = types.SimpleNamespace(unet_config=UNETS.get(a.name) or counted(a))
    weights = [f"diffusion_model.{path}.{end}" for path in own_paths(a) for end in ("weight", "bias")]
    model.state_dict = lambda: dict.fromkeys(weights)
    clip = types.SimpleNamespace(state_dict=lambda: dict.fromkeys(text_weights(a)))
    return comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(model, {}))  # type: ignore[no-any-return]


def own_paths(a: Architecture) -> Mapping[str, Parts]:
    """Return the modules by the path of ComfyUI's weight: Z-Image's trainers have other names than it."""
    return lumina.z_image(model(a.model)) if a.name == "z-image" else a.native_paths


def counted(a: Architecture) -> dict[str, Any]:
    """Return the part of a configuration that ComfyUI's maps of diffusers' names read, from the family's modules."""
    blocks, single, double, layers, refiner = (
        a.outline.last.get(name, -1) + 1
        for name in (
            "transformer_blocks",
            "single_transformer_blocks",
            "joint_transformer_blocks",
            "layers",
            "noise_refiner",
        )
    )
    width = next((shape[1] for module, shape in a.shapes.items() if module.endswith("to_q")), 0)
    return {
        **dict.fromkeys(("depth", "num_blocks", "layers"), blocks),
        **dict.fromkeys(("hidden_size", "dim"), width),
        "depth_single_blocks": single,
        "n_double_layers": double,
        "n_layers": layers + double + single * bool(double),
        "n_refiner_layers": refiner,
    }


def text_weights(a: Architecture) -> Iterator[str]:
    for encoder in a.text_encoders:
        for path in a.text_paths(encoder):
            yield f"{encoder.comfyui}.transformer.{path}.weight"


def patches(a: Architecture, tensors: dict[str, torch.Tensor]) -> dict[Any, Any]:
    """Return ComfyUI's own patches of each weight."""
    import comfy  # type: ignore[import-not-found]

    return comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), key_map(a), log_missing=False)  # type: ignore[no-any-return]


def paths(family: str, model: str) -> list[str]:
    """Return the paths of a model's layers, with underscores for dots."""
    return [flat(path) for path in own_paths(ARCHITECTURES[family])]


def read(family: str, model: str, file: Path) -> Changes:
    """Return what a file changes."""
    a = ARCHITECTURES[family]
    found = patches(a, narrow(load_file(file), kernels=True))
    of: dict[str, dict[Any, Any]] = {}
    for place, patch in found.items():
        of.setdefault(place if isinstance(place, str) else place[0], {})[place] = patch
    weights = {f"diffusion_model.{path}.weight": (path, parts) for path, parts in own_paths(a).items()}
    return {flat(weights[key][0]): change(of[key], key, _zeros(a, weights[key][1])) for key in of if key in weights}


def _zeros(a: Architecture, parts: Parts) -> torch.Tensor:
    columns = math.prod(a.shapes[parts[0].module][1:])
    return torch.zeros(sum(a.shapes[part.module][0] for part in parts), min(columns, COLUMNS))


def change(found: Mapping[Any, Any], key: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the change of one of the model's weights by all patches on it."""
    total = torch.zeros_like(weight)
    for place, patch in found.items():
        name, (axis, start, length), function = _place(place, weight)
        if name == key:
            part = weight.narrow(axis, start, length)
            total.narrow(axis, start, length).add_(_changed(patch, part, function) - part)
    return total


def _place(place: Any, weight: torch.Tensor) -> tuple[str, tuple[int, int, int], Callable[[Any], Any]]:
    name, *rest = (place,) if isinstance(place, str) else place
    return name, (rest[0] if rest and rest[0] else (0, 0, len(weight))), rest[1] if len(rest) > 1 else lambda x: x


def _changed(patch: Any, weight: torch.Tensor, function: Callable[[Any], Any]) -> torch.Tensor:
    if isinstance(patch, tuple):
        return patch[1][0].reshape(weight.shape) + (weight if patch[0] == "diff" else 0)  # type: ignore[no-any-return]
    return patch.calculate_weight(weight.clone(), "", 1.0, 1.0, None, function, original_weight=weight)  # type: ignore[no-any-return]


def wanted(lora: LoRA, parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    """Return the change of the same weight by our own layers."""
    total = torch.zeros_like(weight)
    for part in parts:
        rows = part.rows or ((0, len(weight)),)
        if part.module in lora:
            kept = torch.cat([weight[a:b] for a, b in rows])
            delta = torch.from_numpy(np.asarray(lora[part.module].delta_on(kept.numpy()))).reshape(kept.shape)
            for a, b in rows:
                total[a:b], delta = delta[: b - a], delta[b - a :]
    return total


def modules(a: Architecture, kind: str) -> list[str]:
    """Choose some modules that can have a kind of layer, in every component."""
    shapes = {m: s for m, s in a.shapes.items() if re.search(PLACES, m)}
    if kind == "norm":
        return [m for m, s in a.shapes.items() if len(s) == 1 and "blocks.0." in m][:6]
    if kind in ("tucker", "lokr-tucker"):
        return [m for m, s in a.shapes.items() if len(s) == 4 and s[2] == 3][2:6]
    return [m for m, s in shapes.items() if len(s) >= 2 and (kind == "lora" or ATTENTION.search(m))]


def layer_of(kind: str, shape: tuple[int, ...], seed: int) -> Layer:
    if kind == "bias":
        return BiasOnly(diff_b=np.ones(shape[0], np.float32))
    made = random_layer(shape, kind="lora" if kind in ("norm", "biased") else kind, seed=seed, alpha=2.0)
    return replace(made, diff_b=np.ones(shape[0], np.float32)) if kind == "biased" else made


def kinds(name: str) -> Iterator[tuple[str, ...]]:
    """Count for every dialect and kind a file's modules and those that ComfyUI gets right; name the others' components.

    A kind that a dialect doesn't hold has no row.
    """
    a = ARCHITECTURES[name]
    for dialect, kind in product(dialects(), KINDS):
        layers = {m: layer_of(kind, a.shapes[m], i) for i, m in enumerate(modules(a, kind))}
        if not layers:
            continue
        lora = LoRA(name=name, architecture=name, dialect=dialect, layouts=layers)
        try:
            with TemporaryDirectory() as folder:
                file = lm.save(lora, Path(folder) / "lora.safetensors", dialect=dialect)
                found = patches(a, load_file(file))
        except lm.errors.DialectError:
            continue
        wrong = [m for m in layers if not right(a, lora, m, found)]
        yield (
            name,
            dialect,
            kind,
            str(len(layers)),
            str(len(layers) - len(wrong)),
            ", ".join(sorted({_group(m) for m in wrong})),
        )


def right(a: Architecture, lora: LoRA, module: str, found: Mapping[Any, Any]) -> bool:
    """Return whether ComfyUI changes a module's weight as its layer says."""
    key, parts = homes(a)[module]
    height = sum(a.shapes[part.module][0] for part in parts)
    if lora[module].delta_bias() is not None and not (change(found, f"{key}.bias", torch.zeros(height)) == 1).all():
        return False
    if isinstance(lora[module], BiasOnly):
        return True
    weight = torch.randn(height, *a.shapes[module][1:], generator=torch.Generator().manual_seed(1))
    try:
        return (
            relative_error(change(found, f"{key}.weight", weight).numpy(), wanted(lora, parts, weight).numpy()) < 1e-3
        )
    except (RuntimeError, ValueError):
        return False


@cache
def homes(a: Architecture) -> dict[str, tuple[str, Parts]]:
    """Return ComfyUI's weight of each module."""
    native = {p.module: (f"diffusion_model.{path}", parts) for path, parts in own_paths(a).items() for p in parts}
    for encoder in a.text_encoders:
        for path, parts in a.text_paths(encoder).items():
            native[parts[0].module] = (f"{encoder.comfyui}.transformer.{path}", parts)
    return native


def _group(module: str) -> str:
    return module.partition(".")[0]
