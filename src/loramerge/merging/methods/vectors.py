"""Updates without a rank: biases, norms, tables.

Every method takes their weighted sum: they have neither the directions nor the matrix entries that
methods choose between.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...layers import BiasOnly, Full, Layer
from ...tensors import Array, Spec, float32, times


def vectors(layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """Compute Σ wᵢ ΔWᵢ of layers without a rank, in the form of the first; for layouts, the sum's layout."""
    bias = total([layer.delta_bias() for layer in layers], weights)
    held = [(layer, weight) for layer, weight in zip(layers, weights, strict=True) if not layer.bias_only]
    if not held:
        return BiasOnly(diff_b=bias)
    first = held[0][0]
    update = total([_update(layer) for layer, _ in held], [weight for _, weight in held])
    return first.remade(update, bias) or Full(diff=update, diff_b=bias)


def plus_biases(merged: Layer, layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """Add the biases of bias-only layers to a merged layer."""
    more = [merged.delta_bias(), *(layer.delta_bias() for layer in layers)]
    return replace(merged, diff_b=total(more, [1.0, *weights])) if layers else merged


def total(tensors: Sequence[Array | Spec | None], weights: Sequence[Any]) -> Any:
    """Return the weighted sum of the tensors that aren't None, float32; None if all are None."""
    found: Any = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if isinstance(tensor, Spec):
            found = Spec(tuple(tensor.shape), "F32")
        elif tensor is not None:
            part = times(float32(tensor), weight if isinstance(weight, float | int) else 1.0)
            found = part if found is None else found + part
    return found


def _update(layer: Layer) -> Array | Spec:
    """Return ΔW, or for a layout its Spec."""
    if any(isinstance(tensor, Spec) for tensor in layer.tensors().values()):
        return Spec(layer.shape, "F32")
    return layer.delta()
