"""The least-squares merge: the LoRA that is nearest to each LoRA on that LoRA's own inputs, in closed form.

For a module with the stacked factors B = [up₁ … up_N] and A = [down₁; …; down_N], and Cᵢ the
second moments of the inputs under LoRA i, it minimises

    J(M) = Σᵢ wᵢ tr((M − Dᵢ) Cᵢ (M − Dᵢ)ᵀ) + ridge · (distance to the prior)

over a family of M = B V with the ``up`` factors unchanged, so that every result is a LoRA of rank R:

| granularity | V | unknowns |
|---|---|---|
| global | sᵢ Aᵢ, one sᵢ for all modules | N |
| layer | sᵢ Aᵢ | N per module |
| rank | diag(s) A | R |
| core | K A | R² |
| column | Aᵢ diag(mᵢ): ZipLoRA's | N n |
| full | any: RegMean on the updates | R n |

The families contain each other: global ⊂ layer ⊂ rank ⊂ core ⊂ full, and layer ⊂ column ⊂ full.

Sources: Jin et al., 2023, RegMean, https://arxiv.org/abs/2212.09849, for ``full``; Shah et al., 2023,
ZipLoRA, https://arxiv.org/abs/2311.13600, for the form of ``column``.  The normal equations are
derived in docs/explanation/ziplora.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import MergeError, OptionError, within
from ..files.lora import LoRA
from ..merging.plans import Plan
from ..tensors import Float
from .moments import Moments
from .problems import (
    Problem,
    column_system,
    column_target,
    eye_like,
    layer_system,
    problem,
    rank_system,
    row_lengths,
)
from .result import assemble, plan_sum

Granularity = Literal["global", "layer", "rank", "core", "column", "full"]
Prior = Literal["sum", "mean"]
Solver = Literal["auto", "direct", "pcg"]

RIDGE: Mapping[str, float] = {"global": 1e-3, "layer": 1e-3, "rank": 1e-3, "core": 0.01, "column": 0.1, "full": 0.1}
"""Default ridge; `lsq` says what it is relative to."""

LEAST = 1e-10
"""Minimum ridge: it decides directions that no input excites, and is negligible elsewhere."""

SOUND = 1e9
"""Condition number up to which a metric is simply inverted: float64 then keeps seven digits."""

FAINT = 1e-12
"""Eigenvalues of a metric below this share of the largest count as zero: float32 factors hold no more digits."""

TINY = 1e-30
"""Smaller than any moment: keeps the equations solvable for a module whose inputs or factors are zero."""

SLACK = 1e-3
"""Tolerated error of a J from float32 moments, as a share of the base model's J."""


@dataclass
class Report:
    """The error of a merge on the inputs of every LoRA, by module: J / J of the base model, 0 is perfect."""

    fits: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    """The same for the plain sum."""
    means: dict[str, float] = field(default_factory=dict)
    """The same for the average."""


def lsq(
    loras: Sequence[LoRA],
    moments: Moments,
    *,
    granularity: Granularity = "core",
    ridge: float | None = None,
    prior: Prior = "sum",
    weights: Sequence[float] | None = None,
    solver: Solver = "auto",
) -> tuple[LoRA, Report]:
    """Merge LoRAs in closed form, from the moments of a calibration.

    Args:
        loras: The LoRAs that were calibrated, in the same order.
        moments: Of the kind ``gram`` for the granularities ``column`` and ``full``.
        granularity: The family that the result belongs to; see the module's documentation.
        ridge: Pull to the prior, from 0: relative to the diagonal of the normal equations; for ``core`` to the
            mean energy of the inputs within the rows of A, for ``full`` to their mean energy altogether.
        prior: Result along directions that no input excites: ``sum`` keeps every LoRA there, ``mean`` the
            average.
        weights: Weight of each LoRA's error, above 0; 1 by default, which ``column`` and ``full`` require.
        solver: For ``column``: ``direct`` forms the N n × N n system, ``pcg`` solves it by
            conjugate gradients without forming it; ``auto`` chooses by size.

    Returns:
        The merged LoRA, of rank Σr in every module with moments, and how well it fits.  Modules
        without moments are summed.

    Raises:
        MergeError: The moments are of other LoRAs, of a kind that isn't enough, or can't be moments of any
            inputs; conjugate gradients don't converge; or rounding outweighs what the inputs showed.
        NumberError: The model's values were NaN or infinite.
        OptionError: An option is unknown or out of range.
    """
    _check(granularity, ridge, prior, solver)
    moments.check(loras)
    shares = _weights(weights, len(loras), granularity)
    planned = plan_sum(loras)
    _check_modules(moments, planned)
    chosen = RIDGE[granularity] if ridge is None else ridge

    def posed(module: str) -> Problem:
        return problem(loras, module, moments, shares)

    common = _global(map(posed, moments.modules), chosen, prior) if granularity == "global" else None
    learned: dict[str, tuple[Tensor, Tensor]] = {}
    costs: dict[str, Costs] = {}
    for module in moments.modules:
        p = posed(module)
        with within(module):
            solved, cost = _answer(p, granularity, chosen, prior, solver, common)
            costs[module] = costs_of(p, cost)
            if common is None:
                check_sound(solved, costs[module], prior)
        learned[module] = p.up, solved
    if common is not None:
        with within("all modules together"):
            check_sound(common, Costs(*map(sum, zip(*costs.values(), strict=True))), prior)
    options = {"granularity": granularity, "ridge": chosen, "prior": prior, "weights": shares}
    return assemble(planned, learned, "lsq", options, moments.identity), _report(costs)


