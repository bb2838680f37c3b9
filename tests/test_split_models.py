"""Models whose denoiser and text encoders are files of their own, under transformers' names: ComfyUI's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import loramerge as lm
import models
from loramerge import LoRA
from loramerge.checkpoints.encoders import hosts
from loramerge.checkpoints.models import open_checkpoint
from loramerge.errors import FileError
from loramerge.testing import random_layer, relative_error

CLIP = {"hidden_act": "quick_gelu", "vocab_size": 49408}
ENCODERS: dict[str, Callable[[int], torch.nn.Module]] = {
    "clip_l": lambda layers: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=layers, **CLIP
        )
    ),
    "clip_g": lambda layers: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_attention_heads=20,
            num_hidden_layers=layers,
            projection_dim=1280,
            **CLIP,
        )
    ),
    "t5xxl": lambda layers: transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=layers, feed_forward_proj="gated-gelu"
        )
    ),
    "qwen3_06b": lambda layers: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
        )
    ),
}
"""Models at the width of the published ones, by ComfyUI's names of their files."""

FAMILIES = {
    "clip_l": {"sdxl", "sd15", "flux", "sd3-medium", "sd3.5-medium", "sd3.5-large", "ssd-1b", "segmind-vega"},
    "clip_g": {"sdxl", "sdxl-refiner", "sd3-medium", "sd3.5-medium", "sd3.5-large", "ssd-1b", "segmind-vega"},
    "t5xxl": {"flux", "sd3-medium", "sd3.5-medium", "sd3.5-large"},
    "qwen3_06b": {"anima"},
}
LAYER = {
    "clip_l": ("flux", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", (768, 768)),
    "clip_g": ("sdxl", "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", (1280, 1280)),
    "t5xxl": ("flux", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.relative_attention_bias", (32, 64)),
    "qwen3_06b": ("anima", "text_encoder.layers.0.self_attn.k_proj", (1024, 1024)),
}
"""A family that has the encoder, and one of its modules there."""


def shapes(name: str, layers: int = 1) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in ENCODERS[name](layers).state_dict().items()}


def encoder(path: Path, name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Write one layer of an encoder without its embeddings, under transformers' names; return the tensors."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(1 << 20, dtype=np.float32)
    stored = {key: np.resize(pool, shape) for key, shape in shapes(name).items() if np.prod(shape) <= 1 << 24}
    wanted = LAYER[name][1].rpartition(".")[2]
    stored = {key: value for key, value in stored.items() if f".{wanted}." in key}
    path.parent.mkdir(exist_ok=True)
    save_file(stored, path)
    return stored


def lora_on(name: str, *, seed: int = 5) -> LoRA:
    family, module, shape = LAYER[name]
    return LoRA(
        name=name, architecture=family, dialect="kohya", layouts={module: random_layer(shape, rank=2, seed=seed)}
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_encoder_is_known_by_transformers_names(name: str) -> None:
    found = shapes(name, layers=12)

    assert set(hosts(found)) == FAMILIES[name]
    assert not hosts({key: (1, *shape[1:]) for key, shape in found.items()})


@pytest.mark.parametrize("name", ENCODERS)
def test_a_lora_is_baked_into_a_text_encoders_file(name: str, tmp_path: Path) -> None:
    base, lora = encoder(tmp_path / "base.safetensors", name), lora_on(name)
    module = LAYER[name][1]

    lm.bake(lora, tmp_path / "base.safetensors", tmp_path / "baked.safetensors", weights=[0.5])

    baked = load_file(tmp_path / "baked.safetensors")
    assert baked.keys() == base.keys()
    changed = {key for key in base if not np.array_equal(base[key], baked[key])}
    assert [key.removesuffix(".weight").endswith(module.rpartition(".")[2]) for key in changed] == [True]
    (key,) = changed
    assert relative_error(baked[key], base[key] + 0.5 * lora[module].delta()) <= 1e-6


def test_an_extracted_lora_of_a_text_encoder_is_the_one_that_was_baked(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    encoder(base, "clip_l")
    lora = lora_on("clip_l")
    lm.bake(lora, base, tuned, weights=[1])

    with pytest.raises(FileError, match=r"may be a text encoder of .*FLUX\.1 \(flux\).*--architecture sdxl"):
        lm.extract(tuned, base, rank=2)
    found = lm.extract(tuned, base, rank=2, architecture="flux")

    (module,) = found
    assert module == LAYER["clip_l"][1]
    assert relative_error(found[module].delta(), lora[module].delta()) <= 1e-3


def split(folder: Path) -> dict[str, np.ndarray]:
    """ComfyUI's folders with a small FLUX.1 and one layer of its text encoders."""
    for name in ("diffusion_models", "vae"):
        (folder / name).mkdir(parents=True)
    arrays = models.base("flux")
    models.single_file(folder / "diffusion_models" / "flux.safetensors", "flux", arrays)
    save_file({"decoder.conv_in.weight": np.zeros((2, 2), np.float32)}, folder / "vae" / "ae.safetensors")
    for name in ("clip_l", "t5xxl"):
        encoder(folder / "text_encoders" / f"{name}_fp16.safetensors", name)
    return arrays


def test_the_folders_of_a_split_model_are_one_base(tmp_path: Path) -> None:
    arrays = split(tmp_path / "comfy")
    loras = [models.lora("flux"), lora_on("clip_l"), lora_on("t5xxl", seed=6)]

    lm.bake(loras, tmp_path / "comfy", tmp_path / "baked", weights=[1, 0.5, -2])

    with open_checkpoint(tmp_path / "comfy") as before, open_checkpoint(tmp_path / "baked") as after:
        assert before.architecture == after.architecture == "flux"
        assert {m.partition(".")[0] for m in before} == {"transformer", "text_encoder", "text_encoder_2"}
        assert {f"{m}.weight" for m in before if m.startswith("transformer.")} == {k for k in arrays if "weight" in k}
        for weight, lora in zip((1, 0.5, -2), loras, strict=True):
            for module in lora:
                if not lora.layout(module).bias_only and len(lora.layout(module).shape) > 1:
                    wanted = before.weight(module) + weight * lora[module].delta()
                    assert relative_error(after.weight(module), wanted) <= 1e-6
    assert (tmp_path / "baked" / "vae" / "ae.safetensors").exists()


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("two denoisers", "2 files: flux.safetensors, other.safetensors"),
        ("two T5s", "are the same text encoder"),
        ("an encoder of another family", r"qwen.safetensors isn't a text encoder of FLUX\.1"),
    ],
)
def test_a_split_model_that_is_not_one_is_refused(case: str, told: str, tmp_path: Path) -> None:
    split(tmp_path)
    if case == "two denoisers":
        models.single_file(tmp_path / "diffusion_models" / "other.safetensors", "flux", models.base("flux"))
    elif case == "two T5s":
        encoder(tmp_path / "text_encoders" / "t5xxl_fp32.safetensors", "t5xxl")
    else:
        encoder(tmp_path / "text_encoders" / "qwen.safetensors", "qwen3_06b")

    with pytest.raises(FileError, match=told):
        open_checkpoint(tmp_path)
