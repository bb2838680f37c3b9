"""The page of ``loramerge ui`` behind its layout: what it takes, what it shows, and that its command and Python are true."""

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.cli.app import real
from loramerge.cli.merge import Options
from loramerge.cli.page import serving, shown, work
from loramerge.cli.page.choices import ALLOW, EXACT, FITS, Choices
from loramerge.cli.page.serving import serve
from loramerge.cli.page.shelf import Shelf, listed
from loramerge.errors import MissingExtraError, OptionError
from loramerge.layers import Norm
from loramerge.merging import Recipe
from loramerge.merging.methods import METHODS
from small import small


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    lm.save(small(seed=1, alpha=2.0, dtype="float16"), folder / "person.safetensors", dialect="kohya")
    lm.save(small(seed=2, rank=6), folder / "-a 'jersey'.safetensors", dialect="diffusers-peft")
    return folder


@pytest.fixture
def shelf(tmp_path: Path, loras: Path) -> Shelf:
    """Both LoRAs, uploaded as gradio does it: each in a folder of its own, under a name that it made."""
    return filled(tmp_path, loras)


def filled(root: Path, loras: Path) -> Shelf:
    (root / "page").mkdir()
    shelf = Shelf(root / "page")
    for name in ("person.safetensors", "-a 'jersey'.safetensors"):
        assert work.added(shelf, [upload(shelf, (loras / name).read_bytes(), name)]) == ""
    return shelf


def upload(shelf: Shelf, data: bytes, name: str) -> tuple[str, str]:
    folder = shelf.root / f"hash{len(list(shelf.root.iterdir()))}"
    folder.mkdir()
    (folder / "uploaded").write_bytes(data)
    return str(folder / "uploaded"), name