def solve(
    p: Problem, granularity: Granularity, ridge: float, prior: Prior, solver: Solver = "auto"
) -> Float[Tensor, "R n"]:
    """Return V with ``up @ V`` the best of a family."""
    if granularity == "column":
        return columns(p, column_solution(p, ridge, _prior(p, prior), solver))
    if granularity == "full":
        return full_solution(p, ridge, prior)
    return _mixing(p, granularity, ridge, prior) @ p.down


def columns(p: Problem, m: Float[Tensor, "N n"]) -> Float[Tensor, "R n"]:
    """Return V of coefficients m: one factor per LoRA and column."""
    return torch.cat([p.down[s] * m[i] for i, s in enumerate(p.slices)], 0)


def _mixing(p: Problem, granularity: Granularity, ridge: float, prior: Prior) -> Float[Tensor, "R R"]:
    """Return K of the families with V = K A."""
    if granularity == "core":
        return core_solution(p, ridge, prior)
    if granularity == "rank":
        return torch.diag(rank_solution(p, ridge, _prior(p, prior)))
    return torch.diag(_spread(p, _solved(*layer_system(p), ridge, _prior(p, prior))))


def _answer(
    p: Problem,
    granularity: Granularity,
    ridge: float,
    prior: Prior,
    solver: Solver,
    common: Float[Tensor, " N"] | None,
) -> tuple[Float[Tensor, "R n"], float]:
    """Return V and its J, computed from the moments that give it most exactly."""
    if granularity in ("column", "full"):
        solved = solve(p, granularity, ridge, prior, solver)
        return solved, p.loss(solved)
    k = _mixing(p, granularity, ridge, prior) if common is None else torch.diag(_spread(p, common))
    return k @ p.down, p.core_loss(k)


def core_solution(p: Problem, ridge: float, prior: Prior) -> Float[Tensor, "R R"]:
    """Return K = (Σᵢ Pᵢ Sᵢ + λ K₀ G)(Σᵢ Sᵢ + λ G)⁻¹ with Sᵢ = A Cᵢ Aᵀ and G = A Aᵀ, the metric of the prior K₀.

    λ is the ridge times tr(G⁻¹ Σ Sᵢ) / R, so that the result depends on the ΔWᵢ, not on their factors.
    """
    sizes = row_lengths(p.down)  # rows of very different lengths would make the short ones lose digits
    core = p.core / torch.outer(sizes, sizes)
    total = core.sum(0)
    own = sum((p.own(i)[:, None] * moment for i, moment in enumerate(core)), torch.zeros_like(total))
    metric = _gram(p.down / sizes[:, None])
    energy = (_pseudo_inverse(metric) * total).sum() / len(metric)
    # Equal LoRAs leave directions in which both moments and metric vanish; what K does there has no effect.
    pull = ridge * energy * metric
    pull = pull + LEAST * (total + pull).diagonal().mean().clamp_min(TINY) * eye_like(metric)
    return sizes[:, None] * _divide(own + _prior(p, prior) * pull, total + pull) / sizes


