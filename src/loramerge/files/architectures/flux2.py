"""FLUX.2's names in Black Forest Labs' code: q, k, v are fused in the double blocks only.

Source: https://github.com/black-forest-labs/flux2, src/flux2/model.py
"""

from .flux import ATTENTION, DOUBLE, ENDS, SINGLE
from .names import Rule, by

EMBED = "time_guidance_embed."

RULES: tuple[Rule, ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", EMBED + "timestep_embedder.linear_1"),
    ("time_in.out_layer", EMBED + "timestep_embedder.linear_2"),
    ("guidance_in.in_layer", EMBED + "guidance_embedder.linear_1"),
    ("guidance_in.out_layer", EMBED + "guidance_embedder.linear_2"),
    ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    *ATTENTION,
    ("double_blocks.{i}.img_mlp.0", DOUBLE + "ff.linear_in"),
    ("double_blocks.{i}.img_mlp.2", DOUBLE + "ff.linear_out"),
    ("double_blocks.{i}.txt_mlp.0", DOUBLE + "ff_context.linear_in"),
    ("double_blocks.{i}.txt_mlp.2", DOUBLE + "ff_context.linear_out"),
    ("single_blocks.{i}.linear1", SINGLE + "attn.to_qkv_mlp_proj"),
    ("single_blocks.{i}.linear2", SINGLE + "attn.to_out"),
    *ENDS,
)

native = by(*RULES)
