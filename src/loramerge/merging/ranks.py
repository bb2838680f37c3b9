"""How large a rank each module gets: by a rule, or out of one budget for all modules."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ..errors import OptionError
from ..linalg import whole_number

Rank: TypeAlias = int | str
"""A number, ``"sum"`` or ``"max"``."""


def rule(rank: Rank) -> Callable[[Sequence[int]], int]:
    """The rank of a module's result, as a function of its inputs' ranks.

    Raises:
        OptionError: The rank is neither a number from 1 nor ``"sum"`` nor ``"max"``.
    """
    if isinstance(rank, str) and rank in ("sum", "max"):
        return sum if rank == "sum" else max
    number = whole_number(rank)
    if number < 1:
        raise OptionError(f"The rank {rank!r} is none of: a number from 1, 'sum', 'max'.")
    return lambda ranks: number


@dataclass(frozen=True)
class Budget:
    """What all modules together may lose, or take."""

    kind: Literal["max_error", "energy", "max_size"]
    value: float
    """max_error: ‖ΔW − kept‖ / ‖ΔW‖; energy: the share of ‖ΔW‖² that stays; max_size: bytes."""

    def __str__(self) -> str:
        if self.kind == "max_size":
            return f"max_size={self.value:.0f}"
        return f"{self.kind}={self.value:.6g}"

    @property
    def share_lost(self) -> float:
        """The share of ‖ΔW‖² that may be lost; infinite where only the size counts."""
        return {"max_error": self.value**2, "energy": 1 - self.value, "max_size": math.inf}[self.kind]


BUDGETS = ("max_error", "energy", "max_size")
"""What `budget` takes one of."""


def budget(
    max_error: float | str | None = None, energy: float | str | None = None, max_size: int | str | None = None
) -> Budget | None:
    """The budget that one of the three sets; None when none does.

    Args:
        max_error: Largest ‖ΔW − kept‖ / ‖ΔW‖ over all modules, in [0, 1): ``0.01`` or ``"1%"``.
        energy: Smallest share of ‖ΔW‖² that stays, in (0, 1]: ``0.999`` or ``"99.9%"``.
        max_size: Largest file, in bytes: ``150_000_000`` or ``"150MB"`` (10⁶), ``"143MiB"`` (2²⁰).

    Raises:
        OptionError: More than one is given, or a value is outside of its range.
    """
    given = [(k, v) for k, v in (("max_error", max_error), ("energy", energy), ("max_size", max_size)) if v is not None]
    if not given:
        return None
    if len(given) > 1:
        raise OptionError(f"Give one budget, got {' and '.join(k for k, _ in given)}.")
    kind, value = given[0]
    if kind == "max_size":
        return Budget("max_size", float(_bytes(value)))
    share = _share(kind, value)
    if kind == "max_error":
        if not 0 <= share < 1:
            raise OptionError(f"max_error is a share in [0, 1), got {value!r}.{_percent(value, share)}")
        return Budget("max_error", share)
    if not 0 < share <= 1:
        raise OptionError(f"energy is a share in (0, 1], got {value!r}.{_percent(value, share)}")
    return Budget("energy", share)


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _bytes(value: int | float | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if not match or match[2].lower() not in UNITS or float(match[1]) <= 0:
        raise OptionError(f"max_size is a number of bytes, such as 150MB or 143MiB; got {value!r}.")
    return int(float(match[1]) * UNITS[match[2].lower()])


def _share(kind: str, value: float | str) -> float:
    text = str(value).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise OptionError(f"{kind} is a share, such as 0.01 or 1%; got {value!r}.") from None


def _percent(value: float | str, share: float) -> str:
    """A question for the sign that a number from 1 to 100 may lack."""
    return f" Did you mean {value}%?" if 1 <= share <= 100 and "%" not in str(value) else ""


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a module brings, and what it takes."""

    squares: np.ndarray
    """Squared singular values, falling, of the directions that may be kept."""
    energy: float
    """‖ΔW‖², which the squares add up to unless some directions can't be kept."""
    cost: int
    """Numbers that one more rank takes: out + in."""


def choose(spectra: Mapping[str, Spectrum], budget: Budget, size: int = 0) -> dict[str, int]:
    """The rank of every module that keeps within a budget at the least size, or the most energy within a size.

    Directions of all modules are taken by what they bring for their cost, σ² / (out + in): as
    squares fall within a module, that is the solution of the continuous problem, and the last few
    directions are then exchanged for what still fits.  Every module keeps at least one.

    Args:
        spectra: Of every module.
        budget: The limit.
        size: For ``max_size``, how many numbers fit.

    Raises:
        OptionError: The budget can't be met.
    """
    names = list(spectra)
    # A module that is zero keeps a direction too.
    values = [s.squares if len(s.squares) else np.zeros(1) for s in spectra.values()]
    squares = np.concatenate(values)
    owners = np.repeat(np.arange(len(names)), list(map(len, values)))
    costs = np.array([s.cost for s in spectra.values()])[owners]
    places = np.concatenate([np.arange(len(v)) for v in values])
    # The first of every module comes first; within a module the order is that of the squares.
    value = np.where(places == 0, np.inf, squares / costs)
    order = np.lexsort((places, owners, -value))
    if budget.kind == "max_size":
        taken = _within_size(order, owners, costs, size)
        if taken is None:
            least = int(costs[places == 0].sum())
            raise OptionError(f"max_size: even at rank 1 the tensors take {least} numbers, and {max(size, 0)} fit.")
    else:
        total = math.fsum(s.energy for s in spectra.values())
        lost = total - math.fsum(squares)
        taken = _within_error(order, owners, squares, budget.share_lost * total - lost, len(names))
        if taken is None:
            share = math.sqrt(max(lost, 0.0) / total) if total else 0.0
            raise OptionError(
                f"{budget}: can't be met; at the largest rank that is looked at the error is {share:.3g}. "
                "Way out: a larger rank to choose from (--rank), or a larger error."
            )
    counts = np.bincount(owners[taken], minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _within_size(order: np.ndarray, owners: np.ndarray, costs: np.ndarray, size: int) -> np.ndarray | None:
    """As many as fit, in order; once one of a module doesn't fit, none after it is taken."""
    taken, full, left = [], set(), size
    first = len(np.unique(owners))
    for at, item in enumerate(order):
        owner = owners[item]
        if owner in full:
            continue
        if costs[item] > left:
            if at < first:
                return None
            full.add(owner)
            continue
        left -= costs[item]
        taken.append(item)
    return np.array(taken)


def _within_error(
    order: np.ndarray, owners: np.ndarray, squares: np.ndarray, allowed: float, least: int
) -> np.ndarray | None:
    """As few as leave out no more than what is allowed: the first in order, then without those that may go too."""
    if allowed < -1e-12 * float(squares.sum()):
        return None
    left_out = np.cumsum(squares[order][::-1])[::-1]  # of what is left out from each place on
    keep = max(int((left_out > allowed).sum()), least)
    spare = allowed - (left_out[keep] if keep < len(order) else 0.0)
    kept, stays = [], set()
    for at in range(keep - 1, -1, -1):  # a module's last direction comes first
        item = order[at]
        if at >= least and owners[item] not in stays and squares[item] <= spare:
            spare -= squares[item]
        else:
            stays.add(owners[item])
            kept.append(item)
    return np.array(kept)
