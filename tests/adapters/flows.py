"""Pipelines of random weights for transformers that predict a flow, a few channels wide: Wan, Qwen-Image and others."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n{% endif %}{% endif %}"
)
WIDTH = 8
STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 1.2, 0.9]}


def bytes_tokenizer() -> tuple[Qwen2Tokenizer, int]:
    """A tokenizer of single bytes with Qwen's marks, and the number of its tokens."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = {piece: i for i, piece in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    made = Qwen2Tokenizer(vocab=pieces, merges=[], extra_special_tokens=marks[1:])
    made.chat_template = CHAT
    return made, len(pieces)


def qwen(vocabulary: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": WIDTH,
        "pad_token_id": None,
    }


def wan() -> DiffusionPipeline:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    config = UMT5Config(vocab_size=len(pieces), d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return WanPipeline(
        tokenizer=T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512),
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=AutoencoderKLWan(
            base_dim=2,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            scale_factor_spatial=2,
            scale_factor_temporal=2,
            **STATISTICS,
        ).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=8,
            ffn_dim=16,
            num_layers=2,
        ).eval(),
    )


def qwen_image() -> DiffusionPipeline:
    tokenizer, vocabulary = bytes_tokenizer()
    text = qwen(vocabulary, 1) | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH}
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
        vae=AutoencoderKLQwenImage(
            base_dim=2, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], **STATISTICS
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


def z_image() -> DiffusionPipeline:
    tokenizer, vocabulary = bytes_tokenizer()
    return ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(Qwen3Config(**qwen(vocabulary, 2))).eval(),
        vae=AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            scaling_factor=0.36,
            shift_factor=0.12,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=1,
            n_kv_heads=1,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[600, 32, 32],
        ).eval(),
    )


def flux2_klein() -> DiffusionPipeline:
    tokenizer, vocabulary = bytes_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**qwen(vocabulary, 27))).eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ).eval(),
    )


BUILDERS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "wan-1.3b": wan,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "flux2-klein-4b": flux2_klein,
}
