"""Mochi's attention in Genmo's code; its feed-forward halves stand the other way round there, and nobody trains them.

Source: https://github.com/genmoai/mochi, src/genmo/mochi_preview/dit/joint_model/asymm_models_joint.py
"""

from .names import Rule, by

BLOCK = "blocks.{i}.attn."
THEIRS = "transformer_blocks.{i}.attn1."

RULES: tuple[Rule, ...] = (
    (BLOCK + "qkv_x", THEIRS + "to_q", THEIRS + "to_k", THEIRS + "to_v"),
    (BLOCK + "qkv_y", THEIRS + "add_q_proj", THEIRS + "add_k_proj", THEIRS + "add_v_proj"),
    (BLOCK + "proj_x", THEIRS + "to_out.0"),
    (BLOCK + "proj_y", THEIRS + "to_add_out"),
)

native = by(*RULES)
