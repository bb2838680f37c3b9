"""Tensors that are summed entry by entry: biases, norms, tables, whole weights; and what a merge weighs."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loramerge as lm
from loramerge.comparing.diffs import differences
from loramerge.errors import DialectError, FileError, MergeError, OptionError
from loramerge.files.lora import LoRA
from loramerge.layers import LoHa, LoKr, LowRank, low_rank
from loramerge.merging.figures import measure
from loramerge.testing import random_layer, random_lora, relative_error, weighted_sum
from small import MODULES, small

Tensors = Mapping[str, np.ndarray]
WAN = "diffusion_model."
TO_Q, CONV, SHORTCUT, TEXT = MODULES["sdxl"]
LINEAR = ("blocks.0.self_attn.q", "blocks.0.ffn.0", "head.head")


def style(seed: int = 1) -> Tensors:
    """A LoRA of a video model, as trainers write it."""
    rng = np.random.default_rng(seed)
    return {key: t for name in LINEAR[:2] for key, t in factors(rng, WAN + name, 64, 48, 4).items()}


def distillation(seed: int = 2) -> Tensors:
    """What is taken from a distilled model: factors, and differences of all that has none."""
    rng = np.random.default_rng(seed)
    found = factors(rng, f"{WAN}blocks.0.self_attn.q", 64, 48, 8)
    shapes = {
        "blocks.0.self_attn.q.diff_b": (64,),
        "blocks.0.ffn.0.diff_b": (64,),
        "head.head.diff_b": (16,),
        "blocks.0.norm3.diff": (48,),
        "blocks.0.norm3.diff_b": (48,),
        "blocks.0.diff_m": (1, 6, 48),
        "head.diff_m": (1, 2, 48),
        "patch_embedding.diff": (48, 16, 1, 2, 2),
        "patch_embedding.diff_b": (48,),
    }
    return found | {WAN + key: normal(rng, *shape) for key, shape in shapes.items()}


def factors(rng: np.random.Generator, stem: str, out: int, columns: int, rank: int) -> dict[str, np.ndarray]:
    down, up = normal(rng, rank, columns), normal(rng, out, rank)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.float32(rank / 2)}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


ENDS = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation", ".w_norm": ".weight", ".b_norm": ".bias"}


def updates(*files: Tensors, weights: Sequence[float] = (1.0,)) -> dict[str, np.ndarray]:
    """Σ wᵢ ΔWᵢ of every parameter in float64, from the keys alone: what a reader adds to the model."""
    found: dict[str, Any] = {}
    for tensors, weight in zip(files, weights, strict=True):
        for parameter, delta in parameters(tensors):
            found[parameter] = found.get(parameter, 0.0) + weight * delta
    return found


def parameters(tensors: Tensors) -> list[tuple[str, np.ndarray]]:
    found = []
    for key, value in tensors.items():
        stem, _, end = key.rpartition(".")
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            scale = float(tensors.get(f"{stem}.alpha", len(value))) / len(value)
            up = tensors[f"{stem}.lora_up.weight"]
            delta = scale * up.reshape(len(up), -1).astype(np.float64) @ value.reshape(len(value), -1)
            found.append((f"{stem}.weight", delta.reshape(len(up), *value.shape[1:])))
        elif f".{end}" in ENDS:
            found.append((stem + ENDS[f".{end}"], value.astype(np.float64)))
    return found


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float = 1e-6) -> None:
    changed = {parameter for parameter, delta in wanted.items() if delta.any()}
    assert found.keys() == changed
    for parameter in changed:
        assert relative_error(found[parameter], wanted[parameter]) <= tolerance, parameter


def saved(lora: LoRA, folder: Path, **options: Any) -> dict[str, np.ndarray]:
    return load_file(lm.save(lora, folder / "out.safetensors", **options))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.5), (0.0, 0.5), (1.0, 0.0)])
def test_a_style_and_a_distillation_are_summed_by_weight(weights: tuple[float, float], tmp_path: Path) -> None:
    files = style(), distillation()

    merged = saved(lm.merge([lm.load(file) for file in files], weights=weights), tmp_path)

    assert_same(updates(merged), updates(*files, weights=weights))
    assert all(key in merged or not weights[1] for key in files[1] if key.endswith(("diff_m", "diff", "diff_b")))


def test_two_distillations_are_summed_and_a_table_goes_by_either_name(tmp_path: Path) -> None:
    first, second = distillation(2), dict(distillation(3))
    second[f"{WAN}blocks.0.modulation.diff"] = second.pop(f"{WAN}blocks.0.diff_m")

    merged = saved(lm.merge([lm.load(first), lm.load(second)], weights=[0.25, 2.0]), tmp_path)

    assert f"{WAN}blocks.0.diff_m" in merged
    assert f"{WAN}blocks.0.modulation.diff" not in merged
    wanted = updates(first, second, weights=[0.25, 2.0])
    table = f"{WAN}blocks.0.modulation"
    wanted[table] = wanted[table] + wanted.pop(f"{table}.weight")
    assert_same(updates(merged), wanted)


def test_a_rank_cuts_what_has_one_and_sums_the_rest(tmp_path: Path) -> None:
    files = style(), distillation()

    merged = saved(lm.merge([lm.load(file) for file in files], weights=[1, 1], rank=3), tmp_path)

    found, wanted = updates(merged), updates(*files, weights=[1, 1])
    cut = {f"{WAN}{name}.weight" for name in ("blocks.0.self_attn.q", "blocks.0.ffn.0", "patch_embedding")}
    assert found.keys() == wanted.keys()
    for parameter in found.keys() - cut:
        assert relative_error(found[parameter], wanted[parameter]) <= 1e-6
    for parameter in cut:
        exact = wanted[parameter].reshape(len(wanted[parameter]), -1)
        optimum = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[3:])
        assert np.linalg.norm(found[parameter].reshape(exact.shape) - exact) <= 1.001 * optimum + 1e-5


@pytest.mark.parametrize("budget", [{"max_error": "40%"}, {"energy": 0.8}, {"max_size": "20kB"}])
def test_budgets_are_spent_on_what_has_a_rank(budget: dict[str, Any], tmp_path: Path) -> None:
    files = style(), distillation()

    plan = lm.plan([lm.load(file) for file in files], weights=[1, 1], **budget)

    found, wanted = updates(saved(plan.lora(), tmp_path)), updates(*files, weights=[1, 1])
    assert relative_error(found[f"{WAN}blocks.0.modulation"], wanted[f"{WAN}blocks.0.modulation"]) <= 1e-6
    lost = sum(np.linalg.norm(found[p].reshape(wanted[p].shape) - wanted[p]) ** 2 for p in wanted)
    if "max_size" in budget:
        assert (tmp_path / "out.safetensors").stat().st_size <= 20_000
    else:
        assert lost <= 0.2 * sum(np.linalg.norm(delta) ** 2 for delta in wanted.values())


@pytest.mark.parametrize("method", ["ties", "dare", "knots", "tsv", "slerp", "karcher", "model_stock"])
def test_every_method_sums_what_has_no_rank(method: str, tmp_path: Path) -> None:
    files = [dict(distillation(seed)) for seed in (2, 3)]
    for file in files:
        del file[f"{WAN}patch_embedding.diff"], file[f"{WAN}patch_embedding.diff_b"]

    found = updates(saved(lm.merge([lm.load(f) for f in files], weights=[0.4, 0.6], method=method), tmp_path))

    wanted = updates(*files, weights=[0.4, 0.6])
    names = ["blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.0.modulation", "head.head.bias"]
    for parameter in (WAN + name for name in names):
        assert relative_error(found[parameter], wanted[parameter]) <= 1e-6


def test_norms_that_lycoris_trained_are_summed(tmp_path: Path) -> None:
    norm = "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm1"
    loras = [random_lora("sdxl", only=lambda m, s: m in (TO_Q, norm), seed=seed) for seed in (1, 2)]

    merged = lm.load(saved(lm.merge(loras, weights=[0.5, 0.25]), tmp_path, dialect="kohya"))

    assert merged.layout(norm).kind == "norm"
    for role in ("w_norm", "b_norm"):
        wanted = sum(w * lora[norm].tensors()[role] for w, lora in zip((0.5, 0.25), loras, strict=True))
        np.testing.assert_allclose(merged[norm].tensors()[role], wanted, rtol=1e-6)
    with pytest.raises(DialectError, match=r"norm1: diffusers-peft can't hold.*a dialect that holds it \(kohya"):
        lm.merge(loras).state_dict("diffusers-peft")


@pytest.mark.parametrize("architecture", ["sdxl", "flux", "wan-1.3b"])
def test_the_dialects_that_a_refusal_names_hold_the_layer(architecture: str) -> None:
    lora = random_lora(architecture, only=lambda module, shape: "norm" in module and len(shape) == 1)

    with pytest.raises(DialectError) as caught:
        lora.state_dict("diffusers-peft")

    named = re.search(r"a dialect that holds it \((.*?)\)", str(caught.value))
    assert named
    for dialect in named[1].split(", "):
        assert lora.state_dict(dialect)


def test_factors_and_a_whole_difference_are_a_whole_difference(tmp_path: Path) -> None:
    loras = [small(modules=(TO_Q, CONV), kind="full", seed=1), small(modules=(TO_Q, CONV), kind="loha", seed=2)]

    merged = lm.load(saved(lm.merge(loras, weights=[0.5, -2.0]), tmp_path, dialect="kohya"))

    for module in (TO_Q, CONV):
        assert merged.layout(module).kind == "full"
        assert relative_error(merged[module].delta(), weighted_sum(loras, [0.5, -2.0], module)) <= 1e-6
    with pytest.raises(DialectError, match="a number as the rank"):
        lm.merge(loras).state_dict("diffusers")


@pytest.mark.parametrize(
    "kinds", [("full", "full"), ("full", "lora"), ("full", None), ("bias", "bias"), ("bias", None)]
)
def test_what_has_no_factors_is_written_into_fused_weights(kinds: tuple[str, str | None], tmp_path: Path) -> None:
    modules = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    made = {m: random_layer((1536, 1536), kind="full", seed=i) for i, m in enumerate(modules)}
    layers: dict[str, Any] = {}
    for module, kind in zip(modules, (kinds[0], *kinds), strict=True):
        if kind == "bias":
            layers[module] = lm.layers.BiasOnly(diff_b=made[module].diff_b)
        elif kind is not None:
            layers[module] = made[module] if kind == "full" else random_layer((1536, 1536), seed=7)
    lora = LoRA(name="parts", architecture="sd3-medium", dialect="comfyui", layouts=layers)

    written = saved(lora, tmp_path)

    (stem,) = {key.rpartition(".")[0] for key in written}
    found = updates(written)
    for row, module in enumerate(modules):
        part = slice(1536 * row, 1536 * (row + 1))
        if module not in layers:
            assert not any(delta[part].any() for delta in found.values())
        elif kinds[0] == "full":
            np.testing.assert_array_equal(found[f"{stem}.weight"][part], layers[module].delta())
        if module in layers and layers[module].diff_b is not None:
            np.testing.assert_array_equal(found[f"{stem}.bias"][part], layers[module].diff_b)


def replacing(seed: int) -> LoRA:
    tensors = {f"{WAN}txt_in.scale": normal(np.random.default_rng(seed), 64), **style(seed)}
    return lm.load({key.replace("txt_in.scale", "txt_in.set_weight"): t for key, t in tensors.items()})


@pytest.mark.parametrize("weight", [1, 0.5])
def test_a_replaced_weight_is_handed_on_at_every_weight_but_never_summed(weight: float) -> None:
    """ComfyUI's calculate_weight copies it, and diffusers loads it, whatever the strength of the LoRA is."""
    first, other = replacing(1), lm.load(style(2))

    merged = lm.merge([first, other], weights=[weight, 0.5])

    np.testing.assert_array_equal(merged["transformer.txt_in"].set_weight, first["transformer.txt_in"].set_weight)
    assert "transformer.txt_in" not in lm.merge([first, other], weights=[0, 0.5])
    with pytest.raises(MergeError, match=r"replaces the weight.*Ways out: the weight 0"):
        lm.merge([first, replacing(2)], weights=[weight, 1])


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 2, "method": "ties"}, {"max_error": 0.5}], ids=str)
def test_a_replaced_weight_is_handed_on_at_every_rank_and_by_every_method(options: dict[str, Any]) -> None:
    first, other = replacing(1), replacing(2)
    new = first["transformer.txt_in"].set_weight

    for loras, weights in (([first], [1]), ([first, other], [1, 0]), ([first, lm.load(style(2))], [1, 0.5])):
        merged = lm.merge(loras, weights=weights, **options)
        np.testing.assert_array_equal(merged["transformer.txt_in"].set_weight, new)
        assert "max_error" in options or merged["transformer.blocks.0.ffn.0"].rank == 2
    with pytest.raises(MergeError, match=r"replaces the weight.*Ways out: the weight 0"):
        lm.merge([first, other], weights=[1, 1], **options)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("kernel", [(), (1, 2, 2)])
