"""PEFT: it reads what loramerge writes, and loramerge what it saves."""

import copy
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import loramerge as lm
from loramerge import LoRA
from loramerge.layers import DoRA, LowRank
from loramerge.testing import random_layer, relative_error
from oracles import pipelines
from oracles.pipelines import a_few, everything, lora_for, named

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
RANK_ENDS = {"conv_in": 2, "time_embedding.linear_1": 3, "attn1.to_q": 5, "conv1": 1}
ALPHA_ENDS = {"conv_in": 1.0, "attn1.to_q": 8.0, "attn2.to_k": 3.0}


@cache
def models(architecture: str) -> dict[str, torch.nn.Module]:
    return pipelines.components(pipelines.PIPELINES[architecture]())


def model(architecture: str, component: str) -> torch.nn.Module:
    return copy.deepcopy(models(architecture)[component])


def read(component: str, folder: Path) -> dict[str, LoraLayer]:
    """PEFT's layers of one component from a directory that loramerge wrote, by loramerge's names."""
    adapter = PeftModel.from_pretrained(model("sdxl", component), folder if component == "unet" else folder / component)
    return layers(component, adapter.base_model.model)


def layers(component: str, adapted: torch.nn.Module) -> dict[str, LoraLayer]:
    return {named(component, path): m for path, m in adapted.named_modules() if isinstance(m, LoraLayer)}


def delta(layer: LoraLayer, adapter: str = "default") -> np.ndarray:
    return layer.get_delta_weight(adapter).detach().numpy()


def wrong(found: Mapping[str, LoraLayer], lora: LoRA) -> dict[str, float]:
    errors = {module: relative_error(delta(layer), lora[module].delta()) for module, layer in found.items()}
    return {module: error for module, error in errors.items() if not error <= 1e-6}


def of(component: str, lora: LoRA) -> set[str]:
    return {module for module in lora if module.startswith(f"{component}.")}


@pytest.fixture(scope="module")
def mixed() -> LoRA:
    """Every module, with a rank and an alpha of its own."""
    return lora_for("sdxl", everything)


@pytest.fixture(scope="module")
def folder(mixed: LoRA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.save(mixed, tmp_path_factory.mktemp("peft") / "adapter", dialect="peft")


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("component", COMPONENTS)
def test_peft_reads_every_delta_of_a_component_from_its_directory(component: str, mixed: LoRA, folder: Path) -> None:
    found = read(component, folder)

    assert set(found) == of(component, mixed)
    assert wrong(found, mixed) == {}


@pytest.mark.parametrize("only", ["conv_in", "conv_out", "text_projection", "conv_shortcut"])
def test_peft_gives_no_layer_to_a_module_whose_name_ends_like_another_s(only: str, tmp_path: Path) -> None:
    lora = lora_for("sdxl", lambda module, shape: module.endswith(f".{only}"))
    component = next(iter(lora)).partition(".")[0]

    assert set(read(component, lm.save(lora, tmp_path / "adapter", dialect="peft"))) == set(lora)


def tiny_flux() -> torch.nn.Module:
    """A transformer with a ``proj_out`` of its own and one in every single block."""
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2),
    )


def test_peft_tells_a_module_from_those_whose_names_end_like_it(tmp_path: Path) -> None:
    transformer = tiny_flux()
    ranks = {"proj_out": 2, "single_transformer_blocks.0.proj_out": 3, "single_transformer_blocks.1.norm.linear": 3}
    layouts = {
        f"transformer.{path}": random_layer(
            tuple(transformer.get_submodule(path).weight.shape), rank=rank, alpha=rank + 1
        )
        for path, rank in ranks.items()
    }
    lora = LoRA(name="ends", architecture="flux", dialect="peft", layouts=layouts)
    folder = lm.save(lora, tmp_path / "adapter")
    found = layers("transformer", PeftModel.from_pretrained(transformer, folder).base_model.model)

    assert set(found) == set(lora)
    assert wrong(found, lora) == {}


