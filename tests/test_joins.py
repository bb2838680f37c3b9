"""Modules that are one weight in the file are cut as one: held against dense SVDs of the stacked matrix."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loramerge as lm
from loramerge.comparing.diffs import differences
from loramerge.errors import OptionError
from loramerge.files.dialects import fuse
from loramerge.files.lora import LoRA
from loramerge.layers import low_rank
from loramerge.merging import Kept, plan
from loramerge.merging.recipe import Recipe
from loramerge.merging.recipe_text import Input, Output
from loramerge.testing import random_layer

ATTENTION = "transformer.transformer_blocks.0.attn."
QKV = tuple(ATTENTION + name for name in ("to_q", "to_k", "to_v"))
ALONE = "transformer.transformer_blocks.0.attn.to_out.0"
SIDE = 3072


def flux(seed: int = 0, rank: int = 4, shared: bool = False, modules: tuple[str, ...] = (*QKV, ALONE)) -> LoRA:
    """A LoRA on one block's attention, with singular values that fall."""
    rng = np.random.default_rng(seed)
    falling = 2.0 ** -np.arange(rank)
    down = rng.standard_normal((rank, SIDE)).astype(np.float32)
    layouts = {}
    for i, module in enumerate(modules):
        up = (rng.standard_normal((SIDE, rank)) * falling * (1 + i)).astype(np.float32)
        own = down if shared and module in QKV else rng.standard_normal((rank, SIDE)).astype(np.float32)
        layouts[module] = low_rank(up, own, (SIDE, SIDE), "qkv" if shared and module in QKV else None)
    return LoRA(name=f"flux-{seed}", architecture="flux", dialect="kohya", layouts=layouts, dtype="F32")


def factors(loras: list[LoRA], modules: tuple[str, ...] = QKV) -> tuple[np.ndarray, np.ndarray]:
    """Stacked factors of the LoRAs' mean in float64: [ΔW_q; ΔW_k; ΔW_v] = up @ down."""
    ups, downs = [], []
    for lora in loras:
        for i, module in enumerate(modules):
            up, down = lora[module].factors()
            rows = np.zeros((len(modules) * SIDE, up.shape[1]))
            rows[i * SIDE : (i + 1) * SIDE] = np.asarray(up, float) / len(loras)
            ups.append(rows)
            downs.append(np.asarray(down, float))
    return np.concatenate(ups, 1), np.concatenate(downs, 0)


def svd(loras: list[LoRA], modules: tuple[str, ...] = QKV) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of the stacked matrix, by QR of its factors."""
    up, down = factors(loras, modules)
    (q_up, r_up), (q_down, r_down) = np.linalg.qr(up), np.linalg.qr(down.T)
    u, s, vt = np.linalg.svd(r_up @ r_down.T)
    return q_up @ u, s, vt @ q_down.T


def distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    up, down = np.concatenate([a[0], -b[0]], 1), np.concatenate([a[1], b[1]], 0)
    return float(np.linalg.norm(np.linalg.qr(up)[1] @ np.linalg.qr(down.T)[1].T))


def save(merged: LoRA, folder: Path, dialect: str = "kohya") -> dict[str, np.ndarray]:
    return load_file(lm.save(merged, folder / "merged.safetensors", dialect=dialect))


def joined(file: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The tensors of the weight that q, k and v are, scale folded in."""
    (stem,) = {key.split(".lora_down")[0] for key in file if key.endswith("img_attn_qkv.lora_down.weight")}
    up, down = file[f"{stem}.lora_up.weight"], file[f"{stem}.lora_down.weight"]
    return up.astype(float) * float(file[f"{stem}.alpha"]) / down.shape[0], down.astype(float)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_joined_weight_gets_the_rank_that_is_asked_for_and_the_best_fit_at_it(
    rank: int, shared: bool, tmp_path: Path
) -> None:
    loras = [flux(0, shared=shared), flux(1, shared=shared)]

    up, down = joined(save(lm.merge(loras, weights="uniform", rank=rank), tmp_path))

    u, s, vt = svd(loras)
    best = u[:, :rank] * s[:rank], vt[:rank]
    assert up.shape == (3 * SIDE, rank)
    assert distance((up, down), best) <= 1e-5 * s[0]


