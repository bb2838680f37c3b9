"""Laws of every dialect."""

import json
import math
import re
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings, strategies as st

import loramerge as lm
from loramerge.errors import DialectError, LayerError
from loramerge.files.architectures import ARCHITECTURES, forms, outlines
from loramerge.files.dialects import DIALECTS
from loramerge.files.dialects.base import table
from loramerge.files.dialects.forms import made
from loramerge.files.dialects.repairs import repaired
from loramerge.files.dialects.suffixes import STYLES, parse
from loramerge.files.lora import LoRA
from loramerge.layers.base import LARGEST_WEIGHT
from loramerge.testing import random_layer, random_lora, relative_error
from small import MODULES, WRITTEN, small

FAMILIES = list(ARCHITECTURES)


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "comfyui", "xlabs", "other"])
def test_a_dialect_that_no_name_of_the_file_is_of_is_refused(dialect: str) -> None:
    tensors = small(alpha=2.0).state_dict("kohya")

    with pytest.raises(lm.errors.OptionError, match=rf"isn't a LoRA in the dialect {dialect}: .* those of kohya"):
        lm.load(tensors, dialect=dialect)

    assert lm.load(tensors, dialect="kohya").dialect == "kohya"


@pytest.mark.parametrize(("dialect", "family"), list(product(DIALECTS, FAMILIES)))
def test_every_module_has_at_most_one_place_among_the_names(dialect: str, family: str) -> None:
    names = table(DIALECTS[dialect].names, ARCHITECTURES[family])
    places = [(part.module, part.rows) for parts in names.values() for part in parts]

    assert len({module for module, _ in places}) == len(places)
    assert {module for module, _ in places} <= set(ARCHITECTURES[family].shapes)


@pytest.mark.parametrize(("dialect", "family"), list(product([d for d in WRITTEN if d != "kohya-diffusers"], FAMILIES)))
def test_a_written_dialect_names_every_module(dialect: str, family: str) -> None:
    names = table(DIALECTS[dialect].names, ARCHITECTURES[family])
    unlisted = ARCHITECTURES[family].native is None and dialect in ("kohya", "comfyui")

    named = {part.module for parts in names.values() for part in parts}
    assert named == (set() if unlisted else set(ARCHITECTURES[family].shapes))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_begin_as_their_dialect_says(family: str) -> None:
    a = ARCHITECTURES[family]

    assert outlines()[family] == a.outlined()
    for name in ("kohya", "comfyui", "native", "bare", "diffusers", "peft", "onetrainer", "lycoris", "omi"):
        assert all(stem.startswith(DIALECTS[name].begins) for stem in table(DIALECTS[name].names, a))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_of_a_family_is_too_large_to_be_written_out(family: str) -> None:
    a = ARCHITECTURES[family]

    assert max(math.prod(shape) for module in a.shapes for shape in a.sizes(module)) <= LARGEST_WEIGHT


def test_the_index_of_forms_has_every_name_and_size_of_the_tables() -> None:
    assert forms() == made()


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_rows_tile_the_native_weight(family: str) -> None:
    a = ARCHITECTURES[family]
    for parts in a.native_paths.values():
        if parts[0].rows is not None:
            rows = sorted(r for part in parts for r in part.rows or ())
            assert rows[0][0] == 0
            assert all(before[1] == after[0] for before, after in pairwise(rows))
            assert rows[-1][1] == sum(a.shapes[part.module][0] for part in parts)


@pytest.mark.parametrize(
    ("dialect", "family"), list(product(WRITTEN, ["sdxl", "sd15", "sd21", "sdxl-refiner", "sd3-medium"]))
)
def test_what_is_written_is_recognised(dialect: str, family: str) -> None:
    if dialect == "kohya-diffusers" and ARCHITECTURES[family].denoiser != "unet":
        pytest.skip("a dialect of UNets")
    lora = random_lora(family, rank=1)

    found = lm.load(lora.state_dict(dialect))

    same_names = {"kohya-diffusers"} if ARCHITECTURES[family].kohya_uses_diffusers_names else set()
    assert found.dialect in {dialect} | same_names
    assert found.architecture == family
    assert set(found) == set(lora)


