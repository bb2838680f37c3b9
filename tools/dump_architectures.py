"""Write the module names and weight shapes of each supported model family.

Every model is built from its published configuration on PyTorch's meta device, so no
weights are needed and the names are the library's, not ours.  Run it when a
family is added or a library renames a module:

    python tools/dump_architectures.py [model …]

Models that diffusers lacks are built from a checkout of their own code, of which an environment variable has the path:
OMNIGEN2 (https://github.com/VectorSpaceLab/OmniGen2, commit 0f72fa9). Without it they keep their file.

It writes ``src/loramerge/files/architectures/models/<model>.json``: {module: weight shape}, and ``outlines.json``, what
the names of each family begin with and how far their numbers go; and ``forms.json``, an index of all names and sizes.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.dialects.forms import made

OUT = Path(__file__).parents[1] / "src/loramerge/files/architectures/models"


def unet(**config: object) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(sample_size=64, **config)


def clip(hidden: int, layers: int, *, projection: bool = False) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        projection_dim=hidden,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


SD3 = dict(sample_size=128, joint_attention_dim=4096, pooled_projection_dim=2048)
XL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)

WAN = dict(ffn_dim=8960, num_attention_heads=12, num_layers=30)
COSMOS = dict(
    num_attention_heads=16,
    attention_head_dim=128,
    num_layers=28,
    text_embed_dim=1024,
    adaln_lora_dim=256,
    in_channels=16,
    out_channels=16,
    extra_pos_embed_type=None,
)

CASCADE = dict(
    in_channels=16,
    out_channels=16,
    timestep_conditioning_type=("sca", "crp"),
    patch_size=1,
    conditioning_dim=2048,
    block_out_channels=(2048, 2048),
    num_attention_heads=(32, 32),
    down_num_layers_per_block=(8, 24),
    up_num_layers_per_block=(24, 8),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
    clip_text_in_channels=1280,
    clip_text_pooled_in_channels=1280,
    clip_image_in_channels=768,
    kernel_size=3,
    self_attn=True,
    switch_level=(False,),
)
LTX23 = dict(
    gated_attn=True,
    cross_attn_mod=True,
    audio_gated_attn=True,
    audio_cross_attn_mod=True,
    use_prompt_embeddings=False,
    perturbed_attn=True,
)


def omnigen2() -> torch.nn.Module | None:
    if not (checkout := os.environ.get("OMNIGEN2")):
        return None
    sys.path.insert(0, checkout)
    from omnigen2.models.transformers.transformer_omnigen2 import OmniGen2Transformer2DModel

    return OmniGen2Transformer2DModel(
        in_channels=16,
        hidden_size=2520,
        num_layers=32,
        num_refiner_layers=2,
        num_attention_heads=21,
        num_kv_heads=7,
        axes_dim_rope=(40, 40, 40),
        axes_lens=(1024, 1664, 1664),
        text_feat_dim=2048,
    )


def qwen3(hidden: int, inner: int) -> torch.nn.Module:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
        )
    )


MODELS: dict[str, Callable[[], torch.nn.Module | list[torch.nn.Module] | None]] = {
    "unet-sd15": lambda: unet(cross_attention_dim=768),
    "unet-sd21": lambda: unet(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    "unet-sdxl": lambda: unet(**XL, transformer_layers_per_block=(1, 2, 10)),
    "unet-sdxl-refiner": lambda: unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(384, 768, 1536, 1536),
        attention_head_dim=(6, 12, 24, 24),
        cross_attention_dim=1280,
        transformer_layers_per_block=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560,
    ),
    "unet-ssd-1b": lambda: unet(
        **XL,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
    ),
    "unet-segmind-vega": lambda: unet(
        **XL,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (1, 1), (2, 2)),
        reverse_transformer_layers_per_block=((2, 2, 2), (1, 1, 1), 1),
    ),
    "transformer-sd3-medium": lambda: diffusers.SD3Transformer2DModel(
        **SD3, num_layers=24, num_attention_heads=24, caption_projection_dim=1536
    ),
    "transformer-sd35-medium": lambda: diffusers.SD3Transformer2DModel(
        **SD3,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    ),
    "transformer-sd35-large": lambda: diffusers.SD3Transformer2DModel(
        **SD3, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
    ),
    "transformer-flux": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
    "transformer-qwen-image": lambda: diffusers.QwenImageTransformer2DModel(),
    "unet-kolors": lambda: unet(
        **(XL | dict(projection_class_embeddings_input_dim=5632)),
        transformer_layers_per_block=(1, 2, 10),
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
    ),
    "transformer-chroma": lambda: diffusers.ChromaTransformer2DModel(),
    "transformer-longcat-image": lambda: diffusers.LongCatImageTransformer2DModel(),
    "transformer-ovis-image": lambda: diffusers.OvisImageTransformer2DModel(),
    "transformer-flux2-dev": lambda: diffusers.Flux2Transformer2DModel(),
    "transformer-flux2-klein-4b": lambda: diffusers.Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680
    ),
    "transformer-flux2-klein-9b": lambda: diffusers.Flux2Transformer2DModel(
        num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288
    ),
    "transformer-z-image": lambda: diffusers.ZImageTransformer2DModel(),
    "transformer-lumina2": lambda: diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304),
    "transformer-krea2": lambda: diffusers.Krea2Transformer2DModel(),
    "transformer-cosmos-predict2-2b": lambda: diffusers.CosmosTransformer3DModel(**COSMOS),
    "transformer-wan-1.3b": lambda: diffusers.WanTransformer3DModel(**WAN),
    "transformer-wan-5b": lambda: diffusers.WanTransformer3DModel(
        in_channels=48, out_channels=48, ffn_dim=14336, num_attention_heads=24, num_layers=30
    ),
    # Image to video of 2.1 has all modules of the other models of this size.
    "transformer-wan-14b": lambda: diffusers.WanTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120),
    "transformer-hunyuanvideo": lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(),
    "transformer-hunyuanvideo15": lambda: diffusers.HunyuanVideo15Transformer3DModel(),
    "transformer-hunyuanimage": lambda: diffusers.HunyuanImageTransformer2DModel(),
    "transformer-ltxv-2b": lambda: diffusers.LTXVideoTransformer3DModel(),
    "transformer-ltxv-13b": lambda: diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=32, attention_head_dim=128, num_layers=48, cross_attention_dim=4096
    ),
    # 2.3 and 2.5 have modules that 2.0 lacks, and 2.0 some that they lack.
    "transformer-ltx2": lambda: [
        diffusers.LTX2VideoTransformer3DModel(),
        diffusers.LTX2VideoTransformer3DModel(**LTX23),
    ],
    "transformer-hidream": lambda: diffusers.HiDreamImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=16,
        num_single_layers=32,
        attention_head_dim=128,
        num_attention_heads=20,
        caption_channels=[4096, 4096],
        text_emb_dim=2048,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(64, 32, 32),
        max_resolution=(128, 128),
        patch_size=2,
        llama_layers=[*range(32), *[31] * 16],
    ),
    "transformer-ernie-image": lambda: diffusers.ErnieImageTransformer2DModel(
        hidden_size=4096, num_attention_heads=32, num_layers=36, ffn_hidden_size=12288
    ),
    "transformer-kandinsky5-lite": lambda: diffusers.Kandinsky5Transformer3DModel(
        model_dim=1792, ff_dim=7168, time_dim=512, num_text_blocks=2, num_visual_blocks=32
    ),
    "transformer-kandinsky5-pro": lambda: diffusers.Kandinsky5Transformer3DModel(
        model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60
    ),
    "transformer-kandinsky5-image": lambda: diffusers.Kandinsky5Transformer3DModel(
        model_dim=2560, ff_dim=10240, time_dim=512, num_text_blocks=2, num_visual_blocks=50
    ),
    "transformer-sana-1.6b": lambda: diffusers.SanaTransformer2DModel(),
    "transformer-sana-0.6b": lambda: diffusers.SanaTransformer2DModel(
        num_attention_heads=36,
        num_layers=28,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "transformer-sana-4.8b": lambda: diffusers.SanaTransformer2DModel(num_layers=60),
    "transformer-cogvideox-2b": lambda: diffusers.CogVideoXTransformer3DModel(),
    "transformer-cogvideox-5b": lambda: diffusers.CogVideoXTransformer3DModel(num_attention_heads=48, num_layers=42),
    "transformer-auraflow": lambda: diffusers.AuraFlowTransformer2DModel(),
    "transformer-mochi": lambda: diffusers.MochiTransformer3DModel(),
    "transformer-pixart-sigma": lambda: diffusers.PixArtTransformer2DModel(),
    "transformer-ideogram4": lambda: diffusers.Ideogram4Transformer2DModel(),
    "transformer-minimax-h3": lambda: diffusers.MiniMaxH3Transformer3DModel(),
    "transformer-flux3": lambda: diffusers.Flux3Transformer2DModel(),
    "transformer-bria-fibo2": lambda: diffusers.BriaFibo2Transformer2DModel(),
    "transformer-ace-step": lambda: diffusers.AceStepTransformer1DModel(),
    "transformer-cogview4": lambda: diffusers.CogView4Transformer2DModel(
        num_layers=28, num_attention_heads=32, attention_head_dim=128
    ),
    "transformer-omnigen": lambda: diffusers.OmniGenTransformer2DModel(
        rope_scaling=dict(short_factor=[1.0] * 48, long_factor=[1.0] * 48, original_max_position_embeddings=4096)
    ),
    "transformer-omnigen2": omnigen2,
    "prior-stable-cascade": lambda: diffusers.StableCascadeUNet(**CASCADE),
    "text-conditioner-anima": lambda: diffusers.AnimaTextConditioner(),
    "qwen3-0.6b": lambda: qwen3(1024, 3072),
    "clip-l": lambda: clip(768, 12),
    "clip-l-projection": lambda: clip(768, 12, projection=True),
    "clip-h": lambda: clip(1024, 23),
    "clip-g": lambda: clip(1280, 32, projection=True),
    "t5-xxl": lambda: transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, feed_forward_proj="gated-gelu"
        )
    ),
}


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """Return modules with a weight, and parameters outside of such modules, in the model's order."""
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(prefix=name, recurse=False):
            if own.endswith("weight"):
                found[name] = list(parameter.shape)
            elif not own.endswith("bias"):
                found[own] = list(parameter.shape)
    return found


