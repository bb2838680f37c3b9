"""Base models: every module is found, whatever the layout."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from loramerge.checkpoints.models import (
    _architecture as recognised,
    _denoises,
    _heads,
    _named,
    open_checkpoint,
    stored_names,
)
from loramerge.errors import FileError
from loramerge.files.architectures import ARCHITECTURES
from small import small

ARCHITECTURES_HERE = ("sdxl", "sd15", "flux")


def holds(path: Path, arrays: dict[str, np.ndarray], **options: str) -> bool:
    """Whether a checkpoint has exactly the weights and biases of some arrays."""
    with open_checkpoint(path, **options) as checkpoint:
        weights = {f"{module}.weight": checkpoint.weight(module) for module in checkpoint}
        biases = {f"{module}.bias": checkpoint.bias(module) for module in checkpoint.biases}
        shapes = {f"{module}.weight": place.shape for module, place in checkpoint.items()}
    found = weights | biases
    assert set(found) == set(arrays)
    assert shapes == {key: array.shape for key, array in weights.items()}
    return all(found[key].dtype == arrays[key].dtype and np.array_equal(found[key], arrays[key]) for key in arrays)


@pytest.mark.parametrize("architecture", ARCHITECTURES_HERE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_single_file_has_every_module_in_its_own_form(architecture: str, dtype: object, tmp_path: Path) -> None:
    arrays = models.base(architecture, dtype)

    assert holds(models.single_file(tmp_path / "m.safetensors", architecture, arrays), arrays)


@pytest.mark.parametrize("architecture", ARCHITECTURES_HERE)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_directory_has_every_module(architecture: str, shards: int, variant: str, tmp_path: Path) -> None:
    arrays = models.base(architecture)

    assert holds(models.folder(tmp_path / "m", arrays, shards=shards, variant=variant), arrays)


@pytest.mark.parametrize("architecture", ARCHITECTURES_HERE)
def test_the_family_is_told_from_the_names(architecture: str, tmp_path: Path) -> None:
    arrays = models.base(architecture)
    file = models.single_file(tmp_path / "m.safetensors", architecture, arrays)
    folder = models.folder(tmp_path / "m", arrays)

    assert [open_checkpoint(path).architecture for path in (file, folder)] == [architecture] * 2


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_transformer_alone_may_have_a_prefix(prefix: str, tmp_path: Path) -> None:
    arrays = models.base("flux")

    assert holds(models.single_file(tmp_path / "m.safetensors", "flux", arrays, prefix), arrays)


def test_a_component_alone_may_be_opened(tmp_path: Path) -> None:
    arrays = models.base("flux")
    folder = models.folder(tmp_path / "m", arrays) / "transformer"

    assert holds(folder, arrays)
    assert holds(folder / "diffusion_pytorch_model.safetensors", arrays)


def test_text_encoders_may_lack_a_level_as_in_transformers_5(tmp_path: Path) -> None:
    arrays = models.base("sd15")
    shorter = {key.replace("text_encoder.text_model.", "text_encoder."): value for key, value in arrays.items()}

    assert holds(models.folder(tmp_path / "m", shorter), arrays)


def test_modules_of_an_unknown_family_have_their_own_names(tmp_path: Path) -> None:
    arrays = {f"transformer.odd_blocks.{i}.mix.weight": np.full((3, 2), i, np.float32) for i in range(4)}
    folder = models.folder(tmp_path / "m", arrays)

    assert open_checkpoint(folder).architecture is None
    assert holds(folder, arrays)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_no_two_modules_share_rows_of_one_name(name: str) -> None:
    for parts in stored_names(ARCHITECTURES[name]).values():
        assert len({part.module for part in parts}) == len(parts)
        assert len({part.rows for part in parts}) == len(parts)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_outline_of_a_family_covers_every_name_of_a_checkpoint(name: str) -> None:
    heads = [_heads(f"{stem}.weight") for stem in stored_names(ARCHITECTURES[name]) if _denoises(f"{stem}.weight")]

    assert heads
    assert all(_named(ARCHITECTURES[name], {found: 1}) for found in dict.fromkeys(heads))
    assert not _named(ARCHITECTURES[name], {_heads("transformer.odd_blocks.0.mix.weight"): 1})


@pytest.mark.parametrize(
    "name", ["sdxl", "sd15", "sd21", "sdxl-refiner", "flux", "sd3.5-large", "ssd-1b", "qwen-image"]
)
def test_a_whole_model_of_real_shapes_is_of_its_family(name: str, tmp_path: Path) -> None:
    shapes = {
        f"{module}.weight": list(shape)
        for module, shape in ARCHITECTURES[name].shapes.items()
        if not module.startswith("text")
    }
    path = hollow(tmp_path / "model.safetensors", shapes)

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.architecture == name
        assert list(checkpoint) == [key.removesuffix(".weight") for key in shapes]


def hollow(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A sparse file: a header, and zeros that take no space."""
    import json
    import math
    import struct

    header, at = {}, 0
    for key, shape in shapes.items():
        size = math.prod(shape)
        header[key] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def test_the_variant_must_be_named_where_it_is_open(tmp_path: Path) -> None:
    arrays = models.base("sd15")
    half = {key: value.astype(np.float16) for key, value in arrays.items()}
    folder = models.folder(tmp_path / "m", half, variant="fp16")
    models.folder(folder, arrays, variant="other")

    with pytest.raises(FileError, match="variants fp16, other"):
        open_checkpoint(folder)
    assert holds(folder, half, variant="fp16")
    with pytest.raises(FileError, match="no file of the variant 'fp61'"):
        open_checkpoint(folder, variant="fp61")


