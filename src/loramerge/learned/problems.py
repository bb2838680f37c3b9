"""One module's least-squares problem: its factors, the moments of its inputs, and the normal equations.

The symbols are those of `loramerge.learned.least_squares`, which solves it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import MergeError, NumberError, within
from ..files.lora import LoRA
from ..tensors import Float
from .attach import factors
from .moments import Moments

ROUNDED = 1e-13
"""Size of the negative eigenvalues that float64 rounding may leave, as a share of a moment's trace."""

WRONG = 1e-2
"""Size of a negative eigenvalue that rounding doesn't explain, as a share of a moment's largest."""


@dataclass(frozen=True)
class Problem:
    """One module's factors and moments, in float64."""

    up: Float[Tensor, "out R"]
    """B."""
    down: Float[Tensor, "R n"]
    """A."""
    slices: tuple[slice, ...]
    """Each LoRA's rows of A; empty for one that lacks the module."""
    core: Float[Tensor, "N R R"]
    """wᵢ A Cᵢ Aᵀ."""
    gram: Float[Tensor, "n n"] | None
    """Σ Cᵢ; only if all weights are 1."""
    cross: Float[Tensor, "R n"] | None
    """Aᵢ Cᵢ, each row with its own LoRA's moments."""
    noise: float = 0.0
    """Rounding error of Σ Cᵢ, as a share of its trace."""

    @property
    def least_ridge(self) -> float:
        """The ridge below which rounding would decide the result, relative to the mean of Σ Cᵢ's diagonal."""
        return self.noise * self.down.shape[1]

    @property
    def gram_up(self) -> Float[Tensor, "R R"]:
        """``upᵀ up``."""
        return self.up.T @ self.up

    def own(self, i: int) -> Float[Tensor, " R"]:
        """Return the diagonal of the projection onto LoRA i's rows."""
        mask = self.down.new_zeros(self.down.shape[0])
        mask[self.slices[i]] = 1.0
        return mask

    def sums(self) -> tuple[Float[Tensor, "n n"], Float[Tensor, "R n"]]:
        """Return Σ Cᵢ and the Aᵢ Cᵢ, for results that aren't of the form V = K A.

        Raises:
            MergeError: The moments are of the kind ``core``, or there are weights.
        """
        if self.gram is None or self.cross is None:
            raise MergeError(
                "the granularities column and full need moments of the kind 'gram', without weights. "
                "Way out: calibrate for one of them, or choose core, rank or layer."
            )
        return self.gram, self.cross

    def loss(self, down: Float[Tensor, "R n"]) -> float:
        """Return J of ``up @ down`` without the ridge.

        Args:
            down: V.
        """
        (gram, cross), g = self.sums(), self.gram_up
        constant = sum(float((g[s, s] * self.core[i][s, s]).sum()) for i, s in enumerate(self.slices))
        return float((g * (down @ gram @ down.T)).sum() - 2 * ((g @ cross) * down).sum()) + constant

    def core_loss(self, k: Float[Tensor, "R R"]) -> float:
        """Return J of ``up @ k @ down`` without the ridge."""
        total = 0.0
        for i, moment in enumerate(self.core):
            rest = k - torch.diag(self.own(i))
            total += float((self.gram_up * (rest @ moment @ rest.T)).sum())
        return total


def problem(loras: Sequence[LoRA], module: str, moments: Moments, weights: Sequence[float] | None = None) -> Problem:
    """Pose one module's least-squares problem.

    Args:
        loras: The LoRAs that were calibrated, in the same order.
        module: The module's name.
        moments: The result of calibration.
        weights: Weight of each LoRA's error; 1 by default.

    Raises:
        MergeError: The moments are of other LoRAs.
        NumberError: The model's values were NaN or infinite.
    """
    pairs = {i: factors(lora, module) for i, lora in enumerate(loras) if module in lora}
    ends = list(accumulate(pairs[i][0].shape[1] if i in pairs else 0 for i in range(len(loras))))
    found, gram, batches = moments.modules[module], moments.gram(module), moments.batches(module)
    device, core = found.core.device, found.core.double() / batches
    if core.shape != (len(loras), ends[-1], ends[-1]):
        raise MergeError(
            f"{module}: the moments have the shape {tuple(core.shape)}, wanted {(len(loras), ends[-1], ends[-1])}."
        )
    if not all(part.isfinite().all() for part in (core, gram, found.cross) if part is not None):
        raise NumberError(
            f"{module}: its inputs were NaN or infinite during calibration. Way out: float32 or bfloat16."
        )
    shares = core.new_tensor(list(weights or [1.0] * len(loras)))
    alike = bool((shares == 1.0).all())  # sums over all LoRAs can't be weighted afterwards
    down = torch.cat([down for _, down in pairs.values()], 0).to(device).double()
    with within(module):
        core = positive(core, down)
    return Problem(
        torch.cat([up for up, _ in pairs.values()], 1).to(device).double(),
        down,
        tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False)),
        core * shares[:, None, None],
        gram.to(device).double() / batches if gram is not None and alike else None,
        found.cross.to(device).double() / batches if found.cross is not None and alike else None,
        torch.finfo(gram.dtype).eps if gram is not None else 0.0,
    )


