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


DIFFSYNTH = (
    ("double_blocks.", "blocks."),
    *(
        pair
        for own, theirs in (("img", "a"), ("txt", "b"))
        for pair in (
            (f".{own}_attn.qkv", f".attn.{theirs}_to_qkv"),
            (f".{own}_attn.proj", f".attn.{theirs}_to_out"),
            (f".{own}_attn.norm.query_norm", f".attn.norm_q_{theirs}"),
            (f".{own}_attn.norm.key_norm", f".attn.norm_k_{theirs}"),
            (f".{own}_mlp.", f".ff_{theirs}."),
            (f".{own}_mod.lin", f".norm1_{theirs}.linear"),
        )
    ),
    (".linear1", ".to_qkv_mlp"),
    (".linear2", ".proj_out"),
    (".modulation.lin", ".norm.linear"),
    (".norm.query_norm", ".norm_q_a"),
    (".norm.key_norm", ".norm_k_a"),
    ("time_in.in_layer", "time_embedder.timestep_embedder.0"),
    ("time_in.out_layer", "time_embedder.timestep_embedder.2"),
    ("guidance_in.in_layer", "guidance_embedder.timestep_embedder.0"),
    ("guidance_in.out_layer", "guidance_embedder.timestep_embedder.2"),
    ("vector_in.in_layer", "pooled_text_embedder.0"),
    ("vector_in.out_layer", "pooled_text_embedder.2"),
    ("txt_in", "context_embedder"),
    ("img_in", "x_embedder"),
    ("final_layer.linear", "final_proj_out"),
    ("final_layer.adaLN_modulation.1", "final_norm_out.linear"),
)
"""DiffSynth-Studio's names for the parts of Black Forest Labs' names.

Source: https://github.com/modelscope/DiffSynth-Studio, diffsynth/utils/state_dict_converters/flux_dit.py
"""

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


def diffsynth(modules: Mapping[str, Shape]) -> dict[str, Parts]:
    """Name each weight of the transformer as DiffSynth-Studio does, which fuses as Black Forest Labs do."""
    return {_as_diffsynth(path): parts for path, parts in native(modules).items()}


def _as_diffsynth(path: str) -> str:
    for own, theirs in DIFFSYNTH:
        path = path.replace(own, theirs)
    return path
