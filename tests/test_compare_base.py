"""Layers whose ΔW is dense, DoRA on a base model and whole differences, are compared as dense algebra says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loramerge as lm
from loramerge import errors, linalg
from loramerge.cli.app import app
from loramerge.comparing.advising import advice
from loramerge.files.lora import LoRA
from loramerge.layers import DoRA, Full, Layer
from loramerge.testing import random_layer
from models import base, folder, single_file
from small import small

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
CONV = "unet.down_blocks.0.resnets.0.conv1"
SHORTCUT = "unet.down_blocks.1.resnets.0.conv_shortcut"
SGM_TO_Q = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
MODULES = (TO_Q, TO_K, CONV)
WEIGHTS = base("sdxl")


def model(path: Path) -> Path:
    return single_file(path / "base.safetensors", "sdxl", WEIGHTS)


def some(kind: str, seed: int) -> LoRA:
    """A LoRA with layers of a kind on a linear layer, one that isn't square, and a convolution."""
    layers = {m: random_layer(WEIGHTS[f"{m}.weight"].shape, kind=kind, rank=2, seed=10 * seed + i)
              for i, m in enumerate(MODULES)}  # fmt: skip
    return LoRA(name=f"{kind} {seed}", architecture="sdxl", dialect="kohya", layouts=layers)


def flat(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64).reshape(array.shape[0], -1)


def dense(layer: Layer, module: str) -> np.ndarray:
    """ΔW in float64; of a DoRA by the paper's formula, W' = m (W + ΔV) / ‖W + ΔV‖."""
    if not isinstance(layer, DoRA):
        return flat(layer.delta())
    weight = WEIGHTS[f"{module}.weight"].astype(np.float64)
    up, down = (factor.astype(np.float64) for factor in layer.direction.factors())
    patched = weight + (up @ down).reshape(weight.shape)
    axes = tuple(range(1, weight.ndim)) if layer.axis == "out" else (0, *range(2, weight.ndim))
    lengths = np.sqrt((patched**2).sum(axis=axes, keepdims=True))
    return flat(layer.magnitude.astype(np.float64).reshape(lengths.shape) * patched / lengths - weight)


def left(delta: np.ndarray, is_dense: bool) -> np.ndarray:
    """A basis of the column space; of a dense ΔW of the directions that carry 99 % of it."""
    u, s, _ = np.linalg.svd(delta, full_matrices=False)
    kept = np.searchsorted(np.cumsum(s**2), 0.99 * (s**2).sum()) + 1 if is_dense else (s > 1e-5 * s[0]).sum()
    return u[:, :kept]


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first.T @ second) ** 2 / min(first.shape[1], second.shape[1]))


def entropy_rank(delta: np.ndarray) -> float:
    shares = np.linalg.svd(delta, compute_uv=False) ** 2
    shares = shares[shares > 1e-12 * shares[0]] / shares.sum()
    return math.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("layout", [single_file, folder])
@pytest.mark.parametrize("second", ["lora", "full", "dora"])
@pytest.mark.parametrize("first", ["full", "dora", "dora-in"])
def test_every_measure_is_that_of_the_dense_updates(first: str, second: str, layout: object, tmp_path: Path) -> None:
    where = model(tmp_path) if layout is single_file else folder(tmp_path / "base", WEIGHTS)
    a, b = some(first, 1), some(second, 2)

    found = lm.compare([a, b], rows=None, base=where)

    assert [row.name for row in found.rows] == list(MODULES)
    for row in found.rows:
        x, y = dense(a[row.name], row.name), dense(b[row.name], row.name)
        pair, is_dense = row.pairs[0, 1], second != "lora"
        lengths = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0)
        mass, opposed = np.abs(x) + np.abs(y), x * y < 0
        u, v = (left(x, True), left(y, is_dense)), (left(x.T, True), left(y.T, is_dense))
        cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        chance = [max(part.shape[1] for part in pair) / pair[0].shape[0] for pair in (u, v)]
        above = [(overlap(*p) - c) / (1 - c) if c < 1 else 0.0 for p, c in zip((u, v), chance, strict=True)]
        clash = math.sqrt(max(above[0], 0.0) * max(above[1], 0.0)) * (1 - cosine) / 2
        assert [alone.norm for alone in row.alone] == pytest.approx([np.linalg.norm(x), np.linalg.norm(y)], rel=1e-5)
        assert [a.effective_rank for a in row.alone] == pytest.approx([entropy_rank(x), entropy_rank(y)], rel=1e-4)
        assert pair.cosine == pytest.approx(cosine, abs=1e-6)
        assert pair.alignment == pytest.approx(np.abs((x * y).sum(0)).sum() / lengths.sum(), abs=1e-6)
        assert pair.conflict == pytest.approx(mass[opposed].sum() / mass.sum(), abs=1e-5)
        assert pair.sum_norm == pytest.approx(np.linalg.norm(x + y), rel=1e-5)
        assert pair.sum_effective_rank == pytest.approx(entropy_rank(x + y), rel=1e-4)
        assert pair.output_overlap == pytest.approx(overlap(*u), abs=1e-5)
        assert pair.input_overlap == pytest.approx(overlap(*v), abs=1e-5)
        assert pair.clash == pytest.approx(clash, abs=1e-5)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_a_whole_difference_that_is_a_lora_is_compared_as_the_lora(shape: tuple[int, int]) -> None:
    layers = [random_layer(shape, rank=3, seed=seed) for seed in (1, 2)]
    a, b = (LoRA(name="a", architecture=None, dialect="kohya", layouts={TO_Q: x}) for x in layers)
    whole = replace(a, layouts={TO_Q: Full(diff=layers[0].delta())})

    found, wanted = (lm.compare([x, b], rows=None).total for x in (whole, a))

    assert found.pairs[0, 1].to_dict() == pytest.approx(wanted.pairs[0, 1].to_dict(), rel=1e-4, abs=1e-6)
    assert found.alone[0].to_dict() == pytest.approx(wanted.alone[0].to_dict(), rel=1e-4)