def full_solution(p: Problem, ridge: float, prior: Prior) -> Float[Tensor, "R n"]:
    """Return V = (Aᵢ (Cᵢ + λᵢ)) (C + λ)⁻¹, row by row with its own LoRA's moments."""
    gram, cross = p.sums()
    pull = (ridge + p.least_ridge + LEAST) * gram.diagonal().mean().clamp_min(TINY)
    return _divide(cross + _prior(p, prior) * pull * p.down, gram + pull * eye_like(gram))


def rank_solution(p: Problem, ridge: float, prior: float) -> Float[Tensor, " R"]:
    """Return the factors s, one per unit of rank: ZipRank in closed form."""
    return _solved(*rank_system(p), ridge, prior)


def column_solution(p: Problem, ridge: float, prior: float, solver: Solver = "auto") -> Float[Tensor, "N n"]:
    """Return the coefficients m: ZipLoRA in closed form."""
    n, count = p.down.shape[1], len(p.slices)
    ridge += p.least_ridge
    if solver == "auto":
        solver = "direct" if n * count <= 1500 else "pcg"
    if solver == "pcg":
        return _pcg(p, ridge, prior)
    h, b = column_system(p)
    return _solved(h, b, ridge, prior).reshape(count, n)


def _pcg(p: Problem, ridge: float, prior: float, tolerance: float = 1e-7, most: int = 500) -> Float[Tensor, "N n"]:
    """Solve by conjugate gradients, preconditioned by the diagonal; H v = colsum(E ∘ ((Σⱼ Eⱼ ∘ vⱼ) C)) without H."""
    gram, _ = p.sums()
    root = torch.linalg.qr(p.up)[1]
    e = [root[:, s] @ p.down[s] for s in p.slices]
    diagonal = torch.stack([(x**2).sum(0) for x in e]) * gram.diagonal()
    pull = _pull(diagonal, ridge)

    def times(v: Float[Tensor, "N n"]) -> Float[Tensor, "N n"]:
        mixed = sum((x * v[j] for j, x in enumerate(e)), torch.zeros_like(e[0])) @ gram
        return torch.stack([(x * mixed).sum(0) for x in e]) + pull * v

    m = torch.full_like(diagonal, prior)
    target = column_target(p) + pull * prior
    rest = target - times(m)
    inverse = 1.0 / (diagonal + pull)
    direction = step = inverse * rest
    size = (rest * step).sum()
    for _ in range(most):
        if rest.norm() <= tolerance * target.norm():
            return m
        moved = times(direction)
        length = size / (direction * moved).sum()
        m = m + length * direction
        rest = rest - length * moved
        step = inverse * rest
        size, before = (rest * step).sum(), size
        direction = step + (size / before) * direction
    raise MergeError(f"conjugate gradients did not converge in {most} steps; give a larger ridge.")


def _solved(h: Float[Tensor, "n n"], b: Float[Tensor, " n"], ridge: float, prior: float) -> Float[Tensor, " n"]:
    """Solve (H + ρ) x = b + ρ · prior, with ρ = ridge · diag(H)."""
    pull = _pull(h.diagonal(), ridge)
    return _divide((b + pull * prior)[None], h + torch.diag(pull))[0]


def _pull(diagonal: Float[Tensor, "*n"], ridge: float) -> Float[Tensor, "*n"]:
    """Return how strongly each unknown is pulled to the prior."""
    return ridge * diagonal + LEAST * diagonal.mean().clamp_min(TINY)


def _divide(left: Float[Tensor, "m n"], right: Float[Tensor, "n n"]) -> Float[Tensor, "m n"]:
    """Return ``left @ right⁻¹`` for a symmetric positive ``right``."""
    lower, failed = torch.linalg.cholesky_ex(right)
    if failed:
        raise MergeError("rounding outweighs what the inputs showed. Way out: a larger ridge.")
    return torch.cholesky_solve(left.T, lower).T


def _gram(rows: Float[Tensor, "R n"]) -> Float[Tensor, "R R"]:
    """Return ``rows @ rowsᵀ``."""
    if rows.device.type != "cpu":
        return rows @ rows.T
    held = rows.numpy()
    return torch.from_numpy(held @ held.T)  # numpy sees that it is symmetric and computes one triangle


