"""FLUX.3 in Black Forest Labs' code: the blocks' layers have no ``attn`` and no ``ff`` around them.

Source: diffusers, loaders/lora_conversion_utils.py, _convert_non_diffusers_flux3_lora_to_diffusers
"""

from .names import Rule, by, inside

LAYERS = (
    ("q_proj", "attn.to_q"),
    ("k_proj", "attn.to_k"),
    ("v_proj", "attn.to_v"),
    ("attn_out", "attn.to_out.0"),
    ("mlp_in", "ff.linear_in"),
    ("mlp_out", "ff.linear_out"),
)
BLOCKS = (
    *((f"content_mode_blocks.{mode}.{{i}}.", f"mode_blocks.{mode}.{{i}}.") for mode in ("image", "image_cond")),
    ("txt_mode_blocks.{i}.", "txt_mode_blocks.{i}."),
    ("single_blocks.{i}.", "single_transformer_blocks.{i}."),
)

RULES: tuple[Rule, ...] = inside(BLOCKS, LAYERS)

native = by(*RULES)
