"""Ranks out of one budget for all modules."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import loramerge as lm
from loramerge.errors import OptionError
from loramerge.files.lora import LoRA
from loramerge.layers import low_rank
from loramerge.merging import Kept
from loramerge.merging.ranks import Budget, Spectrum, budget, choose
from small import MODULES, WRITTEN, small

SHAPES = {f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn{i}.to_{p}": s for i, p, s in [
    (1, "q", (640, 640)), (1, "k", (640, 640)), (2, "k", (640, 2048)), (2, "v", (640, 2048)),
]}  # fmt: skip


def decaying(rank: int = 16, seed: int = 0) -> LoRA:
    """Modules of very different strength, whose singular values fall at different speeds."""
    rng = np.random.default_rng(seed)
    layouts = {}
    for i, (module, (rows, columns)) in enumerate(SHAPES.items()):
        up = np.linalg.qr(rng.standard_normal((rows, rank)))[0] * 10.0 ** (-i / 2)
        down = np.linalg.qr(rng.standard_normal((columns, rank)))[0].T
        sigma = np.arange(1, rank + 1) ** -(0.5 + 0.4 * i)
        layouts[module] = low_rank((up * sigma).astype(np.float32), down.astype(np.float32), (rows, columns))
    return LoRA(name=f"decaying-{seed}", architecture="sdxl", dialect="kohya", layouts=layouts, dtype="F32")


def spectrum(lora: LoRA, module: str) -> np.ndarray:
    delta = np.asarray(lora[module].delta(), dtype=np.float64)
    return np.linalg.svd(delta.reshape(delta.shape[0], -1), compute_uv=False)


def error(found: LoRA, wanted: LoRA) -> float:
    """The relative error of all modules together, from dense matrices."""
    lost = [np.linalg.norm(np.asarray(wanted[m].delta(), float) - found[m].delta()) ** 2 for m in wanted]
    return math.sqrt(sum(lost) / sum(np.linalg.norm(wanted[m].delta()) ** 2 for m in wanted))


def numbers(lora: LoRA, ranks: dict[str, int] | None = None) -> int:
    """How many numbers the factors take."""
    return sum((s := lora.layout(m).shape)[0] * (r := (ranks or {}).get(m, lora.layout(m).rank)) + math.prod(s[1:]) * r
               for m in lora)  # fmt: skip


@pytest.mark.parametrize("wanted", [0.3, 0.1, 0.01])
def test_an_error_is_met_and_used_up(wanted: float) -> None:
    lora = decaying()

    found = lm.resize(lora, max_error=wanted)

    assert 0.8 * wanted <= error(found, lora) <= wanted * 1.0001


@pytest.mark.parametrize("weights", [[1.0], [{"*": 1.0, "*attn2*": 30.0}]])
def test_an_error_is_met_where_alphas_or_weights_differ_between_modules(
    weights: list[float | dict[str, float]],
) -> None:
    plain = decaying()
    scaled = {module: replace(layer, alpha=16 * 4.0**i) for i, (module, layer) in enumerate(plain.items())}
    lora = replace(plain, layouts=scaled)

    found = lm.merge([lora], weights=weights, max_error=0.1)

    assert 0.08 <= error(found, lm.merge([lora], weights=weights)) <= 0.1 * 1.0001


def test_an_error_is_met_with_a_tucker_core() -> None:
    lora = small(kind="tucker", rank=8, alpha=2)

    found = lm.resize(lora, max_error=0.3)

    assert numbers(found) < numbers(lm.resize(lora, rank=8))
    assert error(found, lora) <= 0.3 * 1.0001


def test_the_error_of_a_merge_is_met() -> None:
    loras = [decaying(seed=1), decaying(seed=2)]

    found = lm.merge(loras, max_error="5%")

    assert error(found, lm.merge(loras)) <= 0.05 * 1.0001
    assert numbers(found) < numbers(lm.merge(loras))


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("budget", [{"max_error": 0.3}, {"energy": 0.75}, {"max_error": 0.3, "rank": 12}])
def test_the_error_of_a_method_that_fills_its_rank_is_that_of_its_result_at_the_largest(
    method: str, budget: dict[str, Any]
) -> None:
    loras = [decaying(rank=8, seed=1), decaying(rank=8, seed=2)]
    whole = lm.merge(loras, method=method, rank=budget.get("rank", "sum"))
    planned = lm.plan(loras, method=method, **budget)
    kept = Kept(planned.steps)

    found = planned.lora(kept).in_memory()

    assert numbers(found) < numbers(whole)
    assert error(found, whole) <= math.sqrt(Budget(*next(iter(budget.items()))).share_lost) * 1.0001
    assert kept.error == pytest.approx(error(found, whole), rel=1e-3)


def test_energy_is_the_share_of_the_square_that_stays() -> None:
    lora = decaying()

    found = lm.resize(lora, energy="99%")

    assert 0.99 <= found.norm() ** 2 / lora.norm() ** 2 <= 0.992
    assert numbers(found) == numbers(lm.resize(lora, max_error=0.1))


@pytest.mark.parametrize("dialect", [d for d in WRITTEN if d != "peft"])
@pytest.mark.parametrize("size", [100_000, 230_000])
def test_a_size_is_met_within_one_direction(dialect: str, size: int, tmp_path: Path) -> None:
    lora = lm.load(decaying().state_dict(dialect, dtype="float32"))

    lm.save(lm.resize(lora, max_size=size), tmp_path / "small.safetensors", dialect=dialect)

    written = (tmp_path / "small.safetensors").stat().st_size
    one_direction = 4 * max(sum(s) for s in SHAPES.values())
    assert size - one_direction < written <= size


@pytest.mark.parametrize("dialect", [d for d in WRITTEN if d != "peft"])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_a_size_of_many_directions_is_met_within_one_percent(dialect: str, share: float, tmp_path: Path) -> None:
    lora = lm.load(decaying(rank=96).state_dict(dialect, dtype="float16"))
    whole = lm.save(lora, tmp_path / "whole.safetensors", dialect=dialect).stat().st_size
    size = int(share * whole)

    lm.save(lm.resize(lora, max_size=size), tmp_path / "small.safetensors", dialect=dialect)

    assert 0.99 * size <= (tmp_path / "small.safetensors").stat().st_size <= size


@pytest.mark.parametrize("wanted", ["30%", "5%", "1%"])
def test_an_error_is_met_by_every_kind_of_layer_that_has_factors(wanted: str) -> None:
    parts = [small(seed=seed, kind=kind, modules=(m,))
             for seed, (kind, m) in enumerate(zip(("lora", "tucker", "loha", "lokr"), MODULES["sdxl"], strict=True))]  # fmt: skip
    lora = replace(parts[0], layouts={m: layer for part in parts for m, layer in part.items()})

    assert error(lm.resize(lora, max_error=wanted), lora) <= float(wanted[:-1]) / 100 * 1.0001


def test_one_budget_for_all_modules_is_smaller_than_a_share_of_energy_in_each() -> None:
    lora = decaying()
    each = {}
    for module in lora:
        left = 1 - np.cumsum(s := spectrum(lora, module) ** 2) / s.sum()
        each[module] = int((left > 0.01).sum()) + 1
    total = sum((spectrum(lora, m) ** 2).sum() for m in lora)
    lost = math.sqrt(sum((spectrum(lora, m)[r:] ** 2).sum() for m, r in each.items()) / total)

    found = lm.resize(lora, max_error=lost)

    assert error(found, lora) <= lost * 1.0001
    assert numbers(found) <= 0.9 * numbers(lora, each)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), min_size=1, max_size=4), st.floats(0.0, 0.8))
def test_the_chosen_ranks_are_the_cheapest_but_for_one_direction(values: list[list[float]], allowed: float) -> None:
    spectra = {str(i): Spectrum(s := np.sort(np.square(v))[::-1], float(s.sum()), 10 + 3 * i)
               for i, v in enumerate(values)}  # fmt: skip
    total = sum(s.energy for s in spectra.values())

    ranks = choose(spectra, Budget("max_error", allowed))

    def cost(chosen: tuple[int, ...]) -> int:
        return sum(r * s.cost for r, s in zip(chosen, spectra.values(), strict=True))

    def lost(chosen: tuple[int, ...]) -> float:
        return sum(float(s.squares[r:].sum()) for r, s in zip(chosen, spectra.values(), strict=True))

    every = itertools.product(*(range(1, len(s.squares) + 1) for s in spectra.values()))
    best = min(cost(c) for c in every if lost(c) <= allowed**2 * total + 1e-9 * total)
    assert lost(tuple(ranks.values())) <= allowed**2 * total + 1e-9 * total
    assert cost(tuple(ranks.values())) <= best + max(s.cost for s in spectra.values())


def test_every_module_keeps_a_direction() -> None:
    found = lm.resize(decaying(), max_error=0.9)

    assert {layer.rank for layer in found.values()} == {1}


@pytest.mark.parametrize(
    ("budget", "way_out"), [({"max_error": 0.01}, "or a larger error"), ({"energy": 0.999}, "or a smaller share")]
)
def test_a_merge_on_entries_says_when_no_rank_that_is_looked_at_meets_a_budget(
    budget: dict[str, float], way_out: str
) -> None:
    with pytest.raises(OptionError, match=rf"can't be met; at the largest rank.*Way out: a larger rank.*{way_out}"):
        lm.merge([small(seed=1), small(seed=2)], method="ties", **budget)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_error": 0.1, "energy": 0.9}, "one budget, got max_error and energy"),
        ({"max_error": 1.0}, r"max_error is a share in \[0, 1\)"),
        ({"max_error": "few"}, "max_error is a share"),
        ({"energy": 0.0}, r"energy is a share in \(0, 1\]"),
        ({"max_size": "150 apples"}, "150MB or 143MiB; got '150 apples'"),
        (
            {"max_size": 1000},
            r"max_size=1000: can't be met: at rank 1 in every module the file takes .* bytes\) as F32",
        ),
    ],
)
def test_a_wrong_budget_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        lm.resize(decaying(), **given)


def test_sizes_have_units() -> None:
    assert [budget(max_size=text).value for text in ("150MB", "1.5 GiB", 77)] == [150e6, 1.5 * 2**30, 77]  # type: ignore[union-attr]


def test_resizing_to_a_rank_is_the_best_fit_of_that_rank() -> None:
    lora = decaying()

    found = lm.resize(lora, rank=5)

    for module in lora:
        optimum = np.linalg.norm(spectrum(lora, module)[5:])
        assert np.linalg.norm(found[module].delta() - lora[module].delta()) <= optimum * 1.0001


def test_a_resize_asks_how_small() -> None:
    for rank in ("sum", "max"):
        with pytest.raises(lm.errors.OptionError, match="How small"):
            lm.resize(decaying(), rank=rank)


def test_the_least_size_that_a_refusal_names_is_one_that_can_be_met() -> None:
    lora = small(rank=4)
    with pytest.raises(OptionError, match="can't be met") as caught:
        lm.plan([lora], weights=[1.0], max_size=1000)
    least = int(str(caught.value).rpartition("a size from ")[2].split()[0])

    assert lm.files.saved_size(lm.plan([lora], weights=[1.0], max_size=least).lora()) == least
