"""Which model a file is for: named rightly, one of several that fit alike, or not at all."""

import ast
import copy
import importlib.util
import json
import lzma
import pickle
import re
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import loramerge as lm
from loramerge.errors import DialectError, FamilyError, LayerError, MergeError, OptionError
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.architectures.blocks import block
from loramerge.files.architectures.hints import named
from loramerge.files.architectures.labels import ARCHITECTURE, label_of
from loramerge.files.families import alike, of_one_family
from loramerge.files.lora import LoRA, from_tensors
from loramerge.layers import LowRank
from loramerge.tensors import Held, numpy_dtype
from loramerge.testing import random_lora, relative_error

HERE = Path(__file__).parent
TOOLS: dict[str, Any] = json.loads(lzma.decompress((HERE / "data" / "families.json.xz").read_bytes()))
"""Key listings of what today's tools write at real size, with the family of each."""

ALIKE = {
    "anima__diffusers": ("anima", "cosmos-predict2-2b"),
    **dict.fromkeys(
        ("chroma__diffusers-attn-meta", "flux1__diffusers-attn-meta", "flux1__simpletuner-lokr"),
        ("flux", "chroma", "longcat-image"),
    ),
    "cosmos-predict2-2b__diffusers": ("anima", "cosmos-predict2-2b"),
    "cosmos-predict2-2b__diffusion-pipe": ("anima", "cosmos-predict2-2b"),
    **dict.fromkeys(
        ("flux1__diffusers", "flux1__onetrainer-legacy", "longcat-image__diffusers"), ("flux", "longcat-image")
    ),
    "kolors__diffusers": ("sdxl", "kolors"),
}
"""Listings that name no family and whose layers are the same in several."""


@cache
def tool(name: str) -> LoRA:
    return read(TOOLS[name]["keys"], TOOLS[name]["metadata"], name)


def read(keys: dict[str, Any], metadata: dict[str, str], name: str = "x", **options: Any) -> LoRA:
    tensors = {key: Held(np.broadcast_to(np.array(1, numpy_dtype(d)), shape)) for key, (d, shape) in keys.items()}
    return from_tensors(tensors, metadata, name, **options)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tools_file_is_of_its_family_or_said_to_be_of_one_of_several(name: str) -> None:
    lora = tool(name)

    assert lora.families == ALIKE.get(name, (TOOLS[name]["family"],))
    assert not lora.extras


def pairs() -> list[tuple[str, str]]:
    """Every two files of one family; LoKr's factors that are whole would make LoRAs of full rank."""
    names = [name for name in TOOLS if "lokr" not in name]
    return [(a, b) for a, b in combinations(names, 2) if TOOLS[a]["family"] == TOOLS[b]["family"]]


@pytest.mark.parametrize(("first", "second"), pairs())
def test_two_tools_files_of_one_family_merge_module_by_module(first: str, second: str) -> None:
    loras = [tool(first), tool(second)]

    planned = lm.plan(loras, weights=[1, 0.5])

    assert planned.architecture in loras[0].families
    assert set(planned.steps) == {module for lora in loras for module in lora}
    shared = [module for module in loras[0] if module in loras[1]]
    apart = [m for m in shared if len({lora.layout(m).shape for lora in loras}) > 1]
    assert apart == ([WIDENED[first, second]] if (first, second) in WIDENED else [])
    assert planned.steps.keys() <= ARCHITECTURES[planned.architecture].shapes.keys()


WIDENED = {
    ("flux1__bfl-control", "flux1__onetrainer-comfy"): "transformer.x_embedder",
    ("wan21-i2v-14b__lightx2v", "wan21-t2v-14b__lightx2v"): "transformer.patch_embedding",
    ("wan21-t2v-14b__lightx2v", "wan22-i2v-a14b__lightx2v"): "transformer.patch_embedding",
}
"""Pairs of files of which one is for a model with more channels, and the layer that has them."""

FIRST = r"(blocks|layers|refiner)[._]0[._]"
"""Matches the keys of the first blocks."""