def test_a_wider_input_takes_the_other_in_its_first_columns(kind: str, kernel: tuple[int, ...]) -> None:
    module = "transformer.patch_embedding" if kernel else "transformer.x_embedder"
    layers = [random_layer((32, columns, *kernel), kind=kind, seed=columns) for columns in (16, 36)]
    loras = [LoRA(name="x", architecture=None, dialect="comfyui", layouts={module: layer}) for layer in layers]

    merged = lm.merge(loras, weights=[0.5, -2])

    narrow, wide = (np.asarray(layer.delta(), np.float64) for layer in layers)
    wanted = -2 * wide
    wanted[:, :16] += 0.5 * narrow
    assert relative_error(merged[module].delta(), wanted) <= 1e-6
    elsewhere = [
        LoRA(name="x", architecture=None, dialect="comfyui", layouts={"transformer.blocks.0.ff": layer})
        for layer in layers
    ]
    with pytest.raises(MergeError, match="made for different models"):
        lm.merge(elsewhere)


def test_a_tensor_that_nobody_knows_is_never_copied_unweighed() -> None:
    stray = {**style(), f"{WAN}blocks.3.norm.mystery": np.ones(8, np.float32)}
    lora, other = lm.load(stray), lm.load(style(2))

    with pytest.raises(MergeError, match="It may change the model"):
        lm.merge([lora, other], weights="uniform")
    assert set(lm.merge([lora, other], weights=[1, 0.5]).extras) == {f"{WAN}blocks.3.norm.mystery"}
    assert not lm.merge([lora, other], weights=[0, 1]).extras
    assert not lm.merge([lora, other], exclude=["*.mystery"]).extras
    with pytest.raises(MergeError, match="It may change the model"):
        lm.merge([lora, lora], weights=[1, 1])