@pytest.mark.parametrize("style", STYLES)
def test_every_suffix_is_parsed_into_its_role_and_style(style: str) -> None:
    for role, suffix in STYLES[style].items():
        stem = "unet:0" if style == "numbered" else "unet.a.to_q"
        assert parse(stem + suffix) == (stem, role, style)


@pytest.mark.parametrize(("dialect", "family"), list(product(DIALECTS, FAMILIES)))
def test_a_name_and_its_suffix_come_apart_where_they_were_put_together(dialect: str, family: str) -> None:
    described, a = DIALECTS[dialect], ARCHITECTURES[family]
    suffixes = [suffix for style in described.styles & STYLES.keys() for suffix in STYLES[style].values()]
    stems = {stem for names in described.tables for stem in table(names, a)}
    forms = {re.sub(r"\d+", "0", stem) for stem in stems} & stems  # of numbered blocks the first

    assert [s + end for s in forms for end in suffixes if (found := parse(s + end)) is None or found.stem != s] == []


def test_adapter_names_inside_a_key_are_seen_through() -> None:
    assert parse("unet.a.lora_A.default.weight") == ("unet.a", "down", "peft-named")
    assert parse("unet.a.lora_B.person.bias") == ("unet.a", "up_bias", "peft-named")


@pytest.mark.parametrize(
    ("broken", "meant"),
    [
        ("unet.unet.down_blocks.0", "unet.down_blocks.0"),
        ("unet.base_model.model.down_blocks.0", "unet.down_blocks.0"),
        ("lora_unet_unet_down_blocks_0", "lora_unet_down_blocks_0"),
        ("text_encoder.encoder.layers.0", "text_encoder.text_model.encoder.layers.0"),
        ("lora_te1_encoder_layers_0", "lora_te1_text_model_encoder_layers_0"),
    ],
)
def test_known_mistakes_are_repaired(broken: str, meant: str) -> None:
    fix = repaired(broken)

    assert fix is not None
    assert fix[0] == meant


@pytest.mark.parametrize(
    ("right", "wrapped"),
    [
        ("unet.", "module.unet."),
        ("unet.", "_orig_mod.unet."),
        ("unet.", "module.unet._orig_mod."),
        ("unet.", "unet._orig_mod."),
        ("unet.", "base_model.model.unet."),
    ],
)
def test_names_of_wrappers_are_seen_through(right: str, wrapped: str) -> None:
    lora = small(modules=MODULES["sdxl"])
    keys = lora.state_dict("diffusers-peft")
    found = lm.load({key.replace(right, wrapped, 1) if key.startswith(right) else key: t for key, t in keys.items()})

    assert found.architecture == "sdxl"
    assert set(found) == set(lora)
    assert all(relative_error(found[m].delta(), lora[m].delta()) == 0 for m in lora)


@pytest.mark.parametrize(
    ("style", "prefix"),
    [
        ("diffusers-old", "lora_unet_"),
        ("underscored", "lora_unet_unet_"),
    ],
)
def test_broken_kohya_exports_are_read(style: str, prefix: str) -> None:
    lora = small(modules=MODULES["sdxl"][:1])
    broken = {
        prefix + key.removeprefix("unet.").rpartition(".lora_")[0].replace(".", "_") + STYLES[style][role]: tensor
        for key, tensor in lora.state_dict("diffusers-peft").items()
        for role in ["down" if "lora_A" in key else "up"]
    }

    found = lm.load(broken, architecture="sdxl")

    assert found.dialect == "kohya-broken"
    assert set(found) == set(lora)


