"""The dialects of diffusers and PEFT: dotted names of diffusers' own modules."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..architectures import Architecture, outlines
from ..architectures.names import COMPONENTS, Parts
from .base import PEFT_KINDS, Dialect, Names
from .free import DENOISERS, UNETS, Free, has_dots

ATTENTION = r"(.*\.attn\d*)\.to_(q|k|v|out)(?:\.0)?"
TEXT_ATTENTION = r"(.*\.self_attn)\.(q|k|v|out)_proj"
COMPONENT = r"(unet|transformer|prior|text_encoder(_\d)?|text_conditioner)\."


def module_names(a: Architecture) -> Mapping[str, Parts]:
    """Name modules ``component.path``, as loramerge itself does."""
    names = {f"{a.denoiser}.{path}": parts for path, parts in a.denoiser_paths.items()}
    for other in a.companions:
        names |= {f"{other.component}.{path}": parts for path, parts in a.text_paths(other).items()}
    return names


def bare_names(a: Architecture) -> Mapping[str, Parts]:
    """Name modules by the denoiser's paths without a component in front."""
    return a.denoiser_paths


def native_names(a: Architecture) -> Mapping[str, Parts]:
    """Put the model's own paths behind diffusers' component, as diffusion-pipe does for HunyuanVideo."""
    if a.denoiser == "unet":
        return {}
    return {f"transformer.{path}": parts for path, parts in {**a.native_paths, **a.other_paths}.items()}


def old_names(a: Architecture) -> Mapping[str, Parts]:
    """Name attention processors: ``attn1.processor.to_out`` for ``attn1.to_out.0``, ``self_attn.to_q`` for ``q_proj``."""
    return {old: parts for name, parts in module_names(a).items() if (old := _old(name))}


def old_bare_names(a: Architecture) -> Mapping[str, Parts]:
    return {old: parts for path, parts in a.denoiser_paths.items() if (old := _old(path))}


def oldest_text_names(a: Architecture) -> Mapping[str, Parts]:
    """Name text encoders' layers as diffusers 0.16 and 0.17, which put four on each projection, only one its own."""
    return {
        f"{name}.to_{match[2]}": parts
        for name, parts in module_names(a).items()
        if (match := re.fullmatch(TEXT_ATTENTION, name))
    }


def _old(name: str) -> str | None:
    if match := re.fullmatch(ATTENTION, name):
        return f"{match[1]}.processor.to_{match[2]}"
    if match := re.fullmatch(TEXT_ATTENTION, name):
        return f"{match[1]}.to_{match[2]}"
    return None


def _peft_text_names(a: Architecture, prefix: str, plain: tuple[str, ...]) -> dict[str, Parts]:
    """Name the modules of the denoiser's companions, for the models in `plain` without ``text_model.``."""
    names: dict[str, Parts] = {}
    for other in reversed(a.companions):
        start = prefix.format(component=other.component)
        for path, parts in a.text_paths(other).items():
            names[start + (path.removeprefix("text_model.") if other.model in plain else path)] = parts
    return names


PLAIN = ("clip-l", "clip-h")
"""Models whose class in transformers 5, ``CLIPTextModel``, has no ``text_model`` level."""

FOLDER = "{component}/base_model.model."


def peft_names(a: Architecture) -> Mapping[str, Parts]:
    """Name modules as PEFT, which saves one model per directory; the denoiser's is the directory itself."""
    names = {f"base_model.model.{path}": parts for path, parts in a.denoiser_paths.items()}
    return names | _peft_text_names(a, FOLDER, PLAIN)


def peft_old_text_names(a: Architecture) -> Mapping[str, Parts]:
    """Name text encoders' modules as transformers 4 does."""
    return _peft_text_names(a, FOLDER, ())


def peft_own_names(a: Architecture) -> Mapping[str, Parts]:
    """Name modules as PEFT, whichever version of transformers was installed."""
    return {**peft_old_text_names(a), **peft_names(a)}


def peft_folder_names(a: Architecture) -> Mapping[str, Parts]:
    return {f"{a.denoiser}/base_model.model.{path}": parts for path, parts in a.denoiser_paths.items()}


def peft_native_names(a: Architecture) -> Mapping[str, Parts]:
    """Name modules as PEFT around the model's own code: fal's trainer of FLUX.1 Kontext."""
    return {f"base_model.model.{path}": parts for path, parts in a.native_paths.items()}


