"""Test what ComfyUI's own loader takes from our files: a row per family, dialect and kind of layer.

    python tools/comfyui.py CHECKOUT [FAMILY …]
    python tools/comfyui.py CHECKOUT --whole [FAMILY …]

With ``--whole`` there is one row per family and dialect: a file with a LoRA on every layer of the denoiser, and how many
of its modules ComfyUI takes.  CHECKOUT is a clone of https://github.com/Comfy-Org/ComfyUI; only its folder ``comfy`` is imported, on the CPU and
without a model.  Its key maps name the model's weights, its adapters compute ΔW, and both are compared with ours.
"""

import logging
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import loramerge as lm
from loramerge import LoRA
from loramerge.files.architectures import ARCHITECTURES, Architecture, lumina, model
from loramerge.files.architectures.names import Parts
from loramerge.files.dialects import DIALECTS
from loramerge.layers import BiasOnly, Layer
from loramerge.testing import random_layer, relative_error

MODELS = {
    "sdxl": (
        "SDXL",
        {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10]},
    ),
    "sd15": (
        "BaseModel",
        {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2},
    ),
    "flux": ("Flux", {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}),
    "sd3-medium": ("SD3", {"depth": 24, "num_blocks": 24}),
    "qwen-image": ("QwenImage", {"image_model": "qwen_image"}),
}
"""ComfyUI's class of each family, and the part of its configuration that the key maps read."""

