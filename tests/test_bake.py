"""Baking: W + Σ w ΔW, rounded once, in the base's own layout, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import jsonschema
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_file, save_file as torch_save

import loramerge as lm
import models
from loramerge import LoRA
from loramerge.checkpoints import rewriting
from loramerge.checkpoints.models import open_checkpoint
from loramerge.cli.outputs import OUTPUTS
from loramerge.errors import FileError, LayerError, MergeError, NumberError, OptionError
from loramerge.layers import BiasOnly, Carried, DoRA, Full, Norm, Replaced, low_rank
from loramerge.merging.baking import Baked
from loramerge.testing import random_layer, relative_error

FAMILIES = ("sdxl", "sd15", "flux")
LAYOUTS = ("file", "folder", "shards")
ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
PROJ = "unet.down_blocks.1.attentions.0.proj_in"


def made(path: Path, layout: str, architecture: str, arrays: models.Arrays) -> Path:
    if layout == "file":
        return models.single_file(path.with_suffix(".safetensors"), architecture, arrays)
    return models.folder(path, arrays, shards=3 if layout == "shards" else 1)


def target(path: Path, layout: str) -> Path:
    return path.with_suffix(".safetensors") if layout == "file" else path


def values(path: Path) -> models.Arrays:
    with open_checkpoint(path) as model:
        found = {f"{module}.weight": model.weight(module) for module in model}
        return found | {f"{module}.bias": model.bias(module) for module in model.biases}


def one(module: str, layer: object, architecture: str = "sdxl") -> LoRA:
    return LoRA(name="one", architecture=architecture, dialect="kohya", layouts={module: layer})


def baked(tmp_path: Path, lora: LoRA, arrays: models.Arrays | None = None, **options: object) -> models.Arrays:
    arrays = models.base("sdxl") if arrays is None else arrays
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", arrays)
    return values(lm.bake([lora], base, tmp_path / "out.safetensors", **options).path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_weight_and_bias_gets_the_weighted_sum_of_updates(architecture: str, layout: str, tmp_path: Path) -> None:
    arrays = models.base(architecture)
    loras, weights = [models.lora(architecture, seed=seed) for seed in (1, 2)], [0.7, -0.4]
    base = made(tmp_path / "base", layout, architecture, arrays)

    lm.bake(loras, base, target(tmp_path / "out", layout), weights=weights)
    found = values(target(tmp_path / "out", layout))

    for module in loras[0]:
        wanted = np.float64(arrays[f"{module}.weight"])
        for lora, weight in zip(loras, weights, strict=True):
            wanted = wanted + weight * np.float64(lora[module].delta())
        assert relative_error(found[f"{module}.weight"], wanted) <= 1e-6
        if isinstance(loras[0][module], Norm) and f"{module}.bias" in arrays:
            bias = arrays[f"{module}.bias"] + sum(
                w * lora[module].b_norm for w, lora in zip(weights, loras, strict=True)
            )
            assert relative_error(found[f"{module}.bias"], bias) <= 1e-6


@pytest.mark.parametrize("kind", ["tucker", "loha", "loha-tucker", "lokr", "lokr-full", "full", "dora", "dora-in"])
@pytest.mark.parametrize("module", [ATTENTION, CONV])
def test_every_kind_of_layer_can_be_baked(kind: str, module: str, tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    lora = one(module, replace_bias(random_layer(models.SHAPES["sdxl"][module], kind=kind, rank=2, seed=4), module))

    found = baked(tmp_path, lora, arrays, weights=[0.5])

    weight = arrays[f"{module}.weight"]
    wanted = weight + 0.5 * np.float64(lora[module].delta_on(weight))
    assert relative_error(found[f"{module}.weight"], wanted) <= 1e-6


def replace_bias(layer: object, module: str) -> object:
    return layer if module == CONV or layer.diff_b is None else replace(layer, diff_b=None)


def test_a_kernel_may_be_flattened_in_a_lora_of_an_unknown_family(tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    flat = replace(random_layer((8, 8, 3, 3), kind="loha", rank=2), weight=None)

    found = baked(tmp_path, one(CONV, flat), arrays)

    wanted = arrays[f"{CONV}.weight"] + flat.delta().reshape((8, 8, 3, 3))
    assert relative_error(found[f"{CONV}.weight"], wanted) <= 1e-6


@pytest.mark.parametrize("axis", ["dora", "dora-in"])
@pytest.mark.parametrize("module", [ATTENTION, CONV])
def test_after_dora_a_weights_lengths_are_the_magnitudes(axis: str, module: str, tmp_path: Path) -> None:
    layer = random_layer(models.SHAPES["sdxl"][module], kind=axis, rank=2)

    weight = baked(tmp_path, one(module, layer))[f"{module}.weight"].astype(np.float64)

    others = tuple(i for i in range(weight.ndim) if i != (0 if axis == "dora" else 1))
    lengths = np.sqrt((weight**2).sum(axis=others))
    np.testing.assert_allclose(lengths, abs(layer.magnitude.reshape(-1)), rtol=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_strength_of_zero_changes_no_byte_of_a_tensor(architecture: str, tmp_path: Path) -> None:
    arrays = {key: np.where(abs(value) < 0.1, -0.0, value) for key, value in models.base(architecture).items()}
    base = models.single_file(tmp_path / "base.safetensors", architecture, arrays)

    lm.bake([models.lora(architecture)], base, tmp_path / "out.safetensors", weights=[0])

    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert {key: value.tobytes() for key, value in after.items()} == {k: v.tobytes() for k, v in before.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_no_module_are_copied_byte_by_byte(layout: str, tmp_path: Path) -> None:
    base = made(tmp_path / "base", layout, "sdxl", models.base("sdxl"))

    lm.bake([models.lora("sdxl").select(ATTENTION)], base, target(tmp_path / "out", layout))

    before, after = models.read(base), models.read(target(tmp_path / "out", layout))
    changed = {key for key in before if before[key].tobytes() != after[key].tobytes()}
    assert after.keys() == before.keys()
    assert changed == {next(key for key in before if key.endswith("transformer_blocks.0.attn1.to_q.weight"))}


def test_only_the_files_that_change_are_written_anew(tmp_path: Path) -> None:
    base = models.folder(tmp_path / "base", models.base("sdxl"), shards=4)

    lm.bake([models.lora("sdxl").select(ATTENTION)], base, tmp_path / "out")

    files = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    differing = [file for file in files if (base / file).read_bytes() != (tmp_path / "out" / file).read_bytes()]
    assert len(differing) == 1


def test_other_copies_of_the_old_weights_stay_behind(tmp_path: Path) -> None:
    base = models.folder(tmp_path / "base", models.base("sd15"))
    models.folder(base, models.base("sd15", np.float16), variant="fp16", shards=2)
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    save_file({"x": np.zeros(1)}, base / "whole.safetensors")

    result = lm.bake([models.lora("sd15")], base, tmp_path / "out")

    out = tmp_path / "out"
    left = sorted(str(p.relative_to(base)) for p in base.rglob("*") if not (out / p.relative_to(base)).exists())
    assert sorted(line.partition(":")[0] for line in result.left_out) == left
    assert [path.name for path in sorted((out / "unet").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert not (out / "whole.safetensors").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_bakes_in_a_row_are_one_bake_of_both(layout: str, tmp_path: Path) -> None:
    base = made(tmp_path / "base", layout, "flux", models.base("flux"))
    first, second = models.lora("flux", seed=1), models.lora("flux", seed=2)

    lm.bake([first], base, target(tmp_path / "a", layout), weights=[0.5])
    lm.bake([second], target(tmp_path / "a", layout), target(tmp_path / "b", layout), weights=[0.3])
    lm.bake([first, second], base, target(tmp_path / "both", layout), weights=[0.5, 0.3])

    row, both = values(target(tmp_path / "b", layout)), values(target(tmp_path / "both", layout))
    assert all(relative_error(row[key], both[key]) <= 1e-6 for key in both)


def test_a_file_and_a_directory_of_one_model_come_out_the_same(tmp_path: Path) -> None:
    arrays = models.base("flux", ml_dtypes.bfloat16)
    lora = models.lora("flux")

    found = [
        values(
            lm.bake(
                [lora], made(tmp_path / f"{layout}", layout, "flux", arrays), target(tmp_path / f"o{layout}", layout)
            ).path
        )
        for layout in LAYOUTS
    ]

    assert all(found[0][key].tobytes() == other[key].tobytes() for other in found[1:] for key in found[0])


@pytest.mark.parametrize("axis", ["dora", "dora-in"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fused_dora_is_normed_over_the_fused_weight(axis: str, layout: str, tmp_path: Path) -> None:
    arrays = models.base("flux")
    qkv = [f"{models.DOUBLE}attn.to_{p}" for p in "qkv"]
    whole = random_layer((36, 12), kind=axis, rank=2)
    parts = {module: whole.rows(((12 * i, 12 * i + 12),), "qkv") for i, module in enumerate(qkv)}
    lora = LoRA(name="fused", architecture="flux", dialect="kohya", layouts=parts)

    out = lm.bake([lora], made(tmp_path / "base", layout, "flux", arrays), target(tmp_path / "out", layout)).path
    found = values(out)

    fused = np.concatenate([arrays[f"{module}.weight"] for module in qkv])
    wanted = fused + whole.delta_on(fused)
    assert relative_error(np.concatenate([found[f"{module}.weight"] for module in qkv]), wanted) <= 1e-6


def test_part_of_a_fused_dora_over_columns_is_an_error_where_the_rest_is_missing(tmp_path: Path) -> None:
    qkv = [f"{models.DOUBLE}attn.to_{p}" for p in "qk"]
    whole = random_layer((36, 12), kind="dora-in", rank=2)
    parts = {module: whole.rows(((12 * i, 12 * i + 12),), "qkv") for i, module in enumerate(qkv)}
    base = models.folder(tmp_path / "base", models.base("flux"))

    with pytest.raises(MergeError, match=r"attn.to_[qk]: .*missing or excluded"):
        lm.bake([LoRA(name="x", architecture="flux", dialect="kohya", layouts=parts)], base, tmp_path / "out")


def test_biases_and_new_values_are_baked(tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    bias, new = np.full(16, 0.25, np.float32), np.full((16, 16), 2, np.float32)
    diff = random_layer((8, 8, 3, 3), kind="full", seed=3)
    lora = LoRA(
        name="x",
        architecture="sdxl",
        dialect="kohya",
        layouts={PROJ: BiasOnly(diff_b=bias), ATTENTION: Replaced(set_weight=new), CONV: diff},
    )

    found = baked(tmp_path, lora, arrays, weights=[0.5])

    np.testing.assert_array_equal(found[f"{PROJ}.weight"], arrays[f"{PROJ}.weight"])
    np.testing.assert_array_equal(found[f"{PROJ}.bias"], arrays[f"{PROJ}.bias"] + 0.125)
    np.testing.assert_allclose(found[f"{ATTENTION}.weight"], new, rtol=1e-6)
    np.testing.assert_allclose(found[f"{CONV}.bias"], arrays[f"{CONV}.bias"] + 0.5 * diff.diff_b, rtol=1e-6)


def test_a_bias_of_zeros_asks_for_no_bias_in_the_base(tmp_path: Path) -> None:
    arrays, zeros = models.base("sdxl"), np.zeros(16, np.float32)
    plain = random_layer((16, 16))

    assert f"{ATTENTION}.bias" not in arrays
    np.testing.assert_array_equal(
        baked(tmp_path, one(ATTENTION, replace(plain, diff_b=zeros)), arrays)[f"{ATTENTION}.weight"],
        baked(tmp_path, one(ATTENTION, plain), arrays)[f"{ATTENTION}.weight"],
    )
    with pytest.raises(MergeError, match="it changes the bias, and the module has none"):
        baked(tmp_path, one(ATTENTION, replace(plain, diff_b=zeros + 1)), arrays)


@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
def test_a_bake_of_a_replaced_weight_is_the_bake_of_its_merge(weight: float, tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    new, bias = np.full((16, 16), 3, np.float32), np.full(16, 0.25, np.float32)
    lora = one(PROJ, Replaced(set_weight=new, diff_b=bias))

    alone = baked(tmp_path, lora, arrays, weights=[weight])
    merged = baked(tmp_path, lm.merge([lora], weights=[weight]), arrays)

    for found in (alone, merged):
        np.testing.assert_allclose(found[f"{PROJ}.weight"], new, rtol=1e-6)
        np.testing.assert_array_equal(found[f"{PROJ}.bias"], arrays[f"{PROJ}.bias"] + np.float32(weight) * bias)


@pytest.mark.parametrize("second", ["set", "lora", "bias"])
def test_a_replaced_weight_that_another_lora_changes_is_neither_merged_nor_baked(second: str, tmp_path: Path) -> None:
    arrays, new = models.base("sdxl"), Replaced(set_weight=np.ones((16, 16), np.float32))
    others = {"set": new, "lora": random_layer((16, 16), rank=2), "bias": BiasOnly(diff_b=np.ones(16, np.float32))}
    loras = [one(PROJ, new), one(PROJ, others[second])]
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", arrays)

    for verb in (lm.merge, lambda given, weights: lm.bake(given, base, tmp_path / "out.safetensors", weights=weights)):
        with pytest.raises(MergeError, match=rf"{PROJ} can't be .*replaces the weight.*Ways out: the weight 0"):
            verb(loras, weights=[1.0, 0.5])

    lm.bake(loras, base, tmp_path / "out.safetensors", weights=[1.0, 0.0])
    np.testing.assert_allclose(values(tmp_path / "out.safetensors")[f"{PROJ}.weight"], new.set_weight, rtol=1e-6)


def test_a_dora_keeps_the_bias_of_its_direction(tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    direction = replace(random_layer((16, 16), rank=2), diff_b=np.ones(16, np.float32))
    dora = DoRA(direction=direction, magnitude=np.ones((16, 1), np.float32))

    found = baked(tmp_path, one(PROJ, dora), arrays)

    np.testing.assert_array_equal(found[f"{PROJ}.bias"], arrays[f"{PROJ}.bias"] + 1)


def test_layers_of_torch_tensors_are_baked(tmp_path: Path) -> None:
    lora = models.lora("sdxl", kinds={ATTENTION: "dora", CONV: "dora-in"})
    torches = replace(lora, layouts={m: x.map(torch.from_numpy) for m, x in lora.layouts.items()})

    a, b = baked(tmp_path, lora), baked(tmp_path, torches)

    assert all(relative_error(a[key], b[key]) <= 1e-6 for key in a)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.03, 1e-12])
def test_the_report_is_what_a_direct_measurement_finds(dtype: object, scale: float, tmp_path: Path) -> None:
    arrays = models.base("flux", dtype)
    lora = models.lora("flux", scale=scale)
    base = models.single_file(tmp_path / "base.safetensors", "flux", arrays)

    result = lm.bake([lora], base, tmp_path / "out.safetensors")
    found = values(tmp_path / "out.safetensors")

    assert set(result.changes) == set(lora)
    for module, change in result.changes.items():
        old, new = np.float64(arrays[f"{module}.weight"]), np.float64(found[f"{module}.weight"])
        delta = np.float64(lora[module].delta()).reshape(old.shape)
        assert change.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert change.change == pytest.approx(np.linalg.norm(new - old), rel=1e-5)
        assert change.loss == pytest.approx(np.linalg.norm(new - old - delta) / np.linalg.norm(delta), rel=0.02)
        assert change.lost == np.mean(new[delta != 0] == old[delta != 0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_each_value_is_the_nearest_that_the_dtype_has(dtype: object, tmp_path: Path) -> None:
    arrays = models.base("sdxl", dtype)
    lora = models.lora("sdxl").select(ATTENTION)

    found = baked(tmp_path, lora, arrays)[f"{ATTENTION}.weight"]

    wanted = np.float32(arrays[f"{ATTENTION}.weight"]) + lora[ATTENTION].delta()
    assert found.tobytes() == wanted.astype(dtype).tobytes()


def test_what_bfloat16_can_not_hold_is_reported(tmp_path: Path) -> None:
    arrays = {key: np.ones_like(value, ml_dtypes.bfloat16) for key, value in models.base("sdxl").items()}
    tiny = Full(diff=np.where(np.arange(256).reshape(16, 16) < 64, 2.0**-12, 0.5).astype(np.float32))
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", arrays)

    change = lm.bake([one(PROJ, tiny)], base, tmp_path / "out.safetensors").changes[PROJ]

    assert change.lost == 0.25
    assert change.loss == pytest.approx(8 * 2.0**-12 / np.linalg.norm(tiny.diff), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dtype_is_that_of_every_tensor_in_the_files_written(layout: str, tmp_path: Path) -> None:
    arrays = models.base("flux")
    base = made(tmp_path / "base", layout, "flux", arrays)
    if layout == "file":  # its VAE holds NaN, which is refused when it is rounded
        tensors = load_file(base)
        tensors.pop("first_stage_model.decoder.conv_in.weight")
        save_file(tensors, base)
    lora = models.lora("flux").select("transformer.x_embedder")

    out = lm.bake([lora], base, target(tmp_path / "out", layout), dtype="float16").path

    assert {value.dtype for value in values(out).values()} == {np.dtype(np.float16)}
    if layout == "shards":
        index = json.loads((out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes // 2 for value in arrays.values())


def test_the_file_says_how_it_was_made_and_forgets_the_old_hash(tmp_path: Path) -> None:
    base = models.single_file(tmp_path / "base.safetensors", "sd15", models.base("sd15"))

    lm.bake([models.lora("sd15")], base, tmp_path / "out.safetensors", weights=[0.5])

    with open_checkpoint(tmp_path / "out.safetensors") as model:
        (file,) = model.files.values()
    assert file.metadata["modelspec.title"] == "base"
    assert "modelspec.hash_sha256" not in file.metadata
    recipe = json.loads(file.metadata["loramerge"])
    assert (recipe["method"], recipe["base"]) == ("bake", "base.safetensors")
    assert recipe["inputs"] == [{"name": "lora 1", "weight": "0.5"}]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", models.base("sdxl"))

    a, b = (lm.bake([models.lora("sdxl")], base, tmp_path / f"{n}.safetensors", workers=n) for n in (1, 3))

    assert a.path.read_bytes() == b.path.read_bytes()
    assert a.changes == b.changes


@pytest.mark.parametrize("kind", ["lora", "dora-in"])
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_blocks_of_any_size_give_the_same_bytes(
    architecture: str, dtype: str | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.base(architecture, ml_dtypes.bfloat16)
    base = models.single_file(tmp_path / "base.safetensors", architecture, arrays)
    tensors = torch_file(base)
    tensors.pop("first_stage_model.decoder.conv_in.weight", None)  # it holds NaN, which is refused when it is rounded
    torch_save(tensors, base)
    lora = models.lora(architecture, kinds={ATTENTION: kind, CONV: kind})

    whole = lm.bake([lora], base, tmp_path / "whole.safetensors", dtype=dtype)
    monkeypatch.setattr(rewriting, "BLOCK", 50)
    monkeypatch.setattr(rewriting, "COPIED", 7)
    cut = lm.bake([lora], base, tmp_path / "cut.safetensors", dtype=dtype)

    assert cut.path.read_bytes() == whole.path.read_bytes()
    for module, change in cut.changes.items():
        assert astuple(change)[1:5] == pytest.approx(astuple(whole.changes[module])[1:5], rel=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_changes_whose_squares_float32_can_not_hold_are_measured(size: float, tmp_path: Path) -> None:
    arrays = {key: np.zeros_like(value, ml_dtypes.bfloat16) for key, value in models.base("sdxl").items()}
    diff = np.full((16, 16), size, np.float32)
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", arrays)

    change = lm.bake([one(PROJ, Full(diff=diff))], base, tmp_path / "out.safetensors").changes[PROJ]

    assert change.norm == pytest.approx(16 * size, rel=1e-5)
    assert change.change == pytest.approx(16 * size, rel=1e-2)
    assert 0 < change.loss < 2.0**-8


def test_zero_in_the_dtype_is_an_error_of_a_whole_tensor_and_not_of_some_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {key: np.zeros_like(value, np.float16) for key, value in models.base("sdxl").items()}
    faint = np.full((16, 16), 1e-9, np.float32)
    faint[5] = 1
    monkeypatch.setattr(rewriting, "BLOCK", 50)

    found = baked(tmp_path, one(PROJ, Full(diff=faint)), arrays)

    np.testing.assert_array_equal(found[f"{PROJ}.weight"], faint.astype(np.float16))
    with pytest.raises(NumberError, match=f"{PROJ}: every value is 0 in float16"):
        baked(tmp_path, one(PROJ, Full(diff=faint[:5].repeat(16, 0)[:16])), arrays)


def test_an_unknown_rule_for_weights_is_told_the_rules_and_no_coefficients(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"Unknown weights 'bogus'.*uniform, sum") as refused:
        baked(tmp_path, one(ATTENTION, random_layer(models.base("sdxl")[f"{ATTENTION}.weight"].shape)), weights="bogus")

    assert "learned" not in str(refused.value)


def test_weights_and_exclude_are_those_of_merge(tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    lora = models.lora("sdxl")

    found = baked(tmp_path, lora, arrays, weights=["1;text_encoder=0"], exclude=["text_encoder_2", "*.norm1"])

    changed = {key.partition(".")[0] for key in arrays if not np.array_equal(arrays[key], found[key])}
    assert changed == {"unet"}


IMPOSSIBLE = {
    "carried": (ATTENTION, Carried(algorithm="oft"), "it is an OFT layer"),
    "missing": ("unet.mid_block.attentions.0.proj_in", random_layer((4, 4)), "has no such weight"),
    "shape": (ATTENTION, random_layer((16, 12)), "its shape is .16, 12., the weight .* .16, 16."),
    "no bias": (ATTENTION, random_layer((16, 16), kind="full"), "the module has none"),
    "bias only": (ATTENTION, BiasOnly(diff_b=np.ones(16, np.float32)), "the module has none"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_can_not_be_applied_is_an_error_that_names_the_module(case: str, tmp_path: Path) -> None:
    module, layer, message = IMPOSSIBLE[case]

    with pytest.raises(MergeError, match=rf"one: {module} can't be baked.*{message}"):
        baked(tmp_path, one(module, layer))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_at_strength_zero_nothing_needs_to_be_applied(case: str, tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    module, layer, _ = IMPOSSIBLE[case]

    found = baked(tmp_path, one(module, layer), arrays, weights=[0])

    assert all(np.array_equal(found[key], arrays[key]) for key in arrays)


def test_a_weight_without_a_direction_is_an_error(tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    arrays[f"{ATTENTION}.weight"][3] = 0
    layer = random_layer((16, 16), kind="dora", rank=2)
    layer.direction.up[3] = 0

    with pytest.raises(LayerError, match=f"{ATTENTION}: .*zeros"):
        baked(tmp_path, one(ATTENTION, layer), arrays)


def test_too_large_a_value_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    big = low_rank(np.full((16, 1), 300, np.float32), np.full((1, 16), 300, np.float32), (16, 16))

    with pytest.raises(NumberError, match=f"{ATTENTION}: 9e.04 is too large for float16"):
        baked(tmp_path, one(ATTENTION, big), models.base("sdxl", np.float16))


@pytest.mark.parametrize("written", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_in_a_weight_are_errors_that_name_the_module(
    dtype: object, value: float, written: str | None, tmp_path: Path
) -> None:
    arrays = models.base("sdxl", dtype)
    arrays[f"{ATTENTION}.weight"][0, 0] = value
    base = models.folder(tmp_path / "base", arrays)

    with pytest.raises(NumberError, match=f"{ATTENTION}: a value is NaN or infinite"):
        lm.bake([models.lora("sdxl").select(ATTENTION)], base, tmp_path / "out", dtype=written)


def test_infinity_in_another_part_of_a_fused_weight_is_an_error(tmp_path: Path) -> None:
    arrays = models.base("flux", np.float16)
    qkv = [f"{models.DOUBLE}attn.to_{p}" for p in "qkv"]
    whole = random_layer((36, 12), kind="dora-in", rank=2)
    parts = {module: whole.rows(((12 * i, 12 * i + 12),), "qkv") for i, module in enumerate(qkv)}
    lora = LoRA(name="fused", architecture="flux", dialect="kohya", layouts=parts)
    arrays[f"{qkv[1]}.weight"][0, 0] = np.inf
    base = models.folder(tmp_path / "base", arrays)

    with pytest.raises(NumberError, match=r"attn.to_[qv]: the weight in base: a value is NaN or infinite"):
        lm.bake([lora], base, tmp_path / "out", weights=[{"*": 1.0, qkv[1]: 0.0}])


@pytest.mark.parametrize("role", ["up", "down", "diff_b"])
def test_infinity_in_a_lora_that_was_made_in_memory_is_an_error_that_names_it(role: str, tmp_path: Path) -> None:
    up, down, bias = (np.ones(shape, np.float16) for shape in ((16, 2), (2, 16), 16))
    layer = low_rank(up, down, (16, 16), diff_b=bias)
    getattr(layer, role).reshape(-1)[0] = np.inf

    with pytest.raises(NumberError, match=f"one: {PROJ}: a value is NaN or infinite"):
        baked(tmp_path, one(PROJ, layer))


def test_embeddings_are_an_error_unless_they_may_be_left_out(tmp_path: Path) -> None:
    from loramerge.tensors import Held

    lora = replace(models.lora("sdxl"), extras={"emb": Held(np.zeros(3, np.float32))})

    with pytest.raises(MergeError, match="lora 1: emb"):
        baked(tmp_path, lora)
    base = tmp_path / "base.safetensors"
    assert lm.bake([lora], base, tmp_path / "o.safetensors", allow_lossy=True).left_out == ("lora 1: emb",)


def test_a_failed_bake_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    big = low_rank(np.full((16, 1), 300, np.float32), np.full((1, 16), 300, np.float32), (16, 16))
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", models.base("sdxl", np.float16))
    (tmp_path / "out.safetensors").write_bytes(b"old")

    with pytest.raises(NumberError):
        lm.bake([one(ATTENTION, big)], base, tmp_path / "out.safetensors")

    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "out.safetensors"}


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("way", ["itself", "link"])
def test_the_base_is_never_written_over(layout: str, way: str, tmp_path: Path) -> None:
    base = made(tmp_path / "base", layout, "sdxl", models.base("sdxl"))
    output = target(tmp_path / "link", layout) if way == "link" else base
    if way == "link":
        output.symlink_to(base)
    before = values(base)

    with pytest.raises(OptionError, match=r"it is the base itself, which would be lost\. Way out: another output"):
        lm.bake([models.lora("sdxl")], base, output)

    assert all((values(base)[key] == value).all() for key, value in before.items())


def test_a_lora_that_is_baked_is_never_written_over(tmp_path: Path) -> None:
    base = made(tmp_path / "base", "file", "sdxl", models.base("sdxl"))
    lora = lm.save(models.lora("sdxl"), tmp_path / "lora.safetensors", dialect="kohya", allow_lossy=True)

    for given in (lora, str(lora), lm.open(lora)):
        with pytest.raises(OptionError, match="one of the LoRAs that are baked"):
            lm.bake([given], base, lora)


def test_a_lora_in_a_directory_is_never_written_over(tmp_path: Path) -> None:
    base = made(tmp_path / "base", "file", "sdxl", models.base("sdxl"))
    (tmp_path / "loras").mkdir()
    lora = lm.save(models.lora("sdxl"), tmp_path / "loras" / "a.safetensors", dialect="kohya", allow_lossy=True)

    with pytest.raises(OptionError, match="one of the LoRAs that are baked"):
        lm.bake([lora.parent], base, lora)


def test_a_failed_bake_of_a_directory_leaves_nothing(tmp_path: Path) -> None:
    big = low_rank(np.full((16, 1), 300, np.float32), np.full((1, 16), 300, np.float32), (16, 16))
    base = models.folder(tmp_path / "base", models.base("sdxl", np.float16))

    with pytest.raises(NumberError):
        lm.bake([one(ATTENTION, big)], base, tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_killed_bake_leaves_the_old_file(tmp_path: Path) -> None:
    base = models.single_file(tmp_path / "base.safetensors", "sd15", models.base("sd15"))
    (tmp_path / "out.safetensors").write_bytes(b"old")
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import loramerge as lm, models
def wait(done, total):
    print("at work", flush=True)
    time.sleep(60)
lm.bake([models.lora("sd15")], {str(base)!r}, {str(tmp_path / "out.safetensors")!r}, progress=wait)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout.readline() == b"at work\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    assert (tmp_path / "out.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("case", ["file for a folder", "folder for a file", "full folder", "inside", "no parent"])
def test_a_wrong_output_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    arrays = models.base("sd15")
    folder, file = models.folder(tmp_path / "m", arrays), models.single_file(tmp_path / "m.safetensors", "sd15", arrays)
    (tmp_path / "file").write_bytes(b"x")
    base, out = {
        "file for a folder": (folder, tmp_path / "file"),
        "folder for a file": (file, tmp_path / "m"),
        "full folder": (folder, folder),
        "inside": (folder, folder / "out"),
        "no parent": (file, tmp_path / "no" / "m.safetensors"),
    }[case]

    with pytest.raises((FileError, OptionError), match="Can't write"):
        lm.bake([models.lora("sd15")], base, out)


def test_the_command_bakes_and_reports(tmp_path: Path) -> None:
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", models.base("sdxl", ml_dtypes.bfloat16))
    lora = lm.save(models.lora("sdxl").select("unet"), tmp_path / "a.safetensors", dialect="comfyui")
    command = [sys.executable, "-m", "loramerge", "bake", lora, "--base", base, "-w", "0.5", "--architecture", "sdxl"]

    shown = subprocess.run([*command, "-o", tmp_path / "1.safetensors"], capture_output=True, text=True, check=False)
    data = subprocess.run(
        [*command, "-o", tmp_path / "2.safetensors", "--json"], capture_output=True, text=True, check=False
    )

    assert (shown.returncode, shown.stderr) == (0, "")
    assert "rounding loss" in shown.stdout
    found: Baked = lm.bake([lm.open(lora, architecture="sdxl")], base, tmp_path / "3.safetensors", weights=[0.5])
    assert json.loads(data.stdout)["rounding_loss"] == found.loss
    jsonschema.validate(json.loads(data.stdout), OUTPUTS["bake"])
    written = [(tmp_path / f"{n}.safetensors").read_bytes() for n in (1, 2, 3)]
    assert written[0] == written[1] == written[2]


def test_a_float8_weight_with_a_scale_stays_one(tmp_path: Path) -> None:
    """ComfyUI's scaled float8: what is stored is the nearest to the sum divided by the scale."""
    rng = np.random.default_rng(0)
    stored, scale = rng.standard_normal((12, 4)).astype(ml_dtypes.float8_e4m3fn), np.array([0.25], np.float32)
    stem, module = "double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_k"
    base = tmp_path / "base.safetensors"
    save_file({f"{stem}.weight": stored, f"{stem}.scale_weight": scale}, base)
    lora = one(module, random_layer((4, 4), rank=1, alpha=1.0), "flux")

    lm.bake(lora, base, tmp_path / "new.safetensors")

    found = torch_file(tmp_path / "new.safetensors")
    wanted = stored.astype(np.float64) * 0.25
    wanted[4:8] += lora[module].delta()
    nearest = (wanted / 0.25).astype(np.float32).astype(stored.dtype)
    assert found[f"{stem}.weight"].dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(found[f"{stem}.weight"].float().numpy(), nearest.astype(np.float32))
    np.testing.assert_array_equal(found[f"{stem}.scale_weight"].numpy(), scale)
    with pytest.raises(FileError, match="float8 with a scale beside it"):
        lm.bake(lora, base, tmp_path / "half.safetensors", dtype="float16")
