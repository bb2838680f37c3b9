"""The average of one run's checkpoints: their mean, or an exponential moving average (EMA) made after training.

An EMA decays what it has by βₜ at every step t, θ̂ₜ = βₜ·θ̂ₜ₋₁ + (1 − βₜ)·θₜ.  Here θₜ is ΔW, and a checkpoint stands for the
steps since the one before it; the first stands for all steps before it, too.  Then θ̂ is a weighted sum of checkpoints whose
weights add up to 1, and `merge` computes it.  β is either constant, or (1 − 1/t)^(γ+1) as in Karras et al., 2024, section
3.1, https://arxiv.org/abs/2312.02696; there σ_rel names γ: the width of the average as a share of the run's length.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..checkpoints.models import Checkpoint
from ..errors import OptionError, span
from ..files.lora import LoRA
from ..files.reading import Source, is_list
from .ranks import Rank
from .running import Kept
from .runs import check_once, check_one_run
from .timeline import Timeline, timeline
from .verbs import opened_in, plan, small_enough

if TYPE_CHECKING:
    from ..files.storage.writer import Progress

WIDEST = 1 / math.sqrt(12)
"""σ_rel of γ = 0, an average that counts all steps alike; a larger one would count early steps more."""

NARROWEST = 1e-6
"""The least σ_rel: an average of a millionth of the run is the last checkpoint alone, and far below γ has no number."""

FAINT = 1e-16
"""Weights below this are lost beside the others in float64, and are 0."""

ALONE = 0.99
"""Share of one checkpoint above which a note says that little is averaged."""

STOOD_FOR = 0.1
"""Weight above which a note says that the first checkpoint stands for steps long before it."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """The weights of a run's checkpoints."""

    weights: tuple[float, ...]
    """The weight of each, in the order in which they were given; their sum is 1."""
    rule: str
    """The rule as text: ``mean``, or ``EMA of σ_rel 0.1 (γ = 6.94)``."""
    times: Timeline | None = None
    """Each checkpoint's place in the run; None for a mean, which doesn't need it."""
    doubts: tuple[str, ...] = ()
    """Sentences on whether the checkpoints are of one run."""

    @property
    def notes(self) -> list[str]:
        """Sentences on weights that may not be what was meant."""
        if self.times is None:
            return list(self.doubts)
        found = [*self.doubts, *self.times.notes]
        first, *others = sorted(self.times.numbers)
        at = dict(zip(self.times.numbers, self.weights, strict=True))
        longest = max(b - a for a, b in pairwise((first, *others)))
        if first > 2 * longest and at[first] > STOOD_FOR:
            found.append(
                f"the first checkpoint, of {self.times.unit} {first}, stands for all before it too: {at[first]:.0%} of the "
                "weight; earlier checkpoints would make the average a better one"
            )
        largest = max(at, key=at.__getitem__)
        if at[largest] > ALONE:
            found.append(
                f"{self.times.unit} {largest} alone has {at[largest]:.4%} of the weight, so little is averaged: the decay is "
                f"per {self.times.unit}, and a larger sigma, or a beta nearer to 1, averages more"
            )
        return found

    def __str__(self) -> str:
        """Say what is averaged: ``EMA of σ_rel 0.1 (γ = 6.94) over 10 checkpoints, step 100 to 1000``."""
        over = f"{self.rule} over {len(self.weights)} checkpoints"
        if self.times is None:
            return over
        return f"{over}, {self.times.unit} {span(min(self.times.numbers), max(self.times.numbers))}"


def averaged(
    checkpoints: Sequence[object],
    loras: Sequence[LoRA],
    ema: str | None,
    steps: Sequence[int] | None,
    allow_resumed: bool = False,
) -> Average:
    """Choose the weights of a run's checkpoints from their headers and names.

    Args:
        checkpoints: The checkpoints as given: paths, which may hold step numbers, or LoRAs.
        loras: The same, opened.
        ema: None for the mean; ``"sigma=0.1"`` or ``"beta=0.999"``.
        steps: The step of each, if neither header nor name says it.
        allow_resumed: Take LoRAs whose headers are of different runs.

    Raises:
        MergeError: They aren't checkpoints of one run, or their order is unclear.
        OptionError: There is only one, or ``ema`` or ``steps`` is wrong.
    """
    if len(loras) < 2:
        raise OptionError(f"An average needs at least two checkpoints, got {len(loras)}.")
    check_once(checkpoints)
    names = [name_of(given, lora) for given, lora in zip(checkpoints, loras, strict=True)]
    doubts = tuple(check_one_run(loras, names, allow_resumed))
    if ema is None:
        if steps is not None:
            raise OptionError("Steps are for an EMA; the mean counts all checkpoints alike. Way out: leave them out.")
        return Average(weights=(1 / len(loras),) * len(loras), rule="mean", doubts=doubts)
    times = timeline([lora.metadata for lora in loras], names, steps)
    rule, reached = _rule(ema, times.unit)
    order = sorted(range(len(loras)), key=times.numbers.__getitem__)
    last = times.numbers[order[-1]]
    until = [0.0, *(reached(times.numbers[i], last) for i in order[:-1]), 1.0]
    weights = {i: after - before for i, (before, after) in zip(order, pairwise(until), strict=True)}
    kept = [weights[i] if weights[i] > FAINT else 0.0 for i in range(len(loras))]
    return Average(weights=tuple(kept), rule=rule, times=times, doubts=doubts)


