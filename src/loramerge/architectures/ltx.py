"""LTX-Video and LTX-2 in Lightricks' own code: the blocks have diffusers' names, what is around them has not.

Source: https://github.com/Lightricks/LTX-2, ltx-core; ComfyUI, comfy/ldm/lightricks
"""

from .names import Rule, by

LAYERS = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
MODULATIONS = (
    ("adaln_single", "time_embed"),
    ("audio_adaln_single", "audio_time_embed"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
)

RULES: tuple[Rule, ...] = (
    ("patchify_proj", "proj_in"),
    ("audio_patchify_proj", "audio_proj_in"),
    *((f"{own}.{layer}", f"{theirs}.{layer}") for own, theirs in MODULATIONS for layer in LAYERS),
)

native = by(*RULES)
