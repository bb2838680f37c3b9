"""The answer for a file and a reader is the table's, and unknown where the table is silent."""

import json
import lzma
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loramerge as lm
from listings import config, filled, listing
from loramerge.cli.app import app
from loramerge.cli.check import as_sarif
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.dialects import readers
from loramerge.files.dialects.readers import DROPS, READERS
from loramerge.files.storage.reader import SafetensorsFile
from loramerge.layers import BiasOnly
from loramerge.testing import random_lora
from small import MODULES, small

ROOT = Path(__file__).parents[1]
MEASURED: dict[str, Any] = json.loads((ROOT / "docs/reference/readers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("dialect", "reader", "verdict"),
    [
        ("kohya", "comfyui", "yes"),
        ("kohya", "a1111", "yes"),
        ("kohya", "diffusers", "yes"),
        ("kohya", "kohya", "yes"),
        ("kohya", "peft", "no"),
        ("diffusers", "comfyui", "in part"),
        ("diffusers", "diffusers", "yes"),
        ("diffusers", "a1111", "no"),
        ("comfyui", "comfyui", "yes"),
        ("comfyui", "diffusers", "no"),
        ("peft", "peft", "yes"),
        ("peft", "comfyui", "no"),
        ("peft", "diffusers", "unknown"),
    ],
)
def test_a_lora_of_sdxl_loads_where_its_dialect_is_read(dialect: str, reader: str, verdict: str) -> None:
    assert lm.check(random_lora("sdxl", dialect=dialect), reader).verdict == verdict


@pytest.mark.parametrize("reader", READERS)
def test_every_row_of_the_table_is_about_a_reader_that_can_be_asked_for_or_only_noted(reader: str) -> None:
    rows = [drop for drop in DROPS if drop.reader == READERS[reader].title]

    assert rows
    assert {dialect for drop in rows for dialect in drop.dialects} <= set(READERS[reader].dialects)


def test_a_row_that_stops_a_reader_leaves_nothing() -> None:
    lora = replace(random_lora("sdxl", kind="loha"), dialect="kohya")

    found = lm.check(lora, "diffusers")

    assert found.verdict == "no"
    assert set(found.ignored) == set(lora)
    assert lm.check(lora, "comfyui").verdict == "yes"


def test_a_fault_of_the_table_changes_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = random_lora("sdxl", dialect="diffusers")
    monkeypatch.setattr(readers, "DROPS", tuple(drop for drop in DROPS if drop.what != "the attention of UNets"))

    assert lm.check(lora, "comfyui").verdict == "yes"


@pytest.mark.parametrize(
    ("lora", "reader", "reason"),
    [
        (replace(random_lora("sdxl"), dialect="omi"), "comfyui", "dialect omi"),
        (replace(random_lora("sdxl"), architecture=None), "comfyui", "family is unknown"),
        (random_lora("cogview4", dialect="diffusers-peft"), "comfyui", "family cogview4"),
        (random_lora("cogview4"), "kohya", "family cogview4"),
        (small("flux", modules=("transformer.x_embedder",)), "kohya", "layers of blocks only"),
        (replace(random_lora("qwen-image"), dialect="comfyui", style="kohya"), "diffusers", "spelling"),
    ],
)
def test_where_the_table_is_silent_nothing_is_said(lora: lm.LoRA, reader: str, reason: str) -> None:
    found = lm.check(lora, reader)

    assert found.verdict == "unknown"
    assert any(reason in text for text in found.unknown)
    assert "can't tell" in str(found)


def test_a_file_for_two_families_is_read_alike_or_the_answer_is_unknown() -> None:
    lora = replace(random_lora("hidream", dialect="kohya"), alike=("flux2-dev",))

    assert lm.check(lora, "diffusers").unknown
    assert not lm.check(replace(random_lora("sdxl"), alike=("ssd-1b",)), "diffusers").unknown


def test_a_scale_in_the_header_is_not_read_by_all(tmp_path: Path) -> None:
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": np.ones((4, 3072), "f"), f"{module}.lora_B.weight": np.ones((3072, 4), "f")}
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 1})}
    save_file(tensors, tmp_path / "a.safetensors", header)

    found = lm.check(tmp_path / "a.safetensors", "comfyui")

    assert any("4 times as strong" in finding.what for finding in found.findings)
    whole = random_lora("flux").select("transformer").state_dict("diffusers-peft")
    save_file({key: tensor.numpy() for key, tensor in whole.items()}, tmp_path / "b.safetensors", header)
    found = lm.check(lm.open(tmp_path / "b.safetensors", architecture="flux"), "comfyui")
    assert found.verdict == "in part"
    assert f"in part, 0 of {found.layers} layers load at the strength that the file says" in str(found)
    assert not lm.check(tmp_path / "a.safetensors", "diffusers").findings


