"""Moments from a running model, and the LoRAs that the closed form makes of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loramerge as lm
from dense import FAMILIES, World, close
from loramerge.errors import FileError, MergeError, NumberError, OptionError
from loramerge.files.lora import LoRA
from loramerge.layers import Layer, low_rank
from loramerge.learned.attach import attach
from loramerge.learned.calibration import calibrate
from loramerge.learned.least_squares import Granularity, Prior, lsq
from loramerge.learned.moments import Kind, Moments
from loramerge.testing import relative_error
from toy import Batch, draw, lora_for, predict, toy, with_lora

GRANULARITIES: tuple[Granularity, ...] = ("global", *FAMILIES)


def two(**options: object) -> tuple[nn.Module, list[LoRA]]:
    model = toy()
    return model, [lora_for(model, seed=1, **options), lora_for(model, seed=2, rank=3, **options)]


def calibrated(model: nn.Module, loras: list[LoRA], kind: Kind = "gram", **options: object) -> Moments:
    return calibrate(predict(model), {"unet": model}, loras, draw, kind=kind, batches=3, batch_size=2, **options)


def inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What every module sees, patches of it for a convolution, as rows."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0]
            if isinstance(module, nn.Conv2d):
                x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride).movedim(1, -1)
            seen[f"unet.{name}"] = x.reshape(-1, x.shape[-1]).double()

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if not list(m.children())]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def dense_moments(model: nn.Module, loras: list[LoRA]) -> dict[str, list[Tensor]]:
    """Cᵢ of every module, from copies of the model with one LoRA's ΔW in the weights."""
    generator = torch.Generator().manual_seed(0)
    totals: dict[str, list[Tensor]] = {}
    for _ in range(3):
        for i, lora in enumerate(loras):
            for module, x in inputs(with_lora(model, lora), draw(i, generator, 2)).items():
                found = totals.setdefault(module, [torch.zeros(1)] * len(loras))
                found[i] = found[i] + x.T @ x / len(x) / 3
    return totals


def test_an_autocast_of_the_models_leaves_the_sums_in_full_precision() -> None:
    model, loras = two()

    def in_bf16(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)  # type: ignore[no-any-return]

    exact = calibrated(model, loras)
    found = calibrate(in_bf16, {"unet": model}, loras, draw, kind="gram", batches=3, batch_size=2)
    first = "unet.conv_in"

    assert torch.equal(found.modules[first].core, exact.modules[first].core)
    assert torch.equal(found.modules[first].gram, exact.modules[first].gram)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_moments_are_those_of_the_model_with_each_lora_in_its_weights(kind: str) -> None:
    model, loras = two(kind=kind)
    moments = calibrated(model, loras)
    wanted = dense_moments(model, loras)

    for module, found in moments.modules.items():
        downs = [torch.from_numpy(np.array(lora[module].factors()[1])).double() for lora in loras]
        down = torch.cat(downs)
        cross = torch.cat([d @ c for d, c in zip(downs, wanted[module], strict=True)])
        assert close(found.core / 3, torch.stack([down @ c @ down.T for c in wanted[module]]), 1e-5)
        assert close(moments.gram(module).double() / 3, torch.stack(wanted[module]).sum(0), 1e-5)
        assert close(found.cross / 3, cross, 1e-5)


