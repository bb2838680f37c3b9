"""Layers and their ΔWs as dense matrices, for the comparison of merge methods with other code."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loramerge.layers import Full, Layer
from loramerge.layers.base import matrix
from loramerge.merging.methods import METHODS
from loramerge.merging.methods.selection import chance
from loramerge.testing import random_layer

SHAPES: dict[str, tuple[int, ...]] = {"linear": (40, 28), "tall": (64, 9), "conv": (20, 5, 3, 3)}


def layers(count: int, shape: str | tuple[int, ...] = "linear", rank: int = 3, first: int = 0) -> list[Layer]:
    """LoRAs of one module with different ranks and scales."""
    size = SHAPES[shape] if isinstance(shape, str) else shape
    return [random_layer(size, rank=rank + i % 2, alpha=2.0 + i, seed=first + i) for i in range(count)]


def deltas(given: Sequence[Layer]) -> list[np.ndarray]:
    """ΔWs in float64, ``(out, in·kh·kw)``."""
    return [np.asarray(matrix(layer.delta()), dtype=np.float64) for layer in given]


def tensors(given: Sequence[Layer], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """ΔWs as torch has them, ``(out, in·kh·kw)``."""
    return [torch.from_numpy(np.ascontiguousarray(matrix(layer.delta()))).to(dtype) for layer in given]


def uncut(name: str, given: Sequence[Layer], weights: Sequence[float], **options: Any) -> np.ndarray:
    """A method's own result, before it is cut to a rank, ``(out, in·kh·kw)``."""
    merged = METHODS[name].merge(given, weights, **options)
    if options.get("space") != "core" and "space" in METHODS[name].options:
        assert isinstance(merged, Full)
    return np.asarray(matrix(merged.delta()), dtype=np.float64)


class Draws:
    """In the place of ``torch.bernoulli``: 1 where loramerge's own random numbers are below the chance."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chances: list[torch.Tensor] = []

    def __call__(self, chances: torch.Tensor) -> torch.Tensor:
        drawn = chance(chances, self.seed, which=len(self.chances))
        self.chances.append(chances)
        return (drawn < chances).to(chances.dtype)
