"""diffusers' own loader, on pipelines with every block of the published models."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

import loramerge as lm
from loramerge import LoRA
from loramerge.errors import DialectError
from loramerge.files.architectures import ARCHITECTURES
from loramerge.testing import KINDS, relative_error
from oracles import pipelines
from oracles.pipelines import ADAPTER, a_few, attention, everything, loaded, lora_for, pick, some_attention

DIALECTS = {
    "sdxl": ("kohya", "kohya-diffusers", "diffusers", "diffusers-peft"),
    "sd15": ("kohya", "kohya-diffusers", "diffusers", "diffusers-peft"),
    "flux": ("kohya", "diffusers", "diffusers-peft"),
}
PAIRS = [(architecture, dialect) for architecture, dialects in DIALECTS.items() for dialect in dialects]

FLUX_OUTSIDE_BLOCKS = {
    "transformer.x_embedder",
    "transformer.context_embedder",
    "transformer.time_text_embed.timestep_embedder.linear_1",
    "transformer.time_text_embed.timestep_embedder.linear_2",
    "transformer.time_text_embed.text_embedder.linear_1",
    "transformer.time_text_embed.text_embedder.linear_2",
    "transformer.time_text_embed.guidance_embedder.linear_1",
    "transformer.time_text_embed.guidance_embedder.linear_2",
    "transformer.norm_out.linear",
    "transformer.proj_out",
}
"""Converted by diffusers to names without ``transformer.``, which it then ignores (lora_conversion_utils.py)."""

SDXL_ADD_EMBEDDING = {"unet.add_embedding.linear_1", "unet.add_embedding.linear_2"}
"""diffusers strips the number at the end of these names where it means to strip sgm's (_convert_unet_lora_key)."""

DROPPED = {("sdxl", "kohya-diffusers"): SDXL_ADD_EMBEDDING, ("flux", "kohya"): FLUX_OUTSIDE_BLOCKS}
"""What diffusers can't read in a dialect, whoever wrote it."""


def dropped(architecture: str, dialect: str) -> set[str]:
    return DROPPED.get((architecture, dialect), set())


def probe(columns: int) -> torch.Tensor:
    return torch.randn(columns, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))


def effect(layer: LoraLayer) -> np.ndarray:
    """A pipeline's ΔW; of FLUX's wide weights what ΔW does to three random vectors."""
    a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    if a.shape[-1] * b.shape[0] < 1_000_000:
        return layer.get_delta_weight(ADAPTER).detach().double().numpy()
    return (layer.scaling[ADAPTER] * (b.double() @ (a.double() @ probe(a.shape[1])))).numpy()


def truth(lora: LoRA, module: str) -> np.ndarray:
    up, down = (np.asarray(factor, dtype=np.float64) for factor in lora[module].factors())
    if down.shape[1] * up.shape[0] < 1_000_000:
        return (up @ down).reshape(lora[module].shape)
    return up @ (down @ probe(down.shape[1]).numpy())


def wrong(layers: Mapping[str, LoraLayer], wanted: Callable[[str], np.ndarray], names: set[str]) -> dict[str, float]:
    """Modules whose ΔW in the pipeline is not the wanted one."""
    errors = {module: relative_error(effect(layers[module]), wanted(module)) for module in names}
    return {module: error for module, error in errors.items() if not error <= 1e-5}


def silent(layers: Mapping[str, LoraLayer], names: set[str]) -> bool:
    return all(not effect(layers[module]).any() for module in names)


def text_ends(module: str, shape: tuple[int, ...]) -> bool:
    return (
        module.startswith("text_encoder_2.")
        and ("layers.31." in module or "text_projection" in module)
        and len(shape) == 2
    )


@pytest.fixture(params=[attention, everything], ids=lambda scope: scope.__name__)
def scope(request: pytest.FixtureRequest) -> Iterator[Callable[[str, tuple[int, ...]], bool]]:
    return request.param


