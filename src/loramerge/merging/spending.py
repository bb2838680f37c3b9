"""Choosing the rank of every module for a budget: one limit on the error, or on the size of the file."""

from typing import TYPE_CHECKING

from .. import linalg
from ..errors import OptionError, computing, size
from ..layers import Full, Layer, LowRank
from ..layers.base import matrix
from ..tensors import nbytes
from .plans import Plan
from .ranks import Budget, Spectrum, choose
from .steps import Step

if TYPE_CHECKING:
    from ..files.storage.writer import Progress


def spent(plan: Plan, budget: Budget, progress: "Progress | None" = None) -> Plan:
    """Return the same plan with the rank of every module chosen for a budget, at most the rank it has.

    Raises:
        OptionError: The budget can't be met.
    """
    if all(step.rankless for step in plan.steps.values()):
        raise OptionError(f"{budget}: no module has a rank that could be made smaller. Way out: no budget.")
    least = _check_least(plan, budget) if budget.kind == "max_size" else 0
    spectra: dict[str, Spectrum] = {}
    for done, (module, step) in enumerate(plan.steps.items(), start=1):
        if plan.first(module) == module and not step.rankless:
            spectra[module] = _spectrum_of(plan, module)
        if progress:
            progress(done, len(plan.steps))
    if budget.kind != "max_size":
        return plan.at(choose(spectra, budget), budget)
    # Names and alphas take room too, and their size depends a little on the ranks.
    room, best = budget.value, None
    for _ in range(8):
        found = plan.at(choose(spectra, budget, int(room // nbytes((1,), plan.dtype))), budget)
        spare = budget.value - found.file_size
        if best and spare >= 0 and found.ranked_size == best.ranked_size:
            break
        best = found if spare >= 0 else best
        room = max(found.ranked_size + spare, least)
    if best is None:
        raise OptionError(f"{budget}: can't be met in the dialect {plan.dialect}. Way out: a larger size.")
    return best


def _spectrum_of(plan: Plan, module: str) -> Spectrum:
    """Compute the spectrum of a module, or of the fused weight that it is a part of."""
    join, cost = plan.joins.get(module), plan.cost_of(module)
    if join is not None:
        parts = [] if join.exact else plan.merger.uncut_parts(join)
        return _spectrum(plan.merger.joined(join, parts), join.step, cost)
    with computing(module):
        return _spectrum(plan.merger.uncut(plan.steps[module]), plan.steps[module], cost)


def _check_least(plan: Plan, budget: Budget) -> int:
    """Return the bytes of the factors at rank 1.

    Raises:
        OptionError: The file would be too large even at rank 1.  This is found before any tensor is read.
    """
    smallest = plan.at(dict.fromkeys(plan.steps, 1), budget)
    least = smallest.file_size
    if least > budget.value:
        narrower = ", or a dtype of 16 bits" if plan.dtype in ("F32", "F64") else ""
        raise OptionError(
            f"{budget}: can't be met: at rank 1 in every module the file takes {size(least)} ({least} bytes) as "
            f"{plan.dtype} in the dialect {plan.dialect}. Way out: a size from {least} bytes on{narrower}."
        )
    return smallest.ranked_size


def _spectrum(layer: Layer, step: Step, cost: int) -> Spectrum:
    """Compute the spectrum of a layer, up to the rank of its step."""
    missed = 0.0  # what no rank that is looked at would keep, measured by itself: a difference of energies is rounding
    if near := layer.nearest(1):
        squares = linalg.as_numpy(near[2]).astype("float64") ** 2
    elif not isinstance(layer, LowRank | Full):
        squares = linalg.as_numpy(layer.spectrum(lambda: linalg.grams(*layer.factors())).sigma) ** 2
    elif isinstance(layer, Full):
        cut = linalg.truncate_dense(matrix(layer.diff), step.rank, within=step.rank)
        squares, missed = linalg.squares(cut.up, cut.down), cut.lost
    else:
        squares = linalg.squares(*layer.factors())
    return Spectrum(squares[: step.rank], float(squares.sum()) + missed, cost)
