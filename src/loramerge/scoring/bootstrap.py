"""Confidence intervals of means: bootstrap intervals for values that come in clusters.

Pictures of one seed share their noise, whatever the prompt, so they are not independent: the
bootstrap draws whole clusters.  With few clusters its percentiles are too narrow: their distances
from the mean are widened until a normal sample's interval is as wide as Student's.

Source: Hesterberg, 2014, What Teachers Should Know about the Bootstrap, https://arxiv.org/abs/1411.5279, on the
narrowness; he adjusts the percentile levels instead, which can't leave the range of the data.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ..errors import OptionError, needed

FEWEST = 5
"""Clusters that an interval needs: five give 126 different draws, four only 35."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float | None
    """None if there are too few clusters."""
    high: float | None
    clusters: int
    values: int

    def __format__(self, form: str) -> str:
        """Format the mean and the ends of the interval by one number format: ``f"{found:+.3f}"``."""
        form = form or ".4f"
        if self.low is None or self.high is None:
            return format(self.mean, form)
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        return format(self)

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean of the values, and its bootstrap interval over clusters.

    Args:
        values: At least one.
        clusters: The cluster of each value.
        level: Confidence level: the share of experiments whose interval holds the true mean, in (0, 1).
        resamples: Number of resamples, each of as many clusters as there are, drawn with replacement.
        seed: Seed of the draws.

    Raises:
        OptionError: There is no value, or the level is out of range.
        MissingExtraError: scipy is not installed.
    """
    import numpy as np

    if not values or not 0 < level < 1:
        raise OptionError(f"An interval needs values, got {len(values)}, and a level in (0, 1), got {level}.")
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    member = [numbers[cluster] for cluster in clusters]
    sums, counts = np.bincount(member, weights=values), np.bincount(member)
    mean, k = float(np.mean(values)), len(numbers)
    if k < FEWEST:
        return Interval(mean, None, None, k, len(values))
    draws = np.random.default_rng(seed).multinomial(k, [1 / k] * k, size=resamples)
    means = (draws @ sums) / (draws @ counts)
    tails = [(1 - level) / 2, (1 + level) / 2]
    wider = math.sqrt(k / (k - 1)) * student(level, k - 1) / NormalDist().inv_cdf(tails[1])
    low, high = (mean + wider * (float(q) - mean) for q in np.quantile(means, tails))
    return Interval(mean, low, high, k, len(values))


def student(level: float, freedom: int) -> float:
    """Return t with P(|T| < t) = ``level`` for Student's law with this number of degrees of freedom.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    with needed("The interval of a score"):
        from scipy.special import stdtrit  # scipy.stats.t calls it too, and takes twice as long to import
    return float(stdtrit(freedom, (1 + level) / 2))
