"""Cosmos-Predict2, and Anima, which is based on it, in NVIDIA's code.

Source: https://github.com/nvidia-cosmos/cosmos-predict2, cosmos_predict2/models/text2image_dit.py
"""

from .names import Rule, by

BLOCK = "blocks.{i}."
THEIRS = "transformer_blocks.{i}."
ATTENTION = (
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("output_proj", "to_out.0"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)

RULES: tuple[Rule, ...] = (
    ("x_embedder.proj.1", "patch_embed.proj"),
    ("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
    ("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
    ("t_embedding_norm", "time_embed.norm"),
    *(
        (f"{BLOCK}adaln_modulation_{own}.{n}", f"{THEIRS}{norm}.linear_{n}")
        for own, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
        for n in (1, 2)
    ),
    *((f"{BLOCK}self_attn.{own}", f"{THEIRS}attn1.{name}") for own, name in ATTENTION),
    *((f"{BLOCK}cross_attn.{own}", f"{THEIRS}attn2.{name}") for own, name in ATTENTION),
    (BLOCK + "mlp.layer1", THEIRS + "ff.net.0.proj"),
    (BLOCK + "mlp.layer2", THEIRS + "ff.net.2"),
    ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
    ("final_layer.linear", "proj_out"),
)

native = by(*RULES)