def _pseudo_inverse(metric: Float[Tensor, "R R"]) -> Float[Tensor, "R R"]:
    """Return the pseudo-inverse of a Gram matrix: a plain inverse would blow up along directions that are nearly zero."""
    lower, failed = torch.linalg.cholesky_ex(metric)
    if not failed:
        inverse = torch.cholesky_inverse(lower)
        # The traces bound the largest eigenvalue and the inverse of the least.
        if metric.trace() * inverse.trace() < SOUND:
            return inverse
    return torch.linalg.pinv(metric, rtol=FAINT, hermitian=True)


def _prior(p: Problem, prior: Prior) -> float:
    return 1.0 if prior == "sum" else 1.0 / len(p.slices)


def _spread(p: Problem, s: Float[Tensor, " N"]) -> Float[Tensor, " R"]:
    """Expand per-LoRA factors to per-row factors."""
    return sum((s[i] * p.own(i) for i in range(len(p.slices))), torch.zeros_like(p.down[:, 0]))


def _global(problems: Iterable[Problem], ridge: float, prior: Prior) -> Float[Tensor, " N"]:
    systems = [layer_system(p) for p in problems]
    h = torch.stack([h for h, _ in systems]).sum(0)
    b = torch.stack([b for _, b in systems]).sum(0)
    return _solved(h, b, ridge, 1.0 if prior == "sum" else 1.0 / len(b))


class Costs(NamedTuple):
    """J of one module, or of all modules, for several merges."""

    found: float
    base: float
    """J of the base model."""
    sum: float
    mean: float


def costs_of(p: Problem, found: float) -> Costs:
    """Return a module's J as found, and those of the base model, the sum and the average."""
    eye = eye_like(p.gram_up)
    return Costs(found, *(p.core_loss(k) for k in (torch.zeros_like(eye), eye, eye / len(p.slices))))


def check_sound(solved: Float[Tensor, "*any"], costs: Costs, prior: Prior) -> None:
    """Refuse an impossible result: a minimiser has 0 ≤ J ≤ J(prior), since J is a sum of squares.

    Raises:
        MergeError: J is below zero or above the prior's, or a value is NaN or infinite.
    """
    slack = SLACK * costs.base
    most = costs.sum if prior == "sum" else costs.mean
    if not (solved.isfinite().all() and -slack <= costs.found <= most + slack):
        raise MergeError(
            f"its error came out as {costs.found:.3g} where the {prior} of the LoRAs has {most:.3g}: rounding "
            "outweighs what the inputs showed. Ways out: a larger ridge, more batches, or the granularity core."
        )


def _report(costs: Mapping[str, Costs]) -> Report:
    """Return the fits of all modules in which the LoRAs change anything."""
    kept = {module: found for module, found in costs.items() if found.base > 0}
    return Report(
        {module: max(found.found, 0.0) / found.base for module, found in kept.items()},
        {module: found.sum / found.base for module, found in kept.items()},
        {module: found.mean / found.base for module, found in kept.items()},
    )


def _check(granularity: str, ridge: float | None, prior: str, solver: str) -> None:
    for what, given, known in (
        ("granularity", granularity, Granularity),
        ("prior", prior, Prior),
        ("solver", solver, Solver),
    ):
        if given not in get_args(known):
            raise OptionError(f"Unknown {what} {given!r}. Available: {', '.join(get_args(known))}.")
    if ridge is not None and not (isinstance(ridge, int | float) and 0 <= ridge < math.inf):
        raise OptionError(f"The ridge must be a number from 0, got {ridge!r}.")


def _weights(weights: Sequence[float] | None, count: int, granularity: str) -> list[float]:
    """Return one weight per LoRA."""
    found = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(found) != count:
        raise OptionError(f"Weights given: {len(found)}, LoRAs: {count}.")
    if not all(0 < weight < math.inf for weight in found):
        raise OptionError(f"weights must be above 0, got {found}.")
    if granularity in ("column", "full") and set(found) != {1.0}:
        raise OptionError(f"The granularity {granularity} takes no weights: Σ Cᵢ is kept as one sum.")
    return found


def _check_modules(moments: Moments, planned: Plan) -> None:
    missing = [module for module in moments.modules if module not in planned.steps]
    if missing:
        raise MergeError(f"The moments have the module {missing[0]}, which none of the LoRAs has.")