def test_the_plain_files_are_taken_before_a_variant(tmp_path: Path) -> None:
    arrays = models.base("sd15")
    folder = models.folder(tmp_path / "m", arrays)
    models.folder(folder, models.base("sd15", np.float16), variant="fp16")

    assert holds(folder, arrays)


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    folder = models.folder(tmp_path / "m", models.base("flux"), shards=3)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()

    with pytest.raises(FileError, match="of 3 shards these are missing: 2"):
        open_checkpoint(folder)


@pytest.mark.parametrize("beside", [".scale_weight", ".weight.absmax"])
def test_a_quantised_weight_is_refused_when_it_is_read(beside: str, tmp_path: Path) -> None:
    stem = "double_blocks.0.img_attn.proj"
    path = tmp_path / "m.safetensors"
    save_file({f"{stem}.weight": np.ones((4, 4), np.float32), stem + beside: np.ones(1, np.float32)}, path)

    with open_checkpoint(path) as checkpoint, pytest.raises(FileError, match="quantised"):
        checkpoint.weight("transformer.transformer_blocks.0.attn.to_out.0")


@pytest.mark.parametrize("end", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_float8_weight_is_its_numbers_times_its_scale(end: str, by_row: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((12, 4)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, 12 if by_row else 1).astype(np.float32)
    stem = "double_blocks.0.img_attn.qkv"
    path = tmp_path / "m.safetensors"
    save_file({f"{stem}.weight": stored, stem + end: scale}, path)

    with open_checkpoint(path) as checkpoint:
        found = [checkpoint.weight(f"transformer.transformer_blocks.0.attn.to_{x}") for x in "qkv"]

    wanted = stored.astype(np.float64) * scale.astype(np.float64)[:, None]
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-6)


def test_a_fused_weight_out_of_proportion_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"single_blocks.0.linear1.weight": np.ones((84, 11), np.float32)}, path)

    with pytest.raises(FileError, match=re.escape("single_blocks.0.linear1 has the shape [84, 11]")):
        open_checkpoint(path)


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({f"{p}img_in.weight": np.ones((4, 4), np.float32) for p in ("", "diffusion_model.")}, path)

    with pytest.raises(FileError, match=r"hold transformer\.x_embedder"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("lora", "holds no model that loramerge knows"),
        ("nothing", "No such file or directory"),
        ("empty folder", "is no model: none of unet"),
        ("pickle", "is no .safetensors file"),
    ],
)
def test_what_is_no_model_is_refused(what: str, told: str, tmp_path: Path) -> None:
    import loramerge as lm

    path = tmp_path / ("m.ckpt" if what == "pickle" else "m.safetensors")
    if what == "lora":
        lm.save(small(), path, dialect="diffusers")
    elif what == "pickle":
        path.write_bytes(b"\x80\x02")
    elif what == "empty folder":
        path.mkdir()

    with pytest.raises(FileError, match=told):
        open_checkpoint(path)


def test_a_base_in_a_directory_is_known_by_its_weights_and_indexes(tmp_path: Path) -> None:
    root = models.folder(tmp_path / "base", models.base("sd15"), shards=2)
    (shard, *_), (index, *_) = sorted(root.rglob("*-of-*.safetensors")), sorted(root.rglob("*.index.json"))

    def known() -> str:
        with open_checkpoint(root) as base:
            return base.sha256

    first = known()
    (root / "notes.txt").write_text("no part of the weights")
    same = known()
    values = load_file(shard)
    save_file({key: value + 1 for key, value in values.items()}, shard)
    second = known()
    index.write_text(index.read_text() + "\n")

    assert first == same
    assert len({first, second, known()}) == 3


TAKEN_FOR = {"anima diffusers": "cosmos-predict2-2b"}
"""Checkpoints that are those of another family: Anima's transformer without its adapter."""


@pytest.mark.parametrize("names", ["native", "diffusers"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_denoiser_alone_is_of_its_family(family: str, names: str) -> None:
    """ComfyUI's split files and the files in a folder of diffusers have the denoiser's names without a prefix."""
    a = ARCHITECTURES[family]
    paths = a.native_paths if names == "native" else a.denoiser_paths

    found = recognised(
        {
            f"{path}.weight": (sum(a.shapes[part.module][0] for part in parts), *a.shapes[parts[0].module][1:])
            for path, parts in paths.items()
        }
    )

    if paths:
        assert found
        assert found.name == TAKEN_FOR.get(f"{family} {names}", family)
