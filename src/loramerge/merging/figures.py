"""The figures of one merge of a sweep: its size, and what it has of its parents."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .. import linalg
from ..files.lora import LoRA
from ..layers import Layer
from ..layers.base import dense_norm, in_one_library, matrix
from ..tensors import Array, namespace
from .grid import unique
from .plans import Plan


def extent(merged: LoRA, path: Path) -> dict[str, float | None]:
    """Return the size of a merged file or directory in bytes, and the smallest and largest rank; None without any."""
    ranks = [layer.rank for layer in merged.layouts.values() if layer.rank is not None]
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return {"size": size, "rank_min": min(ranks, default=None), "rank_max": max(ranks, default=None)}


Products: TypeAlias = dict[tuple[str, tuple[int, ...]], list[list[float]]]
"""⟨ΔWᵢ, ΔWⱼ⟩ of a module's parents, by the module and the places of the parents among the LoRAs."""


def measure(merged: LoRA, planned: Plan, products: Products) -> dict[str, float | None]:
    """Measure how much a merged LoRA has of its parents, from factors, over all modules that are merged.

    Args:
        merged: The merged LoRA, as it was written.
        planned: Its plan.
        products: What other merges of the same LoRAs have in common with this one; what is missing is added.

    Returns:
        ``kept:NAME`` of each parent i, ⟨ΔW, ΔWᵢ⟩ / ⟨ΔWᵢ, ΔWᵢ⟩: how much of it is in the merge, along its own
        direction (its weight, and what the others have in that direction).  ``interference``,
        ‖ΔW − Σ wᵢΔWᵢ‖ / ‖Σ wᵢΔWᵢ‖: how far the merge is from the weighted sum.  None where the denominator is 0.
    """
    inner, own = [0.0] * len(planned.loras), [0.0] * len(planned.loras)
    apart, whole = 0.0, 0.0
    for module, step in planned.steps.items():
        if step.rankless:
            continue
        inputs = tuple(i for i in step.inputs if not planned.loras[i].layout(module).bias_only)
        given = [layer for layer in planned.merger.inputs(module) if not layer.bias_only]
        weights = [planned.weights.of(module)[i] for i in inputs]
        layers = in_one_library([*given, merged[module]] if module in merged else given)
        parents = _products(layers[: len(given)])
        result = _products(layers[len(given) :], like=parents)
        if (module, inputs) not in products:
            products[module, inputs] = [[_inner(a, b) for b in parents] for a in parents]
        between = products[module, inputs]
        shared = [_inner(result[0], parent) if result else 0.0 for parent in parents]
        for place, i in enumerate(inputs):
            inner[i] += shared[place]
            own[i] += between[place][place]
        squares = _squares(between, weights, shared, _inner(result[0], result[0]) if result else 0.0)
        if squares is None:
            total = _weighted(parents, weights)
            squares = _inner(total, total), _distance(result[0], total) ** 2 if result else _inner(total, total)
        whole += squares[0]
        apart += squares[1]
    names: list[str] = []
    for lora in planned.loras:
        names.append(unique(lora.name, names))
    kept = {f"kept:{name}": a / b if b else None for name, a, b in zip(names, inner, own, strict=True)}
    return {**kept, "interference": math.sqrt(apart / whole) if whole else None}


def _squares(
    between: Sequence[Sequence[float]], weights: Sequence[Any], shared: Sequence[float], size: float
) -> tuple[float, float] | None:
    """Compute ‖Σ wᵢΔWᵢ‖² and ‖ΔW − Σ wᵢΔWᵢ‖² from inner products alone.

    Args:
        between: ⟨ΔWᵢ, ΔWⱼ⟩.
        weights: The wᵢ.
        shared: ⟨ΔW, ΔWᵢ⟩.
        size: ‖ΔW‖².

    Returns:
        Both; None if they can't be computed from these, because a weight has a number for each column, or would
        have too few digits.
    """
    if not all(isinstance(weight, float | int) for weight in weights):
        return None
    terms = [a * b * x for a, row in zip(weights, between, strict=True) for b, x in zip(weights, row, strict=True)]
    whole = math.fsum(terms)
    apart = math.fsum([size, whole, *(-2 * weight * x for weight, x in zip(weights, shared, strict=True))])
    return (whole, apart) if min(whole, apart) > linalg.CANCELLED * (size + math.fsum(map(abs, terms))) else None


Factors = tuple[Array, Array]
Update: TypeAlias = Factors | Array
"""A ΔW in float64: its factors, or the dense matrix where one of the module's parents has none."""


def _products(layers: Sequence[Layer], like: Sequence[Update] = ()) -> list[Update]:
    """Return the ΔWs of layers, all in one form."""
    factored = isinstance(like[0], tuple) if like else all(layer.factored for layer in layers)
    return [_factors(layer) if factored else _wide(matrix(layer.delta())) for layer in layers]


def _factors(layer: Layer) -> Factors:
    """Return the factors in float64, so that the sums over modules are exact to float32."""
    up, down = layer.factors()
    return _wide(up), _wide(down)


def _wide(array: Array) -> Array:
    xp = namespace(array)
    return xp.astype(array, xp.float64)


def _weighted(parents: Sequence[Update], weights: Sequence[Any]) -> Update:
    """Compute Σ wᵢ ΔWᵢ."""
    if not isinstance(parents[0], tuple):
        dense: list[Array] = list(parents)
        return sum(weight * parent for weight, parent in zip(weights, dense, strict=True))
    xp = namespace(parents[0][0])
    scaled = [_scaled(up, down, weight) for (up, down), weight in zip(parents, weights, strict=True)]
    return xp.concat([up for up, _ in scaled], axis=1), xp.concat([down for _, down in scaled], axis=0)


def _scaled(up: Array, down: Array, weight: Any) -> Factors:
    """Compute the factors of w ΔW for a number w, and of ΔW diag(w) for learned weights, one per column."""
    if isinstance(weight, float | int):
        return weight * up, down
    return up, down * namespace(down).asarray(weight, dtype=down.dtype, device=down.device)


def _inner(a: Update, b: Update) -> float:
    """Compute ⟨ΔW₁, ΔW₂⟩; of factors, without forming either ΔW."""
    if isinstance(a, tuple):
        return float(((a[0].T @ b[0]) * (a[1] @ b[1].T)).sum())
    return float((a * b).sum())


def _distance(a: Update, b: Update) -> float:
    """Compute ‖ΔW₁ − ΔW₂‖."""
    return linalg.distance(a, b) if isinstance(a, tuple) else dense_norm(a - b)