def test_a_transformers_5_text_encoder_is_read() -> None:
    lora = small(modules=MODULES["sdxl"][3:])
    keys = {k.replace("text_model.", ""): t for k, t in lora.state_dict("diffusers").items()}

    found = lm.load(keys)

    assert set(found) == set(lora)
    assert "text_model" in found.notes[0]


def test_peft_around_the_models_own_code_is_read() -> None:
    q = "transformer.transformer_blocks.0.attn.to_q"
    lora = small("flux", modules=(q, "transformer.x_embedder"), rank=2, alpha=2)
    native = {key.replace("diffusion_model.", "base_model.model."): t for key, t in lora.state_dict("comfyui").items()}
    keys = {key: key.replace("lora_down", "lora_A").replace("lora_up", "lora_B") for key in native}

    found = lm.load({keys[key]: tensor for key, tensor in native.items() if not key.endswith(".alpha")})

    assert (found.dialect, found.architecture) == ("peft", "flux")
    assert relative_error(found[q].delta(), lora[q].delta()) == 0


def test_magnitudes_of_columns_of_a_fused_weight_stay_with_the_whole_of_it() -> None:
    stem, own = "lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"
    keys = {
        ".lora_down.weight": np.random.default_rng(1).standard_normal((2, 3072), dtype=np.float32),
        ".lora_up.weight": np.random.default_rng(2).standard_normal((9216, 2), dtype=np.float32),
        ".alpha": np.float32(1),
        ".dora_scale": np.random.default_rng(3).uniform(1, 2, (1, 3072)).astype(np.float32),
    }
    lora = lm.load({stem + end: value for end, value in keys.items()})

    found = lora.state_dict("comfyui")

    assert found.keys() == {own + end for end in keys}
    assert all((found[own + end].numpy() == value).all() for end, value in keys.items())
    with pytest.raises(DialectError, match="depends on the base weight"):
        lora.state_dict("diffusers-peft")
    with pytest.raises(DialectError, match="are one weight here"):
        lora.select("*.to_q").state_dict("comfyui")


def test_magnitudes_have_the_axes_of_the_weight_as_the_factors_have() -> None:
    """Stable Diffusion 1's proj_in is a convolution, which some files store as a matrix."""
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    sizes = {".lora_down.weight": (2, 1280), ".lora_up.weight": (1280, 2), ".dora_scale": (1, 1280)}
    matrix = {stem + end: np.ones(size, np.float32) for end, size in sizes.items()}

    written = lm.load(matrix, architecture="sd15").state_dict("comfyui")

    shapes = {key.rpartition("proj_in")[2]: tuple(value.shape) for key, value in written.items()}
    assert shapes == {end: (*size, 1, 1) for end, size in sizes.items()}


def test_only_fused_weights_alternate_head_by_head() -> None:
    lora = random_lora("minimax-h3", dialect="peft")
    plain = {key: tensor.numpy() for key, tensor in lora.state_dict("peft").items()}

    named = lm.load({key.replace(".weight", ".person.weight"): value for key, value in plain.items()})

    assert set(named) == set(lora)
    assert all(relative_error(named[module].delta(), lora[module].delta()) < 1e-6 for module in lora)


def test_the_single_blocks_of_xlabs_are_those_of_flux() -> None:
    block, fused = "single_blocks.7.processor", np.arange(9216, dtype=np.float32)[:, None]
    keys = {
        f"{block}.qkv_lora.down.weight": np.ones((1, 3072), np.float32),
        f"{block}.qkv_lora.up.weight": fused,
        f"{block}.proj_lora.down.weight": np.ones((1, 15360), np.float32),
        f"{block}.proj_lora.up.weight": np.ones((3072, 1), np.float32),
    }

    lora = lm.load(keys)

    inside = "transformer.single_transformer_blocks.7."
    assert (lora.architecture, lora.dialect) == ("flux", "xlabs")
    assert set(lora) == {f"{inside}{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out")}
    np.testing.assert_array_equal(lora[f"{inside}attn.to_k"].factors()[0], fused[3072:6144])


