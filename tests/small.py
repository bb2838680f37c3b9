"""Small LoRAs over a few real modules of each family."""

from typing import Any

from loramerge.files.dialects import DIALECTS
from loramerge.files.lora import LoRA
from loramerge.testing import random_lora

MODULES = {
    "sdxl": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.1.resnets.0.conv_shortcut",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ),
    "sd15": (
        "unet.down_blocks.0.attentions.0.proj_in",
        "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_k",
        "text_encoder.text_model.encoder.layers.3.mlp.fc1",
    ),
    "flux": (
        "transformer.x_embedder",
        "transformer.time_text_embed.timestep_embedder.linear_1",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ),
}
WRITTEN = [name for name, dialect in DIALECTS.items() if dialect.writes]


def small(architecture: str = "sdxl", modules: tuple[str, ...] = (), **options: Any) -> LoRA:
    """A random LoRA of a family over a few modules."""
    chosen = modules or MODULES[architecture]
    return random_lora(architecture, only=lambda module, shape: module in chosen, **options)
