"""Column coefficients as weights of an ordinary merge, in memory and in a file."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loramerge as lm
import models
from loramerge.cli.app import app
from loramerge.errors import FileError, LoRAMergeError, NumberError, OptionError
from loramerge.files.lora import LoRA
from loramerge.learned import gates
from loramerge.learned.interference import overlaps
from loramerge.merging.coefficients import KEY, Coefficients
from loramerge.testing import relative_error
from small import MODULES, small
from still_open import on_linux, still_open

LORAS = [small(seed=1, rank=2), small(seed=2, rank=3, kind="loha", modules=MODULES["sdxl"][:3])]
LEARNED = MODULES["sdxl"][:2]
TO_Q = MODULES["sdxl"][0]


def given(loras: list[LoRA] = LORAS) -> Coefficients:
    random = np.random.default_rng(0)
    columns = {m: random.standard_normal((2, np.prod(loras[0][m].shape[1:]))).astype(np.float32) for m in LEARNED}
    return Coefficients.of(columns, loras, [0.7, 0.3], {"method": "by hand"})


def wanted(coefficients: Coefficients, module: str) -> np.ndarray:
    weights = coefficients.of_module(module)
    deltas = [np.float64(lora[module].delta()) for lora in LORAS if module in lora]
    if module not in LEARNED:
        return sum(w * d for w, d in zip(weights, deltas, strict=False))
    return sum(np.float64(w).reshape(1, *d.shape[1:]) * d for w, d in zip(weights, deltas, strict=True))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_every_column_is_weighed_by_its_own_number(device: str | None, tmp_path: Path) -> None:
    coefficients = given()
    read = Coefficients.read(coefficients.save(tmp_path / "learned.safetensors"))

    for weights in (coefficients, read, str(tmp_path / "learned.safetensors")):
        merged = lm.merge(LORAS, weights=weights, device=device)
        assert all(relative_error(np.asarray(merged[m].delta()), wanted(coefficients, m)) <= 1e-6 for m in merged)


def test_a_merge_with_coefficients_can_be_cut_to_a_rank() -> None:
    merged = lm.merge(LORAS, weights=given(), rank=2)
    for module in merged:
        dense = wanted(given(), module).reshape(merged[module].shape[0], -1)
        u, s, vh = np.linalg.svd(dense, full_matrices=False)

        assert relative_error(merged[module].delta().reshape(dense.shape), (u[:, :2] * s[:2]) @ vh[:2]) <= 1e-4


@pytest.mark.parametrize("exclude", [TO_Q, "IN04"])
def test_modules_with_coefficients_can_be_left_out(exclude: str) -> None:
    whole, part = lm.merge(LORAS, weights=given()), lm.merge(LORAS, weights=given(), exclude=[exclude])

    assert TO_Q not in part
    assert all(np.array_equal(part[m].delta(), whole[m].delta()) for m in part)


def test_the_file_says_where_the_coefficients_come_from(tmp_path: Path) -> None:
    read = Coefficients.read(given().save(tmp_path / "learned.safetensors"))

    assert read.names == tuple(lora.name for lora in LORAS)
    assert read.others == (0.7, 0.3)
    assert read.provenance == {"method": "by hand"}


@on_linux
def test_the_file_is_read_and_closed(tmp_path: Path) -> None:
    read = Coefficients.read(given().save(tmp_path / "learned.safetensors"))

    assert still_open(tmp_path) == []
    (tmp_path / "learned.safetensors").unlink()
    assert all(np.array_equal(read.of_module(m), given().of_module(m)) for m in LEARNED)


def test_other_methods_refuse_coefficients() -> None:
    with pytest.raises(OptionError, match="method linear"):
        lm.plan(LORAS, weights=given(), method="ties")


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {KEY: "nothing"}, {KEY: "[]"}, {KEY: "{}"}, {KEY: json.dumps({"others": ["x"], "names": []})}],
    ids=str,
)
def test_files_that_hold_no_coefficients_are_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "other.safetensors", metadata)

    with pytest.raises(FileError, match="holds no learned coefficients"):
        Coefficients.read(tmp_path / "other.safetensors")
    with pytest.raises(FileError):
        lm.merge(LORAS, weights=str(tmp_path / "none.safetensors"))


def test_a_file_of_gates_is_called_so_where_coefficients_are_wanted(tmp_path: Path) -> None:
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "gates.safetensors", {gates.KEY: "{}"})

    with pytest.raises(FileError, match=r"holds gates.*--compose mole"):
        lm.merge(LORAS, weights=str(tmp_path / "gates.safetensors"))


def test_coefficients_that_are_not_finite_are_refused_by_module(tmp_path: Path) -> None:
    columns = {LEARNED[0]: np.full((2, LORAS[0][LEARNED[0]].shape[1]), np.nan, np.float32)}

    with pytest.raises(NumberError, match=r"attn1\.to_q"):
        lm.merge(LORAS, weights=Coefficients.of(columns, LORAS, [1.0, 1.0]))
    with pytest.raises(LoRAMergeError):
        Coefficients.of(columns, LORAS, [1.0, 1.0]).save(tmp_path / "nan.safetensors")
    assert not list(tmp_path.iterdir())


def test_overlap_is_that_of_the_dense_columns_before_and_after() -> None:
    loras = [small(modules=(TO_Q,), seed=i, rank=3 + i) for i in range(2)]
    m = np.random.default_rng(0).uniform(0, 1, (2, 640)).astype(np.float32)
    dense = [np.asarray(lora[TO_Q].delta(), dtype=np.float64) for lora in loras]

    found = overlaps(loras, Coefficients.of({TO_Q: m}, loras, [1.0, 1.0]), lambda module: "all")["all"]

    for given, scales in zip(found, (np.ones_like(m), m), strict=True):
        a, b = dense[0] * scales[0], dense[1] * scales[1]
        wanted = np.abs((a * b).sum(0)).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
        assert given == pytest.approx(wanted, rel=1e-5)


def test_the_overlap_of_torch_and_numpy_is_that_of_numpy() -> None:
    a, b = (small(modules=(TO_Q,), seed=i) for i in range(2))
    m = np.random.default_rng(0).uniform(0, 1, (2, 640)).astype(np.float32)

    found, wanted = (
        overlaps(loras, Coefficients.of({TO_Q: m}, loras, [1.0, 1.0]), lambda module: "all")["all"]
        for loras in ([lm.load(a.state_dict("kohya")), b], [a, b])
    )

    assert found == pytest.approx(wanted, rel=1e-5)


def test_coefficients_that_share_the_columns_out_leave_no_overlap(tmp_path: Path) -> None:
    files = [lm.save(small(modules=(TO_Q,), seed=i), tmp_path / f"{i}.safetensors", dialect="kohya") for i in range(2)]
    apart = np.array([np.arange(640) % 2, 1 - np.arange(640) % 2], dtype=np.float32)
    kept = Coefficients.of({TO_Q: apart}, [lm.load(f) for f in files], [1.0, 1.0]).save(tmp_path / "c.safetensors")

    said = CliRunner().invoke(app, ["coefficients", str(kept), "--lora", str(files[0]), "--lora", str(files[1])]).output

    row = next(line.split() for line in reversed(said.splitlines()) if line.startswith("unet"))
    before, after = map(float, row[2:])
    assert before > 0.01
    assert after == 0


def test_learned_weights_are_not_baked_but_merged_first(tmp_path: Path) -> None:
    weights = models.base("sdxl")
    base = models.single_file(tmp_path / "base.safetensors", "sdxl", weights)
    with pytest.raises(OptionError, match=r"bake takes numbers as weights.*merge with the learned weights"):
        lm.bake(LORAS, base, tmp_path / "out.safetensors", weights=given())