@pytest.mark.parametrize("prefix", ["transformer.", "model.diffusion_model."])
def test_flux_names_of_its_own_behind_another_prefix_are_read(prefix: str) -> None:
    lora = lm.load(small("flux", (*QKV, "transformer.x_embedder"), rank=2, alpha=1.0).state_dict("comfyui"))

    found = lm.load({key.replace("diffusion_model.", prefix): t for key, t in lora.state_dict().items()})

    assert found.architecture == "flux"
    assert set(found) == set(lora)
    assert all(relative_error(found[m].delta(), lora[m].delta()) == 0 for m in lora)


def test_siblings_that_old_diffusers_never_applied_are_left_aside() -> None:
    base = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
    ones = np.ones((4, 768), dtype=np.float32)
    keys = {
        f"{base}.to_{x}_lora.{end}.weight": ones if end == "down" else ones.T for x in "qkv" for end in ("down", "up")
    }

    found = lm.load(keys)

    assert list(found) == [base]
    assert list(found.state_dict()) == list(keys)


def test_unknown_modules_of_a_known_family_are_kept_and_refused_elsewhere() -> None:
    keys = random_lora("sdxl", rank=1, only=lambda module, shape: "attn1.to_q" in module).state_dict("kohya")
    keys["lora_unet_motion_0.lora_down.weight"], keys["lora_unet_motion_0.lora_up.weight"] = (
        np.ones((2, 8), dtype=np.float32),
        np.ones((8, 2), dtype=np.float32),
    )

    found = lm.load(keys)

    assert (found.architecture, "transformer.motion_0" in found) == ("sdxl", True)
    assert list(found.state_dict()) == list(keys)
    with pytest.raises(lm.errors.DialectError, match=r"motion_0 of sdxl.*keep the file's own dialect, kohya"):
        found.state_dict("diffusers")


@pytest.mark.parametrize("dialect", ["diffusers-peft", "diffusers", "peft"])
def test_an_unknown_family_is_read_and_written_in_dotted_dialects(dialect: str) -> None:
    keys = {
        "transformer.layers.0.mix.lora_A.weight": np.ones((2, 8), dtype=np.float32),
        "transformer.layers.0.mix.lora_B.weight": np.ones((6, 2), dtype=np.float32),
    }
    found = lm.load(keys)

    again = lm.load(found.state_dict(dialect))

    assert found.architecture is None
    assert list(again) == ["transformer.layers.0.mix"]
    np.testing.assert_array_equal(again["transformer.layers.0.mix"].delta(), np.full((6, 8), 2.0))


def test_a_name_that_would_read_as_a_mistake_is_not_written() -> None:
    """Behind ComfyUI's prefix it would have 'diffusion_model.' twice, which means another module."""
    tensors = {
        f"lora_unet_diffusion_model.input_blocks.1.0.{end}": np.ones((2, 2), np.float32)
        for end in ("lora_down.weight", "lora_up.weight")
    }
    lora = lm.load(tensors)

    assert [*lora] == ["transformer.diffusion_model.input_blocks.1.0"]
    with pytest.raises(lm.errors.DialectError, match="comfyui has no name for the module"):
        lora.state_dict("comfyui")
    assert lora.state_dict("kohya").keys() >= tensors.keys()


def test_a_stray_that_would_be_read_as_a_part_of_a_layer_is_not_written() -> None:
    lora = lm.load(
        {
            "diffusion_model.mystery_0.diff_b": np.ones(8, np.float32),
            "lora_unet_mystery_0.strange.weight": np.ones((2, 2), np.float32),
        }
    )

    assert [*lora.extras] == ["lora_unet_mystery_0.strange.weight"]
    with pytest.raises(
        lm.errors.DialectError, match=r"strange.weight belongs to no layer.*the layer lora_unet_mystery_0\."
    ):
        lora.state_dict("kohya")
    assert [*lora.exclude("lora_unet_mystery_0.strange*").state_dict("kohya")] == ["lora_unet_mystery_0.diff_b"]


