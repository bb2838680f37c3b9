"""Where a file keeps its scales, in order of precedence.

A tensor of the module's own (``.alpha``, or ``.scale`` as it is), then diffusers'
``lora_adapter_metadata``, then PEFT's ``adapter_config.json``, else alpha = rank.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import FileError, LayerError, NumberError
from ..tensors import Tensor, scalar

Config = Mapping[str, Any]


def stored(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> float | None:
    """The alpha that a layer's own tensors give; ``.scale`` is alpha / rank.

    Args:
        keys: The layer's keys by role.
        tensors: The file's tensors.
    """
    if "alpha" in keys:
        return _one(tensors, keys["alpha"])
    return _one(tensors, keys["scale"]) * rank(keys, tensors) if "scale" in keys else None


def rank(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    """The rank that alpha is divided by: of LoHa's and LoKr's own factors, not of their product."""
    for role in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
        if role in keys:
            return int(tensors[keys[role]].shape[0])
    return 1


def _one(tensors: Mapping[str, Tensor], key: str) -> float:
    tensor = tensors[key]
    if math.prod(tensor.shape) != 1:
        raise LayerError(f"{key} has shape {tensor.shape}, wanted one number")
    value = scalar(tensor)
    if not math.isfinite(value):
        raise NumberError(f"{key} is {value}")
    return value


def configs(metadata: Mapping[str, str], adapter_config: Mapping[str, Config]) -> dict[str, Config]:
    """LoRA configurations by component; ``""`` is the one that names none."""
    found = dict(adapter_config)
    text = metadata.get("lora_adapter_metadata")
    if text:
        try:
            flat = json.loads(text)
        except ValueError as error:
            raise FileError(f"lora_adapter_metadata in the file's header is not JSON: {error}") from error
        if not isinstance(flat, dict):
            raise FileError("lora_adapter_metadata in the file's header is not a JSON object")
        for key, value in flat.items():
            component, dot, option = key.partition(".")
            if not dot or component not in COMPONENTS:
                component, option = "", key
            found[component] = {**found.get(component, {}), option: value}
    return found


COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def alpha(config: Config, path: str, rank: int) -> float | None:
    """Effective alpha of a module: what alpha / rank must be for the configuration's scale."""
    value = _pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NumberError(f"the configuration's alpha of {path} is {value!r}, wanted a finite number")
    return float(value) * math.sqrt(rank) if config.get("use_rslora") else float(value)


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the path, or the end of it after a dot."""
    if not isinstance(patterns, Mapping):
        raise FileError(f"alpha_pattern in the configuration is {patterns!r}, wanted an object")
    if path in patterns:
        return patterns[path]
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise FileError(f"alpha_pattern {pattern!r} is no regular expression: {error}") from None
    return default
