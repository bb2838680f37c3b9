"""Stable Diffusion 3's names in stability's code, which fuses q, k, v."""

from collections.abc import Mapping

from ...tensors import Shape
from .names import SWAP, Parts, Rule, apply

BLOCK = "transformer_blocks.{i}."
EMBED = "time_text_embed."
IMAGE = "joint_blocks.{i}.x_block."
TEXT = "joint_blocks.{i}.context_block."

RULES: tuple[Rule, ...] = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", EMBED + "timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", EMBED + "timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", EMBED + "text_embedder.linear_1"),
    ("y_embedder.mlp.2", EMBED + "text_embedder.linear_2"),
    (IMAGE + "adaLN_modulation.1", BLOCK + "norm1.linear"),
    (IMAGE + "attn.qkv", BLOCK + "attn.to_q", BLOCK + "attn.to_k", BLOCK + "attn.to_v"),
    (IMAGE + "attn.proj", BLOCK + "attn.to_out.0"),
    (IMAGE + "attn.ln_q", BLOCK + "attn.norm_q"),
    (IMAGE + "attn.ln_k", BLOCK + "attn.norm_k"),
    (IMAGE + "attn2.qkv", BLOCK + "attn2.to_q", BLOCK + "attn2.to_k", BLOCK + "attn2.to_v"),
    (IMAGE + "attn2.proj", BLOCK + "attn2.to_out.0"),
    (IMAGE + "attn2.ln_q", BLOCK + "attn2.norm_q"),
    (IMAGE + "attn2.ln_k", BLOCK + "attn2.norm_k"),
    (IMAGE + "mlp.fc1", BLOCK + "ff.net.0.proj"),
    (IMAGE + "mlp.fc2", BLOCK + "ff.net.2"),
    (TEXT + "attn.qkv", BLOCK + "attn.add_q_proj", BLOCK + "attn.add_k_proj", BLOCK + "attn.add_v_proj"),
    (TEXT + "attn.proj", BLOCK + "attn.to_add_out"),
    (TEXT + "attn.ln_q", BLOCK + "attn.norm_added_q"),
    (TEXT + "attn.ln_k", BLOCK + "attn.norm_added_k"),
    (TEXT + "mlp.fc1", BLOCK + "ff_context.net.0.proj"),
    (TEXT + "mlp.fc2", BLOCK + "ff_context.net.2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", SWAP),
)


def native(modules: Mapping[str, Shape]) -> dict[str, Parts]:
    """Name each weight of the transformer as Stability's code does."""
    last = max(int(path.split(".")[1]) for path in modules if path.startswith("transformer_blocks."))
    # The last block only modulates the text stream before its final projection, like norm_out.
    ends = TEXT + "adaLN_modulation.1", BLOCK + "norm1_context.linear"
    modulation = [(ends[0].format(i=i), ends[1].format(i=i), *[SWAP] * (i == last)) for i in range(last + 1)]
    return apply((*RULES, *modulation), modules, "transformer")