def test_the_parts_of_a_joined_weight_share_their_down() -> None:
    merged = lm.merge([flux(0), flux(1)], weights="uniform", rank=5)

    q, k, v = (merged[module] for module in QKV)

    assert q.down_id == k.down_id == v.down_id
    assert (q.down == k.down).all()
    assert (q.down == v.down).all()
    assert {layer.rank for layer in merged.values()} == {5}


def test_resize_cuts_a_joined_weight_as_one(tmp_path: Path) -> None:
    lora = flux(rank=8)

    up, down = joined(save(lm.resize(lora, rank=4), tmp_path))

    s = svd([lora])[1]
    assert distance((up, down), factors([lora])) == pytest.approx(np.linalg.norm(s[4:]), rel=1e-5)


@pytest.mark.parametrize(("budget", "wanted"), [({"max_error": 0.1}, 0.1), ({"energy": 0.96}, 0.2)])
def test_an_error_is_met_with_no_direction_to_spare(budget: dict[str, Any], wanted: float, tmp_path: Path) -> None:
    lora = flux(rank=8, modules=QKV)

    up, down = joined(save(lm.resize(lora, **budget), tmp_path))

    s = svd([lora])[1]
    assert distance((up, down), factors([lora])) <= wanted * np.linalg.norm(s) * 1.0001
    assert np.linalg.norm(s[down.shape[0] - 1 :]) > wanted * np.linalg.norm(s)


@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
def test_a_size_is_met_within_one_direction(dialect: str, shared: bool, share: float, tmp_path: Path) -> None:
    for seed in range(2):
        source = dialect if shared else "diffusers-peft"
        lm.save(flux(seed, shared=shared), tmp_path / f"{seed}.safetensors", dialect=source)
    one_direction = 4 * 4 * SIDE
    recipe = Recipe(
        loras=tuple(Input(path=str(tmp_path / f"{seed}.safetensors")) for seed in range(2)),
        max_size=int(share * (8 if shared else 24) * one_direction),
        output=Output(to=dialect),
    )
    planned = recipe.plan()

    written = recipe.write(planned, tmp_path / "merged.safetensors").stat().st_size

    assert recipe.max_size - one_direction < written <= recipe.max_size
    assert written == lm.files.saved_size(planned.lora())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_size_counts_the_rows_of_modules_that_are_missing(share: float, tmp_path: Path) -> None:
    lora = flux(rank=12, modules=QKV[:1])
    whole = lm.save(lora, tmp_path / "whole.safetensors").stat().st_size

    size = lm.save(lm.resize(lora, max_size=int(share * whole)), tmp_path / "cut.safetensors").stat().st_size

    assert share * whole - 4 * (3 * SIDE + SIDE) < size <= share * whole


def test_a_joined_weight_of_a_larger_rank_than_its_columns_is_written_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    down = rng.standard_normal((35, 24)).astype(np.float32)
    ups = [rng.standard_normal((24, 35)).astype(np.float32) for _ in QKV]
    layouts = {module: low_rank(up, down, (24, 24), "qkv") for module, up in zip(QKV, ups, strict=True)}
    lora = LoRA(name="wide", architecture="flux", dialect="kohya", layouts=layouts)

    up, down = joined(save(lm.merge([lora], weights=[0.5]), tmp_path))

    assert down.shape[0] == 24
    assert np.allclose(up @ down, 0.5 * np.concatenate([lora[module].delta() for module in QKV]), atol=1e-4)


