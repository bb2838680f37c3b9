"""The least-squares merge: the LoRA that answers each LoRA's own inputs as that LoRA does, in closed form.

For a module with the stacked factors B = [up₁ … up_N] and A = [down₁; …; down_N], and Cᵢ the
second moments of the inputs under LoRA i, it minimises

    J(M) = Σᵢ wᵢ tr((M − Dᵢ) Cᵢ (M − Dᵢ)ᵀ) + ridge · (distance to the prior)

over a family of M = B V with the ``up`` factors unchanged, so that every result is a LoRA of rank R:

| granularity | V | unknowns |
|---|---|---|
| global | sᵢ Aᵢ, one sᵢ for all modules | N |
| layer | sᵢ Aᵢ | N a module |
| rank | diag(s) A | R |
| core | K A | R² |
| column | Aᵢ diag(mᵢ): ZipLoRA's | N n |
| full | any: RegMean on the updates | R n |

The families contain each other: global ⊂ layer ⊂ rank ⊂ core ⊂ full, and layer ⊂ column ⊂ full.

Sources: Jin et al., 2023, RegMean, https://arxiv.org/abs/2212.09849, for ``full``; Shah et al., 2023,
ZipLoRA, https://arxiv.org/abs/2311.13600, for the form of ``column``.  The normal equations are
derived in docs/explanation/ziplora.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import MergeError, OptionError
from ..layers import LowRank, low_rank
from ..lora import LoRA
from .moments import Module, Moments

Granularity = Literal["global", "layer", "rank", "core", "column", "full"]
Prior = Literal["sum", "mean"]
Solver = Literal["auto", "cholesky", "pcg"]

RIDGE: Mapping[str, float] = {"global": 1e-3, "layer": 1e-3, "rank": 1e-3, "core": 0.01, "column": 0.1, "full": 0.1}
"""Default ridge, relative to the diagonal of the normal equations."""


@dataclass(frozen=True)
class Problem:
    """One module's factors and moments, in float64."""

    up: Tensor
    """B, ``(out, R)``."""
    down: Tensor
    """A, ``(R, n)``."""
    slices: tuple[slice, ...]
    """Each LoRA's rows of A; empty for one that lacks the module."""
    core: Tensor
    """wᵢ A Cᵢ Aᵀ, ``(N, R, R)``."""
    gram: Tensor | None
    """Σ Cᵢ, ``(n, n)``; only with all weights one."""
    cross: Tensor | None
    """Aᵢ Cᵢ, ``(R, n)``, each row with its own LoRA's moments."""

    @property
    def gram_up(self) -> Tensor:
        """``upᵀ up``, ``(R, R)``."""
        return self.up.T @ self.up

    def own(self, i: int) -> Tensor:
        """The diagonal of the projection onto LoRA i's rows, ``(R,)``."""
        mask = self.down.new_zeros(self.down.shape[0])
        mask[self.slices[i]] = 1.0
        return mask

    def loss(self, down: Tensor) -> float:
        """J of ``up @ down`` without the ridge, where the moments allow it.

        Args:
            down: V, ``(R, n)``.

        Raises:
            MergeError: The moments are of the kind ``core``, which only know V = K A.
        """
        if self.gram is None or self.cross is None:
            raise MergeError("the loss of any down factor needs moments of the kind 'gram'")
        g = self.gram_up
        constant = sum(float((g[s, s] * self.core[i][s, s]).sum()) for i, s in enumerate(self.slices))
        return float((g * (down @ self.gram @ down.T)).sum() - 2 * ((g @ self.cross) * down).sum()) + constant

    def core_loss(self, k: Tensor) -> float:
        """J of ``up @ k @ down``, ``k`` of shape ``(R, R)``, without the ridge."""
        total = 0.0
        for i, moment in enumerate(self.core):
            rest = k - torch.diag(self.own(i))
            total += float((self.gram_up * (rest @ moment @ rest.T)).sum())
        return total


