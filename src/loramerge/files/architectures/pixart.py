"""PixArt's names in its own code, which fuses q, k, v, and k, v of the cross-attention.

Source: https://github.com/PixArt-alpha/PixArt-sigma, diffusion/model/nets
"""

from .names import Rule, by

BLOCK = "blocks.{i}."
THEIRS = "transformer_blocks.{i}."
TIME = "adaln_single."

RULES: tuple[Rule, ...] = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", TIME + "emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", TIME + "emb.timestep_embedder.linear_2"),
    *(
        (f"{own}.mlp.{layer}", f"{TIME}emb.{theirs}.linear_{n}")
        for own, theirs in (("csize_embedder", "resolution_embedder"), ("ar_embedder", "aspect_ratio_embedder"))
        for layer, n in ((0, 1), (2, 2))
    ),
    ("t_block.1", TIME + "linear"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    (BLOCK + "attn.qkv", THEIRS + "attn1.to_q", THEIRS + "attn1.to_k", THEIRS + "attn1.to_v"),
    (BLOCK + "attn.proj", THEIRS + "attn1.to_out.0"),
    (BLOCK + "cross_attn.q_linear", THEIRS + "attn2.to_q"),
    (BLOCK + "cross_attn.kv_linear", THEIRS + "attn2.to_k", THEIRS + "attn2.to_v"),
    (BLOCK + "cross_attn.proj", THEIRS + "attn2.to_out.0"),
    (BLOCK + "mlp.fc1", THEIRS + "ff.net.0.proj"),
    (BLOCK + "mlp.fc2", THEIRS + "ff.net.2"),
    (BLOCK + "scale_shift_table", THEIRS + "scale_shift_table"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
)

native = by(*RULES)
