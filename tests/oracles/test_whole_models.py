"""Files that loramerge writes load whole into diffusers' models of full size: a layer for every key, and no key left.

The models are built on PyTorch's meta device, without weights.  ``LORAMERGE_WHOLE=1`` in the environment tries every
family instead of a few; that takes minutes.
"""

import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers.loaders import lora_pipeline as pipelines

from loramerge import LoRA
from loramerge.files.architectures import ARCHITECTURES
from loramerge.layers import LowRank

from .test_families import LOADERS as TRANSFORMERS

LOADERS: dict[str, Any] = {
    **TRANSFORMERS,
    "cogvideox-2b": pipelines.CogVideoXLoraLoaderMixin,
    **dict.fromkeys(("sd3.5-medium", "sd3.5-large"), pipelines.SD3LoraLoaderMixin),
    **dict.fromkeys(("sd15", "sd21"), pipelines.StableDiffusionLoraLoaderMixin),
    **dict.fromkeys(
        ("sdxl", "sdxl-refiner", "ssd-1b", "segmind-vega", "kolors"), pipelines.StableDiffusionXLLoraLoaderMixin
    ),
    "longcat-image": pipelines.FluxLoraLoaderMixin,
}
"""The loader of each family's pipeline."""

SAMPLE = ("flux2-klein-4b", "sd15")
FAMILIES = [name for name in LOADERS if name in SAMPLE or os.environ.get("LORAMERGE_WHOLE") == "1"]
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@cache
def dump() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "dump_architectures.py"
    spec = importlib.util.spec_from_file_location("dump_architectures", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models(family: str) -> Iterator[torch.nn.Module]:
    """The family's denoisers: one, or one of each version."""
    with torch.device("meta"):
        built = dump().MODELS[ARCHITECTURES[family].model]()
    yield from built if isinstance(built, list) else [built]


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that PEFT can put a LoRA on: not the convolutions of each channel by itself."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1
    }


def lora_for(model: torch.nn.Module, family: str) -> LoRA:
    """A LoRA of rank 1 on every layer that the model and the family have."""
    component = ARCHITECTURES[family].denoiser
    layers = {}
    for path, layer in layers_of(model).items():
        if (module := f"{component}.{path}") in ARCHITECTURES[family].shapes:
            out, columns, *kernel = layer.weight.shape
            up, down = np.broadcast_to(np.float32(1), (out, 1)), np.broadcast_to(np.float32(1), (1, columns, *kernel))
            layers[module] = LowRank(up=up.reshape(out, 1, *[1] * len(kernel)), down=down)
    return LoRA(name="whole", architecture=family, dialect="diffusers-peft", layouts=layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_file_loads_whole_into_the_full_size_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = []
    setter = peft.set_peft_model_state_dict
    monkeypatch.setattr(
        peft, "set_peft_model_state_dict", lambda *a, **k: results.append(setter(*a, **k)) or results[-1]
    )
    component = ARCHITECTURES[family].denoiser
    for model in models(family):
        lora = lora_for(model, family)
        layers = layers_of(model)
        assert len(lora) == len(layers)

        found = LOADERS[family].lora_state_dict(lora.state_dict("diffusers-peft"))
        state = found[0] if isinstance(found, tuple) else found
        model.load_lora_adapter(dict(state), prefix=component, adapter_name="x", low_cpu_mem_usage=True)

        injected = {name for name, _ in model.named_parameters() if ".lora_" in name}
        assert injected == {f"{name}.lora_{factor}.x.weight" for name in layers for factor in "AB"}
        result = results.pop()
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if ".lora_" in key]
