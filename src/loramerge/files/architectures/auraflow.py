"""AuraFlow, and Pony V7, in the model's own code.

Source: https://github.com/cloneofsimo/minRF; ComfyUI, comfy/ldm/aura/mmdit.py
"""

from .names import SWAP, Rule, by

DOUBLE = (
    ("attn.w2q", "attn.to_q"),
    ("attn.w2k", "attn.to_k"),
    ("attn.w2v", "attn.to_v"),
    ("attn.w2o", "attn.to_out.0"),
    ("attn.w1q", "attn.add_q_proj"),
    ("attn.w1k", "attn.add_k_proj"),
    ("attn.w1v", "attn.add_v_proj"),
    ("attn.w1o", "attn.to_add_out"),
    ("mlpX.c_fc1", "ff.linear_1"),
    ("mlpX.c_fc2", "ff.linear_2"),
    ("mlpX.c_proj", "ff.out_projection"),
    ("mlpC.c_fc1", "ff_context.linear_1"),
    ("mlpC.c_fc2", "ff_context.linear_2"),
    ("mlpC.c_proj", "ff_context.out_projection"),
    ("modX.1", "norm1.linear"),
    ("modC.1", "norm1_context.linear"),
)
SINGLE = (
    ("attn.w1q", "attn.to_q"),
    ("attn.w1k", "attn.to_k"),
    ("attn.w1v", "attn.to_v"),
    ("attn.w1o", "attn.to_out.0"),
    ("modCX.1", "norm1.linear"),
    ("mlp.c_fc1", "ff.linear_1"),
    ("mlp.c_fc2", "ff.linear_2"),
    ("mlp.c_proj", "ff.out_projection"),
)

RULES: tuple[Rule, ...] = (
    *(("double_layers.{i}." + own, "joint_transformer_blocks.{i}." + theirs) for own, theirs in DOUBLE),
    *(("single_layers.{i}." + own, "single_transformer_blocks.{i}." + theirs) for own, theirs in SINGLE),
    ("t_embedder.mlp.0", "time_step_proj.linear_1"),
    ("t_embedder.mlp.2", "time_step_proj.linear_2"),
    ("cond_seq_linear", "context_embedder"),
    ("init_x_linear", "pos_embed.proj"),
    ("positional_encoding", "pos_embed.pos_embed"),
    ("final_linear", "proj_out"),
    ("modF.1", "norm_out.linear", SWAP),
)

native = by(*RULES)
