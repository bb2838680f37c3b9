"""Decide the study's orderings by paired differences and their intervals.

A claim consists of comparisons, "this setting scores higher than that one", each by the mean of one
or both reference sets over pictures of the same prompt and seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loramerge.scoring import Interval, Scores, interval

from .published import SETS, published

Verdict = Literal["holds", "does not hold", "not decided"]
MERGES = ("weighted", "l2", "mixed_weighted", "mixed_l2")
STUDIED = ("none", "profile", "barca", *MERGES)


@dataclass(frozen=True)
class Comparison:
    """The statement that one setting scores higher than another, by the mean over some reference sets."""

    higher: str
    lower: str
    references: tuple[str, ...]

    def difference(self, scores: Scores) -> Interval:
        """Return the difference of the scores, with the 95 % interval over seeds."""
        mine, theirs = (_means(scores, name, self.references) for name in (self.higher, self.lower))
        pairs = [key for key in mine if key in theirs]
        return interval([mine[key] - theirs[key] for key in pairs], [seed for _, seed in pairs])

    def published(self) -> float | None:
        """Return the difference in the study's table, which has no intervals."""
        pairs = [(published(self.higher, r), published(self.lower, r)) for r in self.references]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        return sum(found) / len(found) if len(found) == len(pairs) else None


@dataclass(frozen=True)
class Claim:
    """A statement about an order of settings."""

    text: str
    comparisons: tuple[Comparison, ...]

    @property
    def settings(self) -> set[str]:
        return {name for c in self.comparisons for name in (c.higher, c.lower)}


@dataclass(frozen=True)
class Decision:
    """The verdict of scores on a claim."""

    claim: Claim
    verdict: Verdict
    differences: tuple[Interval, ...]
    """Per comparison, in order."""
    published: Verdict | None
    """The verdict of the study's table, whose differences count without intervals."""

    @property
    def agrees(self) -> bool | None:
        """True if both verdicts are the same; None if ours is not decided."""
        return None if self.verdict == "not decided" or self.published is None else self.verdict == self.published

    @property
    def weakest(self) -> tuple[Comparison, Interval]:
        """Return the comparison that supports the claim least."""
        pairs = zip(self.claim.comparisons, self.differences, strict=True)
        return min(pairs, key=lambda pair: _support(pair[1]))


def _support(difference: Interval) -> tuple[bool, float]:
    """Rank a difference's support of a claim: lowest if its interval lies below zero, then by the lower end."""
    against = difference.high is not None and difference.high < 0
    return not against, difference.mean if difference.low is None else difference.low


def _means(scores: Scores, setting: str, references: Sequence[str]) -> Mapping[tuple[str, int | None], float]:
    """Average each picture's cosine over reference sets."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for row in scores.rows:
        if row.shot.setting == setting and row.reference in references:
            found.setdefault((row.shot.prompt, row.shot.seed), []).append(row.cosine)
    return {key: sum(values) / len(values) for key, values in found.items()}


def _highest(setting: str, reference: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(setting, other, (reference,)) for other in STUDIED if other != setting)


def _between(high: str, low: str, reference: str) -> tuple[Comparison, ...]:
    above = tuple(Comparison(high, merge, (reference,)) for merge in MERGES)
    return above + tuple(Comparison(merge, low, (reference,)) for merge in MERGES)


CLAIMS: tuple[Claim, ...] = (
    Claim("The profile LoRA is highest on the profile set", _highest("profile", "profile")),
    Claim("The jersey LoRA is highest on the jersey set", _highest("barca", "barca")),
    Claim("On the profile set all four merges lie between the two LoRAs", _between("profile", "barca", "profile")),
    Claim("On the jersey set all four merges lie between the two LoRAs", _between("barca", "profile", "barca")),
    Claim("Every merge is above no LoRA, by the mean of both", tuple(Comparison(m, "none", SETS) for m in MERGES)),
    Claim("Mixed is above unmixed: weighted average, mean of both", (Comparison("mixed_weighted", "weighted", SETS),)),
    Claim("Mixed is above unmixed: L2, mean of both", (Comparison("mixed_l2", "l2", SETS),)),
    Claim("L2 is above plain: unmixed, mean of both", (Comparison("l2", "weighted", SETS),)),
    Claim("L2 is above plain: mixed, mean of both", (Comparison("mixed_l2", "mixed_weighted", SETS),)),
    Claim("L2 is above plain on the profile set", (Comparison("l2", "weighted", ("profile",)),)),
    Claim(
        "Mixed L2 is the highest of the merges, mean of both",
        tuple(Comparison("mixed_l2", merge, SETS) for merge in MERGES[:-1]),
    ),
)
"""The claims that the study's table makes, or is read to make."""


def decide(claim: Claim, scores: Scores) -> Decision:
    """Decide a claim by scores."""
    differences = tuple(comparison.difference(scores) for comparison in claim.comparisons)
    theirs = [comparison.published() for comparison in claim.comparisons]
    known = [value for value in theirs if value is not None]
    stated: Verdict | None = None
    if len(known) == len(theirs):
        stated = "holds" if all(value > 0 for value in known) else "does not hold"
    return Decision(claim, verdict(differences), differences, stated)


def verdict(differences: Sequence[Interval]) -> Verdict:
    """Return ``holds`` if every interval lies above zero, ``does not hold`` if one lies below, else ``not decided``."""
    if any(d.high is not None and d.high < 0 for d in differences):
        return "does not hold"
    if all(d.low is not None and d.low > 0 for d in differences):
        return "holds"
    return "not decided"


def decisions(scores: Scores) -> list[Decision]:
    """Decide every claim whose settings were scored."""
    return [decide(claim, scores) for claim in CLAIMS if claim.settings <= set(scores.settings)]
