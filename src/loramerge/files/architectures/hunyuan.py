"""Names of the Hunyuan models (HunyuanVideo, 1.5, HunyuanImage 2.1) in ComfyUI's code, in Tencent's, and split.

Sources: https://github.com/Tencent-Hunyuan/HunyuanVideo, hyvideo/modules/models.py; ComfyUI,
comfy/ldm/hunyuan_video/model.py; https://github.com/kohya-ss/musubi-tuner, hunyuan_video_1_5.
"""

import re

from .flux import DOUBLE, SINGLE, SINGLE_LINEARS
from .names import SWAP, Rule, by

EMBED = "time_text_embed."
TEXT = "context_embedder."
REFINER = TEXT + "token_refiner.refiner_blocks.{i}."
NATIVE_REFINER = "txt_in.individual_token_refiner.blocks.{i}."
STREAMS = (
    ("img", "ff", "norm1", ("to_q", "to_k", "to_v"), "to_out.0"),
    ("txt", "ff_context", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
)
"""A stream's native name, and diffusers' names of its feed-forward, modulation, q, k, v and output."""

TIMES = ("time_text_embed", "time_guidance_embed", "time_embed")
"""The parents of the time embedding in HunyuanVideo, HunyuanImage and HunyuanVideo 1.5."""


def outside(mlp: tuple[str, str], text: tuple[str, str]) -> tuple[Rule, ...]:
    """Make the rules of the modules outside of the blocks.

    Args:
        mlp: Names of the two layers of the time and guidance embeddings.
        text: Names of the two layers of the pooled text's embedding.
    """
    embeddings = [
        (own, f"{time}.{theirs}", mlp)
        for time in TIMES
        for own, theirs in (("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder"))
    ]
    embeddings += [
        ("vector_in", EMBED + "text_embedder", ("in_layer", "out_layer")),
        ("txt_in.t_embedder", TEXT + "time_text_embed.timestep_embedder", mlp),
        ("txt_in.c_embedder", TEXT + "time_text_embed.text_embedder", text),
    ]
    return (
        *(
            (f"{own}.{layer}", f"{theirs}.linear_{n}")
            for own, theirs, layers in embeddings
            for n, layer in enumerate(layers, start=1)
        ),
        ("img_in.proj", "x_embedder.proj"),
        ("txt_in.input_embedder", TEXT + "proj_in"),
        (NATIVE_REFINER + "adaLN_modulation.1", REFINER + "norm_out.linear"),
        ("byt5_in.layernorm", "context_embedder_2.norm"),
        *((f"byt5_in.fc{n}", f"context_embedder_2.linear_{n}") for n in (1, 2, 3)),
        ("vision_in.proj.0", "image_embedder.norm_in"),
        ("vision_in.proj.1", "image_embedder.linear_1"),
        ("vision_in.proj.3", "image_embedder.linear_2"),
        ("vision_in.proj.4", "image_embedder.norm_out"),
        ("cond_type_embedding", "cond_type_embed"),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear", SWAP),
    )


COMFYUI = outside(("in_layer", "out_layer"), ("in_layer", "out_layer"))
TENCENT = outside(("mlp.0", "mlp.2"), ("linear_1", "linear_2"))


def rules(attention: str, mlp: tuple[str, str], modulation: str) -> tuple[Rule, ...]:
    """Make the rules of the blocks, whose names differ from code to code.

    Args:
        attention: Text between a stream's name and its attention's layers: ``_attn.`` or ``_attn_``.
        mlp: Names of the two layers of a feed-forward.
        modulation: Name of the layer of a modulation.
    """
    streams: list[Rule] = []
    for stream, forward, norm, qkv, out in STREAMS:
        block = f"double_blocks.{{i}}.{stream}"
        streams += [
            (f"{block}{attention}qkv", *(f"{DOUBLE}attn.{name}" for name in qkv)),
            (f"{block}{attention}proj", f"{DOUBLE}attn.{out}"),
            (f"{block}_mlp.{mlp[0]}", f"{DOUBLE}{forward}.net.0.proj"),
            (f"{block}_mlp.{mlp[1]}", f"{DOUBLE}{forward}.net.2"),
            (f"{block}_mod.{modulation}", f"{DOUBLE}{norm}.linear"),
        ]
    refiner = NATIVE_REFINER + attention.replace("_attn", "self_attn")
    return (
        *streams,
        (f"single_blocks.{{i}}.modulation.{modulation}", SINGLE + "norm.linear"),
        *SINGLE_LINEARS,
        (f"{refiner}qkv", REFINER + "attn.to_q", REFINER + "attn.to_k", REFINER + "attn.to_v"),
        (f"{refiner}proj", REFINER + "attn.to_out.0"),
        (f"{NATIVE_REFINER}mlp.{mlp[0]}", REFINER + "ff.net.0.proj"),
        (f"{NATIVE_REFINER}mlp.{mlp[1]}", REFINER + "ff.net.2"),
    )


def _split() -> tuple[Rule, ...]:
    """Make the rules of 1.5 in Tencent's code, where q, k and v of the streams are separate, of the refiner fused."""
    kept = (rule for rule in rules("_attn_", ("fc1", "fc2"), "linear") if not re.search("(img|txt)_attn_qkv", rule[0]))
    apart = (
        (f"double_blocks.{{i}}.{stream}_attn_{letter}", f"{DOUBLE}attn.{name}")
        for stream, _, _, qkv, _ in STREAMS
        for letter, name in zip("qkv", qkv, strict=True)
    )
    return (*kept, *apart)


comfyui = by(*COMFYUI, *rules("_attn.", ("0", "2"), "lin"))
tencent = by(*TENCENT, *rules("_attn_", ("fc1", "fc2"), "linear"))
split = by(*TENCENT, *_split())
