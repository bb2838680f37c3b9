"""LTX-Video and LTX-2 in Lightricks' own code: only the layers of the blocks have diffusers' names.

Source: https://github.com/Lightricks/LTX-2, ltx-core; ComfyUI, comfy/ldm/lightricks
"""

from .names import Rule, by

LAYERS = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
MODULATIONS = (
    ("adaln_single", "time_embed"),
    ("audio_adaln_single", "audio_time_embed"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("audio_prompt_adaln_single", "audio_prompt_adaln"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
)

BLOCK = "transformer_blocks.{i}."
ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

RULES: tuple[Rule, ...] = (
    ("patchify_proj", "proj_in"),
    ("audio_patchify_proj", "audio_proj_in"),
    *((f"{own}.{layer}", f"{theirs}.{layer}") for own, theirs in MODULATIONS for layer in LAYERS),
    *((f"{BLOCK}{name}.{letter}_norm", f"{BLOCK}{name}.norm_{letter}") for name in ATTENTIONS for letter in "qk"),
    *(
        (f"{BLOCK}scale_shift_table_a2v_ca_{stream}", f"{BLOCK}{stream}_a2v_cross_attn_scale_shift_table")
        for stream in ("video", "audio")
    ),
)

native = by(*RULES)