def test_an_unknown_family_in_flattened_names_is_kept_as_it_is() -> None:
    keys = {
        "lora_unet_mystery_0.lora_down.weight": np.ones((2, 8), dtype=np.float32),
        "lora_unet_mystery_0.lora_up.weight": np.ones((6, 2), dtype=np.float32),
    }
    found = lm.load(keys)

    assert list(lm.merge([found, found]).state_dict()) == [*keys, "lora_unet_mystery_0.alpha"]
    with pytest.raises(lm.errors.DialectError, match=r"family isn't known.*own dialect, kohya.*--architecture"):
        found.state_dict("comfyui")


@pytest.mark.parametrize("dialect", ["kohya", "diffusers-peft", "comfyui"])
def test_a_model_of_other_widths_is_of_the_family_that_its_file_names(dialect: str, tmp_path: Path) -> None:
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    sd = {
        f"{module}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{module}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    keys = lm.load(sd, architecture="sdxl").state_dict(dialect)
    alien = {k.replace("attn1", "attn7"): v for k, v in keys.items()}

    def read(keys: dict[str, object], family: str) -> LoRA:
        path = tmp_path / "lora.safetensors"
        safetensors.numpy.save_file(
            {k: np.asarray(v) for k, v in keys.items()}, path, {"modelspec.architecture": family}
        )
        return lm.load(path)

    found = read(keys, "stable-diffusion-xl-v1-base/lora")
    assert (found.architecture, list(found)) == ("sdxl", [module])
    assert read(keys, "stable-cascade/lora").architecture is None
    assert read(keys | alien, "stable-diffusion-xl-v1-base/lora").architecture is None


def test_two_keys_for_one_tensor_are_refused() -> None:
    keys = small().state_dict("kohya")
    key = next(k for k in keys if "lora_down" in k)
    keys[key.replace("lora_down", "lora_A")] = keys[key]

    with pytest.raises(lm.errors.LayerError, match="both"):
        lm.load(keys)


def test_one_module_under_two_names_is_refused() -> None:
    lora = small(modules=MODULES["sdxl"][:1])

    with pytest.raises(lm.errors.LayerError, match="both update"):
        lm.load({**lora.state_dict("kohya"), **lora.state_dict("diffusers")}, architecture="sdxl")


def test_kohya_files_have_one_alpha() -> None:
    lora = small(rank=lambda m: 4 + len(m) % 5, alpha=lambda m: 1.0 + len(m) % 7)

    alphas = {float(t) for key, t in lora.state_dict("kohya").items() if key.endswith(".alpha")}

    assert len(alphas) == 1


LOSSLESS = [(a, b) for a, b in product(WRITTEN, WRITTEN)]
POWERS = st.sampled_from([None, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])


@settings(max_examples=60, deadline=None)
@given(
    pair=st.sampled_from(LOSSLESS),
    family=st.sampled_from(["sdxl", "sd15"]),
    rank=st.sampled_from([1, 2, 4, 8]),
    alpha=POWERS,
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**16),
)
def test_an_update_survives_every_pair_of_dialects_bit_for_bit(
    pair: tuple[str, str], family: str, rank: int, alpha: float | None, dtype: str, seed: int
) -> None:
    lora = small(family, rank=rank, alpha=alpha, dtype=dtype, seed=seed)

    there = lm.load(lora.state_dict(pair[0]), architecture=family)
    back = lm.load(there.state_dict(pair[1]), architecture=family)

    for module in lora:
        assert _bits(back, module) == _bits(lora, module)


def _bits(lora: LoRA, module: str) -> bytes:
    """ΔW in float64, where factors of few bits multiply without rounding."""
    up, down = lora[module].factors()
    product = np.asarray(up, dtype=np.float64) @ np.asarray(down, dtype=np.float64)
    return (product + 0.0).tobytes()