def test_a_dialect_that_does_not_join_keeps_every_module_its_own_best_fit(tmp_path: Path) -> None:
    loras = [flux(0), flux(1)]
    planned = plan([lm.load(lora.state_dict("diffusers-peft")) for lora in loras], weights="uniform", rank=3)

    merged = planned.lora()

    for module in QKV:
        _, s, _ = svd(loras, (module,))
        lost = distance(tuple(np.asarray(f, float) for f in merged[module].factors()), factors(loras, (module,)))
        assert lost == pytest.approx(np.linalg.norm(s[3:]), rel=1e-4)


def test_nothing_is_cut_where_the_sum_of_ranks_is_kept(tmp_path: Path) -> None:
    loras = [flux(0), flux(1)]

    up, down = joined(save(lm.merge(loras, weights="uniform"), tmp_path))

    assert distance((up, down), factors(loras)) <= 1e-5 * svd(loras)[1][0]


def test_what_was_lost_is_what_dense_matrices_lose() -> None:
    loras = [flux(0), flux(1)]
    planned = plan(loras, weights="uniform", rank=3)
    kept = Kept(planned.steps)

    merged = planned.lora(kept).in_memory()

    lost = {m: distance(tuple(np.asarray(f, float) for f in merged[m].factors()), factors(loras, (m,))) for m in QKV}
    norms = {m: np.linalg.norm(svd(loras, (m,))[1]) for m in QKV}
    for module in QKV:
        assert kept.errors[module] == pytest.approx(lost[module] / norms[module], rel=1e-3)


def test_a_weight_of_which_a_module_is_missing_is_cut_as_one(tmp_path: Path) -> None:
    lora = flux(rank=4, modules=QKV[:2])

    up, down = joined(save(lm.resize(lora, rank=3), tmp_path))

    assert down.shape[0] == 3
    assert not up[2 * SIDE :].any()
    assert distance((up[: 2 * SIDE], down), factors([lora], QKV[:2])) == pytest.approx(
        np.linalg.norm(svd([lora], QKV[:2])[1][3:]), rel=1e-5
    )


@pytest.mark.parametrize("method", ["ties", "iso_c", "tsv", "knots"])
def test_every_method_is_brought_to_the_rank_of_the_joined_weight(method: str, tmp_path: Path) -> None:
    loras = [flux(0, rank=2), flux(1, rank=2)]
    options = {"space": "core"} if method == "ties" else {}

    up, down = joined(save(lm.merge(loras, method=method, rank=3, **options), tmp_path))

    assert down.shape[0] == 3
    assert np.isfinite(up).all()
    assert up.any()


def test_lohas_that_are_no_parts_of_one_are_cut_as_one(tmp_path: Path) -> None:
    layouts = {module: random_layer((24, 24), kind="loha", rank=2, seed=i) for i, module in enumerate(QKV)}
    lora = LoRA(name="lohas", architecture="flux", dialect="kohya", layouts=layouts)

    up, down = joined(save(lm.resize(lora, rank=4), tmp_path))

    u, s, vt = np.linalg.svd(np.concatenate([lora[module].delta() for module in QKV]), full_matrices=False)
    assert down.shape[0] == 4
    assert distance((up, down), (u[:, :4] * s[:4], vt[:4])) <= 1e-5 * s[0]


@pytest.mark.parametrize("rank", ["sum", 6])
@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock"])
def test_a_method_that_chooses_coefficients_has_them_in_a_joined_weight(method: str, rank: int | str) -> None:
    split, shared = flux(0, modules=QKV), flux(1, shared=True, modules=QKV)
    apart = lm.merge([replace(split, dialect="diffusers-peft"), shared], method=method, weights=[0.7, 0.3])

    found = lm.merge([split, shared], method=method, weights=[0.7, 0.3], rank=rank)

    u, s, vt = svd([apart])
    best = len(s) if rank == "sum" else int(rank)
    assert distance(factors([found]), (u[:, :best] * s[:best], vt[:best])) <= 1e-5 * s[0]


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("rank", ["sum", 6])
@pytest.mark.parametrize("second", [QKV, QKV[2:]], ids=["equal ranks", "v has more"])
def test_the_error_of_a_method_that_fills_its_rank_is_met(
    method: str, rank: int | str, second: tuple[str, ...]
) -> None:
    loras = [flux(0, modules=QKV), flux(1, modules=second)]

    found = lm.merge(loras, method=method, rank=rank, max_error=0.5)

    whole = factors([lm.merge(loras, method=method, rank=rank)])
    size = distance(whole, (0 * whole[0], whole[1]))
    assert found.layout(QKV[0]).rank < whole[0].shape[1]
    assert distance(factors([found]), whole) <= 0.5 * size * 1.0001


