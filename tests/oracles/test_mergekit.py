"""mergekit on ΔWs, its base model being zero: equal where it follows the papers, and where it doesn't."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mergekit import sparsify
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope, TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.merge_methods.karcher import karcher_merge_tensors
from mergekit.merge_methods.sce import sce_mask
from mergekit.merge_methods.slerp import slerp

from loramerge.errors import MergeError
from loramerge.layers import Layer, LowRank
from loramerge.testing import random_layer, relative_error
from oracles.dense import SHAPES, Draws, deltas, layers, tensors, uncut

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_density = pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.9])
every_weights = pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.3), (0.2, 0.7, 1.4), (1.0, 2.0, 0.1, 0.4)])


def mergekit(name: str, given: Sequence[Layer], weights: Sequence[float] = (), **options: Any) -> np.ndarray:
    """One of mergekit's methods as its own registry has it, with zeros as the base model."""
    method = registry.get(name)
    deltas = tensors(given)
    group = TensorGroup.from_tensors([torch.zeros_like(deltas[0]), *deltas], base_index=0)
    parameters = {p.name: p.default for p in method.spec.parameters} | options
    for p in method.spec.parameters:
        if p.scope is ParameterScope.NON_BASE:
            values = weights if p.name == "weight" else [parameters[p.name]] * len(deltas)
            parameters[p.name] = dict(enumerate(values, start=1))
    return method.merge_group(group, **parameters).double().numpy()


@every_density
@every_weights
@every_shape
def test_ties_is_mergekits_times_the_sum_of_the_weights(shape: str, weights: tuple[float, ...], density: float) -> None:
    given = layers(len(weights), shape)

    wanted = sum(weights) * mergekit("ties", given, weights, density=density, rescale=False)

    assert relative_error(uncut("ties", given, weights, density=density), wanted) < 1e-6


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, -0.3), (0.2, -0.7, 1.4)])
def test_ties_elects_the_signs_that_mergekits_vote_does_negative_weights_included(weights: tuple[float, ...]) -> None:
    given = layers(len(weights))
    voting = torch.stack([w * x for w, x in zip(weights, tensors(given, torch.float64), strict=True)])

    agreed = (voting * get_mask(voting)).sum(dim=0).numpy()
    found = uncut("ties", given, weights, density=1.0)

    np.testing.assert_array_equal(np.sign(found), np.sign(agreed))


def test_a_negative_weight_divides_by_its_magnitude_here_and_turns_the_entry_in_mergekit() -> None:
    given = layers(1)

    wanted = -0.5 * deltas(given)[0]

    assert relative_error(uncut("ties", given, [-0.5], density=1.0), wanted) < 1e-6
    assert relative_error(mergekit("ties", given, [-0.5], density=1.0, rescale=False), -2 * wanted) < 1e-6


