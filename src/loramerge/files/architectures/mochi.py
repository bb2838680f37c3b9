"""Mochi in Genmo's own code, where the halves of the feed-forward and of the last modulation are exchanged.

Source: https://github.com/genmoai/mochi, src/genmo/mochi_preview/dit/joint_model/asymm_models_joint.py
"""

from .names import SWAP, Rule, by

BLOCK = "blocks.{i}."
THEIRS = "transformer_blocks.{i}."
ATTENTION = THEIRS + "attn1."

RULES: tuple[Rule, ...] = (
    ("x_embedder.proj", "patch_embed.proj"),
    ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    *((f"t5_y_embedder.{layer}", f"time_embed.pooler.{layer}") for layer in ("to_kv", "to_q", "to_out")),
    ("t5_yproj", "time_embed.caption_proj"),
    (BLOCK + "mod_x", THEIRS + "norm1.linear"),
    (BLOCK + "mod_y", THEIRS + "norm1_context.linear"),
    (BLOCK + "mod_y", THEIRS + "norm1_context.linear_1"),
    (BLOCK + "attn.qkv_x", ATTENTION + "to_q", ATTENTION + "to_k", ATTENTION + "to_v"),
    (BLOCK + "attn.qkv_y", ATTENTION + "add_q_proj", ATTENTION + "add_k_proj", ATTENTION + "add_v_proj"),
    (BLOCK + "attn.proj_x", ATTENTION + "to_out.0"),
    (BLOCK + "attn.proj_y", ATTENTION + "to_add_out"),
    *(
        (f"{BLOCK}attn.{letter}_norm_{own}", f"{ATTENTION}norm_{theirs}{letter}")
        for own, theirs in (("x", ""), ("y", "added_"))
        for letter in "qk"
    ),
    *(
        rule
        for own, theirs in (("x", "ff"), ("y", "ff_context"))
        for rule in (
            (f"{BLOCK}mlp_{own}.w1", f"{THEIRS}{theirs}.net.0.proj", SWAP),
            (f"{BLOCK}mlp_{own}.w2", f"{THEIRS}{theirs}.net.2"),
        )
    ),
    ("final_layer.mod", "norm_out.linear", SWAP),
    ("final_layer.linear", "proj_out"),
)

native = by(*RULES)