@pytest.mark.parametrize("pattern", ["proj_out", "^proj_out", "0.proj_out", "single_transformer_blocks.0.proj_out"])
def test_a_pattern_of_peft_means_the_modules_that_it_means_to_peft(pattern: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj_out"], alpha_pattern={pattern: 3.0})
    adapter = get_peft_model(tiny_flux(), config)
    randomise(adapter, "default")
    adapter.save_pretrained(tmp_path)

    lora = lm.load(tmp_path, architecture="flux")
    truth = layers("transformer", adapter.base_model.model)

    assert set(lora) == set(truth)
    assert wrong(truth, lora) == {}


@pytest.mark.parametrize("kind", ["tucker", "loha", "loha-tucker", "lokr", "lokr-full", "lokr-both"])
def test_peft_reads_the_delta_of_products_and_tucker_cores(kind: str, tmp_path: Path) -> None:
    lora = lora_for("sdxl", a_few, kind=lambda module: kind).select("unet.*")
    found = read("unet", lm.save(lora, tmp_path / "adapter", dialect="peft"))

    assert set(found) == set(lora)
    assert wrong(found, lora) == {}


def test_peft_reads_a_merge_as_the_weighted_sum_of_deltas(tmp_path: Path) -> None:
    loras = [lora_for("sdxl", a_few, seed=1), lora_for("sdxl", a_few, seed=2, rank=lambda module: 5)]
    merged = lm.merge([lora.select("unet.*") for lora in loras], weights=[0.7, -0.4])
    found = read("unet", lm.save(merged, tmp_path / "adapter", dialect="peft"))

    def error(module: str) -> float:
        first, second = (np.asarray(lora[module].delta(), np.float64) for lora in loras)
        return relative_error(delta(found[module]), 0.7 * first - 0.4 * second)

    assert {module: error(module) for module in found if not error(module) <= 1e-6} == {}


@pytest.fixture(scope="module")
def doras(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoRA, dict[str, LoraLayer]]:
    lora = lora_for("sdxl", a_few, kind=lambda module: "dora").select("unet.*")
    path = lm.save(lora, tmp_path_factory.mktemp("dora") / "adapter", dialect="peft")
    return lora, read("unet", path)


def test_peft_reads_every_dora_magnitude_unchanged(doras: tuple[LoRA, dict[str, LoraLayer]]) -> None:
    lora, found = doras

    assert set(found) == set(lora)
    for module, layer in found.items():
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().numpy().ravel()

        np.testing.assert_array_equal(magnitude, np.asarray(lora[module].magnitude).ravel())


def test_peft_reads_every_dora_direction(doras: tuple[LoRA, dict[str, LoraLayer]]) -> None:
    lora, found = doras
    errors = [relative_error(delta(layer), lora[module].direction.delta()) for module, layer in found.items()]

    assert max(errors) <= 1e-6


def test_peft_reads_the_bias_of_up_scaled_like_the_delta(tmp_path: Path) -> None:
    plain = lora_for("sdxl", a_few).select("unet.*")
    biases = {m: random_layer(plain.layout(m).shape[:1], seed=zlib.crc32(m.encode())).w_norm for m in plain}
    lora = biased(plain, biases)
    found = read("unet", lm.save(lora, tmp_path / "adapter", dialect="peft"))

    assert wrong(found, plain) == {}
    for module, layer in found.items():
        bias = layer.lora_B["default"].bias.detach().numpy() * layer.scaling["default"]

        assert relative_error(bias, biases[module] * plain[module].scale) <= 1e-6


def biased(lora: LoRA, biases: Mapping[str, np.ndarray]) -> LoRA:
    layouts = {
        module: LowRank(down=layer.down, up=layer.up, alpha=layer.alpha, up_bias=biases[module])
        for module, layer in lora.items()
    }
    return LoRA(name="biased", architecture=lora.architecture, dialect=lora.dialect, layouts=layouts)


def adapted(**options: object) -> PeftModel:
    """A UNet with random factors, on modules of every kind."""
    targets = ["to_q", "to_k", "to_out.0", "conv_in", "conv1", "proj_in", "linear_1"]
    adapter = get_peft_model(
        model("sd15", "unet"), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets} | options)
    )
    torch.manual_seed(0)
    randomise(adapter, "default")
    return adapter


def randomise(adapter: PeftModel, name: str) -> None:
    for key, parameter in adapter.named_parameters():
        if "lora_" in key and f".{name}." in f"{key}.":
            torch.nn.init.normal_(parameter, std=0.3)


CONFIGURATIONS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "rank-pattern": {"rank_pattern": RANK_ENDS},
    "alpha-pattern": {"alpha_pattern": ALPHA_ENDS},
    "both-patterns": {"rank_pattern": RANK_ENDS, "alpha_pattern": ALPHA_ENDS},
    "both-patterns-rank-stabilised": {"rank_pattern": RANK_ENDS, "alpha_pattern": ALPHA_ENDS, "use_rslora": True},
    "anchored-pattern": {"rank_pattern": {"^conv_in": 2}, "alpha_pattern": {"^conv_in": 9.0, r"down_blocks\..*": 2.0}},
    "expression": {"target_modules": r".*mid_block.*(to_q|conv1)|conv_out"},
    "top-level-end": {"target_modules": ["conv_in", "conv_out", "conv", "conv1"], "alpha_pattern": {"conv": 3.0}},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_an_adapter_that_peft_saved_has_pefts_deltas(options: dict[str, object], tmp_path: Path) -> None:
    adapter = adapted(**options)
    adapter.save_pretrained(tmp_path)

    lora = lm.load(tmp_path, architecture="sd15")
    truth = layers("unet", adapter.base_model.model)

    assert set(lora) == set(truth)
    assert wrong(truth, lora) == {}


