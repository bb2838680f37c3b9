"""Search for weights by a score, without gradients: any number that says how good a merged LoRA is.

The score may generate images and compare them with references.  Huang et al., 2023, LoRAHub,
https://arxiv.org/abs/2307.13269, look for weights the same way: within bounds, with a price on
their size; here the sum of updates is exact, where LoRAHub adds up factors.  The optimiser is
CMA-ES: Hansen, 2016, https://arxiv.org/abs/1604.00772, from the package ``cma``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from ..errors import NumberError, OptionError, needed
from ..files.architectures import blocks
from ..files.lora import LoRA
from ..merging.verbs import merge

Per = Literal["lora", "component", "block"]
Found = tuple[float, ...] | tuple[dict[str, float], ...]
"""Weights as `merge` takes them: per LoRA a number, or a table of components or blocks."""


@dataclass(frozen=True)
class SearchStep:
    """One merge that was tried."""

    step: int
    total: int
    weights: Found
    score: float
    best: float
    """The highest score minus price so far."""


@dataclass(frozen=True)
class SearchResult:
    """The best weights that were tried."""

    weights: Found
    """As `merge` takes them."""
    score: float
    """The score of that merge, before the price of the weights is subtracted."""
    history: tuple[SearchStep, ...]


def search_weights(
    loras: Sequence[LoRA],
    score: Callable[[LoRA], float],
    *,
    bounds: tuple[float, float] = (-1.5, 1.5),
    start: Sequence[float] | None = None,
    steps: int = 40,
    l1: float = 0.05,
    seed: int = 0,
    per: Per = "lora",
    on_step: Callable[[SearchStep], bool | None] | None = None,
) -> SearchResult:
    """Search for the weights whose merge has the highest score minus ``l1`` · mean |w|.

    Args:
        loras: The LoRAs to merge, by the exact weighted sum.
        score: Rates a merged LoRA: the higher, the better.
        bounds: The smallest and the largest weight.
        start: One weight per LoRA, tried first; 1/N each by default.
        steps: How many merges are tried, at least 1.
        l1: Price of the mean size of the weights, from 0.
        seed: Seed of the search; the same seed and the same scores give the same result.
        per: What gets a weight of its own: each ``lora``, or each ``component`` or ``block`` of each LoRA.
        on_step: Called after every merge that was tried; False stops the search.

    Raises:
        MissingExtraError: The package cma is not installed.
        OptionError: An option is unknown or out of range.
        NumberError: A score is NaN or infinite.
    """
    low, high = _checked(bounds, steps, l1, per)
    names = [_names(lora, per) for lora in loras]
    begin = _begin(names, start, low, high)
    optimizer = _optimizer(begin, low, high, seed)
    search = _Search(loras, score, names, steps, l1, on_step)
    search.tried([begin])
    while not search.over:
        asked = optimizer.ask()
        losses = search.tried(asked)
        if len(losses) == len(asked):
            optimizer.tell(asked, losses)
    best = search.best
    return SearchResult(best.weights, best.score, tuple(search.history))


@dataclass
class _Search:
    """The state of a search: the merges tried so far, and whether it is over."""

    loras: Sequence[LoRA]
    score: Callable[[LoRA], float]
    names: Sequence[Sequence[str]]
    steps: int
    l1: float
    on_step: Callable[[SearchStep], bool | None] | None
    history: list[SearchStep] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    """The score of each step minus the price of its weights."""
    over: bool = False

    @property
    def best(self) -> SearchStep:
        """The first of the steps with the highest gain."""
        return self.history[self.gains.index(max(self.gains))]

    def tried(self, vectors: Sequence[Any]) -> list[float]:
        """Try each vector until the search is over; return the losses for the optimiser to minimise."""
        losses = []
        for vector in vectors:
            losses.append(-self._gain(vector))
            stopped = self.on_step is not None and self.on_step(self.history[-1]) is False
            self.over = stopped or len(self.history) >= self.steps
            if self.over:
                break
        return losses

    def _gain(self, vector: Any) -> float:
        weights = _weights(self.names, [float(w) for w in vector])
        value = float(self.score(merge(self.loras, weights=weights)))
        if not math.isfinite(value):
            raise NumberError(f"The score of the weights {weights} is {value}; wanted a finite number.")
        self.gains.append(value - self.l1 * float(np.abs(vector).mean()))
        self.history.append(SearchStep(len(self.history) + 1, self.steps, weights, value, max(self.gains)))
        return self.gains[-1]


def _checked(bounds: tuple[float, float], steps: int, l1: float, per: str) -> tuple[float, float]:
    if per not in get_args(Per):
        raise OptionError(f"Unknown per {per!r}. Available: {', '.join(get_args(Per))}.")
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise OptionError(f"The bounds must be two finite numbers, the smaller first; got {bounds}.")
    if steps < 1 or not 0 <= l1 < math.inf:
        raise OptionError(f"steps must be a number from 1, and l1 one from 0; got {steps} and {l1}.")
    return low, high


def _names(lora: LoRA, per: Per) -> list[str]:
    """Return the patterns of a LoRA's parts that get a weight each."""
    if per == "lora":
        return ["*"]
    if per == "component":
        return list(dict.fromkeys(module.partition(".")[0] for module in lora))
    return list(dict.fromkeys(blocks.block(module, lora.architecture) for module in lora))


def _begin(names: Sequence[Sequence[str]], start: Sequence[float] | None, low: float, high: float) -> Any:
    if not names:
        raise OptionError("Nothing to merge: give at least one LoRA.")
    nearest = min(max(1.0 / len(names), low), high) or low  # a merge of zeros is none
    given = [nearest] * len(names) if start is None else [float(w) for w in start]
    if len(given) != len(names) or not all(low <= weight <= high for weight in given):
        raise OptionError(f"start must be one weight per LoRA, {len(names)} in [{low:g}, {high:g}]; got {given}.")
    if not any(given):
        raise OptionError("start must have a weight other than 0.")
    return np.repeat(given, [len(parts) for parts in names])


def _weights(names: Sequence[Sequence[str]], vector: Sequence[float]) -> Found:
    if all(list(parts) == ["*"] for parts in names):
        return tuple(vector)
    rest = iter(vector)
    return tuple({part: next(rest) for part in parts} for parts in names)


def _optimizer(begin: Any, low: float, high: float, seed: int) -> Any:
    with needed("Searching weights"):
        import cma
    random = np.random.default_rng(seed)
    options = {
        "bounds": [low, high],
        "maxstd_boundrange": math.inf,  # cma 4.5.0 fails when it enforces a finite one
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": math.nan,  # leaves numpy's global generator alone
        "verbose": -9,
        "verb_log": 0,
    }
    return cma.CMAEvolutionStrategy(begin, (high - low) / 6, options)