@settings(max_examples=40, deadline=None)
@given(
    pair=st.sampled_from(LOSSLESS),
    kind=st.sampled_from(["lora", "tucker", "loha", "loha-tucker", "lokr", "lokr-w1", "lokr-both", "lokr-tucker"]),
    rank=st.integers(1, 5),
    alpha=st.one_of(st.none(), st.floats(0.25, 64, allow_nan=False)),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**16),
)
def test_any_alpha_and_kind_survives_every_pair_of_dialects(
    pair: tuple[str, str], kind: str, rank: int, alpha: float | None, dtype: str, seed: int
) -> None:
    lora = small(kind=kind, rank=rank, alpha=alpha, dtype=dtype, seed=seed)

    there = lm.load(lora.state_dict(pair[0]), architecture="sdxl")
    back = lm.load(there.state_dict(pair[1]), architecture="sdxl")

    for module in lora:
        assert relative_error(back[module].delta(), lora[module].delta()) <= 5e-7


@pytest.mark.parametrize("dialect", ["kohya", "kohya-diffusers", "comfyui"])
@pytest.mark.parametrize("kind", ["full", "dora", "dora-in", "lokr-full", "loha-tucker"])
def test_what_kohyas_kin_can_say_survives_among_them(dialect: str, kind: str) -> None:
    lora = small(kind=kind, rank=2, alpha=2.0)

    found = lm.load(lora.state_dict(dialect))

    for module in lora:
        before, after = lora[module].tensors(), found[module].tensors()
        assert before.keys() == after.keys()
        for role, tensor in before.items():
            np.testing.assert_array_equal(np.asarray(after[role]).reshape(-1), tensor.reshape(-1))


@pytest.mark.parametrize(
    ("kind", "dialect"),
    [
        ("full", "diffusers"),
        ("dora", "diffusers"),
        ("dora-in", "diffusers-peft"),
        ("dora-in", "peft"),
        ("full", "peft"),
    ],
)
def test_what_a_dialect_cant_hold_is_refused_by_module(kind: str, dialect: str) -> None:
    with pytest.raises(lm.errors.DialectError, match=r"unet\.down_blocks|can't hold"):
        small(kind=kind).state_dict(dialect)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d not in WRITTEN])
def test_a_dialect_that_is_only_read_is_not_written(dialect: str) -> None:
    with pytest.raises(lm.errors.DialectError, match="is read, not written"):
        small().state_dict(dialect)


def test_strays_are_kept_reported_and_not_forced_on_tools_that_choke() -> None:
    lora = lm.load({**small().state_dict("kohya"), "bundle_emb.word.clip_l": np.ones(768, dtype=np.float32)})

    assert set(lora.extras) == {"bundle_emb.word.clip_l"}
    assert "bundle_emb.word.clip_l" in lora.state_dict("comfyui")
    with pytest.raises(lm.errors.DialectError, match="bundle_emb"):
        lora.state_dict("diffusers")


@pytest.mark.parametrize("algorithm", ["oft_blocks", "a1.weight", "on_input", "bias_indices"])
def test_algorithms_that_are_only_carried_go_back_and_refuse_the_rest(algorithm: str) -> None:
    stem = "lora_unet_input_blocks_1_0_in_layers_2"
    keys = {**small().state_dict("kohya"), f"{stem}.{algorithm}": np.ones((4, 4), dtype=np.float32)}
    lora = lm.load(keys)

    assert list(lora.state_dict()) == list(keys)
    with pytest.raises(lm.errors.MergeError, match="neither merged nor baked"):
        lm.merge([lora, lora])
    with pytest.raises(lm.errors.MergeError, match="neither merged nor baked"):
        lm.merge([lora])  # alone it would have no file but its own
    with pytest.raises(lm.errors.MergeError, match="neither merged nor baked"):
        lm.resize(lora, rank=1)


