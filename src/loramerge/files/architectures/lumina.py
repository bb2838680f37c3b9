"""Lumina 2 and Z-Image in their own code, which fuses q, k, v.

Sources: https://github.com/Alpha-VLLM/Lumina-Image-2.0, models/model.py; ComfyUI, comfy/ldm/lumina/model.py
"""

from .names import Rule, by

BLOCKS = ("layers.{i}.", "noise_refiner.{i}.", "context_refiner.{i}.")

TIME = "time_caption_embed."

LUMINA2: tuple[Rule, ...] = (
    ("t_embedder.mlp.0", TIME + "timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", TIME + "timestep_embedder.linear_2"),
    ("cap_embedder.0", TIME + "caption_embedder.0"),
    ("cap_embedder.1", TIME + "caption_embedder.1"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    ("final_layer.linear", "norm_out.linear_2"),
    *(
        rule
        for block in BLOCKS
        for rule in (
            (block + "attention.qkv", block + "attn.to_q", block + "attn.to_k", block + "attn.to_v"),
            (block + "attention.out", block + "attn.to_out.0"),
            (block + "attention.q_norm", block + "attn.norm_q"),
            (block + "attention.k_norm", block + "attn.norm_k"),
            *((f"{block}feed_forward.w{n}", f"{block}feed_forward.linear_{n}") for n in (1, 2, 3)),
            (block + "adaLN_modulation.1", block + "norm1.linear"),
            (block + "attention_norm1", block + "norm1.norm"),
            (block + "attention_norm1", block + "norm1"),
            (block + "attention_norm2", block + "norm2"),
        )
    ),
)

Z_IMAGE: tuple[Rule, ...] = (
    *(
        (block + "attention.qkv", block + "attention.to_q", block + "attention.to_k", block + "attention.to_v")
        for block in BLOCKS
    ),
    *((block + "attention.out", block + "attention.to_out.0") for block in BLOCKS),
    *((f"{block}attention.{letter}_norm", f"{block}attention.norm_{letter}") for block in BLOCKS for letter in "qk"),
    ("x_embedder", "all_x_embedder.2-1"),
    ("final_layer.linear", "all_final_layer.2-1.linear"),
    ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
)
"""Names of Z-Image in ComfyUI and diffusion-pipe; its other trainers use diffusers'."""

lumina2 = by(*LUMINA2)
z_image = by(*Z_IMAGE)
