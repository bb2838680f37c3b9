"""Layers whose ΔW is dense: whole differences, and DoRA layers on the weight that they change."""

import math

from .checkpoints import Checkpoint
from .errors import MergeError
from .layers import Full, Layer
from .tensors import Array, float32, namespace


def on_base(layer: Layer, module: str, base: Checkpoint) -> Full:
    """The whole ΔW of a layer that depends on the base's weight.

    Args:
        layer: The layer.
        module: Its name.
        base: The base model, which has the module.

    Raises:
        MergeError: The base's weight has another shape.
    """
    weight = float32(base.weight(module))
    if math.prod(weight.shape) != math.prod(layer.shape) or weight.shape[0] != layer.shape[0]:
        raise MergeError(
            f"the {layer.kind} layer has the shape {tuple(layer.shape)}, the weight in the base {base.name} "
            f"{tuple(weight.shape)}: they are of different models."
        )
    like: Array = next(iter(layer.tensors().values()))
    weight = namespace(like).asarray(weight.reshape(layer.shape), device=like.device, copy=True)
    return Full(diff=layer.delta_on(weight), diff_b=layer.delta_bias())
