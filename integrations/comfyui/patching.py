"""Patching a model and its text encoders, without a file."""

import logging
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.sd

from loramerge.errors import MergeError

from .stacks import Stack


def patched(model: Any, clip: Any, stack: Stack, strength_model: float, strength_clip: float) -> tuple[Any, Any, str]:
    """Return the model and the text encoders with the patches of ComfyUI's own loader, and a report.

    Args:
        model: ComfyUI's model.
        clip: Its text encoders, or None.
        stack: LoRAs, which act at their weights.
        strength_model: Factor of all weights in the model.
        strength_clip: Factor of all weights in the text encoders.

    Raises:
        MergeError: ComfyUI has no place for any layer of a LoRA.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    lines = []
    for each in stack:
        read, unread = 0, list[str]()
        for weight, part in each.parts():
            tensors = part.state_dict("comfyui")
            missed = [key for key in tensors if not _is_read(key, names)]
            read, unread = read + len(tensors) - len(missed), unread + missed
            model, clip = comfy.sd.load_lora_for_models(
                model, clip, tensors, weight * strength_model, weight * strength_clip
            )
        if unread and not read:
            raise MergeError(
                f"{each.lora.name} is for {each.lora.architecture or 'an unknown family'}: this model has none of its "
                f"{len(each.lora)} layers. Way out: a model of that family."
            )
        lines.append(f"{each.lora.name}: {read} of {read + len(unread)} tensors act")
        if unread:
            lines[-1] += f"; the model has no place for {', '.join(unread[:4])}{' …' * (len(unread) > 4)}"
            logging.warning("loramerge: %s", lines[-1])
    return model, clip, "\n".join(lines)


def _is_read(key: str, names: Mapping[str, Any]) -> bool:
    """Return whether a tensor's key begins with one of the names that ComfyUI reads, up to a dot."""
    while key and key not in names:
        key = key.rpartition(".")[0]
    return bool(key)
