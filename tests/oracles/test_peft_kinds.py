"""Kinds of adapters and fields of configurations: what PEFT adds to the weights is what loramerge reads."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model

import loramerge as lm
from loramerge.errors import FileError, LayerError, NoFactorsError
from loramerge.files.dialects import fields
from loramerge.testing import relative_error

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = {
    "time_embedding.linear_1": torch.nn.Linear(320, 1280),
    "conv_in": torch.nn.Conv2d(4, 320, 3),
    f"{BLOCK}.attn1.to_q": torch.nn.Linear(320, 320, bias=False),
    f"{BLOCK}.attn1.to_out.0": torch.nn.Linear(320, 320),
    f"{BLOCK}.attn2.to_q": torch.nn.Linear(320, 320, bias=False),
    "down_blocks.0.resnets.0.conv1": torch.nn.Conv2d(320, 320, 3),
    "down_blocks.1.resnets.0.conv_shortcut": torch.nn.Conv2d(320, 640, 1),
}
"""Some of the modules of Stable Diffusion 1."""
LINEAR = ["to_q", "to_out.0", "linear_1"]
CONVOLUTIONS = ["conv1", "conv_in", "conv_shortcut"]


def unet() -> torch.nn.Module:
    """A model of a few modules."""
    found = torch.nn.Module()
    for path, module in MODULES.items():
        *above, name = path.split(".")
        place = found
        for step in above:
            if not hasattr(place, step):
                place.add_module(step, torch.nn.Module())
            place = getattr(place, step)
        place.add_module(name, copy.deepcopy(module))
    return found


def trained(config: PeftConfig, folder: Path, std: float = 0.3) -> Path:
    """An adapter with random values, as PEFT saves it."""
    adapter = get_peft_model(unet(), config)
    torch.manual_seed(0)
    for key, parameter in adapter.named_parameters():
        if any(f".{prefix}_" in key for prefix in ("lora", "hada", "lokr")):
            parameter.data += std * torch.randn(parameter.shape)
    adapter.save_pretrained(folder)
    return folder


def added(folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, np.ndarray]:
    """What PEFT adds to every weight: merged, less the base."""
    base = unet().to(dtype)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().state_dict()
    changes = {
        key: (merged[key].double() - weight.double()).numpy()
        for key, weight in base.state_dict().items()
        if key.endswith(".weight")
    }
    return {f"unet.{key.removesuffix('.weight')}": change for key, change in changes.items() if change.any()}


def worst(lora: lm.LoRA, truth: dict[str, np.ndarray]) -> float:
    assert set(lora) == set(truth)
    return max(relative_error(lora[m].delta().reshape(len(t), -1), t.reshape(len(t), -1)) for m, t in truth.items())


KINDS = {
    "loha": LoHaConfig(r=3, alpha=5, target_modules=LINEAR),
    "loha-conv": LoHaConfig(r=3, alpha=5, target_modules=CONVOLUTIONS),
    "loha-tucker": LoHaConfig(r=3, alpha=5, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
    "loha-patterns": LoHaConfig(r=3, target_modules=LINEAR, rank_pattern={"to_q": 2}, alpha_pattern={"attn1.to_q": 3}),
    "loha-defaults": LoHaConfig(target_modules=LINEAR),
    "lokr": LoKrConfig(r=1, alpha=5, target_modules=LINEAR),
    "lokr-both": LoKrConfig(r=1, alpha=5, target_modules=LINEAR, decompose_both=True, decompose_factor=4),
    "lokr-whole": LoKrConfig(r=64, alpha=5, target_modules=LINEAR + CONVOLUTIONS),
    "lokr-whole-patterns": LoKrConfig(r=64, alpha=5, target_modules=LINEAR, rank_pattern={"to_q": 50}),
    "lokr-conv": LoKrConfig(r=1, alpha=5, target_modules=CONVOLUTIONS),
    "lokr-tucker": LoKrConfig(r=1, alpha=5, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
    "adalora": AdaLoraConfig(init_r=6, lora_alpha=5, target_modules=LINEAR, total_step=10),
    "adalora-alpha-0": AdaLoraConfig(init_r=6, lora_alpha=0, target_modules=LINEAR, total_step=10),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_peft_adds_what_peft_adds(kind: str, tmp_path: Path) -> None:
    folder = trained(KINDS[kind], tmp_path)

    assert worst(lm.load(folder), added(folder)) <= 1e-5


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr-whole", "adalora"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers-peft"])
def test_a_kind_of_peft_keeps_its_delta_under_other_names(kind: str, dialect: str, tmp_path: Path) -> None:
    lora = lm.load(trained(KINDS[kind], tmp_path))

    again = lm.load(lora.state_dict(dialect))

    assert worst(again, {m: layer.delta() for m, layer in lora.items()}) <= 1e-5


def test_adalora_is_read_at_the_ranks_that_were_left(tmp_path: Path) -> None:
    adapter = get_peft_model(unet(), KINDS["adalora"])
    names = [name for name, _ in adapter.base_model.model.named_parameters() if "lora_E" in name]
    masks = {name: [(i + k) % 3 == 0 and k % 4 > 0 for i in range(6)] for k, name in enumerate(names)}
    for _, parameter in adapter.named_parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    adapter.peft_config["default"].rank_pattern = masks
    adapter.save_pretrained(tmp_path)
    base = unet()
    truth = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).base_model.model

    lora = lm.load(tmp_path)

    assert {layer.rank for layer in lora.layouts.values()} == {2}
    for module, layer in lora.items():
        wanted = truth.get_submodule(module.removeprefix("unet.")).get_delta_weight("default").detach().numpy()
        assert relative_error(layer.delta(), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["loha", "lokr-whole", "adalora"])
def test_a_directory_of_another_kind_is_written_back_as_it_was(kind: str, tmp_path: Path) -> None:
    folder = trained(KINDS[kind], tmp_path / "in")

    again = lm.save(lm.open(folder), tmp_path / "out")

    assert worst(lm.load(again), added(folder)) <= 1e-5
    assert json.loads((again / "adapter_config.json").read_text())["peft_type"] == KINDS[kind].peft_type


def test_every_field_of_pefts_configurations_is_accounted_for() -> None:
    known = [fields.READ, fields.KEPT, fields.NOTED, fields.HARMLESS, fields.REFUSED.keys()]
    configs = (LoraConfig, LoHaConfig, LoKrConfig, AdaLoraConfig)
    found = {field.name for config in configs for field in dataclasses.fields(config)}

    assert found <= set().union(*known)
    assert sum(map(len, known)) == len(set().union(*known))


def test_numbers_that_a_configuration_lacks_are_pefts_own() -> None:
    assert (
        (LoraConfig().lora_alpha, LoraConfig().r) == (LoHaConfig().alpha, LoHaConfig().r) == (fields.ALPHA, fields.RANK)
    )
    assert (LoKrConfig().alpha, LoKrConfig().r) == (fields.ALPHA, fields.RANK)
    assert AdaLoraConfig(total_step=1).init_r == fields.INITIAL_RANK


@pytest.mark.parametrize("missing", ["lora_alpha", "r"])
def test_a_configuration_without_a_number_is_read_as_peft_reads_it(missing: str, tmp_path: Path) -> None:
    folder = trained(LoraConfig(r=8, lora_alpha=8 if missing == "lora_alpha" else 3, target_modules=LINEAR), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != missing}))

    assert worst(lm.load(folder), added(folder)) <= 1e-5


@pytest.mark.parametrize("start", [True, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_gives_a_plain_lora(start: bool | str, tmp_path: Path) -> None:
    if start == "eva":  # which needs data to begin with; the factors are saved as any others
        folder = trained(LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR), tmp_path)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "eva"}))
    else:
        folder = trained(LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights=start), tmp_path)

    assert worst(lm.load(folder), added(folder, torch.float32)) <= 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_start_in_the_base_is_taken_out_of_the_base_again(start: str, stabilised: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights=start, use_rslora=stabilised)
    folder = trained(config, tmp_path, std=0.1)
    lora, base = lm.load(folder), unet()

    for module, wanted in added(folder, torch.float32).items():
        weight = base.get_submodule(module.removeprefix("unet.")).weight.detach().numpy()
        assert relative_error(lora[module].delta_on(weight), wanted) <= 1e-5


STARTS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "a_new_one"]


@pytest.mark.parametrize("start", STARTS)
def test_a_start_in_the_base_is_never_taken_for_a_plain_lora(start: str) -> None:
    lora = lm.load(factors(), config={"r": 4, "init_lora_weights": start}, architecture="sdxl")

    assert {layer.kind for layer in lora.layouts.values()} == {start}
    with pytest.raises(NoFactorsError, match="began as a part of the base weight"):
        next(iter(lora.values())).delta()
    with pytest.raises(lm.errors.MergeError, match="Ways out"):
        lm.merge([lora, lora])
    with pytest.raises(lm.errors.DialectError, match="Ways out"):
        lora.state_dict("kohya")


def factors(rank: int = 4) -> dict[str, np.ndarray]:
    stem = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ones = np.ones
    return {f"{stem}.lora_A.weight": ones((rank, 640), "f"), f"{stem}.lora_B.weight": ones((640, rank), "f")}


@pytest.mark.parametrize("field", fields.REFUSED)
def test_a_field_with_which_the_factors_mean_something_else_is_refused(field: str) -> None:
    with pytest.raises(FileError, match=f"has {field}"):
        lm.load(factors(), config={"r": 4, field: [1]})


WRONG = {
    "no magnitude": ({"r": 4, "use_dora": True}, "no magnitude"),
    "another kind": ({"r": 4, "peft_type": "LOHA"}, "LOHA"),
    "another rank": ({"r": 16}, "says rank 16"),
    "another rank of a pattern": ({"r": 4, "rank_pattern": {"to_q": 2}}, "says rank 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_of_another_adapter_is_refused(case: str) -> None:
    config, message = WRONG[case]

    with pytest.raises(LayerError, match=message):
        lm.load(factors(), config=config)


@pytest.mark.parametrize("kind", sorted(set(peft.PeftType.__members__) - fields.KINDS.keys()))
def test_a_kind_that_is_not_read_is_refused_by_its_name(kind: str) -> None:
    with pytest.raises(FileError, match=rf"PEFT's {kind}.*Way out"):
        lm.load(factors(), config={"peft_type": kind, "r": 4})


def test_a_field_that_nobody_knows_is_noted() -> None:
    assert "use_something" in lm.load(factors(), config={"r": 4, "use_something": True}).notes[-1]


def test_patterns_go_by_the_names_of_the_model_that_was_trained(tmp_path: Path) -> None:
    native = torch.nn.ModuleDict({"double_blocks": torch.nn.ModuleList([torch.nn.ModuleDict()])})
    native["double_blocks"][0]["img_attn"] = torch.nn.ModuleDict({"qkv": linear(9216), "proj": linear(3072)})
    patterns = {"double_blocks.0.img_attn.qkv": 64, "proj": 2}
    adapter = get_peft_model(native, LoraConfig(r=4, target_modules=["qkv", "proj"], alpha_pattern=patterns))
    adapter.save_pretrained(tmp_path)

    found = {module: layer.scale for module, layer in lm.open(tmp_path).layouts.items()}

    block = "transformer.transformer_blocks.0.attn"
    qkv = {f"{block}.to_{name}": 16.0 for name in "qkv"}
    assert found == {**qkv, f"{block}.to_out.0": 0.5}


def linear(rows: int) -> torch.nn.Module:
    return torch.nn.Linear(3072, rows, bias=False)


@pytest.mark.parametrize("first", ["to_q", "attn1.to_q", "unknown"])
def test_of_several_patterns_the_first_that_matches_counts(first: str, tmp_path: Path) -> None:
    whole = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    config = LoraConfig(r=4, target_modules=["to_q"], alpha_pattern={first: 3, whole: 5})
    folder = trained(config, tmp_path)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"alpha_pattern": {first: 3, whole: 5}}))

    assert worst(lm.load(folder), added(folder)) <= 1e-5
