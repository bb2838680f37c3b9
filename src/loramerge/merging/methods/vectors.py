"""Updates without a rank: biases, norms, tables.

Every method treats them alike, by their weighted sum: what methods choose between (directions,
entries of a matrix) they don't have.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...layers import BiasOnly, Full, Layer
from ...tensors import Array, Spec, float32


def vectors(layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """Σ wᵢ ΔWᵢ of layers that have no rank, in the form of the first; of layouts, the sum's layout."""
    bias = total([layer.delta_bias() for layer in layers], weights)
    held = [(layer, weight) for layer, weight in zip(layers, weights, strict=True) if not layer.bias_only]
    if not held:
        return BiasOnly(diff_b=bias)
    first = held[0][0]
    update = total([_update(layer) for layer, _ in held], [weight for _, weight in held])
    return first.remade(update, bias) or Full(diff=update, diff_b=bias)


def plus_biases(merged: Layer, layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """A merged layer with the biases of others that change nothing but those."""
    more = [merged.delta_bias(), *(layer.delta_bias() for layer in layers)]
    return replace(merged, diff_b=total(more, [1.0, *weights])) if layers else merged


def total(tensors: Sequence[Array | Spec | None], weights: Sequence[Any]) -> Any:
    """The weighted sum of those that are there, float32; None where none is."""
    found: Any = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if isinstance(tensor, Spec):
            found = Spec(tuple(tensor.shape), "F32")
        elif tensor is not None:
            part = float32(tensor) * (weight if isinstance(weight, float | int) else 1.0)
            found = part if found is None else found + part
    return found


def _update(layer: Layer) -> Array | Spec:
    """ΔW, or of a layout its shape."""
    if any(isinstance(tensor, Spec) for tensor in layer.tensors().values()):
        return Spec(layer.shape, "F32")
    return layer.delta()
