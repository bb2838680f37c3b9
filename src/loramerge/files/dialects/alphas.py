"""The scales of a file, from the places that may hold them.

In order of precedence: a tensor of the module's own (``.alpha``, or ``.scale`` as it is), then diffusers'
``lora_adapter_metadata`` or PEFT's ``adapter_config.json``, else alpha = rank.
"""

import math
from collections.abc import Mapping
from typing import Any

from ...errors import LayerError, NumberError
from ...layers import ranked_by
from ...tensors import LARGEST, Tensor, scalar
from ..storage.texts import parsed
from .fields import WHOLE, Config, checked

UNSCALED = {"alpha", "scale", "diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight"}
"""Roles of tensors that no alpha scales, and of those beside them."""


def stored(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> float | None:
    """Return the alpha that a layer's own tensors give; ``.scale`` is alpha / rank.

    Args:
        keys: The layer's keys by role.
        tensors: The file's tensors.

    Raises:
        LayerError: It isn't one number, or is a scale of a layer that has none.
        NumberError: It isn't finite.
    """
    unscaled = keys.keys() >= WHOLE or keys.keys() <= UNSCALED
    if "alpha" in keys:
        return _unused(tensors[keys["alpha"]]) if unscaled else _one(tensors, keys["alpha"])
    scale = _one(tensors, keys["scale"]) if "scale" in keys else None
    if unscaled and scale not in (None, 1):
        raise LayerError(
            f"{keys['scale']} is {scale:g}, beside whole tensors, which A1111 scales and others don't. Way out: multiply "
            "it into the tensors where the file was made, and leave it out"
        )
    return None if scale is None else scale * rank(keys, tensors)


def rank(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    """Return the rank that alpha is divided by: of LoHa's and LoKr's own factors, not of their product."""
    return next((int(tensors[keys[role]].shape[0]) for role in ranked_by() if role in keys), 1)


def _one(tensors: Mapping[str, Tensor], key: str) -> float:
    tensor = tensors[key]
    if math.prod(tensor.shape) != 1:
        raise LayerError(f"{key} has shape {tensor.shape}, wanted one number")
    value = scalar(tensor)
    if not abs(value) <= LARGEST["F32"]:  # True for NaN too
        raise NumberError(f"{key} is {value}")
    return value


def _unused(tensor: Tensor) -> float:
    """Return an alpha that scales nothing; tools write 10¹⁰ for it, which is infinite in float16 and read as 1."""
    value = scalar(tensor) if math.prod(tensor.shape) == 1 else 1.0
    return value if math.isfinite(value) else 1.0


def configs(metadata: Mapping[str, str], adapter_config: Mapping[str, Config]) -> dict[str, Config]:
    """Return checked LoRA configurations by component, ``""`` for any; `adapter_config` has precedence."""
    text = metadata.get("lora_adapter_metadata")
    found = dict(adapter_config) if adapter_config or not text else _in_header(text)
    return {component: checked(config) for component, config in found.items()}


def _in_header(text: str) -> dict[str, Config]:
    """Parse diffusers' configurations: one flat object whose keys begin with the component, whether we know it or not."""
    flat = parsed(text, "lora_adapter_metadata in the file's header")
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, dot, option = key.partition(".")
        found.setdefault(component if dot else "", {})[option if dot else key] = value
    return dict(found)
