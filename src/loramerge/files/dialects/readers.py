"""Parts of files that readers are known to leave out: a row per reader, dialect and kind of layer.

What diffusers and ComfyUI take of each family, tools/readers measures with their own code; tests/test_readers.py holds the
rows to it, tests/oracles/test_readers.py those about kinds of layers to diffusers.  The rows of A1111, Forge and
sd-scripts were found by running theirs.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from ...layers import Layer
from ..architectures import ARCHITECTURES, STOPS, Architecture, Kin, Unread, flat

Finds = Callable[[Architecture | None, Mapping[str, Layer]], Iterable[str]]
"""Picks the modules that a row is about from a family's layers as they are written."""


@dataclass(frozen=True)
class Drop:
    """A part of a file that one reader doesn't read."""

    reader: str
    does: str
    """``ignores``, or ``loads nothing, as it stops at``."""
    what: str
    dialects: tuple[str, ...]
    concerns: Callable[[Architecture | None], bool]
    """Returns whether it is true of a family."""
    finds: Finds


def each(concerns: Callable[[str, Layer], bool]) -> Finds:
    """Pick the modules for which a test is true."""
    return lambda a, layers: [module for module, layer in layers.items() if concerns(module, layer)]


def _is_dora(module: str, layer: Layer) -> bool:
    return layer.axis is not None


def _is_no_lora(module: str, layer: Layer) -> bool:
    """True unless the layer is a LoRA without a Tucker core, a DoRA of one, or a bias."""
    return layer.inner.kind not in ("lora", "bias") or layer.has_core


def _has_bias(module: str, layer: Layer) -> bool:
    return layer.inner.kind in ("lora", "bias") and layer.delta_bias() is not None


def _has_core(module: str, layer: Layer) -> bool:
    return layer.inner.kind == "lora" and layer.has_core


def _has_lokr_core(module: str, layer: Layer) -> bool:
    return layer.inner.kind == "lokr" and layer.has_core


def _matching(pattern: str) -> Finds:
    """Pick a denoiser's modules by their paths in it."""
    return each(lambda module, _: re.match(rf"(unet|transformer|prior)\.({pattern})", module) is not None)


def _is_any(module: str, layer: Layer) -> bool:
    return True


def _is_t5(module: str, layer: Layer) -> bool:
    return ".block." in module and module.startswith("text_encoder")


def _is_attention(module: str, layer: Layer) -> bool:
    return module.startswith("unet.") and ".to_" in module


def _is_outside_blocks(module: str, layer: Layer) -> bool:
    return module.startswith("transformer.") and "blocks." not in module


def _is_fused_in_comfyui(module: str, layer: Layer) -> bool:
    """True for Z-Image's layers that have other names in ComfyUI, where q, k and v are one weight."""
    return ".attention.to_" in module or module.startswith("transformer.all_")


def _is_added_embedding(module: str, layer: Layer) -> bool:
    return module.startswith("unet.add_embedding.")


