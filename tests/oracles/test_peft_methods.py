"""PEFT's TIES, DARE and pruning of whole ΔWs: equal where PEFT follows the papers, and where it doesn't."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils

import loramerge as lm
from loramerge.files.lora import LoRA
from loramerge.layers import Layer
from loramerge.merging.methods import METHODS
from loramerge.merging.methods.selection import module_seed
from loramerge.testing import random_layer, relative_error
from oracles.dense import SHAPES, Draws, deltas, layers, tensors, uncut

Peft = Callable[[list[torch.Tensor], torch.Tensor, float], torch.Tensor]

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_count = pytest.mark.parametrize("count", [1, 2, 3, 5])
every_density = pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.9])


def peft(formula: Peft, given: Sequence[Layer], weights: Sequence[float], density: float) -> np.ndarray:
    return formula(tensors(given), torch.tensor(weights), density).double().numpy()


@every_density
@every_count
@every_shape
def test_ties_at_one_nth_is_pefts_at_one(shape: str, count: int, density: float) -> None:
    given = layers(count, shape)

    wanted = peft(merge_utils.ties, given, [1.0] * count, density)

    assert relative_error(uncut("ties", given, [1 / count] * count, density=density), wanted) < 1e-6


@every_density
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.2, -0.4), (1.0, -1.0)])
@every_shape
def test_magnitude_prune_is_pefts(shape: str, weights: tuple[float, ...], density: float) -> None:
    given = layers(len(weights), shape)

    wanted = peft(merge_utils.magnitude_prune, given, weights, density)

    assert relative_error(uncut("magnitude_prune", given, weights, density=density), wanted) < 1e-6


@every_density
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.2, -0.4)])
@every_shape
def test_dare_is_pefts_dare_linear_with_the_same_mask(
    shape: str, weights: tuple[float, ...], density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = layers(len(weights), shape)
    monkeypatch.setattr(torch, "bernoulli", Draws(seed=5))

    wanted = peft(merge_utils.dare_linear, given, weights, density)

    assert relative_error(uncut("dare", given, weights, density=density, seed=5), wanted) < 1e-6


@every_density
@every_count
def test_dare_with_signs_at_one_nth_is_pefts_dare_ties_at_one_with_the_same_mask(
    count: int, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = layers(count)
    monkeypatch.setattr(torch, "bernoulli", Draws(seed=7))

    wanted = peft(merge_utils.dare_ties, given, [1.0] * count, density)
    found = uncut("dare", given, [1 / count] * count, density=density, seed=7, consensus="ties")

    assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.2, 0.2)])
def test_peft_divides_equal_weights_by_the_count_once_more_and_ties_does_not(weights: tuple[float, ...]) -> None:
    given = layers(len(weights))

    found = uncut("ties", given, weights, density=0.3)

    assert relative_error(peft(merge_utils.ties, given, weights, 0.3), found / len(weights)) < 1e-6


def test_where_two_agree_ties_is_their_weighted_sum_and_pefts_half_of_it() -> None:
    given, weights = layers(2), [0.8, 0.3]
    first, second = deltas(given)
    agree = np.sign(first) == np.sign(second)
    wanted = 0.8 * first + 0.3 * second

    assert relative_error(uncut("ties", given, weights, density=1.0)[agree], wanted[agree]) < 1e-6
    assert relative_error(peft(merge_utils.ties, given, weights, 1.0)[agree], wanted[agree] / 2) < 1e-6


def test_unequal_weights_elect_in_ties_and_not_in_peft() -> None:
    small, large = torch.tensor([[1.0]]), torch.tensor([[-2.0]])
    weights = [0.9, 0.1]

    found = METHODS["ties"].function([small.numpy(), large.numpy()], weights, density=1.0)
    theirs = merge_utils.ties([small, large], torch.tensor(weights), density=1.0)

    assert found.item() == pytest.approx(1.0)
    assert theirs.item() == pytest.approx(-0.2)


def test_a_negative_weight_turns_the_vote_in_ties_and_not_in_peft() -> None:
    first, second = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    weights = [1.0, -1.0]

    found = METHODS["ties"].function([first.numpy(), second.numpy()], weights, density=1.0)
    theirs = merge_utils.ties([first, second], torch.tensor(weights), density=1.0)

    assert found.item() == pytest.approx(-6.0)
    assert theirs.item() == pytest.approx(-0.5)


def test_a_density_below_one_entry_keeps_one_here_and_nothing_in_peft() -> None:
    given = layers(2)

    assert np.count_nonzero(uncut("magnitude_prune", given[:1], [1.0], density=1e-6)) == 1
    assert not peft(merge_utils.magnitude_prune, given[:1], [1.0], 1e-6).any()


ALPHA = 5.0


def loras() -> list[LoRA]:
    """Three LoRAs of one linear layer."""
    given = [random_layer((40, 28), rank=3, alpha=ALPHA, seed=seed) for seed in range(3)]
    return [LoRA(name=f"lora{i}", architecture=None, dialect="peft", layouts={"to_q": x}) for i, x in enumerate(given)]


def combined(given: Sequence[LoRA], combination: str, weights: Sequence[float], **options: object) -> np.ndarray:
    """ΔW of PEFT's weighted adapter of LoRAs."""
    first, *others = [lora.name for lora in given]
    config = LoraConfig(r=3, lora_alpha=ALPHA, target_modules=["to_q"])
    model = get_peft_model(torch.nn.ModuleDict({"to_q": torch.nn.Linear(28, 40)}), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    layer = model.base_model.model["to_q"]
    for lora in given:
        layer.lora_A[lora.name].weight.data = torch.from_numpy(lora["to_q"].down)
        layer.lora_B[lora.name].weight.data = torch.from_numpy(lora["to_q"].up)
    model.add_weighted_adapter([first, *others], list(weights), "merged", combination, **options)
    return layer.get_delta_weight("merged").detach().numpy()


@pytest.mark.parametrize("rank", [4, 28])
def test_pefts_adapter_ties_svd_is_ties_cut_to_the_rank(rank: int) -> None:
    merged = lm.merge(loras(), method="ties", density=0.3, rank=rank)

    wanted = combined(loras(), "ties_svd", [1.0, 1.0, 1.0], svd_rank=rank, density=0.3)
    assert relative_error(merged["to_q"].delta(), wanted) < 1e-5


@pytest.mark.parametrize("rank", [4, 28])
def test_pefts_adapter_magnitude_prune_svd_is_magnitude_prune_cut_to_the_rank(rank: int) -> None:
    weights = [0.7, -0.4, 0.2]

    merged = lm.merge(loras(), weights=weights, method="magnitude_prune", density=0.3, rank=rank)

    wanted = combined(loras(), "magnitude_prune_svd", weights, svd_rank=rank, density=0.3)
    assert relative_error(merged["to_q"].delta(), wanted) < 1e-5


@pytest.mark.parametrize("rank", [4, 28])
def test_pefts_adapter_dare_linear_svd_is_dare_cut_to_the_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.7, -0.4, 0.2]
    monkeypatch.setattr(torch, "bernoulli", Draws(seed=module_seed(3, "to_q")))

    merged = lm.merge(loras(), weights=weights, method="dare", density=0.6, seed=3, rank=rank)

    wanted = combined(loras(), "dare_linear_svd", weights, svd_rank=rank, density=0.6)
    assert relative_error(merged["to_q"].delta(), wanted) < 1e-5


def test_pefts_ties_on_factors_depends_on_their_signs_and_ties_does_not() -> None:
    first, second, _ = loras()
    layouts = {"to_q": second["to_q"].map(np.negative)}
    turned = LoRA(name="turned", architecture=None, dialect="peft", layouts=layouts)
    np.testing.assert_array_equal(turned["to_q"].delta(), second["to_q"].delta())

    found, again = (lm.merge([first, x], method="ties", density=0.5)["to_q"].delta() for x in (second, turned))
    theirs, other = (combined([first, x], "ties", [1.0, 1.0], density=0.5) for x in (second, turned))

    assert relative_error(again, found) < 1e-6
    assert relative_error(other, theirs) > 0.1
