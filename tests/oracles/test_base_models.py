"""diffusers, PEFT and LyCORIS on base models: names in single files, fused weights, DoRA."""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

import loramerge as lm
from loramerge import LoRA
from loramerge.checkpoints.models import open_checkpoint
from loramerge.files.architectures import ARCHITECTURES, Architecture
from loramerge.layers import DoRA, LowRank
from loramerge.testing import random_layer, relative_error
from oracles import pipelines
from oracles.pipelines import a_few, components, lora_for, named, pick

# Names in single files


CLIP = "transformer."
OPEN_CLIP = "model."
TEXT = {
    "sd15": {"text_encoder": ("cond_stage_model.", CLIP)},
    "sd21": {"text_encoder": ("cond_stage_model.", OPEN_CLIP)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.", CLIP),
        "text_encoder_2": ("conditioner.embedders.1.", OPEN_CLIP),
    },
    "sdxl-refiner": {"text_encoder_2": ("conditioner.embedders.0.", OPEN_CLIP)},
    "flux": {},
}
"""Where diffusers' single_file_utils.py looks for text encoders, and in whose names."""


def rows(number: int, count: int) -> torch.Tensor:
    """A weight of which every row says whose it is and which."""
    index = torch.arange(count, dtype=torch.float32)
    return torch.stack([torch.full_like(index, number), index], dim=1)


