"""Protocols: what the presets say, and what is refused."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramerge.errors import LoRAMergeError
from virtual_tryon.study import command, reading
from virtual_tryon.study.protocol import Protocol, Setting
from virtual_tryon.study.published import SETS, TABLE, published
from virtual_tryon.world import SCENES, prompt

EXAMPLE = Path(reading.__file__).parents[1]


def changed(change: Callable[[dict[str, Any]], Any]) -> Protocol:
    data = tomllib.loads(reading.preset("mini").read_text())
    change(data)
    return reading.protocol(data, "mini", Path(), "mini.toml")


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_the_presets_hold_the_studys_protocol(name: str) -> None:
    found = reading.read(reading.preset(name))

    assert [setting.name for setting in found.of(["study"])] == list(TABLE)
    assert found.prompts["study"] == tuple(prompt(scene) for scene in SCENES)
    assert [concept.name for concept in found.shown("study")] == list(SETS)
    training = found.training
    assert (training.rank, training.steps, training.batch_size, training.seed) == (8, 400, 1, 42)
    assert training.flip == (name == "paper")  # the drawn world faces one way
    assert {m.name: (m.own, m.other, m.borrowed) for m in found.mixed} == {
        "profile_mixed": ("profile", "barca", 3),
        "barca_mixed": ("barca", "profile", 3),
    }


def test_the_tutorial_counts_the_pictures_of_the_paper_preset() -> None:
    found = reading.read(reading.preset("paper"))
    page = (EXAMPLE.parents[1] / "docs" / "tutorial" / "study.md").read_text()

    for family, more in (("study", ""), ("methods", " more"), ("weights", " more")):
        settings = found.of([family])
        seeds, prompts = settings[0].seeds or found.drawing.seeds, len(found.prompts["study"])
        count = len(settings) * prompts * seeds
        assert f"| {len(settings)} × {prompts} × {seeds} | {count}{more} |" in page


def test_the_paper_preset_trains_as_the_study_did() -> None:
    training = reading.read(reading.preset("paper")).training

    assert (training.resolution, training.learning_rate, training.alpha) == (512, 1e-4, None)


def test_published_numbers_stand_in_one_place() -> None:
    told = [f"{value:.4f}".lstrip("0") for row in TABLE.values() for value in row]
    files = [file for ending in ("*.py", "*.toml") for file in EXAMPLE.rglob(ending) if file.name != "published.py"]

    assert not [(file, value) for file in files for value in told if value in file.read_text()]


def test_the_study_has_no_number_for_other_settings_and_sets() -> None:
    assert published("l2", "profile") == 0.5986
    assert published("sum", "profile") is None
    assert published("l2", "scarf") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(bse={}), "mini.toml: unknown key 'bse'. Did you mean 'base'?"),
        (lambda d: d["base"].pop("model"), "mini.toml: base: model is missing"),
        (lambda d: d["training"].update(stpes=3), "mini.toml: training: unknown key 'stpes'. Did you mean 'steps'?"),
        (lambda d: d["training"].update(steps="many"), "mini.toml: training: steps: got 'many', text, wanted a whole"),
        (lambda d: d["drawing"].update(seeds=0), "drawing: seeds: got 0, wanted a number from 1"),
        (lambda d: d["data"].update(truths=0), "data: truths: got 0, wanted a number from 1"),
        (lambda d: d["data"].update(source="web"), "data: source: got 'web', wanted 'drawn' or 'folders'"),
        (lambda d: d["settings"][1].update(loras=["profil"]), "setting profile: no set is called 'profil'"),
        (lambda d: d["settings"][1].update(name="none"), "Two settings are called 'none'"),
        (lambda d: d["settings"][3].update(weights=[0.5]), "setting weighted: 1 weights for 2 LoRAs"),
        (lambda d: d["settings"][3].update(name="../../b"), "name '../../b': files and folders are called by it"),
        (lambda d: d["concepts"][0].update(name="a/b"), "name 'a/b': files and folders are called by it"),
        (lambda d: d["settings"][3].update(name=".."), "The name '..': files"),
        (lambda d: d["settings"][3].update(weights="l1"), "settings, entry 4: weights: got 'l1'"),
        (lambda d: d["settings"][3].update(method="tise"), "settings, entry 4: .*'tise'. Did you mean 'ties'"),
        (lambda d: d["settings"][3].update(options={"density": 1}), "settings, entry 4: .*density"),
        (lambda d: d["settings"][3].update(prompts="hats"), "no prompts are called 'hats'"),
        (lambda d: d["settings"][3].update(learn="magic"), "learn: got 'magic', wanted one of ziplora, lsq"),
        (lambda d: d["settings"][8]["options"].update(stpes=3), "settings, entry 9: Unknown setting 'stpes'"),
        (
            lambda d: d["settings"][8].update(weights=[1.0, 0.5]),
            "entry 9: weights has no effect on a merge that is lea",
        ),
        (lambda d: d["settings"][9]["options"].update(rigde=1), "settings, entry 10: Unknown option 'rigde'"),
        (lambda d: d["prompts"].update(other=["A cat."]), "The prompts other call no concept by its identifier"),
        (lambda d: d["concepts"][0].update(crop=[0.5, 0, 0.2, 1]), "left below right"),
        (lambda d: d["mixed"][0].update(own="cat"), "No concept is called 'cat'"),
        (lambda d: d["sensitivity"].update(loras=["barca"]), "sensitivity: loras: got 1, wanted two"),
        (lambda d: d["settings"][7].update(family="more"), "unknown family 'more'. Known: study, methods"),
        (lambda d: d["sensitivity"].update(values=[]), "sensitivity: values: got"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(LoRAMergeError, match=re.escape(message).replace(r"\.\*", ".*")):
        changed(change)


def test_a_lora_of_ones_own_is_a_setting_by_its_file_or_its_name_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").touch()
    data = tomllib.loads(reading.preset("mini").read_text())
    data["concepts"][0]["lora"] = "someone/a-person"
    data["settings"] = [
        {"name": "a", "lora": "./mine.safetensors"},
        {"name": "b", "lora": "mine.safetensors"},
        {"name": "c", "loras": ["profile", "someone/a-lora", "hf://someone/b@main"], "weights": [1, 1, 1]},
        {
            "name": "d",
            "loras": ["profile", "barca"],
            "method": "loramerge.merging.methods.linear:linear",
            "options": {},
        },
    ]
    found = reading.protocol(data, "mine", tmp_path, "mine.toml")

    file = str((tmp_path / "mine.safetensors").resolve())
    assert [s.loras for s in found.settings[:3]] == [
        (file,),
        (file,),
        ("profile", "someone/a-lora", "hf://someone/b@main"),
    ]
    assert found.concepts[0].lora == "someone/a-person"
    assert (found.settings[3].method, found.settings[3].options) == ("loramerge.merging.methods.linear:linear", {})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"loras": ["mine"]},
            "no set is called 'mine'. Sets: .* A LoRA of your own is named by its file, such as './mine",
        ),
        ({"lora": "./a.safetensors", "loras": ["profile"]}, "lora and loras: wanted one of them"),
        (
            {"loras": ["profile", "./a.safetensors"], "learn": "lsq"},
            "Way out: lora = … in [[concepts]], and the concept's",
        ),
        ({"lora": "./a.safetensors", "weights": [1, 1]}, "2 weights for 1 LoRAs"),
    ],
)
def test_a_wrong_lora_of_ones_own_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(LoRAMergeError, match=re.escape(message).replace(r"\.\*", ".*")):
        changed(lambda d: d["settings"].append({"name": "mine", **setting}))


def test_a_missing_lora_of_ones_own_is_told_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = reading.preset("demo").read_text().replace("../weights", str(EXAMPLE / "weights"))
    (tmp_path / "mine.toml").write_text(text + '[[settings]]\nname = "mine"\nlora = "./mine.safetensors"\n')

    assert command.main(["run", "--protocol", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "The protocol's LoRA of a setting: No such file" in told
    assert "mine.safetensors" in told
    assert not (tmp_path / "out").exists()


def test_an_unknown_preset_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("a = ")

    with pytest.raises(LoRAMergeError, match=r"Unknown preset 'maxi'\. Available: demo, mini, paper"):
        reading.preset("maxi")
    with pytest.raises(LoRAMergeError, match=r"broken\.toml is not TOML"):
        reading.read(tmp_path / "broken.toml")
    with pytest.raises(LoRAMergeError, match=r"Can't open .*missing\.toml"):
        reading.read(tmp_path / "missing.toml")


def test_paths_of_models_start_from_the_protocol() -> None:
    found = reading.read(reading.preset("mini"))

    assert Path(found.base.model) == (EXAMPLE / "weights" / "base").resolve()
    assert reading.read(reading.preset("paper")).base.model == "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize(("name", "passes"), [("blend", 3), ("regions", 1), ("clora", 4), (None, 1)])
def test_a_composition_costs_its_passes_for_the_setting_s_loras(name: str | None, passes: int) -> None:
    assert Setting(name="x", label="x", loras=("a", "b", "c"), compose=name).passes == passes
