"""What a file's header says: true, in the words that other tools go by, and of all that it was made from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

import loramerge as lm
from loramerge import LoRA
from loramerge.cli.app import app
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.architectures.labels import ARCHITECTURE
from loramerge.files.triggers import LONGEST, MOST, PHRASE, PHRASES, joined, tags, words
from loramerge.testing import KINDS, random_layer, random_lora
from small import WRITTEN, small

FILES = [name for name in WRITTEN if name != "peft"]


def header(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "np") as file:
        return dict(file.metadata() or {})


def saved(lora: LoRA, path: Path, dialect: str = "kohya", **metadata: str) -> Path:
    return lm.save(replace(lora, metadata=metadata), path, dialect=dialect)


def a1111(said: Mapping[str, str]) -> str:
    """As extensions-builtin/Lora/network.py of A1111 1.10.1 decides."""
    if said.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if said.get("ss_v2") == "True" else "SD1" if said else "Unknown"


def sdnext(said: Mapping[str, str]) -> str:
    """As modules/lora/network.py of SD.Next begins."""
    begins = {"sd_v1": "sd1", "sdxl": "xl", "sd3": "sd3", "flux": "f1", "qwen": "qwen"}
    version = said.get("ss_base_model_version", "").lower()
    return next((name for begin, name in begins.items() if version.startswith(begin)), "")


READ_AS = {
    "sd15": ("SD1", "sd1"),
    "sd21": ("SD2", ""),
    "sdxl": ("SDXL", "xl"),
    "ssd-1b": ("SDXL", "xl"),
    "sd3-medium": ("SD1", "sd3"),
    "flux": ("SD1", "f1"),
    "qwen-image": ("SD1", "qwen"),
}


@pytest.mark.parametrize("family", READ_AS)
@pytest.mark.parametrize(
    "before", [{}, {"ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.architecture": "x"}]
)
def test_other_tools_are_told_the_family(family: str, before: dict[str, str], tmp_path: Path) -> None:
    said = header(saved(random_lora(family), tmp_path / "a.safetensors", **before))

    assert (a1111(said), sdnext(said)) == READ_AS[family]


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("dialect", FILES)
def test_every_file_says_its_family(family: str, dialect: str, tmp_path: Path) -> None:
    denoiser = ARCHITECTURES[family].denoiser
    if (dialect == "kohya-diffusers" and denoiser != "unet") or (
        dialect in ("kohya", "comfyui") and ARCHITECTURES[family].native is None
    ):
        return
    first = next(m for m, s in ARCHITECTURES[family].shapes.items() if m.startswith(denoiser) and len(s) == 2)
    lora = LoRA(
        name="x",
        architecture=family,
        dialect="kohya",
        layouts={first: random_layer(ARCHITECTURES[family].shapes[first])},
    )

    assert header(saved(lora, tmp_path / "a.safetensors", dialect))[ARCHITECTURE] == family


@pytest.mark.parametrize(
    "said",
    [
        {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"},
        {"ss_base_model_version": "flux1-kontext"},
    ],
)
def test_what_is_said_more_exactly_stays(said: dict[str, str], tmp_path: Path) -> None:
    found = header(saved(random_lora("flux"), tmp_path / "a.safetensors", **said))

    assert {key: found[key] for key in said} == said


def test_marks_of_another_format_go_and_provenance_stays(tmp_path: Path) -> None:
    marks = {"ot_branch": "omi_format", "modelspec.architecture": "Flux.1-dev/lora", "text_encoder:0:rank": "4"}
    kept = {"ot_revision": "abc", "software": '{"name": "OneTrainer"}'}

    found = header(saved(random_lora("flux"), tmp_path / "a.safetensors", **marks, **kept, ss_output_name="old"))

    assert "ot_branch" not in found
    assert found["modelspec.architecture"] == "flux-1/lora"
    assert not any(key.endswith(":rank") for key in found)
    assert "ss_output_name" not in found
    assert {key: found[key] for key in kept} == kept


MODULES = {
    "lora": "networks.lora", "tucker": "lycoris.kohya", "loha": "lycoris.kohya", "lokr": "lycoris.kohya",
    "dora": "lycoris.kohya", "full": "lycoris.kohya",
}  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_the_network_module_is_one_that_has_such_layers(kind: str, tmp_path: Path) -> None:
    conv = {"unet.down_blocks.0.resnets.0.conv1"}
    lora = random_lora("sdxl", kind=kind, only=lambda module, shape: module in conv)

    found = header(
        saved(lora, tmp_path / "a.safetensors", ss_network_module="wrong", ss_network_args='{"algo": "oft"}')
    )

    assert found["ss_network_module"] == MODULES[kind]
    algorithm = json.loads(found.get("ss_network_args", "{}")).get("algo")
    assert algorithm == {"lora": None, "tucker": "lora", "dora": "lora"}.get(kind, kind)


@pytest.mark.parametrize(
    ("family", "module"),
    [("flux", "lora_flux"), ("sd3-medium", "lora_sd3"), ("qwen-image", "lora_qwen_image"), ("sd21", "lora")],
)
def test_the_network_module_is_the_familys(family: str, module: str, tmp_path: Path) -> None:
    assert header(saved(random_lora(family), tmp_path / "a.safetensors"))["ss_network_module"] == f"networks.{module}"


def test_the_dimension_is_that_of_the_factors(tmp_path: Path) -> None:
    found = header(saved(small(kind="loha", rank=3, alpha=2.0), tmp_path / "a.safetensors"))

    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", "2")


BLOCK = "transformer.transformer_blocks.0.attn"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("full") and "tucker" not in kind])
@pytest.mark.parametrize("beside", ["lora", "loha", "lokr"])
def test_every_layer_of_a_kohya_file_has_an_alpha(kind: str, beside: str, tmp_path: Path) -> None:
    shapes = ARCHITECTURES["flux"].shapes
    made = {f"{BLOCK}.to_q": beside, f"{BLOCK}.to_k": beside, f"{BLOCK}.to_out.0": kind}
    layers = {module: random_layer(shapes[module], kind=k) for module, k in made.items()}
    lora = LoRA(name="x", architecture="flux", dialect="comfyui", layouts=layers)

    keys = lm.save(lora, tmp_path / "a.safetensors", dialect="kohya")

    with safetensors.safe_open(keys, "np") as file:
        stems = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
        assert {f"{stem}.alpha" for stem in stems} <= set(file.keys())


PARENTS = [
    (
        "a.safetensors",
        {"modelspec.trigger_phrase": "woody", "ss_tag_frequency": '{"10_woody": {"woody": 9, "hat": 2}}'},
    ),
    ("b.safetensors", {"ss_tag_frequency": '{"1_x": {"buzz": 7}, "2_y": {"buzz": 1}}'}),
    ("a.safetensors", {"modelspec.trigger_phrase": "rex"}),
    ("c.safetensors", {}),
]


def test_a_merge_has_the_words_of_all_its_parents() -> None:
    found = joined(PARENTS)

    assert found["modelspec.trigger_phrase"] == "woody, rex"
    assert json.loads(found["ss_tag_frequency"]) == {"a + b": {"woody": 9, "buzz": 8, "hat": 2}}
    assert joined([("c", {}), ("d", {})]) == {}


def test_checkpoints_of_one_run_have_its_words_once() -> None:
    checkpoints = [(f"a-{i}.safetensors", PARENTS[0][1]) for i in range(5)]

    assert json.loads(joined(checkpoints)["ss_tag_frequency"]) == {"a-0": {"woody": 9, "hat": 2}}
    assert joined(checkpoints)["modelspec.trigger_phrase"] == "woody"


@pytest.mark.parametrize("key", PHRASES)
def test_a_phrase_is_found_wherever_a_tool_puts_it(key: str) -> None:
    assert joined([("a", {key: "woody"}), ("b", {PHRASE: "rex"})])[PHRASE] == "woody, rex"


def test_what_a_merge_keeps_of_its_parents_words_is_bounded() -> None:
    many = {"ss_tag_frequency": json.dumps({"x": {f"tag {i}": i for i in range(5 * MOST)}})}
    long = [(str(i), {**many, "modelspec.trigger_phrase": f"{i}" * 300}) for i in range(20)]

    found = joined(long)

    assert sum(map(len, json.loads(found["ss_tag_frequency"]).values())) <= MOST
    assert len(found["modelspec.trigger_phrase"]) <= LONGEST


STRANGE = ["{", "[1]", '{"a": 1}', '{"a": {"b": 1e999}}', '{"a": {"b": "x"}}', "[" * 100_000, '{"a": {"b": NaN}}']


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_tags_of_strangers_are_none(text: str) -> None:
    assert not tags({"ss_tag_frequency": text})
    assert words({"ss_tag_frequency": text}) == []


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def inspected(path: Path) -> list[str]:
    return [
        line.partition("trigger words:")[2].strip() for line in run("inspect", path).splitlines() if "trigger" in line
    ]


def test_inspect_shows_the_words_of_each_parent_however_often_it_was_merged(tmp_path: Path) -> None:
    files = [saved(small(seed=i), tmp_path / name, **said) for i, (name, said) in enumerate([PARENTS[0], PARENTS[1]])]
    both = lm.save(lm.merge(files), tmp_path / "both.safetensors")
    third = saved(small(seed=3), tmp_path / "r.safetensors", **PARENTS[2][1])
    three = lm.save(lm.merge([both, third]), tmp_path / "three.safetensors")
    resized = lm.save(lm.resize(three, rank=2), tmp_path / "small.safetensors")
    alone = lm.save(lm.resize(files[0], rank=2), tmp_path / "alone.safetensors")

    assert inspected(both) == ["woody (a.safetensors); buzz (b.safetensors)"]
    assert (
        inspected(three) == inspected(resized) == ["woody (a.safetensors); buzz (b.safetensors); rex (r.safetensors)"]
    )
    assert inspected(alone) == ["woody"]
    assert json.loads(run("inspect", three, "--json"))["trigger_words"] == ["woody", "buzz", "rex"]


def test_a_merge_in_which_one_alone_has_a_weight_has_the_entries_of_that_one(tmp_path: Path) -> None:
    mine = {"modelspec.title": "A", "modelspec.trigger_phrase": "woody", "modelspec.author": "me"}
    files = [saved(small(), tmp_path / "a.safetensors", **mine)]
    files.append(saved(small(seed=1), tmp_path / "b.safetensors", **{"modelspec.title": "B"}))

    found = header(lm.save(lm.merge(files, weights=[1, 0]), tmp_path / "c.safetensors"))

    assert mine.items() <= found.items()
    assert json.loads(found["loramerge"])["inputs"][1]["metadata"]["modelspec.title"] == "B"


def test_only_a_merge_says_that_it_was_merged(tmp_path: Path) -> None:
    file = saved(small(), tmp_path / "a.safetensors", **{"modelspec.title": "A"})
    resized = lm.save(lm.resize(file, rank=2), tmp_path / "b.safetensors")

    assert "modelspec.merged_from" not in header(resized)
    assert "merged from" not in run("inspect", resized)
    assert "made from" in run("inspect", resized)
    assert header(lm.save(lm.merge([file, file]), tmp_path / "c.safetensors"))["modelspec.merged_from"] == "A, A"


@pytest.mark.parametrize(
    ("said", "shown"),
    [({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, ""), ({"ss_base_model_version": "sdxl_base_v1-0"}, ""), ({"ss_sd_model_name": "pony.safetensors"}, "pony.safetensors")],
)  # fmt: skip
def test_a_base_model_is_a_model(said: dict[str, str], shown: str, tmp_path: Path) -> None:
    assert (
        json.loads(run("inspect", saved(small(), tmp_path / "a.safetensors", **said), "--json"))["base_model"] == shown
    )


MODEL = {"base_model_name_or_path": "stabilityai/sdxl", "revision": "v1", "task_type": "FEATURE_EXTRACTION"}


def adapter(folder: Path, seed: int, **config: Any) -> Path:
    lm.save(small(seed=seed), folder, dialect="peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **MODEL, **config}))
    return folder


def said_of_the_model(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: config[key] for key in MODEL}


@pytest.mark.parametrize(
    "make",
    [lambda a, b: lm.merge([a, b]), lambda a, b: lm.resize(a, rank=2), lambda a, b: lm.load(a).exclude("*conv1")],
    ids=["merge", "resize", "exclude"],
)
def test_pefts_configuration_keeps_what_it_says_of_the_model(
    make: Callable[[Path, Path], LoRA], tmp_path: Path
) -> None:
    made = make(adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2))

    assert said_of_the_model(lm.save(made, tmp_path / "c", dialect="peft")) == MODEL


def test_pefts_configuration_says_only_what_all_inputs_say(tmp_path: Path) -> None:
    inputs = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, revision="v2")]

    assert said_of_the_model(lm.save(lm.merge(inputs), tmp_path / "c", dialect="peft")) == {**MODEL, "revision": None}
    assert not any(said_of_the_model(lm.save(lm.merge([inputs[0], small()]), tmp_path / "d", dialect="peft")).values())


QWEN = "transformer.transformer_blocks.0.attn.to_q"
STYLES = {"sdxl": "lora_down", "flux": "lora_down", "sd3-medium": "lora_A", "qwen-image": "lora_A"}


@pytest.mark.parametrize("family", STYLES)
def test_comfyuis_files_are_spelled_as_all_readers_of_the_family_want(family: str) -> None:
    lora = random_lora(
        family, alpha=2.0, only=lambda module, shape: module.endswith("s.0.attn.to_out.0") or "mid" in module
    )
    down = STYLES[family]

    keys = lora.state_dict("comfyui")

    assert all(key.split(".")[-2] in (down, {"lora_A": "lora_B"}.get(down, "lora_up")) for key in keys if "lora" in key)
    assert any(key.endswith(".alpha") for key in keys) == (down == "lora_down")
    again = lm.load(keys, architecture=family)
    for module in list(lora)[:2]:
        np.testing.assert_allclose(again[module].delta(), lora[module].delta(), rtol=1e-5, atol=1e-6)


def comfyui_file(style: str, family: str, seed: int) -> LoRA:
    stem = {
        "flux": "double_blocks.0.img_attn.proj",
        "unknown": "blocks.0.to_q",
        "qwen": "transformer_blocks.0.attn.to_q",
    }[family]
    ends = ("lora_A.weight", "lora_B.weight") if style == "lora_A" else ("lora_down.weight", "lora_up.weight")
    rng = np.random.default_rng(seed)
    arrays = rng.standard_normal((2, 3072), np.float32), rng.standard_normal((3072, 2), np.float32)
    return lm.load(
        {f"diffusion_model.{stem}.{end}": array for end, array in zip(ends, arrays, strict=True)}, dialect="comfyui"
    )


@pytest.mark.parametrize("family", ["flux", "unknown", "qwen"])
@pytest.mark.parametrize("style", ["lora_A", "lora_down"])
def test_a_merge_keeps_the_spelling_that_all_its_inputs_have(family: str, style: str) -> None:
    merged = lm.merge([comfyui_file(style, family, seed) for seed in range(2)])

    assert any(style in key for key in merged.state_dict("comfyui"))


def test_lokrs_tucker_cores_are_written_whole_for_comfyui() -> None:
    conv = "unet.down_blocks.0.resnets.0.conv1"
    lora = random_lora("sdxl", kind="lokr-tucker", alpha=3.0, only=lambda module, shape: module == conv)

    keys = lora.state_dict("comfyui")

    assert not any("lokr_t2" in key for key in keys)
    np.testing.assert_allclose(lm.load(keys)[conv].delta(), lora[conv].delta(), rtol=1e-5, atol=1e-5)
    assert any("lokr_t2" in key for key in lora.state_dict("kohya"))


def test_what_a_reader_leaves_out_is_said_when_a_file_is_written(tmp_path: Path) -> None:
    file = saved(
        small(kind="dora", modules=("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",)),
        tmp_path / "a.safetensors",
        "comfyui",
    )

    assert "diffusers ignores DoRA's magnitudes" in run(
        "convert", file, "-o", tmp_path / "b.safetensors", "--to", "kohya"
    )
    plain = [saved(small(seed=i), tmp_path / f"{i}.safetensors") for i in range(2)]
    assert "ComfyUI ignores" in run("merge", *plain, "-o", tmp_path / "c.safetensors", "--to", "diffusers")
    assert "ignores" not in run("merge", *plain, "-o", tmp_path / "d.safetensors", "--to", "kohya")
