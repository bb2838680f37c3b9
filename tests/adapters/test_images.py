"""Folders of pictures: captions, squares, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loramerge.errors import FileError
from loramerge.scoring.captions import captioned, cropped, digest
from loramerge.scoring.pictures import ignored_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.png"):
        Image.new("RGB", (8, 12), "red").save(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_what_is_no_picture_is_told(folder: Path) -> None:
    (folder / "a.txt").write_text("a person")
    assert f"{folder}: left out are notes.md; only files" in ignored_in(folder)
    for name in ("IMG_1.HEIC", "IMG_2.HEIC", "IMG_3.tif"):
        (folder / name).touch()
    (folder / "more").mkdir()
    assert "left out are IMG_1.HEIC, IMG_2.HEIC, IMG_3.tif and 2 more" in ignored_in(folder)


def test_a_folder_of_pictures_and_captions_leaves_nothing_out(folder: Path) -> None:
    for name in (".DS_Store", "a.txt", "metadata.jsonl"):
        (folder / name).touch()
    (folder / "notes.md").unlink()
    assert ignored_in(folder) == ""


def test_captions_lie_beside_the_pictures_or_in_a_list(folder: Path) -> None:
    (folder / "a.txt").write_text("a person\n")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.jpg", "text": "a jersey"}) + "\n\n")
    assert [(p.path.name, p.caption) for p in captioned(folder)] == [("a.png", "a person"), ("b.jpg", "a jersey")]


def test_one_caption_serves_pictures_without_their_own(folder: Path) -> None:
    (folder / "a.txt").write_text("a person")
    assert [p.caption for p in captioned(folder, "a jersey")] == ["a person", "a jersey"]


def test_the_mark_that_windows_begins_a_text_with_is_no_part_of_a_caption(folder: Path) -> None:
    (folder / "a.txt").write_text("a person", encoding="utf-8-sig")
    listed = json.dumps({"file_name": "b.jpg", "text": "a jersey"})
    (folder / "metadata.jsonl").write_text(listed, encoding="utf-8-sig")
    assert [p.caption for p in captioned(folder)] == ["a person", "a jersey"]


def test_a_caption_of_nothing_is_none(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.jpg", "text": None}))
    with pytest.raises(FileError, match="2 of 2 images have no caption"):
        captioned(folder)


def test_a_caption_that_is_not_utf_8_is_named(folder: Path) -> None:
    (folder / "a.txt").write_bytes("un caf\xe9".encode("latin-1"))
    with pytest.raises(FileError, match=r"a\.txt: it is not UTF-8"):
        captioned(folder, "a jersey")


@pytest.mark.parametrize(("name", "why"), [("c.png", "not there"), ("notes.md", "a file that does not end in .png")])
def test_a_list_that_names_another_file_is_refused(folder: Path, name: str, why: str) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a jersey"}))
    with pytest.raises(FileError, match=f"metadata.jsonl names {name!r}, which is {why}"):
        captioned(folder, "a jersey")


def test_the_middle_square_is_cut_out(tmp_path: Path) -> None:
    values = np.zeros((6, 10, 3), np.uint8)
    values[:, 2:8] = 255
    Image.fromarray(values).save(tmp_path / "wide.png")
    square = cropped(tmp_path / "wide.png", 6)

    assert square.pixels.shape == (3, 6, 6)
    assert (square.pixels == 1).all()
    assert (square.original, square.corner) == ((6, 10), (0, 2))


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (cropped(tmp_path / "clear.png", 4).pixels == 1).all()


def test_a_camera_s_rotation_is_undone(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert cropped(tmp_path / "turned.jpg", 4).original == (4, 8)


def test_the_digest_is_of_pixels_and_captions(folder: Path) -> None:
    first = digest(captioned(folder, "a person"))
    assert digest(captioned(folder, "a person")) == first
    assert digest(captioned(folder, "a jersey")) != first


def test_errors_say_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"2 of 2 images have no caption, such as a.png.*a.txt.*metadata.jsonl"):
        captioned(folder)
    with pytest.raises(FileError, match="No such directory"):
        captioned(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(FileError, match="holds no image"):
        captioned(folder / "empty")
    (folder / "metadata.jsonl").write_text("{broken")
    with pytest.raises(FileError, match=r"metadata.jsonl, line 1: wanted"):
        captioned(folder)


def test_an_unreadable_picture_is_named(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match=r"Can't read the image .*a\.png"):
        cropped(folder / "a.png", 8)