@dataclass
class Report:
    """How well a merge answers every LoRA's inputs, by module: J / J of the base model, 0 is perfect."""

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
        granularity: The family that the result is looked for in; see the module's documentation.
        ridge: Pull to the prior, relative to the diagonal of the normal equations, from 0.
        prior: What directions get that no input has shown: ``sum`` keeps each LoRA there,
            ``mean`` the average.
        weights: How much each LoRA's error counts; 1 for all by default, which ``column`` and
            ``full`` require.
        solver: For ``column``: ``cholesky`` forms the N n × N n system, ``pcg`` solves it by
            conjugate gradients without forming it; ``auto`` chooses by size.

    Returns:
        The merged LoRA, of rank Σr in every module, and how well it fits.  Modules without
        moments are summed.

    Raises:
        MergeError: The moments are of other LoRAs, or of a kind that does not suffice.
        OptionError: An option is unknown or out of range.
    """
    _check(loras, moments, granularity, ridge, prior, weights)
    chosen = RIDGE[granularity] if ridge is None else ridge
    problems = {m: problem(loras, m, moments.modules[m], moments.batches(m), weights) for m in moments.modules}
    common = _global(problems.values(), chosen, prior) if granularity == "global" else None
    layouts: dict[str, LowRank] = {}
    report = Report()
    for module in dict.fromkeys(m for lora in loras for m in lora):
        shape = next(lora.layout(module).shape for lora in loras if module in lora)
        if module not in problems:
            factors = [tuple(torch.as_tensor(t) for t in lora[module].factors()) for lora in loras if module in lora]
            up, down = torch.cat([u for u, _ in factors], 1), torch.cat([d for _, d in factors], 0)
            layouts[module] = low_rank(up.float(), down.float(), shape)
            continue
        p = problems[module]
        solved = (
            p.down * _spread(p, common)[:, None] if common is not None else solve(p, granularity, chosen, prior, solver)
        )
        layouts[module] = low_rank(p.up.float(), solved.float(), shape)
        _fit(report, module, p, solved)
    first = loras[0]
    merged = LoRA(
        name=" + ".join(lora.name for lora in loras),
        architecture=first.architecture,
        dialect=first.dialect,
        layouts={m: layer.map(lambda t: t.numpy()) for m, layer in layouts.items()},
        dtype=first.dtype,
    )
    return merged, report


def problem(
    loras: Sequence[LoRA], module: str, found: Module, batches: int, weights: Sequence[float] | None
) -> Problem:
    """One module's least-squares problem."""
    ups, downs, slices, start = [], [], [], 0
    for lora in loras:
        rank = 0
        if module in lora:
            up, down = (torch.as_tensor(t).double().cpu() for t in lora[module].factors())
            ups.append(up)
            downs.append(down)
            rank = up.shape[1]
        slices.append(slice(start, start + rank))
        start += rank
    shares = torch.tensor(list(weights or [1.0] * len(loras)), dtype=torch.float64)
    core = found.core.cpu() / batches
    if core.shape != (len(loras), start, start):
        raise MergeError(
            f"{module}: the moments have the shape {tuple(core.shape)}, wanted {(len(loras), start, start)}."
        )
    return Problem(
        torch.cat(ups, 1),
        torch.cat(downs, 0),
        tuple(slices),
        core * shares[:, None, None],
        None if found.gram is None else found.gram.cpu().double() / batches,
        None if found.cross is None else found.cross.cpu() / batches,
    )


def solve(p: Problem, granularity: Granularity, ridge: float, prior: Prior, solver: Solver = "auto") -> Tensor:
    """V, ``(R, n)``, with ``up @ V`` the best of a family."""
    if granularity == "layer":
        return p.down * _spread(p, _solved(*layer_system(p), ridge, _prior(p, prior)))[:, None]
    if granularity == "rank":
        return p.down * _solved(*rank_system(p), ridge, _prior(p, prior))[:, None]
    if granularity == "core":
        return core_solution(p, ridge, prior) @ p.down
    if granularity == "column":
        m = column_solution(p, ridge, _prior(p, prior), solver)
        return torch.cat([p.down[s] * m[i] for i, s in enumerate(p.slices)], 0)
    return full_solution(p, ridge, prior)