def positive(core: Float[Tensor, "N R R"], down: Float[Tensor, "R n"]) -> Float[Tensor, "N R R"]:
    """Remove rounding errors from moments A Cᵢ Aᵀ, so that none has a negative eigenvalue.

    In a direction in which the rows of A nearly cancel, float32 can't tell the moments from zero, or from
    less: eigenvalues up to the size of the lowest, negative one are rounding, and become 0.

    Args:
        core: The moments.
        down: A.

    Raises:
        MergeError: An eigenvalue is further below zero than rounding explains.
    """
    sizes = row_lengths(down)
    scale = torch.outer(sizes, sizes)
    return torch.stack([_positive(moment / scale) for moment in core]) * scale


def _positive(moment: Float[Tensor, "R R"]) -> Float[Tensor, "R R"]:
    moment = (moment + moment.T) / 2
    if not torch.linalg.cholesky_ex(moment + ROUNDED * moment.trace() * eye_like(moment)).info:
        return moment
    values, vectors = torch.linalg.eigh(moment)
    if values[0] < -WRONG * values[-1]:
        raise MergeError(
            "its moments have the eigenvalue "
            f"{values[0]:.3g} beside {values[-1]:.3g}, and the moments of inputs have none below zero. "
            "Way out: calibrate again."
        )
    return (vectors * values.where(values > -values[0], 0.0)) @ vectors.T


def layer_system(p: Problem) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """Return H and b for one factor per LoRA: Hⱼₖ = ⟨BⱼᵀBₖ, Aⱼ C Aₖᵀ⟩, bⱼ = Σᵢ ⟨BⱼᵀBᵢ, Aⱼ Cᵢ Aᵢᵀ⟩."""
    h, b = rank_system(p)
    pick = torch.stack([p.own(i) for i in range(len(p.slices))])
    return pick @ h @ pick.T, pick @ b


def rank_system(p: Problem) -> tuple[Float[Tensor, "R R"], Float[Tensor, " R"]]:
    """Return H and b for one factor per rank: H = (BᵀB) ∘ (A C Aᵀ), b = Σᵢ ((BᵀBᵢ) ∘ (A Cᵢ Aᵢᵀ)) 1."""
    g = p.gram_up
    h = g * p.core.sum(0)
    b = sum(((g * moment) @ p.own(i) for i, moment in enumerate(p.core)), g.new_zeros(g.shape[0]))
    return h, b


def column_system(p: Problem) -> tuple[Float[Tensor, "Nn Nn"], Float[Tensor, " Nn"]]:
    """Return H and b for one factor per LoRA and column: Hⱼₖ = (DⱼᵀDₖ) ∘ C."""
    g, gram = p.gram_up, p.sums()[0]
    blocks = [[(p.down[s].T @ g[s, t] @ p.down[t]) * gram for t in p.slices] for s in p.slices]
    return torch.cat([torch.cat(row, 1) for row in blocks], 0), column_target(p).reshape(-1)


def column_target(p: Problem) -> Float[Tensor, "N n"]:
    """Return bⱼ = Σᵢ ((DⱼᵀDᵢ) ∘ Cᵢ) 1 = colsum(Aⱼ ∘ (BⱼᵀB · (Aᵢ Cᵢ)))."""
    response = p.gram_up @ p.sums()[1]
    return torch.stack([(p.down[s] * response[s]).sum(0) for s in p.slices])


def row_lengths(rows: Float[Tensor, "R n"]) -> Float[Tensor, " R"]:
    """Return the lengths of rows, 1 for rows of zeros."""
    found = torch.linalg.vector_norm(rows, dim=1)
    return found.where(found > 0, 1.0)


def eye_like(like: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the identity in the size, dtype and device of a square matrix."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device)