def test_a_tensor_that_nobody_knows_of_a_lora_without_modules_is_left_out_as_the_error_says() -> None:
    loras = [lm.load({**style(), f"{WAN}blocks.3.norm.mystery": np.ones(8, np.float32)}), replacing(2)]
    excluded = ["transformer.blocks.*"]

    with pytest.raises(MergeError, match="It may change the model") as caught:
        lm.merge(loras, weights=[1, 1], exclude=excluded)

    assert "weight 1" not in str(caught.value)
    merged = lm.merge(loras, weights=[1, 1], exclude=[*excluded, *re.findall("--exclude '([^']*)'", str(caught.value))])
    assert set(merged) == {"transformer.txt_in"}
    assert not merged.extras


def test_two_files_of_the_same_biases_and_norms_are_the_same(tmp_path: Path) -> None:
    a, b = (lm.load(saved(lm.merge([lm.load(distillation())], weights=[w]), tmp_path)) for w in (1.0, 1.001))

    found = {d.module: d.relative for d in differences(a, b)}

    assert max(found.values()) == pytest.approx(0.001, rel=1e-2)
    assert min(found.values()) == pytest.approx(0.001, rel=1e-2)


def test_a_style_and_a_distillation_are_compared_and_swept() -> None:
    loras = [lm.load(style()), lm.load(distillation())]
    plan = lm.plan(loras, weights=[0.5, 0.25])

    found = lm.compare(loras)
    figures = measure(plan.lora(), plan, {})

    assert {row.name for row in found.rows} >= {f"transformer.{name}" for name in LINEAR[:2]}
    assert figures["interference"] == pytest.approx(0, abs=1e-6)


