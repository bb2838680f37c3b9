"""``loramerge compare``, as a user runs it, and the heat map that it draws."""

import json
import math
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import loramerge as lm
from loramerge import errors
from loramerge.comparing.advising import advice
from loramerge.comparing.analysis import Comparison
from loramerge.comparing.plots import heatmap, save_heatmap
from small import MODULES, small


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "utf8", "-m", "loramerge", "compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        lm.save(small(seed=1, alpha=2.0), tmp_path / "person.safetensors", dialect="kohya"),
        lm.save(small(seed=2, rank=6), tmp_path / "jersey.safetensors", dialect="diffusers-peft"),
    )


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return lm.compare([small(seed=1, name="a_$1$_b.safetensors"), small(seed=2, modules=MODULES["sdxl"][:3])])


def test_a_table_by_block_begins_with_the_total_and_ends_with_advice(files: tuple[Path, Path]) -> None:
    result = run(*files)
    lines = result.stdout.splitlines()

    assert result.returncode == 0, result.stderr
    assert lines[:2] == ["a = person.safetensors", "b = jersey.safetensors"]
    assert [line.split("  ")[0] for line in lines[5:10]] == [
        "total",
        "unet IN01",
        "unet IN04",
        "text_encoder BASE",
        "",
    ]
    assert lines[-1] == advice(lm.compare(files))


def test_the_table_prints_the_measures(files: tuple[Path, Path]) -> None:
    total = next(line for line in run(*files, "--exact").stdout.splitlines() if line.startswith("total"))
    pair = lm.compare(files, rows=None).total.pairs[0, 1]

    assert total.split()[1] == "4"
    wanted = [pair.cosine, pair.input_overlap, pair.output_overlap, pair.alignment, pair.conflict, pair.clash]
    assert [float(word) for word in total.split()[4:10]] == pytest.approx(wanted, abs=0.00501)


def test_modules_are_listed_by_conflict(files: tuple[Path, Path]) -> None:
    text = run(*files, "--modules", "--most", "2").stdout
    rows = lm.compare(files).rows
    worst = sorted(rows, key=lambda row: -row.pairs[0, 1].conflict)[:2]

    listed = [line.split()[0] for line in text.splitlines() if line.startswith(("unet.", "text_encoder."))]
    assert listed == [row.name for row in worst]
    assert "… and 2 more" in text


def test_json_is_the_comparison_with_its_advice(files: tuple[Path, Path]) -> None:
    data = json.loads(run(*files, "--json", "--rows", "5", "--seed", "3").stdout)
    found = lm.compare(files, rows=5, seed=3)

    assert data == json.loads(json.dumps(found.to_dict() | {"advice": advice(found)}))


def test_three_files_are_compared_pair_by_pair(files: tuple[Path, Path]) -> None:
    text = run(*files, files[0]).stdout

    assert [line.split()[2:4] for line in text.splitlines() if line.startswith("block")] == [
        ["‖a‖", "‖b‖"],
        ["‖a‖", "‖c‖"],
        ["‖b‖", "‖c‖"],
    ]
    assert "are nearly the same update (cosine 1.00)" in text.splitlines()[-1]


def test_layers_that_cant_be_compared_are_counted(files: tuple[Path, Path], tmp_path: Path) -> None:
    dora, part = small(kind="dora", modules=MODULES["sdxl"][1:]), small(modules=MODULES["sdxl"][:1])
    mixed = lm.LoRA(name="m", architecture="sdxl", dialect="kohya", layouts={**dora.layouts, **part.layouts})

    assert (
        "not compared: 3 modules of b (dora; --base compares them)"
        in run(files[0], lm.save(mixed, tmp_path / "m.safetensors")).stdout
    )


