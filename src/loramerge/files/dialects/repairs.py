"""Known mistakes in names, and the names that were meant."""

import re
from functools import lru_cache

REPAIRS = (
    (r"(?:module\.|_orig_mod\.)+", "", "a wrapper's 'module.' or '_orig_mod.' in front"),
    (r"unet\.unet\.", "unet.", "'unet.' twice (diffusers 0.2x, ZipLoRA)"),
    (r"pipe\.(?=unet\.|transformer\.)", "", "'pipe.' in front"),
    (
        r"(unet|transformer|text_encoder(?:_\d)?)\.base_model\.model\.",
        r"\1.",
        "PEFT's wrapper inside (SimpleTuner)",
    ),
    (r"base_model\.model\.(unet|transformer|text_encoder(?:_\d)?)\.", r"\1.", "PEFT's wrapper in front"),
    (r"((?:unet|transformer|text_encoder(?:_\d)?)\.)_orig_mod\.", r"\1", "torch.compile's wrapper inside"),
    (r"model\.diffusion_model\.", "diffusion_model.", "a checkpoint's 'model.' in front"),
    (
        r"transformer\.(?=(?:double|single)_blocks\.\d+\.)",
        "diffusion_model.",
        "FLUX's own names behind diffusers' prefix",
    ),
    (r"lora_unet_unet_", "lora_unet_", "'unet' twice"),
    (r"lora_unet__", "lora_unet_", "two underscores"),
    (
        r"((?:diffusion_model\.)?)net\.(?=blocks\.|llm_adapter\.|[xt]_embedder\.|final_layer\.)",
        r"\1",
        "NVIDIA's 'net.' in front",
    ),
    (r"Hunyuan_video_I2V_lora_", "lora_unet_", "HunyuanVideo-I2V's prefix"),
    (
        r"diffusion_model\.(?=(?:double|single)_blocks\.\d+\.processor\.)",
        "",
        "XLabs' names behind ComfyUI's prefix",
    ),
    (r"(?:diffusion_model\.){2}", "diffusion_model.", "'diffusion_model.' twice"),
    (
        r"((?:text_encoder(?:_\d)?[./])?(?:base_model\.model\.)?)(?=encoder\.layers\.)",
        r"\1text_model.",
        "transformers 5's CLIP without 'text_model.'",
    ),
    (r"(lora_te\d?_)(?=encoder_layers_)", r"\1text_model_", "transformers 5's CLIP without 'text_model.'"),
    (r"(text_encoders\.clip_\w\.transformer\.)(?=encoder\.)", r"\1text_model.", "CLIP without 'text_model.'"),
)
"""A pattern at the beginning of a name, what is meant, and what is wrong."""

ANY = re.compile("|".join(pattern for pattern, *_ in REPAIRS))
"""Matches names with a known mistake."""


@lru_cache(maxsize=1 << 14)
def repaired(stem: str) -> tuple[str, str] | None:
    """Return the stem that was meant and what was wrong, or None for a stem without a known mistake."""
    if not ANY.match(stem):
        return None
    reasons = []
    for pattern, meant, why in REPAIRS:
        stem, found = re.subn(pattern, meant, stem, count=1) if re.match(pattern, stem) else (stem, 0)
        if found:
            reasons.append(why)
    return (stem, "; ".join(reasons)) if reasons else None