def text_encoder(component: str) -> torch.nn.Module:
    """A text encoder of SDXL with its real widths, by which a lone directory is recognised."""
    with torch.device("meta"):
        real = pipelines.clip(12, width=768)
        if component == "text_encoder_2":
            real = pipelines.clip(32, width=1280, projection=True)
    return pipelines.hollow(real)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_a_text_encoders_adapter_that_peft_saved_has_pefts_deltas(component: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=r".*\.layers\.[38]\.(self_attn\.q_proj|mlp\.fc1)")
    config.rank_pattern, config.alpha_pattern = {"fc1": 2}, {"layers.3.mlp.fc1": 5.0}
    adapter = get_peft_model(text_encoder(component), config)
    randomise(adapter, "default")
    adapter.save_pretrained(tmp_path / component)

    lora = lm.load(tmp_path, architecture="sdxl")
    truth = layers(component, adapter.base_model.model)

    assert set(lora) == set(truth)
    assert wrong(truth, lora) == {}


def test_the_bias_that_peft_saved_is_scaled_like_the_delta(tmp_path: Path) -> None:
    adapter = adapted(lora_bias=True)
    adapter.save_pretrained(tmp_path)

    lora = lm.load(tmp_path, architecture="sd15")

    for module, layer in layers("unet", adapter.base_model.model).items():
        bias = layer.lora_B["default"].bias.detach().numpy() * layer.scaling["default"]

        assert relative_error(lora[module].bias(), bias) <= 1e-6


def test_the_dora_magnitudes_that_peft_saved_are_norms_of_rows(tmp_path: Path) -> None:
    adapter = adapted(use_dora=True)
    adapter.save_pretrained(tmp_path)

    lora = lm.load(tmp_path, architecture="sd15")

    for module, layer in layers("unet", adapter.base_model.model).items():
        wanted = layer.lora_magnitude_vector["default"].weight.detach().numpy().ravel()

        assert isinstance(lora[module], DoRA)
        assert lora[module].axis == "out"
        np.testing.assert_array_equal(np.asarray(lora[module].magnitude).ravel(), wanted)


def test_a_directory_in_which_peft_saved_two_adapters_is_the_first(tmp_path: Path) -> None:
    adapter = adapted()
    adapter.add_adapter("second", LoraConfig(r=2, target_modules=["to_q"]))
    adapter.save_pretrained(tmp_path)

    assert set(lm.load(tmp_path, architecture="sd15")) == set(layers("unet", adapter.base_model.model))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, list[Path]]:
    """One PEFT model with two adapters of one rank, and their directories."""
    folder = tmp_path_factory.mktemp("pair")
    adapter = adapted(r=4, lora_alpha=6)
    adapter.add_adapter("second", LoraConfig(**adapter.peft_config["default"].to_dict() | {"lora_alpha": 2}))
    randomise(adapter, "second")
    for name in ("default", "second"):
        adapter.save_pretrained(folder / f"only-{name}", selected_adapters=[name])
    return adapter, [folder / "only-default", folder / "only-second" / "second"]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 1.0), (0.7, 0.2), (1.0, -0.5), (-0.3, 2.0)])
@pytest.mark.parametrize(("method", "combination"), [("linear", "cat"), ("factor_average", "linear")])
def test_a_merge_is_pefts_weighted_adapter(
    method: str, combination: str, weights: tuple[float, float], pair: tuple[PeftModel, list[Path]]
) -> None:
    adapter, folders = pair
    name = f"{combination} {weights}".replace(".", ",")
    adapter.add_weighted_adapter(["default", "second"], list(weights), name, combination_type=combination)
    loras = [lm.load(folder, architecture="sd15") for folder in folders]

    merged = lm.merge(loras, weights=weights, method=method)
    truth = layers("unet", adapter.base_model.model)

    assert set(merged) == set(truth)
    assert max(relative_error(merged[m].delta(), delta(layer, name)) for m, layer in truth.items()) <= 1e-6


def test_the_average_of_factors_is_pefts_where_the_modules_of_one_lora_are_untrained(tmp_path: Path) -> None:
    adapter = adapted()
    adapter.add_adapter("second", LoraConfig(**adapter.peft_config["default"].to_dict()))
    for name in ("default", "second"):
        adapter.save_pretrained(tmp_path / name, selected_adapters=[name])
    adapter.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type="linear")
    loras = [lm.load(f, architecture="sd15") for f in (tmp_path / "default", tmp_path / "second" / "second")]

    merged = lm.merge(loras, weights=[0.7, -0.4], method="factor_average")
    truth = layers("unet", adapter.base_model.model)

    assert [bool(lora.norm()) for lora in loras] == [True, False]
    assert max(relative_error(merged[m].delta(), delta(layer, "both")) for m, layer in truth.items()) <= 1e-6