@pytest.mark.parametrize("architecture", DIALECTS)
def test_the_pipelines_have_every_module_of_the_architecture(architecture: str) -> None:
    known = ARCHITECTURES[architecture].shapes
    unused = {m for m in known if architecture == "flux" and m.startswith("text_encoder_2.")}

    assert set(pipelines.shapes(architecture)) == set(known) - unused


@pytest.mark.parametrize(("architecture", "dialect"), PAIRS)
def test_every_module_of_a_file_has_its_delta_in_the_pipeline(
    architecture: str, dialect: str, scope: Callable[[str, tuple[int, ...]], bool], tmp_path: Path
) -> None:
    lora = lora_for(architecture, scope)
    path = lm.save(lora, tmp_path / "lora.safetensors", dialect=dialect)

    with loaded(architecture, str(path)) as layers:
        read = set(lora) - dropped(architecture, dialect)

        assert set(lora) & set(layers) == read
        assert wrong(layers, lambda module: truth(lora, module), read) == {}
        assert silent(layers, set(layers) - set(lora))


@pytest.mark.parametrize(("architecture", "dialect"), PAIRS)
def test_every_module_of_a_state_dict_has_its_delta_in_the_pipeline(architecture: str, dialect: str) -> None:
    lora = lora_for(architecture, a_few)

    with loaded(architecture, lora.state_dict(dialect)) as layers:
        read = set(lora) - dropped(architecture, dialect)

        assert wrong(layers, lambda module: truth(lora, module), read) == {}


@pytest.mark.parametrize("dialect", DIALECTS["sdxl"])
def test_a_text_projection_with_a_rank_of_its_own_has_its_delta_in_the_pipeline(dialect: str, tmp_path: Path) -> None:
    lora = lora_for("sdxl", text_ends, rank=lambda module: 1 if module.endswith("text_projection") else 4)
    path = lm.save(lora, tmp_path / "lora.safetensors", dialect=dialect)

    with loaded("sdxl", str(path)) as layers:
        module = "text_encoder_2.text_projection"

        assert wrong(layers, lambda module: truth(lora, module), {module}) == {}


def with_one_bias(lora: LoRA) -> tuple[LoRA, str]:
    """The LoRA with a bias of ones in the denoiser's first layer, and that layer's module."""
    first = next(module for module in lora if not module.startswith("text_encoder"))
    bias = np.ones(lora[first].shape[0], np.float32)
    layer = lora[first].with_inner(lambda inner: replace(inner, diff_b=bias))
    return replace(lora, layouts={**lora.layouts, first: layer}), first


@pytest.mark.parametrize("architecture", ["sdxl", "flux"])
def test_a_bias_of_one_layer_leaves_no_other_of_its_model_without_values(architecture: str, tmp_path: Path) -> None:
    lora, first = with_one_bias(lora_for(architecture, a_few))
    model = {module for module in lora if module.partition(".")[0] == first.partition(".")[0]}
    path = lm.save(lora, tmp_path / "lora.safetensors", dialect="diffusers-peft")

    with loaded(architecture, str(path)) as layers:
        biases = {module: layers[module].lora_B[ADAPTER].bias.detach().numpy() for module in model}
        assert {module: (bias == (module == first)).all() for module, bias in biases.items()} == dict.fromkeys(
            model, True
        )
        assert wrong(layers, lambda module: truth(lora, module), set(lora)) == {}


@pytest.mark.parametrize("dialect", ["diffusers-peft", "peft"])
def test_a_bias_beside_dora_is_refused_as_peft_refuses_it(dialect: str, tmp_path: Path) -> None:
    lora, _ = with_one_bias(lora_for("sdxl", a_few, kind=lambda module: "dora"))

    with pytest.raises(DialectError, match="changes a bias"):
        lm.save(lora, tmp_path / "lora.safetensors", dialect=dialect)
    with pytest.raises(ValueError, match="not supported for DoRA"):
        LoraConfig(use_dora=True, lora_bias=True)


