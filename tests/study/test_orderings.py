"""Statements about orders, on made-up scores."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from loramerge.scoring.bootstrap import Interval
from loramerge.scoring.scores import Row, Scores, Shot
from virtual_tryon.study.orderings import CLAIMS, Claim, Comparison, Decision, decide, decisions, verdict
from virtual_tryon.study.published import SETS, TABLE


def centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def scores(
    means: Mapping[str, tuple[float, float]], *, noise: float = 0.0, shared: float = 0.0, seeds: int = 8
) -> Scores:
    """Scores of two prompts around given means, with noise of each setting's own, of mean 0, and noise that all share."""
    random = np.random.default_rng(0)
    common = shared * random.normal(size=seeds)
    own = {setting: noise * centred(random.normal(size=seeds)) for setting in means}
    rows = [
        Row(Shot(setting, prompt, seed, Path("x")), reference, value + own[setting][seed] + common[seed], 0.0)
        for setting, both in means.items()
        for prompt in ("a", "b")
        for seed in range(seeds)
        for reference, value in zip(SETS, both, strict=True)
    ]
    return Scores("made up", tuple(rows), "seed")


def test_the_published_table_agrees_with_itself() -> None:
    found = decisions(scores(TABLE))

    assert len(found) == len(CLAIMS)
    assert all(decision.agrees for decision in found)
    assert {decision.verdict for decision in found} == {"holds", "does not hold"}


def test_a_turned_order_does_not_hold_and_disagrees() -> None:
    turned = {name: (1 - profile, 1 - barca) for name, (profile, barca) in TABLE.items()}

    found = {decision.claim.text: decision for decision in decisions(scores(turned))}

    highest = found["The profile LoRA is highest on the profile set"]
    assert (highest.verdict, highest.published, highest.agrees) == ("does not hold", "holds", False)
    assert highest.weakest[0].lower == "barca"
    assert highest.weakest[1].mean == pytest.approx(0.4036 - 0.6823)


def test_the_difference_that_is_shown_is_the_one_that_decides() -> None:
    claim = Claim("a is highest", tuple(Comparison("a", other, ("profile",)) for other in "bcd"))
    sure, wide = Interval(0.02, 0.01, 0.03, 8, 16), Interval(0.03, -0.01, 0.07, 8, 16)
    below, unsure = Interval(-0.01, -0.015, -0.005, 8, 16), Interval(-0.02, -0.05, 0.01, 8, 16)

    for differences, shown in (((sure, wide, sure), wide), ((below, unsure, sure), below)):
        assert Decision(claim, verdict(differences), differences, None).weakest[1] == shown


def test_differences_within_the_noise_are_not_decided() -> None:
    found = decisions(scores(TABLE, noise=5.0))

    assert {decision.verdict for decision in found} == {"not decided"}
    assert {decision.agrees for decision in found} == {None}


def test_noise_that_both_settings_share_decides_nothing_away() -> None:
    comparison = Comparison("l2", "none", ("profile",))
    found = scores({"l2": (0.6, 0.0), "none": (0.5, 0.0)}, shared=10.0)

    assert comparison.difference(found).mean == pytest.approx(0.1)
    assert decide(Claim("", (comparison,)), found).verdict == "holds"


def test_too_few_seeds_decide_nothing() -> None:
    assert {decision.verdict for decision in decisions(scores(TABLE, seeds=4))} == {"not decided"}


def test_one_comparison_against_it_is_enough() -> None:
    above, below, open_ = (Interval(0, low, high, 8, 8) for low, high in ((1, 2), (-2, -1), (-1, 1)))

    assert verdict([above, above]) == "holds"
    assert verdict([above, open_]) == "not decided"
    assert verdict([above, open_, below]) == "does not hold"


def test_the_mean_of_both_sets_is_compared_picture_by_picture() -> None:
    both = Comparison("profile", "barca", SETS)

    found = both.difference(scores({"profile": (0.7, 0.6), "barca": (0.4, 0.76)}))

    assert found.mean == pytest.approx(0.65 - 0.58)
    assert both.published() == pytest.approx((0.6823 + 0.6293 - 0.4036 - 0.7599) / 2)


def test_claims_about_settings_that_were_not_drawn_are_left_out() -> None:
    few = {name: TABLE[name] for name in ("weighted", "l2")}

    assert {decision.claim.text.split(":")[0] for decision in decisions(scores(few))} == {
        "L2 is above plain",
        "L2 is above plain on the profile set",
    }
