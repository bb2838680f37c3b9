"""Strings in a header are changed in place, and every byte of the tensors stays."""

import base64
import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import loramerge as lm
from loramerge.files.thumbnails import COVERS, LARGEST, SIDE, THUMBNAIL
from small import small

PHRASE = "modelspec.trigger_phrase"


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes, read as the format says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lm.save(small(alpha=2.0, dtype="bfloat16"), tmp_path / "person.safetensors", dialect="kohya")


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A file that another writer laid out: tensors in no order, an odd header, a dtype that numpy lacks."""
    path = tmp_path / "strange.safetensors"
    entries = {
        "z": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [5, 8]},
        "a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [8, 8]},
    }
    text = json.dumps(entries, indent=1).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(8)))
    return path


@pytest.mark.parametrize("which", ["lora", "strange"])
def test_tensors_stay_bit_for_bit_where_they_were(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    header, data = parts(path)
    before = header.pop("__metadata__", {})

    lm.edit_metadata(path, {PHRASE: "woody ✨", "x" * 900: "y"})
    lm.edit_metadata(path, remove=["x" * 900])

    changed, same = parts(path)
    after = changed.pop("__metadata__")
    assert same == data
    assert list(changed.items()) == list(header.items())
    assert after == before | {PHRASE: "woody ✨"}
    assert (len(path.read_bytes()) - len(data)) % 8 == 0


def test_other_readers_read_what_was_written(lora: Path) -> None:
    lm.edit_metadata(lora, {PHRASE: "woody"}, remove=["format"])

    with safetensors.safe_open(lora, "pt") as file:
        assert file.metadata()[PHRASE] == "woody"
        assert "format" not in file.metadata()
    assert lm.read_metadata(lora) == dict(lm.open(lora).metadata)


def test_the_last_entry_can_go(strange: Path) -> None:
    lm.edit_metadata(strange, {"a": "b"})

    assert lm.edit_metadata(strange, remove=["a"]) == {} == lm.read_metadata(strange)


def test_no_change_leaves_the_file_alone(lora: Path) -> None:
    before = lora.read_bytes(), lora.stat().st_ino

    lm.edit_metadata(lora)
    lm.edit_metadata(lora, {"format": lm.read_metadata(lora)["format"]})

    assert (lora.read_bytes(), lora.stat().st_ino) == before


def test_a_link_is_not_replaced_by_a_copy(lora: Path, tmp_path: Path) -> None:
    link, before = tmp_path / "link.safetensors", lora.read_bytes()
    link.symlink_to(lora.name)

    with pytest.raises(lm.errors.FileError, match=r"is a link to person\.safetensors"):
        lm.edit_metadata(link, {PHRASE: "woody"})

    assert link.is_symlink()
    assert lora.read_bytes() == before
    assert lm.edit_metadata(link) == lm.read_metadata(lora)


def test_a_hash_that_would_be_wrong_is_dropped(lora: Path) -> None:
    hashes = {key: value for key, value in lm.read_metadata(lora).items() if key.startswith("sshs_")}
    assert len(hashes) == 2

    assert hashes.items() <= lm.edit_metadata(lora, {PHRASE: "woody"}).items()
    edited = lm.edit_metadata(lora, {"ss_tag_frequency": '{"a": {"b": 1}}'})

    assert "sshs_legacy_hash" not in edited
    assert edited["sshs_model_hash"] == hashes["sshs_model_hash"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": ["modelspec.titel"]}, "no entry 'modelspec.titel'"),
        ({"entries": {"ss_tag_frequency": "woody, hat"}}, "A1111 and Forge stop"),
        ({"entries": {"ss_tag_frequency": '{"a": {"b": "many"}}'}}, "A1111 and Forge stop"),
        ({"entries": {"modelspec.resolution": "large"}}, "1024x1024"),
        ({"entries": {THUMBNAIL: "woody.jpg"}}, "data URI"),
        ({"entries": {"a": 5}}, "a text under a key"),
        ({"entries": {"": "a"}}, "an empty key"),
        ({"entries": {"lora_adapter_metadata": "{}"}}, "part of the LoRA"),
        ({"entries": {"unet:0:rank": "4"}}, "part of the LoRA"),
    ],
)
def test_what_would_do_harm_is_refused(changes: dict[str, Any], message: str, lora: Path) -> None:
    before = lora.read_bytes()

    with pytest.raises(lm.errors.OptionError, match=message):
        lm.edit_metadata(lora, **changes)

    assert lora.read_bytes() == before


@pytest.mark.parametrize("key", ["loramerge.architecture", "modelspec.architecture"])
def test_a_family_that_the_layers_are_not_of_is_refused(key: str, lora: Path) -> None:
    lm.edit_metadata(lora, {"a": "b"}, remove=["loramerge.architecture"])

    with pytest.raises(lm.errors.OptionError, match=r"Wanted sdxl\b") as refused:
        lm.edit_metadata(lora, {key: "flux"})

    assert str(lora) in str(refused.value)
    assert lm.edit_metadata(lora, {key: "sdxl"})[key] == "sdxl"


@pytest.mark.parametrize("family", ["flux", "nonsense"])
def test_a_family_is_refused_where_none_has_the_names(family: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    factor = np.ones((4, 4), np.float32)
    safetensors.numpy.save_file(
        {"lora_unet_blocks_0_x.lora_down.weight": factor, "lora_unet_blocks_0_x.lora_up.weight": factor}, path
    )

    with pytest.raises(lm.errors.OptionError, match="no family that loramerge knows"):
        lm.edit_metadata(path, {"loramerge.architecture": family})


def test_a_file_without_layers_may_name_any_known_family(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, path)

    assert lm.edit_metadata(path, {"loramerge.architecture": "flux"})["loramerge.architecture"] == "flux"
    with pytest.raises(lm.errors.OptionError, match=r"Unknown architecture 'fluxx'\. Did you mean 'flux'"):
        lm.edit_metadata(path, {"loramerge.architecture": "fluxx"})


def test_the_scale_in_a_header_stays(tmp_path: Path) -> None:
    path = lm.save(small("flux", alpha=2.0), tmp_path / "a.safetensors", dialect="diffusers-peft")

    with pytest.raises(lm.errors.OptionError, match="part of the LoRA"):
        lm.edit_metadata(path, remove=["lora_adapter_metadata"])


@pytest.mark.parametrize("name", ["missing.safetensors", "text.safetensors", "."])
def test_what_is_no_such_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("woody")

    with pytest.raises(lm.errors.FileError):
        lm.edit_metadata(tmp_path / name, {"a": "b"})


def picture(path: Path, side: int, kind: str, mode: str = "RGB") -> Path:
    image = pytest.importorskip("PIL.Image")
    channels = {"RGB": 3, "RGBA": 4}[mode]
    noise = np.random.default_rng(0).integers(0, 255, (side, 2 * side, channels), dtype=np.uint8)
    image.fromarray(noise, mode).save(path, kind)
    return path


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_small_picture_is_taken_as_it_is(kind: str, lora: Path, tmp_path: Path) -> None:
    file = picture(tmp_path / "cover", 40, kind)

    found = lm.edit_metadata(lora, thumbnail=file)

    start, _, text = found[THUMBNAIL].partition(",")
    assert start == f"data:image/{kind};base64"
    assert base64.b64decode(text) == file.read_bytes()
    assert [base64.b64decode(cover) for cover in json.loads(found[COVERS])] == [file.read_bytes()]


@pytest.mark.parametrize(("kind", "mode"), [("png", "RGBA"), ("bmp", "RGB"), ("jpeg", "RGB")])
def test_another_picture_is_scaled_down(kind: str, mode: str, lora: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    found = lm.edit_metadata(lora, thumbnail=picture(tmp_path / "cover", 600, kind, mode))

    data = base64.b64decode(found[THUMBNAIL].partition(",")[2])
    assert image.open(io.BytesIO(data)).size == (SIDE, SIDE // 2)
    assert len(data) <= LARGEST


def test_what_is_no_picture_is_refused(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "cover.jpg").write_text("woody")

    with pytest.raises(lm.errors.FileError, match=r"cover\.jpg"):
        lm.edit_metadata(lora, thumbnail=tmp_path / "cover.jpg")


def test_a_merge_has_no_picture_of_its_parents(tmp_path: Path) -> None:
    files = [lm.save(small(seed=i), tmp_path / f"{i}.safetensors", dialect="kohya") for i in range(2)]
    for i, file in enumerate(files):
        lm.edit_metadata(file, {THUMBNAIL: f"data:image/jpeg;base64,{i}", COVERS: f'["{i}"]', PHRASE: f"word {i}"})

    both = lm.save(lm.merge(files), tmp_path / "both.safetensors")

    assert b"base64" not in both.read_bytes()
    assert lm.read_metadata(both)[PHRASE] == "word 0, word 1"


def run(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, with files of at most ``limit`` KiB if it is given."""
    command = [sys.executable, "-m", "loramerge", "metadata", *map(str, arguments)]
    limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", *command] if limit else command
    return subprocess.run(limited, capture_output=True, text=True, check=False)