def test_a_strength_that_is_a_guess_is_told(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = lm.save(lm.load(files[1]), tmp_path / "adapter", dialect="peft")

    told = run(files[0], next(folder.rglob("adapter_model.safetensors")).rename(tmp_path / "alone.safetensors")).stdout

    assert "note: alone.safetensors: PEFT's adapter_config.json is missing, so the strength is a guess" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "two LoRAs or more"),
        (["missing.safetensors"], "No such file or directory: missing.safetensors"),
        (["OTHER", "--heatmap", "map.jpg"], "a heat map is a .png or .svg file"),
        (["OTHER", "--heatmap", "nowhere/map.png"], "there is no directory nowhere"),
    ],
)
def test_a_wrong_comparison_is_one_readable_error(arguments: list[str], message: str, files: tuple[Path, Path]) -> None:
    result = run(files[0], *(files[1] if word == "OTHER" else word for word in arguments))

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_comparing_imports_neither_torch_nor_matplotlib(files: tuple[Path, Path]) -> None:
    code = (
        "import sys, loramerge as lm; assert 'numpy' not in sys.modules; lm.compare(sys.argv[1:3]);"
        "import loramerge.comparing.plots, loramerge.comparing.advising;"
        "assert not {'torch', 'matplotlib', 'diffusers', 'peft'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_without_matplotlib_the_error_names_the_extra(files: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from loramerge.cli import main;"
        "sys.argv = ['loramerge', 'compare', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", code, *files, "--heatmap", tmp_path / "map.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert result.stderr == "Error: A heat map needs matplotlib: pip install 'loramerge[plots]'.\n"
    assert run(*files).returncode == 0


def test_a_heat_map_is_drawn(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(*files, "--heatmap", tmp_path / "map.png")

    data = (tmp_path / "map.png").read_bytes()
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"→ {tmp_path / 'map.png'}\n")
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert min(struct.unpack(">II", data[16:24])) > 300


def test_a_drawing_is_whole_xml_and_always_the_same(comparison: Comparison, tmp_path: Path) -> None:
    first, second = (save_heatmap(comparison, tmp_path / name) for name in ("one.svg", "two.SVG"))

    assert ET.parse(first).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert first.read_bytes() == second.read_bytes()


def test_a_heat_map_shows_every_block_and_measure(comparison: Comparison) -> None:
    cosines, shares, *bars = heatmap(comparison).axes
    columns = [text.get_text() for text in shares.get_xticklabels()]

    assert columns == ["total", "IN01", "IN04", "text_encoder"]
    assert [text.get_text() for text in shares.get_yticklabels()] == [
        "input overlap",
        "output overlap",
        "alignment",
        "sign conflict",
    ]
    assert shares.get_xlabel()
    assert shares.get_ylabel()
    assert [bar.get_ylabel() for bar in bars] == ["cosine", "share"]
    values = cosines.images[0].get_array()
    pairs = [row.pairs[0, 1] for row in (comparison.total, *comparison.by_block())]
    assert values[0, :3].tolist() == pytest.approx([pair.cosine for pair in pairs[:3]])
    assert values.mask[0].tolist() == [False, False, False, True]
    assert len(shares.texts) == 4 * 3


def test_many_blocks_are_drawn_without_values() -> None:
    modules = tuple(f"transformer.single_transformer_blocks.{n}.attn.to_q" for n in range(38))
    a, b = (small("flux", modules=modules, seed=seed, rank=1) for seed in (1, 2))

    figure = heatmap(lm.compare([a, b], rows=1))

    assert not figure.axes[1].texts
    assert len(figure.axes[1].get_xticks()) == 39
    assert math.isclose(figure.axes[1].images[0].norm.vmax, 1.0)


def test_three_loras_have_a_row_for_each_pair() -> None:
    figure = heatmap(lm.compare([small(seed=seed) for seed in (1, 2, 3)]))

    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "cosine a, b",
        "cosine a, c",
        "cosine b, c",
    ]
    assert len(figure.axes[1].get_yticks()) == 12


def test_a_heat_map_that_cant_be_written_is_an_error(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "map.png").mkdir()

    with pytest.raises(errors.FileError, match="Can't write"):
        save_heatmap(comparison, tmp_path / "map.png")