@every_density
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, -0.3, 0.4)])
@every_shape
def test_dare_is_mergekits_without_its_rescaling_over_the_density_with_the_same_mask(
    shape: str, weights: tuple[float, ...], density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = layers(len(weights), shape)
    monkeypatch.setattr(torch, "bernoulli", Draws(seed=5))

    wanted = mergekit("dare_linear", given, weights, density=density, rescale=False) / density

    assert relative_error(uncut("dare", given, weights, density=density, seed=5), wanted) < 1e-6


def test_dare_with_signs_is_mergekits_normalised_times_the_sum_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    given, weights = layers(3), [0.9, 0.3, 0.4]
    monkeypatch.setattr(torch, "bernoulli", Draws(seed=5))

    wanted = mergekit("dare_ties", given, weights, density=0.4, rescale=False, normalize=True) * 1.6 / 0.4

    assert relative_error(uncut("dare", given, weights, density=0.4, seed=5, consensus="ties"), wanted) < 1e-6


def test_mergekits_rescaling_keeps_the_sum_of_magnitudes_and_dares_is_one_over_the_density(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = layers(1)
    (delta,) = deltas(given)
    monkeypatch.setattr(torch, "bernoulli", Draws(seed=5))

    found = uncut("dare", given, [1.0], density=0.2, seed=5)
    theirs = mergekit("dare_linear", given, [1.0], density=0.2, rescale=True)

    assert np.abs(theirs).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)
    assert relative_error(found[found != 0], delta[found != 0] / 0.2) < 1e-6
    assert relative_error(theirs, found * np.abs(delta).sum() / np.abs(found).sum()) < 1e-6


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.7, 0.15), (0.3, 0.0), (0.2, 0.19)])
@every_shape
def test_della_is_mergekits_without_its_rescaling_over_the_chances_with_the_same_mask(
    shape: str, density: float, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, weights = layers(3, shape), [0.9, -0.3, 0.4]
    draws = Draws(seed=5)
    monkeypatch.setattr(torch, "bernoulli", draws)
    options = {"density": density, "epsilon": epsilon}

    kept = [sparsify.della_magprune(x, **options).double() for x in tensors(given)]
    wanted = sum(w * (x / p) for w, x, p in zip(weights, kept, draws.chances, strict=True)).numpy()

    assert relative_error(uncut("della", given, weights, **options, seed=5, consensus="linear"), wanted) < 1e-6


def test_mergekit_scales_every_entry_of_della_alike_and_the_paper_by_its_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, options = layers(1), {"density": 0.5, "epsilon": 0.4}
    (delta,) = deltas(given)
    monkeypatch.setattr(torch, "bernoulli", Draws(seed=5))

    found = uncut("della", given, [1.0], **options, seed=5, consensus="linear")
    theirs = mergekit("della_linear", given, [1.0], **options, rescale=True)

    kept = found != 0
    np.testing.assert_array_equal(kept, theirs != 0)
    assert np.ptp(theirs[kept] / delta[kept]) < 1e-5
    assert np.ptp(found[kept] / delta[kept]) > 5


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("gamma", [0.0, 0.007, 0.05])
@every_shape
def test_breadcrumbs_is_mergekits(shape: str, gamma: float, density: float) -> None:
    given, weights = layers(3, shape), [0.9, -0.3, 0.4]

    wanted = mergekit("breadcrumbs", given, weights, density=density, gamma=gamma, rescale=False)

    assert relative_error(uncut("breadcrumbs", given, weights, density=density, gamma=gamma), wanted) < 1e-6


def test_breadcrumbs_with_signs_is_mergekits_normalised_times_the_sum_of_the_weights() -> None:
    given, weights, options = layers(3), [0.9, 0.3, 0.4], {"density": 0.4, "gamma": 0.01}

    wanted = 1.6 * mergekit("breadcrumbs_ties", given, weights, **options, rescale=False, normalize=True)

    assert relative_error(uncut("breadcrumbs", given, weights, **options, consensus="ties"), wanted) < 1e-6


@pytest.mark.parametrize("density", [0.1, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("count", [2, 3, 5])
@every_shape
def test_sce_at_one_nth_is_mergekits(shape: str, count: int, density: float) -> None:
    given = layers(count, shape)

    wanted = mergekit("sce", given, select_topk=density)

    assert relative_error(uncut("sce", given, [1 / count] * count, density=density), wanted) < 1e-5


def test_sce_selects_the_entries_that_mergekit_does() -> None:
    given = layers(3)

    mask = sce_mask(torch.stack(tensors(given)), 0.2).numpy()

    assert not uncut("sce", given, [1 / 3] * 3, density=0.2)[mask == 0].any()


def test_energies_below_a_millionth_count_in_sce_and_alike_in_mergekit() -> None:
    given = [layers(1)[0], random_layer((40, 28), rank=3, alpha=12.0, seed=9)]
    faint = [x.map(lambda t: t * np.float32(0.01)) for x in given]

    found, tiny = (uncut("sce", x, [0.5, 0.5], density=1.0) for x in (given, faint))
    theirs, alike = (mergekit("sce", x) for x in (given, faint))

    assert relative_error(tiny * 1e4, found) < 1e-5
    assert relative_error(theirs, found) < 1e-5
    assert relative_error(alike * 1e4, found) > 0.05


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9])
@every_shape
def test_slerp_is_mergekits(shape: str, t: float) -> None:
    given = layers(2, shape)
    first, second = (x.unsqueeze(0) for x in tensors(given, torch.float64))

    wanted = slerp(torch.tensor([t]), first, second)[0].numpy()

    assert relative_error(uncut("slerp", given, [1 - t, t]), wanted) < 1e-6
    assert relative_error(uncut("slerp", given, [3 * (1 - t), 3 * t]), 3 * wanted) < 1e-6


def test_opposite_loras_are_refused_by_slerp_and_cancelled_by_mergekit() -> None:
    (given,) = layers(1)
    (delta,) = tensors([given], torch.float64)

    with pytest.raises(MergeError, match="opposite"):
        uncut("slerp", [given, opposite(given)], [0.5, 0.5])

    assert not slerp(torch.tensor([0.5]), delta[None], -delta[None]).any()


def opposite(layer: Layer) -> Layer:
    """The layer of −ΔW."""
    assert isinstance(layer, LowRank)
    return replace(layer, up=-layer.up)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.3, 0.5), (1.0, 2.0, 0.1, 0.4)])
@every_shape
def test_karcher_is_mergekits_mean_iterated_to_its_end(shape: str, weights: tuple[float, ...]) -> None:
    given = layers(len(weights), shape)

    wanted = karcher_merge_tensors(tensors(given, torch.float64), list(weights), max_iter=100, tol=1e-9).numpy()

    assert relative_error(uncut("karcher", given, weights), wanted) < 1e-6


def test_the_weights_act_in_karcher_and_mergekits_method_knows_none() -> None:
    given, method = layers(3), registry.get("karcher")
    theirs = method.merge_group(TensorGroup.from_tensors(tensors(given))).double().numpy()

    assert "weight" not in {p.name for p in method.spec.parameters}
    assert relative_error(uncut("karcher", given, [1 / 3] * 3), theirs) < 1e-4
    assert relative_error(uncut("karcher", given, [0.6, 0.3, 0.1]), theirs) > 0.1


@pytest.mark.parametrize("count", [2, 3, 5])
@every_shape
def test_model_stock_at_one_nth_is_mergekits(shape: str, count: int) -> None:
    given = layers(count, shape)

    wanted = mergekit("model_stock", given)

    assert relative_error(uncut("model_stock", given, [1 / count] * count), wanted) < 1e-4


def test_loras_that_cancel_out_are_refused_by_model_stock_and_become_nothing_in_mergekit() -> None:
    (given,) = layers(1)

    with pytest.raises(MergeError, match="cancel out"):
        uncut("model_stock", [given, opposite(given)], [0.5, 0.5])

    assert not mergekit("model_stock", [given, opposite(given)]).any()


def test_linear_is_mergekits_task_arithmetic() -> None:
    given, weights = layers(3), [0.9, -0.3, 0.4]

    wanted = mergekit("task_arithmetic", given, weights, density=1.0, rescale=False)

    assert relative_error(uncut("linear", given, weights), wanted) < 1e-6


def test_mergekits_ram_finds_nothing_unique_in_loras_and_is_their_mean() -> None:
    given = layers(2, "conv")

    assert min(np.abs(d).min() for d in deltas(given)) > 1e-6
    assert relative_error(mergekit("ram", given, epsilon=1e-6), uncut("linear", given, [0.5, 0.5])) < 1e-6
