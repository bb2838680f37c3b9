"""Where a file keeps its scales, in order of precedence.

A tensor of the module's own (``.alpha``, or ``.scale`` as it is), then diffusers'
``lora_adapter_metadata``, then PEFT's ``adapter_config.json``, else alpha = rank.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..architectures.names import COMPONENTS
from ..errors import FileError, LayerError, NumberError
from ..tensors import LARGEST, Tensor, scalar
from .patterns import Patterns

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
    if not abs(value) <= LARGEST["F32"]:  # which NaN is not, either
        raise NumberError(f"{key} is {value}")
    return value


def configs(metadata: Mapping[str, str], adapter_config: Mapping[str, Config]) -> dict[str, Config]:
    """LoRA configurations by component, ``alpha_pattern`` as `Patterns`; ``""`` is the one that names none."""
    found = dict(adapter_config)
    text = metadata.get("lora_adapter_metadata")
    if text:
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileError(f"lora_adapter_metadata in the file's header is not JSON: {error}") from error
        if not isinstance(flat, dict):
            raise FileError("lora_adapter_metadata in the file's header is not a JSON object")
        for key, value in flat.items():
            component, dot, option = key.partition(".")
            if not dot or component not in COMPONENTS:
                component, option = "", key
            found[component] = {**found.get(component, {}), option: value}
    for config in found.values():
        if str(config.get("peft_type") or "LORA").upper() != "LORA":
            raise FileError(
                f"lora_adapter_metadata in the file's header is of PEFT's {config['peft_type']}, whose scales are others "
                "than a LoRA's. Way out: save it as a LoRA by the tool that made it"
            )
    return {
        component: {**config, "alpha_pattern": Patterns(config.get("alpha_pattern") or {})}
        for component, config in found.items()
    }


def alpha(config: Config, path: str, rank: int) -> float | None:
    """Effective alpha of a module: what alpha / rank must be for the scale of one of the `configs`."""
    value = config["alpha_pattern"].of(path, config.get("lora_alpha"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST["F32"]:
        raise NumberError(f"the configuration's alpha of {path} is {value!r}, wanted a finite number")
    return float(value) * math.sqrt(rank) if config.get("use_rslora") else float(value)
