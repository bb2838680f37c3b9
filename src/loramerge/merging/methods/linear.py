"""The exact weighted sum, and the average of factors that other tools offer instead."""

import math
from collections.abc import Sequence
from typing import Any

from ...errors import MergeError
from ...layers import Full, Layer, LowRank, low_rank
from ...tensors import Array, Float, concat, float32, namespace, times
from .base import equal_rank, method, shared_down, sum_of_ranks, with_bias


@method(
    "linear",
    source="Σ wᵢ ΔWᵢ by concatenation: docs/explanation/exact-merge.md",
    rank=sum_of_ranks,
    weights="sum",
    linear=True,
    dense=True,
)
def linear(layers: Sequence[Layer], weights: Sequence[float]) -> LowRank | Full:
    """The weighted sum Σ wᵢ ΔWᵢ, exact: factors are concatenated, ranks add up.

    Weights may be negative and need not sum to one.  A learned weight has one number per
    input column, Σ ΔWᵢ diag(mᵢ); the result is an ordinary LoRA, too.
    """
    if any(layer.dense for layer in layers):
        return with_bias(_dense_sum(layers, weights), layers, weights)
    weighted = [_weighted(layer, weight) for layer, weight in zip(layers, weights, strict=True)]
    ups, downs, scales = zip(*weighted, strict=True)
    scaled = [up if scale == 1 else times(float32(up), scale) for up, scale in zip(ups, scales, strict=True)]
    up = concat(scaled, axis=1)
    down = concat(downs) if len(downs) > 1 else downs[0]
    return with_bias(low_rank(up, down, layers[0].shape, shared_down(layers)), layers, weights)


@method(
    "factor_average",
    source="https://github.com/huggingface/peft, tuners/lora/model.py, combination_type='linear'",
    rank=equal_rank,
)
def factor_average(layers: Sequence[Layer], weights: Sequence[float]) -> LowRank:
    """PEFT's "linear": sums of factors, each by √|w|. Not the weighted sum: cross terms are as large as it.

    With up = Σ √|wᵢ| upᵢ and down = Σ ±√|wᵢ| downᵢ the product contains every upᵢ downⱼ, also of a
    LoRA whose ΔW is zero because its upᵢ is.  Use it to reproduce merges made by others; all LoRAs
    must have the same rank.

    Raises:
        MergeError: Ranks differ.
    """
    up: Array = 0.0
    down: Array = 0.0
    for layer, weight in zip(layers, weights, strict=True):
        layer_up, layer_down, scale = layer.stored_factors()  # PEFT takes the root of the scale on both
        root = math.sqrt(abs(weight * scale))
        up = up + root * float32(layer_up)
        down = down + math.copysign(root, weight * scale) * float32(layer_down)
    return with_bias(low_rank(up, down, layers[0].shape), layers, weights)


def _dense_sum(layers: Sequence[Layer], weights: Sequence[Any]) -> Full:
    """Compute Σ wᵢ ΔWᵢ as a dense matrix, where one of the layers has no factors."""
    total: Array = 0.0
    for layer, weight in zip(layers, weights, strict=True):
        if not isinstance(weight, float | int):
            raise MergeError("learned coefficients need factors, and a layer here is a whole difference")
        total = total + times(layer.delta(), weight)
    return Full(diff=total)


def _weighted(layer: Layer, weight: Any) -> tuple[Float[Array, "out r"], Float[Array, "r in"], float]:
    """Return up, down and s: s · up @ down is w ΔW for a number w, or ΔW diag(w) for one number per column."""
    up, down, scale = layer.stored_factors()
    if isinstance(weight, float | int):
        return up, down, scale * weight
    xp = namespace(down)
    return up, float32(down) * xp.asarray(weight, dtype=xp.float32, device=down.device), scale