def test_a_lora_of_weight_zero_adds_neither_rank_nor_zeros(tmp_path: Path) -> None:
    half = [lm.load(small(seed=seed).state_dict("kohya", dtype="float16")) for seed in (1, 2)]
    wide = small(seed=3)

    alone = saved(lm.merge([half[0], wide], weights=[1, 0]), tmp_path)
    parts = lm.merge([half[0], wide], weights=[{"*": 1, "text_encoder": 0}, {"*": 0, "unet": 0.5}])

    original = {key: tensor.numpy() for key, tensor in half[0].state_dict("kohya").items()}
    assert alone.keys() >= original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(alone[key], tensor)
        assert alone[key].dtype == tensor.dtype
    assert set(parts) == {TO_Q, CONV, SHORTCUT}


@pytest.mark.parametrize("kind", ["loha", "loha-tucker", "lokr", "lokr-full", "lokr-w1", "lokr-both", "lokr-tucker"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_lora_alone_keeps_the_form_and_the_values_of_its_layers(
    kind: str, dtype: str, beside: bool, tmp_path: Path
) -> None:
    lora = lm.load(small(kind=kind, rank=2, alpha=3, seed=1).state_dict("kohya", dtype=dtype))
    other = small(modules=(TEXT,), seed=2)

    merged = lm.load(lm.save(lm.merge([lora, other], weights=[-0.7, float(beside)]), tmp_path / "a.safetensors"))

    for module in (TO_Q, CONV, SHORTCUT):
        larger = kind in ("lokr-full", "lokr-tucker")  # as LoRAs some of them would take a hundred times the room
        assert isinstance(merged[module], (LowRank | LoKr if larger else LowRank) if beside else LoHa | LoKr)
        wanted = weighted_sum([lora], [-0.7], module)
        assert relative_error(merged[module].delta(), wanted) <= (5e-3 if beside and dtype == "bfloat16" else 1e-6)


@pytest.mark.parametrize("kind", ["lokr", "lokr-full", "lokr-w1", "lokr-both", "lokr-tucker"])
@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_a_lokr_alone_is_cut_to_its_nearest_matrix(kind: str, weight: float) -> None:
    lora = small(modules=(TO_Q, CONV), kind=kind, rank=3, alpha=2, seed=1)
    plan = lm.plan([lora], weights=[weight], rank=2)

    for module in lora:
        whole = weight * np.asarray(lora[module].delta(), np.float64).reshape(lora[module].shape[0], -1)
        values = np.linalg.svd(whole, compute_uv=False)
        outcome = plan.merger.outcome(module)
        rest = whole - np.asarray(outcome.layer.delta()).reshape(whole.shape)
        assert np.linalg.norm(rest) == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)
        assert outcome.energy == pytest.approx(np.linalg.norm(values) ** 2, rel=1e-4)
        assert outcome.lost == pytest.approx(np.linalg.norm(values[2:]) ** 2, rel=2e-4)


def fused_lora(stem: str) -> LoRA:
    return lm.load(factors(np.random.default_rng(0), stem, 4608, 1536, 5), architecture="sd3-medium")


def fused_lokr(stem: str) -> LoRA:
    rng = np.random.default_rng(0)
    shapes = {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (1152, 5), "lokr_w2_b": (5, 768)}
    return lm.load({f"{stem}.{part}": normal(rng, *shape) for part, shape in shapes.items()}, architecture="sd3-medium")


@pytest.mark.parametrize("make", [fused_lora, fused_lokr])
def test_parts_of_a_fused_weight_keep_what_they_share(make: Callable[[str], LoRA], tmp_path: Path) -> None:
    parts = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    fused = make("lora_unet_joint_blocks_0_x_block_attn_qkv")
    split = random_lora("sd3-medium", rank=3, seed=1, only=lambda m, s: m in parts)

    found = lm.load(saved(lm.merge([fused, split], weights=[0.7, -0.4]), tmp_path))

    assert found.layout(parts[0]).rank == 5 + 3 * 3
    for module in parts:
        assert relative_error(found[module].delta(), weighted_sum([fused, split], [0.7, -0.4], module)) <= 1e-6


def test_what_grows_beyond_measure_is_refused_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = [small(modules=(TO_Q,), kind="lokr-full", seed=seed) for seed in (1, 2)]
    lora, other = (lm.load(each.state_dict("kohya")) for each in loras)
    target = tmp_path / "a.safetensors"
    lm.save(lora, target, dialect="diffusers-peft")  # as small as a small LoRA
    target.unlink()
    monkeypatch.setattr(lm.files.writing, "SMALL", 1000)
    for refused in (
        lambda: lm.save(lora, target, dialect="diffusers-peft"),
        lambda: lm.merge([lora, other]),
        lambda: lm.save(lm.plan([lora, other]).lora(), target),
    ):
        with pytest.raises(OptionError, match=r"times the .* made of: .*rank=32.*allow_growth"):
            refused()
    assert not target.exists()

    lm.save(lora, target, dialect="diffusers-peft", allow_growth=True)
    lm.save(lm.resize(lora, rank=2), target, dialect="diffusers-peft")
    lm.save(lm.merge([lora], weights=[0.5]), target)
    lm.save(lm.plan([lora, other], allow_growth=True).lora(), target)


def test_a_disk_without_room_is_an_error_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))

    with pytest.raises(FileError, match=r"its disk has 1\.0 kB free"):
        lm.save(small(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("largest", "wanted"), [(1.0, "F16"), (1e5, "BF16")])
def test_two_kinds_of_16_bits_give_the_one_that_holds_the_values(largest: float, wanted: str, tmp_path: Path) -> None:
    half = lm.load(small(modules=(TO_Q,), seed=1).state_dict("kohya", dtype="float16"))
    layer = random_layer((640, 640), seed=2)
    up, down = largest * layer.up, layer.down / largest
    brain = LoRA(name="b", architecture="sdxl", dialect="kohya", layouts={TO_Q: low_rank(up, down, (640, 640))})
    brain = lm.load(brain.state_dict("kohya", dtype="bfloat16"))

    merged = lm.load(lm.save(lm.merge([half, brain], weights=[1, 1]), tmp_path / "a.safetensors"))

    assert {layer.dtype for layer in merged.values()} == {wanted}
    error = relative_error(merged[TO_Q].delta(), weighted_sum([half, brain], [1, 1], TO_Q))
    assert error <= (2e-4 if wanted == "F16" else 2e-3)


def test_full_ranks_are_exact_and_no_error_is_told() -> None:
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    loras = [small("sd15", (module,), rank=256, seed=seed) for seed in range(4)]
    plan = lm.plan(loras, weights=[1] * 4)
    kept = lm.merging.Kept(plan.steps)

    found = plan.lora(kept)[module]

    assert not kept.errors
    assert relative_error(found.delta(), weighted_sum(loras, [1] * 4, module)) <= 2e-6


@pytest.mark.parametrize("wide", [False, True])
def test_errors_are_measured_where_little_is_lost(wide: bool) -> None:
    rng = np.random.default_rng(0)
    up, down = normal(rng, 500, 400), normal(rng, 400, 480)
    down[95:] *= 1e-5

    cut = lm.linalg.truncate_dense(up @ down, 100) if wide else lm.linalg.truncate(up, down, 100)

    exact = (up @ down if wide else up.astype(np.float64) @ down).astype(np.float64)
    true = np.linalg.norm(exact - cut.up.astype(np.float64) @ cut.down)
    assert np.sqrt(cut.lost) == pytest.approx(true, rel=0.05)


def test_files_on_the_disk_are_not_touched_by_a_refusal(tmp_path: Path) -> None:
    save_file({k: np.ascontiguousarray(t) for k, t in distillation().items()}, tmp_path / "d.safetensors")

    with pytest.raises(DialectError, match="Ways out"):
        lm.convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", "diffusers-peft")
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_sum_at_weights_of_1_has_the_numbers_of_its_inputs(dtype: Any, tmp_path: Path) -> None:
    """Also where columns are so faint that float16 would keep more of them at another scale."""
    random, module = np.random.default_rng(0), MODULES["sdxl"][0]
    shape = small()[module].shape
    factors = [
        ((1e-5 * random.normal(size=(shape[0], 2))).astype(dtype), random.normal(size=(2, shape[1])).astype(dtype))
        for _ in range(2)
    ]
    files = []
    for i, (up, down) in enumerate(factors):
        tensors = {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}
        save_file(tensors, tmp_path / f"{i}.safetensors")
        files.append(tmp_path / f"{i}.safetensors")

    lm.save(lm.plan(files).lora(), tmp_path / "sum.safetensors", dialect="diffusers-peft")

    found = load_file(tmp_path / "sum.safetensors")
    up, down = (found[f"{module}.lora_{x}.weight"] for x in "BA")
    assert up.dtype == dtype
    assert np.array_equal(up, np.concatenate([each for each, _ in factors], axis=1))
    assert np.array_equal(down, np.concatenate([each for _, each in factors]))
