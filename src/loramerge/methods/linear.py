"""The weighted sum, exact, and the average of factors that passes for it elsewhere."""

import math
from collections.abc import Sequence
from typing import Any

from ..errors import MergeError
from ..layers import Full, Layer, LowRank, low_rank
from ..layers.base import matrix
from ..tensors import Array, flatten, float32, namespace
from .base import equal_rank, method, sum_of_ranks, with_bias


@method(
    "linear",
    source="Σ wᵢ ΔWᵢ by concatenation: docs/explanation/exact-merge.md",
    rank=sum_of_ranks,
    linear=True,
    dense=True,
)
def linear(layers: Sequence[Layer], weights: Sequence[float]) -> LowRank | Full:
    """The weighted sum Σ wᵢ ΔWᵢ, exact: factors are concatenated, ranks add up.

    Weights may be negative and need not sum to one.  A learned weight is one number for every
    input column, Σ ΔWᵢ diag(mᵢ), and the result as ordinary a LoRA.
    """
    if any(isinstance(layer, Full) for layer in layers):
        return with_bias(_dense_sum(layers, weights), layers, weights)
    factors = [_weighted(*as_stored(layer), weight) for layer, weight in zip(layers, weights, strict=True)]
    xp = namespace(factors[0][0])
    up = xp.concat([up for up, _ in factors], axis=1)
    downs = [down for _, down in factors]
    if len({down.dtype for down in downs}) > 1:
        downs = [float32(down) for down in downs]
    down = xp.concat(downs, axis=0) if len(downs) > 1 else downs[0]
    return with_bias(low_rank(up, down, layers[0].shape, shared_down(layers)), layers, weights)


@method(
    "factor_average",
    source="https://github.com/huggingface/peft, tuners/lora/model.py, combination_type='linear'",
    rank=equal_rank,
)
def factor_average(layers: Sequence[Layer], weights: Sequence[float]) -> LowRank:
    """PEFT's "linear": sums of factors, each by √|w|. Not the weighted sum: cross terms are as large as it.

    With up = Σ √|wᵢ| upᵢ and down = Σ ±√|wᵢ| downᵢ the product has every upᵢ downⱼ in it.  It
    is here to reproduce what others made; all LoRAs must have the same rank.

    Raises:
        MergeError: Ranks differ.
    """
    up: Array = 0.0
    down: Array = 0.0
    for layer, weight in zip(layers, weights, strict=True):
        layer_up, layer_down, scale = unscaled(layer)
        root = math.sqrt(abs(weight * scale))
        up = up + root * layer_up
        down = down + math.copysign(root, weight * scale) * layer_down
    return with_bias(low_rank(up, down, layers[0].shape), layers, weights)


def _dense_sum(layers: Sequence[Layer], weights: Sequence[Any]) -> Full:
    """Σ wᵢ ΔWᵢ where one of them has no factors: dense."""
    total: Array = 0.0
    for layer, weight in zip(layers, weights, strict=True):
        if not isinstance(weight, float | int):
            raise MergeError("learned coefficients need factors, and a layer here is a whole difference")
        total = total + weight * layer.delta()
    return Full(diff=total)


def _weighted(up: Array, down: Array, weight: Any) -> tuple[Array, Array]:
    """Factors of w ΔW for a number w, of ΔW diag(w) for one number a column."""
    if isinstance(weight, float | int):
        return (up if weight == 1 else up * weight), down
    xp = namespace(down)
    return up, float32(down) * xp.asarray(weight, dtype=xp.float32, device=down.device)


def as_stored(layer: Layer) -> tuple[Array, Array]:
    """Factors with ``up`` in float32 and ``down``, which a weighted sum does not change, as it is stored."""
    if not isinstance(layer, LowRank) or layer.mid is not None:
        return layer.factors()
    up = matrix(layer.up)
    return (up if layer.scale == 1.0 else up * layer.scale), flatten(layer.down)


def unscaled(layer: Layer) -> tuple[Array, Array, float]:
    """Factors as stored, and the scale beside them: PEFT takes the root of it on both."""
    up, down = layer.factors()
    scale = layer.scale if isinstance(layer, LowRank) else 1.0
    return (up / scale if scale else up), down, scale


def shared_down(layers: Sequence[Layer]) -> object:
    """Identity of the concatenated ``down``, where each layer knows its own."""
    ids = tuple(layer.down_id if isinstance(layer, LowRank) else None for layer in layers)
    return ids if None not in ids else None