def layer_system(p: Problem) -> tuple[Tensor, Tensor]:
    """H and b of one factor a LoRA: Hⱼₖ = ⟨BⱼᵀBₖ, Aⱼ C Aₖᵀ⟩, bⱼ = Σᵢ ⟨BⱼᵀBᵢ, Aⱼ Cᵢ Aᵢᵀ⟩."""
    h, b = rank_system(p)
    pick = torch.stack([p.own(i) for i in range(len(p.slices))])
    return pick @ h @ pick.T, pick @ b


def rank_system(p: Problem) -> tuple[Tensor, Tensor]:
    """H and b of one factor a rank: H = (BᵀB) ∘ (A C Aᵀ), b = Σᵢ ((BᵀBᵢ) ∘ (A Cᵢ Aᵢᵀ)) 1."""
    g = p.gram_up
    h = g * p.core.sum(0)
    b = sum(((g * moment) @ p.own(i) for i, moment in enumerate(p.core)), g.new_zeros(g.shape[0]))
    return h, b


def core_solution(p: Problem, ridge: float, prior: Prior) -> Tensor:
    """K = (Σᵢ Pᵢ Sᵢ + λ K₀ G)(Σᵢ Sᵢ + λ G)⁻¹ with Sᵢ = A Cᵢ Aᵀ and G = A Aᵀ, the metric of the prior K₀."""
    total = p.core.sum(0)
    own = sum((p.own(i)[:, None] * moment for i, moment in enumerate(p.core)), torch.zeros_like(total))
    g = p.down @ p.down.T
    scale = max(ridge, 1e-9) * total.diagonal().mean() / g.diagonal().mean().clamp_min(1e-300)
    start = 1.0 if prior == "sum" else 1.0 / len(p.slices)
    return _divide(own + start * scale * g, total + scale * g)


def full_solution(p: Problem, ridge: float, prior: Prior) -> Tensor:
    """V = (Aᵢ (Cᵢ + λᵢ)) (C + λ)⁻¹, row by row with its own LoRA's moments."""
    if p.gram is None or p.cross is None:
        raise MergeError("the granularity full needs moments of the kind 'gram'")
    scale = max(ridge, 1e-9) * p.gram.diagonal().mean()
    start = 1.0 if prior == "sum" else 1.0 / len(p.slices)
    eye = torch.eye(p.gram.shape[0], dtype=p.gram.dtype)
    return _divide(p.cross + start * scale * p.down, p.gram + scale * eye)


def column_system(p: Problem) -> tuple[Tensor, Tensor]:
    """H ``(N n, N n)`` and b ``(N n,)`` of one factor a LoRA and column: Hⱼₖ = (DⱼᵀDₖ) ∘ C."""
    if p.gram is None:
        raise MergeError("the granularity column needs moments of the kind 'gram'")
    g = p.gram_up
    blocks = [[(p.down[s].T @ g[s, t] @ p.down[t]) * p.gram for t in p.slices] for s in p.slices]
    return torch.cat([torch.cat(row, 1) for row in blocks], 0), column_target(p).reshape(-1)


def column_target(p: Problem) -> Tensor:
    """b, ``(N, n)``: bⱼ = Σᵢ ((DⱼᵀDᵢ) ∘ Cᵢ) 1 = colsum(Aⱼ ∘ (BⱼᵀB · (Aᵢ Cᵢ)))."""
    if p.cross is None:
        raise MergeError("the granularity column needs moments of the kind 'gram'")
    response = p.gram_up @ p.cross
    return torch.stack([(p.down[s] * response[s]).sum(0) for s in p.slices])


def column_solution(p: Problem, ridge: float, prior: float, solver: Solver = "auto") -> Tensor:
    """The coefficients m, ``(N, n)``: ZipLoRA in closed form."""
    n, count = p.down.shape[1], len(p.slices)
    if solver == "auto":
        solver = "cholesky" if n * count <= 1500 else "pcg"
    if solver == "pcg":
        return _pcg(p, ridge, prior)
    h, b = column_system(p)
    return _solved(h, b, ridge, prior).reshape(count, n)