def test_the_command_shows_and_changes(lora: Path) -> None:
    changed = run(lora, "--set", f"{PHRASE}=woody=hat", "--set", f"b={'x' * 100}", "--remove", "format")

    assert changed.returncode == 0, changed.stderr
    assert changed.stdout == run(lora).stdout
    assert "woody=hat" in changed.stdout
    assert "(100 characters)" in changed.stdout
    assert json.loads(run(lora, "--json").stdout) == lm.read_metadata(lora)


@pytest.mark.parametrize(("key", "told"), [("trigger_words", True), ("Activation Text", True), (PHRASE, False)])
def test_a_place_where_few_look_for_trigger_words_is_told(key: str, told: bool, lora: Path) -> None:
    assert ("read modelspec.trigger_phrase" in run(lora, "--set", f"{key}=woody").stdout) is told


def test_a_header_that_comfyui_does_not_show_is_said(lora: Path) -> None:
    lm.edit_metadata(lora, {"a": "x" * 1_100_000})

    assert "ComfyUI shows metadata only up to 1048576" in run(lora).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="limits files as bash does")
def test_a_write_that_fails_leaves_the_old_file_and_no_other(lora: Path) -> None:
    before = lora.read_bytes()

    result = run(lora, "--set", "a=b", limit=1)

    assert result.returncode == 1
    assert "Can't write" in result.stderr
    assert lora.read_bytes() == before
    assert list(lora.parent.iterdir()) == [lora]
