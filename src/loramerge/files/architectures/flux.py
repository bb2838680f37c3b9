"""FLUX.1's names in Black Forest Labs' code, which fuses q, k, v (and the MLP of a single block)."""

from collections.abc import Mapping

from ...tensors import Shape
from .names import SWAP, Parts, Rule, apply

DOUBLE = "transformer_blocks.{i}."
SINGLE = "single_transformer_blocks.{i}."
EMBED = "time_text_embed."

ATTENTION: tuple[Rule, ...] = (
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
)
"""The attention of the double blocks, in FLUX.2 too."""

SINGLE_LINEARS: tuple[Rule, ...] = (
    (
        "single_blocks.{i}.linear1",
        SINGLE + "attn.to_q",
        SINGLE + "attn.to_k",
        SINGLE + "attn.to_v",
        SINGLE + "proj_mlp",
    ),
    ("single_blocks.{i}.linear2", SINGLE + "proj_out"),
)
"""The two layers of the single blocks, which the Hunyuan models have too."""

ENDS: tuple[Rule, ...] = (
    ("single_blocks.{i}.norm.query_norm", SINGLE + "attn.norm_q"),
    ("single_blocks.{i}.norm.key_norm", SINGLE + "attn.norm_k"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear", SWAP),
)
"""The norms of the single blocks and the final layer, in FLUX.2 too."""

RULES: tuple[Rule, ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", EMBED + "timestep_embedder.linear_1"),
    ("time_in.out_layer", EMBED + "timestep_embedder.linear_2"),
    ("vector_in.in_layer", EMBED + "text_embedder.linear_1"),
    ("vector_in.out_layer", EMBED + "text_embedder.linear_2"),
    ("guidance_in.in_layer", EMBED + "guidance_embedder.linear_1"),
    ("guidance_in.out_layer", EMBED + "guidance_embedder.linear_2"),
    ("double_blocks.{i}.img_mod.lin", DOUBLE + "norm1.linear"),
    ("double_blocks.{i}.txt_mod.lin", DOUBLE + "norm1_context.linear"),
    *ATTENTION,
    ("double_blocks.{i}.img_mlp.0", DOUBLE + "ff.net.0.proj"),
    ("double_blocks.{i}.img_mlp.2", DOUBLE + "ff.net.2"),
    ("double_blocks.{i}.txt_mlp.0", DOUBLE + "ff_context.net.0.proj"),
    ("double_blocks.{i}.txt_mlp.2", DOUBLE + "ff_context.net.2"),
    *SINGLE_LINEARS,
    ("single_blocks.{i}.modulation.lin", SINGLE + "norm.linear"),
    *ENDS,
)


GUIDANCE = "distilled_guidance_layer.layers.{i}."

CHROMA: tuple[Rule, ...] = (
    *RULES,
    (GUIDANCE + "in_layer", GUIDANCE + "linear_1"),
    (GUIDANCE + "out_layer", GUIDANCE + "linear_2"),
)
"""Chroma's rules: it is FLUX.1 with one network in the place of its modulations, https://github.com/lodestone-rock/flow"""


def native(modules: Mapping[str, Shape]) -> dict[str, Parts]:
    """Name each weight of the transformer as Black Forest Labs' code does."""
    return apply(RULES, modules, "transformer")


def chroma(modules: Mapping[str, Shape]) -> dict[str, Parts]:
    """Name each weight of the transformer as Chroma's code does."""
    return apply(CHROMA, modules, "transformer")