def peft_text_names(folder: str, number: int) -> Names:
    """Name the adapter of one text encoder, in a directory of its own or in that of another encoder.

    Encoders have the same names and are told apart by their shapes.
    """

    def names(a: Architecture) -> Mapping[str, Parts]:
        paths = a.text_paths(a.text_encoders[number]) if number < len(a.text_encoders) else {}
        found = {f"{folder}base_model.model.{path}": parts for path, parts in paths.items()}
        return found | {stem.replace(".text_model.", ".", 1): parts for stem, parts in found.items()}

    return names


FOLDERS = ("", *(f"{component}/" for component in COMPONENTS if component.startswith("text_encoder")))
"""Directories that the adapter of a text encoder may be in."""


@dataclass(frozen=True, kw_only=True)
class FreePeft(Free):
    """Spelling of PEFT's stems: a denoiser's as they are, a text encoder's behind the name of its directory."""

    def module(self, stem: str) -> str:
        folder, _, path = stem.rpartition("base_model.model.")
        text = path.startswith(("text_model.", "encoder."))
        guess = "text_encoder" if text else "unet" if UNETS.match(path) else "transformer"
        return f"{folder.rstrip('/') or guess}.{path}"

    def stem(self, module: str, own: bool) -> str | None:
        component, _, path = module.partition(".")
        if not re.match(COMPONENT, module) or not has_dots(path):
            return None
        return f"{self.prefix}{path}" if component in DENOISERS else f"{component}/{self.prefix}{path}"


DIFFUSERS_FREE = Free(prefix="{}.", paths="diffusers")

DIFFUSERS = Dialect(
    name="diffusers",
    title="diffusers' training scripts for UNets",
    source="https://github.com/huggingface/diffusers, utils/state_dict_utils.py, convert_state_dict_to_diffusers",
    names=module_names,
    also_names=(bare_names,),
    style="diffusers",
    text_style="diffusers-text",
    even_rank=("text_projection",),
    begins=tuple(f"{component}." for component in COMPONENTS),
    writes=True,
    free=DIFFUSERS_FREE,
)

DIFFUSERS_PEFT = Dialect(
    name="diffusers-peft",
    title="diffusers' training scripts for transformers, save_lora_weights",
    source="https://github.com/huggingface/diffusers, loaders/lora_base.py, pack_weights and _save_lora_adapter_metadata",
    names=module_names,
    also_names=(bare_names, native_names),
    style="peft",
    also_reads=frozenset({"peft-short", "peft-named", "diffusers-text"}),
    begins=tuple(f"{component}." for component in COMPONENTS),
    writes=True,
    holds=PEFT_KINDS,
    dora_axis="out",
    free=DIFFUSERS_FREE,
)

DIFFUSERS_OLD = Dialect(
    name="diffusers-old",
    title="diffusers 0.12 to 0.20: attention processors",
    source="https://github.com/huggingface/diffusers, v0.20, loaders.py",
    names=old_names,
    also_names=(old_bare_names, oldest_text_names),
    style="diffusers-old",
    rewrites=True,
    begins=("unet.", "down_blocks.", "mid_block.", "up_blocks.", "text_encoder"),
)

PEFT = Dialect(
    name="peft",
    title="PEFT: adapter_model.safetensors and adapter_config.json",
    source="https://github.com/huggingface/peft, utils/save_and_load.py",
    names=peft_names,
    also_names=(
        peft_old_text_names,
        peft_folder_names,
        peft_native_names,
        *(peft_text_names(folder, number) for folder in FOLDERS for number in range(3)),
    ),
    recognised_by=peft_own_names,
    style="peft",
    also_reads=frozenset({"peft-short", "peft-named"}),
    begins=("base_model.model.", *(f"{component}/" for component in COMPONENTS)),
    writes=True,
    holds=PEFT_KINDS,
    dora_axis="out",
    free=FreePeft(prefix="base_model.model.", paths="diffusers"),
)

BARE = Dialect(
    name="bare",
    title="diffusers' module paths with nothing in front: DiffSynth, Lightning, save_lora_adapter",
    source="https://github.com/modelscope/DiffSynth-Studio",
    names=bare_names,
    style="kohya",
    also_reads=frozenset({"peft", "peft-short", "peft-named", "diffusers"}),
    begins=tuple(dict.fromkeys(head for outline in outlines().values() for head in outline.own)),
    rewrites=True,
    free=Free(prefix="", paths="other"),
)

ZIPLORA = Dialect(
    name="ziplora",
    title="mkshing's ZipLoRA: whole merged differences",
    source="https://github.com/mkshing/ziplora-pytorch, ziplora_pytorch/utils.py",
    names=module_names,
    style="merged",
    begins=("unet.",),
)
