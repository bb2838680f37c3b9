"""Small base models with the real names of a few modules, in several layouts."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from loramerge import LoRA
from loramerge.testing import random_layer

ML = "model.diffusion_model."
TE2 = "unet.up_blocks.0"
LAYER = "text_encoder_2.text_model.encoder.layers.3."
RESBLOCK = "conditioner.embedders.1.model.transformer.resblocks.3."
DOUBLE = "transformer.transformer_blocks.0."
SINGLE = "transformer.single_transformer_blocks.1."

SHAPES = {
    "sdxl": {
        "unet.down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
        "unet.down_blocks.1.resnets.0.conv_shortcut": (16, 8, 1, 1),
        "unet.down_blocks.1.attentions.0.proj_in": (16, 16),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm1": (16,),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": (24, 20),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (12, 12),
        f"{LAYER}self_attn.q_proj": (20, 20),
        f"{LAYER}self_attn.k_proj": (20, 20),
        f"{LAYER}self_attn.v_proj": (20, 20),
        f"{LAYER}mlp.fc1": (80, 20),
        "text_encoder_2.text_projection": (20, 20),
    },
    "sd15": {
        "unet.down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
        "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_k": (8, 12),
        "text_encoder.text_model.encoder.layers.3.mlp.fc1": (48, 12),
    },
    "flux": {
        "transformer.x_embedder": (12, 4),
        f"{DOUBLE}attn.to_q": (12, 12),
        f"{DOUBLE}attn.to_k": (12, 12),
        f"{DOUBLE}attn.to_v": (12, 12),
        f"{DOUBLE}attn.norm_q": (4,),
        f"{SINGLE}attn.to_q": (12, 12),
        f"{SINGLE}attn.to_k": (12, 12),
        f"{SINGLE}attn.to_v": (12, 12),
        f"{SINGLE}proj_mlp": (48, 12),
        "transformer.norm_out.linear": (24, 12),
    },
}
UNBIASED = ("to_q", "to_k", "norm_q", "text_projection")
"""Ends of modules without a bias in UNets and CLIPs."""

FILE = {
    "sdxl": {
        f"{ML}input_blocks.1.0.in_layers.2": ("unet.down_blocks.0.resnets.0.conv1",),
        f"{ML}input_blocks.4.0.skip_connection": ("unet.down_blocks.1.resnets.0.conv_shortcut",),
        f"{ML}input_blocks.4.1.proj_in": ("unet.down_blocks.1.attentions.0.proj_in",),
        f"{ML}input_blocks.4.1.transformer_blocks.0.norm1": (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm1",
        ),
        f"{ML}input_blocks.4.1.transformer_blocks.0.attn1.to_q": (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        f"{ML}input_blocks.8.1.transformer_blocks.9.attn2.to_k": (
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
        ),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj": (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ),
        f"{RESBLOCK}attn.in_proj": tuple(f"{LAYER}self_attn.{p}_proj" for p in "qkv"),
        f"{RESBLOCK}mlp.c_fc": (f"{LAYER}mlp.fc1",),
        "conditioner.embedders.1.model.text_projection": ("text_encoder_2.text_projection",),
    },
    "sd15": {
        f"{ML}input_blocks.1.1.proj_in": ("unet.down_blocks.0.attentions.0.proj_in",),
        f"{ML}output_blocks.9.1.transformer_blocks.0.attn2.to_k": (
            "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_k",
        ),
        "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1": (
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        ),
    },
    "flux": {
        "img_in": ("transformer.x_embedder",),
        "double_blocks.0.img_attn.qkv": tuple(f"{DOUBLE}attn.to_{p}" for p in "qkv"),
        "double_blocks.0.img_attn.norm.query_norm": (f"{DOUBLE}attn.norm_q",),
        "single_blocks.1.linear1": (*(f"{SINGLE}attn.to_{p}" for p in "qkv"), f"{SINGLE}proj_mlp"),
        "final_layer.adaLN_modulation.1": ("transformer.norm_out.linear",),
    },
}
"""Weights as the models' own code names them, and the modules in each."""

Arrays = dict[str, np.ndarray]