def stored(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def typed(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", ""))


def silent(done: int, total: int) -> None:
    pass


STATES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "as it opens": ({}, {}),
    "weights by block": ({"to": "kohya"}, {"": -0.35, "MID": 0.25, "text_encoder": 0.0}),
    "a rule and a rank": ({"rule": "l2", "fit": "rank", "limit": "3", "to": "diffusers-peft", "dtype": "bfloat16"}, {}),
    "a method with options": (
        {"method": "dare", "options": "density=0.5 seed=3", "fit": "largest rank", "exclude": "text_encoder*"},
        {},
    ),
    "a size of the file in another dialect": (
        {"fit": "size", "limit": "60kB", "to": "comfyui", "dtype": "float16"},
        {},
    ),
    "an error": ({"fit": "error", "limit": "20%"}, {"": 0.5}),
    "allowed": ({"to": "diffusers", "allow": list(ALLOW), "rule": "sum"}, {}),
}


@pytest.mark.parametrize("state", STATES)
def test_the_command_and_the_python_make_the_bytes_that_are_downloaded(
    state: str, shelf: Shelf, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, weights = STATES[state]
    blocks = set(shelf.entries[0].blocks)
    shelf.entries[0].weight = weights.pop("", 1.0) if "" in weights else 1.0
    shelf.entries[0].of_blocks = {block: weight for block, weight in weights.items() if block in blocks}
    monkeypatch.chdir(loras)

    found = work.merged(work.Choice(shelf, dict(given)), silent)

    assert found.file is not None, found.plan
    wanted = found.file.read_bytes()
    written = Path("merged.safetensors")
    assert found.command.startswith("loramerge merge ")
    real("merge").main(typed(found.command)[2:], standalone_mode=False)
    assert written.read_bytes() == wanted
    written.unlink()
    exec(found.python, {})
    assert written.read_bytes() == wanted
    assert Recipe.of(lm.open(written)).to_toml()


def test_a_shell_runs_the_command_whatever_the_files_are_called(
    shelf: Shelf, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = work.merged(work.Choice(shelf, {"fit": "rank", "limit": "3", "exclude": "*attn1* *conv1"}), silent)
    (tmp_path / "loramerge").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loramerge "$@"\n')
    (tmp_path / "loramerge").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    subprocess.run(["sh", "-c", found.command], cwd=loras, check=True, capture_output=True)

    assert found.file is not None
    assert (loras / "merged.safetensors").read_bytes() == found.file.read_bytes()
    (loras / "merged.safetensors").unlink()


def test_the_plan_is_that_of_a_dry_run(
    shelf: Shelf, loras: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(loras)
    found = work.looked_at(work.Choice(shelf, {"fit": "rank", "limit": "3"}))

    real("merge").main([*typed(found.command)[2:], "--dry-run"], standalone_mode=False)

    printed = capsys.readouterr().out
    assert found.plan == shown.lines(printed.rstrip("\n").replace("./-a", "-a"))


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd",
        "../secret.safetensors",
        "link.safetensors",
        "~/x.safetensors",
        "loras/../secret.safetensors",
        "",
        "\0",
    ],
)
def test_paths_outside_the_given_folders_are_refused(
    text: str, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "page").mkdir()
    (tmp_path / "secret.safetensors").write_bytes((loras / "person.safetensors").read_bytes())
    (tmp_path / "loras" / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    monkeypatch.chdir(tmp_path / "loras")
    shelf = Shelf(tmp_path / "page", [tmp_path / "loras"])

    told = work.named(shelf, text)
    assert "given on the command line" in told
    assert (
        "given on the command line"
        in work.planned(work.Choice(filled(tmp_path / "loras", loras), {"base": text or "/"}), silent).plan
    )
    assert shelf.entries == []


def test_a_path_in_a_given_folder_is_read_as_it_is_typed(
    loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(loras.parent)
    shelf = Shelf(tmp_path, [Path(loras.name)])

    assert [work.named(shelf, text) for text in listed(shelf.folders)] == ["", ""]
    assert [entry.name for entry in shelf.entries] == listed(shelf.folders)
    shelf.remove(shelf.entries[0].name)
    assert (loras / "person.safetensors").exists()


def test_an_upload_is_taken_from_where_uploads_are_alone(shelf: Shelf, loras: Path) -> None:
    outside = loras / "person.safetensors"
    inside = next(path for path in stored(shelf.home))

    for path in (outside, inside, shelf.root / "none"):
        assert "was not uploaded here" in work.added(shelf, [(str(path), "x.safetensors")])
    assert outside.exists()
    assert inside.exists()


HOSTILE: dict[str, bytes] = {
    "empty.safetensors": b"",
    "huge.safetensors": (1 << 62).to_bytes(8, "little") + b"{}",
    "text.safetensors": b"not a LoRA" * 100,
    "pickle.pt": b"\x80\x04\x95" + b"cos\nsystem\n(S'touch /tmp/x'\ntR.",
    "../../up.safetensors": b"x",
    "..\\..\\up.safetensors": b"x",
    "<script>alert(1)</script>.safetensors": b"x",
    "<img src=x onerror=alert(1)>": b"x",
    "..": b"x",
    "": b"x",
    "n" * 300 + ".safetensors": b"x",
    "nul\0.safetensors": b"x",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_a_message_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    shelf = Shelf(tmp_path / "page")

    told = work.added(shelf, [upload(shelf, HOSTILE[name], name)])

    assert told.startswith("<p class='problem'")
    assert "<script" not in told
    assert "<img" not in told
    assert "Traceback" not in told
    assert str(tmp_path) not in told
    assert stored(tmp_path) == []
    assert list(shelf.root.iterdir()) == [shelf.home]
    assert list(shelf.home.iterdir()) == []


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{key}.lora_down.weight": np.full((4, 1280), np.nan, np.float32),
        f"{key}.lora_up.weight": np.ones((1280, 4), np.float32),
    }
    save_file(tensors, tmp_path / "nan.safetensors")
    shelf = Shelf(tmp_path)

    assert "NaN" in work.added(shelf, [upload(shelf, (tmp_path / "nan.safetensors").read_bytes(), "nan.safetensors")])
    assert shelf.entries == []


def test_markup_in_a_file_is_shown_as_text(tmp_path: Path, loras: Path) -> None:
    evil = "<script>alert(1)</script>"
    lm.save(small(seed=1), tmp_path / "a.safetensors", dialect="kohya")
    lm.edit_metadata(tmp_path / "a.safetensors", {"modelspec.trigger_phrase": evil, "ss_sd_model_name": evil})
    shelf = Shelf(tmp_path)

    assert (
        work.added(
            shelf, [upload(shelf, (tmp_path / "a.safetensors").read_bytes(), f"{evil.replace('/', '')}.safetensors")]
        )
        == ""
    )

    card, found = shelf.entries[0].card, work.looked_at(work.Choice(shelf))
    assert card.count("&lt;script&gt;") >= 3
    assert "<script" not in card + found.plan


def test_a_name_that_is_there_already_is_refused_and_the_first_file_stays(shelf: Shelf, loras: Path) -> None:
    before = stored(shelf.root)

    assert "is on the page already" in work.added(
        shelf, [upload(shelf, (loras / "person.safetensors").read_bytes(), "person.safetensors")]
    )
    assert stored(shelf.root) == before


def test_results_replace_each_other_and_everything_is_deleted(shelf: Shelf) -> None:
    files = [work.merged(work.Choice(shelf, {"to": to}), silent).file for to in ("kohya", "comfyui")]

    assert len(stored(shelf.home)) == 3
    assert files[1] is not None
    assert files[1].exists()
    shelf.remove(shelf.entries[0].name)
    assert len(stored(shelf.home)) == 2
    shelf.clear()
    assert list(shelf.root.glob("tmp*")) == []


@pytest.mark.parametrize(
    "given",
    [
        {"method": "os:system"},
        {"rule": "/etc/x.safetensors"},
        {"to": "nobody"},
        {"fit": "rank", "limit": "many"},
        {"fit": "size", "limit": ""},
        {"fit": "elsewhere"},
        {"method": "ties", "options": "density=2"},
        {"exclude": "*"},
        {"method": "slerp", "rule": "nothing"},
    ],
)
def test_a_wrong_choice_is_a_message(given: dict[str, Any], shelf: Shelf) -> None:
    for found in (work.looked_at(work.Choice(shelf, given)), work.merged(work.Choice(shelf, given), silent)):
        assert found.plan.startswith("<p class='problem'")
        assert "foresee" not in found.plan
        assert found.file is None


def test_what_nobody_foresaw_is_a_message_too(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "plan_lines", lambda *_: 1 / 0)

    assert "ZeroDivisionError" in work.looked_at(work.Choice(shelf)).plan
    assert "Traceback" in capsys.readouterr().err


def test_a_comparison_is_advice_a_picture_and_a_table(shelf: Shelf) -> None:
    told = work.compared(shelf, "", silent)

    assert lm.compare([entry.path for entry in shelf.entries]).total is not None
    assert "conflict" in told
    assert "data:image/png" in told or "loramerge[plots]" in told
    shelf.remove(shelf.entries[0].name)
    assert "two LoRAs or more" in work.compared(shelf, "", silent)


def test_every_method_and_way_to_choose_the_rank_has_a_command() -> None:
    options = {param.name for param in real("merge").params}
    assert {name for name in FITS.values() if name} | set(ALLOW.values()) <= options
    for method in METHODS:
        choices = Choices(names=("a", "b"), weights=("1", "1"), method=method)
        assert (f"--method {METHODS[method].name}" in choices.command) == (method != "linear")
    assert (
        "--exclude '*attn1*' --exclude conv_in"
        in Choices(names=("a",), weights=("1",), exclude="*attn1* conv_in").command
    )
    assert EXACT in FITS
    assert Options.__dataclass_fields__["method"]


def test_the_page_leaves_out_what_the_dialect_cannot_hold_if_it_may(tmp_path: Path) -> None:
    lora = small()
    norm = Norm(w_norm=np.ones(320, np.float32))
    held = replace(lora, layouts={**lora.layouts, "unet.conv_norm_out": norm})
    data = lm.save(held, tmp_path / "norm.safetensors", dialect="kohya").read_bytes()
    (tmp_path / "page").mkdir()
    shelf = Shelf(tmp_path / "page")
    work.added(shelf, [upload(shelf, data, "norm.safetensors")])

    found = work.merged(work.Choice(shelf, {"to": "diffusers", "allow": list(ALLOW)}), silent)

    assert found.file is not None, found.plan
    assert set(lm.load(found.file)) == set(lora)


def test_a_layout_of_peft_that_cannot_be_downloaded_is_refused_with_the_plan(tmp_path: Path) -> None:
    folder = lm.save(small(), tmp_path / "adapter", dialect="peft")
    (tmp_path / "page").mkdir()
    shelf = Shelf(tmp_path / "page", [tmp_path])
    assert work.named(shelf, str(folder)) == ""

    seen, made = work.looked_at(work.Choice(shelf)), work.merged(work.Choice(shelf), silent)

    assert "layout is a directory" in seen.plan
    assert (made.plan, made.file) == (seen.plan, None)
    assert work.merged(work.Choice(shelf, {"to": "kohya"}), silent).file is not None


def test_what_readers_ignore_is_a_note_and_not_left_out(shelf: Shelf) -> None:
    found = work.merged(work.Choice(shelf, {"to": "comfyui"}), silent)

    assert "  note: diffusers loads nothing" in found.plan
    assert "left out" not in found.plan


@pytest.mark.skipif(sys.platform != "linux", reason="names elsewhere are text")
def test_a_name_that_no_browser_can_be_sent_is_not_offered(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "\udcff.safetensors").touch()

    assert listed([tmp_path]) == [str(tmp_path / "a.safetensors")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"upload_limit": "much"}, "--max-upload is a number of bytes, such as 150MB or 143MiB; got 'much'"),
        ({"host": "no.such.host.invalid"}, "Can't listen at no.such.host.invalid, port 0: "),
        ({"folders": [""]}, "The path is empty"),
        ({"folders": ["nowhere"]}, "nowhere is not a folder"),
    ],
)
def test_what_the_page_cannot_be_served_with_is_refused(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "need", lambda *packages: None)

    with pytest.raises(lm.LoRAMergeError, match=re.escape(message)):
        serve(**{"port": 0, **given})


def test_a_port_that_is_taken_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "need", lambda *packages: None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OptionError, match="in use"):
        serve(port=taken.getsockname()[1])


def test_a_base_that_is_elsewhere_is_not_asked_to_be_dropped(shelf: Shelf) -> None:
    told = work.planned(work.Choice(shelf, {"base": "sdxl.safetensors"}), silent).plan

    assert "Can&#x27;t read the base model" in told
    assert "drop" not in told
    assert "Hub" not in told


def test_help_and_the_page_behind_its_layout_need_no_gradio() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['loramerge', 'ui', '--help']\n"
        "import loramerge.cli.page.work, loramerge.cli\nloramerge.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0
    assert "--max-upload" in done.stdout


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(MissingExtraError, match=r"pip install 'loramerge\[ui\]'"):
        serve([tmp_path], port=0)