CLASSES = {
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
    **dict.fromkeys(("flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "chroma"), "Flux"),
    **dict.fromkeys(("kandinsky5-lite", "kandinsky5-pro", "kandinsky5-image"), "Kandinsky5"),
}
"""ComfyUI's classes of the families for which its key maps have more than the model's own names."""

MORE: Mapping[str, dict[str, Any]] = {
    "sdxl": {"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10},
    "sd15": {"transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1},
}
PLACES = (
    r"mid_block\.attentions\.0\.(proj_|transformer_blocks\.0\.(attn|ff))|down_blocks\.1\.resnets\.0\.|conv_in|time_emb|add_emb"
    r"|^transformer\.((single_)?transformer_blocks\.0\.|[^.]*embed|norm_out|proj_out)|layers\.0\.|block\.0\.layer"
)
ATTENTION = re.compile(r"^unet.mid.*attn1|^transformer\.transformer_blocks\.0\.attn\.(to|add)_")
KINDS = ("lora", "tucker", "loha", "lokr", "lokr-tucker", "dora", "full", "bias", "norm")


def imported(checkout: Path) -> types.ModuleType:
    """Import ``comfy.lora``, with the models replaced by classes of their names, which its key maps ask for."""
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0]]
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args  # type: ignore[import-not-found]

    comfy.cli_args.args.cpu = True
    classes = types.ModuleType("comfy.model_base")
    classes.__getattr__ = lambda name: classes.__dict__.setdefault(name, type(name, (), {}))  # type: ignore[method-assign]
    sys.modules["comfy.model_base"] = comfy.model_base = classes
    import comfy.lora  # type: ignore[import-not-found]
    import comfy.lora_convert  # type: ignore[import-not-found]

    logging.disable(logging.CRITICAL)
    return comfy


def key_map(comfy: Any, a: Architecture) -> dict[str, Any]:
    """Return ComfyUI's names of a family's weights, for every name that it reads."""
    kind, config = MODELS.get(a.name) or (CLASSES.get(a.name, "BaseModel"), counted(a))
    model = getattr(comfy.model_base, kind)()
    model.model_config = types.SimpleNamespace(unet_config={**config, **MORE.get(a.name, {})})
    weights = [f"diffusion_model.{path}.{end}" for path in own_paths(a) for end in ("weight", "bias")]
    model.state_dict = lambda: dict.fromkeys(weights)
    clip = types.SimpleNamespace(state_dict=lambda: dict.fromkeys(text_weights(a)))
    return comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(model, {}))  # type: ignore[no-any-return]


def own_paths(a: Architecture) -> Mapping[str, Parts]:
    """Return the modules by the path of ComfyUI's weight: Z-Image's trainers have other names than it."""
    return lumina.z_image(model(a.model)) if a.name == "z-image" else a.native_paths


def counted(a: Architecture) -> dict[str, Any]:
    """Return the part of a configuration that ComfyUI's maps of diffusers' names read, from the family's modules."""
    last = {name: number + 1 for name, number in a.outline.last.items()}
    width = next((shape[1] for module, shape in a.shapes.items() if module.endswith("to_q")), 0)
    found = {
        "depth": last.get("transformer_blocks", 0),
        "depth_single_blocks": last.get("single_transformer_blocks", 0),
    }
    found |= {"n_layers": last.get("layers", 0), "n_refiner_layers": last.get("noise_refiner", 0)}
    found |= {"n_double_layers": last.get("joint_transformer_blocks", 0)}
    found["n_layers"] += found["n_double_layers"] + last.get("single_transformer_blocks", 0) * bool(
        found["n_double_layers"]
    )
    return {**found, "hidden_size": width, "dim": width}


def text_weights(a: Architecture) -> Iterator[str]:
    for encoder in a.text_encoders:
        for path in a.text_paths(encoder):
            yield f"{encoder.comfyui}.transformer.{path}.weight"


def patches(comfy: Any, a: Architecture, file: Path) -> dict[Any, Any]:
    """Return ComfyUI's own patches of each weight."""
    tensors = comfy.lora_convert.convert_lora(load_file(file))
    return comfy.lora.load_lora(tensors, key_map(comfy, a), log_missing=False)  # type: ignore[no-any-return]


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
    return random_layer(shape, kind="lora" if kind == "norm" else kind, seed=seed, alpha=2.0)


def rows(comfy: Any, name: str) -> Iterator[tuple[str, ...]]:
    """Count for every dialect and kind a file's modules and those that ComfyUI gets right; name the others."""
    a = ARCHITECTURES[name]
    for dialect, kind in product([d for d in DIALECTS if DIALECTS[d].writes and d != "peft"], KINDS):
        layers = {m: layer_of(kind, a.shapes[m], i) for i, m in enumerate(modules(a, kind))}
        if not layers:
            continue
        lora = LoRA(name=name, architecture=name, dialect=dialect, layouts=layers)
        try:
            with TemporaryDirectory() as folder:
                file = lm.save(lora, Path(folder) / "lora.safetensors", dialect=dialect)
                found = patches(comfy, a, file)
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


def taken(comfy: Any, name: str) -> Iterator[tuple[str, ...]]:
    """Count for every dialect the modules of a denoiser that ComfyUI takes from a file with all of them."""
    a = ARCHITECTURES[name]
    layers = {m: random_layer(s, rank=1) for m, s in a.shapes.items() if len(s) > 1 and m.startswith(f"{a.denoiser}.")}
    lora = LoRA(name=name, architecture=name, dialect="diffusers-peft", layouts=layers)
    for dialect in [d for d in DIALECTS if DIALECTS[d].writes and d != "peft"]:
        try:
            with TemporaryDirectory() as folder:
                file = lm.save(lora, Path(folder) / "lora.safetensors", dialect=dialect)
                found = patches(comfy, a, file)
        except lm.errors.DialectError:
            yield name, dialect, "not written"
            continue
        places = [(place, (0, 0, 1 << 60)) if isinstance(place, str) else place[:2] for place in found]
        covered = {key: {span[1:] if span else (0, 1 << 60) for k, span in places if k == key} for key, _ in places}
        missed = [m for m in layers if not _covers(covered, *homes(a).get(m, ("", ())), m)]
        yield name, dialect, str(len(layers)), str(len(layers) - len(missed)), ", ".join(missed[:3])


def _covers(covered: Mapping[str, set[tuple[int, int]]], key: str, parts: Parts, module: str) -> bool:
    """Return whether a module's rows of a weight are among those that are changed."""
    rows = next((part.rows for part in parts if part.module == module), None) or ((0, 1),)
    spans = covered.get(f"{key}.weight", covered.get(key, set()))
    return all(any(start <= a and b <= start + length for start, length in spans) for a, b in rows)


def right(a: Architecture, lora: LoRA, module: str, found: Mapping[Any, Any]) -> bool:
    """Return whether ComfyUI changes a module's weight as its layer says."""
    key, parts = homes(a)[module]
    height = sum(a.shapes[part.module][0] for part in parts)
    if isinstance(lora[module], BiasOnly):
        return bool((change(found, f"{key}.bias", torch.zeros(height)) == 1).all())
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


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    checkout, *families = sys.argv[1:]
    whole = "--whole" in families
    families = [name for name in families if name != "--whole"]
    comfy = imported(Path(checkout))
    for name in families or (ARCHITECTURES if whole else MODELS):
        for row in (taken if whole else rows)(comfy, name):
            print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
