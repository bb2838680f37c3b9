"""Weights by a score."""

import sys

import numpy as np
import pytest

import loramerge as lm
from loramerge.errors import MissingExtraError, NumberError, OptionError
from loramerge.files.lora import LoRA
from loramerge.learned.search import SearchResult, SearchStep, search_weights
from loramerge.testing import weighted_sum
from toy import from_factors

MODULES = (
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.up_blocks.3.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
)


def lora(seed: int, rank: int) -> LoRA:
    random = np.random.default_rng(seed)
    pairs = {m: (random.standard_normal((6, rank)), random.standard_normal((rank, 5))) for m in MODULES}
    return from_factors(pairs, name=f"lora {seed}")


LORAS = [lora(1, 2), lora(2, 3)]


def nearness(weights: list[object]) -> object:
    """A score whose best merge is the one with given weights."""
    wanted = lm.merge(LORAS, weights=weights)

    def score(lora: LoRA) -> float:
        return -sum(float(((lora[m].delta() - wanted[m].delta()) ** 2).mean()) for m in wanted)

    return score


@pytest.fixture(autouse=True)
def _with_cma(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("cma")


def test_the_best_weights_are_found() -> None:
    found = search_weights(LORAS, nearness([0.8, -0.4]), steps=120, l1=0.0)

    assert found.weights == pytest.approx((0.8, -0.4), abs=0.05)


@pytest.mark.parametrize("per", ["component", "block"])
def test_components_and_blocks_get_weights_of_their_own(per: str) -> None:
    wanted = [{"*": 0.8, "text_encoder": -0.4}, {"*": 0.3, "text_encoder": 0.6}]
    found = search_weights(LORAS, nearness(wanted), steps=400, l1=0.0, per=per)

    for module in LORAS[0]:
        numbers = [table["text_encoder" if module.startswith("text_encoder") else "*"] for table in wanted]
        merged = lm.merge(LORAS, weights=found.weights)[module].delta()
        truth = weighted_sum(LORAS, numbers, module)
        assert np.linalg.norm(merged - truth) <= 0.1 * np.linalg.norm(truth)


def test_the_first_merge_is_the_start_and_the_result_never_worse() -> None:
    score = nearness([0.8, -0.4])
    found = search_weights(LORAS, score, steps=5, start=[0.7, -0.3], l1=0.0)

    assert found.history[0].weights == (0.7, -0.3)
    assert found.score == max(step.score for step in found.history)
    assert score(lm.merge(LORAS, weights=found.weights)) == found.score
    assert search_weights(LORAS, score, steps=1).weights == (0.5, 0.5)


def test_the_same_seed_gives_the_same_search_and_leaves_numpys_alone() -> None:
    def search(seed: int) -> SearchResult:
        return search_weights(LORAS, nearness([0.8, -0.4]), steps=20, seed=seed)

    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    assert search(1) == search(1)
    assert search(1) != search(2)
    assert np.array_equal(np.random.get_state()[1], before)


def test_weights_stay_within_bounds_and_the_steps_are_the_scores_asked_for() -> None:
    asked: list[LoRA] = []

    def score(lora: LoRA) -> float:
        asked.append(lora)
        return nearness([3.0, -3.0])(lora)

    found = search_weights(LORAS, score, steps=60, bounds=(-0.5, 1.0))

    assert len(asked) == len(found.history) == 60
    assert all(-0.5 <= w <= 1.0 for step in found.history for w in step.weights)
    assert found.weights == pytest.approx((1.0, -0.5), abs=0.1)


def test_a_price_on_size_gives_smaller_weights() -> None:
    free, priced = (search_weights(LORAS, nearness([0.8, 0.8]), steps=80, l1=price) for price in (0.0, 4.0))

    assert sum(map(abs, priced.weights)) < 0.8 * sum(map(abs, free.weights))


def test_one_lora_can_be_weighed() -> None:
    wanted = lm.merge(LORAS[:1], weights=[0.3])
    found = search_weights(
        LORAS[:1], lambda x: -sum(abs(x[m].norm() - wanted[m].norm()) for m in x), steps=60, bounds=(0.0, 1.5), l1=0.0
    )

    assert found.weights == pytest.approx((0.3,), abs=0.05)


def test_false_from_on_step_stops() -> None:
    seen: list[SearchStep] = []

    def on_step(step: SearchStep) -> bool:
        seen.append(step)
        return step.step < 4

    found = search_weights(LORAS, nearness([0.8, -0.4]), steps=50, on_step=on_step)

    assert [step.step for step in seen] == [1, 2, 3, 4]
    assert list(found.history) == seen


def test_bounds_below_zero_begin_within_them() -> None:
    found = search_weights(LORAS, lambda lora: 0.0, bounds=(-1.0, 0.0), steps=2)

    assert all(-1 <= weight < 0 for weight in found.history[0].weights)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(NumberError, match="nan"):
        search_weights(LORAS, lambda lora: float("nan"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"per": "module"}, "Unknown per 'module'"),
        ({"bounds": (1.0, -1.0)}, "two finite numbers, the smaller first"),
        ({"bounds": (0.0, float("inf"))}, "two finite numbers, the smaller first"),
        ({"steps": 0}, "got 0 and"),
        ({"l1": -1.0}, r"got 40 and -1\.0"),
        ({"start": [0.5]}, "start must be one weight per LoRA"),
        ({"start": [0.5, 2.0]}, "start must be one weight per LoRA"),
        ({"start": [0.0, 0.0]}, "start must have a weight other than 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        search_weights(LORAS, lambda lora: 0.0, **options)


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(OptionError, match="Nothing to merge"):
        search_weights([], lambda lora: 0.0)


def test_without_cma_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)

    with pytest.raises(MissingExtraError, match=r"loramerge\[search\]"):
        search_weights(LORAS, lambda lora: 0.0)
