"""A small model with layers of every kind that LoRAs change, LoRAs for it, and data."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loramerge.files.lora import LoRA
from loramerge.layers import low_rank
from loramerge.testing import random_layer

Batch = Mapping[str, Any]

SAID = {"modelspec.architecture": "toy"}
"""Tells that all are for one model."""


class Toy(nn.Module):
    """Convolutions, one of them with a stride and one of 1×1, attention-like linears, and a text input."""

    def __init__(self, width: int = 6, text: int = 5) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(text, width)
        self.to_v = nn.Linear(text, width)
        self.out = nn.Linear(width, 3)
        self.time = nn.Linear(1, width)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        h = self.conv_in(x) + self.time(t[:, None])[:, :, None, None]
        h = torch.tanh(self.down(h))
        h = h + self.shortcut(h)
        tokens = h.flatten(2).movedim(1, -1)
        scores = self.to_q(tokens) @ self.to_k(text).movedim(1, -1)
        return self.out(tokens + scores.softmax(-1) @ self.to_v(text))


LINEAR = ("unet.to_q", "unet.to_k", "unet.to_v", "unet.out", "unet.time")
ALL = (*LINEAR, "unet.conv_in", "unet.down", "unet.shortcut")


def toy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(seed)
    return Toy().to(dtype)


def predict(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: model(**batch)


def draw(lora: int, generator: torch.Generator, count: int) -> Batch:
    """Images and text whose means differ from LoRA to LoRA, as the data of different subjects do."""
    mean = 0.5 - lora
    return {
        "x": torch.randn(count, 3, 4, 4, generator=generator) + mean,
        "t": torch.rand(count, generator=generator),
        "text": torch.randn(count, 2, 5, generator=generator) * (1 + lora),
    }


def lora_for(
    model: nn.Module,
    modules: Sequence[str] = ALL,
    *,
    seed: int = 0,
    rank: int = 2,
    kind: str | Callable[[str], str] = "lora",
    alpha: float | None = 1.0,
    name: str | None = None,
) -> LoRA:
    weights = {f"unet.{path}": tuple(p.shape) for path, p in named_weights(model).items()}
    layouts = {
        module: random_layer(
            weights[module],
            kind=kind if isinstance(kind, str) else kind(module),
            rank=rank,
            alpha=alpha,
            seed=zlib.crc32(f"{seed}/{module}".encode()),
        )
        for module in modules
    }
    return LoRA(name=name or f"toy-{seed}", architecture=None, dialect="diffusers", layouts=layouts, metadata=SAID)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters() if name.endswith(".weight")}


def from_factors(pairs: Mapping[str, tuple[Any, Any]], name: str = "given") -> LoRA:
    """A LoRA of linear layers from ``up`` and ``down`` by module."""
    layouts = {
        m: low_rank(np.float32(up), np.float32(down), (up.shape[0], down.shape[1])) for m, (up, down) in pairs.items()
    }
    return LoRA(name=name, architecture=None, dialect="diffusers", layouts=layouts, metadata=SAID)


def with_lora(model: nn.Module, lora: LoRA, scale: float = 1.0) -> nn.Module:
    """A copy of a model with ΔW added to its weights: what every LoRA means."""
    from copy import deepcopy

    changed = deepcopy(model)
    weights = named_weights(changed)
    with torch.no_grad():
        for module in lora:
            delta = torch.from_numpy(np.array(lora[module].delta()))
            weights[module.removeprefix("unet.")] += scale * delta.to(next(changed.parameters()).dtype)
    return changed
