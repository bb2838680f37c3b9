"""Wan 2.1 and 2.2 in Alibaba's own code.

Source: https://github.com/Wan-Video/Wan2.1, wan/modules/model.py
"""

from .names import Rule, by

BLOCK = "blocks.{i}."
EMBED = "condition_embedder."
ATTENTION = (
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
    ("k_img", "add_k_proj"),
    ("v_img", "add_v_proj"),
    ("norm_k_img", "norm_added_k"),
)

RULES: tuple[Rule, ...] = (
    ("text_embedding.0", EMBED + "text_embedder.linear_1"),
    ("text_embedding.2", EMBED + "text_embedder.linear_2"),
    ("time_embedding.0", EMBED + "time_embedder.linear_1"),
    ("time_embedding.2", EMBED + "time_embedder.linear_2"),
    ("time_projection.1", EMBED + "time_proj"),
    ("img_emb.proj.0", EMBED + "image_embedder.norm1"),
    ("img_emb.proj.1", EMBED + "image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", EMBED + "image_embedder.ff.net.2"),
    ("img_emb.proj.4", EMBED + "image_embedder.norm2"),
    *((f"{BLOCK}self_attn.{own}", f"{BLOCK}attn1.{name}") for own, name in ATTENTION),
    *((f"{BLOCK}cross_attn.{own}", f"{BLOCK}attn2.{name}") for own, name in ATTENTION),
    (BLOCK + "norm3", BLOCK + "norm2"),
    (BLOCK + "ffn.0", BLOCK + "ffn.net.0.proj"),
    (BLOCK + "ffn.2", BLOCK + "ffn.net.2"),
    (BLOCK + "modulation", BLOCK + "scale_shift_table"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)

native = by(*RULES)
