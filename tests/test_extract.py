"""Extraction: the nearest LoRA to the difference of two models."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loramerge as lm
import models
from loramerge import linalg
from loramerge.checkpoints import extracting
from loramerge.checkpoints.extracting import plan_extraction
from loramerge.cli.app import app
from loramerge.cli.outputs import OUTPUTS
from loramerge.errors import MergeError, NumberError, OptionError
from loramerge.layers import Norm
from loramerge.testing import relative_error
from still_open import on_linux, still_open
from test_bake import made, target

FAMILIES = ("sdxl", "sd15", "flux")
LAYOUTS = ("file", "folder", "shards")


def difference(architecture: str, a: models.Arrays, b: models.Arrays) -> dict[str, np.ndarray]:
    return {m: np.float64(a[f"{m}.weight"]) - np.float64(b[f"{m}.weight"]) for m in models.SHAPES[architecture]}


def matrices(architecture: str) -> list[str]:
    return [module for module, shape in models.SHAPES[architecture].items() if len(shape) > 1]


def best(matrix: np.ndarray, rank: int) -> float:
    """The error of the best approximation of a rank."""
    return float(np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()))


@pytest.mark.parametrize("layouts", [("file", "file"), ("folder", "file"), ("file", "shards")])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_baking_then_extracting_at_full_rank_gives_the_lora_back(
    architecture: str, layouts: tuple[str, str], tmp_path: Path
) -> None:
    arrays = models.base(architecture)
    lora = models.lora(architecture)
    base = made(tmp_path / "base", layouts[0], architecture, arrays)
    tuned = lm.bake([lora], base, target(tmp_path / "tuned", layouts[0]), weights=[0.5]).path
    other = made(tmp_path / "other", layouts[1], architecture, arrays)

    found = lm.extract(tuned, other, rank="full")

    assert set(found) == {m for m in lora if not isinstance(lora[m], Norm)}
    assert {layer.rank for layer in found.values()} == {2}
    assert all(relative_error(found[m].delta(), 0.5 * lora[m].delta()) <= 1e-5 for m in found)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_of_a_rounded_model_comes_back_what_the_bake_said_was_kept(dtype: object, tmp_path: Path) -> None:
    lora = models.lora("sdxl")
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", models.base("sdxl", dtype))
    report = lm.bake([lora], base, tmp_path / "tuned.safetensors")

    found = lm.extract(tmp_path / "tuned.safetensors", base, rank="full", dtype="float32")

    for module in found:
        error = relative_error(found[module].delta(), lora[module].delta())
        assert error == pytest.approx(report.changes[module].loss, rel=0.01)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_error_of_each_module_is_the_least_that_its_rank_allows(
    architecture: str, rank: int, tmp_path: Path
) -> None:
    a, b = models.base(architecture, seed=1), models.base(architecture, seed=2)
    paths = [models.folder(tmp_path / n, x) for n, x in (("a", a), ("b", b))]
    delta = difference(architecture, a, b)

    planned = plan_extraction(*paths, rank=rank)
    layers = dict(planned.lora())

    for module in matrices(architecture):
        least = best(delta[module].reshape(len(delta[module]), -1), rank)
        error = np.linalg.norm(layers[module].delta() - delta[module])
        assert error == pytest.approx(least, rel=1e-5, abs=1e-5)
        assert planned.fits[module].error == pytest.approx(error, rel=1e-5, abs=1e-6)
        assert planned.fits[module].norm == pytest.approx(np.linalg.norm(delta[module]), rel=1e-5)


def test_the_error_counts_the_dtype_of_the_factors(tmp_path: Path) -> None:
    a, b = models.base("sdxl", seed=1), models.base("sdxl", seed=2)
    paths = [models.folder(tmp_path / n, x) for n, x in (("a", a), ("b", b))]
    delta = difference("sdxl", a, b)

    planned = plan_extraction(*paths, rank="full", dtype="bfloat16")
    lm.save(planned.lora(), tmp_path / "lora.safetensors")
    saved = lm.load(tmp_path / "lora.safetensors")

    for module in saved:
        error = np.linalg.norm(saved[module].delta() - delta[module])
        assert planned.fits[module].error == pytest.approx(error, rel=1e-3)
    assert planned.relative_error > 1e-3


def test_the_total_error_is_that_of_all_modules_together(tmp_path: Path) -> None:
    a, b = models.base("flux", seed=1), models.base("flux", seed=2)
    paths = [models.folder(tmp_path / n, x) for n, x in (("a", a), ("b", b))]
    planned = plan_extraction(*paths, rank=2)
    layers = dict(planned.lora())

    delta = difference("flux", a, b)
    missing = sum(np.linalg.norm(layers[m].delta() - delta[m]) ** 2 for m in layers)
    whole = sum(np.linalg.norm(delta[m]) ** 2 for m in layers)
    assert planned.relative_error == pytest.approx(np.sqrt(missing / whole), rel=1e-5)


def test_modules_that_do_not_differ_are_left_out(tmp_path: Path) -> None:
    a = models.base("sdxl")
    b = {key: value + ("attn1.to_q" in key) for key, value in a.items()}

    found = lm.extract(models.folder(tmp_path / "b", b), models.folder(tmp_path / "a", a))

    assert list(found) == ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]


def test_biases_norms_and_embeddings_are_listed_as_not_held(tmp_path: Path) -> None:
    a = models.base("sdxl")
    table = "text_encoder.text_model.embeddings.token_embedding.weight"
    a[table] = np.ones((9, 12), np.float32)
    norm = "unet.down_blocks.1.attentions.0.transformer_blocks.0.norm1"
    proj = "unet.down_blocks.1.attentions.0.proj_in"
    changed = {f"{norm}.weight", f"{proj}.bias", f"{proj}.weight", table}
    b = {key: value * 1.5 if key in changed else value for key, value in a.items()}

    planned = plan_extraction(models.folder(tmp_path / "b", b), models.folder(tmp_path / "a", a))

    held = {n.tensor: (n.norm, n.relative) for n in planned.not_held}
    assert list(planned.ranks) == [proj]
    assert set(held) == {norm, f"{proj}.bias", table.removesuffix(".weight")}
    assert held[norm] == (pytest.approx(0.5 * np.linalg.norm(a[f"{norm}.weight"])), pytest.approx(0.5))


def test_tables_of_their_own_are_listed_as_not_held(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"attn1.to_q.weight": (1536, 1536), "scale_shift_table": (1, 6, 1536)}
    values = {f"transformer.blocks.0.{n}": random.normal(size=s).astype("f") for n, s in shapes.items()}
    for i, name in enumerate(("base", "tuned")):
        save_file({key: value * (1 + 0.1 * i) for key, value in values.items()}, tmp_path / f"{name}.safetensors")

    paths = [tmp_path / f"{name}.safetensors" for name in ("tuned", "base")]
    planned = plan_extraction(*paths, rank=4, architecture="wan-1.3b")

    assert list(planned.ranks) == ["transformer.blocks.0.attn1.to_q"]
    assert [n.tensor for n in planned.not_held] == ["transformer.blocks.0.scale_shift_table"]


def test_clips_projection_is_held_though_its_name_does_not_end_in_weight(tmp_path: Path) -> None:
    base = models.base("sdxl")
    tuned = {key: value * 1.5 if "text_projection" in key else value for key, value in base.items()}
    paths = [models.single_file(tmp_path / f"{i}.safetensors", "sdxl", each) for i, each in enumerate((tuned, base))]

    assert "text_encoder_2.text_projection" in plan_extraction(*paths, rank=2).ranks


def test_ranks_may_be_given_by_module(tmp_path: Path) -> None:
    paths = [models.folder(tmp_path / str(n), models.base("flux", seed=n)) for n in (1, 2)]

    found = lm.extract(*paths, rank=3, ranks={"transformer.x_embedder": 1})

    assert {m: layer.rank for m, layer in found.items()} == {
        m: 1 if m == "transformer.x_embedder" else 3 for m in matrices("flux")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vae_that_differs_is_said_to_where_both_are_one_file(layout: str, tmp_path: Path) -> None:
    paths = [made(tmp_path / str(n), layout, "sd15", models.base("sd15", seed=n)) for n in (1, 2)]
    if layout == "file":
        from safetensors.numpy import load_file, save_file

        tensors = load_file(paths[0])
        tensors["first_stage_model.decoder.conv_in.weight"] = np.ones((2, 2, 3, 3), np.float16)
        save_file(tensors, paths[0])

    notes = plan_extraction(*paths).notes

    assert [note for note in notes if "first_stage_model" in note] == list(notes)
    assert len(notes) == (layout == "file")


def test_different_dtypes_are_noted(tmp_path: Path) -> None:
    half = models.folder(tmp_path / "a", models.base("sd15", np.float16))
    planned = plan_extraction(half, models.folder(tmp_path / "b", models.base("sd15", seed=1)))

    assert "different dtypes" in planned.notes[0]
    assert planned.dtype == "F16"


def test_a_recipe_comes_with_the_lora(tmp_path: Path) -> None:
    paths = [models.folder(tmp_path / str(n), models.base("flux", seed=n)) for n in (1, 2)]

    lm.save(lm.extract(*paths, rank=2), tmp_path / "lora.safetensors")
    found = lm.open(tmp_path / "lora.safetensors")

    assert json.loads(found.metadata["loramerge"])["tuned"] == "1"


def test_a_model_of_real_shapes_gives_a_lora_of_its_family_in_kohyas_names(tmp_path: Path) -> None:
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    base = rng.standard_normal((640, 640)).astype(np.float16)
    tuned = base + np.outer(rng.standard_normal(640), rng.standard_normal(640)).astype(np.float16)
    paths = [models.folder(tmp_path / n, {f"{module}.weight": w}) for n, w in (("a", tuned), ("b", base))]

    lm.save(lm.extract(*paths, rank=1), tmp_path / "lora.safetensors")
    found = lm.open(tmp_path / "lora.safetensors", architecture="sdxl")

    assert (found.dialect, list(found), found[module].dtype) == ("kohya", [module], "F16")
    assert relative_error(found[module].delta(), np.float32(tuned) - np.float32(base)) <= 2e-3


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_lora_of_a_model_with_widths_of_its_own_says_its_family(architecture: str, tmp_path: Path) -> None:
    paths = [
        models.single_file(tmp_path / f"{seed}.safetensors", architecture, models.base(architecture, seed=seed))
        for seed in (1, 2)
    ]

    lm.save(lm.extract(*paths, rank=2), tmp_path / "lora.safetensors")

    assert lm.open(tmp_path / "lora.safetensors").architecture == architecture


def test_models_with_other_modules_are_refused(tmp_path: Path) -> None:
    a = models.folder(tmp_path / "a", models.base("sdxl"))
    few = {key: value for key, value in models.base("sdxl").items() if "attn1" not in key}

    with pytest.raises(MergeError, match=r"lacks 1 module of .*attn1\.to_q"):
        lm.extract(a, models.folder(tmp_path / "b", few))


def test_models_of_other_shapes_are_refused(tmp_path: Path) -> None:
    a = models.folder(tmp_path / "a", models.base("sd15"))
    other = {key: np.repeat(value, 2, axis=0) for key, value in models.base("sd15").items()}

    with pytest.raises(MergeError, match=r"has the shape .* in b and .* in a"):
        lm.extract(models.folder(tmp_path / "b", other), a)


def test_equal_models_are_refused(tmp_path: Path) -> None:
    paths = [models.folder(tmp_path / n, models.base("sd15")) for n in "ab"]

    with pytest.raises(MergeError, match="differ in no weight"):
        lm.extract(*paths)


@on_linux
def test_the_models_are_closed_whether_they_differ_or_not(tmp_path: Path) -> None:
    same, also, other = (models.folder(tmp_path / str(n), models.base("sd15", seed=n // 2)) for n in range(3))

    lora = lm.extract(other, same, rank=1)
    with pytest.raises(MergeError) as equal:
        lm.extract(also, same)

    assert lora
    assert equal.tb
    assert still_open(tmp_path) == []


@pytest.mark.parametrize("rank", [0, -1, "sum", True, 2.5])
def test_a_wrong_rank_is_refused(rank: object, tmp_path: Path) -> None:
    paths = [models.folder(tmp_path / str(n), models.base("sd15", seed=n)) for n in (1, 2)]

    with pytest.raises(OptionError, match="rank"):
        lm.extract(*paths, rank=rank)
    with pytest.raises(OptionError, match="rank"):
        lm.extract(*paths, ranks={"unet.nowhere": 2})


def test_nan_in_a_model_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    a, b = models.base("sd15", seed=1), models.base("sd15", seed=2)
    a["unet.down_blocks.0.attentions.0.proj_in.weight"][0, 0] = np.nan

    with pytest.raises(NumberError, match=r"a: unet.down_blocks.0.attentions.0.proj_in: a value is NaN"):
        lm.extract(models.folder(tmp_path / "a", a), models.folder(tmp_path / "b", b))


def test_nan_behind_the_first_rows_that_differ_is_an_error_when_the_module_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = models.base("sd15", seed=1), models.base("sd15", seed=2)
    a["unet.down_blocks.0.attentions.0.proj_in.weight"][-1, -1] = np.nan
    monkeypatch.setattr(extracting, "BLOCK", 8)

    planned = plan_extraction(models.folder(tmp_path / "a", a), models.folder(tmp_path / "b", b))

    with pytest.raises(NumberError, match=r"a: unet.down_blocks.0.attentions.0.proj_in: a value is NaN"):
        lm.save(planned.lora(), tmp_path / "lora.safetensors")


@pytest.mark.parametrize("layouts", [("file", "file"), ("folder", "file"), ("file", "shards")])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_blocks_of_any_size_give_the_same_factors(
    architecture: str, layouts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = models.base(architecture, np.float16)
    changed = {key: value.copy() for key, value in arrays.items()}
    for value in changed.values():
        value[-1] += 1  # in the last rows alone
    paths = [
        made(tmp_path / name, layout, architecture, values)
        for name, layout, values in zip("ab", layouts, (changed, arrays), strict=True)
    ]

    whole = plan_extraction(*paths, rank=2)
    monkeypatch.setattr(extracting, "BLOCK", 50)
    cut = plan_extraction(*paths, rank=2)

    assert (cut.ranks, cut.not_held) == (whole.ranks, whole.not_held)
    assert set(cut.ranks) == set(matrices(architecture))
    for module, layer in whole.lora().items():
        assert all(np.array_equal(a, b) for a, b in zip(layer.factors(), cut.layer(module).factors(), strict=True))


def test_a_text_encoder_that_one_model_lacks_is_not_counted_as_the_same(tmp_path: Path) -> None:
    arrays = models.base("sdxl")
    name = next(m for m in matrices("sdxl") if m.startswith("unet."))
    changed = arrays | {f"{name}.weight": arrays[f"{name}.weight"] + 1}
    unet = {key: value for key, value in changed.items() if key.startswith("unet.")}
    base, tuned = models.folder(tmp_path / "base", arrays), models.folder(tmp_path / "tuned", unet)
    command = ["extract", str(tuned), "--base", str(base), "-o", str(tmp_path / "lora.safetensors")]

    said = CliRunner().invoke(app, command).output

    compared = sum(module.startswith("unet.") for module in models.SHAPES["sdxl"])
    assert f": 1 module, {compared - 1} do not differ; " in said
    assert "only one of the models has text_encoder" in said


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_the_command_does_not_write_over_a_model(name: str, tmp_path: Path) -> None:
    paths = {
        n: models.single_file(tmp_path / f"{n}.safetensors", "sd15", models.base("sd15", seed=seed))
        for seed, n in enumerate(("base", "tuned"))
    }
    folders = {n: models.folder(tmp_path / f"{n}-folder", models.base("sd15", seed=s)) for s, n in enumerate(paths)}
    inside = folders[name] / "unet" / "diffusion_pytorch_model.safetensors"

    for given, output in ((paths, paths[name]), (folders, inside)):
        before = output.read_bytes()
        command = ["extract", given["tuned"], "--base", given["base"], "-o", output]
        with pytest.raises(OptionError, match="is one of the models that are compared"):
            CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
        assert output.read_bytes() == before


def test_the_command_extracts_and_reports(tmp_path: Path) -> None:
    a, b = (models.single_file(tmp_path / f"{n}.safetensors", "sdxl", models.base("sdxl", seed=n)) for n in (1, 2))
    command = [sys.executable, "-m", "loramerge", "extract", a, "--base", b, "--rank", "3", "--to", "diffusers-peft"]

    shown = subprocess.run([*command, "-o", tmp_path / "x.safetensors"], capture_output=True, text=True, check=False)
    data = subprocess.run(
        [*command, "-o", tmp_path / "y.safetensors", "--json"], capture_output=True, text=True, check=False
    )

    assert (shown.returncode, shown.stderr) == (0, "")
    assert "not held by a LoRA" in shown.stdout
    jsonschema.validate(json.loads(data.stdout), OUTPUTS["extract"])
    wanted = plan_extraction(a, b, rank=3)
    for module, layer in wanted.lora().items():
        assert json.loads(data.stdout)["modules"][module]["error"] == wanted.fits[module].error
        saved = lm.open(tmp_path / "x.safetensors")[module]
        assert relative_error(saved.delta(), layer.delta()) <= 1e-6


def decaying(rows: int, columns: int, power: float) -> np.ndarray:
    """A matrix whose singular values are 1, 2^-p, 3^-p, …; for p = 0 one of noise."""
    rng = np.random.default_rng(3)
    if power == 0:
        return rng.standard_normal((rows, columns), dtype=np.float32)
    size = min(rows, columns)
    u, v = (np.linalg.qr(rng.standard_normal((n, size)))[0] for n in (rows, columns))
    return ((u * np.arange(1, size + 1) ** -power) @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256)])
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 4, 20, 60, 200])
def test_the_best_fit_of_a_dense_matrix_is_within_a_hundredth_of_the_optimum(
    shape: tuple[int, int], power: float, rank: int
) -> None:
    matrix = decaying(*shape, power)

    cut = linalg.truncate_dense(matrix, rank)
    up, down, energy = cut.up, cut.down, cut.energy

    least = best(np.float64(matrix), rank)
    error = np.linalg.norm(np.float64(matrix) - np.float64(up) @ np.float64(down))
    assert least - 1e-6 <= error <= 1.01 * least + 1e-5 * np.sqrt(energy)
    assert energy == pytest.approx((np.float64(matrix) ** 2).sum())
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))


def test_at_its_whole_rank_a_matrix_comes_back() -> None:
    matrix = decaying(90, 70, 0.5)

    cut = linalg.truncate_dense(matrix, 500)

    assert cut.up.shape == (90, 70)
    assert relative_error(cut.up @ cut.down, matrix) <= 1e-6


@pytest.mark.parametrize("shape", [(90, 70), (70, 90)])
def test_both_factors_carry_the_root_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, 0.5)
    sigma = np.linalg.svd(matrix, compute_uv=False)[:5]

    cut = linalg.truncate_dense(matrix, 5)

    np.testing.assert_allclose(cut.up.T @ cut.up, np.diag(sigma), atol=1e-4)
    np.testing.assert_allclose(cut.down @ cut.down.T, np.diag(sigma), atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 5), (200, 300)], ids=["whole", "by random projection"])
def test_the_zero_matrix_has_zero_factors(shape: tuple[int, int]) -> None:
    cut = linalg.truncate_dense(np.zeros(shape, np.float32), 2)

    assert (cut.energy, float(abs(cut.up @ cut.down).max())) == (0, 0)


def test_a_product_has_its_rank() -> None:
    rng = np.random.default_rng(0)
    product = (rng.standard_normal((80, 6)) @ rng.standard_normal((6, 50))).astype(np.float32)

    assert linalg.numerical_rank(product) == linalg.numerical_rank(product.T) == 6


def test_what_differs_by_rounding_alone_is_told_and_left_out(tmp_path: Path) -> None:
    arrays = models.base("sd15")
    module = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_k"
    changed = arrays | {f"{module}.weight": arrays[f"{module}.weight"] + np.float32(0.1)}
    half = {key: array.astype(np.float16) for key, array in changed.items()}

    planned = plan_extraction(models.folder(tmp_path / "a", half), models.folder(tmp_path / "b", arrays))

    assert set(planned.ranks) == {module}
    assert "differ by rounding alone" in planned.notes[0]