@pytest.mark.parametrize("granularity", FAMILIES)
def test_the_merged_file_is_the_dense_optimum(granularity: Granularity, tmp_path: Path) -> None:
    model, loras = two()
    wanted = dense_moments(model, loras)
    merged, _ = lsq(loras, calibrated(model, loras), granularity=granularity, ridge=1e-3)
    again = lm.load(lm.save(merged, tmp_path / "merged.safetensors", dialect="diffusers"))

    for module in ("unet.to_q", "unet.conv_in", "unet.down", "unet.shortcut"):
        factors = [[torch.from_numpy(np.array(t)).double() for t in lora[module].factors()] for lora in loras]
        world = World(ranks=(2, 3))
        world.ups, world.downs = [u for u, _ in factors], [d for _, d in factors]
        # Rows whose second moments are the wanted ones.
        world.inputs = [torch.linalg.cholesky(c + 1e-12 * torch.eye(len(c))).T for c in wanted[module]]
        up, down = (torch.from_numpy(np.array(t)).double() for t in again[module].factors())
        base = float(world.loss(torch.zeros(up.shape[0], down.shape[1], dtype=torch.float64)))
        best = float(world.loss(world.optimum(granularity)))

        assert best - 1e-6 * base <= float(world.loss(up @ down)) <= 1.01 * best + 1e-2 * base


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_fit_in_the_report_is_the_dense_loss(granularity: Granularity) -> None:
    model, loras = two()
    wanted = dense_moments(model, loras)
    merged, report = lsq(loras, calibrated(model, loras), granularity=granularity)

    for module, moments in wanted.items():
        deltas = [torch.from_numpy(np.array(lora[module].delta())).double().flatten(1) for lora in loras]
        found = torch.from_numpy(np.array(merged[module].delta())).double().flatten(1)

        def loss(m: Tensor, deltas: list[Tensor] = deltas, moments: list[Tensor] = moments) -> float:
            return sum(float(((m - d) @ c * (m - d)).sum()) for d, c in zip(deltas, moments, strict=True))

        base = loss(torch.zeros_like(found))
        assert report.fits[module] == pytest.approx(loss(found) / base, abs=1e-4)
        assert report.sums[module] == pytest.approx(loss(sum(deltas)) / base, rel=1e-4)
        assert report.means[module] == pytest.approx(loss(sum(deltas) / 2) / base, rel=1e-4)


@pytest.mark.parametrize("granularity", ["global", "layer", "rank", "core"])
def test_moments_of_the_factors_are_enough_for_the_small_families(granularity: Granularity) -> None:
    model, loras = two()
    small, report = lsq(loras, calibrated(model, loras, "core"), granularity=granularity)
    large, other = lsq(loras, calibrated(model, loras), granularity=granularity)

    assert all(relative_error(small[m].delta(), large[m].delta()) <= 1e-5 for m in large)
    assert report.fits == pytest.approx(other.fits, abs=1e-5)


def test_one_global_factor_is_the_best_over_all_modules() -> None:
    model, loras = two()
    moments = calibrated(model, loras, "core")
    merged, _ = lsq(loras, moments, granularity="global", ridge=0.0)
    dense = dense_moments(model, loras)
    deltas = {m: [torch.from_numpy(np.array(x[m].delta())).double().flatten(1) for x in loras] for m in moments.modules}
    rows = [
        torch.stack([(d @ torch.linalg.cholesky(c + 1e-12 * torch.eye(len(c)))).flatten() for d in deltas[m]], 1)
        for m in dense
        for c in dense[m]
    ]
    targets = [rows[k][:, k % 2] for k in range(len(rows))]
    best = np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(targets).numpy(), rcond=None)[0]

    for module in moments.modules:
        wanted = sum(w * d for w, d in zip(best, deltas[module], strict=True))
        assert relative_error(merged[module].delta(), wanted.reshape(loras[0][module].shape)) <= 1e-4


def test_one_factor_for_all_modules_fits_no_better_than_one_a_module() -> None:
    model, loras = two()
    moments, dense = calibrated(model, loras), dense_moments(model, loras)
    deltas = {m: [torch.from_numpy(np.array(x[m].delta())).double().flatten(1) for x in loras] for m in dense}
    losses = []
    for granularity in ("global", "layer", "column", "full"):
        merged, _ = lsq(loras, moments, granularity=granularity, ridge=0.0)
        found = {m: torch.from_numpy(np.array(merged[m].delta())).double().flatten(1) for m in dense}
        losses.append(
            sum(
                float(((found[m] - d) @ c * (found[m] - d)).sum())
                for m in dense
                for d, c in zip(deltas[m], dense[m], strict=True)
            )
        )

    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("granularity", ["global", "layer", "rank", "core"])
