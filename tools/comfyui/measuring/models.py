"""Models of ComfyUI's own classes, with all of their names, small widths and random weights in float32."""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.text_encoders.flux
import torch

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False,
    "use_temporal_attention": False, "use_temporal_resblock": False, "context_dim": 48,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "context_in_dim": 48, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("SD15", {
        **UNET, "model_channels": 32, "adm_in_channels": None, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1] * 6 + [0, 0], "transformer_depth_middle": 1, "transformer_depth_output": [1] * 9 + [0] * 3,
        "use_linear_in_transformer": False, "num_heads": 8,
    }),
    "sdxl": ("SDXL", {
        **UNET, "model_channels": 64, "num_classes": "sequential", "adm_in_channels": 96, "num_res_blocks": [2] * 3,
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True, "num_head_channels": 64,
    }),
    "flux": ("Flux", {**FLUX, "image_model": "flux", "vec_in_dim": 64, "guidance_embed": True, "txt_ids_dims": []}),
    "flux2-klein-4b": ("Flux2", {
        **FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "axes_dim": [32, 32, 32, 32],
        "mlp_ratio": 3.0, "theta": 2000, "qkv_bias": False, "ops_bias": False, "vec_in_dim": None, "guidance_embed": False,
        "global_modulation": True, "mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3],
    }),
    "chroma": ("Chroma", {
        **FLUX, "image_model": "chroma", "vec_in_dim": None, "txt_ids_dims": [], "in_channels": 64, "out_channels": 64, "in_dim": 64,
        "out_dim": 256, "hidden_dim": 96, "n_layers": 5,
    }),
    "hunyuanvideo": ("HunyuanVideo", {
        **FLUX, "image_model": "hunyuan_video", "patch_size": [1, 2, 2], "vec_in_dim": 64, "meanflow": False, "theta": 256,
        "byt5": False, "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
    }),
    "qwen-image": ("QwenImage", {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 48,
    }),
    "wan-1.3b": ("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 256, "out_dim": 16, "num_heads": 2, "ffn_dim": 640, "num_layers": 2,
        "patch_size": (1, 2, 2), "freq_dim": 256, "text_dim": 48, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16,
    }),
    "lumina2": ("Lumina2", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 576, "cap_feat_dim": 48, "n_layers": 2, "n_heads": 6,
        "n_kv_heads": 2, "qk_norm": True, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
    }),
    "z-image": ("ZImage", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 1536, "cap_feat_dim": 48, "n_layers": 2, "n_heads": 12,
        "n_kv_heads": 12, "qk_norm": True, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
        "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }),
}  # fmt: skip
"""ComfyUI's class of each family, and its configuration with small widths; a transformer has two blocks of each kind."""

ENCODERS = {
    "clip_l_model_config": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2},
    "clip_g_model_config": {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 2},
    "t5xxl_model_config": {"d_model": 128, "d_ff": 192, "num_heads": 2, "num_layers": 2},
}
"""Small widths of text encoders."""

CLIPS: dict[str, tuple[Any, Any]] = {
    "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    "flux": (comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.FluxClipModel),
}
"""Text encoders of the families whose LoRAs train them."""


@lru_cache(maxsize=1)
def models(family: str) -> tuple[Any, Any]:
    """Return a family's model and text encoders; the latter are None where LoRAs have none."""
    name, config = CONFIGS[family]
    return _model(name, config), _clip(family, ENCODERS) if family in CLIPS else None


def real() -> tuple[Any, Any, Any]:
    """Return Stable Diffusion 1.5 with its own widths, which ComfyUI knows it by: the model, text encoder and autoencoder."""
    model = _model("SD15", {**CONFIGS["sd15"][1], "model_channels": 320, "context_dim": 768})
    return model, _clip("sd15", {}), _vae()


def _model(name: str, config: dict[str, Any]) -> Any:
    chosen = getattr(comfy.supported_models, name)(config)
    chosen.set_inference_dtype(torch.float32, None)
    model = chosen.get_model({}, "")
    _fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _vae() -> Any:
    sizes = {"ch": 128, "out_ch": 3, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4, "double_z": True}
    sizes |= {"in_channels": 3, "resolution": 256, "attn_resolutions": [], "dropout": 0.0}
    made = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=sizes, embed_dim=4)
    _fill(made)
    return comfy.sd.VAE(sd=made.state_dict())


def _clip(family: str, sizes: dict[str, dict[str, int]]) -> Any:
    tokenizer, encoder = CLIPS[family]
    target = SimpleNamespace(params={}, clip=encoder, tokenizer=tokenizer)
    found = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **sizes})
    _fill(found.cond_stage_model)
    return found


def _fill(module: torch.nn.Module) -> None:
    """Give every weight random values, the same ones again and again."""
    values = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in module.parameters():
            times = -(-weight.numel() // len(values))
            weight.copy_(values.repeat(times)[: weight.numel()].reshape(weight.shape))