def test_a_budget_s_ranks_come_out_again_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        lm.save(flux(seed), tmp_path / f"{seed}.safetensors", dialect="diffusers-peft")
    inputs = tuple(Input(path=f"{seed}.safetensors") for seed in range(2))
    first = Recipe(loras=inputs, max_size=10 * 16 * SIDE, output=Output(to="kohya"))
    made = first.run(tmp_path / "a.safetensors")

    with lm.open(made) as merged:
        again = Recipe.of(merged)
    again.run(tmp_path / "b.safetensors")

    assert made.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(("planned", "written"), [("kohya", "diffusers-peft"), ("diffusers-peft", "kohya")])
@pytest.mark.parametrize("how", [{"rank": 3}, {"max_error": 0.3}], ids=str)
def test_a_merge_that_is_saved_in_another_dialect_comes_out_again_bit_for_bit(
    how: dict[str, Any], planned: str, written: str, tmp_path: Path
) -> None:
    files = [lm.save(flux(seed, modules=QKV), tmp_path / f"{seed}.safetensors", dialect=planned) for seed in range(2)]
    made = lm.save(lm.merge(files, **how), tmp_path / "a.safetensors", dialect=written)

    with lm.open(made) as merged:
        (tmp_path / "again.toml").write_text(Recipe.of(merged).to_toml())
    again = Recipe.read(tmp_path / "again.toml")

    assert again.run(tmp_path / "b.safetensors").read_bytes() == made.read_bytes()
    assert again.output.cut_as == planned
    assert again.override(to="comfyui").output.cut_as is None


def test_different_ranks_in_one_weight_are_refused(tmp_path: Path) -> None:
    lora = flux(rank=4)
    lm.save(lora, tmp_path / "0.safetensors", dialect="diffusers-peft")
    ranks = {**dict.fromkeys(lora, 2), QKV[1]: 3}
    recipe = Recipe(loras=(Input(path=str(tmp_path / "0.safetensors")),), ranks=ranks, output=Output(to="kohya"))

    with pytest.raises(OptionError, match=r"are one weight in the dialect kohya, and have different ranks"):
        recipe.plan()


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"max_error": 0.3}], ids=str)
def test_a_weight_of_torch_and_of_numpy_is_one(options: dict[str, Any], tmp_path: Path) -> None:
    a, b = flux(1, modules=QKV), flux(2, modules=QKV[:1])
    torches = lm.load(b.state_dict("diffusers-peft"), architecture="flux")

    wanted, found = (
        lm.save(lm.merge([a, other], **options), tmp_path / f"{i}.safetensors") for i, other in enumerate((b, torches))
    )

    for difference in differences(lm.load(wanted), lm.load(found)):
        assert difference.relative <= 1e-4
    assert set(lm.load(found)) == set(QKV)


def test_the_size_counts_a_shared_down_once() -> None:
    planned = plan([flux(0), flux(1)], rank=3)

    alphas = 2
    assert planned.size == 4 * (3 * (3 * SIDE + SIDE + SIDE + SIDE) + alphas)
    assert math.isclose(planned.joins[QKV[0]].rank, 3)
    assert not fuse.depends(planned.lora().layout(QKV[0]))