def test_a_lora_whose_error_counts_much_is_answered_better(granularity: Granularity) -> None:
    model, loras = two()
    moments, small = calibrated(model, loras), calibrated(model, loras, "core")
    dense = dense_moments(model, loras)

    def miss(weights: list[float]) -> float:
        merged, report = lsq(loras, moments, granularity=granularity, weights=weights)
        assert report.fits == pytest.approx(
            lsq(loras, small, granularity=granularity, weights=weights)[1].fits, abs=1e-4
        )
        rest = {m: (torch.from_numpy(merged[m].delta() - loras[0][m].delta()).double().flatten(1)) for m in merged}
        return sum(float((d @ dense[m][0] * d).sum()) for m, d in rest.items())

    assert miss([100.0, 1.0]) < 0.5 * miss([1.0, 1.0])


def test_a_merge_of_the_loras_can_act_in_another_round() -> None:
    model, loras = two()
    acting = lm.merge(loras, weights=[0.5, 0.7], rank=2)
    moments = calibrated(model, loras, merged=acting)
    wanted = dense_moments(model, [acting, acting])

    for module in moments.modules:
        assert close(moments.gram(module).double() / 3, torch.stack(wanted[module]).sum(0), 1e-5)


def test_layers_that_are_given_the_same_tensor_share_one_gram() -> None:
    model, loras = two()
    moments = calibrated(model, loras)

    assert {m: found.leader for m, found in moments.modules.items() if found.leader} == {"unet.to_v": "unet.to_k"}
    assert moments.gram("unet.to_v") is moments.gram("unet.to_k")


def test_a_tensor_that_was_written_to_is_another() -> None:
    model, loras = two()
    moments = Moments("gram", ("a", "b"))
    with attach({"unet": model}, loras) as attachment:
        x = torch.randn(2, 5)
        moments.update("unet.to_k", attachment.sites["unet.to_k"], 0, x)
        moments.update("unet.to_v", attachment.sites["unet.to_v"], 0, x.mul_(2))
        assert moments.modules["unet.to_v"].leader is None
        with torch.inference_mode():
            y = torch.randn(2, 6)
        for module in ("unet.to_q", "unet.out"):
            moments.update(module, attachment.sites[module], 0, y)
        assert moments.modules["unet.out"].leader is None


def test_layers_that_stop_sharing_their_inputs_are_refused() -> None:
    model, loras = two()
    moments = Moments("gram", ("a", "b"))
    with attach({"unet": model}, loras) as attachment:
        sites = attachment.sites
        x = torch.randn(2, 5)
        for module in ("unet.to_k", "unet.to_v"):
            moments.update(module, sites[module], 0, x)
        moments.update("unet.to_k", sites["unet.to_k"], 1, x)
        with pytest.raises(MergeError, match=r"unet\.to_v was given the same tensor as unet\.to_k"):
            moments.update("unet.to_v", sites["unet.to_v"], 1, x.clone())


def test_two_rounds_average_to_the_mean_of_their_moments() -> None:
    model, loras = two()
    first, second = calibrated(model, loras), calibrated(model, loras, seed=1)
    both = first.averaged(second)

    for module in both.modules:
        mean = (first.modules[module].core + second.modules[module].core) / 6
        assert close(both.modules[module].core / both.batches(module), mean, 1e-12)


@pytest.mark.parametrize("kind", ["core", "gram"])
def test_saved_moments_are_the_same_to_the_last_bit(kind: Kind, tmp_path: Path) -> None:
    model, loras = two()
    moments = calibrated(model, loras, kind)
    again = Moments.load(moments.save(tmp_path / "moments.safetensors"))

    assert (again.kind, again.names, again.marks) == (moments.kind, moments.names, moments.marks)
    for module, found in moments.modules.items():
        other = again.modules[module]
        assert (other.updates, other.leader) == (found.updates, found.leader)
        for a, b in ((other.core, found.core), (other.gram, found.gram), (other.cross, found.cross)):
            assert (a is None and b is None) or torch.equal(a, b)


