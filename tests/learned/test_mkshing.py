"""Dense ZipLoRA files of mkshing's."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.errors import FileError, NotALoRAError, NumberError, OptionError
from loramerge.learned.mkshing import load
from loramerge.testing import relative_error
from small import small

MODULES = (
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.1.resnets.0.conv_shortcut",
    "unet.down_blocks.0.resnets.0.conv1",
)
MERGED = lm.merge([small("sdxl", MODULES, seed=1, rank=2), small("sdxl", MODULES, seed=2, rank=3)], weights=[1, 1])


def dense(folder: Path, dtype: str = "float32", **changes: object) -> Path:
    deltas = {f"unet.{m}.lora.weight": np.ascontiguousarray(MERGED[m].delta().astype(dtype)) for m in MERGED}
    save_file({**deltas, **changes}, folder / "zip.safetensors", {"made": "by hand"})
    return folder / "zip.safetensors"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_at_the_sum_of_ranks_the_update_is_kept(dtype: str, tolerance: float, tmp_path: Path) -> None:
    found = load(dense(tmp_path, dtype), rank=5)

    assert found.lora.architecture == "sdxl"
    assert set(found.lora) == set(MERGED)
    assert all(relative_error(found.lora[m].delta(), MERGED[m].delta()) <= tolerance for m in MERGED)
    assert all(error <= 2 * tolerance for error in found.errors.values())


def test_at_a_smaller_rank_the_error_is_the_smallest_there_is(tmp_path: Path) -> None:
    found = load(dense(tmp_path), rank=3)
    for module, error in found.errors.items():
        sigma = np.linalg.svd(np.float64(MERGED[module].delta()).reshape(MERGED[module].shape[0], -1), compute_uv=False)

        assert found.lora[module].rank == 3
        assert error == pytest.approx(np.linalg.norm(sigma[3:]) / np.linalg.norm(sigma), rel=1e-2)
        assert relative_error(found.lora[module].delta(), MERGED[module].delta()) == pytest.approx(error, rel=1e-2)


def test_what_is_read_can_be_saved_for_any_program(tmp_path: Path) -> None:
    found = load(dense(tmp_path), rank=5).lora
    again = lm.load(lm.save(found, tmp_path / "kohya.safetensors", dialect="kohya"))

    assert all(relative_error(again[m].delta(), MERGED[m].delta()) <= 1e-5 for m in MERGED)
    assert again.metadata["made"] == "by hand"


def test_keys_with_one_prefix_are_read_too(tmp_path: Path) -> None:
    save_file({"unet.mid_block.to_q.lora.weight": np.ones((4, 6), np.float32)}, tmp_path / "one.safetensors")
    found = load(tmp_path / "one.safetensors", rank=2)

    assert list(found.lora) == ["unet.mid_block.to_q"]
    assert found.lora.architecture is None


def test_zero_updates_are_kept(tmp_path: Path) -> None:
    path = dense(tmp_path, **{"unet.unet.x.lora.weight": np.zeros((4, 6), np.float32)})
    found = load(path, rank=2)

    assert found.errors["unet.x"] == 0
    assert not found.lora["unet.x"].delta().any()


def test_other_files_are_refused(tmp_path: Path) -> None:
    lm.save(MERGED, tmp_path / "lora.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    save_file({"unet.unet.x.lora.weight": np.zeros(4, np.float32)}, tmp_path / "flat.safetensors")
    for name in ("lora", "empty", "flat"):
        with pytest.raises(NotALoRAError, match=f"{name}.safetensors isn't a dense ZipLoRA"):
            load(tmp_path / f"{name}.safetensors", rank=2)
    with pytest.raises(FileError):
        load(tmp_path / "none.safetensors", rank=2)


def test_nan_is_refused_by_module(tmp_path: Path) -> None:
    path = dense(tmp_path, **{"unet.unet.x.lora.weight": np.full((4, 6), np.nan, np.float32)})
    with pytest.raises(NumberError, match=r"unet\.x"):
        load(path, rank=2)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "8"])
def test_wrong_ranks_are_refused(rank: object, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rank"):
        load(dense(tmp_path), rank=rank)
