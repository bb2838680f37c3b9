"""MiniMax H3 in its own code, which fuses q, k, v, and has the halves of the feed-forward the other way round.

DiffSynth-Studio trains the checkpoint's own weight, in which q, k and v alternate head by head.
Source: diffusers, loaders/lora_conversion_utils.py, _convert_non_diffusers_minimax_h3_lora_to_diffusers
"""

from collections.abc import Mapping

from ...tensors import Shape
from .names import SWAP, Part, Parts, Rule, by, inside

BLOCKS = (
    ("blocks.{i}.", "transformer_blocks.{i}."),
    ("token_refiner.blocks.{i}.", "token_refiner.refiner_blocks.{i}."),
)
HEAD = 128
"""Rows of a head."""

RULES: tuple[Rule, ...] = (
    *inside(
        BLOCKS,
        (
            ("attn.qkv_proj", "attn.to_q", "attn.to_k", "attn.to_v"),
            ("attn.out_proj", "attn.to_out.0"),
            ("mlp.fc1", "ff.net.0.proj", SWAP),
            ("mlp.fc2", "ff.net.2"),
            ("adaln_proj.linear", "adaln_proj.linear"),
        ),
    ),
    ("video_patch_proj", "proj_in"),
    ("audio_patch_proj", "audio_proj_in"),
    ("condition_proj", "context_embedder"),
    ("time_embedder.proj_in", "time_embedder.linear_1"),
    ("time_embedder.proj_out", "time_embedder.linear_2"),
    ("final_layer.adaln_proj.linear", "norm_out.linear"),
    ("final_layer.video_out", "proj_out"),
    ("final_layer.audio_out", "audio_proj_out"),
)

native = by(*RULES)


def by_head(modules: Mapping[str, Shape]) -> Mapping[str, Parts]:
    """Name the weights whose rows alternate head by head."""
    return {path: _by_head(parts) for path, parts in native(modules).items() if path.endswith(".qkv_proj")}


def _by_head(parts: Parts) -> Parts:
    rows = parts[0].rows or ()
    heads = sum(stop - start for start, stop in rows) // HEAD
    starts = [[(len(parts) * head + i) * HEAD for head in range(heads)] for i in range(len(parts))]
    return tuple(
        Part(part.module, tuple((start, start + HEAD) for start in own))
        for part, own in zip(parts, starts, strict=True)
    )
