"""The least-squares merge as dense linear algebra in float64: the truth that the factored one is held against."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loramerge.learned.least_squares import Granularity, Prior, solve
from loramerge.learned.problems import Problem, positive

FAMILIES: tuple[Granularity, ...] = ("layer", "rank", "core", "column", "full")
OUT, IN, RANKS, TOKENS = 7, 6, (2, 3), 40


class World:
    """Adapters and inputs of one linear layer, dense and factored."""

    def __init__(
        self, seed: int = 0, ranks: Sequence[int] = RANKS, inputs: Sequence[Tensor] | None = None, out: int = OUT
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.ups = [normal(out, r) for r in ranks]
        self.downs = [normal(r, IN) for r in ranks]
        mixing = [normal(IN, IN) for _ in ranks]
        self.inputs = list(inputs) if inputs is not None else [normal(TOKENS, IN) @ m for m in mixing]

    @property
    def deltas(self) -> list[Tensor]:
        return [up @ down for up, down in zip(self.ups, self.downs, strict=True)]

    @property
    def problem(self) -> Problem:
        up, down = torch.cat(self.ups, 1), torch.cat(self.downs, 0)
        ends = np.cumsum([0, *(u.shape[1] for u in self.ups)])
        slices = tuple(slice(int(a), int(b)) for a, b in pairwise(ends))
        moments = [x.T @ x for x in self.inputs]
        return Problem(
            up,
            down,
            slices,
            torch.stack([down @ c @ down.T for c in moments]),
            torch.stack(moments).sum(0),
            torch.cat([d @ c for d, c in zip(self.downs, moments, strict=True)], 0),
        )

    @property
    def rounded(self) -> Problem:
        """The problem with every moment computed in float32."""
        exact = self.problem
        inputs, down = [x.float() for x in self.inputs], exact.down.float()
        inner = [x @ down.T for x in inputs]
        cross = [a[:, s].T @ x for a, s, x in zip(inner, exact.slices, inputs, strict=True)]
        return replace(
            exact,
            core=positive(torch.stack([a.T @ a for a in inner]).double(), exact.down),
            gram=torch.stack([x.T @ x for x in inputs]).sum(0).double(),
            cross=torch.cat(cross).double(),
            noise=torch.finfo(torch.float32).eps,
        )

    def loss(self, merged: Tensor) -> Tensor:
        """J of a dense M."""
        errors = [((merged - d) @ x.T).square().sum() for d, x in zip(self.deltas, self.inputs, strict=True)]
        return torch.stack(errors).sum()

    def basis(self, family: Granularity) -> list[Tensor]:
        """Matrices that span the family."""
        up, down = torch.cat(self.ups, 1), torch.cat(self.downs, 0)
        if family == "layer":
            return self.deltas
        if family == "rank":
            return [torch.outer(up[:, k], down[k]) for k in range(up.shape[1])]
        if family == "core":
            return [torch.outer(up[:, j], down[k]) for j in range(up.shape[1]) for k in range(up.shape[1])]
        if family == "column":
            return [d * e for d in self.deltas for e in torch.eye(down.shape[1], dtype=d.dtype)]
        eye = torch.eye(up.shape[0] * down.shape[1], dtype=up.dtype)
        return list(eye.reshape(-1, up.shape[0], down.shape[1]))

    def optimum(self, family: Granularity, ridge: float = 0.0, prior: float = 1.0) -> Tensor:
        """The best M of the family, by numpy on the dense problem."""
        basis = self.basis(family)
        design = np.stack([np.concatenate([(g @ x.T).numpy().ravel() for x in self.inputs]) for g in basis], 1)
        target = np.concatenate([(d @ x.T).numpy().ravel() for d, x in zip(self.deltas, self.inputs, strict=True)])
        if ridge:
            pull = np.diag(np.sqrt(ridge * (design**2).sum(0)))
            design, target = np.concatenate([design, pull]), np.concatenate([target, prior * pull.sum(1)])
        theta = np.linalg.lstsq(design, target, rcond=None)[0]
        return sum((t * g for t, g in zip(theta, basis, strict=True)), torch.zeros(basis[0].shape, dtype=torch.float64))


def merged(world: World, family: Granularity, ridge: float = 0.0, prior: Prior = "sum") -> Tensor:
    p = world.problem
    return p.up @ solve(p, family, ridge, prior)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((found - wanted).norm()) <= tolerance * max(float(wanted.norm()), 1.0)