FUSED = "transformer.transformer_blocks.0.attn."
QKV = tuple(FUSED + name for name in ("to_q", "to_k", "to_v"))


def test_separate_projections_are_fused_and_come_apart_again() -> None:
    lora = small("flux", QKV, rank=2, alpha=1.0)

    fused = lm.load(lora.state_dict("kohya"))
    apart = lm.load(fused.state_dict("diffusers-peft"))

    assert {fused.layout(m).rank for m in QKV} == {6}
    assert {apart.layout(m).rank for m in QKV} == {2}
    for module in QKV:
        assert relative_error(apart[module].delta(), lora[module].delta()) <= 1e-6


def test_fused_projections_stay_as_small_as_they_were() -> None:
    lora = lm.load(small("flux", QKV, rank=2).state_dict("kohya"))
    shared = lm.load({**lora.state_dict(), **_shared_qkv()})

    again = lm.load(lm.load(shared.state_dict("diffusers-peft"), architecture="flux").state_dict("comfyui"))

    assert {again.layout(m).rank for m in QKV} == {4}
    for module in QKV:
        assert relative_error(again[module].delta(), shared[module].delta()) <= 1e-6


def _shared_qkv() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    return {
        f"{stem}.lora_down.weight": rng.standard_normal((4, 3072), dtype=np.float32),
        f"{stem}.lora_up.weight": rng.standard_normal((9216, 4), dtype=np.float32),
        f"{stem}.alpha": np.array(2.0, dtype=np.float32),
    }


def test_merging_fused_files_keeps_them_fused() -> None:
    lora = lm.load(_shared_qkv())

    merged = lm.load(lm.merge([lora, lora], weights=[0.7, 0.5]).state_dict("kohya"))

    assert {merged.layout(m).rank for m in QKV} == {8}
    for module in QKV:
        assert relative_error(merged[module].delta(), 1.2 * lora[module].delta()) <= 1e-6


def test_a_part_of_a_fused_projection_alone_leaves_the_others_unchanged() -> None:
    lora = small("flux", QKV[:1], rank=2)

    found = lm.load(lora.state_dict("kohya"))

    assert relative_error(found[QKV[0]].delta(), lora[QKV[0]].delta()) <= 1e-6
    assert not found[QKV[1]].delta().any()


@pytest.mark.parametrize("width", [3072, 16])
def test_exchanged_halves_are_exchanged_back_at_any_width(width: int) -> None:
    module = "transformer.norm_out.linear"
    layer = random_layer((2 * width, width), rank=2, seed=1)
    lora = LoRA(name="x", architecture="flux", dialect="comfyui", layouts={module: layer})

    native = lora.state_dict("comfyui")
    up = native["diffusion_model.final_layer.adaLN_modulation.1.lora_up.weight"].numpy()

    np.testing.assert_array_equal(up, np.concatenate([lora[module].up[width:], lora[module].up[:width]]))
    np.testing.assert_array_equal(lm.load(native, architecture="flux")[module].delta(), lora[module].delta())


def test_halves_of_no_even_number_of_rows_are_refused() -> None:
    layer = random_layer((7, 16), rank=2, seed=1)
    lora = LoRA(name="x", architecture="flux", dialect="comfyui", layouts={"transformer.norm_out.linear": layer})

    with pytest.raises(DialectError, match=r"norm_out.linear: its 7 rows can't be exchanged as the 6144"):
        lora.state_dict("comfyui")


