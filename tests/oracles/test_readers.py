"""What diffusers leaves out of a file is what is said of it, no less and no more."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft.tuners.lora import LoraLayer
from transformers import T5Config, T5EncoderModel

import loramerge as lm
from loramerge import LoRA
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.dialects.readers import DROPS, STOPS, Drop, dropped
from loramerge.files.dialects.write import spell
from loramerge.layers import BiasOnly, DoRA, Layer
from loramerge.testing import random_layer, relative_error
from oracles import pipelines
from oracles.pipelines import ADAPTER, loaded, shapes
from oracles.test_diffusers import effect, truth

ATTENTION = {
    "sdxl": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "flux": "transformer.transformer_blocks.0.attn.to_out.0",
}
PLAIN = {
    "sdxl": "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0",
    "flux": "transformer.transformer_blocks.1.attn.to_out.0",
}
OTHERS = {
    "conv": "unet.mid_block.resnets.0.conv1",
    "norm": "unet.mid_block.resnets.0.norm1",
    "added": "unet.add_embedding.linear_1",
    "outside": "transformer.x_embedder",
}
KINDS = ("lora", "loha", "lokr", "full", "bias", "biased", "dora")
CASES = [
    *(("sdxl", dialect, kind) for dialect in ("kohya", "kohya-diffusers", "comfyui") for kind in KINDS),
    *(("flux", dialect, kind) for dialect in ("kohya", "comfyui") for kind in KINDS),
    *(
        ("sdxl", dialect, kind)
        for dialect in ("kohya", "kohya-diffusers", "diffusers", "diffusers-peft")
        for kind in ("conv", "tucker", "added")
    ),
    *(("sdxl", dialect, "norm") for dialect in ("kohya", "kohya-diffusers")),
    *(("flux", dialect, "outside") for dialect in ("kohya", "comfyui", "diffusers", "diffusers-peft")),
    *((architecture, "diffusers-peft", kind) for architecture in ("sdxl", "flux") for kind in ("dora", "biased")),
]


def layer_of(kind: str, shape: tuple[int, ...]) -> Layer:
    if kind == "bias":
        return BiasOnly(diff_b=np.ones(shape[0], np.float32))
    made = random_layer(shape, kind="lora" if kind in ("biased", *OTHERS) else kind, alpha=2.0)
    return replace(made, diff_b=np.ones(shape[0], np.float32)) if kind == "biased" else made


def lora_of(architecture: str, kind: str) -> LoRA:
    """A plain layer, and one of a kind."""
    module = OTHERS["conv"] if kind == "tucker" else OTHERS.get(kind, ATTENTION[architecture])
    sizes = shapes(architecture)
    other = "dora" if kind == "dora" else "lora"  # PEFT takes the layers of a model for the one or the other
    layers = {m: layer_of(k, sizes[m]) for m, k in ((PLAIN[architecture], other), (module, kind))}
    return LoRA(name="case", architecture=architecture, dialect="kohya", layouts=layers)


def rows_of(lora: LoRA, dialect: str) -> list[tuple[Drop, list[str]]]:
    """What is said of diffusers."""
    rows = dropped(dialect, lora.architecture, spell(lora, dialect).layers)
    return [(drop, modules) for drop, modules in rows if drop.reader == "diffusers"]


def taken(lora: LoRA, module: str, layers: Mapping[str, LoraLayer]) -> bool:
    """Whether a pipeline has a module's layer, whole."""
    found, layer = layers.get(module), lora[module]
    if found is None:
        return False
    if isinstance(layer, DoRA):
        return ADAPTER in getattr(found, "lora_magnitude_vector", {})
    if layer.delta_bias() is not None and not found.lora_bias[ADAPTER]:
        return False
    return relative_error(effect(found), truth(lora, module)) <= 1e-5


@pytest.mark.parametrize(("architecture", "dialect", "kind"), CASES)
def test_diffusers_takes_all_but_what_is_said(architecture: str, dialect: str, kind: str, tmp_path: Path) -> None:
    lora = lora_of(architecture, kind)
    rows = rows_of(lora, dialect)
    path = lm.save(lora, tmp_path / "lora.safetensors", dialect=dialect)

    if any(drop.does == STOPS for drop, _ in rows):
        with pytest.raises(ValueError), loaded(architecture, str(path)):
            pass
        return
    with loaded(architecture, str(path)) as layers:
        assert {m for m in lora if not taken(lora, m, layers)} == {m for _, modules in rows for m in modules}


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(d_model=4096, d_ff=8, d_kv=4, num_layers=1, num_heads=1, vocab_size=9))


@cache
def flux_with_t5() -> DiffusionPipeline:
    flux = pipelines.pipeline("flux")
    return FluxPipeline(**{**flux.components, "text_encoder_2": t5()})


@cache
def sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=64, num_attention_heads=24, caption_projection_dim=1536,
        joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=8,
    )  # fmt: skip
    texts = {"text_encoder": pipelines.clip(1, projection=True), "text_encoder_2": pipelines.clip(1, projection=True)}
    others = dict.fromkeys(("scheduler", "vae", "tokenizer", "tokenizer_2", "tokenizer_3"))
    return StableDiffusion3Pipeline(transformer=transformer, text_encoder_3=t5(), **texts, **others)


WITH_T5 = {"flux": flux_with_t5, "sd3-medium": sd3}
T5_CASES = [(a, d) for a in WITH_T5 for d in ("kohya", "comfyui", "diffusers", "diffusers-peft")]


def lora_with_t5(architecture: str) -> LoRA:
    component = "text_encoder_2" if architecture == "flux" else "text_encoder_3"
    modules = (f"{component}.encoder.block.0.layer.0.SelfAttention.q", PLAIN["flux"].replace("blocks.1", "blocks.0"))
    sizes = ARCHITECTURES[architecture].shapes
    layers = {m: random_layer(sizes[m], seed=zlib.crc32(m.encode())) for m in modules}
    return LoRA(name="case", architecture=architecture, dialect="kohya", layouts=layers)


@pytest.mark.parametrize(("architecture", "dialect"), T5_CASES)
def test_diffusers_ignores_t5_and_what_else_is_said(architecture: str, dialect: str, tmp_path: Path) -> None:
    lora, pipe = lora_with_t5(architecture), WITH_T5[architecture]()
    path = lm.save(lora, tmp_path / "lora.safetensors", dialect=dialect)

    pipe.load_lora_weights(str(path), adapter_name=ADAPTER)

    found = {
        f"{name}.{module}"
        for name, model in pipelines.components(pipe).items()
        for module, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    pipe.unload_lora_weights()
    assert set(lora) - found == {m for _, modules in rows_of(lora, dialect) for m in modules}


def test_every_row_of_diffusers_is_met_by_a_case() -> None:
    made = [(lora_of(architecture, kind), dialect) for architecture, dialect, kind in CASES]
    made += [(lora_with_t5(architecture), dialect) for architecture, dialect in T5_CASES]

    met = {drop for lora, dialect in made for drop, _ in rows_of(lora, dialect)}

    tried = [ARCHITECTURES[name] for name in {lora.architecture for lora, _ in made}]
    assert met == {
        drop for drop in DROPS if drop.reader == "diffusers" and drop.at_once and any(map(drop.concerns, tried))
    }
