"""Write the module names and weight shapes of each supported model family.

Every model is built from its published configuration on PyTorch's meta device, so no
weights are needed and the names are those of the library, not ours.  Run it when a
family is added or a library renames a module:

    python tools/dump_architectures.py

It writes ``src/loramerge/architectures/models/<model>.json``: {module: weight shape}.
"""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers

OUT = Path(__file__).parents[1] / "src/loramerge/architectures/models"


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

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
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
    """Modules that have a weight, in the order in which the model registers them."""
    return {
        name: list(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }


def text_model_names(names: dict[str, list[int]]) -> dict[str, list[int]]:
    """CLIP's names as every LoRA file has them: transformers 5 drops ``text_model.`` in one class."""
    return {
        n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": shape
        for n, shape in names.items()
    }


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, build in MODELS.items():
        with torch.device("meta"):
            names = shapes(build())
        if name.startswith("clip-"):
            names = text_model_names(names)
        lines = ",\n".join(f"{json.dumps(n)}:{json.dumps(s, separators=(',', ':'))}" for n, s in names.items())
        (OUT / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")
        print(f"{name}: {len(names)} modules")


if __name__ == "__main__":
    main()