def test_modules_of_other_components_are_summed() -> None:
    model, loras = two()
    extra = lora_for(toy(), ["unet.to_q"], seed=9)["unet.to_q"]
    loras = [lora_with(lora, "text_encoder.q", extra) for lora in loras]
    merged, report = lsq(loras, calibrated(model, loras, "core"))

    assert "text_encoder.q" not in report.fits
    assert relative_error(merged["text_encoder.q"].delta(), 2 * np.float64(extra.delta())) <= 1e-6


def lora_with(lora: LoRA, module: str, layer: object) -> LoRA:
    return replace(lora, layouts={**lora.layouts, module: layer})


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_module_that_one_lora_has_keeps_its_rank_and_grows_no_larger(granularity: Granularity) -> None:
    model = toy()
    loras = [lora_for(model, seed=1), lora_for(model, ["unet.to_q"], seed=2)]
    merged, _ = lsq(loras, calibrated(model, loras), granularity=granularity, ridge=0.0)
    alone = {"unet.to_v", "unet.conv_in"}

    for module in alone:
        wanted = np.float64(loras[0][module].delta())
        assert merged[module].rank == loras[0][module].rank
        assert np.linalg.norm(merged[module].delta()) <= 1.01 * np.linalg.norm(wanted)


@pytest.mark.parametrize("batches", [[1, 2], [1, 0]])
def test_unequal_numbers_of_batches_are_refused(batches: list[int]) -> None:
    model, loras = two()
    moments = Moments("core", ("a", "b"))
    with attach({"unet": model}, loras) as attachment:
        for lora, count in enumerate(batches):
            for _ in range(count):
                moments.update("unet.to_q", attachment.sites["unet.to_q"], lora, torch.randn(1, 4, 6))

    with pytest.raises(MergeError, match="as many of each"):
        lsq(loras, moments)


def test_moments_of_the_same_loras_in_another_order_are_refused() -> None:
    model = toy()
    loras = [lora_for(model, seed=1), lora_for(model, seed=2)]
    moments = calibrated(model, loras)

    with pytest.raises(MergeError, match="another order"):
        lsq(loras[::-1], moments)


def test_moments_of_other_loras_are_neither_used_nor_averaged() -> None:
    model, loras = two()
    others = [loras[0], lora_for(model, seed=5, rank=3)]

    with pytest.raises(MergeError, match="others"):
        lsq(others, calibrated(model, loras))
    with pytest.raises(MergeError, match="other LoRAs"):
        calibrated(model, loras).averaged(calibrated(model, others))
    with pytest.raises(MergeError, match="2 LoRAs, got 3"):
        lsq([*loras, loras[0]], calibrated(model, loras))