def filled(name: str, seed: int, keys: str = FIRST) -> LoRA:
    """The keys of a listing that match a pattern, those of the first blocks by default, with random values."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(1 << 20, dtype=np.float32)
    chosen = {k: v for k, v in TOOLS[name]["keys"].items() if re.search(keys, k)}
    tensors = {
        key: Held(np.resize(pool[rng.integers(1 << 10) :], shape) if shape else np.float32(2))
        for key, (_, shape) in chosen.items()
    }
    return from_tensors(tensors, TOOLS[name]["metadata"], name, architecture=TOOLS[name]["family"])


def effect(lora: LoRA, module: str) -> np.ndarray:
    """What ΔW of a module does to a random vector, in float64."""
    layer = lora[module]
    if isinstance(layer, LowRank):
        up, down = (np.asarray(factor, np.float64) for factor in layer.factors())
        down = down.reshape(len(down), -1)
        vector = np.random.default_rng(1).standard_normal(down.shape[1])
        return np.asarray(up.reshape(len(up), -1) @ (down @ vector))
    delta = np.asarray(layer.delta(), np.float64)
    return np.asarray(delta.reshape(len(delta), -1) @ np.random.default_rng(1).standard_normal(delta[0].size))


NEIGHBOURS = [
    (a, b)
    for a, b in pairs()
    if (a, b) in set(pairwise(TOOLS)) and "unet" not in ARCHITECTURES[TOOLS[a]["family"]].model
]


@pytest.mark.parametrize(("first", "second"), NEIGHBOURS)
def test_a_merge_of_two_tools_files_is_the_sum_of_both(first: str, second: str) -> None:
    loras = [filled(first, 1), filled(second, 2)]

    merged = lm.merge(loras, weights=[0.5, -2])

    for module in {module for lora in loras for module in lora}:
        if merged.layout(module).bias_only or merged.layout(module).kind == "set":
            continue
        wanted = sum(w * effect(lora, module) for w, lora in zip((0.5, -2), loras, strict=True) if module in lora)
        assert relative_error(effect(merged, module), np.asarray(wanted)) <= 1e-5


@pytest.mark.parametrize(("first", "second"), WIDENED)
def test_a_narrow_input_layer_is_added_to_the_first_channels_of_a_wide_one(first: str, second: str) -> None:
    module = WIDENED[first, second]
    some = r"img_in|patch_embedding|double_blocks\.0\.img_attn\.proj\.|\bblocks\.0\.self_attn\.q\."
    loras = [filled(name, seed, some) for seed, name in enumerate((first, second))]
    deltas = [np.asarray(lora[module].delta(), np.float64) for lora in loras]
    channels = max(delta.shape[1] for delta in deltas)

    merged = lm.merge(loras, weights=[0.5, -2])

    padded = [np.pad(d, [(0, 0), (0, channels - d.shape[1]), *[(0, 0)] * (d.ndim - 2)]) for d in deltas]
    assert relative_error(merged[module].delta(), 0.5 * padded[0] - 2 * padded[1]) <= 1e-6


@pytest.mark.parametrize(
    ("module", "native", "shapes"),
    [
        ("time_embed.linear", "adaln_single.linear", [(24576, 4096), (36864, 4096)]),
        ("audio_time_embed.linear", "audio_adaln_single.linear", [(12288, 2048), (18432, 2048)]),
    ],
)
def test_a_weight_that_grew_with_a_version_of_the_model_is_of_the_family_in_both_sizes(
    module: str, native: str, shapes: list[tuple[int, int]]
) -> None:
    attention = TOOLS["ltx2__diffusers"]["keys"]
    made = [sized(f"transformer.{module}", *shape) for shape in shapes]

    older, newer = (read(attention | keys, {}) for keys in made)

    assert older.families == newer.families == ("ltx2",)
    assert [lora.layout(f"transformer.{module}").shape for lora in (older, newer)] == shapes
    assert not older.notes + newer.notes
    assert f"diffusion_model.{native}.lora_B.weight" in newer.state_dict("comfyui")
    assert read(sized(f"transformer.{module}", shapes[1][0] + 8, shapes[1][1]) | attention, {}).families == ()
    with pytest.raises(MergeError, match=re.escape(module)):
        lm.plan([older, newer])


def sized(module: str, rows: int, columns: int) -> dict[str, Any]:
    return {f"{module}.lora_A.weight": ("F32", (4, columns)), f"{module}.lora_B.weight": ("F32", (rows, 4))}


def test_files_of_two_families_are_refused() -> None:
    for first, second in pairwise(TOOLS):
        if not set(tool(first).families) & set(tool(second).families):
            with pytest.raises(MergeError, match="different model families"):
                lm.plan([tool(first), tool(second)])


@pytest.mark.parametrize("said", ["wan2.1/lora", "Flux.2-klein-9b/lora", "stable-cascade", "sdxl_base_v1-0"])
def test_metadata_that_names_another_family_is_refused_with_both_sides(said: str) -> None:
    keys = TOOLS["flux1__diffusers"]["keys"]
    with pytest.raises(FamilyError, match=rf"{said}.*FLUX\.1 \(flux\).*--architecture flux"):
        read(keys, {"modelspec.architecture": said})

    assert read(keys, {"modelspec.architecture": said}, architecture="flux").families == ("flux",)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if label_of(name)])
def test_every_label_is_read_as_its_family(name: str) -> None:
    label = label_of(name)

    assert label

    for value in (*label.specifications, *(f"{s}/lora" for s in label.specifications)):
        assert name in named({"modelspec.architecture": value}).families
    for value in label.versions:
        assert name in named({"ss_base_model_version": value}).families
    assert named({ARCHITECTURE: name, "modelspec.architecture": "chroma"}).families == (name,)


def test_families_can_be_copied_and_pickled() -> None:
    for family in ARCHITECTURES.values():
        for again in (pickle.loads(pickle.dumps(family)), copy.deepcopy(family)):
            assert (again.name, again.native, again.also_native) == (family.name, family.native, family.also_native)


def test_the_longest_word_names_the_family() -> None:
    assert named({"modelspec.architecture": "flux-1-dev/lora"}).families == ("flux",)
    assert named({"modelspec.architecture": "Flux.2-klein-9b/lora"}).families == ("flux2-klein-9b",)
    assert named({"ss_base_model_version": "hunyuan_video_1_5"}).families == ("hunyuanvideo15",)
    assert named({"ss_base_model_version": "pony-v7"}).families == ("auraflow",)
    assert named({"ss_base_model_version": "flux3"}).families == ("flux3",)
    assert named({"ss_base_model_version": "zeta_chroma"})[1:] == ((), "Zeta-Chroma")
    assert named({"ss_base_model_version": "my swan"})[1:] == ((), "")


@cache
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", HERE.parent / "tools" / "fuzz.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=4, max_size=4), st.binary(min_size=2, max_size=60))
def test_some_layers_of_a_family_are_never_those_of_another(chosen: bytes, layers: bytes) -> None:
    fuzz().fuzz_family(chosen + layers)


@pytest.mark.parametrize("module", ["transformer.transformer_blocks.0.attn.to_q", "transformer.x_embedder"])
def test_several_families_are_asked_for_where_their_names_differ(module: str) -> None:
    keys = {
        f"{module}.lora_A.weight": ("F32", (2, 64 if "x_" in module else 3072)),
        f"{module}.lora_B.weight": ("F32", (3072, 2)),
    }
    lora = read(keys, {})

    assert {"flux", "chroma"} <= set(lora.families)
    if "to_q" in module:
        assert "qwen-image" in lora.families
        with pytest.raises(FamilyError, match="say which it is, --architecture flux or qwen-image"):
            lora.state_dict("comfyui")
    assert read(keys, {}, architecture="flux").state_dict("comfyui")
    assert list(lora.state_dict()) == list(keys)


def factors(
    stem: str, out: int = 16, columns: int = 16, seed: int = 0, kernel: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((2, columns, *kernel), dtype=np.float32)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": rng.standard_normal((out, 2), dtype=np.float32)}


def flattened(lora: LoRA) -> dict[str, np.ndarray]:
    return {module.replace(".", "_"): np.asarray(lora[module].delta()) for module in lora}


SPELLINGS = {
    "musubi": "lora_unet_blocks_0_mix_to_q",
    "videox-fun": "lora_unet__blocks_0_mix_to_q",
    "comfyui": "diffusion_model.blocks.0.mix.to_q",
    "compiled": "_orig_mod.diffusion_model.blocks.0.mix.to_q",
    "diffsynth": "blocks.0.mix.to_q",
}


@pytest.mark.parametrize("first", SPELLINGS)
@pytest.mark.parametrize("second", SPELLINGS)
def test_one_module_of_an_unknown_family_is_one_however_tools_spell_it(first: str, second: str) -> None:
    loras = [lm.load(factors(SPELLINGS[name], seed=i)) for i, name in enumerate((first, second))]

    merged = lm.merge(loras, weights=[1.0, -0.5])

    assert {lora.architecture for lora in loras} == {None}
    (module,) = merged
    wanted = loras[0][next(iter(loras[0]))].delta() - 0.5 * loras[1][next(iter(loras[1]))].delta()
    assert relative_error(merged[module].delta(), wanted) <= 1e-6
    again = lm.load(merged.state_dict())
    assert relative_error(again[next(iter(again))].delta(), wanted) <= 1e-6


@pytest.mark.parametrize(
    "prefix", ["lora_transformer_blocks_{}_to_k", "lycoris_blocks_{}_to_k", "transformer.blocks.{}.block.to_k"]
)
def test_two_files_of_one_tool_merge_and_go_back_to_its_own_names(prefix: str) -> None:
    files = [{k: v for i in range(2) for k, v in factors(prefix.format(i), seed=seed + i).items()} for seed in (0, 5)]

    written = lm.merge([lm.load(file) for file in files], weights=[1, 1]).state_dict()
    small = lm.resize(lm.load(files[0]), rank=1).state_dict()

    for keys in (written, small):
        assert {key.rpartition(".lora_")[0] or key.removesuffix(".alpha") for key in keys} == {
            prefix.format(i) for i in range(2)
        }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("diffusion_model.blocks.0.attention.qkv", "diffusion_model.blocks.0.attention.to_q"),
        ("lora_unet_blocks_0_attention_qkv", "lora_unet_blocks_0_attention_to_q"),
        ("lora_unet_blocks_0_attention_q", "diffusion_model.blocks.0.attention.to_q"),
    ],
)
def test_one_weight_under_two_tools_names_is_refused(first: str, second: str) -> None:
    shared = factors("diffusion_model.blocks.0.mlp.fc")
    loras = [
        lm.load(factors(first, out=48 if "qkv" in first else 16) | flat(shared, first)),
        lm.load(factors(second) | flat(shared, second)),
    ]

    with pytest.raises(MergeError, match="two tools' names of the same weights"):
        lm.plan(loras)


def flat(keys: dict[str, np.ndarray], like: str) -> dict[str, np.ndarray]:
    if "." in like:
        return keys
    return {k.replace("diffusion_model.blocks.0.mlp.fc", "lora_unet_blocks_0_mlp_fc"): v for k, v in keys.items()}


def test_two_modules_that_would_have_one_name_are_not_written() -> None:
    lora = lm.load(factors("diffusion_model.blocks.0.a_b") | factors("diffusion_model.blocks.0.a.b", seed=1))

    with pytest.raises(
        DialectError, match=r"a_b and transformer\.blocks\.0\.a\.b would both be called lora_unet_blocks_0_a_b"
    ):
        lora.state_dict("kohya")
    assert len(lora.state_dict("comfyui")) >= 4


def test_no_way_out_is_offered_that_the_file_can_not_go() -> None:
    lora = lm.load(factors("lora_unet_blocks_0_mix"))

    with pytest.raises(DialectError, match="keep the file's own dialect, kohya, or name the model family if it is one"):
        lora.state_dict("comfyui")
    assert lora.state_dict("kohya")
    with pytest.raises(OptionError, match=r"isn't a LoRA of sdxl: of 1 layers 0 have a name in it"):
        lm.load(factors("lora_unet_blocks_0_mix"), architecture="sdxl")


def test_components_and_blocks_of_unknown_families_are_told_from_any_spelling() -> None:
    flat, dotted = (lm.load(factors(SPELLINGS[name])) for name in ("musubi", "comfyui"))

    assert {next(iter(lora)).partition(".")[0] for lora in (flat, dotted)} == {"transformer"}
    assert {block(next(iter(lora))) for lora in (flat, dotted)} == {"blocks.0"}
    text = lm.load(factors("lora_te2_layers_0_mlp"))
    assert next(iter(text)) == "text_encoder_2.layers_0_mlp"


def test_a_file_of_exchanged_factors_is_refused() -> None:
    keys = factors("transformer.blocks.0.attn.to_q", out=64, columns=64)
    (_, down), (_, up) = keys.items()
    swapped = {"transformer.blocks.0.attn.to_q.lora_A.weight": up, "transformer.blocks.0.attn.to_q.lora_B.weight": down}

    with pytest.raises(LayerError, match=r"rank 64 on a weight of \(2, 2\).*exchanged"):
        lm.load(swapped)
    oblong = {"x.0.lora_A.weight": np.ones((32, 2), np.float32), "x.0.lora_B.weight": np.ones((2, 64), np.float32)}
    with pytest.raises(LayerError, match="disagree on the rank"):
        lm.load(oblong)


@pytest.mark.parametrize("stem", ["lora_unet_mixer_0_conv", "unet.down_blocks.1.resnets.1.conv1"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_a_kernel_that_one_file_stores_as_a_matrix_is_summed(stem: str, kernel: tuple[int, int]) -> None:
    if stem.startswith("unet") and kernel == (1, 1):
        stem = "unet.down_blocks.1.resnets.0.conv_shortcut"
    out, columns = (640, 320 if "shortcut" in stem else 640) if stem.startswith("unet") else (16, 8)
    shaped, other = factors(stem, out, columns, 1, kernel), factors(stem, out, columns, 2, kernel)
    matrix = {k: v.reshape(len(v), -1) for k, v in other.items()}

    merged = lm.merge([lm.load(matrix), lm.load(shaped)], weights=[0.5, 2.0])

    (module,) = merged
    assert merged.layout(module).shape == (out, columns, *kernel)
    wanted = sum(
        w * k[f"{stem}.lora_up.weight"] @ k[f"{stem}.lora_down.weight"].reshape(2, -1)
        for w, k in ((0.5, other), (2.0, shaped))
    )
    assert relative_error(np.asarray(merged[module].delta()).reshape(out, -1), wanted) <= 1e-6


OWN = {"modelspec.architecture": "flux-1-dev/lora"}
PARTS = (("attn.to_q",), ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.to_k", "proj_mlp"))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_parts_of_a_model_with_its_own_widths_are_joined_at_those(parts: tuple[str, ...], dialect: str) -> None:
    place = f"transformer.{'single_' if 'proj_mlp' in parts else ''}transformer_blocks.0."
    keys = {
        k: v for i, p in enumerate(parts) for k, v in factors(place + p, 128 if p == "proj_mlp" else 32, 32, i).items()
    }
    lora = lm.load(keys, metadata=OWN)

    again = lm.load(lora.state_dict(dialect), metadata=OWN)

    assert lora.families == again.families == ("flux",)
    for module, wanted in flattened(lora).items():
        assert relative_error(flattened(again)[module], wanted) <= 1e-6


@pytest.mark.parametrize(
    ("name", "told"),
    [("hunyuanvideo__musubi", "flux"), ("wan21-t2v-14b__aitoolkit", "wan-5b"), ("flux1__sdscripts", "chroma")],
)
def test_a_family_that_another_fits_better_is_not_believed(name: str, told: str) -> None:
    with pytest.raises(OptionError, match=f"isn't a LoRA of {told}.*{TOOLS[name]['family']}"):
        read(TOOLS[name]["keys"], {}, architecture=told)


def test_a_name_for_several_sizes_means_the_one_that_fits() -> None:
    for name in ("wan21-t2v-1.3b__musubi", "wan21-t2v-14b__aitoolkit", "wan22-ti2v-5b__diffsynth"):
        assert read(TOOLS[name]["keys"], {}, architecture="wan").families == (TOOLS[name]["family"],)


def test_shapes_that_a_stated_family_can_not_have_are_not_taken_for_its() -> None:
    fused = factors("lora_unet_double_blocks_0_img_mlp_0", out=24, columns=4)

    assert lm.load(fused, metadata=OWN).architecture is None
    assert (
        lm.load(factors("lora_unet_double_blocks_0_img_mlp_0", out=16, columns=4), metadata=OWN).architecture == "flux"
    )


def test_one_lora_in_two_tools_spellings_is_the_same(tmp_path: Path) -> None:
    keys = {k: v for i in range(3) for k, v in factors(f"diffusion_model.blocks.{i}.mix.to_q", seed=i).items()}
    dotted = lm.load(keys)
    flat = lm.load(dotted.state_dict("kohya"))

    found = lm.compare([dotted, flat])

    assert [row.block for row in found.rows] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found.total.pairs[0, 1].cosine == pytest.approx(1.0)


def test_the_family_that_is_chosen_takes_no_other_away() -> None:
    """Of LoRAs that may be for the same two families the merge may be for both, whichever each names first."""
    first = replace(random_lora("sdxl", rank=1), alike=("ssd-1b",))
    second = replace(first, architecture="ssd-1b", alike=("sdxl",))

    (one, other), chosen = of_one_family([first, second])

    assert (one.families, other.families) == (("sdxl", "ssd-1b"), ("sdxl", "ssd-1b"))
    assert alike([one, other], chosen) == ("ssd-1b",)


ROOT = HERE.parent / "src" / "loramerge"
TABLE = ROOT / "files" / "architectures" / "table.py"
SAMPLE = ROOT / "cli" / "doctor.py"
"""It makes a LoRA of some family, to try a merge."""


def strings(path: Path) -> set[str]:
    """The strings in a file's code, without its comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in alone
    }