def _renamed(a: Architecture | None, layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick the modules that kohya's trainers have under another name than ComfyUI."""
    assert a is not None
    own = {flat(path): parts for path, parts in a.native_paths.items()}
    trained = ((flat(path), parts) for path, parts in a.trained_paths.items())
    unread = {part.module for path, parts in trained if own.get(path) != parts for part in parts}
    return [module for module in layers if module in unread]


def _beside_text(a: Architecture | None, layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick all modules if text encoders are among them."""
    return layers if any(module.startswith("text_encoder") for module in layers) else ()


def _incomplete_clip_g(a: Architecture | None, layers: Mapping[str, Layer]) -> Iterable[str]:
    """Pick q, k, v and out of CLIP-G's attentions that lack one of the four."""
    ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    projections = [m for m in layers if m.startswith("text_encoder_2.") and m.endswith(ends)]
    return [m for m in projections if not all(f"{m.rpartition('.')[0]}.{end}" in layers for end in ends)]


def _every(a: Architecture | None) -> bool:
    return True


def _unets(a: Architecture | None) -> bool:
    return a is not None and a.denoiser == "unet"


def _those_unread_by_comfyui(a: Architecture | None) -> bool:
    return a is not None and a.denoiser != "unet" and not a.comfyui_reads_diffusers


def _those_trained_under_other_names(a: Architecture | None) -> bool:
    return a is not None and a.trained is not None


def _those_unread_by_diffusers(dialect: str) -> Callable[[Architecture | None], bool]:
    """Return whether diffusers reads nothing of a transformer's file in a dialect besides its own."""
    return lambda a: (
        a is not None and a.denoiser != "unet" and dialect not in a.diffusers_reads and a.kin is not Kin.SD3
    )


def _those_with_t5(a: Architecture | None) -> bool:
    return a is not None and any(encoder.model == "t5-xxl" for encoder in a.text_encoders)


def _those_of(*kin: Kin) -> Callable[[Architecture | None], bool]:
    return lambda a: a is not None and a.kin in kin


def _unets_and(*kin: Kin) -> Callable[[Architecture | None], bool]:
    return lambda a: _unets(a) or _those_of(*kin)(a)


KOHYA = ("kohya", "kohya-diffusers")
DOTTED = ("diffusers", "diffusers-peft")

DROPS: tuple[Drop, ...] = (
    Drop("diffusers", "ignores", "T5's layers", (*DOTTED, *KOHYA, "comfyui"), _those_with_t5, each(_is_t5)),
    Drop(
        "diffusers", "ignores", "DoRA's magnitudes", (*KOHYA, "comfyui"), _unets_and(Kin.FLUX, Kin.QWEN), each(_is_dora)
    ),
    Drop(
        "diffusers",
        STOPS,
        "LoHa, LoKr, Tucker cores, whole weights and norms",
        (*KOHYA, "comfyui"),
        _unets_and(Kin.FLUX, Kin.QWEN),
        each(_is_no_lora),
    ),
    Drop("diffusers", STOPS, "biases", (*KOHYA, "comfyui"), _unets_and(Kin.QWEN), each(_has_bias)),
    Drop("diffusers", "ignores", "biases", ("kohya", "comfyui"), _those_of(Kin.FLUX), each(_has_bias)),
    Drop(
        "diffusers",
        "ignores",
        "layers outside of the blocks",
        ("kohya", "comfyui"),
        _those_of(Kin.FLUX),
        each(_is_outside_blocks),
    ),
    Drop(
        "diffusers",
        "ignores",
        "the added embeddings",
        ("kohya-diffusers",),
        _those_of(Kin.SDXL),
        each(_is_added_embedding),
    ),
    Drop("diffusers", STOPS, "the names of UNets", ("comfyui",), _unets, each(_is_any)),
    Drop("diffusers", "ignores", "the names of SD 3", ("kohya", "comfyui"), _those_of(Kin.SD3), each(_is_any)),
    Drop("diffusers", "reads", "nothing of this model", ("kohya",), _those_unread_by_diffusers("kohya"), each(_is_any)),
    Drop(
        "diffusers",
        "reads",
        "nothing of this model",
        ("comfyui",),
        _those_unread_by_diffusers("comfyui"),
        each(_is_any),
    ),
    Drop("ComfyUI", "ignores", "the attention of UNets", DOTTED, _unets, each(_is_attention)),
    Drop("ComfyUI", "ignores", "the names of diffusers", DOTTED, _those_unread_by_comfyui, each(_is_any)),
    Drop("ComfyUI", "ignores", "attention and ends", ("kohya",), _those_of(Kin.Z_IMAGE), each(_is_fused_in_comfyui)),
    Drop("ComfyUI", "ignores", "trainers' names", ("kohya",), _those_trained_under_other_names, _renamed),
    Drop("ComfyUI", "ignores", "T5's layers", DOTTED, _those_with_t5, each(_is_t5)),
    Drop("ComfyUI", "ignores", "DoRA's magnitudes", ("diffusers-peft",), _every, each(_is_dora)),
    Drop("ComfyUI", "ignores", "biases", ("diffusers-peft",), _every, each(_has_bias)),
    Drop("ComfyUI", "ignores", "LoKr's Tucker cores", KOHYA, _every, each(_has_lokr_core)),
    Drop(
        "A1111",
        "ignores",
        "CLIP-G's attention without all of q, k, v and out",
        KOHYA,
        _those_of(Kin.SDXL),
        _incomplete_clip_g,
    ),
    Drop("A1111", STOPS, "the alphas of fused weights", ("kohya",), _those_of(Kin.SD3), each(_is_any)),
    Drop("Forge", "ignores", "files with text encoders", ("comfyui",), _unets, _beside_text),
    Drop("sd-scripts", "ignores", "Tucker cores of LoRA layers", KOHYA, _every, each(_has_core)),
)


def drops_of(a: Architecture | None) -> tuple[Drop, ...]:
    """Return the rows that are about one family alone."""
    return tuple(map(_of, a.unread)) if a else ()


@cache
def _of(part: Unread) -> Drop:
    def concerns(a: Architecture | None) -> bool:
        return a is not None and part in a.unread

    return Drop(part.reader, part.does, part.what, part.dialects, concerns, _matching(part.modules))


def dropped(dialect: str, architecture: str | None, layers: Mapping[str, Layer]) -> list[tuple[Drop, list[str]]]:
    """Return the rows that apply to a file, each with its modules.

    Args:
        dialect: Name of the dialect that is written.
        architecture: Name of the family, if it is known.
        layers: The layers as written, by module.
    """
    family = ARCHITECTURES[architecture] if architecture else None
    rows = [d for d in (*DROPS, *drops_of(family)) if dialect in d.dialects and d.concerns(family)]
    concerned = [(drop, list(drop.finds(family, layers))) for drop in rows]
    return [(drop, modules) for drop, modules in concerned if modules]


def said(dialect: str, architecture: str | None, layers: Mapping[str, Layer]) -> list[str]:
    """Return `dropped` in words, a line per row."""
    return [
        f"{drop.reader} {drop.does} {drop.what} in {dialect}: {len(modules)} of {len(layers)} layers"
        for drop, modules in dropped(dialect, architecture, layers)
    ]