def test_a_model_that_gives_nan_is_refused() -> None:
    model, loras = two()
    moments = calibrate(
        predict(model),
        {"unet": model},
        loras,
        lambda i, g, n: {**draw(i, g, n), "text": torch.full((n, 2, 5), torch.nan)},
    )

    with pytest.raises(NumberError, match=r"unet.to_k: its inputs were NaN"):
        lsq(loras, moments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "columns"}, "Unknown granularity"),
        ({"prior": "zero"}, "Unknown prior"),
        ({"solver": "qr"}, "Unknown solver"),
        ({"ridge": -0.1}, "ridge"),
        ({"ridge": "much"}, "ridge must be a number from 0, got 'much'"),
        ({"ridge": float("nan")}, "ridge"),
        ({"weights": [1.0]}, "Weights given: 1, LoRAs: 2"),
        ({"weights": [1.0, 0.0]}, "above 0"),
        ({"weights": [1.0, float("nan")]}, "above 0"),
        ({"weights": [1.0, 2.0], "granularity": "full"}, "takes no weights"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    model, loras = two()

    with pytest.raises(OptionError, match=message):
        lsq(loras, calibrated(model, loras), **options)


def nearly_dead(lora: LoRA, scale: float) -> LoRA:
    """A LoRA whose first row of every ``down`` is that much smaller."""

    def layer(module: str) -> Layer:
        up, down = (np.array(factor) for factor in lora[module].factors())
        down[0] *= scale
        return low_rank(up, down, lora[module].shape)

    return replace(lora, layouts={module: layer(module) for module in lora})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_nearly_dead_row_leaves_the_fit_between_none_and_the_sums(
    granularity: Granularity, scale: float, seed: int
) -> None:
    model, (first, second) = two()
    loras = [first, nearly_dead(second, scale)]
    moments = calibrated(model, loras, seed=seed)

    for ridge in (None, 0.0, 1e-5):
        merged, report = lsq(loras, moments, granularity=granularity, ridge=ridge)
        assert all(fit >= 0 for fit in report.fits.values())
        if granularity != "global":
            assert all(report.fits[m] <= report.sums[m] + 1e-6 for m in report.fits)
        assert all(np.isfinite(merged[m].delta()).all() for m in merged)


def test_moments_of_the_factors_have_no_eigenvalue_below_zero() -> None:
    model, loras = two()

    for module in calibrated(model, loras, "core").modules.values():
        values = torch.linalg.eigvalsh(module.core)
        assert bool((values[:, 0] >= -1e-14 * values[:, -1]).all())


@pytest.mark.parametrize("granularity", ["column", "full"])
def test_a_fit_that_can_not_be_is_refused_by_the_modules_name(granularity: Granularity) -> None:
    model, loras = two()
    moments = calibrated(model, loras)
    gram = moments.gram("unet.to_q")
    assert gram is not None
    gram *= 0.5

    with pytest.raises(MergeError, match=r"^unet\.to_q: its error came out as -.* Ways out: a larger ridge"):
        lsq(loras, moments, granularity=granularity)


@pytest.mark.parametrize("part", ["core", "gram", "cross"])
def test_moments_that_are_not_finite_are_refused(part: str) -> None:
    model, loras = two()
    moments = calibrated(model, loras)
    getattr(moments.modules["unet.to_q"], part)[..., 0] = torch.inf

    with pytest.raises(NumberError, match=r"^unet\.to_q: its inputs were NaN or infinite"):
        lsq(loras, moments)


def test_small_moments_are_not_enough_for_columns() -> None:
    model, loras = two()

    with pytest.raises(MergeError, match="'gram'"):
        lsq(loras, calibrated(model, loras, "core"), granularity="column")


@pytest.mark.parametrize(
    ("options", "told"),
    [({"kind": "grams"}, "kind of moments 'grams'"), ({"batches": 0}, "0 batches of 1"), ({"batch_size": 0}, "of 0")],
)
def test_wrong_options_of_calibration_are_refused(options: dict[str, object], told: str) -> None:
    model, loras = two()

    with pytest.raises(OptionError, match=told):
        calibrate(predict(model), {"unet": model}, loras, draw, **options)


def test_files_that_hold_no_moments_are_refused(tmp_path: Path) -> None:
    model, loras = two()
    whole = calibrated(model, loras).save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    (tmp_path / "lacks.safetensors").write_bytes(whole.replace(b"unet.to_q.gram", b"unet.to_q.gone"))

    lm.save(loras[0], tmp_path / "lora.safetensors")
    for name in ("cut", "lora", "lacks", "none"):
        with pytest.raises(FileError, match=name):
            Moments.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("prior", ["sum", "mean"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_large_ridge_gives_the_sum_or_the_average(granularity: Granularity, prior: Prior) -> None:
    model, loras = two()
    merged, _ = lsq(loras, calibrated(model, loras), granularity=granularity, ridge=1e8, prior=prior)
    plain = lm.merge(loras, weights=[1.0 if prior == "sum" else 0.5] * 2)

    assert all(relative_error(merged[m].delta(), plain[m].delta()) <= 1e-5 for m in plain)