def test_pefts_folder_needs_its_configuration(tmp_path: Path) -> None:
    folder = lm.save(random_lora("sdxl"), tmp_path / "adapter", dialect="peft")
    assert lm.check(folder, "peft").verdict == "yes"

    for file in folder.rglob("adapter_config.json"):
        file.unlink()

    assert lm.check(folder / "adapter_model.safetensors", "peft").verdict == "no"


def test_modules_that_do_not_fit_the_base_are_found(tmp_path: Path) -> None:
    lora = small(modules=MODULES["sdxl"][:3])
    shapes = {module: layer.shape for module, layer in lora.layouts.items()}
    first, second, _ = shapes
    shapes[first] = (shapes[first][0], shapes[first][1] + 8)
    del shapes[second]
    weights = {f"{m.removeprefix('unet.')}.weight": np.zeros(s, np.float16) for m, s in shapes.items()}
    folder = tmp_path / "base" / "unet"
    folder.mkdir(parents=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")

    found = lm.check(lora, "comfyui", base=tmp_path / "base")

    assert found.verdict == "in part"
    assert found.ignored == (second, first)
    assert lm.check(lora, "comfyui").verdict == "yes"


def test_a_bias_fits_a_module_of_its_length(tmp_path: Path) -> None:
    proj, size = "unet.down_blocks.1.attentions.0.proj_in", (640, 640)
    folder = tmp_path / "base" / "unet"
    folder.mkdir(parents=True)
    weights = {f"{proj.removeprefix('unet.')}.weight": np.zeros(size, np.float16)}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")

    def found(length: int) -> list[str]:
        lora = replace(small(), layouts={proj: BiasOnly(diff_b=np.ones(length, np.float32))})
        return [finding.what for finding in lm.check(lora, "comfyui", base=tmp_path / "base").findings]

    assert not any("another shape" in what for what in found(640))
    assert any("another shape" in what for what in found(320))


LISTED = {
    "sdxl_kohya_lora_r16a8": {"comfyui": "yes", "a1111": "yes", "diffusers": "yes", "kohya": "yes"},
    "sdxl_lycoris_loha": {"comfyui": "yes", "diffusers": "no"},
    "sdxl_diffusers_peft_te": {"comfyui": "in part", "diffusers": "yes", "a1111": "no"},
    "sd3m_kohya_te12": {"comfyui": "yes", "a1111": "no", "diffusers": "no"},
    "flux_bfl_diffusion_model_peft": {"comfyui": "yes", "diffusers": "unknown", "peft": "no"},
    "flux_xlabs": {"comfyui": "unknown", "diffusers": "unknown"},
}


@pytest.mark.parametrize(("name", "reader"), [(name, reader) for name, found in LISTED.items() for reader in found])
def test_real_files_keys_are_answered(name: str, reader: str) -> None:
    lora = lm.open(filled(name), metadata=listing(name).get("metadata") or {}, config=config(name).get(""))

    assert lm.check(lora, reader).verdict == LISTED[name][reader]


READ: dict[str, dict[str, list[int]]] = json.loads((ROOT / "tests/data/read.json").read_text(encoding="utf-8"))
FILES = [(reader, name) for reader, found in READ.items() for name in found]


@pytest.fixture(scope="module")
def tools() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lzma.decompress((ROOT / "tests/data/families.json.xz").read_bytes()))
    return found


@pytest.mark.parametrize(("reader", "name"), FILES)
def test_as_many_layers_are_said_to_load_as_the_reader_took(reader: str, name: str, tools: dict[str, Any]) -> None:
    found = tools[name] if name in tools else listing(name)
    shapes = {key: entry[1] if name in tools else entry for key, entry in found["keys"].items()}
    tensors = {key: np.broadcast_to(np.float32(1), shape) for key, shape in shapes.items()}
    taken, layers = READ[reader][name]

    said = lm.check(lm.open(tensors, metadata=found.get("metadata") or {}), reader)

    assert said.layers == layers
    assert said.verdict == "unknown" or said.layers - len(said.ignored) == taken


@pytest.mark.parametrize("name", ["ComfyUI", "diffusers"])
def test_a_family_that_was_not_run_is_not_known(name: str) -> None:
    (reader,) = [reader for reader in READERS.values() if reader.title == name]

    run = set(MEASURED[name]["rows"])

    known = {a.name for a in ARCHITECTURES.values() if reader.families(a)}
    assert known - run <= {a.name for a in ARCHITECTURES.values() if any("no loader" in u.does for u in a.unread)}