def single_file(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Every weight of a family in the names that diffusers' own converters ask for."""
    shapes, tensors = architecture.shapes, {}
    for number, (path, parts) in enumerate(architecture.native_paths.items()):
        end = "scale" if path.endswith("_norm") else "weight"
        key = path if architecture.name == "flux" else f"model.diffusion_model.{path}"
        tensors[f"{key}.{end}"] = rows(number, sum(shapes[part.module][0] for part in parts))
    for component, (place, kind) in TEXT[architecture.name].items():
        held = {m.partition(".")[2]: s for m, s in shapes.items() if m.startswith(f"{component}.")}
        tensors |= {place + key: value for key, value in (clip if kind == CLIP else open_clip)(held).items()}
    return tensors


def clip(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {f"transformer.{path}.weight": rows(i, shape[0]) for i, (path, shape) in enumerate(shapes.items())}


def open_clip(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The keys of diffusers' own table of open_clip's names, and the fused projections."""
    mapping = single_file_utils.DIFFUSERS_TO_LDM_MAPPING["openclip"]
    tensors: dict[str, torch.Tensor] = {}
    for i, (path, shape) in enumerate(shapes.items()):
        key = f"{path}.weight"
        if path == "text_projection":
            tensors["model.text_projection"] = torch.arange(shape[0] * shape[1]).reshape(shape).float()
        elif key in mapping["layers"]:
            tensors[f"model.{mapping['layers'][key]}"] = rows(i, shape[0])
        elif path.endswith(("k_proj", "v_proj")):
            continue
        else:
            for new, old in mapping["transformer"].items():
                key = key.replace(new, old)
            fused = path.endswith("q_proj")
            key = key.replace(".q_proj.weight", ".in_proj_weight") if fused else key
            tensors[f"model.transformer.{key}"] = rows(i, shape[0] * (3 if fused else 1))
    return tensors


def converted(architecture: Architecture, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The modules' weights as diffusers' converters make them."""
    found = {}
    if architecture.name == "flux":
        denoiser = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(biased(tensors))
    else:
        extra = "text_time" if "sdxl" in architecture.name else None
        config = {"layers_per_block": 2, "addition_embed_type": extra}
        denoiser = single_file_utils.convert_ldm_unet_checkpoint(biased(tensors), config)
    found |= {f"{architecture.denoiser}.{key}": value for key, value in denoiser.items()}
    for component, (place, kind) in TEXT[architecture.name].items():
        if kind == CLIP:
            text = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
        else:
            model = type("Model", (), {"config": type("Config", (), {"hidden_size": 1024})})
            text = single_file_utils.convert_open_clip_checkpoint(model, dict(tensors), prefix=f"{place}model.")
        found |= {f"{component}.{key}": value for key, value in text.items()}
    return found


def biased(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    biases = {key.replace(".weight", ".bias"): value[:, 0] for key, value in tensors.items() if key.endswith(".weight")}
    return {**tensors, **biases}


@pytest.mark.parametrize("name", TEXT)
def test_diffusers_makes_of_a_single_file_the_weights_that_a_checkpoint_has(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    tensors = single_file(architecture)
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = {key.removesuffix(".weight"): value for key, value in converted(architecture, tensors).items()}
    modules = {m for m in architecture.shapes if name != "flux" or not m.startswith("text")}

    with open_checkpoint(tmp_path / "model.safetensors", architecture=name) as checkpoint:
        assert set(checkpoint) == modules
        assert [m for m in modules if not np.array_equal(checkpoint.weight(m), wanted[m].numpy())] == []


# Fused weights


def small_flux() -> torch.nn.Module:
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        in_channels=4,
        guidance_embeds=True,
    )


@functools.cache
def models(architecture: str) -> dict[str, torch.nn.Module]:
    if architecture == "flux":
        return {"transformer": small_flux()}
    return components(pipelines.PIPELINES[architecture]())


def saved(architecture: str, folder: Path, **options: object) -> Path:
    for name, model in models(architecture).items():
        model.save_pretrained(folder / name, **options)
    return folder


@pytest.fixture
def pipe(request: pytest.FixtureRequest) -> object:
    """A pipeline of its own, which fusing changes."""
    return copy.deepcopy(pipelines.pipeline(request.param))


def weights(pipe: object) -> dict[str, np.ndarray]:
    return {
        named(component, path): value.detach().numpy()
        for component, model in components(pipe).items()
        for path, value in model.state_dict().items()
    }


def wrong(path: Path, wanted: Mapping[str, np.ndarray]) -> dict[str, float]:
    with open_checkpoint(path) as model:
        found = {f"{module}.weight": model.weight(module) for module in model}
        found |= {f"{module}.bias": model.bias(module) for module in model.biases}
    assert set(found) <= set(wanted)
    errors = {key: relative_error(value, wanted[key]) for key, value in found.items()}
    return {key: error for key, error in errors.items() if not error <= 1e-6}


@pytest.mark.parametrize("pipe", ["sdxl", "sd15"], indirect=True)
@pytest.mark.parametrize("shard", [None, "40KB"])
def test_a_baked_directory_has_the_weights_that_diffusers_fuses(
    pipe: object, shard: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    architecture = request.node.callspec.params["pipe"]
    lora = lora_for(architecture, a_few, kind=lambda module: pick(module, ("lora", "lora", "loha", "tucker")))
    options = {"max_shard_size": shard} if shard else {}
    base = tmp_path / "base"
    for name, model in components(pipe).items():
        model.save_pretrained(base / name, **options)
    pipe.load_lora_weights(lora.state_dict("diffusers"))
    pipe.fuse_lora(lora_scale=0.7, components=list(components(pipe)))
    pipe.unload_lora_weights()

    lm.bake([lora], base, tmp_path / "out", weights=[0.7])

    assert (len(list((base / "unet").glob("*.safetensors"))) > 1) == bool(shard)
    assert wrong(tmp_path / "out", weights(pipe)) == {}


def test_diffusers_loads_a_baked_directory(tmp_path: Path) -> None:
    base = saved("flux", tmp_path / "base", max_shard_size="20KB")
    shapes = {
        f"transformer.{path}": tuple(m.weight.shape)
        for path, m in small_flux().named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    layers = {module: random_layer(shape, rank=2, seed=i) for i, (module, shape) in enumerate(shapes.items())}
    lora = LoRA(name="x", architecture=None, dialect="diffusers-peft", layouts=layers)

    lm.bake([lora], base, tmp_path / "out", weights=[0.5], dtype="float32")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    before = models("flux")["transformer"].state_dict()

    for module, layer in layers.items():
        key = module.removeprefix("transformer.") + ".weight"
        assert relative_error(loaded[key].numpy(), before[key].numpy() + 0.5 * layer.delta()) <= 1e-6


# DoRA


@functools.cache
def peft_dora() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A UNet with a PEFT DoRA on linear and convolution layers, and its state dict."""
    unet = copy.deepcopy(models("sdxl")["unet"])
    targets = r"mid_block.*(attentions.*to_q|conv1|proj_in)|.*conv_shortcut"
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=targets, init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)
    for path, parameter in unet.named_parameters():
        if "lora_" in path:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator) + ("magnitude" in path)
    return unet, {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}


def test_a_baked_dora_is_the_one_that_peft_merges(tmp_path: Path) -> None:
    unet, tensors = peft_dora()
    base = saved("sdxl", tmp_path / "base")
    lora = lm.open(tensors, config={"r": 2, "lora_alpha": 6, "use_dora": True})
    assert {layer.kind for layer in lora.layouts.values()} == {"dora"}

    lm.bake([lora], base, tmp_path / "out")

    merged = copy.deepcopy(unet)
    for module in merged.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    with open_checkpoint(tmp_path / "out") as model:
        for path, module in merged.named_modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight.detach().numpy()
                assert relative_error(model.weight(f"unet.{path}"), weight) <= 1e-6


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("layer", [torch.nn.Linear(6, 9), torch.nn.Conv2d(6, 9, 3)], ids=["linear", "conv"])
def test_dora_of_either_axis_is_lycoriss(on_out: bool, layer: torch.nn.Module) -> None:
    torch.manual_seed(0)
    module = LoConModule("x", layer, lora_dim=2, alpha=3, weight_decompose=True, wd_on_out=on_out)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    merged = module.get_merged_weight()[0].detach().numpy()

    direction = LowRank(
        up=module.lora_up.weight.detach().numpy(), down=module.lora_down.weight.detach().numpy(), alpha=3
    )
    dora = DoRA(direction=direction, magnitude=module.dora_scale.detach().numpy())
    weight = layer.weight.detach().numpy()

    assert dora.axis == ("out" if on_out else "in")
    assert relative_error(weight + dora.delta_on(weight), merged) <= 1e-6