def _pcg(p: Problem, ridge: float, prior: float, tolerance: float = 1e-7, most: int = 500) -> Tensor:
    """Conjugate gradients, preconditioned by the diagonal; H v = colsum(E ∘ ((Σⱼ Eⱼ ∘ vⱼ) C)) without H."""
    assert p.gram is not None
    root = torch.linalg.qr(p.up)[1]
    e = [root[:, s] @ p.down[s] for s in p.slices]
    gram = p.gram
    diagonal = torch.stack([(x**2).sum(0) for x in e]) * gram.diagonal()
    pull = ridge * diagonal + 1e-10 * diagonal.mean()

    def times(v: Tensor) -> Tensor:
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
    raise MergeError(f"conjugate gradients did not converge in {most} steps; give a larger ridge")


def _solved(h: Tensor, b: Tensor, ridge: float, prior: float) -> Tensor:
    """(H + ρ) x = b + ρ · prior, with ρ = ridge · diag(H)."""
    pull = ridge * h.diagonal() + 1e-10 * h.diagonal().mean().clamp_min(1e-300)
    return torch.linalg.solve(h + torch.diag(pull), b + pull * prior)


def _divide(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right⁻¹`` for a symmetric positive ``right``."""
    found: Tensor = torch.linalg.solve(right, left.T).T
    return found


def _prior(p: Problem, prior: Prior) -> float:
    return 1.0 if prior == "sum" else 1.0 / len(p.slices)


def _spread(p: Problem, s: Tensor) -> Tensor:
    """One factor a LoRA as one a row."""
    return sum((s[i] * p.own(i) for i in range(len(p.slices))), torch.zeros_like(p.down[:, 0]))


def _global(problems: Iterable[Problem], ridge: float, prior: Prior) -> Tensor:
    systems = [layer_system(p) for p in problems]
    h = torch.stack([h for h, _ in systems]).sum(0)
    b = torch.stack([b for _, b in systems]).sum(0)
    return _solved(h, b, ridge, 1.0 if prior == "sum" else 1.0 / len(b))


def _fit(report: Report, module: str, p: Problem, solved: Tensor) -> None:
    eye = torch.eye(p.down.shape[0], dtype=p.down.dtype)
    base = p.core_loss(torch.zeros_like(eye))
    if not base:
        return
    report.sums[module] = p.core_loss(eye) / base
    report.means[module] = p.core_loss(eye / len(p.slices)) / base
    if p.gram is not None:
        report.fits[module] = p.loss(solved) / base
    else:
        report.fits[module] = p.core_loss(solved @ torch.linalg.pinv(p.down)) / base


def _check(
    loras: Sequence[LoRA],
    moments: Moments,
    granularity: str,
    ridge: float | None,
    prior: str,
    weights: Sequence[float] | None,
) -> None:
    if granularity not in get_args(Granularity):
        raise OptionError(f"Unknown granularity {granularity!r}. Available: {', '.join(get_args(Granularity))}.")
    if prior not in get_args(Prior):
        raise OptionError(f"Unknown prior {prior!r}. Available: {', '.join(get_args(Prior))}.")
    if ridge is not None and not ridge >= 0:
        raise OptionError(f"The ridge is a number from 0, got {ridge!r}.")
    if len(loras) != len(moments.names):
        raise MergeError(f"The moments are of {len(moments.names)} LoRAs, got {len(loras)}.")
    if granularity in ("column", "full"):
        if moments.kind != "gram":
            raise MergeError(f"The granularity {granularity} needs moments of the kind 'gram', got {moments.kind!r}.")
        if weights is not None and set(weights) != {1.0}:
            raise OptionError(f"The granularity {granularity} takes no weights: Σ Cᵢ is kept as one sum.")
    missing = [m for m in moments.modules if not any(m in lora for lora in loras)]
    if missing:
        raise MergeError(f"The moments have the module {missing[0]}, which none of the LoRAs has.")
