"""Two LoRAs are the same when they do the same, and only then."""

import math
from dataclasses import replace

import numpy as np
import pytest

import loramerge as lm
from loramerge.comparing.diffs import apart, differences
from loramerge.errors import NumberError
from loramerge.files.lora import LoRA
from loramerge.layers import Full, LowRank
from loramerge.testing import random_layer
from small import MODULES, small

TO_Q = MODULES["sdxl"][0]


def distance(first: LoRA, second: LoRA) -> float:
    return max(d.relative for d in differences(first, second))


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr", "full", "dora", "dora-in"])
def test_a_lora_is_itself_and_not_another(kind: str) -> None:
    assert distance(small(kind=kind), small(kind=kind)) <= 1e-12
    assert distance(small(kind=kind), small(kind=kind, seed=1)) > 0.1


def test_the_distance_is_that_of_the_dense_updates() -> None:
    a, b = small(seed=1), small(seed=2, rank=7)

    for found in differences(a, b):
        first, second = (x[found.module].delta().astype(np.float64) for x in (a, b))
        assert found.norm == pytest.approx(np.linalg.norm(first), rel=1e-6)
        assert found.distance == pytest.approx(np.linalg.norm(first - second), rel=1e-6)


def test_a_bias_is_part_of_what_a_layer_does() -> None:
    lora = small(modules=(TO_Q,))
    biased = replace(lora, layouts={TO_Q: replace(lora[TO_Q], diff_b=np.ones(640, dtype=np.float32))})

    assert distance(biased, biased) <= 1e-12
    assert distance(lora, biased) > 0
    assert distance(biased, lora) > 0


def test_a_module_that_one_lacks_is_a_difference() -> None:
    assert distance(small(), small(modules=(TO_Q,))) == 1.0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_updates_of_other_shapes_are_not_the_same(kind: str) -> None:
    ones = {shape: np.ones(shape, np.float32) for shape in ((4, 8), (8, 4), (4, 2, 2, 2))}
    layers = {shape: Full(diff=ones[shape]) for shape in ones}
    if kind == "lora":
        layers = {shape: random_layer(shape, rank=2) for shape in ones}
    first, turned, kernel = (replace(small(), layouts={TO_Q: layers[shape]}) for shape in ones)

    assert next(differences(first, turned)).relative == math.inf
    assert "no module in common" in apart(first, turned)
    assert not apart(first, kernel)
    assert next(differences(first, kernel)).relative < math.inf


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nan_and_infinity_in_memory_are_errors_and_no_numbers(bad: float) -> None:
    up = np.ones((640, 2), np.float16)
    up[3, 1] = bad
    layer = LowRank(up=up, down=np.ones((2, 640), np.float16))
    spoiled, sound = replace(small(), layouts={TO_Q: layer}), small()

    for work in (spoiled.norm, lambda: lm.compare([sound, spoiled]), lambda: list(differences(sound, spoiled))):
        with pytest.raises(NumberError, match=r"to_q: .*NaN or infinite"):
            work()


def test_kinds_that_mean_the_same_are_the_same() -> None:
    lora = small(kind="loha", rank=2)

    assert distance(lora, lm.load(lora.state_dict("diffusers"))) <= 1e-6


def test_torch_and_numpy_compare() -> None:
    lora = small()

    assert distance(lm.load(lora.state_dict("kohya")), lora) <= 1e-6
