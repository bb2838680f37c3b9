"""Native names against diffusers' own converters of checkpoints, and shapes against freshly made models."""

import gzip
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers.loaders import single_file_utils

from loramerge.files.architectures import ARCHITECTURES, Architecture
from loramerge.files.architectures.family import versions
from loramerge.files.architectures.names import Part

TRANSFORMERS = {
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "sd3-medium": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd3.5-medium": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd3.5-large": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
}
UNETS = ("sdxl", "sd15", "sd21", "sdxl-refiner")
MODELS = sorted(
    {a.model for a in ARCHITECTURES.values()} | {e.model for a in ARCHITECTURES.values() for e in a.text_encoders}
)
ROOT = Path(__file__).parents[2]


def marked(architecture: Architecture) -> dict[str, torch.Tensor]:
    """A native checkpoint of which every weight row says where it is: its weight's number and its own."""
    shapes = architecture.shapes
    tensors = {}
    for number, (path, parts) in enumerate(architecture.native_paths.items()):
        rows = torch.arange(sum(shapes[part.module][0] for part in parts))
        tensors[path] = torch.stack([torch.full_like(rows, number), rows], dim=1)
    return tensors


def expected(part: Part, weight: torch.Tensor) -> torch.Tensor:
    return weight if part.rows is None else torch.cat([weight[start:stop] for start, stop in part.rows])


def moved(architecture: Architecture, converted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Modules that the converter made of other rows than loramerge's names say."""
    native = marked(architecture)
    wrong = {}
    for path, parts in architecture.native_paths.items():
        for part in parts:
            weight = converted.get(f"{part.module.partition('.')[2]}.weight")
            if weight is None or not torch.equal(weight, expected(part, native[path])):
                wrong[part.module] = path
    return wrong


def spelled(architecture: Architecture) -> dict[str, torch.Tensor]:
    """The same with the names of tensors that the converters look for."""
    checkpoint = {}
    for path, rows in marked(architecture).items():
        scale = path.endswith("_norm")
        checkpoint[f"{path}.{'scale' if scale else 'weight'}"] = rows
        checkpoint[f"{path}.bias"] = rows[:, 0].clone()
    checkpoint["pos_embed"] = torch.zeros(1)
    return checkpoint


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_diffusers_puts_every_row_of_a_native_weight_where_the_names_say(name: str) -> None:
    architecture = ARCHITECTURES[name]

    assert moved(architecture, TRANSFORMERS[name](spelled(architecture))) == {}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_diffusers_takes_every_native_name(name: str) -> None:
    checkpoint = spelled(ARCHITECTURES[name])

    TRANSFORMERS[name](checkpoint)

    assert [key for key in checkpoint if key.endswith((".weight", ".scale"))] == []


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_puts_every_ldm_weight_where_the_names_say(name: str) -> None:
    architecture = ARCHITECTURES[name]
    checkpoint = {f"model.diffusion_model.{key}": tensor for key, tensor in spelled(architecture).items()}
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if "sdxl" in name else None}

    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)

    assert moved(architecture, converted) == {}


@pytest.mark.parametrize(("name", "file"), [("sd15", "sgm_sd1"), ("sdxl", "sgm_sdxl")])
def test_the_ldm_names_are_those_of_ai_toolkits_published_map(name: str, file: str) -> None:
    published = json.loads(gzip.decompress((ROOT / "tests" / "data" / "maps" / f"{file}.json.gz").read_bytes()))["unet"]

    found = {path: parts[0].module.removeprefix("unet.") for path, parts in ARCHITECTURES[name].native_paths.items()}

    assert found == published


@cache
def dump() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dump_architectures", ROOT / "tools" / "dump_architectures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", MODELS)
def test_the_shapes_are_those_of_a_model_made_now(model: str) -> None:
    with torch.device("meta"):
        built = dump().MODELS[model]()
    if built is None:
        pytest.skip("its own code isn't here")
    shapes = dump().joined(built if isinstance(built, list) else [built])
    if model.startswith("clip-"):
        shapes = dump().text_model_names(shapes)

    found = {n: tuple(map(tuple, given if isinstance(given[0], list) else [given])) for n, given in shapes.items()}
    assert found == versions(model)
