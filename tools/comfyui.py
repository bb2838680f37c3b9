"""Test what ComfyUI's own loader takes from our files: a row per family, dialect and kind of layer.

    python tools/comfyui.py CHECKOUT [FAMILY …]

CHECKOUT is a clone of https://github.com/Comfy-Org/ComfyUI; only its folder ``comfy`` is imported, on the CPU and
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
from loramerge.files.architectures import ARCHITECTURES, Architecture
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
    kind, config = MODELS[a.name]
    model = getattr(comfy.model_base, kind)()
    model.model_config = types.SimpleNamespace(unet_config={**config, **MORE.get(a.name, {})})
    weights = [f"diffusion_model.{path}.{end}" for path in a.native_paths for end in ("weight", "bias")]
    model.state_dict = lambda: dict.fromkeys(weights)
    clip = types.SimpleNamespace(state_dict=lambda: dict.fromkeys(text_weights(a)))
    return comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(model, {}))  # type: ignore[no-any-return]


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
    native = {p.module: (f"diffusion_model.{path}", parts) for path, parts in a.native_paths.items() for p in parts}
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
    comfy = imported(Path(checkout))
    for name in families or MODELS:
        for row in rows(comfy, name):
            print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
