"""Bad input: a clear message, and no output."""

import dataclasses
import errno
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

import loramerge as lm
from loramerge.files.storage import writer
from loramerge.files.storage.reader import SafetensorsFile
from loramerge.testing import random_lora
from small import MODULES, small


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return lm.save(small(), tmp_path / "whole.safetensors", dialect="kohya")


def _accepted(read: Callable[[Path], object], path: Path) -> bool:
    try:
        read(path)
    except Exception:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_our_reader_accepts_no_more_than_the_reference(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    original = safetensors.numpy.save({"a.lora_up.weight": np.ones((3, 2), np.float32), "b": np.ones(4, np.float16)})
    size = 8 + struct.unpack("<Q", original[:8])[0]
    place = data.draw(st.integers(8, size - 1))
    replacement = data.draw(st.binary(min_size=1, max_size=3))
    path = tmp_path_factory.mktemp("mutated") / "mutated.safetensors"
    path.write_bytes(original[:place] + replacement + original[place + len(replacement) :])

    if _accepted(SafetensorsFile, path):
        assert _accepted(lambda p: safetensors.numpy.load(p.read_bytes()), path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("role", ["up", "down"])
def test_values_that_are_not_finite_are_refused_by_module(value: float, dtype: str, role: str) -> None:
    keys = small(modules=MODULES["sdxl"][:1], dtype=dtype).state_dict("kohya")
    key = next(k for k in keys if f"lora_{role}" in k)
    keys[key][0, 0] = value

    with pytest.raises(lm.errors.NumberError, match=r"attn1.to_q.*NaN or infinite"):
        lm.load(keys)


FUSED = "transformer.transformer_blocks.0.attn."
QKV = [FUSED + name for name in ("to_q", "to_k", "to_v")]


def fused(seed: int) -> dict[str, torch.Tensor]:
    lora = random_lora("sd3-medium", rank=2, seed=seed, only=lambda module, shape: module.startswith(FUSED))
    return lora.state_dict("kohya")


def fused_with_nan(folder: Path) -> Path:
    """A file whose q, k and v are one weight, with a value that is NaN."""
    keys = fused(seed=1)
    keys[next(k for k in keys if "x_block_attn_qkv.lora_down" in k)][0, 0] = np.nan
    safetensors.torch.save_file(keys, folder / "nan.safetensors")
    return folder / "nan.safetensors"


def test_a_fused_weight_that_is_not_finite_is_refused_with_all_its_modules(tmp_path: Path) -> None:
    with pytest.raises(lm.errors.NumberError, match="leave all of them out") as caught:
        lm.load(fused_with_nan(tmp_path))

    assert re.findall("--exclude '([^']*)'", str(caught.value)) == QKV


@pytest.mark.parametrize("form", ["file", "state dict"])
def test_what_is_left_out_of_a_merge_may_be_nan(form: str, tmp_path: Path) -> None:
    file = fused_with_nan(tmp_path)
    given = file if form == "file" else safetensors.torch.load_file(file)
    other = fused(seed=2)

    made = [
        lm.merge([given, other], exclude=QKV),
        lm.resize(given, rank=1, exclude=QKV),
        lm.average([given, other], exclude=QKV),
    ]

    for lora in made:
        assert lora
        assert not {*lora} & {*QKV}
    with pytest.raises(lm.errors.NumberError, match="NaN or infinite"):
        lm.merge([given, other], exclude=QKV[:1])


def test_an_alpha_that_is_not_finite_is_refused() -> None:
    keys = small(alpha=1.0).state_dict("kohya")
    key = next(k for k in keys if k.endswith(".alpha"))

    with pytest.raises(lm.errors.NumberError, match="alpha is nan"):
        lm.load({**keys, key: torch.tensor(float("nan"))})


def test_a_missing_tensor_is_refused_by_module_and_role() -> None:
    keys = small().state_dict("kohya")
    key = next(k for k in keys if "lora_up" in k)
    del keys[key]

    with pytest.raises(lm.errors.LayerError, match=rf"{key.split('.')[0]}.*missing up"):
        lm.load(keys)


def test_rank_zero_is_refused() -> None:
    stem = "lora_unet_input_blocks_4_1_proj_in"
    keys = {f"{stem}.lora_down.weight": np.ones((0, 640)), f"{stem}.lora_up.weight": np.ones((640, 0))}

    with pytest.raises(lm.errors.LayerError, match="rank or size 0"):
        lm.load(keys)


def test_factors_that_disagree_are_refused_with_both_shapes() -> None:
    stem = "lora_unet_input_blocks_4_1_proj_in"
    keys = {f"{stem}.lora_down.weight": np.ones((2, 640)), f"{stem}.lora_up.weight": np.ones((640, 3))}

    with pytest.raises(lm.errors.LayerError, match=r"\(640, 3\).*\(2, 640\)"):
        lm.load(keys)


STRANGERS = {
    "a whole checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
    "a ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight"],
    "a textual inversion": ["emb_params"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "a VAE": ["encoder.down.0.block.0.conv1.weight"],
}


@pytest.mark.parametrize("what", STRANGERS)
def test_what_is_no_lora_is_named(what: str) -> None:
    keys = {key: np.ones((2, 2), dtype=np.float32) for key in STRANGERS[what]}

    with pytest.raises(lm.errors.NotALoRAError, match=what):
        lm.load(keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pickle_of_tensors_is_read_when_asked(tmp_path: Path, dtype: str) -> None:
    lora = small(dtype=dtype)
    torch.save({"state_dict": lora.state_dict("kohya")}, tmp_path / "lora.ckpt")

    found = lm.load(tmp_path / "lora.ckpt", allow_pickle=True)

    assert set(found) == set(lora)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(lm.errors.FileError, match=r"No such file or directory: nowhere\.safetensors"):
        lm.load("nowhere.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(whole: Path) -> None:
    with lm.open(whole) as lora:
        os.truncate(whole, whole.stat().st_size // 2)
        with pytest.raises(lm.errors.FileError, match="changed while it was read"):
            lora.in_memory()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_file_whole(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = whole.read_bytes()

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "pwrite", full)
    with pytest.raises(lm.errors.FileError, match="No space left"):
        lm.save(small(seed=5), whole, dialect="kohya")

    assert whole.read_bytes() == before
    assert leftovers(whole.parent) == ["whole.safetensors"]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupted_write_leaves_the_old_file_whole(
    whole: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SMALL", 0)
    before = whole.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.save(small(seed=5), whole, dialect="kohya", progress=interrupt, workers=workers)

    assert whole.read_bytes() == before
    assert leftovers(whole.parent) == ["whole.safetensors"]


def test_a_directory_that_is_missing_or_a_file_is_an_error(whole: Path) -> None:
    with pytest.raises(lm.errors.FileError, match="No such file"):
        lm.save(small(), whole.parent / "missing" / "x.safetensors", dialect="kohya")
    with pytest.raises(lm.errors.FileError, match="Not a directory"):
        lm.save(small(), whole / "x.safetensors", dialect="kohya")


def test_a_refused_conversion_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(lm.errors.DialectError, match="can't hold this layer"):
        lm.save(small(kind="full"), tmp_path / "x.safetensors", dialect="diffusers")

    assert leftovers(tmp_path) == []


def test_a_file_can_be_converted_onto_itself(whole: Path) -> None:
    wanted = {m: layer.delta() for m, layer in lm.load(whole).items()}

    lm.convert(whole, whole, "diffusers")

    found = lm.load(whole)
    assert found.dialect == "diffusers"
    for module, delta in wanted.items():
        np.testing.assert_array_equal(found[module].delta(), delta)


def test_threads_of_a_failed_save_do_not_write_into_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SMALL", 0)
    merged = lm.plan([small(seed=i, rank=64) for i in range(2)], rank=8).lora()

    def fail(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        lm.save(merged, tmp_path / "a.safetensors", workers=4, progress=fail)
    with open(tmp_path / "other", "wb") as other:
        other.write(b"8 bytes.")
        other.flush()
        time.sleep(0.3)

    assert (tmp_path / "other").read_bytes() == b"8 bytes."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "not a JSON object"),
        ('{"unet.lora_alpha": "x", "unet.r": 4}', "is 'x', wanted a finite number"),
        ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}}', r"\("),
        ("nonsense", "is not JSON"),
        ('{"unet.peft_type": "LOHA", "unet.alpha": 8, "unet.r": 4}', "of PEFT's LOHA"),
    ],
)
def test_a_hostile_configuration_is_refused(text: str, told: str) -> None:
    keys = small(modules=MODULES["sdxl"][:1]).state_dict("diffusers-peft")

    with pytest.raises(lm.errors.LoRAMergeError, match=told):
        lm.open(keys, metadata={"lora_adapter_metadata": text})


def test_a_method_that_makes_other_tensors_than_planned_writes_nothing(tmp_path: Path) -> None:
    lora = small(modules=MODULES["sdxl"][:1])
    wrong = dataclasses.replace(lora, compute=lambda module: small(modules=MODULES["sdxl"][:1], rank=7)[module])

    with pytest.raises(lm.errors.LayerError, match="planned"):
        lm.save(wrong, tmp_path / "a.safetensors", dialect="comfyui")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("<!DOCTYPE html>\n<html><body>Log in</body></html>", "a web page"),
        ("\n\n  <html>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        ('{"error": "not found"}', "a JSON file"),
        ("Entry not found", "a text file"),
    ],
)
def test_what_was_saved_instead_of_the_file_is_named(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text(text)

    with pytest.raises(lm.errors.FileError, match=f"is no safetensors file but {what}"):
        lm.open(tmp_path / "a.safetensors")