@pytest.mark.parametrize(("architecture", "dialect"), PAIRS)
def test_what_diffusers_does_to_a_state_dict_does_not_reach_the_lora(architecture: str, dialect: str) -> None:
    lora = lora_for(architecture, a_few)
    before = {module: lora[module].norm() for module in lora}

    with loaded(architecture, lora.state_dict(dialect)):
        assert {module: lora[module].norm() for module in lora} == before


@pytest.mark.parametrize("dialect", ["diffusers", "diffusers-peft"])
@pytest.mark.parametrize("kind", ["tucker", *(kind for kind in KINDS if kind.startswith(("loha", "lokr")))])
def test_products_and_tucker_cores_load_as_the_lora_with_the_same_delta(
    kind: str, dialect: str, tmp_path: Path
) -> None:
    lora = lora_for("sdxl", a_few, kind=lambda module: kind)
    path = lm.save(lora, tmp_path / "lora.safetensors", dialect=dialect)

    with loaded("sdxl", str(path)) as layers:
        assert set(layers) == set(lora)
        assert wrong(layers, lambda module: np.asarray(lora[module].delta(), np.float64), set(lora)) == {}


@pytest.mark.parametrize(("architecture", "dialect"), PAIRS)
def test_a_merge_is_the_weighted_sum_of_deltas_in_the_pipeline(architecture: str, dialect: str, tmp_path: Path) -> None:
    mixed = ("lora", "loha", "lokr")
    loras = [
        lora_for(architecture, a_few, seed=1, kind=lambda module: pick(module, mixed)),
        lora_for(architecture, some_attention, seed=2, rank=lambda module: 5),
    ]
    weights = [0.7, -0.4]
    merged = lm.merge(loras, weights=weights)
    path = lm.save(merged, tmp_path / "merged.safetensors", dialect=dialect)

    def weighted(module: str) -> np.ndarray:
        return sum(w * truth(lora, module) for w, lora in zip(weights, loras, strict=True) if module in lora)

    with loaded(architecture, str(path)) as layers:
        read = set(loras[0]) | set(loras[1])

        assert wrong(layers, weighted, read - dropped(architecture, dialect)) == {}


@pytest.mark.parametrize("first", ["kohya", "diffusers-peft"])
@pytest.mark.parametrize("second", ["kohya-diffusers", "diffusers"])
def test_files_of_two_dialects_merge_to_the_weighted_sum_in_the_pipeline(
    first: str, second: str, tmp_path: Path
) -> None:
    loras = [lora_for("sdxl", a_few, seed=1), lora_for("sdxl", a_few, seed=2, rank=lambda module: 5)]
    files = [
        lm.save(lora, tmp_path / f"{dialect}.safetensors", dialect=dialect)
        for lora, dialect in zip(loras, (first, second), strict=True)
    ]
    merged = lm.merge([lm.load(file, architecture="sdxl") for file in files], weights=[0.5, 1.5])
    path = lm.save(merged, tmp_path / "merged.safetensors")

    with loaded("sdxl", str(path)) as layers:
        assert set(layers) == set(loras[0])
        assert wrong(layers, lambda m: 0.5 * truth(loras[0], m) + 1.5 * truth(loras[1], m), set(layers)) == {}


def test_diffusers_misreads_a_kohya_file_that_keeps_an_alpha_a_module() -> None:
    lora = lora_for("sdxl", some_attention)
    tensors = lora.state_dict("kohya")
    for key in [key for key in tensors if key.endswith(".alpha")]:
        kept = torch.tensor(pick(key, (1.0, 2.0, 4.0)))
        tensors[key.replace(".alpha", ".lora_up.weight")] *= tensors[key] / kept
        tensors[key] = kept

    with loaded("sdxl", tensors) as layers:
        assert len(wrong(layers, lambda module: truth(lora, module), set(lora))) > len(lora) / 3