def average(
    checkpoints: Sequence[LoRA | Source],
    *,
    ema: str | None = None,
    steps: Sequence[int] | None = None,
    allow_resumed: bool = False,
    rank: Rank | None = None,
    max_error: float | str | None = None,
    energy: float | str | None = None,
    max_size: int | str | None = None,
    exclude: Sequence[str] = (),
    base: "Checkpoint | str | os.PathLike[str] | None" = None,
    device: str | None = None,
    progress: "Progress | None" = None,
    allow_growth: bool = False,
) -> LoRA:
    """Average the checkpoints of one training run: ΔW itself, not its factors.

    Args:
        checkpoints: At least two LoRAs of one run, or what `load` takes, in any order.
        ema: None for the mean.  ``"sigma=0.1"`` for the exponential moving average with a power function whose width is
            that share of the run (σ_rel, above 0 and up to 0.288); ``"beta=0.999"`` for one that decays by β per step.
        steps: The training step of each checkpoint, for an EMA.  By default the metadata say it (``ss_steps``,
            ``training_info``, ``ss_epoch``), or else the number in each name: ``person-000010``, ``checkpoint-500/…``.
        allow_resumed: Take LoRAs whose metadata are of different runs: one that was resumed, say.
        rank: As for `merge`; by default the checkpoints' own (``"max"``), or what a budget chooses.
        max_error: As for `merge`.
        energy: As for `merge`.
        max_size: As for `merge`.
        exclude: As for `merge`.
        base: As for `merge`.
        device: As for `merge`.
        progress: As for `merge`.
        allow_growth: As for `merge`.

    Returns:
        The average, in memory; its ``notes`` tell the weights and the error of the cut to the rank.

    Raises:
        MergeError: They aren't checkpoints of one run, or their order is unclear.
        OptionError: There is only one, or an argument is wrong.

    Source:
        Karras et al., 2024, section 3.1, https://arxiv.org/abs/2312.02696

    Example:
        >>> from loramerge.testing import random_lora
        >>> run = [random_lora("sd15", seed=1), random_lora("sd15", seed=2)]
        >>> average(run, ema="sigma=0.15", steps=[500, 1000]).notes[0]
        'EMA of σ_rel 0.15 (γ = 3.56) over 2 checkpoints, step 500 to 1000: weights 0.0425, 0.9575'
    """
    if not is_list(checkpoints):
        raise OptionError(f"Give a list of checkpoints, such as [a, b]; got a {type(checkpoints).__name__}.")
    with ExitStack() as stack:
        loras = opened_in(stack, checkpoints)
        found = averaged(checkpoints, loras, ema, steps, allow_resumed)
        budgets: Mapping[str, Any] = {"max_error": max_error, "energy": energy, "max_size": max_size}
        planned = plan(
            loras,
            weights=found.weights,
            rank=rank_for(budgets) if rank is None else rank,
            **budgets,
            exclude=exclude,
            base=base,
            device=device,
            progress=progress,
            allow_growth=allow_growth,
        )
        kept = Kept(planned.steps)
        made = small_enough(planned, kept).in_memory(progress)
    weights = ", ".join(f"{weight:.4f}" for weight in found.weights)
    return replace(made, notes=(f"{found}: weights {weights}", *found.notes, *filter(None, [kept.told()])))


def rank_for(budgets: Mapping[str, Any]) -> Rank:
    """Return the rank of an average for which none was given: the run's own, or the whole sum for a budget to choose from."""
    return "max" if all(limit is None for limit in budgets.values()) else "sum"


def name_of(given: object, lora: LoRA) -> str:
    """Return the name in which a step number may stand: the end of the path as given, or the LoRA's own name."""
    if not isinstance(given, str | os.PathLike):
        return lora.name
    return "/".join(os.path.abspath(given).split(os.sep)[-2:]).removesuffix(".safetensors")


Reached = Callable[[float, float], float]
"""The weight of all steps up to t in an average that ends with the step T, as a function of t and T."""


def _rule(ema: str, unit: str) -> tuple[str, Reached]:
    """Read an EMA as it is typed; return it in words, and the function of its weights."""
    name, _, text = ema.partition("=")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if name == "sigma" and NARROWEST <= number <= WIDEST:
        gamma = gamma_of(number)
        return f"EMA of σ_rel {number:g} (γ = {gamma:.3g})", lambda t, last: (t / last) ** (gamma + 1)
    if name == "beta" and 0 < number < 1:
        return f"EMA of β {number:g} per {unit}", lambda t, last: number ** (last - t)
    raise OptionError(
        f"Can't read the EMA {ema!r}: wanted sigma=NUMBER, the width as a share of the run, from 1e-6 to "
        "0.2886; or beta=NUMBER, the decay per step, between 0 and 1. For the mean, leave it out."
    )


def gamma_of(sigma: float) -> float:
    """Return the exponent γ of the power function whose average has the relative width σ_rel.

    Source: Karras et al., 2024, algorithm 2: the largest root of γ³ + 7γ² + (16 − σ⁻²)·γ + 12 − σ⁻²
    """
    import numpy as np

    square = sigma**-2
    return max(0.0, float(np.roots([1, 7, 16 - square, 12 - square]).real.max()))
