"""FLUX.2's names in Black Forest Labs' code: q, k, v are fused in the double blocks only.

Source: https://github.com/black-forest-labs/flux2, src/flux2/model.py
"""

from .names import SWAP, Rule, by

DOUBLE = "transformer_blocks.{i}."
SINGLE = "single_transformer_blocks.{i}."
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
    ("double_blocks.{i}.img_attn.qkv", DOUBLE + "attn.to_q", DOUBLE + "attn.to_k", DOUBLE + "attn.to_v"),
    (
        "double_blocks.{i}.txt_attn.qkv",
        DOUBLE + "attn.add_q_proj",
        DOUBLE + "attn.add_k_proj",
        DOUBLE + "attn.add_v_proj",
    ),
    ("double_blocks.{i}.img_attn.proj", DOUBLE + "attn.to_out.0"),
    ("double_blocks.{i}.txt_attn.proj", DOUBLE + "attn.to_add_out"),
    ("double_blocks.{i}.img_attn.norm.query_norm", DOUBLE + "attn.norm_q"),
    ("double_blocks.{i}.img_attn.norm.key_norm", DOUBLE + "attn.norm_k"),
    ("double_blocks.{i}.txt_attn.norm.query_norm", DOUBLE + "attn.norm_added_q"),
    ("double_blocks.{i}.txt_attn.norm.key_norm", DOUBLE + "attn.norm_added_k"),
    ("double_blocks.{i}.img_mlp.0", DOUBLE + "ff.linear_in"),
    ("double_blocks.{i}.img_mlp.2", DOUBLE + "ff.linear_out"),
    ("double_blocks.{i}.txt_mlp.0", DOUBLE + "ff_context.linear_in"),
    ("double_blocks.{i}.txt_mlp.2", DOUBLE + "ff_context.linear_out"),
    ("single_blocks.{i}.linear1", SINGLE + "attn.to_qkv_mlp_proj"),
    ("single_blocks.{i}.linear2", SINGLE + "attn.to_out"),
    ("single_blocks.{i}.norm.query_norm", SINGLE + "attn.norm_q"),
    ("single_blocks.{i}.norm.key_norm", SINGLE + "attn.norm_k"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", SWAP),
)

native = by(*RULES)
