"""The dialects of kohya's sd-scripts and its kin: flattened names behind ``lora_unet_`` and ``lora_te_``."""

from collections.abc import Mapping

from ..architectures import Architecture, TextEncoder
from ..architectures.names import Parts, flat
from .base import LYCORIS_KINDS, Dialect, table
from .free import Free


def text_names(a: Architecture) -> dict[str, Parts]:
    """Name text encoders' modules with sd-scripts' numbers."""
    return {
        f"lora_te{encoder.kohya}_{flat(path)}": parts
        for encoder in a.text_encoders
        for path, parts in a.text_paths(encoder).items()
    }


def native_names(a: Architecture) -> dict[str, Parts]:
    """Name the denoiser's weights by the paths of the code that is trained."""
    return {f"lora_unet_{flat(path)}": parts for path, parts in a.trained_paths.items()}


def diffusers_names(a: Architecture) -> dict[str, Parts]:
    """Name the denoiser's modules by diffusers' paths."""
    return {f"lora_unet_{flat(path)}": parts for path, parts in a.denoiser_paths.items()}


def other_names(a: Architecture) -> Mapping[str, Parts]:
    """Name a transformer's weights as other code does: flux-sliders writes diffusers' names, converters ComfyUI's.

    OneTrainer has a prefix of its own for Stable Cascade's prior.
    """
    if a.denoiser == "unet":
        return {}
    prefix = "lora_prior_unet_" if a.denoiser == "prior" else "lora_unet_"
    paths = {**a.other_paths, **a.native_paths}
    return {f"{prefix}{flat(path)}": parts for path, parts in paths.items() if path not in a.trained_paths}


def own_names(a: Architecture) -> Mapping[str, Parts]:
    return native_names(a) | text_names(a)


def kohya_names(a: Architecture) -> Mapping[str, Parts]:
    return diffusers_names(a) | text_names(a) if a.kohya_uses_diffusers_names else table(own_names, a)


def unet_names(a: Architecture) -> Mapping[str, Parts]:
    return diffusers_names(a) | text_names(a) if a.denoiser == "unet" else {}


def other_text_names(a: Architecture) -> Mapping[str, Parts]:
    """Name text encoders' modules with the numbers that other tools give the encoders."""
    names: dict[str, Parts] = {}
    for position, encoder in enumerate(a.text_encoders, start=1):
        for number in _other_numbers(a, encoder, position):
            names |= {f"lora_te{number}_{flat(path)}": parts for path, parts in a.text_paths(encoder).items()}
    return names


def _other_numbers(a: Architecture, encoder: TextEncoder, position: int) -> list[str]:
    """List the other numbers of an encoder: its place in diffusers' pipeline (OneTrainer), none for the first (diffusers)."""
    numbers = [str(position), *[""] * (position == 1)]
    if encoder.component == "text_encoder_2" and len(a.text_encoders) == 1:
        numbers = ["2"]
    taken = {e.kohya for e in a.text_encoders}
    return [n for n in numbers if n not in taken]


KOHYA = Dialect(
    name="kohya",
    title="kohya sd-scripts, musubi-tuner, A1111, Forge, Civitai",
    source="https://github.com/kohya-ss/sd-scripts, networks/lora.py; lora_flux.py; lora_sd3.py",
    names=kohya_names,
    recognised_by=own_names,
    free=Free(prefix="lora_unet_", flat=True, paths="native", text="lora_te{}_"),
    also_names=(native_names, other_names, other_text_names),
    style="kohya",
    begins=("lora_unet_", "lora_te", "lora_prior_unet_"),
    writes=True,
    alpha="constant",
    even_rank=("text_projection",),
    holds=LYCORIS_KINDS,
)

KOHYA_DIFFUSERS = Dialect(
    name="kohya-diffusers",
    title="kohya with diffusers' block names: SD 1 and 2, OneTrainer, diffusers' export",
    source="https://github.com/huggingface/diffusers, utils/state_dict_utils.py, convert_state_dict_to_kohya",
    names=unet_names,
    also_names=(other_text_names,),
    style="kohya",
    begins=("lora_unet_", "lora_te"),
    writes=True,
    alpha="constant",
    even_rank=("text_projection",),
    free=Free(prefix="lora_unet_", flat=True, paths="other", text="lora_te{}_"),
    holds=LYCORIS_KINDS,
)

KOHYA_BROKEN = Dialect(
    name="kohya-broken",
    title="kohya as exported wrongly: _lora.down or _lora_down in place of .lora_down, dots in DoRA's names",
    source="https://github.com/huggingface/diffusers, train_dreambooth_lora_sdxl.py --output_kohya_format",
    names=unet_names,
    style="diffusers-old",
    also_reads=frozenset({"underscored"}),
    begins=("lora_unet_",),
)


def onetrainer_names(a: Architecture) -> Mapping[str, Parts]:
    if a.denoiser == "unet":
        return {}
    return {f"lora_transformer_{flat(path)}": parts for path, parts in a.denoiser_paths.items()} | _numbered(a)


def _numbered(a: Architecture) -> dict[str, Parts]:
    return {
        f"lora_te{position}_{flat(path)}": parts
        for position, encoder in enumerate(a.text_encoders, start=1)
        for path, parts in a.text_paths(encoder).items()
    }


ONETRAINER = Dialect(
    name="onetrainer",
    title="OneTrainer's mixture: diffusers' names behind lora_transformer_",
    source="https://github.com/Nerogar/OneTrainer, modules/util/convert",
    names=onetrainer_names,
    also_names=(lambda a: text_names(a) if a.denoiser == "transformer" else {},),
    style="kohya",
    begins=("lora_transformer_", "lora_te"),
    alpha="keep",
    rewrites=True,
    free=Free(prefix="lora_transformer_", flat=True, paths="diffusers", text="lora_te{}_"),
    holds=LYCORIS_KINDS,
)


def lycoris_names(a: Architecture) -> Mapping[str, Parts]:
    return {f"lycoris_{flat(path)}": parts for path, parts in a.denoiser_paths.items()} | {
        f"lycoris_{flat(path)}": parts for encoder in a.text_encoders for path, parts in a.text_paths(encoder).items()
    }


LYCORIS = Dialect(
    name="lycoris",
    title="LyCORIS's own wrapper: diffusers' names behind lycoris_",
    source="https://github.com/KohakuBlueleaf/LyCORIS, lycoris/wrapper.py",
    names=lycoris_names,
    style="kohya",
    begins=("lycoris_",),
    alpha="keep",
    rewrites=True,
    free=Free(prefix="lycoris_", flat=True, paths="diffusers"),
    holds=LYCORIS_KINDS,
)
