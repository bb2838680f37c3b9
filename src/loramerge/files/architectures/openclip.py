"""A CLIP text encoder's names in open_clip, which fuses q, k, v; single files of SD 2 and SDXL have them."""

from collections.abc import Mapping

from ...tensors import Shape
from .names import Parts, Rule, apply

MODELS = ("clip-g", "clip-h")
"""The models that come from open_clip."""

LAYER = "text_model.encoder.layers.{i}."
BLOCK = "transformer.resblocks.{i}."

RULES: tuple[Rule, ...] = (
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding"),
    ("ln_final", "text_model.final_layer_norm"),
    (BLOCK + "ln_1", LAYER + "layer_norm1"),
    (BLOCK + "ln_2", LAYER + "layer_norm2"),
    (BLOCK + "attn.in_proj", LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj", LAYER + "self_attn.v_proj"),
    (BLOCK + "attn.out_proj", LAYER + "self_attn.out_proj"),
    (BLOCK + "mlp.c_fc", LAYER + "mlp.fc1"),
    (BLOCK + "mlp.c_proj", LAYER + "mlp.fc2"),
)

TRANSPOSED = "text_projection"
"""The weight that open_clip multiplies from the right, and so stores as (in, out)."""


def native(modules: Mapping[str, Shape], component: str) -> dict[str, Parts]:
    """Name each weight of a text encoder as open_clip does."""
    return apply(RULES, modules, component)
