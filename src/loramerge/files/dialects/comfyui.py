"""ComfyUI's dialect, OMI's and the bare native one: the model's own dotted names."""

from collections.abc import Mapping

from ..architectures import Architecture, outlines
from ..architectures.names import Parts
from .base import LYCORIS_KINDS, PEFT_KINDS, Dialect
from .free import Free


def comfyui_names(a: Architecture) -> Mapping[str, Parts]:
    names = {f"diffusion_model.{path}": parts for path, parts in a.native_paths.items()}
    for encoder in a.text_encoders:
        paths = a.text_paths(encoder).items()
        start = f"text_encoders.{encoder.comfyui}.transformer.{encoder.inside}"
        names |= {f"{start}{path}": parts for path, parts in paths}
    return names


def comfyui_other_names(a: Architecture) -> Mapping[str, Parts]:
    """Name the denoiser's weights as other code does; trainers put those names behind the same prefix."""
    return {f"diffusion_model.{path}": parts for path, parts in a.other_paths.items()}


def comfyui_style(a: Architecture) -> str:
    """Choose the style: ComfyUI reads both, and diffusers stops at an alpha of ``lora_A``, so scales are folded in."""
    return "kohya" if a.denoiser == "unet" or a.down_up else "peft"


COMFYUI = Dialect(
    name="comfyui",
    title="ComfyUI, ai-toolkit's transformers, diffusion-pipe",
    source="https://github.com/comfyanonymous/ComfyUI, comfy/lora.py, model_lora_keys_unet",
    names=comfyui_names,
    also_names=(comfyui_other_names,),
    style="kohya",
    style_for=comfyui_style,
    also_reads=frozenset({"peft", "peft-short", "peft-named"}),
    begins=("diffusion_model.", "text_encoders."),
    free=Free(prefix="diffusion_model.", paths="native"),
    writes=True,
    alpha="keep",
    holds=LYCORIS_KINDS,
    lokr_cores=False,
)


def omi_names(a: Architecture) -> Mapping[str, Parts]:
    """Split native names of fused projections: ``qkv.0``, ``qkv.1``, ``qkv.2``."""
    names: dict[str, Parts] = {}
    for path, parts in a.native_paths.items():
        if len(parts) == 1:
            names[f"{a.denoiser}.{path}"] = parts
        else:
            names |= {f"{a.denoiser}.{path}.{i}": (part._replace(rows=None),) for i, part in enumerate(parts)}
    for encoder in (encoder for encoder in a.text_encoders if encoder.model.startswith(("clip-", "t5-"))):
        prefix = "t5" if encoder.comfyui == "t5xxl" else encoder.comfyui
        names |= {f"{prefix}.{path}": parts for path, parts in a.text_paths(encoder).items()}
    return names


OMI = Dialect(
    name="omi",
    title="OMI: OneTrainer 2024 to 2026",
    source="https://github.com/Open-Model-Initiative/OMI-Model-Standards",
    names=omi_names,
    style="kohya",
    begins=("unet.", "transformer.", "prior.", "clip_", "t5."),
    alpha="keep",
    rewrites=True,
    free=Free(prefix="{}.", paths="other"),
    holds=LYCORIS_KINDS,
)


def native_bare_names(a: Architecture) -> Mapping[str, Parts]:
    return a.native_paths


def other_bare_names(a: Architecture) -> Mapping[str, Parts]:
    return a.other_paths


NATIVE = Dialect(
    name="native",
    title="the model's own paths with nothing in front: Black Forest Labs' control LoRAs, DiffSynth",
    source="https://huggingface.co/black-forest-labs/FLUX.1-Depth-dev-lora",
    names=native_bare_names,
    also_names=(other_bare_names,),
    style="peft",
    also_reads=frozenset({"kohya", "peft-short", "peft-named"}),
    begins=tuple(dict.fromkeys(head for outline in outlines().values() for head in outline.others)),
    rewrites=True,
    free=Free(prefix="", paths="native"),
    holds=PEFT_KINDS,
)
