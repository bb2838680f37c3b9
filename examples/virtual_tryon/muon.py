"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), for convolutions too, in float32.

``torch.optim.Muon`` takes matrices only and multiplies in bfloat16, which a CPU without such units does slowly.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, chosen by its author for speed."""
MOMENTUM = 0.95
BETAS = (0.9, 0.99)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``orthogonal=True``, Adam for the others.

    Args:
        groups: As of :func:`groups`.
        rank: Number of this process.
        world: Number of processes with the same gradients; each does its part of the matrices.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, rank: int = 0, world: int = 1) -> None:
        super().__init__(groups, {"orthogonal": False, "lr": 0.0})
        self.rank, self.world = rank, world

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["orthogonal"]:
                self.turn(given, group["lr"])
                continue
            for parameter in given:
                self.scaled(parameter, group["lr"])

    def turn(self, parameters: list[nn.Parameter], rate: float) -> None:
        """Change matrices by their orthogonalised momentum."""
        order = sorted(range(len(parameters)), key=lambda i: parameters[i].numel())
        mine = set(order[self.rank :: self.world])
        changes = [self.change(p) if i in mine else torch.zeros_like(p) for i, p in enumerate(parameters)]
        if self.world > 1:
            flat = torch.cat([change.flatten() for change in changes])
            torch.distributed.all_reduce(flat)
            parts = flat.split([p.numel() for p in parameters])
            changes = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        for parameter, change in zip(parameters, changes, strict=True):
            parameter.sub_(change, alpha=rate)

    def change(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].mul_(MOMENTUM).add_(parameter.grad)
        ahead = parameter.grad.add(state["mean"], alpha=MOMENTUM).flatten(1)
        return orthogonalised(ahead).view_as(parameter) * max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5

    def scaled(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = torch.zeros(())
        state["step"] += 1
        step, gradient = int(state["step"]), parameter.grad
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].lerp_(gradient * gradient, 1 - BETAS[1])
        spread = (state["square"] / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
        parameter.addcdiv_(state["mean"], spread, value=-rate / (1 - BETAS[0] ** step))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about U Vᵀ of the matrix U S Vᵀ: its singular values go to between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def groups(network: nn.Module, *, rate: float, adam_rate: float, ends: tuple[str, ...]) -> list[dict[str, Any]]:
    """Sort a network's parameters: matrices and kernels for Muon; vectors, embeddings and the named ends for Adam.

    Args:
        network: Whose parameters are to be trained.
        rate: Muon's learning rate.
        adam_rate: Adam's.
        ends: Parts of names of the first and last layers, which Adam takes.
    """
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        plain = parameter.ndim < 2 or any(end in name for end in ("embedding", *ends))
        (others if plain else matrices).append(parameter)
    return [
        {"params": matrices, "orthogonal": True, "lr": rate, "usual": rate},
        {"params": others, "orthogonal": False, "lr": adam_rate, "usual": adam_rate},
    ]
