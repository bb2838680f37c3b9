"""The names that ComfyUI reads."""

from . import Names


def model_lora_keys_unet(model: str, names: dict[str, str]) -> Names:
    found = Names()
    found.begins = (model,)
    return found


def model_lora_keys_clip(model: str, names: Names) -> Names:
    found = Names()
    found.begins = (*names.begins, model)
    return found
