"""ComfyUI's loader: it patches what it is given."""

from typing import Any

from . import Clip, Model


def load_lora_for_models(
    model: Model, clip: Clip | None, tensors: dict[str, Any], strength_model: float, strength_clip: float
) -> tuple[Model, Model | None]:
    return model.patched(tensors, strength_model), clip and clip.patched(tensors, strength_clip)