def test_a_difference_whose_values_are_rounded_has_the_spaces_of_what_was_rounded() -> None:
    layer = random_layer((60, 80), rank=3, seed=1)
    a = LoRA(name="a", architecture=None, dialect="kohya", layouts={TO_Q: layer})
    rounded = replace(a, layouts={TO_Q: Full(diff=layer.delta().astype(np.float16))})

    pair = lm.compare([a, rounded]).total.pairs[0, 1]

    assert (pair.input_overlap, pair.output_overlap) == (pytest.approx(1, abs=1e-3), pytest.approx(1, abs=1e-3))
    assert pair.cosine == pytest.approx(1, abs=1e-5)


def test_equal_dense_updates_are_one_and_unrelated_ones_clash_by_chance_only(tmp_path: Path) -> None:
    a, b, where = some("dora", 1), some("full", 2), model(tmp_path)

    same = lm.compare([a, a], base=where).total.pairs[0, 1]

    assert [same.cosine, same.overlap, same.alignment] == pytest.approx([1, 1, 1], abs=1e-6)
    assert (same.conflict, same.clash) == (0.0, pytest.approx(0.0, abs=1e-6))
    assert lm.compare([a, b], base=where).total.pairs[0, 1].clash < 0.1


def test_a_dense_update_of_zeros_does_no_harm() -> None:
    a = some("full", 1)
    nothing = replace(a, layouts={m: layer.map(np.zeros_like) for m, layer in a.items()})

    total = lm.compare([a, nothing]).total

    assert total.alone[1].effective_rank == 0.0
    assert [total.pairs[0, 1].cosine, total.pairs[0, 1].overlap, total.pairs[0, 1].clash] == [0.0, 0.0, 0.0]


def test_torch_and_numpy_say_the_same_of_dense_updates(tmp_path: Path) -> None:
    import torch

    a, b, where = some("dora", 1), some("full", 2), model(tmp_path)
    torches = replace(a, layouts={m: layer.map(torch.from_numpy) for m, layer in a.items()})

    found, wanted = (lm.compare([x, b], base=where).total.pairs[0, 1].to_dict() for x in (torches, a))

    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_dense_layers_are_listed_and_the_base_is_named(tmp_path: Path) -> None:
    mixed = replace(some("lora", 1), layouts={TO_Q: some("full", 1)[TO_Q], TO_K: some("dora", 1)[TO_K]})

    on_base = lm.compare([some("lora", 2), mixed], base=model(tmp_path))
    without = lm.compare([some("lora", 2), mixed])

    assert [(d.lora, d.module, d.kind) for d in on_base.dense] == [(1, TO_Q, "full"), (1, TO_K, "dora")]
    assert (on_base.not_compared, on_base.base) == ((), "base.safetensors")
    assert [(d.module, d.kind) for d in without.dense] == [(TO_Q, "full")]
    assert [(n.module, n.kind) for n in without.not_compared] == [(TO_K, "dora")]
    assert without.base is None


def test_a_dora_alone_asks_for_its_base() -> None:
    with pytest.raises(errors.NoFactorsError, match=r"can't be compared.*DoRA.*give the base model \(--base, base=…\)"):
        lm.compare([some("lora", 1), some("dora", 2)])