def base(architecture: str, dtype: object = np.float32, seed: int = 0) -> Arrays:
    """Random weights and biases by module: ``module.weight``, ``module.bias``."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for module, shape in SHAPES[architecture].items():
        arrays[f"{module}.weight"] = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        if (architecture == "flux" and not module.endswith("norm_q")) or not module.endswith(UNBIASED):
            arrays[f"{module}.bias"] = rng.standard_normal(shape[:1], dtype=np.float32).astype(dtype)
    return arrays


def single_file(path: Path, architecture: str, arrays: Arrays, prefix: str = "") -> Path:
    """One file under the names of the model's own code, with a VAE's tensor and a buffer beside."""
    stored: Arrays = {}
    for name, modules in FILE[architecture].items():
        stored[prefix + _weight_key(name)] = _stored(name, [arrays[f"{module}.weight"] for module in modules])
        if f"{modules[0]}.bias" in arrays:
            stored[prefix + _bias_key(name)] = _stored(name, [arrays[f"{module}.bias"] for module in modules])
    stored["first_stage_model.decoder.conv_in.weight"] = np.full((2, 2, 3, 3), np.nan, np.float16)
    stored["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)
    save_file(stored, path, metadata={"modelspec.title": "base", "modelspec.hash_sha256": "0x00"})
    return path


def _weight_key(name: str) -> str:
    if name.endswith("text_projection"):
        return name
    return name + ("_weight" if name.endswith("in_proj") else ".scale" if name.endswith("_norm") else ".weight")


def _bias_key(name: str) -> str:
    return name + ("_bias" if name.endswith("in_proj") else ".bias")


def _stored(name: str, parts: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(parts)
    if name.endswith("adaLN_modulation.1"):
        return np.concatenate(np.split(whole, 2)[::-1])
    return np.ascontiguousarray(whole.T) if name.endswith("text_projection") else whole


def folder(path: Path, arrays: Arrays, *, shards: int = 1, variant: str = "") -> Path:
    """A directory in diffusers' layout, with a VAE, a configuration and a scheduler beside."""
    components = dict.fromkeys(key.partition(".")[0] for key in arrays)
    for component in components:
        tensors = {key.partition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{component}.")}
        (path / component).mkdir(parents=True, exist_ok=True)
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        _component(path / component, stem + (f".{variant}" if variant else ""), tensors, shards)
        (path / component / "config.json").write_text("{}")
    (path / "vae").mkdir(exist_ok=True)
    save_file({"x.weight": np.zeros((2, 2), np.float32)}, path / "vae" / "diffusion_pytorch_model.safetensors")
    (path / "model_index.json").write_text("{}")
    return path


def _component(path: Path, stem: str, tensors: Arrays, shards: int) -> None:
    if shards == 1:
        save_file(tensors, path / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    names = [f"{stem}-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    held = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: value for key, value in tensors.items() if held[key] == name}, path / name)
    size = sum(value.nbytes for value in tensors.values())
    (path / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": held})
    )


def lora(architecture: str, *, seed: int = 1, kinds: Mapping[str, str] | None = None, scale: float = 1.0) -> LoRA:
    """A LoRA on every module of a small model, of rank 2; norms get differences of their own."""
    layers = {}
    for i, (module, shape) in enumerate(SHAPES[architecture].items()):
        layer = random_layer(shape, kind=(kinds or {}).get(module, "lora"), rank=2, seed=100 * seed + i)
        layers[module] = layer if scale == 1.0 else layer.map(lambda t: t * np.float32(scale))
    if architecture == "flux":  # its norms have no bias
        from dataclasses import replace

        layers = {m: replace(x, b_norm=None) if m.endswith("norm_q") else x for m, x in layers.items()}
    return LoRA(name=f"lora {seed}", architecture=architecture, dialect="kohya", layouts=layers)


def read(path: Path) -> Arrays:
    """Every tensor of a file, or of a directory by its path in there."""
    if path.is_file():
        return load_file(path)
    files = sorted(path.rglob("*.safetensors"))
    return {f"{file.parent.name}.{key}": value for file in files for key, value in load_file(file).items()}
