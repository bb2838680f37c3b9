"""Files as PEFT, its users and other tools leave them: pickles, folders, several adapters, whole biases."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli.app import app
from loramerge.errors import DialectError, FileError, LoRAMergeError, NotALoRAError, OptionError
from loramerge.layers import DoRA
from loramerge.testing import random_layer, relative_error
from small import MODULES, small

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
STEM = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def factors(name: str = "", seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"lora_A": (4, 320), "lora_B": (320, 4)}
    return {f"{STEM}.{f}{name}.weight": random.standard_normal(s).astype(np.float32) for f, s in shapes.items()}


def pickled(path: Path, data: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save({key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in data.items()}, path)
    return path


def adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.mark.parametrize("named", ["adapter", "adapter/adapter_model.bin"])
def test_a_pickle_has_the_scale_of_the_configuration_beside_it(named: str, tmp_path: Path) -> None:
    pickled(tmp_path / "adapter" / "adapter_model.bin", factors())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))

    (layer,) = lm.load(tmp_path / named, allow_pickle=True).values()

    assert layer.scale == 4.0


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "person.pt"])
def test_a_folder_that_holds_only_a_pickle_is_read_when_it_is_allowed(name: str, tmp_path: Path) -> None:
    pickled(tmp_path / "folder" / name, factors())
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(CONFIG))

    with pytest.raises(FileError, match="allow_pickle"):
        lm.open(tmp_path / "folder")
    assert len(lm.open(tmp_path / "folder", allow_pickle=True)) == 1


def test_of_a_pickle_and_a_safetensors_file_the_pickle_is_left_alone(tmp_path: Path) -> None:
    pickled(adapter(tmp_path / "folder", factors()) / "adapter_model.bin", {"nothing": 0})

    assert len(lm.open(tmp_path / "folder")) == 1


@pytest.mark.parametrize("level", ["state_dict", "lora", "unet"])
def test_the_only_dictionary_of_tensors_in_a_pickle_is_read(level: str, tmp_path: Path) -> None:
    inner = {key: torch.from_numpy(value) for key, value in factors().items()}
    others = {"step": torch.tensor(3), "optimizer": {"state": {0: {}}}, "statistics": {"loss": torch.zeros(3)}}
    path = pickled(tmp_path / "a.pt", {level: inner, **others})

    assert len(lm.load(path, allow_pickle=True)) == 1


def test_of_several_dictionaries_in_a_pickle_the_names_are_told(tmp_path: Path) -> None:
    inner = {key: torch.from_numpy(value) for key, value in factors().items()}
    path = pickled(tmp_path / "a.bin", {"image_proj": inner, "ip_adapter": inner})

    with pytest.raises(NotALoRAError, match="image_proj, ip_adapter: an IP-Adapter"):
        lm.load(path, allow_pickle=True)


PAIR = factors(".person", 1) | factors(".jersey", 2)


def test_of_two_adapters_in_a_file_the_one_that_is_named_is_read(tmp_path: Path) -> None:
    for seed, name in enumerate(("person", "jersey"), start=1):
        (layer,) = lm.load(PAIR, adapter=name).values()
        (wanted,) = lm.load(factors(seed=seed)).values()

        np.testing.assert_array_equal(layer.delta(), wanted.delta())


def test_of_two_adapters_in_a_file_one_must_be_named() -> None:
    with pytest.raises(NotALoRAError, match="2 adapters, person and jersey"):
        lm.load(PAIR)
    with pytest.raises(OptionError, match=r"no adapter 'bob'\. Available: person, jersey"):
        lm.load(PAIR, adapter="bob")


def test_the_adapter_is_named_for_its_recipe_too(tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "two.safetensors")
    command = ["inspect", str(tmp_path / "two.safetensors"), "--recipe"]

    with pytest.raises(NotALoRAError, match="2 adapters, jersey and person"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    with pytest.raises(LoRAMergeError, match="was not merged by loramerge"):
        CliRunner().invoke(app, [*command, "--adapter", "person"], catch_exceptions=False)


@pytest.mark.parametrize("spelling", ["hada_w1_a", "lokr_w2", "lora_E", "lora_embedding_A", "lora_magnitude_vector"])
def test_adapters_are_told_by_every_kind_of_tensor(spelling: str) -> None:
    keys = {f"{STEM}.{spelling}.{name}": np.ones((4, 4), np.float32) for name in ("a", "b")}

    with pytest.raises(NotALoRAError, match="2 adapters, a and b"):
        lm.load(keys)


def test_a_merge_of_one_of_two_adapters_can_be_made_again(tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "two.safetensors")
    loras = [lm.open(tmp_path / "two.safetensors", adapter=name) for name in ("person", "jersey")]
    path = lm.save(lm.merge(loras), tmp_path / "both.safetensors", dialect="kohya")

    recipe = lm.Recipe.of(lm.open(path))

    assert [entry.adapter for entry in recipe.loras] == ["person", "jersey"]


BIAS = f"{STEM}.base_layer.bias"


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_whole_biases_are_said_and_the_factors_beside_them_merge_without_them(bias: str) -> None:
    loras = [lm.load(factors(seed=seed) | {BIAS: np.ones(320, "f")}, config=CONFIG | {"bias": bias}) for seed in (1, 2)]

    with pytest.raises(lm.errors.MergeError, match=r"base_layer\.bias' belongs to no layer.*leave it out"):
        lm.merge(loras, weights=[1, 1])
    merged = lm.merge(loras, weights=[1, 1], exclude=["*.base_layer.bias"])

    assert "no part of the LoRA" in loras[0].notes[-1]
    assert not merged.extras
    (layer,) = merged.values()
    assert relative_error(layer.delta(), sum(next(iter(lora.values())).delta() for lora in loras)) <= 1e-6


def encoder(model: str, folder: str, plain: bool) -> dict[str, np.ndarray]:
    """Factors on CLIP-L's or CLIP-G's projections, as PEFT names them in either."""
    width, layers = {"clip-l": (768, 12), "clip-g": (1280, 32)}[model]
    path = "encoder.layers" if plain else "text_model.encoder.layers"
    stems = [f"{folder}base_model.model.{path}.{i}.self_attn.q_proj" for i in range(layers)]
    ones = np.ones
    return {f"{s}.lora_{f}.weight": ones(z, "f") for s in stems for f, z in (("A", (4, width)), ("B", (width, 4)))}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("architecture", [None, "sdxl"])
@pytest.mark.parametrize("folder", ["", "text_encoder/", "text_encoder_2/"])
def test_a_text_encoders_adapter_is_all_of_the_encoder_that_it_fits(
    folder: str, architecture: str | None, plain: bool
) -> None:
    for model, component in (("clip-l", "text_encoder"), ("clip-g", "text_encoder_2")):
        lora = lm.load(encoder(model, folder, plain), architecture=architecture, config=CONFIG)

        assert {module.partition(".")[0] for module in lora} == {component}
        assert {layer.scale for layer in lora.layouts.values()} == {4.0}


@pytest.mark.parametrize("swapped", [False, True])
def test_two_text_encoders_keep_their_own_scales(swapped: bool, tmp_path: Path) -> None:
    folders = {"clip-l": "text_encoder", "clip-g": "text_encoder_2"}
    folders = {"clip-l": folders["clip-g"], "clip-g": folders["clip-l"]} if swapped else folders
    for alpha, (model, folder) in enumerate(folders.items(), start=1):
        adapter(tmp_path / "two" / folder, encoder(model, "", False), lora_alpha=4 * alpha)

    lora = lm.open(tmp_path / "two", architecture="sdxl")

    found = {(module.partition(".")[0], layer.shape[0], layer.scale) for module, layer in lora.layouts.items()}
    assert found == {("text_encoder", 768, 1.0), ("text_encoder_2", 1280, 2.0)}


def test_the_magnitudes_of_diffusers_export_for_kohya_find_their_layers(tmp_path: Path) -> None:
    lora = small("sdxl", MODULES["sdxl"][:1], kind="dora", rank=4)
    tensors = {key: np.asarray(value) for key, value in lora.state_dict("kohya-diffusers").items()}
    flat = next(key for key in tensors if key.endswith(".dora_scale"))
    broken = flat.replace("_to_q.dora_scale", ".to_q.lora_magnitude_vector")
    save_file({**tensors, broken: tensors.pop(flat).ravel()}, tmp_path / "broken.safetensors")

    read = lm.load(tmp_path / "broken.safetensors")
    mended = lm.convert(tmp_path / "broken.safetensors", tmp_path / "mended.safetensors", "kohya-diffusers")

    assert "repaired 1 names" in read.notes[-1]
    assert isinstance(read[MODULES["sdxl"][0]], DoRA)
    assert set(load_file(mended)) == {*tensors, flat}
    weight = np.asarray(random_layer((640, 640), kind="full", seed=3).delta())
    assert relative_error(read[MODULES["sdxl"][0]].delta_on(weight), lora[MODULES["sdxl"][0]].delta_on(weight)) <= 1e-6


@pytest.mark.parametrize("dialect", ["peft", "diffusers-peft"])
def test_loras_beside_dora_layers_of_one_model_are_not_written_where_all_would_be_dora(dialect: str) -> None:
    unet = small("sdxl", MODULES["sdxl"][:2], kind="dora")
    plain = small("sdxl", MODULES["sdxl"][2:])
    mixed = lm.LoRA(name="m", architecture="sdxl", dialect="kohya", layouts={**unet.layouts, **plain.layouts})

    with pytest.raises(DialectError, match="is a DoRA layer and"):
        mixed.state_dict(dialect)
    assert len(lm.load(mixed.exclude("*conv_shortcut").state_dict(dialect))) == 3


def lokr(alpha: float, dtype: str = "float16") -> dict[str, np.ndarray]:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {"lokr_w1": (16, 16), "lokr_w2": (20, 20)}
    random = np.random.default_rng(0)
    values = {f"{stem}.{name}": random.standard_normal(shape).astype(dtype) for name, shape in parts.items()}
    with np.errstate(over="ignore"):
        return {**values, f"{stem}.alpha": np.asarray(alpha, dtype)}


@pytest.mark.parametrize("alpha", [9999999999.0, np.inf, np.nan, 0.0])
def test_an_alpha_that_scales_nothing_is_not_looked_at(alpha: float, tmp_path: Path) -> None:
    tensors = lokr(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    lora = lm.open(tmp_path / "a.safetensors")
    wanted = np.kron(*(tensors[key].astype(np.float64) for key in list(tensors)[:2]))

    same = load_file(lm.save(lora, tmp_path / "same.safetensors"))
    other = load_file(lm.save(lora, tmp_path / "other.safetensors", dialect="comfyui"))

    for key, tensor in tensors.items():
        np.testing.assert_array_equal(same[key], tensor)
    assert all(np.isfinite(value).all() for value in other.values())
    for same_layer in (lora, lm.open(tmp_path / "other.safetensors"), lm.merge([lora], weights=[1])):
        (layer,) = same_layer.values()
        assert relative_error(layer.delta(), wanted) <= 1e-6


@pytest.mark.parametrize("role", ["diff", "w_norm", "diff_b"])
def test_an_alpha_beside_what_no_alpha_scales_is_not_looked_at(role: str) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_norm"
    keys = {f"{stem}.{role}": np.ones(320, "f"), f"{stem}.alpha": np.asarray(np.inf, "f")}

    assert len(lm.load(keys)) == 1


def test_an_alpha_that_scales_something_is_still_looked_at() -> None:
    tensors = lokr(np.inf)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    whole = tensors.pop(f"{stem}.lokr_w2")

    with pytest.raises(lm.errors.NumberError, match=r"alpha is inf"):
        lm.load({**tensors, f"{stem}.lokr_w2_a": whole[:, :2], f"{stem}.lokr_w2_b": whole[:2]})


def control() -> dict[str, np.ndarray]:
    """Layers of Black Forest Labs' control LoRAs: one has twice the inputs of FLUX's own."""
    random = np.random.default_rng(0)
    columns = {"img_in": 128, **{f"double_blocks.{i}.img_attn.proj": 3072 for i in range(4)}}
    shapes = {f"{stem}.lora_A.weight": (8, n) for stem, n in columns.items()}
    shapes |= {f"{stem}.lora_B.weight": (3072, 8) for stem in columns} | {"img_in.lora_B.bias": (3072,)}
    return {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
def test_a_control_lora_says_how_wide_the_weight_has_to_be(dialect: str) -> None:
    keys = lm.load(control()).state_dict(dialect)

    (key,) = [key for key in keys if key.endswith(".reshape_weight")]
    assert "img_in" in key
    assert keys[key].tolist() == [3072, 128]
    assert not keys[key].is_floating_point()


def test_a_widened_layer_stays_a_lora_in_every_dialect() -> None:
    first = lm.load(control())
    module = "transformer.x_embedder"
    comfyui = lm.load(first.state_dict("comfyui"))
    diffusers = lm.load(comfyui.state_dict("diffusers-peft"))
    again = lm.load(diffusers.state_dict("comfyui"))
    merged = lm.merge([first, comfyui, diffusers], weights=[1, 1, -1])

    for lora in (comfyui, diffusers, again, lm.load(merged.state_dict("comfyui"))):
        assert relative_error(lora[module].delta(), first[module].delta()) <= 1e-6
    assert merged.state_dict("comfyui")["diffusion_model.img_in.reshape_weight"].tolist() == [3072, 128]


def test_a_width_other_than_the_layers_is_only_carried() -> None:
    keys = lm.load(control()).state_dict("comfyui")
    keys["diffusion_model.img_in.reshape_weight"] = torch.tensor([3072, 256])

    assert lm.load(keys).layout("transformer.x_embedder").kind == "reshaped weight"


def test_widths_of_no_family_are_only_carried() -> None:
    keys = {
        f"diffusion_model.other.{k}": np.ones(s, "f")
        for k, s in (("lora_down.weight", (2, 8)), ("lora_up.weight", (8, 2)))
    }
    lora = lm.load({**keys, "diffusion_model.other.reshape_weight": np.asarray([8, 8])})

    assert {layer.kind for layer in lora.layouts.values()} == {"reshaped weight"}
    assert set(lora.state_dict()) == {*keys, "diffusion_model.other.reshape_weight"}


@pytest.mark.parametrize("key", ["oft_diag", "oft_blocks", "oft_blocks.0", "oft_R.weight"])
def test_oft_is_named_whatever_its_key(key: str) -> None:
    lora = lm.load(
        {f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.{key}": np.ones((4, 8, 8), "f")}
    )

    assert {layer.kind for layer in lora.layouts.values()} == {"oft"}


def test_a_control_lora_of_stability_is_named() -> None:
    keys = {"lora_controlnet": np.zeros(0, "f"), "input_blocks.1.1.proj_in.up": np.ones((4, 4), "f")}

    with pytest.raises(NotALoRAError, match="a Control-LoRA"):
        lm.load(keys)


BASE = {"base_model_name_or_path": "org/base", "revision": "v1", "task_type": "FEATURE_EXTRACTION"}


@pytest.mark.parametrize("dialect", ["peft", "diffusers-peft"])
def test_what_configurations_say_alike_of_the_base_stays_in_a_merge(dialect: str, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", factors(seed=i), **{**BASE, "revision": f"v{i}"}) for i in (0, 2)]
    merged = lm.merge([lm.open(folder) for folder in folders])

    found = configuration(lm.save(merged, tmp_path / "out.safetensors", dialect=dialect))

    assert found | {"revision": None} == BASE | {"revision": None}
    assert found["revision"] is None


def configuration(path: Path) -> dict[str, Any]:
    if path.is_dir():
        data = json.loads((path / "adapter_config.json").read_text())
    else:
        data = json.loads(lm.open(path).metadata["lora_adapter_metadata"])
    return {field: data[key] for field in BASE for key in data if key.rpartition(".")[2] == field}


def test_what_a_configuration_says_of_the_base_stays_at_another_rank(tmp_path: Path) -> None:
    lora = lm.open(adapter(tmp_path / "a", factors(), **BASE))

    assert configuration(lm.save(lm.merge([lora], rank=2), tmp_path / "out", dialect="peft")) == BASE


def test_what_one_input_alone_says_of_the_base_is_not_said_of_a_merge(tmp_path: Path) -> None:
    loras = [lm.open(adapter(tmp_path / "a", factors(), **BASE)), lm.load(factors())]

    found = configuration(lm.save(lm.merge(loras), tmp_path / "out", dialect="peft"))

    assert set(found.values()) == {None}