def test_a_base_without_the_module_or_with_another_shape_is_refused(tmp_path: Path) -> None:
    a, b = some("lora", 1), some("dora", 2)
    lacking = single_file(tmp_path / "sd15.safetensors", "sd15", base("sd15"))
    other = {key: value[:8] if key.startswith(TO_Q) else value for key, value in WEIGHTS.items()}

    with pytest.raises(errors.MergeError, match=rf"dora 2: {TO_Q} can't be compared.*base sd15.* no such module"):
        lm.compare([a, b], base=lacking)
    wrong = folder(tmp_path / "other", other)
    with pytest.raises(errors.MergeError, match=rf"{TO_Q}: .*shape \(16, 16\).*base other \(8, 16\)"):
        lm.compare([a, b], base=wrong)
    with pytest.raises(errors.MergeError, match=rf"{TO_Q}: .*shape \(16, 16\).*base other \(8, 16\)"):
        lm.merge([a, b], rank=3, base=wrong)


def test_an_open_checkpoint_may_be_given_and_stays_open(tmp_path: Path) -> None:
    a, b = some("lora", 1), some("dora", 2)
    with lm.checkpoints.open_checkpoint(model(tmp_path)) as checkpoint:
        first, again = (lm.compare([a, b], base=checkpoint).to_dict() for _ in range(2))

    assert first == again


def test_the_advice_of_a_merge_on_a_base_is_that_of_the_comparison_on_it(tmp_path: Path) -> None:
    loras, where = [some("lora", 1), some("dora", 2)], model(tmp_path)
    files = [str(lm.save(lora, tmp_path / f"{i}.safetensors")) for i, lora in enumerate(loras)]

    done = CliRunner().invoke(app, ["merge", *files, "--rank", "3", "--base", str(where), "--dry-run", "--advice"])

    assert advice(lm.compare(files, base=where)) in done.output


def test_the_delta_of_a_dora_is_not_rounded_as_the_weight_is() -> None:
    layer = some("dora", 1)[TO_Q]
    assert isinstance(layer, DoRA)
    weight = WEIGHTS[f"{TO_Q}.weight"]
    faint = replace(
        layer,
        direction=layer.direction.map(lambda t: t * np.float32(1e-3)),
        magnitude=np.linalg.norm(weight.astype(np.float64), axis=1, keepdims=True).astype(np.float32),
    )

    wanted = dense(faint, TO_Q)

    assert np.linalg.norm(faint.delta_on(weight) - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_the_spectrum_of_a_dense_matrix_is_its_svd(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(0).standard_normal(shape)
    up, down = linalg.trivial(delta)

    found = linalg.dense_spectrum(delta)

    np.testing.assert_allclose(up @ down, delta)
    np.testing.assert_allclose(found.sigma, np.linalg.svd(delta, compute_uv=False), rtol=1e-9)
    np.testing.assert_allclose((up @ found.left * found.sigma) @ (found.right.T @ down), delta, atol=1e-9)


@pytest.mark.parametrize(("share", "kept"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.99, 2), (1.0, 3)])
def test_leading_directions_are_the_fewest_that_carry_a_share(share: float, kept: int) -> None:
    found = linalg.leading(linalg.dense_spectrum(np.diag([math.sqrt(x) for x in (8.0, 1.95, 0.05)])), share)

    assert found.rank == found.left.shape[1] == found.right.shape[1] == kept


def test_the_command_takes_a_base(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((640, 640), dtype=np.float32)
    save_file({SGM_TO_Q: weight}, tmp_path / "base.safetensors")
    layers = {**small(modules=(TO_Q,), kind="dora").layouts, **small(modules=(SHORTCUT,), kind="full").layouts}
    mixed = replace(small(modules=(TO_Q,)), layouts=layers)
    names = [str(lm.save(lora, tmp_path / name, dialect="kohya"))
             for lora, name in ((small(), "a.safetensors"), (mixed, "b.safetensors"))]  # fmt: skip
    on_base = ["compare", *names, "--base", str(tmp_path / "base.safetensors")]

    text, plain, found = (CliRunner().invoke(app, words) for words in (on_base, on_base[:3], [*on_base, "--json"]))

    assert text.exit_code == 0, text.output
    assert "dense: 1 module of b (dora on base.safetensors); their spaces hold 99% of ‖ΔW‖²" in text.stdout
    assert "dense: 1 module of b (full)" in text.stdout
    assert "not compared: 1 module of b (dora; --base compares them)" in plain.stdout
    data = json.loads(found.stdout)
    assert data["base"] == "base.safetensors"
    assert {(d["module"], d["kind"]) for d in data["dense"]} == {(TO_Q, "dora"), (SHORTCUT, "full")}


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    scale = SGM_TO_Q.replace(".weight", ".scale_weight")
    tensors = {SGM_TO_Q: np.zeros((16, 16), np.int8), scale: np.ones(1, np.float32)}
    save_file(tensors, tmp_path / "q.safetensors")
    a, b = (x.select(TO_Q) for x in (some("lora", 1), some("dora", 2)))

    with pytest.raises(errors.FileError, match="quantised"):
        lm.compare([a, b], base=tmp_path / "q.safetensors")