def joined(models: list[torch.nn.Module]) -> dict[str, list[int] | list[list[int]]]:
    """Return the modules of versions that are one family: a shape, or a list of shapes where the versions differ."""
    found: dict[str, list[list[int]]] = {}
    for model in models:
        for name, shape in shapes(model).items():
            sizes = found.setdefault(name, [])
            if shape not in sizes:
                sizes.append(shape)
    return {name: sizes[0] if len(sizes) == 1 else sizes for name, sizes in found.items()}


def text_model_names(names: dict[str, Any]) -> dict[str, Any]:
    """Return CLIP's names as every LoRA file has them: transformers 5 drops ``text_model.`` in one class."""
    return {
        n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": shape
        for n, shape in names.items()
    }


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, build in MODELS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with torch.device("meta"):
            built = build()
        if built is None:
            print(f"{name}: kept, its own code isn't here")
            continue
        names = joined(built if isinstance(built, list) else [built])
        if name.startswith("clip-"):
            names = text_model_names(names)
        lines = ",\n".join(f"{json.dumps(n)}:{json.dumps(s, separators=(',', ':'))}" for n, s in names.items())
        (OUT / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")
        print(f"{name}: {len(names)} modules")
    found = {a.name: a.outlined() for a in ARCHITECTURES.values()}
    lines = ",\n".join(f"{json.dumps(n)}:{json.dumps(outline, separators=(',', ':'))}" for n, outline in found.items())
    (OUT.parent / "outlines.json").write_text(f"{{\n{lines}\n}}\n")
    families, forms = made()
    lines = ",\n".join(f"{json.dumps(n)}:{json.dumps(sizes, separators=(',', ':'))}" for n, sizes in forms.items())
    (OUT.parent / "forms.json").write_text(f"[\n{json.dumps(families)},\n{{\n{lines}\n}}\n]\n")


if __name__ == "__main__":
    main()
