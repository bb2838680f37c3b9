"""Krea 2 in Krea's own code.

Source: https://github.com/kohya-ss/musubi-tuner, src/musubi_tuner/krea2; ComfyUI, comfy/ldm/krea2
"""

from .names import Rule, by, inside

INSIDE = (
    ("attn.wq", "attn.to_q"),
    ("attn.wk", "attn.to_k"),
    ("attn.wv", "attn.to_v"),
    ("attn.wo", "attn.to_out.0"),
    ("attn.gate", "attn.to_gate"),
    ("mlp.gate", "ff.gate"),
    ("mlp.up", "ff.up"),
    ("mlp.down", "ff.down"),
)
BLOCKS = (
    ("blocks.{i}.", "transformer_blocks.{i}."),
    ("txtfusion.layerwise_blocks.{i}.", "text_fusion.layerwise_blocks.{i}."),
    ("txtfusion.refiner_blocks.{i}.", "text_fusion.refiner_blocks.{i}."),
)

RULES: tuple[Rule, ...] = (
    ("first", "img_in"),
    ("last.linear", "final_layer.linear"),
    ("tmlp.0", "time_embed.linear_1"),
    ("tmlp.2", "time_embed.linear_2"),
    ("tproj.1", "time_mod_proj"),
    ("txtmlp.1", "txt_in.linear_1"),
    ("txtmlp.3", "txt_in.linear_2"),
    ("txtfusion.projector", "text_fusion.projector"),
    *inside(BLOCKS, INSIDE),
)

native = by(*RULES)
