"""LoRA configurations as PEFT and diffusers write them: a file or a header entry."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

from ...layers import Layer

CLASSES = {
    "unet": ("UNet2DConditionModel", "diffusers.models.unets.unet_2d_condition"),
    "text_encoder": ("CLIPTextModel", "transformers.models.clip.modeling_clip"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "transformers.models.clip.modeling_clip"),
}


def component_configs(layers: Mapping[str, Layer], about: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Make a PEFT ``LoraConfig`` as a dictionary for each component of a LoRA, scales baked in.

    Args:
        layers: The layers as written (LoRA or DoRA with alpha = rank), by module.
        about: Fields about the base model, by component, see `LoRA.about`.
    """
    by_component: dict[str, dict[str, Layer]] = {}
    for module, layer in layers.items():
        component, _, path = module.partition(".")
        # transformers 5 has no ``text_model`` in one of its CLIPs; PEFT accepts the end of a name in both.
        path = path.removeprefix("text_model.") if component.startswith("text_encoder") else path
        by_component.setdefault(component, {})[path] = layer
    return {
        component: {**_config(component, paths), **(about.get(component) or about.get("", {}))}
        for component, paths in by_component.items()
    }


def _config(component: str, layers: Mapping[str, Layer]) -> dict[str, Any]:
    ranks = {path: layer.rank for path, layer in layers.items()}
    commonest = Counter(ranks.values()).most_common(1)[0][0]
    ends = {path[at + 1 :] for path in ranks for at, letter in enumerate(path) if letter == "."}
    pattern = {_anchored(path, ends): rank for path, rank in ranks.items() if rank != commonest}
    name, library = CLASSES.get(component, (None, None))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": name, "parent_library": library} if name else None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": commonest,
        "lora_alpha": commonest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": _targets(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(layer.axis is not None for layer in layers.values()),
        "lora_bias": any(layer.delta_bias() is not None for layer in layers.values()),
    }


def _anchored(path: str, ends: Set[str]) -> str:
    """Make a pattern for one module: PEFT also accepts the end of a name after a dot, so a short name is anchored."""
    return f"^{re.escape(path)}" if "." not in path or path in ends else path


def _targets(paths: Mapping[str, Any]) -> list[str] | str:
    """List the trained modules; a regular expression if a path is a single name, which PEFT would find elsewhere too."""
    if any("." not in path for path in paths):
        names = "|".join(re.escape(path) for path in sorted(paths))
        return rf"(?:text_model\.)?(?:{names})"
    return sorted(paths)


def adapter_metadata(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Make diffusers' ``lora_adapter_metadata``: the configurations with the component in front of each key."""
    fields = {
        f"{component}.{key}": value
        for component, config in configs.items()
        for key, value in config.items()
        if key not in ("auto_mapping", "peft_type")
    }
    return json.dumps(fields, indent=2, sort_keys=True)