def test_kohyas_trainers_were_run_with_every_family_that_is_known() -> None:
    run = {*MEASURED["sd-scripts"]["rows"], *MEASURED["musubi-tuner"]["rows"]}
    named = {a.name for a in ARCHITECTURES.values() if READERS["kohya"].families(a)}

    assert named - run <= {"sdxl-refiner", "ssd-1b", "segmind-vega", "wan-5b"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramerge", "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {d: lm.save(random_lora("sdxl"), folder / f"{d}.safetensors", dialect=d) for d in ("kohya", "diffusers")}


def test_the_exit_code_is_the_answer(files: dict[str, Path]) -> None:
    one, part = files["kohya"], files["diffusers"]

    assert run(one, "--for", "comfyui").returncode == 0
    shown = run(one, part, "--for", "comfyui")
    assert shown.returncode == 1
    assert "kohya.safetensors in ComfyUI: yes" in shown.stdout
    assert "ignores the attention of UNets: 8 of 16 layers" in shown.stdout
    assert run(one, "--for", "word").returncode == 1


def test_several_readers_are_all_answered_for(files: dict[str, Path]) -> None:
    shown = run(files["kohya"], "--for", "a1111", "--for", "peft")

    assert "kohya.safetensors in A1111: yes" in shown.stdout
    assert "kohya.safetensors in PEFT: no" in shown.stdout
    assert shown.returncode == 1


def test_the_answer_is_data_and_sarif(files: dict[str, Path]) -> None:
    (found,) = json.loads(run(files["diffusers"], "--for", "comfyui", "--json").stdout)
    sarif = json.loads(run(files["diffusers"], "--for", "comfyui", "--sarif").stdout)

    assert (found["verdict"], found["layers"], len(found["ignored"])) == ("in part", 16, 8)
    (result,) = sarif["runs"][0]["results"]
    assert sarif["version"] == "2.1.0"
    assert (result["ruleId"], result["level"]) == ("ignored", "warning")
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].endswith("diffusers.safetensors")


def test_a_file_that_can_not_be_read_hides_no_other_answer(files: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    asked = (bad, files["kohya"], "--for", "comfyui", "--for", "a1111")

    shown = run(*asked)
    rows = json.loads(run(*asked, "--json").stdout)
    results = json.loads(run(*asked, "--sarif").stdout)["runs"][0]["results"]

    assert shown.returncode == 1
    assert shown.stdout.count("kohya.safetensors in") == 2
    assert shown.stderr.count(f"Error: {bad}") == 1
    assert [(row["reader"], row["verdict"]) for row in rows] == [
        ("ComfyUI", "unreadable"), ("A1111", "unreadable"), ("ComfyUI", "yes"), ("A1111", "yes"),
    ]  # fmt: skip
    assert {(result["ruleId"], result["level"]) for result in results} == {("unreadable", "error")}


def test_a_base_is_opened_once_for_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = small(modules=MODULES["sdxl"][:3])
    unet = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    unet.parent.mkdir(parents=True)
    save_file({f"{m.removeprefix('unet.')}.weight": np.zeros(lora[m].shape, np.float16) for m in lora}, unet)
    opened: list[str] = []
    before = SafetensorsFile.__init__

    def counted(self: SafetensorsFile, path: Any, *rest: Any) -> None:
        opened.append(str(path))
        before(self, path, *rest)

    monkeypatch.setattr(SafetensorsFile, "__init__", counted)
    file = lm.save(lora, tmp_path / "a.safetensors")
    asked = ["check", str(file), "--for", "a1111", "--for", "comfyui", "--base", str(tmp_path / "base")]

    result = CliRunner().invoke(app, asked)

    assert result.exit_code == 0, result.output
    assert (opened.count(str(unet)), opened.count(str(file))) == (1, 1)


def test_a_folder_stands_for_its_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    several, adapter = tmp_path / "run", lm.save(random_lora("sdxl"), tmp_path / "adapter", dialect="peft")
    several.mkdir()
    for step in (1000, 500):
        lm.save(random_lora("sdxl"), several / f"person-{step}.safetensors")

    answers = json.loads(run(several, adapter, "--for", "peft", "--json").stdout)

    assert [Path(each["file"]).stem for each in answers] == ["person-500", "person-1000", "adapter"]
    with pytest.raises(lm.errors.FileError, match=re.escape(f"takes several, {several / '*.safetensors'}")):
        lm.open(several)


def test_what_is_unknown_is_a_note_with_its_own_code() -> None:
    found = lm.check(random_lora("sdxl", dialect="peft"), "diffusers")

    (result,) = as_sarif([("a", "diffusers", found)])["runs"][0]["results"]

    assert (result["ruleId"], result["level"]) == ("unknown", "note")


def test_the_hook_of_pre_commit_runs_the_command() -> None:
    text = (ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8")

    assert "entry: loramerge check" in text
    assert "args: [--for, comfyui]" in text


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("my jérsey #1.safetensors", "my%20j%C3%A9rsey%20%231.safetensors"),
        ("hf://org/repo@v2/a.safetensors", "hf://org/repo@v2/a.safetensors"),
    ],
)
def test_code_scanning_gets_a_files_name_as_a_uri(file: str, uri: str) -> None:
    (result,) = as_sarif([(file, "diffusers", lm.errors.FileError("gone"))])["runs"][0]["results"]

    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri
