"""Differences between two LoRAs' updates, whatever their files look like."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .. import linalg
from ..errors import NoFactorsError, computing
from ..files.architectures import name_family
from ..files.lora import LoRA, checked
from ..layers import DoRA, Layer
from ..layers.base import dense_norm, in_one_library
from ..tensors import Array, float32, largest_rank, same_weight


@dataclass(frozen=True)
class Difference:
    """The distance between a module's ΔW in one LoRA and in another."""

    module: str
    norm: float
    """‖ΔW‖ of the first LoRA, including its bias; 0 if it lacks the module."""
    distance: float
    """‖ΔW − ΔW'‖; infinite if shapes differ or the layers can't be compared."""

    @property
    def relative(self) -> float:
        """The distance in units of the norm."""
        if not self.distance:
            return 0.0
        known = 0 < self.norm < math.inf and not math.isnan(self.distance)
        return self.distance / self.norm if known else math.inf


def differences(first: LoRA, second: LoRA) -> Iterator[Difference]:
    """Yield the difference of every module that either LoRA has, in order."""
    for module in dict.fromkeys((*first, *second)):
        with computing(module):
            layers = (checked(lora, module) if module in lora else None for lora in (first, second))
            found = Difference(module, *_compared(*layers))
        yield found


def apart(first: LoRA, second: LoRA) -> str:
    """Say why two LoRAs have nothing to compare: no module of one name and shape; empty if they have one."""
    if any(
        module in first and same_weight(first.layout(module).shape, x.shape) for module, x in second.layouts.items()
    ):
        return ""
    if first.architecture is None or second.architecture is None:
        return f"no module in common ({first.dialect}, {second.dialect}). If they are of one family, {name_family()}"
    families = f"for different models ({first.architecture}, {second.architecture}): "
    return f"{families if first.architecture != second.architecture else ''}no module in common"


def _compared(first: Layer | None, second: Layer | None) -> tuple[float, float]:
    if first is None or second is None:
        size = sum(_norm(layer) for layer in (first, second) if layer is not None)
        return size if second is None else 0.0, size
    first, second = in_one_library([first, second])
    (norm, distance), (bias_norm, bias_distance) = _compared_updates(first, second), _compared_biases(first, second)
    return math.hypot(norm, bias_norm), math.hypot(distance, bias_distance)


def _compared_biases(first: Layer, second: Layer) -> tuple[float, float]:
    a, b = _bias(first), _bias(second)
    if a is None or b is None:
        present = [dense_norm(x) for x in (a, b) if x is not None]
        return (0.0 if a is None else present[0]), sum(present)
    return dense_norm(a), dense_norm(a - b)


def _bias(layer: Layer) -> Array | None:
    """Return the layer's update of the module's bias, in float32."""
    bias: Array | None = layer.delta_bias()
    return None if bias is None else float32(bias)


def _compared_updates(first: Layer, second: Layer) -> tuple[float, float]:
    if first.bias_only or second.bias_only:
        sizes = [0.0 if layer.bias_only else _norm(layer) for layer in (first, second)]
        return sizes[0], sum(sizes)
    if not same_weight(first.shape, second.shape):
        return _norm(first), math.inf
    if isinstance(first, DoRA) and isinstance(second, DoRA):
        return _compared_doras(first, second)
    if first.factored and second.factored and _thin(first, second):
        up, down = first.factors()
        return linalg.norm(up, down), linalg.distance((up, down), second.factors())
    try:
        delta = first.delta()
        return dense_norm(delta), dense_norm(delta - second.delta().reshape(delta.shape))
    except NoFactorsError:
        return math.inf, 0.0 if _same_tensors(first, second) else math.inf


def _thin(first: Layer, second: Layer) -> bool:
    """Return whether two layers' factors are smaller than ΔW, or the layers plain LoRAs."""
    wide = (first.rank or 0) + (second.rank or 0) > largest_rank(first.shape)
    return not wide or {first.kind, second.kind} == {"lora"}


def _compared_doras(first: DoRA, second: DoRA) -> tuple[float, float]:
    """Compare the directions as LoRAs; the distance is infinite if the magnitudes differ."""
    a, b = float32(first.magnitude).reshape(-1), float32(second.magnitude).reshape(-1)
    same = first.axis == second.axis and bool((a == b).all())
    norm, distance = _compared_updates(first.direction, second.direction)
    return norm, distance if same else math.inf


def _norm(layer: Layer) -> float:
    try:
        return layer.norm()
    except NoFactorsError:
        return math.inf


def _same_tensors(first: Layer, second: Layer) -> bool:
    a, b = first.tensors(), second.tensors()
    alike = (first.kind, first.own_alpha) == (second.kind, second.own_alpha)
    return (
        alike
        and a.keys() == b.keys()
        and all(
            math.prod(a[role].shape) == math.prod(b[role].shape)
            and bool((float32(a[role]).reshape(-1) == float32(b[role]).reshape(-1)).all())
            for role in a
        )
    )