def test_a_family_is_one_entry_and_one_json() -> None:
    models = {path.stem for path in (ROOT / "files" / "architectures" / "models").glob("*.json")}
    used = {one.model for a in ARCHITECTURES.values() for one in (a, *a.companions)}
    names = {*ARCHITECTURES, *ARCHITECTURES.aliases}

    elsewhere = {path: found for path in ROOT.rglob("*.py") if (found := names & strings(path))}

    assert used == models
    assert elsewhere.keys() - {TABLE, SAMPLE} == set()


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "stable-cascade"])
def test_a_random_lora_has_layers_of_every_family(architecture: str) -> None:
    lora = random_lora(architecture, rank=1)

    assert lora.architecture == architecture
    assert any(layout.kind == "lora" for layout in lora.layouts.values())


def text_only(family: str, dialect: str, component: str) -> dict[str, np.ndarray]:
    lora = random_lora(family, only=lambda module, shape: module.startswith(f"{component}.") and "_proj" in module)
    return {key: tensor.numpy() for key, tensor in lora.state_dict(dialect).items()}


@pytest.mark.parametrize("dialect", ["kohya", "comfyui", "diffusers", "diffusers-peft", "peft"])
@pytest.mark.parametrize(
    ("family", "component"), [("sdxl", "text_encoder"), ("sdxl", "text_encoder_2"), ("flux", "text_encoder")]
)
def test_a_whole_text_encoder_rules_out_no_model_that_has_others_too(family: str, component: str, dialect: str) -> None:
    assert family in lm.load(text_only(family, dialect, component)).families


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pefts_adapter_of_a_text_encoder_is_of_every_family_that_has_it(family: str) -> None:
    new = text_only(family, "peft", "text_encoder")
    old = {key.replace(".encoder.", ".text_model.encoder."): value for key, value in new.items()}

    assert {"sd15", "sdxl", "flux"} <= {*lm.load(new).families} & {*lm.load(old).families}


def test_an_encoder_that_is_another_of_each_family_has_no_name_until_the_family_is_said(tmp_path: Path) -> None:
    """kohya's third text encoder is T5: diffusers' second one of FLUX.1, and the third of SD 3."""
    lora = random_lora(
        "sd3-medium", only=lambda module, shape: module.startswith("text_encoder_3.") and "block.0.layer.0.S" in module
    )
    keys = {key: tensor.numpy() for key, tensor in lora.state_dict("kohya").items()}

    with pytest.raises(FamilyError, match=r"may be for FLUX\.1"):
        lm.save(lm.load(keys), tmp_path / "a.safetensors", dialect="diffusers-peft")

    said = lm.load(keys, architecture="sd3-medium")
    assert set(lm.load(lm.save(said, tmp_path / "a.safetensors", dialect="diffusers-peft"))) == set(lora)