ALPHA_CASES = {
    "tensor": ({".alpha": 2.0}, {"lora_alpha": 16, "r": 4}, 0.5),
    "scale tensor": ({".scale": 0.75}, {}, 0.75),
    "metadata": ({}, {"lora_alpha": 16, "r": 4}, 4.0),
    "pattern": ({}, {"lora_alpha": 16, "r": 4, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
    "rslora": ({}, {"lora_alpha": 4, "r": 4, "use_rslora": True}, 2.0),
    "none": ({}, {}, 1.0),
}


@pytest.mark.parametrize("case", ALPHA_CASES)
def test_scales_are_found_in_their_order_of_precedence(case: str) -> None:
    tensors, config, scale = ALPHA_CASES[case]
    module = MODULES["sdxl"][0]
    keys = small(modules=(module,), rank=4).state_dict("diffusers-peft")
    for suffix, value in tensors.items():
        keys[module + suffix] = np.array(value, dtype=np.float32)
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})} if config else {}

    from loramerge.files.lora import from_tensors
    from loramerge.tensors import Held

    found = from_tensors({k: Held(np.asarray(t)) for k, t in keys.items()}, metadata, "case")

    assert found.layout(module).scale == scale


@pytest.mark.parametrize("roles", [{"diff": (640, 640)}, {"lokr_w1": (8, 8), "lokr_w2": (80, 80)}, {"diff_b": (640,)}])
def test_a_scale_that_only_some_readers_apply_is_refused(roles: dict[str, tuple[int, ...]]) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    keys = {f"{stem}.{role}": np.ones(shape, np.float32) for role, shape in roles.items()}

    with pytest.raises(LayerError, match=r"to_q\.scale is 0\.5"):
        lm.load({**keys, f"{stem}.scale": np.float32(0.5)})
    assert len(lm.load({**keys, f"{stem}.scale": np.float32(1)})) == 1


@pytest.mark.parametrize("component", ["connectors", "transformer_2", "llm_adapter"])
def test_a_component_that_loramerge_does_not_know_has_its_own_configuration(component: str) -> None:
    from loramerge.files.lora import from_tensors
    from loramerge.tensors import Held

    rng = np.random.default_rng(0)
    keys = {
        f"{owner}.blocks.0.proj.lora_{side}.weight": Held(rng.standard_normal(shape).astype(np.float32))
        for owner in ("transformer", component)
        for side, shape in (("A", (4, 32)), ("B", (24, 4)))
    }
    said = {"transformer.lora_alpha": 12, "transformer.r": 4, f"{component}.lora_alpha": 2, f"{component}.r": 4}

    found = from_tensors(keys, {"lora_adapter_metadata": json.dumps(said)}, "case")

    assert {module.partition(".")[0]: layout.scale for module, layout in found.layouts.items()} == {
        "transformer": 3.0,
        component: 0.5,
    }


def test_a_file_that_its_trainer_scaled_by_mistake_is_reported() -> None:
    from loramerge.files.lora import from_tensors
    from loramerge.tensors import Held

    tensors = {key: Held(np.asarray(t)) for key, t in _shared_qkv().items()}

    found = from_tensors(tensors, {"ss_network_args": '{"split_qkv": "True"}'}, "case")

    assert "split_qkv" in found.notes[0]


def test_modules_stand_in_the_order_of_the_model() -> None:
    lora = random_lora("sdxl", rank=1)

    found = lm.load(dict(sorted(lora.state_dict("kohya").items())))

    assert list(found) == list(lora)
    assert list(found) != sorted(found)


@pytest.mark.parametrize(
    ("typed", "name"),
    [("ComfyUI", "comfyui"), ("A1111", "kohya"), ("kohya_ss", "kohya"), ("Diffusers_PEFT", "diffusers-peft")],
)
def test_a_dialect_is_found_whatever_the_case_and_the_hyphen(typed: str, name: str) -> None:
    assert typed in DIALECTS
    assert DIALECTS[typed].name == name


def test_an_unknown_dialect_to_write_is_answered_with_those_that_are_written() -> None:
    with pytest.raises(lm.errors.OptionError, match=r"kohya \(a1111, .*comfyui \(comfy\)") as raised:
        small().state_dict("nonsense")

    assert "xlabs" not in str(raised.value)
