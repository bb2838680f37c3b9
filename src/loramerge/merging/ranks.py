"""The rank of each module: by a rule, or chosen for one budget of all modules."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ..errors import OptionError
from ..linalg import ROUNDING, whole_number

Rank: TypeAlias = int | str
"""A number, ``"sum"`` or ``"max"``."""


def rule(rank: Rank) -> Callable[[Sequence[int]], int]:
    """Return the function that gives the rank of a module's result from its inputs' ranks.

    Raises:
        OptionError: The rank is neither a number from 1 nor ``"sum"`` nor ``"max"``.
    """
    if isinstance(rank, str) and rank in ("sum", "max"):
        return sum if rank == "sum" else max
    number = whole_number(rank)
    if number < 1:
        raise OptionError(f"The rank {rank!r} is neither a positive integer nor 'sum' nor 'max'.")
    return lambda ranks: number


@dataclass(frozen=True)
class Budget:
    """A limit on the error or on the size of all modules together."""

    kind: Literal["max_error", "energy", "max_size"]
    value: float
    """max_error: largest ‖ΔW − kept‖ / ‖ΔW‖; energy: smallest share of ‖ΔW‖² that is kept; max_size: bytes."""

    def __str__(self) -> str:
        if self.kind == "max_size":
            return f"max_size={self.value:.0f}"
        return f"{self.kind}={self.value:.6g}"

    @property
    def share_lost(self) -> float:
        """The share of ‖ΔW‖² that may be lost; infinite for a limit on the size."""
        return {"max_error": self.value**2, "energy": 1 - self.value, "max_size": math.inf}[self.kind]


BUDGETS = ("max_error", "energy", "max_size")
"""Arguments of `budget`, of which at most one is given."""


def budget(
    max_error: float | str | None = None, energy: float | str | None = None, max_size: int | str | None = None
) -> Budget | None:
    """Make the budget that one of the arguments sets; None if none is given.

    Args:
        max_error: Largest ‖ΔW − kept‖ / ‖ΔW‖ over all modules, in [0, 1): ``0.01`` or ``"1%"``.
        energy: Smallest share of ‖ΔW‖² that is kept, in (0, 1]: ``0.999`` or ``"99.9%"``.
        max_size: Largest file, in bytes: ``150_000_000`` or ``"150MB"`` (10⁶), ``"143MiB"`` (2²⁰).

    Raises:
        OptionError: More than one is given, or a value is outside its range.
    """
    given = [(k, v) for k, v in (("max_error", max_error), ("energy", energy), ("max_size", max_size)) if v is not None]
    if not given:
        return None
    if len(given) > 1:
        raise OptionError(f"Give one budget, got {' and '.join(k for k, _ in given)}.")
    kind, value = given[0]
    if kind == "max_size":
        return Budget("max_size", float(bytes_of(kind, value)))
    share = _share(kind, value)
    if kind == "max_error":
        if not 0 <= share < 1:
            raise OptionError(f"max_error is a share in [0, 1), got {value!r}.{_percent(value, share)}")
        return Budget("max_error", share)
    if not 0 < share <= 1:
        raise OptionError(f"energy is a share in (0, 1], got {value!r}.{_percent(value, share)}")
    return Budget("energy", share)


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(kind: str, value: int | float | str) -> int:
    """Return the number of bytes that a size means: ``150_000_000``, ``"150MB"`` or ``"143MiB"``.

    Raises:
        OptionError: It isn't one, or not above 0; ``kind`` names it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    count = float(match[1]) * UNITS.get(match[2].lower(), 0) if match else 0
    if not 0 < count < 2**63:
        raise OptionError(f"{kind} is a number of bytes, such as 150MB or 143MiB; got {str(value)[:80]!r}.")
    return int(count)


def _share(kind: str, value: float | str) -> float:
    text = str(value).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise OptionError(f"{kind} is a share, such as 0.01 or 1%; got {value!r}.") from None


def _percent(value: float | str, share: float) -> str:
    """Suggest the percent sign that a value between 1 and 100 may be missing."""
    return f" Did you mean {value}%?" if 1 <= share <= 100 and "%" not in str(value) else ""


@dataclass(frozen=True)
class Spectrum:
    """The energy that each rank of a module adds, and the room that it takes."""

    squares: np.ndarray
    """Squared singular values, from large to small, of the directions that may be kept."""
    energy: float
    """‖ΔW‖²: the sum of the squares, plus that of directions that can't be kept."""
    cost: int
    """The count of numbers that one more rank takes: out + in."""


def choose(spectra: Mapping[str, Spectrum], budget: Budget, size: int = 0) -> dict[str, int]:
    """Choose each module's rank: the smallest file within an error budget, or the most energy within a size budget.

    Directions of all modules are taken in the order of energy per cost, σ² / (out + in).  As the squares
    fall within a module, that solves the continuous problem; the last few directions are then
    exchanged for what still fits.  Every module keeps at least one.

    Args:
        spectra: The spectrum of every module.
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
            allowed = "a larger error" if budget.kind == "max_error" else "a smaller share: it is 1 − the error squared"
            raise OptionError(
                f"{budget}: can't be met; at the largest rank that is looked at the error is {share:.3g}. "
                f"Way out: a larger rank to choose from (--rank), or {allowed}."
            )
    counts = np.bincount(owners[taken], minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _within_size(order: np.ndarray, owners: np.ndarray, costs: np.ndarray, size: int) -> np.ndarray | None:
    """Take as many directions as fit, in order; once one of a module doesn't fit, none of its later ones is taken."""
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
    """Take the fewest first directions that lose no more than is allowed, then drop those that may go as well."""
    if allowed < -((3 * ROUNDING) ** 2) * float(squares.sum()):
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
